"""Merge the locally enhanced and the globally enhanced map into one (Table 5 of arXiv 2407.16198).

Every fusion is built from the width D alone and called with two maps, ``fusion(v_loc, v_glo)``, each
(..., H, W, D). Where the paper names a fusion without a formula, our reading stands in its docstring.

A fusion declares what it needs, so that only what is read of its output need be computed (`DeclaresReach`). A module
that declares nothing works too, with nothing skipped before it.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dualview.tensors import check_maps, check_width
from dualview.views import per_token


class DeclaresReach(Protocol):
    """What a fusion may declare, as attributes or properties.

    Attributes:
        radius: How many tokens around a token it looks; 0 if it works token by token.
        linear: Whether it is linear, or affine, in both maps together, so that an average may be taken before it. It
            counts only if nothing is hooked on and every module inside is a plain layer of torch or declares ``linear``
            itself.
    """

    radius: int
    linear: bool


def declared(fusion: nn.Module, name: str) -> Any:
    """What a fusion declares under a name, or None.

    What has a ``forward`` of its own, a class or a module, inherits no declarations: they were made for another one.
    """
    for declaring in (fusion, *type(fusion).__mro__):
        if name in vars(declaring):
            return getattr(fusion, name)
        # What accelerate has wrapped is called by it: `_old_forward`.
        wrapped = getattr(getattr(declaring, "_old_forward", None), "__func__", None) is type(fusion).forward
        if "forward" in vars(declaring) and not wrapped:
            return None
    return None


def fuse(fusion: nn.Module, *maps: Tensor) -> Tensor:
    """What a fusion makes of two maps, or the linear layer that stands in its place of one. (..., H, W, D)"""
    return per_token(fusion, maps[0]) if len(maps) == 1 else cast(Tensor, fusion(*maps))


class _Fusion(nn.Module):
    """What all fusions share: the same arguments, whether needed or not, so that one can replace another."""

    dim: int | None = None

    def __init__(
        self, dim: int | None = None, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in list(self.modules())[1:]:
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()


class LinearConcatFusion(_Fusion):
    """Halve the width of both maps by a linear layer each and concatenate [global; local] (Eq. 26-27).

    Args:
        dim: Width D, even.
        device: Where to make the parameters.
        dtype: Type of the parameters.

    Shape:
        v_loc, v_glo: (..., D) -> (..., D)

    Raises:
        ValueError: ``dim`` is odd.

    Example:
        >>> LinearConcatFusion(8)(torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)).shape
        torch.Size([1, 4, 6, 8])
    """

    radius, linear = 0, True

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dim = dim = check_width(dim, device, dtype, divisor=2)
        self.local_proj = nn.Linear(dim, dim // 2, bias=False, device=device, dtype=dtype)
        self.global_proj = nn.Linear(dim, dim // 2, bias=False, device=device, dtype=dtype)

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        """Fuse two maps. (..., D), (..., D) -> (..., D)"""
        check_maps(self, v_loc, v_glo)
        return torch.cat([per_token(self.global_proj, v_glo), per_token(self.local_proj, v_loc)], dim=-1)


class BottleneckConcatFusion(_Fusion):
    """The fusion of the released weights: bottlenecks, concatenation [local; global], residuals, LayerNorm.

    LayerNorm([b_loc(V_loc); b_glo(V_glo)] + V_glo + V_loc), where each b is Linear(D, D/16) - GELU - Linear(D/16, D/2).

    Args:
        dim: Width D, a multiple of 16.
        device: Where to make the parameters.
        dtype: Type of the parameters.

    Shape:
        v_loc, v_glo: (..., D) -> (..., D)

    Raises:
        ValueError: ``dim`` is no multiple of 16.

    Example:
        >>> BottleneckConcatFusion(32)(torch.randn(1, 4, 6, 32), torch.randn(1, 4, 6, 32)).shape
        torch.Size([1, 4, 6, 32])
    """

    radius, linear = 0, False

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dim = dim = check_width(dim, device, dtype, divisor=16)

        def bottleneck() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(dim, dim // 16, device=device, dtype=dtype),
                nn.GELU(),
                nn.Linear(dim // 16, dim // 2, device=device, dtype=dtype),
            )

        self.local_bottleneck, self.global_bottleneck = bottleneck(), bottleneck()
        self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        """Fuse two maps. (..., D), (..., D) -> (..., D)"""
        check_maps(self, v_loc, v_glo)
        halves = [per_token(self.local_bottleneck, v_loc), per_token(self.global_bottleneck, v_glo)]
        return cast(Tensor, self.norm(torch.cat(halves, dim=-1) + v_glo + v_loc))


class AdditionFusion(_Fusion):
    """V_glo + V_loc.

    Args:
        dim: Not needed; every fusion takes it.
        device: Not needed.
        dtype: Not needed.

    Shape:
        v_loc, v_glo: (..., D) -> (..., D)

    Example:
        >>> AdditionFusion()(torch.ones(2), torch.ones(2)).tolist()
        [2.0, 2.0]
    """

    radius, linear = 0, True

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        """Fuse two maps. (..., D), (..., D) -> (..., D)"""
        check_maps(self, v_loc, v_glo)
        return v_glo + v_loc


class WeightedAdditionFusion(_Fusion):
    """a V_glo + (1 - a) V_loc, a = sigmoid(logit), one learnt logit per channel, a = 0.5 at the start (our reading).

    Args:
        dim: Width D.
        device: Where to make the parameters.
        dtype: Type of the parameters.

    Shape:
        v_loc, v_glo: (..., D) -> (..., D)

    Example:
        >>> WeightedAdditionFusion(2)(torch.zeros(2), torch.ones(2)).tolist()
        [0.5, 0.5]
    """

    radius, linear = 0, True

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dim = dim = check_width(dim, device, dtype)
        self.logit = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weigh both maps equally."""
        nn.init.zeros_(self.logit)

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        """Fuse two maps. (..., D), (..., D) -> (..., D)"""
        check_maps(self, v_loc, v_glo)
        a = self.logit.sigmoid()
        return a * v_glo + (1 - a) * v_loc


class MultiplicationFusion(_Fusion):
    """The element-wise product of V_glo and V_loc (our reading).

    Args:
        dim: Not needed; every fusion takes it.
        device: Not needed.
        dtype: Not needed.

    Shape:
        v_loc, v_glo: (..., D) -> (..., D)

    Example:
        >>> MultiplicationFusion()(torch.tensor([2.0]), torch.tensor([3.0])).tolist()
        [6.0]
    """

    radius, linear = 0, False

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        """Fuse two maps. (..., D), (..., D) -> (..., D)"""
        check_maps(self, v_loc, v_glo)
        return v_glo * v_loc


class MaxPoolFusion(_Fusion):
    """The element-wise maximum of V_glo and V_loc (our reading).

    Args:
        dim: Not needed; every fusion takes it.
        device: Not needed.
        dtype: Not needed.

    Shape:
        v_loc, v_glo: (..., D) -> (..., D)

    Example:
        >>> MaxPoolFusion()(torch.tensor([2.0]), torch.tensor([3.0])).tolist()
        [3.0]
    """

    radius, linear = 0, False

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        """Fuse two maps. (..., D), (..., D) -> (..., D)"""
        check_maps(self, v_loc, v_glo)
        return torch.maximum(v_glo, v_loc)


class Conv3x3Fusion(_Fusion):
    """One 3x3 convolution, 2D -> D channels, padding 1, on the concatenated maps [global; local] (our reading).

    Args:
        dim: Width D.
        device: Where to make the parameters.
        dtype: Type of the parameters.

    Shape:
        v_loc, v_glo: (B, H, W, D) -> (B, H, W, D)

    Example:
        >>> Conv3x3Fusion(8)(torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)).shape
        torch.Size([1, 4, 6, 8])
    """

    radius, linear = 1, True

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dim = dim = check_width(dim, device, dtype)
        self.conv = nn.Conv2d(2 * dim, dim, kernel_size=3, padding=1, device=device, dtype=dtype)

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        """Fuse two maps. (B, H, W, D), (B, H, W, D) -> (B, H, W, D)"""
        check_maps(self, v_loc, v_glo)
        return cast(Tensor, self.conv(torch.cat([v_glo, v_loc], dim=-1).movedim(-1, -3))).movedim(-3, -1)


FUSIONS: dict[str, type[nn.Module]] = {
    "linear_concat": LinearConcatFusion,
    "bottleneck_concat": BottleneckConcatFusion,
    "addition": AdditionFusion,
    "weighted_addition": WeightedAdditionFusion,
    "multiplication": MultiplicationFusion,
    "max_pool": MaxPoolFusion,
    "conv3x3": Conv3x3Fusion,
}
"""The fusions by the names that `DualPerspectiveEnhance(fusion=...)` takes."""
