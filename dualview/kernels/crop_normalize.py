"""An image to normalised tiles of both perspectives in one read.

Bytes: every pixel is read once, B * C * H * W times the itemsize of the images, and written once for each perspective
in which its tile is live, B * C * h * w * (live local + live stride tiles) times that of the tiles. A uint8 image of
3 x 1008 x 1008 on a grid of 3 x 3, all local tiles and 1 stride tile in bfloat16: 3.0 MB + 6.8 MB, so 3.3 us at the
2.98 TB/s that an H100 copies. Cutting twice reads the image twice, and normalising it first writes and reads it once
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualview.geometry import GridLike, Perspective, TileGrid, check_live
from dualview.kernels import dispatch
from dualview.kernels.tables import table
from dualview.views import view_in


def crop_normalize(
    images: Tensor,
    grid: GridLike,
    scales: Sequence[tuple[float, float]],
    *,
    live: tuple[Sequence[int], Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: dispatch.Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Local tiles and stride tiles of ``images * factor + offset``, computed in float32.

    Whoever calls it has checked that the images are of the grid, and the scales of their channels.

    Args:
        images: Images, of any strides: (H, W, C) is passed as ``images.movedim(-1, -3)``.
        grid: Rows and columns of tiles.
        scales: (factor, offset) of each channel.
        live: Which local and which stride tiles to make, by index; all if None.
        dtype: Floating-point type of the tiles.
        backend: See `dualview.kernels.dispatch`.

    Shape:
        (..., C, H, W) -> (..., live local tiles, C, h, w), (..., live stride tiles, C, h, w)

    Raises:
        ValueError: ``live`` are not tiles of the grid, each at most once.
        RuntimeError: "triton" was asked for and cannot run.
    """
    local, stride = map(list, check_live(live, TileGrid.of(grid)))
    reasons = {
        "gradients of pixels are not implemented: detach the images": images.requires_grad and torch.is_grad_enabled(),
        f"tiles of {dtype}: ask for one of {', '.join(map(str, dispatch.FLOATS))}": dtype not in dispatch.FLOATS,
    }
    refused = [reason for reason, holds in reasons.items() if holds]
    by_torch = dispatch.choose("crop_normalize", images, backend=backend, refused=refused).name == "torch"
    batch = images.shape[:-3]
    one_batch = images.reshape(batch.numel(), *images.shape[-3:])
    factors, offsets = zip(*scales, strict=True)
    cut = (factors, offsets, list(grid), local, stride, dtype)
    found = _by_torch(one_batch, *cut) if by_torch else _crop_normalize(one_batch, *cut)
    return found[0].reshape(*batch, *found[0].shape[1:]), found[1].reshape(*batch, *found[1].shape[1:])


def _by_torch(
    images: Tensor,
    factors: Sequence[float],
    offsets: Sequence[float],
    grid: Sequence[int],
    local: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One copy cuts and converts; then the tiles are normalised in place."""
    wide = torch.promote_types(dtype, torch.float32)
    factor, offset = table(_scales, tuple(factors), tuple(offsets), wide, like=images)[..., None, None]
    images = images.contiguous()  # of bytes, far cheaper than to gather them from (H, W, C) twice
    rows, cols = grid

    def cut(perspective: Perspective, live: Sequence[int], shape: tuple[int, int, int, int, int]) -> Tensor:
        view = view_in(perspective, images, "raster", TileGrid(rows, cols), shape[-2:], "channels_first")
        if list(live) == list(range(rows * cols)):
            tiles = view.to(wide, copy=True, memory_format=torch.contiguous_format).flatten(1, 2)
        else:
            tiles = images.new_empty(shape, dtype=wide)
            for index, tile in enumerate(live):
                tiles[:, index] = view[:, tile // cols, tile % cols]
        return tiles.mul_(factor).add_(offset).to(dtype)

    of_local, of_stride = shapes_of_tiles(images, grid, local, stride)
    return cut("local", local, of_local), cut("global", stride, of_stride)


def shapes_of_tiles(
    images: Tensor, grid: Sequence[int], local: Sequence[int], stride: Sequence[int]
) -> list[tuple[int, int, int, int, int]]:
    """Those of the live local and of the live stride tiles of images (B, C, H, W)."""
    batch, channels, height, width = images.shape
    return [(batch, len(live), channels, height // grid[0], width // grid[1]) for live in (local, stride)]


def _scales(device: torch.device, factors: tuple[float, ...], offsets: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(2, C)"""
    return torch.tensor((factors, offsets), dtype=dtype, device=device)


@torch.library.custom_op(
    "dualview::crop_normalize",
    mutates_args=(),
    schema="(Tensor images, float[] factors, float[] offsets, int[] grid, int[] local, int[] stride, ScalarType dtype) "
    "-> (Tensor, Tensor)",
)
def _crop_normalize(images: Tensor, *cut: Any) -> tuple[Tensor, Tensor]:
    if not dispatch.runs_on(images):
        return _by_torch(images, *cut)
    from dualview.kernels.crop_normalize_triton import make

    factors, offsets, *others = cut
    scales = table(_scales, tuple(factors), tuple(offsets), torch.float32, like=images)
    return make(images, shapes_of_tiles(images, *others[:3]), scales, *others)


@_crop_normalize.register_fake
def _(images: Tensor, *cut: Any) -> tuple[Tensor, Tensor]:
    local, stride = (images.new_empty(shape, dtype=cut[-1]) for shape in shapes_of_tiles(images, *cut[2:5]))
    return local, stride
