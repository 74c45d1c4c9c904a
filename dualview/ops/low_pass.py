"""The low-pass filter that keeps a strided crop from aliasing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.geometry import DataFormat, GridLike, TileGrid
from dualview.tensors import check_floats
from dualview.views import check_map


def low_pass(x: Tensor, grid: GridLike, *, data_format: DataFormat = "channels_first") -> Tensor:
    """Smooth a map by the tent filter of an antialiased bilinear reduction by (rows, cols).

    Along an axis reduced n times the weights are (n - |k|) / n^2 for |k| < n, with the border repeated. Constants stay
    as they are, n = 1 changes nothing, and no cell is displaced. The paper does not filter; a stride crop of the result
    is no longer a permutation of the pixels.

    Args:
        x: A floating-point image or token map.
        grid: Rows and columns of the stride crop that follows.
        data_format: Whether the channels come before or after height and width.

    Shape:
        (..., C, H, W) or (..., H, W, D), unchanged

    Raises:
        ValueError: ``x`` has fewer than three dimensions, or ``data_format`` is not one of the choices.
        TypeError: ``x`` is not a floating-point tensor.

    Example:
        >>> low_pass(torch.tensor([[[0.0, 0.0, 4.0, 0.0, 0.0]]]), (1, 2)).tolist()
        [[[0.0, 1.0, 2.0, 1.0, 0.0]]]
    """
    grid = TileGrid.of(grid)
    check_map(x, "raster", data_format)
    check_floats(x=x)
    first = data_format == "channels_first"
    planes = x if first else x.movedim(-1, -3)
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    for n, axis in ((grid.rows, 0), (grid.cols, 1)):
        if n == 1:
            continue
        offsets = torch.arange(1 - n, n, device=x.device, dtype=x.dtype)
        kernel = ((n - offsets.abs()) / n**2).reshape((-1, 1) if axis == 0 else (1, -1))
        margin = (0, 0, n - 1, n - 1) if axis == 0 else (n - 1, n - 1, 0, 0)
        flat = F.conv2d(F.pad(flat, margin, mode="replicate"), kernel[None, None])
    smooth = flat.reshape(planes.shape)
    return smooth if first else smooth.movedim(-3, -1).contiguous()
