"""Put an enhancement module into the vision tower of a multimodal model, and take it out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast, get_args

import torch
from torch import nn

from dualview.arguments import check_choice, check_count, check_instance
from dualview.geometry import GridLike, TileGrid
from dualview.models.adapter.dems import Dem, dems_of, like
from dualview.models.adapter.hosts import SOURCES, Place, Source
from dualview.models.adapter.idle import after, before, between, owner_of
from dualview.models.adapter.locate import NAME, check_bare, family_of, part_of, places_of, tower_of
from dualview.models.adapter.module import AttachedEnhance, Bound
from dualview.models.adapter.packed import enhance_packed, without_large
from dualview.models.adapter.packings import Flat, packing_of
from dualview.models.adapter.square import enhance_square, reduced
from dualview.models.encode_views import mixes_tiles
from dualview.models.parts import ViewOptions, low_res_of
from dualview.models.view_plan import gate_of

Model = TypeVar("Model", bound=nn.Module)

RECORD = "_dualview_attachment"
"""The attribute of the tower that says what is attached."""


@dataclass(frozen=True)
class Attachment:
    """What has been attached to a tower.

    Attributes:
        model_type: The family of the host.
        grid: Rows and columns of tiles.
        source: Where the pixels of the views come from.
        layers: The layers whose features are enhanced.
        dem: The options of the DEMs; None where the caller made them.
        handles: What takes the hooks away again.
    """

    model_type: str
    grid: TileGrid
    source: Source
    layers: tuple[int, ...]
    dem: dict[str, Any] | None
    handles: tuple[Any, ...]


def attach(
    model: Model,
    grid: GridLike = (2, 2),
    source: Source = "upsample",
    *,
    dem: Dem | None = None,
    layers: Sequence[int] | None = None,
    max_tiles_per_pass: int | None = None,
) -> Model:
    """Put an enhancement module into the vision tower of a multimodal model of transformers.

    The tower runs as before. A hook then cuts local and stride tiles from the same images, sends them through the same
    tower, and mixes what the module makes of them into the features that the model reads. Number and width of the
    tokens stay as they are. The module is the tower's child ``dualview``. By default a gate of zeros multiplies its
    result, so that the model computes at first, bit by bit, what it computed before.

    Args:
        model: A model of one of the families in the documentation's support matrix, with its weights loaded. Attach
            before you wrap it (PEFT, FSDP, DDP) or compile it.
        grid: Rows and columns of tiles.
        source: Where the views' pixels come from. "upsample": the images as they reach the tower are interpolated to
            the size of the grid; the processor stays as it is. "hires": the processor delivers images of grid times
            the tower's size, see [`adapt_processor`][dualview.adapt_processor]. "native", for towers that take images
            of any size: the views are the tiles of the image itself, whose sides are whole tiles.
        dem: Options of the enhancement modules: ``{"preset": "released" | "paper"}`` and any argument of
            [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance] in place of the preset's, and ``"gate": False``
            for none. None for the released preset. Or a module of your own for each layer, without a gate or each with
            one.
        layers: Which of the layers that the model reads are enhanced, each by a module of its own; -1 is the tower's
            output. None for the deepest.
        max_tiles_per_pass: Most views in one call of the tower. None: as
            [`DualViewEncoder`][dualview.DualViewEncoder] has it; all of them where processes train together, so that
            each calls its tower equally often.

    Returns:
        ``model``, changed.

    Raises:
        ValueError: The family, an option or the combination is not supported, or something is attached already. The
            model is as it was.
        TypeError: ``model`` is no model of transformers, or ``dem`` is of the wrong type.

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
        >>> vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                           image_size=28, patch_size=14)
        >>> text = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                    vocab_size=32)
        >>> config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=9)
        >>> host = LlavaForConditionalGeneration(config)
        >>> sorted({name.split(".")[-1] for name, _ in attach(host).named_parameters() if "dualview" in name})
        ['bias', 'gate', 'weight']
        >>> any("dualview" in name for name, _ in detach(host).named_parameters())
        False
    """
    grid = TileGrid.of(grid)
    config, host = family_of(model)
    if _record(model) is not None:
        raise ValueError("a module is attached to this model already: detach(model) first.")
    check_bare(model)
    tower = tower_of(model, host)
    check_choice(source, "source", get_args(Source))
    if (reason := SOURCES[host.layout].get(source)) is not None:
        kinds = [kind for kind in get_args(Source) if kind not in SOURCES[host.layout]]
        raise ValueError(f"source={source!r} is not possible in {config.model_type}: {reason}. Possible are {kinds}.")
    if max_tiles_per_pass is not None:
        max_tiles_per_pass = check_count(max_tiles_per_pass, "max_tiles_per_pass", why="Or None.")
    places = places_of(config, host, layers)
    dems, options = dems_of(dem, host.width(config), len(places), tower, source)
    gated = all(gate_of(one) is None for one in dems) if options is None else options["gate"]
    gate = nn.Parameter(torch.zeros(host.width(config) * len(places), **like(dems, tower))) if gated else None
    child = AttachedEnhance(dems, low_res_of(dems[0]), gate)
    child.train(tower.training)
    if any(parameter.is_meta for parameter in child.parameters()):
        raise ValueError(
            "the module's parameters would be on the meta device: load the host's weights first, then attach."
        )

    owner, decoder = owner_of(model), part_of(model, "get_decoder")
    resize = source != "native"
    views = ViewOptions((1, 1), grid, None, resize=resize, max_tiles_per_pass=max_tiles_per_pass)
    hook = partial(_enhance, host.layout, tuple(places.values()), views)
    idle = partial(before, host, tower, grid, source)
    register = [
        partial(tower.register_forward_hook, hook, with_kwargs=True),
        partial(owner.register_forward_pre_hook, idle, with_kwargs=True),
        partial(decoder.register_forward_pre_hook, partial(between, owner), with_kwargs=True),
        partial(owner.register_forward_hook, after),
    ]
    if source == "hires":
        reduce = partial(_reduce, host.layout, grid)
        register.append(partial(tower.register_forward_pre_hook, reduce, with_kwargs=True))
    handles = tuple(hang() for hang in register)  # from here on nothing fails
    setattr(tower, NAME, child)
    setattr(tower, RECORD, Attachment(config.model_type, grid, source, tuple(places), options, handles))
    return model


def detach(model: Model) -> Model:
    """Take away what [`attach`][dualview.attach] has put into a model, which is then as it was.

    Args:
        model: The model, or what has been put around it.

    Returns:
        ``model``, changed.

    Raises:
        ValueError: Nothing is attached.

    Example:
        >>> from torch import nn
        >>> detach(nn.Identity())
        Traceback (most recent call last):
        ValueError: model: nothing is attached to this Identity.
    """
    found = site_of(model)
    for handle in cast(Attachment, getattr(found, RECORD)).handles:
        handle.remove()
    delattr(found, NAME)
    delattr(found, RECORD)
    return model


def attached(model: nn.Module) -> AttachedEnhance:
    """The module that is attached to a model, with a DEM for each layer in ``dems``.

    Args:
        model: The model, or what has been put around it.

    Returns:
        The child ``dualview`` of the vision tower: as it was attached, or what a library has put in its place since.

    Raises:
        ValueError: Nothing is attached.

    Example:
        >>> from torch import nn
        >>> attached(nn.Identity())
        Traceback (most recent call last):
        ValueError: model: nothing is attached to this Identity.
    """
    return cast(AttachedEnhance, getattr(site_of(model), NAME))


def attachment_of(model: nn.Module) -> Attachment:
    """What has been attached to a model.

    Raises:
        ValueError: Nothing is.
    """
    return cast(Attachment, getattr(site_of(model), RECORD))


def site_of(model: nn.Module) -> nn.Module:
    """The module that something is attached to: its child is called `NAME`, its record `RECORD`.

    Raises:
        ValueError: Nothing is attached.
    """
    found = _record(model)
    if found is None:
        raise ValueError(f"model: nothing is attached to this {type(model).__name__}.")
    return found


def _record(model: nn.Module) -> nn.Module | None:
    check_instance(model, "model", nn.Module, "a model")
    return next((module for module in model.modules() if RECORD in vars(module)), None)


def _reduce(layout: str, grid: TileGrid, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward pre-hook of "hires": the tower itself gets the small images."""
    if layout == "square":
        return reduced(args, kwargs, grid, tower)
    return without_large(cast(Flat, packing_of(layout, tower)), args, kwargs, grid)


def _enhance(
    layout: str,
    places: tuple[Place, ...],
    views: ViewOptions,
    tower: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """The forward hook. The child is looked up at each call: it may have been replaced or wrapped since."""
    if views.max_tiles_per_pass is None and _whole_pass(tower):
        views = views._replace(max_tiles_per_pass=WHOLE)
    child = getattr(tower, NAME)
    if layout == "square":
        enhance_square(tower, args, kwargs, output, places, partial(Bound, child), views)
    else:
        enhance_packed(packing_of(layout, tower), tower, args, kwargs, output, places, child, views)
    return output


WHOLE = 2**62
"""More views than there are in one call."""


def _whole_pass(tower: nn.Module) -> bool:
    """Whether all views must go through the tower in one call.

    Batch norms take their statistics from it; and processes that train together must call a sharded tower equally
    often, whatever the number of their images.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together or any(mixes_tiles(module) for module in tower.modules())
