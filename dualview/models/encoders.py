"""Vision towers of transformers, timm and open_clip as encoders (T, 3, h, w) -> (T, h', w', D).

None of these libraries is imported here: each class works on a tower that the caller has made. Every encoder declares
`layer_plan`, the layers that it runs; `HfEncoder` also declares `token_map`, the size of its result. Both go into the
plan of what is computed (`dualview.models.view_plan`).
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from dualview.arguments import check_flags, check_size
from dualview.geometry import Size
from dualview.models.hf_tower import HfTower, check_integer, check_tower
from dualview.ops.planned.live import LayerPlan, plan_layers
from dualview.switches import planning
from dualview.tensors import check_pixels


class HfEncoder(nn.Module):
    """A vision tower of transformers: CLIP, SigLIP, DINOv2 and towers built like them.

    Neither the layers after the chosen one nor the final norm are run. Prefix tokens (class token, registers) are
    dropped. A tower is called whole where leaving out layers could change what it does: where it or a layer that would
    be left out has hooks, is sharded or offloaded, or where its class is not one of transformers.

    Args:
        model: `CLIPVisionModel`, `SiglipVisionModel`, `Dinov2Model` or another with ``embeddings`` and ``encoder``.
        layer: Index into the model's ``hidden_states`` (0 is the embedding, -1 the last layer before the final norm, -2
            the one before it, as LLaVA and INF-LLaVA use), or None for ``last_hidden_state``, which runs the whole
            model.

    Shape:
        (T, 3, h, w) pixels -> (T, h/p, w/p, D) tokens, for patches of p pixels. CLIP and SigLIP take tiles of the size
        they were trained for; DINOv2 interpolates its positions, so it takes any.

    Raises:
        ValueError: The model is not built as expected, ``layer`` does not exist, or the tiles are not of the model's
            size.
        TypeError: ``layer`` is no integer.

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
        check_tower(model, layer)
        self.model, self.layer = model, layer

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            pixels: Normalised tiles.

        Shape:
            (T, 3, h, w) -> (T, h/p, w/p, D)

        Raises:
            ValueError: The tiles are not of the model's size, or smaller than a patch.
        """
        return HfTower(self.model, self.layer)(pixels)

    def layer_plan(self) -> LayerPlan:
        """Which layers are run."""
        return HfTower(self.model, self.layer).layer_plan()

    def token_map(self, tile: Size) -> Size:
        """Tokens (h', w') of a tile of (h, w) pixels."""
        return HfTower(self.model, self.layer).token_map(tile)

    def extra_repr(self) -> str:
        return f"layer={self.layer}"


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
        ValueError: The model has no ``forward_intermediates``, or no such layer.
        TypeError: ``layer`` is no integer.

    Example:
        >>> import timm
        >>> import torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        >>> TimmEncoder(vit)(torch.randn(5, 3, 32, 32)).shape
        torch.Size([5, 2, 2, 192])
    """

    def __init__(self, model: nn.Module, layer: int = -2, *, norm: bool = False) -> None:
        super().__init__()
        check_flags(norm=norm)
        _check_intermediates(model, layer, _levels(model))
        self.model, self.layer, self.norm = model, layer, norm

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode tiles. (T, 3, h, w) -> (T, h', w', D)"""
        check_pixels(self.model, pixels, *_input_of(self.model))
        early = planning()
        options: dict[str, Any] = {"norm": True} if self.norm else {}
        maps = cast(Any, self.model).forward_intermediates(
            pixels, indices=[self.layer], stop_early=early, intermediates_only=early, output_fmt="NCHW", **options
        )
        of_layer = (maps if early else maps[1])[0]
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
        ValueError: The tower has no ``forward_intermediates``, or no such layer.
        TypeError: ``layer`` is no integer.

    Example:
        >>> import open_clip
        >>> import torch
        >>> model = open_clip.create_model("ViT-S-32-alt", force_image_size=64)
        >>> OpenClipEncoder(model)(torch.randn(5, 3, 64, 64)).shape
        torch.Size([5, 2, 2, 384])
    """

    def __init__(self, model: nn.Module, layer: int = -2, *, norm: bool = False) -> None:
        super().__init__()
        check_flags(norm=norm)
        tower = getattr(model, "visual", model)
        _check_intermediates(tower, layer, _resblocks(tower) or _levels(getattr(tower, "trunk", None)))
        self.model, self.layer, self.norm = tower, layer, norm

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode tiles. (T, 3, h, w) -> (T, h', w', D)"""
        check_pixels(self.model, pixels, *_input_of(self.model))
        early = planning()
        output = cast(Any, self.model).forward_intermediates(
            pixels,
            indices=[self.layer],
            stop_early=early,
            normalize_intermediates=self.norm,
            intermediates_only=early,
            output_fmt="NCHW",
        )
        return cast(Tensor, output["image_intermediates"][0]).movedim(1, -1)

    def layer_plan(self) -> LayerPlan | None:
        """Which blocks are run; None for towers that are neither transformers of open_clip nor models of timm."""
        count = _resblocks(self.model)
        if not count:
            return _plan_of_levels(getattr(self.model, "trunk", None), self.layer, norm=self.norm)
        return plan_layers(self.layer % count + 1, count, norm=self.norm, full=not planning())

    def extra_repr(self) -> str:
        return f"layer={self.layer}, norm={self.norm}"


def _input_of(model: Any) -> tuple[int, Size | None]:
    """Channels that a tower takes, and the one size that it takes, None if there are several."""
    tower = getattr(model, "trunk", model)
    patches = getattr(tower, "patch_embed", None)
    stem = getattr(tower, "conv1", None) or getattr(patches, "proj", None)  # of open_clip's and of timm's transformers
    fixed = getattr(patches, "strict_img_size", False) and not getattr(patches, "dynamic_img_pad", False)
    size = getattr(patches, "img_size", None) if fixed else None
    if _resblocks(model):
        size = getattr(model, "image_size", None)
    return getattr(stem, "in_channels", 3), None if size is None else check_size(size, "image size of the model")


def _levels(model: nn.Module | None) -> int:
    """How many blocks or stages a model of timm lists in ``feature_info``; 0 if it lists none."""
    return len(getattr(model, "feature_info", ()))


def _resblocks(tower: nn.Module) -> int:
    """How many blocks a transformer of open_clip has; 0 for other towers."""
    return len(getattr(getattr(tower, "transformer", None), "resblocks", ()))


def _plan_of_levels(model: nn.Module | None, layer: int, *, norm: bool) -> LayerPlan | None:
    total = _levels(model)
    if not total:
        return None
    has_norm = isinstance(getattr(model, "norm", None), nn.Module)
    return plan_layers(layer % total + 1, total, norm=norm, full=not planning(), has_norm=has_norm)


def _check_intermediates(model: nn.Module, layer: int, total: int) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"model: {type(model).__name__} has no `forward_intermediates`: update the library it comes from, or wrap "
            "it in a function (T, 3, h, w) -> (T, h', w', D)."
        )
    check_integer(layer)
    if total and not -total <= layer < total:
        raise ValueError(
            f"layer={layer} does not exist: {type(model).__name__} has {total} blocks or stages, with indices "
            f"{-total} to {total - 1}."
        )
