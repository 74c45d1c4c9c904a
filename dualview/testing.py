"""Check the order of tiles in a pipeline of your own: coordinate images reveal a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from dualview.arguments import check_callable, check_choice, check_count, check_size, shown
from dualview.geometry import DATA_FORMATS, DataFormat, GridLike, Perspective, Size, TileGrid, check_perspective
from dualview.ops.tiling import crop

__all__ = ["assert_tile_order", "coordinate_images"]

MOST_PIXELS = 2**24
"""Pixels of coordinate images that are made at once."""


def coordinate_images(size: Size, *, batch: int = 1, data_format: DataFormat = "channels_first") -> Tensor:
    """Images whose three channels hold each pixel's row, column and place in the batch.

    Args:
        size: Image size (H, W).
        batch: Number of images.
        data_format: Whether the channels come before or after height and width.

    Shape:
        (batch, 3, H, W) or (batch, H, W, 3), float32

    Raises:
        ValueError: A size or the number of images is not positive, or there are more than 16,777,216 pixels in all.

    Example:
        >>> coordinate_images((2, 3))[0, :, 1, 2].tolist()
        [1.0, 2.0, 0.0]
    """
    height, width = check_size(size, "size")
    batch, first = (
        check_count(batch, "batch"),
        check_choice(data_format, "data_format", DATA_FORMATS) == DATA_FORMATS[0],
    )
    if batch * height * width > MOST_PIXELS:
        raise ValueError(f"batch={batch} images of size=({height}, {width}): at most {MOST_PIXELS:,} pixels in all.")
    index = torch.arange(batch).view(-1, 1, 1).expand(batch, height, width)
    row = torch.arange(height).view(1, -1, 1).expand_as(index)
    col = torch.arange(width).view(1, 1, -1).expand_as(index)
    return torch.stack([row, col, index], dim=1 if first else -1).float()


def assert_tile_order(
    fn: Callable[[Tensor], Any],
    grid: GridLike,
    tile: Size,
    *,
    perspective: Perspective = "local",
    data_format: DataFormat = "channels_first",
    batch: int = 2,
) -> None:
    """Push coordinate images through a tiling function and say which tile landed where.

    Use a grid and tile that are not square: only then can a swap of heights and widths be seen. The pixel values are
    the coordinates, so leave normalisation out, and keep the map within 256 x 256 where pixels pass through 8 bits or
    bfloat16.

    Args:
        fn: The function under test: a batch of images to tiles, (batch, rows*cols, ...) or (batch*rows*cols, ...) with
            the tiles of the first image first. Tensors, NumPy arrays and (nested) lists of them are understood, so one
            that takes single arrays is tested as ``lambda images: [fn(image.numpy()) for image in images]``.
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
    check_callable(fn, "fn", "a function that cuts images into tiles")
    batch = check_count(batch, "batch")
    grid, tile, perspective = TileGrid.of(grid), check_size(tile, "tile"), check_perspective(perspective)
    if batch * grid.num_tiles * tile[0] * tile[1] > MOST_PIXELS:
        raise ValueError(f"batch={batch}, grid={grid}, tile={tile}: at most {MOST_PIXELS:,} pixels in all.")
    images = coordinate_images(grid.map_size(tile), batch=batch, data_format=data_format)
    expected = crop(images, grid, perspective, data_format=data_format).flatten(0, 1)
    made = _as_tensor(returned := fn(images.clone()))
    if made is None:
        raise AssertionError(
            f"fn={shown(fn)} returned {shown(returned)}: expected tensors or arrays of tiles, or lists of them."
        )
    nested = made.dim() == expected.dim() + 1 and made.shape[:2] == (batch, grid.num_tiles)
    found = (made.flatten(0, 1) if nested else made).to(device=expected.device, dtype=expected.dtype)
    if found.shape != expected.shape:
        raise AssertionError(
            f"the function made {tuple(made.shape)} of images of {tuple(images.shape)}: expected "
            f"{tuple(expected.shape)} or ({batch}, {grid.num_tiles}, ...), for a grid of {grid} tiles of {tile[0]} x "
            f"{tile[1]} (height x width)."
        )
    if torch.equal(found, expected):
        return
    if not torch.equal(expected.to(made.dtype).to(expected.dtype), expected) or not torch.isin(found, expected).all():
        raise AssertionError(
            f"the function changed pixel values, not only their places: coordinates of 0 to {expected.max():g} became "
            f"{made.dtype} values of {found.min():g} to {found.max():g}. Leave out normalisation and interpolation for "
            "this check; if pixels pass through 8 bits or bfloat16, let grid and tile make a map within 256 x 256."
        )
    names = {p: _names(images, grid, p, data_format) for p in get_args(Perspective)}
    lines = []
    for place, (got, want) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(got, want):
            lines.append(f"  place {place}: should be {_lookup(want, names)}, is {_describe(got, names, data_format)}")
    listed = "\n".join(lines[:12]) + (f"\n  ... and {len(lines) - 12} more" if len(lines) > 12 else "")
    raise AssertionError(
        f"tiles are not in {perspective} order: {len(lines)} of {len(found)} are wrong, on a {grid} grid of "
        f"{tile[0]} x {tile[1]} tiles.\n{listed}"
    )


def _as_tensor(found: Any) -> Tensor | None:
    """Tiles in whatever container as one tensor, None if they are none."""
    try:
        if isinstance(found, (list, tuple)):
            return torch.stack([torch.as_tensor(_as_tensor(part)) for part in found])
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None


def _names(images: Tensor, grid: TileGrid, perspective: Perspective, data_format: DataFormat) -> dict[bytes, str]:
    tiles = crop(images, grid, perspective, data_format=data_format)
    return {
        _key(tiles[b, n]): f"{perspective} tile (row {n // grid.cols}, column {n % grid.cols}) of image {b}"
        for b in range(tiles.shape[0])
        for n in range(grid.num_tiles)
    }


def _key(tile: Tensor) -> bytes:
    return bytes(tile.contiguous().view(torch.uint8).flatten().tolist())


def _lookup(tile: Tensor, names: dict[Perspective, dict[bytes, str]]) -> str | None:
    key = _key(tile)
    return next((known[key] for known in names.values() if key in known), None)


def _describe(tile: Tensor, names: dict[Perspective, dict[bytes, str]], data_format: DataFormat) -> str:
    """The tile's name; or its name and how it is turned; or where its corners come from."""
    h, w = (1, 2) if data_format == "channels_first" else (0, 1)
    turned = {
        "": tile,
        ", upside down": tile.flip(h),
        ", mirrored left to right": tile.flip(w),
        ", rotated by 180 degrees": tile.flip(h, w),
        ", rows and columns exchanged": tile.transpose(h, w),
    }
    for how, candidate in turned.items():
        name = _lookup(candidate, names)
        if name is not None:
            return name + how
    row, col, image = tile if data_format == "channels_first" else tile.movedim(-1, 0)
    corners = [f"({row[y, x]:g}, {col[y, x]:g})" for y in (0, -1) for x in (0, -1)]
    return (
        f"no tile of either perspective: its corners hold (row, column) {corners[0]} {corners[1]} at the top, "
        f"{corners[2]} {corners[3]} at the bottom, of image {image[0, 0]:g}"
    )
