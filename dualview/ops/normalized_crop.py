"""From the bytes of a photograph to normalised tiles of both perspectives, at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualview.arguments import check_numbers
from dualview.geometry import DataFormat, GridLike, LiveTiles, TileGrid
from dualview.kernels.crop_normalize import crop_normalize
from dualview.kernels.dispatch import Backend
from dualview.records import short_repr
from dualview.tensors import check_brightness, check_factory
from dualview.views import tile_size


class NormalizedTiles(NamedTuple):
    """Normalised tiles of both perspectives.

    Attributes:
        local: The live local tiles, (..., tiles, C, h, w).
        stride: The live stride tiles, likewise.
    """

    local: Tensor
    stride: Tensor

    def __repr__(self) -> str:
        return short_repr(self)


def normalized_crop(
    images: Tensor,
    grid: GridLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    live: LiveTiles | None = None,
    data_format: DataFormat = "channels_first",
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> NormalizedTiles:
    """Normalise images and cut them from both perspectives: (x - mean) / std, with bytes first divided by 255.

    The same as normalising and then cutting, without the normalised image in between.

    Args:
        images: uint8 images, or floating-point ones with values for which ``mean`` and ``std`` are given.
        grid: Rows and columns of tiles.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        live: Which tiles to make, such as `DualPerspectiveEnhance.plan(...).live`; all if None.
        data_format: Whether the channels of ``images`` come before or after height and width. In the tiles they come
            first.
        dtype: Floating-point type of the tiles.
        backend: "auto", "torch" or "triton"; None for what [`use_backend`][dualview.use_backend] says.

    Shape:
        (..., C, H, W) or (..., H, W, C) -> (..., live tiles, C, h, w) of either perspective

    Raises:
        ValueError: The image is no multiple of the grid, or ``mean`` and ``std`` are not one number per channel.
        TypeError: ``images`` is no tensor, or holds integers other than uint8.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> photo = torch.randint(256, (672, 1008, 3), dtype=torch.uint8)
        >>> tiles = normalized_crop(photo, (2, 3), mean=[0.5] * 3, std=[0.25] * 3, data_format="channels_last")
        >>> tiles.local.shape
        torch.Size([6, 3, 336, 336])
    """
    grid = TileGrid.of(grid)
    tile_size(images, "raster", grid, data_format, "images")
    check_brightness(images=images)
    check_factory(None, dtype)
    planes = images if data_format == "channels_first" else images.movedim(-1, -3)
    mean = check_numbers(mean, "mean", planes.shape[-3])
    std = check_numbers(std, "std", planes.shape[-3], zero=False)
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    scales = [(1 / (unit * s), -m / s) for m, s in zip(mean, std, strict=True)]
    return NormalizedTiles(*crop_normalize(planes, grid, scales, live=live, dtype=dtype, backend=backend))
