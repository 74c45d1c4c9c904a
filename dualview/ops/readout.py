"""From the fused high-resolution map down to the token count of one tile."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from dualview.arguments import check_choice
from dualview.geometry import READOUTS, GridLike, Readout, TileGrid, readout_support
from dualview.tensors import check_floats
from dualview.views import tile_size


def read_out(x: Tensor, grid: GridLike, readout: Readout) -> Tensor:
    """Reduce every cell of rows x cols neighbouring tokens of a map to one token.

    * ``"average"``: the mean of the cell (Eq. 7 of arXiv 2407.16198).
    * ``"bilinear"``: bilinear interpolation without antialiasing, as the released model does it. For odd rows and cols
      this is the centre token; for even ones the mean of the central two or four.
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
        TypeError: ``x`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> read_out(torch.arange(6.0).reshape(1, 2, 3, 1), (2, 3), "average").item()
        2.5
    """
    grid, readout = TileGrid.of(grid), check_choice(readout, "readout", READOUTS)
    check_floats(x=x)
    tile_size(x, "raster", grid, "channels_last")  # a ValueError where the map is no multiple of the grid
    if readout == "none":
        return x
    rows, cols = readout_support(readout, grid.rows), readout_support(readout, grid.cols)
    cells = rearrange(x, "... (h r) (w c) d -> ... h r w c d", r=grid.rows, c=grid.cols)
    read: Tensor = cells[..., :, rows.start : rows.stop, :, cols.start : cols.stop, :]
    return read.mean((-4, -2))
