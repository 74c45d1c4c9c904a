"""A readout of recombined features without enhancement, to stand where an enhancement module can."""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from dualview.arguments import check_choice
from dualview.geometry import (
    READOUTS,
    GridLike,
    LiveTiles,
    Perspective,
    Readout,
    SizeLike,
    TileGrid,
    check_live,
    check_needed,
    check_tokens,
)
from dualview.ops.planned.live import DirectPlan, plan_direct
from dualview.ops.planned.run import TileMap, mean_of_cells, put_back, take_tiles
from dualview.ops.readout import read_out
from dualview.switches import planning
from dualview.views import check_tile_pair


class DirectReadout(nn.Module):
    """No enhancement: recombine, add, read out. The first reading of "DCM local / global / both" in Table 6.

    Stands wherever a [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance] can stand, and has no parameters.

    Args:
        source: The recombined map of the "local" or "global" perspective, or their "sum".
        readout: "average", "bilinear", "centre" or "none".

    Shape:
        local_tiles, stride_tiles: (B, rows*cols, h, w, D) -> (B, h, w, D)

    Raises:
        ValueError: An option is none of its choices.

    Example:
        >>> import torch
        >>> DirectReadout("sum")(torch.ones(1, 6, 4, 5, 8), torch.ones(1, 6, 4, 5, 8), (2, 3)).unique().item()
        2.0
    """

    def __init__(self, source: Literal["local", "global", "sum"] = "sum", readout: Readout = "average") -> None:
        super().__init__()
        self.source = check_choice(source, "source", ("local", "global", "sum"))
        self.readout = check_choice(readout, "readout", READOUTS)

    def forward(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: GridLike,
        key_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        live: LiveTiles | None = None,
    ) -> Tensor:
        """Recombine, add and read out; arguments, shapes and errors as for the call of a `DualPerspectiveEnhance`.

        ``key_mask`` is taken and not used: a readout attends to nothing.
        """
        grid = TileGrid.of(grid)
        present = check_live(live, grid)
        size = check_tile_pair(local_tiles, stride_tiles, grid, present)
        plan = self.plan(grid, size)
        check_needed(present, plan.live[0], plan.live[1])
        given: dict[Perspective, TileMap] = {
            "local": TileMap(local_tiles, "local", present[0]),
            "global": TileMap(stride_tiles, "global", present[1]),
        }
        planes = [
            put_back(next(take_tiles([given[cut]], rows, cols, cut, grid)), rows, cols, cut, grid)
            for cut, rows, cols in plan.cuts
        ]
        total = reduce(torch.add, planes)
        whole = tuple(total.shape[1:3]) == grid.map_size(size)
        return read_out(total, grid, self.readout) if whole else mean_of_cells(total, size)

    def plan(self, grid: GridLike, tokens: SizeLike) -> DirectPlan:
        """What is computed for a grid and the token map (h, w) of one tile."""
        grid = TileGrid.of(grid)
        readout = self.readout if planning() else "none"
        return plan_direct((grid.rows, grid.cols), check_tokens(tokens, grid), readout=readout, source=self.source)

    def extra_repr(self) -> str:
        return f"source={self.source!r}, readout={self.readout!r}"
