"""Check the order of tiles in a pipeline of your own: coordinate images reveal a wrong one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualview.geometry import GridLike, Perspective, Size, TileGrid, check_perspective, check_size
from dualview.ops.tiling import DataFormat, crop

__all__ = ["assert_tile_order", "coordinate_images"]


def coordinate_images(size: Size, *, batch: int = 1, data_format: DataFormat = "channels_first") -> Tensor:
    """Images whose three channels hold each pixel's row, column and place in the batch.

    Args:
        size: Image size (H, W).
        batch: Number of images.
        data_format: Whether the channels come before or after height and width.

    Shape:
        (batch, 3, H, W) or (batch, H, W, 3), float32

    Example:
        >>> coordinate_images((2, 3))[0, :, 1, 2].tolist()
        [1.0, 2.0, 0.0]
    """
    height, width = check_size(size, "size")
    index = torch.arange(batch).view(-1, 1, 1).expand(batch, height, width)
    row = torch.arange(height).view(1, -1, 1).expand_as(index)
    col = torch.arange(width).view(1, 1, -1).expand_as(index)
    return torch.stack([row, col, index], dim=1 if data_format == "channels_first" else -1).float()


def assert_tile_order(
    fn: Callable[[Tensor], Tensor],
    grid: GridLike,
    tile: Size,
    *,
    perspective: Perspective = "local",
    data_format: DataFormat = "channels_first",
    batch: int = 2,
) -> None:
    """Push coordinate images through a tiling function and say which tile landed where.

    Use a grid and tile that are not square: only then can a swap of heights and widths be seen.

    Args:
        fn: The function under test: a batch of images to tiles, (batch, rows*cols, ...) or (batch*rows*cols, ...) with
            the tiles of the first image first.
        grid: Rows and columns of tiles that it should cut.
        tile: Size (h, w) of a tile.
        perspective: "local" (contiguous blocks) or "global" (interleaved strides).
        data_format: Whether the channels come before or after height and width, in both images and tiles.
        batch: Number of images.

    Raises:
        AssertionError: A tile is not where it should be, or not what it should be; the message lists the tiles found.

    Example:
        >>> from dualview import global_stride_crop
        >>> assert_tile_order(lambda x: global_stride_crop(x, (2, 3)), (2, 3), (4, 5), perspective="global")
        >>> assert_tile_order(lambda x: global_stride_crop(x, (2, 3)), (2, 3), (4, 5))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: tiles are not in local order: ...
    """
    grid, tile, perspective = TileGrid.of(grid), check_size(tile, "tile"), check_perspective(perspective)
    images = coordinate_images(grid.map_size(tile), batch=batch, data_format=data_format)
    expected = crop(images, grid, perspective, data_format=data_format).flatten(0, 1)
    found = fn(images.clone())
    if found.shape[:2] == (batch, grid.num_tiles) and found.dim() == expected.dim() + 1:
        found = found.flatten(0, 1)
    if found.shape != expected.shape:
        raise AssertionError(
            f"the function made {tuple(found.shape)} of images of {tuple(images.shape)}: expected {tuple(expected.shape)} "
            f"or ({batch}, {grid.num_tiles}, ...), for {grid} tiles of {tile[0]} x {tile[1]} (height x width)."
        )
    found = found.to(device=expected.device, dtype=expected.dtype)
    if torch.equal(found, expected):
        return
    names = {p: _names(images, grid, p, data_format) for p in ("local", "global")}
    lines = []
    for place, (got, want) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(got, want):
            lines.append(
                f"  place {place}: should be {_lookup(want, names)}, is {_lookup(got, names) or _describe(got, data_format)}"
            )
    shown = "\n".join(lines[:12]) + (f"\n  ... and {len(lines) - 12} more" if len(lines) > 12 else "")
    raise AssertionError(
        f"tiles are not in {perspective} order: {len(lines)} of {len(found)} are wrong, on a {grid} grid of "
        f"{tile[0]} x {tile[1]} tiles.\n{shown}"
    )


def _names(images: Tensor, grid: TileGrid, perspective: Perspective, data_format: DataFormat) -> dict[bytes, str]:
    tiles = crop(images, grid, perspective, data_format=data_format)
    return {
        _key(tiles[b, n]): f"{perspective} tile (row {n // grid.cols}, column {n % grid.cols}) of image {b}"
        for b in range(tiles.shape[0])
        for n in range(grid.num_tiles)
    }


def _key(tile: Tensor) -> bytes:
    return bytes(tile.contiguous().view(torch.uint8).flatten().tolist())


def _lookup(tile: Tensor, names: dict[str, dict[bytes, str]]) -> str | None:
    key = _key(tile)
    return next((known[key] for known in names.values() if key in known), None)


def _describe(tile: Tensor, data_format: DataFormat) -> str:
    row, col, image = tile if data_format == "channels_first" else tile.movedim(-1, 0)
    return (
        f"no tile of either perspective: corners read (row, column) ({row[0, 0]:g}, {col[0, 0]:g}) to "
        f"({row[-1, -1]:g}, {col[-1, -1]:g}), image {image[0, 0]:g}"
    )
