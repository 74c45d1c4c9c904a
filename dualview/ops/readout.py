"""From the fused high-resolution map down to the token count of one tile."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from dualview.geometry import GridLike, TileGrid

Readout: TypeAlias = Literal["average", "bilinear", "centre", "none"]


def check_readout(readout: str) -> Readout:
    """``readout`` if it is one of the choices, else a ValueError."""
    if readout not in get_args(Readout):
        raise ValueError(f"readout={readout!r}: must be one of {get_args(Readout)}.")
    return readout  # type: ignore[return-value]  # narrowed by the check above


def read_out(x: Tensor, grid: GridLike, readout: Readout) -> Tensor:
    """Reduce every cell of rows x cols neighbouring tokens of a map to one token.

    * ``"average"``: the mean of the cell (Eq. 7 of arXiv 2407.16198).
    * ``"bilinear"``: bilinear interpolation without antialiasing, at least in float32, as the released model does it.
      For odd rows and cols this is the centre token; for even ones the mean of the central two or four.
    * ``"centre"``: token (rows // 2, cols // 2) of the cell.
    * ``"none"``: the map as it is.

    Args:
        x: A token map.
        grid: Rows and columns of tiles.
        readout: How to reduce.

    Shape:
        (..., rows*h, cols*w, D) -> (..., h, w, D), or unchanged for "none"

    Raises:
        ValueError: The map is no multiple of the grid, or ``readout`` is unknown.

    Example:
        >>> read_out(torch.arange(6.0).reshape(1, 2, 3, 1), (2, 3), "average").item()
        2.5
    """
    grid, readout = TileGrid.of(grid), check_readout(readout)
    if x.dim() < 3:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is no token map: expected (..., H, W, D).")
    h, w = grid.tile_size((x.shape[-3], x.shape[-2]))
    if readout == "average":
        return reduce(x, "... (h r) (w c) d -> ... h w d", "mean", r=grid.rows, c=grid.cols)
    if readout == "centre":
        return x[..., grid.rows // 2 :: grid.rows, grid.cols // 2 :: grid.cols, :]
    if readout == "bilinear":
        precise = x[None].flatten(0, -4).to(torch.promote_types(x.dtype, torch.float32))
        small = F.interpolate(precise.movedim(-1, 1), (h, w), mode="bilinear", align_corners=False, antialias=False)
        return small.movedim(1, -1).reshape(*x.shape[:-3], h, w, x.shape[-1]).to(x.dtype)
    return x
