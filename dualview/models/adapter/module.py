"""The module that a host's tower gets as its child ``dualview``: one DEM for each layer that is enhanced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dualview.geometry import LiveTiles, Size, TileGrid
from dualview.models.encode_views import mixed
from dualview.models.parts import LowRes, NamesTiles, all_tiles
from dualview.models.view_plan import method_of


class Named(NamedTuple):
    """A plan that names tiles.

    Attributes:
        live: The tiles, by index.
    """

    live: LiveTiles


class AttachedEnhance(nn.Module):
    """The features of the tower, mixed with what the DEM of their layer makes of both perspectives.

    Args:
        dems: One module for each layer that is enhanced.
        low_res: How the result is mixed with the features of the tower.
        gate: Per channel, how far to go from the features of the tower (0) to the mixed ones (1), (layers*D,); None for
            all the way, or as far as the DEMs have gates of their own.

    Shape:
        - bases: (B, h, w, layers*D) for images of each size: the features that the host would have read, layer beside
          layer
        - local_tiles, stride_tiles: (B, tiles, h, w, layers*D) for each
        - result: as bases
    """

    def __init__(self, dems: Sequence[nn.Module], low_res: LowRes, gate: nn.Parameter | None) -> None:
        super().__init__()
        self.dems = nn.ModuleList(dems)
        self.low_res = low_res
        self.gate = gate

    def plan(self, grid: TileGrid, tokens: Size) -> NamesTiles:
        """The tiles that any of the DEMs needs."""
        plans = [method_of(dem, "plan") for dem in self.dems]
        if None in plans:
            return Named(all_tiles(grid))
        live = [plan(grid, tokens).live for plan in plans]
        return Named(LiveTiles(*(tuple(sorted({tile for one in live for tile in one[side]})) for side in (0, 1))))

    def forward(
        self,
        bases: Sequence[Tensor],
        local_tiles: Sequence[Tensor],
        stride_tiles: Sequence[Tensor],
        grid: TileGrid,
        live: LiveTiles,
    ) -> list[Tensor]:
        """Enhance, and mix; all sizes in one call. Shapes as of the class."""
        return [self._mixed(*one, grid, live) for one in zip(bases, local_tiles, stride_tiles, strict=True)]

    def _mixed(
        self, base: Tensor, local_tiles: Tensor, stride_tiles: Tensor, grid: TileGrid, live: LiveTiles
    ) -> Tensor:
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), base.dtype)
        count, found = len(self.dems), []
        for dem, low, local, stride in zip(
            self.dems, *(x.to(dtype).chunk(count, -1) for x in (base, local_tiles, stride_tiles)), strict=True
        ):
            options: dict[str, Any] = {} if method_of(dem, "plan") is None else {"live": live}
            found.append(mixed(dem, low, self.low_res, local, stride, grid, **options))
        out = torch.cat(found, -1)
        return (out if self.gate is None else base + self.gate * (out - base)).to(base.dtype)

    def extra_repr(self) -> str:
        return f"low_res={self.low_res!r}"


class Bound(NamedTuple):
    """A tower's `AttachedEnhance` as the DEM of one call, with the features of the tower that it starts from.

    Attributes:
        child: The child of the tower: an `AttachedEnhance`, or what a training library has put around it.
        base: Features of the tower for images of one size, (B, h, w, layers*D).
    """

    child: nn.Module
    base: Tensor

    def plan(self, grid: TileGrid, tokens: Size) -> NamesTiles:
        """The tiles that are needed."""
        return cast(AttachedEnhance, self.child).plan(grid, tokens)

    def __call__(self, local_tiles: Tensor, stride_tiles: Tensor, grid: TileGrid, *, live: LiveTiles) -> Tensor:
        return cast(Tensor, self.child([self.base], [local_tiles], [stride_tiles], grid, live)[0])
