"""From the bytes of a photograph to normalised tiles of both perspectives, at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualview.geometry import DataFormat, GridLike, LiveTiles, TileGrid
from dualview.kernels.crop_normalize import crop_normalize
from dualview.kernels.dispatch import Backend
from dualview.records import short_repr
from dualview.views import check_map


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
    check_map(images, "raster", data_format)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images of type {images.dtype}: bytes (uint8) or floating-point numbers can be normalised.")
    planes = images if data_format == "channels_first" else images.movedim(-1, -3)
    channels = planes.shape[-3]
    if len(mean) != channels or len(std) != channels or 0 in std:
        raise ValueError(
            f"mean={list(mean)} and std={list(std)} for images of {channels} channels: one number per channel is "
            "needed, and no std of 0."
        )
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    scales = [(1 / (unit * s), -m / s) for m, s in zip(mean, std, strict=True)]
    return NormalizedTiles(*crop_normalize(planes, grid, scales, live=live, dtype=dtype, backend=backend))
