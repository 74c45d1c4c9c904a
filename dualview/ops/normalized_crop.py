"""From the bytes of a photograph to normalised tiles of both perspectives, at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualview.geometry import GridLike, Perspective, TileGrid
from dualview.ops.plan import LiveTiles
from dualview.ops.tiling import DataFormat, check_rank, tile_view


class NormalizedTiles(NamedTuple):
    """Normalised tiles of both perspectives, (..., live tiles, C, h, w) each."""

    local: Tensor
    stride: Tensor


def normalized_crop(
    images: Tensor,
    grid: GridLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    live: LiveTiles | None = None,
    data_format: DataFormat = "channels_first",
    dtype: torch.dtype = torch.float32,
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

    Shape:
        (..., C, H, W) or (..., H, W, C) -> (..., live tiles, C, h, w) of either perspective

    Raises:
        ValueError: The image is no multiple of the grid, or ``mean`` and ``std`` are not one number per channel.
        TypeError: ``images`` are integers other than uint8.

    Example:
        >>> photo = torch.randint(256, (672, 1008, 3), dtype=torch.uint8)
        >>> tiles = normalized_crop(photo, (2, 3), mean=[0.5] * 3, std=[0.25] * 3, data_format="channels_last")
        >>> tiles.local.shape
        torch.Size([6, 3, 336, 336])
    """
    grid = TileGrid.of(grid)
    check_rank(images, 3, data_format, "(..., C, H, W)", "(..., H, W, C)")
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
    wide = torch.promote_types(dtype, torch.float32)
    scales = torch.tensor([(1 / (unit * s), -m / s) for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
    factor, offset = scales.to(planes.device, wide).view(-1, 2, 1, 1).unbind(1)
    planes = planes.contiguous()  # of bytes, far cheaper than to gather them from (H, W, C) twice

    def cut(perspective: Perspective, live_tiles: tuple[int, ...] | None) -> Tensor:
        view = tile_view(planes, grid, perspective, "channels_first")
        if live_tiles is None or live_tiles == tuple(range(grid.num_tiles)):  # converted and cut by one copy
            tiles = view.to(wide, copy=True, memory_format=torch.contiguous_format).flatten(-5, -4)
        elif live_tiles:
            places = (divmod(tile, grid.cols) for tile in live_tiles)
            tiles = torch.stack([view[..., i, j, :, :, :] for i, j in places], -4).to(wide, copy=True)
        else:
            tiles = view.new_empty(*view.shape[:-5], 0, *view.shape[-3:], dtype=wide)
        return tiles.mul_(factor).add_(offset).to(dtype)

    return NormalizedTiles(cut("local", live and live.local), cut("global", live and live.stride))
