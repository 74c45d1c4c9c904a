"""Put an enhancement module into the vision tower of a multimodal model, and take it out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast, get_args

import torch
from torch import nn

from dualview.arguments import TEXTS, check_choice, check_count, check_indices, check_instance, shown
from dualview.geometry import GridLike, TileGrid
from dualview.models.adapter.hosts import HOSTS, REFUSED, SOURCES, Host, Place, Source
from dualview.models.adapter.idle import after, before, between, owner_of
from dualview.models.adapter.module import AttachedEnhance, Bound
from dualview.models.adapter.packed import enhance_packed, without_large
from dualview.models.adapter.packings import Flat, packing_of
from dualview.models.adapter.square import enhance_square, reduced
from dualview.models.encode_views import mixes_tiles
from dualview.models.parts import ViewOptions, low_res_of
from dualview.models.view_plan import gate_of
from dualview.ops.enhance import DualPerspectiveEnhance

Dem: TypeAlias = Mapping[str, Any] | nn.Module | Sequence[nn.Module]
Model = TypeVar("Model", bound=nn.Module)

NAME = "dualview"
"""The child's name in the tower: for PEFT's ``modules_to_save``, for optimizers, and in checkpoints."""
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
    config, host = _family(model)
    if _record(model) is not None:
        raise ValueError("a module is attached to this model already: detach(model) first.")
    tower = _tower(model, host)
    check_choice(source, "source", get_args(Source))
    if (reason := SOURCES[host.layout].get(source)) is not None:
        kinds = [kind for kind in get_args(Source) if kind not in SOURCES[host.layout]]
        raise ValueError(f"source={source!r} is not possible in {config.model_type}: {reason}. Possible are {kinds}.")
    if max_tiles_per_pass is not None:
        max_tiles_per_pass = check_count(max_tiles_per_pass, "max_tiles_per_pass", why="Or None.")
    places = _places(config, host, layers)
    dems, options = _dems(dem, host.width(config), len(places), tower, source)
    gated = all(gate_of(one) is None for one in dems) if options is None else options["gate"]
    gate = nn.Parameter(torch.zeros(host.width(config) * len(places), **_like(dems, tower))) if gated else None
    child = AttachedEnhance(dems, low_res_of(dems[0]), gate)
    child.train(tower.training)

    resize = source != "native"
    views = ViewOptions((1, 1), grid, None, resize=resize, max_tiles_per_pass=max_tiles_per_pass)
    hook = partial(_enhance, host.layout, tuple(places.values()), views)
    handles: list[Any] = [tower.register_forward_hook(hook, with_kwargs=True)]
    if source == "hires":
        handles.append(tower.register_forward_pre_hook(partial(_reduce, host.layout, grid), with_kwargs=True))
    owner, idle = owner_of(model), partial(before, host, tower, grid, source)
    handles.append(owner.register_forward_pre_hook(idle, with_kwargs=True))
    handles.append(cast(Any, model).get_decoder().register_forward_pre_hook(partial(between, owner), with_kwargs=True))
    handles.append(owner.register_forward_hook(after))
    setattr(tower, NAME, child)
    setattr(tower, RECORD, Attachment(config.model_type, grid, source, tuple(places), options, tuple(handles)))
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


def _family(model: nn.Module) -> tuple[Any, Host]:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise TypeError(
            f"model={shown(model)}: {type(model).__name__} is no multimodal model of transformers. For a vision tower "
            "alone use DualViewEncoder with HfEncoder, TimmEncoder, OpenClipEncoder or a function of your own."
        )
    family = cast(Any, config).model_type
    if family in REFUSED:
        raise ValueError(f"model_type={family!r} is not supported: {REFUSED[family]}.")
    if family == "llava" and cast(Any, config).vision_config.model_type == "pixtral":
        return config, HOSTS["mistral3"]
    if family not in HOSTS:
        raise ValueError(
            f"model_type={family!r} has not been tested, so nothing is attached to it. Tested are {', '.join(HOSTS)}. "
            "A family whose tower takes square images of one size may need no more than a record in "
            "dualview/models/adapter/hosts.py and a configuration in the tests."
        )
    return config, HOSTS[family]


def _tower(model: nn.Module, host: Host) -> nn.Module:
    tower = cast(Any, model).get_encoder(modality="image")
    tower = tower.get_submodule(host.inner)
    if hasattr(tower, NAME):
        raise ValueError(f"{type(tower).__name__} has something of the name {NAME!r} already.")
    return cast(nn.Module, tower)


def _places(config: Any, host: Host, layers: Sequence[int] | None) -> dict[int, Place]:
    """The places of the layers that are enhanced, in the order in which the model reads them."""
    places = host.places(config)
    if layers is None:
        vision = config.vision_config
        count = cast(int, getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0))
        return dict([max(places.items(), key=lambda item: item[0] % (count + 1))])
    given, layers = layers, check_indices(layers, "layers")
    unknown = [layer for layer in layers if layer not in places]
    if unknown or not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"layers={shown(given)}: must be some of those that this model reads, {list(places)}, each once; what it "
            "does not read would have no effect."
        )
    return {layer: place for layer, place in places.items() if layer in layers}


def _dems(
    dem: Dem | None, width: int, count: int, tower: nn.Module, source: Source
) -> tuple[list[nn.Module], dict[str, Any] | None]:
    """The modules, and the options that they were made of."""
    if isinstance(dem, Mapping) or dem is None:
        options = {"preset": "released", "gate": True, **(dem or {})}
        return [_made(options, width, _like([], tower), source) for _ in range(count)], options
    listed = isinstance(dem, Sequence) and not isinstance(dem, TEXTS)
    dems = [dem] if isinstance(dem, nn.Module) else list(dem) if listed else []
    if (not dems and not listed) or not all(isinstance(one, nn.Module) for one in dems):
        raise TypeError(f"dem={shown(dem)}: must be options, a module, or a module for each of {count} layers.")
    if len(dems) != count or len({id(one) for one in dems}) != count:
        raise ValueError(
            f"dem={shown(dem)}: {len(dems)} modules were given for {count} layers: give each layer one of its own."
        )
    for one in dems:
        if getattr(one, "dim", width) != width:
            raise ValueError(f"a dem for tokens of width {shown(one.dim)}: this model reads tokens of width {width}.")
        if (readout := getattr(one, "readout", None)) is not None:
            _check_readout(readout, source)
    if len({gate_of(one) is None for one in dems}) > 1:
        raise ValueError(f"dem={shown(dem)}: some of these modules have a gate and some have none: all must, or none.")
    return dems, None


def _like(dems: Sequence[nn.Module], tower: nn.Module) -> dict[str, Any]:
    """Type and device of new parameters: those of the modules, where there are any, or of the tower."""
    found = (p for module in (*dems, tower) for p in module.parameters() if p.is_floating_point())
    like = next(found, torch.empty(0))
    hooks = (getattr(module, "_hf_hook", None) for module in tower.modules())  # accelerate's: weights are elsewhere
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    return {"device": devices[0] if devices else like.device, "dtype": like.dtype}


def _made(options: Mapping[str, Any], width: int, like: dict[str, Any], source: Source) -> DualPerspectiveEnhance:
    rest = {name: value for name, value in options.items() if name != "gate"}
    presets = {"released": DualPerspectiveEnhance.released, "paper": DualPerspectiveEnhance.paper}
    preset = rest.pop("preset")
    if preset not in presets:
        raise ValueError(f"dem={dict(options)}: needs a preset of {tuple(presets)}.")
    if source == "native":
        rest.setdefault("readout", "none")
    if "readout" in rest:
        _check_readout(rest["readout"], source)
    try:
        return presets[preset](width, **{**like, **rest})
    except TypeError as error:
        raise ValueError(f"dem={dict(options)}: {error}. Options are the arguments of the preset's module.") from error


def _check_readout(readout: object, source: Source) -> None:
    if (readout == "none") != (source == "native"):
        wanted = '"none", a token for each of the image\'s' if source == "native" else "one with the tokens of one tile"
        raise ValueError(f"dem with readout={shown(readout)}: with source={source!r} it must be {wanted}.")


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
