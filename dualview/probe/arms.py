"""The arms: what stands between the frozen features of a page and the readout that answers, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualview.ops.direct_readout import DirectReadout
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.readout import read_out
from dualview.ops.tiling import recombine
from dualview.probe.scenes import GRID

Maps = dict[str, Tensor]
Part = nn.Module
"""Called with a dict of views; gives a map (B, h, w, D)."""


class Thumbnail(nn.Module):
    """The low-resolution view as it is."""

    def forward(self, views: Maps) -> Tensor:
        return views["thumb"]


class Direct(nn.Module):
    """Recombine, add, read out, without enhancement."""

    def __init__(self, source: Any, readout: Any = "average") -> None:
        super().__init__()
        self.readout = DirectReadout(source, readout)

    def forward(self, views: Maps) -> Tensor:
        local, stride = views.get("local"), views.get("stride")
        first = local if local is not None else cast(Tensor, stride)
        return cast(Tensor, self.readout(first, first if stride is None else stride, (GRID, GRID)))


class Concatenated(nn.Module):
    """Local tiles averaged as the readout does, beside another view, through one linear layer or a small MLP."""

    def __init__(self, dim: int, other: str, parameters: int | None = None) -> None:
        super().__init__()
        self.other = other
        if parameters is None:
            self.mix: nn.Module = nn.Linear(2 * dim, dim)
        else:
            inner = max(1, round((parameters - dim) / (3 * dim + 1)))
            self.mix = nn.Sequential(nn.Linear(2 * dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, views: Maps) -> Tensor:
        local, other = (
            views[name] if name == "thumb" else _pooled(views[name], "local" if name == "local" else "global")
            for name in ("local", self.other)
        )
        return cast(Tensor, self.mix(torch.cat([local, other], -1)))


class Enhanced(nn.Module):
    """A `DualPerspectiveEnhance` between local tiles and what stands in the place of the stride tiles."""

    def __init__(
        self,
        dem: DualPerspectiveEnhance,
        second: str = "stride",
        *,
        add_thumb: bool = False,
        phases: bool = False,
    ) -> None:
        super().__init__()
        self.dem, self.second, self.add_thumb = dem, second, add_thumb
        self.phases = nn.Parameter(0.02 * torch.randn(GRID**2, 1, 1, dem.dim)) if phases else None

    def forward(self, views: Maps) -> Tensor:
        local, second = views["local"], views[self.second]
        if self.second == "thumb":
            second = second[:, None].expand(-1, GRID**2, -1, -1, -1)
        if self.phases is not None:
            second = second + self.phases
        out: Tensor = self.dem(local, second, (GRID, GRID))
        return (out + views["thumb"]) / 2 if self.add_thumb else out


class FullAttention(nn.Module):
    """Direct cross-attention: the released module, where every token that is read out attends to the whole other map.

    Its bilinear readout takes the middle token of each 3 x 3 cell, so only those ask.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dem = DualPerspectiveEnhance.released(dim)

    def forward(self, views: Maps) -> Tensor:
        local = recombine(views["local"], (GRID, GRID), "local", data_format="channels_last")
        stride = recombine(views["stride"], (GRID, GRID), "global", data_format="channels_last")
        of_global, of_local = self.dem.attentions[0], self.dem.attentions[-1]
        middle = [read_out(x, (GRID, GRID), "bilinear") for x in (local, stride)]
        asks = [x.flatten(1, 2)[:, None] for x in middle]
        keys = [x.flatten(1, 2)[:, None] for x in (local, stride)]
        v_loc, v_glo = of_local(asks[0], keys[1]), of_global(asks[1], keys[0])
        return cast(Tensor, self.dem.fusion(v_loc, v_glo)).view_as(middle[0])


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: What it is.
        table: Which table or question it belongs to.
        build: From the width to the module.
        views: The views that it is given.
        blanks: Views that are replaced by their mean at test time, one after the other.
        rank: Arms of a lower rank are trained first, with all their seeds.
        seeds: With how many of the seeds it is trained at most.
        times: How many times as many steps as the others.
        rate: Its learning rate over that of the others.
        pixels: Height and width of its pages.
    """

    name: str
    table: str
    build: Callable[[int], Part] = field(repr=False)
    views: tuple[str, ...] = ("local", "stride")
    blanks: tuple[str, ...] = ()
    rank: int = 0
    seeds: int = 3
    times: float = 1
    rate: float = 1
    pixels: int = 336


def _pooled(tiles: Tensor, perspective: Any) -> Tensor:
    return read_out(recombine(tiles, (GRID, GRID), perspective, data_format="channels_last"), (GRID, GRID), "average")


def released(second: str = "stride", **overrides: Any) -> Callable[[int], Part]:
    """Builds the released module with some options changed."""
    mine = {name: overrides.pop(name) for name in ("add_thumb", "phases") if name in overrides}
    return lambda dim: Enhanced(DualPerspectiveEnhance.released(dim, **overrides), second, **mine)


def paper(sharpness: float = 1, **overrides: Any) -> Callable[[int], Part]:
    """Builds the paper's module with some options changed, and logits so many times as large at the start."""

    def build(dim: int) -> Part:
        dem = DualPerspectiveEnhance.paper(dim, **overrides)
        with torch.no_grad():
            for attention in dem.attentions:
                for weight in (attention.q_proj.weight, attention.k_proj.weight):  # type: ignore[union-attr]
                    weight.mul_(sharpness**0.5)  # type: ignore[operator]
        return Enhanced(dem)

    return build


def _matched(dim: int) -> Part:
    """An MLP on concatenated views with as many parameters as the released module."""
    dem = DualPerspectiveEnhance.released(dim)
    return Concatenated(dim, "stride", sum(p.numel() for p in dem.parameters()))


FUSIONS = ("linear_concat", "addition", "weighted_addition", "multiplication", "max_pool", "conv3x3")
WITHOUT = "no DEM"


def _of_rank(rank: int, *arms: Arm, **changes: Any) -> tuple[Arm, ...]:
    return tuple(replace(arm, rank=rank, **changes) for arm in arms)


_FIRST = _of_rank(
    0,
    Arm("thumbnail", "3, 6", lambda dim: Thumbnail(), ("thumb",)),
    Arm("local", "6", lambda dim: Direct("local"), ("local",)),
    Arm("stride", "6", lambda dim: Direct("global"), ("stride",)),
    Arm("local + stride, added", "6", lambda dim: Direct("sum")),
    Arm("DEM released", "3, 4, 5, 6", released(), blanks=("local", "stride")),
    Arm("DEM released, global direction", "4", released(enhance="global")),
    Arm("DEM released, local direction", "4", released(enhance="local")),
    Arm("DEM released, local in both roles", "6", released(source="local")),
    Arm("local + thumbnail, linear", WITHOUT, lambda dim: Concatenated(dim, "thumb"), ("local", "thumb")),
    Arm("local + stride, linear", WITHOUT, lambda dim: Concatenated(dim, "stride")),
    Arm("DEM released, thumbnail for stride", "controls", released("thumb"), ("local", "thumb"), ("local", "thumb")),
    Arm("DEM paper", "presets", paper()),
    Arm("DEM paper + residual + norm", "presets", paper(residual=True, norm=True), blanks=("local", "stride")),
    Arm("MLP of as many parameters", WITHOUT, _matched),
    Arm("DEM released, smoothed stride", "controls", released("smooth"), ("local", "smooth")),
    Arm("direct cross-attention", WITHOUT, FullAttention),
)
_PRESETS = _of_rank(
    1,
    Arm("DEM paper + residual", "why", paper(residual=True)),
    Arm("DEM paper + norm", "why", paper(norm=True)),
    Arm("DEM paper, logits x 8", "why", paper(8)),
    Arm("DEM paper, one start for q, k, v", "why", paper(init="identical"), seeds=1),
    Arm("DEM paper, one start, logits x 8", "why", paper(8, init="identical"), seeds=1),
    Arm("DEM paper, 8 heads", "why", paper(num_heads=8), seeds=1),
    Arm("DEM paper, released pairing", "why", paper(pairing="released"), seeds=1),
    Arm("full local map", "bounds", lambda dim: Direct("local", "none"), ("local",)),
    Arm("DEM released + thumbnail", "3", released(add_thumb=True), ("local", "stride", "thumb")),
    Arm("DEM released, average readout", "controls", released(readout="average")),
)
_LONG = tuple(
    replace(arm, name=f"{arm.name}, 3 x the steps", table="convergence", times=3, blanks=(), rank=2, seeds=1)
    for arm in _FIRST
    if arm.name in ("thumbnail", "local", "local + thumbnail, linear", "DEM released", "DEM paper")
)
_FAST = tuple(
    replace(arm, name=f"{arm.name}, {by:g} x the rate", table="convergence", rate=by, blanks=(), rank=2, seeds=1)
    for by in (0.5, 2)
    for arm in _FIRST
    if arm.name in ("thumbnail", "local + thumbnail, linear", "DEM released", "DEM paper")
)
_REST = _of_rank(
    4,
    *(Arm(f"DEM released, {name}", "5", released(fusion=name)) for name in FUSIONS),
    Arm("DEM released, global in both roles", "6", released(source="global")),
    Arm("DEM released, sum in both roles", "6", released(source="sum")),
    Arm("DEM released, learnt phases", "controls", released(phases=True)),
    Arm("local + smoothed stride, linear", WITHOUT, lambda dim: Concatenated(dim, "smooth"), ("local", "smooth")),
)
_LARGE = tuple(
    replace(arm, name=f"{arm.name}, 1008 pixels", table="1008", pixels=1008, blanks=(), rank=3, seeds=1)
    for arm in _FIRST
    if arm.name in ("thumbnail", "local", "local + thumbnail, linear", "DEM released")
    or arm.name in ("DEM released, thumbnail for stride", "DEM paper + residual + norm")
)
ARMS = (*_FIRST, *_PRESETS, *_LONG, *_FAST, *_LARGE, *_REST)
"""Every arm, in the order in which they are trained: what time does not suffice for is missing from the end."""

REDUCED = (
    *("thumbnail", "local", "DEM released", "local + thumbnail, linear", "local + stride, linear"),
    *("DEM paper", "DEM paper + residual + norm", "DEM released, average readout"),
)
"""The arms of `make probe`."""
