"""Vision towers of transformers, timm and open_clip as encoders (T, 3, h, w) -> (T, h', w', D).

None of these libraries is imported here: each class works on a tower that the caller has made. An encoder may declare
`layer_plan`, which of its layers it runs, and `token_map`, the size of its result: both go into the plan of what is
computed.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from dualview.geometry import Size
from dualview.ops.plan import LayerPlan, plan_layers, planning


class HfEncoder(nn.Module):
    """A vision tower of transformers: CLIP, SigLIP, DINOv2 and towers built like them.

    Neither the layers after the chosen one nor the final norm are run. Prefix tokens (class token, registers) are
    dropped.

    Args:
        model: `CLIPVisionModel`, `SiglipVisionModel`, `Dinov2Model` or another with ``embeddings`` and ``encoder``.
        layer: Index into the model's ``hidden_states`` (0 is the embedding, -1 the last layer before the final norm, -2
            the one before it, as LLaVA and INF-LLaVA use), or None for ``last_hidden_state``, which runs the whole
            model.

    Shape:
        (T, 3, h, w) pixels -> (T, h/p, w/p, D) tokens, for patches of p pixels. CLIP and SigLIP take tiles of the size
        they were trained for; DINOv2 interpolates its positions, so it takes any.

    Raises:
        ValueError: The model has not the expected parts, ``layer`` does not exist, or the tiles are not of the model's
            size.

    Example:
        >>> import torch
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        ...                           image_size=28, patch_size=14)
        >>> HfEncoder(CLIPVisionModel(config))(torch.randn(5, 3, 28, 28)).shape
        torch.Size([5, 2, 2, 32])
    """

    def __init__(self, model: nn.Module, layer: int | None = -2) -> None:
        super().__init__()
        hf_plan(model, layer)
        self.model, self.layer = model, layer

    def forward(self, pixels: Tensor) -> Tensor:
        return hf_token_map(self.model, pixels, self.layer)

    def layer_plan(self) -> LayerPlan:
        """Which layers are run."""
        return hf_plan(self.model, self.layer)

    def token_map(self, tile: Size) -> Size:
        """Tokens (h', w') of a tile of (h, w) pixels."""
        return _patches(self.model, tile)

    def extra_repr(self) -> str:
        return f"layer={self.layer}"


def hf_plan(model: nn.Module, layer: int | None) -> LayerPlan:
    """Which layers of a vision tower ``hidden_states[layer]`` needs; all of them, and the final norm, for None.

    Raises:
        ValueError: The model has not the expected parts, or ``layer`` does not exist.
    """
    config, count = getattr(model, "config", None), len(_blocks(model))
    if not (hasattr(model, "embeddings") and hasattr(config, "patch_size") and count):
        raise ValueError(
            f"{type(model).__name__} is not a vision tower of the expected build: it needs `embeddings`, "
            "`encoder.layers` (or `encoder.layer`) and `config.patch_size`, as CLIPVisionModel, SiglipVisionModel and "
            "Dinov2Model have. Of a two-tower model pass its `vision_model`; wrap any other tower in a function "
            "(T, 3, h, w) -> (T, h', w', D)."
        )
    if layer is not None and not -count - 1 <= layer <= count:
        raise ValueError(
            f"layer={layer} does not exist: {type(model).__name__} has {count} layers, so hidden_states has "
            f"indices {-count - 1} to {count}."
        )
    needed = count if layer is None else layer % (count + 1)
    return plan_layers(needed, count, norm=layer is None, full=not planning())


def _blocks(model: nn.Module) -> nn.ModuleList:
    encoder = getattr(model, "encoder", None)
    layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
    return layers if isinstance(layers, nn.ModuleList) else nn.ModuleList()


def hf_token_map(model: nn.Module, pixels: Tensor, layer: int | None) -> Tensor:
    """``hidden_states[layer]`` of a vision tower as a token map, running the layers that `hf_plan` names."""
    tower = cast(Any, model)
    height, width = pixels.shape[-2:]
    # A fixed table of positions: SigLIP would add it, row by row, to a map of any shape with as many patches.
    if hasattr(tower.embeddings, "position_ids") and (height, width) != _pair(tower.config.image_size):
        raise ValueError(
            f"{type(model).__name__} got tiles of {height} x {width} (height x width), but it has positions for one "
            f"size alone: use tile={_pair(tower.config.image_size)}."
        )
    plan = hf_plan(model, layer)
    if layer is None:
        tokens = cast(Tensor, tower(pixel_values=pixels).last_hidden_state)
    elif plan.norm:  # all that there is
        tokens = cast(Tensor, tower(pixel_values=pixels, output_hidden_states=True).hidden_states[layer])
    else:
        tokens = tower.embeddings(pixels)
        if hasattr(tower, "pre_layrnorm"):  # CLIP's own spelling
            tokens = tower.pre_layrnorm(tokens)
        for block in _blocks(model)[: plan.run]:
            out = block(tokens, None)
            tokens = out[0] if isinstance(out, tuple) else out
    h, w = _patches(model, (height, width))
    return cast(Tensor, tokens[:, tokens.shape[1] - h * w :].unflatten(1, (h, w)))


def _patches(model: nn.Module, tile: Size) -> Size:
    patch = _pair(cast(Any, model).config.patch_size)
    if tile[0] < patch[0] or tile[1] < patch[1]:
        raise ValueError(
            f"a tile of {tile[0]} x {tile[1]} pixels (height x width) is smaller than a patch of "
            f"{type(model).__name__}, {patch[0]} x {patch[1]}: use larger tiles."
        )
    return tile[0] // patch[0], tile[1] // patch[1]


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class TimmEncoder(nn.Module):
    """A timm model with ``forward_intermediates``: vision transformers and most convolutional networks.

    The blocks after the chosen one are not run. Prefix tokens are dropped.

    Args:
        model: A model of `timm.create_model`.
        layer: Index of the block (stage, in a convolutional network) whose output is used, as timm counts them.
        norm: Whether the final norm is applied to that output, where the model has one.

    Shape:
        (T, 3, h, w) pixels -> (T, h', w', D) tokens

    Raises:
        ValueError: The model has no ``forward_intermediates``.

    Example:
        >>> import timm
        >>> import torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        >>> TimmEncoder(vit)(torch.randn(5, 3, 32, 32)).shape
        torch.Size([5, 2, 2, 192])
    """

    def __init__(self, model: nn.Module, layer: int = -2, *, norm: bool = False) -> None:
        super().__init__()
        _check_intermediates(model)
        self.model, self.layer, self.norm = model, layer, norm

    def forward(self, pixels: Tensor) -> Tensor:
        options: dict[str, Any] = {"norm": True} if self.norm else {}
        maps = cast(Any, self.model).forward_intermediates(
            pixels, indices=[self.layer], stop_early=planning(), intermediates_only=planning(), output_fmt="NCHW",
            **options,
        )  # fmt: skip
        of_layer = (maps if planning() else maps[1])[0]
        return cast(Tensor, of_layer).movedim(1, -1)

    def layer_plan(self) -> LayerPlan | None:
        """Which blocks (stages, in a convolutional network) are run; None for models that do not list them."""
        return _plan_of_levels(self.model, self.layer, norm=self.norm)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, norm={self.norm}"


class OpenClipEncoder(nn.Module):
    """The image tower of an open_clip model.

    The blocks after the chosen one are not run. Prefix tokens are dropped.

    Args:
        model: `model.visual` of an open_clip model, or the model itself.
        layer: Index of the block whose output is used.
        norm: Whether the final norm is applied to that output.

    Shape:
        (T, 3, h, w) pixels -> (T, h', w', D) tokens

    Raises:
        ValueError: The tower has no ``forward_intermediates``.

    Example:
        >>> import open_clip
        >>> import torch
        >>> model = open_clip.create_model("ViT-S-32-alt", force_image_size=64)
        >>> OpenClipEncoder(model)(torch.randn(5, 3, 64, 64)).shape
        torch.Size([5, 2, 2, 384])
    """

    def __init__(self, model: nn.Module, layer: int = -2, *, norm: bool = False) -> None:
        super().__init__()
        tower = getattr(model, "visual", model)
        _check_intermediates(tower)
        self.model, self.layer, self.norm = tower, layer, norm

    def forward(self, pixels: Tensor) -> Tensor:
        output = cast(Any, self.model).forward_intermediates(
            pixels,
            indices=[self.layer],
            stop_early=planning(),
            normalize_intermediates=self.norm,
            intermediates_only=planning(),
            output_fmt="NCHW",
        )
        return cast(Tensor, output["image_intermediates"][0]).movedim(1, -1)

    def layer_plan(self) -> LayerPlan | None:
        """Which blocks are run; None for towers that are neither transformers of open_clip nor models of timm."""
        blocks = getattr(getattr(self.model, "transformer", None), "resblocks", None)
        if blocks is None:
            return _plan_of_levels(getattr(self.model, "trunk", None), self.layer, norm=self.norm)
        return plan_layers(self.layer % len(blocks) + 1, len(blocks), norm=self.norm, full=not planning())

    def extra_repr(self) -> str:
        return f"layer={self.layer}, norm={self.norm}"


def _plan_of_levels(model: nn.Module | None, layer: int, *, norm: bool) -> LayerPlan | None:
    """Of a model of timm, which lists its levels in ``feature_info``."""
    levels: list[Any] = getattr(model, "feature_info", [])
    if not levels:
        return None
    has_norm = isinstance(getattr(model, "norm", None), nn.Module)
    return plan_layers(layer % len(levels) + 1, len(levels), norm=norm, full=not planning(), has_norm=has_norm)


def _check_intermediates(model: nn.Module) -> None:
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{type(model).__name__} has no `forward_intermediates`: update the library it comes from, or wrap the "
            "model in a function (T, 3, h, w) -> (T, h', w', D)."
        )
