"""A vision tower of transformers as an encoder: which towers can be one, and when it may stop at the layer read.

Of a tower only the embeddings and the layers up to the chosen one are called, one by one. That gives what the tower
gives only where nothing else takes part, so what a tower is built of is checked when an encoder is made, and at every
call whether something hangs on the parts that would be left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from threading import get_ident
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dualview.arguments import check_size, integer_of, shown
from dualview.geometry import Size
from dualview.ops.planned.live import LayerPlan, plan_layers
from dualview.ops.planned.products import untouched
from dualview.switches import planning
from dualview.tensors import check_pixels


class HfTower(NamedTuple):
    """A vision tower of transformers and the layer that is read, as an encoder that does not own the tower.

    Attributes:
        model: The tower; `check_tower` has passed it.
        layer: As for `HfEncoder`.
    """

    model: nn.Module
    layer: int | None

    def layer_plan(self) -> LayerPlan:
        """Which layers are run."""
        return self._plan(full=not planning())

    def _plan(self, *, full: bool) -> LayerPlan:
        count = len(_blocks(self.model))
        needed = count if self.layer is None else self.layer % (count + 1)
        whole = full or not _may_stop_early(self.model, needed)
        return plan_layers(needed, count, norm=self.layer is None, full=whole)

    def token_map(self, tile: Size) -> Size:
        """Tokens (h', w') of a tile of (h, w) pixels."""
        patch, tile = _pair(cast(Any, self.model).config.patch_size), check_size(tile, "tile")
        if tile[0] < patch[0] or tile[1] < patch[1]:
            raise ValueError(
                f"tile={tile}: a tile of {tile[0]} x {tile[1]} pixels (height x width) is smaller than a patch of "
                f"{type(self.model).__name__}, {patch[0]} x {patch[1]}: use larger tiles."
            )
        return tile[0] // patch[0], tile[1] // patch[1]

    def __call__(self, pixels: Tensor) -> Tensor:
        """``hidden_states[layer]`` as a token map, from the layers that `layer_plan` names."""
        tower, plan = cast(Any, self.model), self._plan(full=not planning())
        check_pixels(tower, pixels, getattr(tower.config, "num_channels", 3))
        height, width = pixels.shape[-2:]
        # A fixed table of positions: SigLIP would add it, row by row, to a map of any shape with as many patches.
        if hasattr(tower.embeddings, "position_ids") and (height, width) != _pair(tower.config.image_size):
            raise ValueError(
                f"{type(tower).__name__} got pixels of {height} x {width} (height x width), but it has positions for "
                f"one size alone: use tile={_pair(tower.config.image_size)}."
            )
        if self.layer is None:
            tokens = cast(Tensor, tower(pixels).last_hidden_state)
        elif plan.norm:  # all that there is
            tokens = self._state_of_whole(pixels)
        else:
            tokens = tower.embeddings(pixels)
            if hasattr(tower, "pre_layrnorm"):  # CLIP's own spelling
                tokens = tower.pre_layrnorm(tokens)
            for block in _blocks(tower)[: plan.run]:
                out = block(tokens, None)
                tokens = out[0] if isinstance(out, tuple) else out
        h, w = self.token_map((height, width))
        return cast(Tensor, tokens[:, tokens.shape[1] - h * w :].unflatten(1, (h, w)))

    def _state_of_whole(self, pixels: Tensor) -> Tensor:
        """``hidden_states[layer]`` from a call of the whole tower."""
        assert self.layer is not None
        tower, needed = cast(Any, self.model), self.layer % (len(_blocks(self.model)) + 1)
        if _of_transformers(tower):
            return cast(Tensor, tower(pixels, output_hidden_states=True).hidden_states[self.layer])
        # transformers knows by the class what to collect, and sharding (FSDP2) changes the class.
        found, thread = [], get_ident()

        def keep(_: nn.Module, given: tuple[Tensor, ...], out: Any = None) -> None:
            if get_ident() == thread:
                tokens = given[0] if out is None else out
                found.append(tokens[0] if isinstance(tokens, tuple) else tokens)

        blocks = _blocks(tower)
        handle = blocks[needed - 1].register_forward_hook(keep) if needed else blocks[0].register_forward_pre_hook(keep)
        try:
            states = tower(pixels, output_hidden_states=True).hidden_states
        finally:
            handle.remove()
        return found[0] if states is None else cast(Tensor, states[self.layer])


KNOWN_PARTS = {"embeddings", "pre_layrnorm", "encoder"} | {"post_layernorm", "layernorm", "rms_norm", "head", "pooler"}
"""Of a tower: what comes before its layers, the layers, and what comes after them."""
KNOWN_TOKENS = {"class_embedding", "cls_token", "register_tokens", "mask_token", "position_embeddings"}
"""Parameters of the embeddings: tokens that come before the patches, and what is added to patches."""
COLLECTING = "transformers.utils.output_capturing"
"""Whose hooks stay on a tower that was once asked for its hidden states, and do nothing unless asked again."""


def check_tower(model: nn.Module, layer: int | None) -> None:
    """Raise unless `HfTower` computes what the tower itself does.

    The embeddings must make tokens of pixels alone, prefix tokens first, and a layer must need nothing but the tokens
    of the one before it.

    Raises:
        ValueError: The tower is built in another way, or has no such layer.
        TypeError: ``layer`` is no integer.
    """
    reason, count = _unlike_the_known(model), len(_blocks(model))
    if reason:
        raise ValueError(
            f"model: {type(model).__name__} is not a vision tower of the expected build: {reason}. It needs "
            "`embeddings`, `encoder.layers` (or `encoder.layer`) and `config.patch_size`, as CLIPVisionModel, "
            "SiglipVisionModel and Dinov2Model have. Of a two-tower model pass its `vision_model`; wrap any other "
            "tower in a function (T, 3, h, w) -> (T, h', w', D)."
        )
    if layer is None:
        return
    check_integer(layer)
    if not -count - 1 <= layer <= count:
        raise ValueError(
            f"layer={layer} does not exist: {type(model).__name__} has {count} layers, so hidden_states has "
            f"indices {-count - 1} to {count}."
        )


def _unlike_the_known(model: nn.Module) -> str:
    """What of a tower differs from those that are known, empty if nothing does."""
    config, blocks = getattr(model, "config", None), _blocks(model)
    if not (hasattr(model, "embeddings") and hasattr(config, "patch_size") and len(blocks)):
        return "a part is missing"
    if not _of_transformers(model):
        return ""  # a wrapper shows its own parts; it is called whole
    tower = cast(Any, model)
    parts = {name for name, _ in tower.named_children()} | set(tower._parameters) | set(tower.encoder._parameters)
    if parts - KNOWN_PARTS:
        return f"what {sorted(parts - KNOWN_PARTS)} does to tokens is not known"
    if unknown := set(tower.embeddings._parameters) - KNOWN_TOKENS:
        return f"its embeddings have {sorted(unknown)}, which may be tokens that are no patches"
    if needed := [p.name for p in _parameters_of(tower.embeddings)[1:] if p.default is p.empty]:
        return f"its embeddings need {needed} beside pixels"
    made = inspect.signature(tower.embeddings.forward).return_annotation
    if made not in (Tensor, "Tensor", "torch.Tensor", inspect.Signature.empty):
        return f"its embeddings return {getattr(made, '__name__', made)}, not a tensor of tokens"
    names = [p.name for p in _parameters_of(blocks[0])]
    needed = [p.name for p in _parameters_of(blocks[0])[2:] if p.default is p.empty]
    if names and (names[1:2] != ["attention_mask"] or needed):  # of a wrapper, (*args), nothing can be said
        return f"its layers take {names}, not the tokens and `attention_mask` alone"
    return ""


def _parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """The parameters of `forward` that may be given by position."""
    found = inspect.signature(module.forward).parameters.values()
    return [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _of_transformers(model: nn.Module) -> bool:
    return type(model).__module__.split(".")[0] in ("transformers", "dualview")


def _may_stop_early(model: nn.Module, run: int) -> bool:
    """Whether the layers before ``run`` may be called one by one, and nothing else of the tower."""
    like = next(model.parameters())
    return _of_transformers(model) and all(untouched(part, like, COLLECTING) for part in _left_out(model, run))


def _left_out(model: nn.Module, run: int) -> Iterator[nn.Module]:
    """Every module that is not called where the tower stops after ``run`` layers."""
    yield model
    yield cast(nn.Module, model.encoder)
    for block in _blocks(model)[run:]:
        yield from block.modules()
    for name, child in model.named_children():
        if name not in ("embeddings", "pre_layrnorm", "encoder"):
            yield from child.modules()


def _blocks(model: nn.Module) -> nn.ModuleList:
    encoder = getattr(model, "encoder", None)
    layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
    return layers if isinstance(layers, nn.ModuleList) else nn.ModuleList()


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_integer(layer: object) -> None:
    """Raise a TypeError unless a layer is given by an integer."""
    if integer_of(layer) is None:
        raise TypeError(f"layer={shown(layer)}: must be an integer, the index of a layer.")
