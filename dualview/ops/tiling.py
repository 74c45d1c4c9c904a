"""Cut images and token maps into local blocks or global strides, and put them back.

All three operations are one permutation of elements, so they are exact for every dtype, differentiable, and inverse to
each other. Prior art, used as oracles in the tests: timm's window and grid partition (MaxViT), pixel unshuffle, unfold
with dilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn

from dualview.geometry import GridLike, Perspective, Size, TileGrid, check_perspective
from dualview.kernels.dispatch import Backend, choose
from dualview.kernels.retile import retile as _move
from dualview.ops.tile_batch import TileBatch
from dualview.views import map_view, merged, tile_view

DataFormat: TypeAlias = Literal["channels_first", "channels_last"]


def local_crop(
    x: Tensor, grid: GridLike, *, data_format: DataFormat = "channels_first", backend: Backend | None = None
) -> Tensor:
    """Cut a map into contiguous blocks, row by row (Eq. 11-13 of arXiv 2407.16198).

    Tile (i, j) of a map X is X[i*h : (i+1)*h, j*w : (j+1)*w]; it has index i * cols + j.

    Args:
        x: Images or token maps of any dtype, device and memory format.
        grid: Rows and columns of tiles.
        data_format: Whether the channels come before or after height and width.
        backend: "auto", "torch" or "triton"; None for what [`use_backend`][dualview.use_backend] says. The kernel takes
            channels-last maps.

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)

    Returns:
        A new contiguous tensor that shares no memory with ``x``.

    Raises:
        ValueError: H or W is not a positive multiple of the grid, ``x`` has fewer than three dimensions, or an argument
            is not one of the choices.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> x = torch.arange(8).reshape(1, 2, 4)
        >>> local_crop(x, (1, 2)).tolist()
        [[[[0, 1], [4, 5]]], [[[2, 3], [6, 7]]]]
    """
    return crop(x, grid, "local", data_format=data_format, backend=backend)


def global_stride_crop(
    x: Tensor, grid: GridLike, *, data_format: DataFormat = "channels_first", backend: Backend | None = None
) -> Tensor:
    """Cut a map into interleaved strides (Eq. 14-17 of arXiv 2407.16198).

    Tile (i, j) of a map X is X[i::rows, j::cols]; it has index i * cols + j and covers the whole map at a lower rate.

    Args:
        x: Images or token maps of any dtype, device and memory format.
        grid: Rows and columns of tiles.
        data_format: Whether the channels come before or after height and width.
        backend: "auto", "torch" or "triton"; None for what [`use_backend`][dualview.use_backend] says. The kernel takes
            channels-last maps.

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)

    Returns:
        A new contiguous tensor that shares no memory with ``x``.

    Raises:
        ValueError: H or W is not a positive multiple of the grid, ``x`` has fewer than three dimensions, or an argument
            is not one of the choices.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> x = torch.arange(8).reshape(1, 2, 4)
        >>> global_stride_crop(x, (1, 2)).tolist()
        [[[[0, 2], [4, 6]]], [[[1, 3], [5, 7]]]]
    """
    return crop(x, grid, "global", data_format=data_format, backend=backend)


def crop(
    x: Tensor,
    grid: GridLike,
    perspective: Perspective,
    *,
    data_format: DataFormat = "channels_first",
    backend: Backend | None = None,
) -> Tensor:
    """[`local_crop`][dualview.local_crop] or [`global_stride_crop`][dualview.global_stride_crop], by name."""
    grid = TileGrid.of(grid)
    check_rank(x, 3, data_format, "(..., C, H, W)", "(..., H, W, D)")
    batch = x.dim() - 3
    tiles = tile_view(x, grid, check_perspective(perspective), batch, batch + (data_format == "channels_first"))
    if _by_kernel(x, data_format, backend):
        return _move(x, "raster", perspective, grid, backend="triton")
    return tiles.clone(memory_format=torch.contiguous_format).flatten(batch, batch + 1)


def _by_kernel(x: Tensor, data_format: DataFormat, backend: Backend | None = None) -> bool:
    """Whether the kernel moves this map; there is none for channels-first images, and only a call can ask for it."""
    if data_format == "channels_last":
        return choose("retile", x, backend=backend).name == "triton"
    refused = ("it moves tokens, and these channels come first: pass data_format='channels_last'",)
    return backend == "triton" and choose("retile", x, backend=backend, refused=refused).name == "triton"


@overload
def recombine(
    tiles: Tensor,
    grid: GridLike,
    perspective: Perspective,
    *,
    data_format: DataFormat = ...,
    size: Size | None = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def recombine(
    tiles: TileBatch,
    grid: Sequence[GridLike] | None = ...,
    perspective: Perspective | None = ...,
    *,
    data_format: DataFormat = ...,
    backend: Backend | None = ...,
) -> list[Tensor]: ...
def recombine(
    tiles: Tensor | TileBatch,
    grid: GridLike | Sequence[GridLike] | None = None,
    perspective: Perspective | None = None,
    *,
    data_format: DataFormat = "channels_first",
    size: Size | None = None,
    backend: Backend | None = None,
) -> Tensor | list[Tensor]:
    """Put tiles back on the two-dimensional grid: the inverse of the crop of the same perspective (Eq. 5-6).

    Args:
        tiles: Tiles in the order that the crops give them, or a [`TileBatch`][dualview.TileBatch] of mixed grids.
        grid: Rows and columns of tiles (for a ``TileBatch``: omit it, the batch knows its grids).
        perspective: "local" or "global", the crop to undo (for a ``TileBatch`` that records it: may be omitted).
        data_format: Whether the channels come before or after height and width.
        size: The (H, W) that the result must have, checked if given.
        backend: As for the crops.

    Shape:
        - channels_first: (..., rows*cols, C, h, w) -> (..., C, rows*h, cols*w)
        - channels_last: (..., rows*cols, h, w, D) -> (..., rows*h, cols*w, D)
        - ``TileBatch``: a list with one map per image

    Returns:
        A new contiguous tensor that shares no memory with ``tiles``, or a list of them.

    Raises:
        ValueError: The tiles are of the wrong count, size or (where it is recorded) perspective.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> x = torch.arange(24).reshape(1, 4, 6)
        >>> torch.equal(recombine(global_stride_crop(x, (2, 3)), (2, 3), "global"), x)
        True
    """
    if isinstance(tiles, TileBatch):
        grids = tiles.checked_grids(grid)
        recorded = tiles.checked_perspective(perspective)
        return [
            recombine(image, g, recorded, data_format=data_format, backend=backend)
            for image, g in zip(tiles.split(), grids, strict=True)
        ]
    if grid is None or perspective is None:
        raise ValueError(
            f"recombine(tiles, grid={grid!r}, perspective={perspective!r}): a plain tensor records neither, so both "
            'must be given: recombine(tiles, (rows, cols), "local" or "global").'
        )
    grid, perspective = TileGrid.of(grid), check_perspective(perspective)  # type: ignore[arg-type]
    check_rank(tiles, 4, data_format, "(..., rows*cols, C, h, w)", "(..., rows*cols, h, w, D)")
    batch = tiles.dim() - 4
    if tiles.shape[batch] != grid.num_tiles:
        raise ValueError(
            f"recombine got {tiles.shape[batch]} tiles (dimension {batch} of {tuple(tiles.shape)}) for a grid of "
            f"{grid}: it needs rows*cols = {grid.num_tiles}. Pass all tiles of each image, and the grid they were cut "
            "with."
        )
    first = batch + 1 + (data_format == "channels_first")
    h, w = tiles.shape[first], tiles.shape[first + 1]
    if h < 1 or w < 1 or (size is not None and grid.map_size((h, w)) != tuple(size)):
        rule = f"size={tuple(size)} was asked for" if size is not None else "a tile must hold at least one cell"
        raise ValueError(
            f"recombine got tiles of {h} x {w} (height x width) for a grid of {grid}, which make a map of "
            f"{grid.map_size((h, w))}; {rule}. Check the grid (rows first) and that the tiles are those of this map."
        )
    if _by_kernel(tiles, data_format, backend):
        return _move(tiles, perspective, "raster", grid, backend="triton")
    plane = batch + (data_format == "channels_first")
    split = map_view(tiles.unflatten(batch, (grid.rows, grid.cols)), perspective, batch, plane)
    return merged(split.clone(memory_format=torch.contiguous_format), plane)


def retile(tiles: Tensor, source: Perspective, target: Perspective, grid: GridLike) -> Tensor:
    """Feature tiles of one perspective rearranged into those of the other; the tensor itself where they are the same.

    Shape:
        (..., rows*cols, h, w, D), unchanged
    """
    if source == target:
        return tiles
    return _move(tiles, source, target, grid)


def check_data_format(data_format: str) -> DataFormat:
    """``data_format`` if it is one of the two, else a ValueError."""
    if data_format not in get_args(DataFormat):
        raise ValueError(f'data_format={data_format!r}: must be "channels_first" or "channels_last".')
    return data_format  # type: ignore[return-value]  # narrowed by the check above


def check_rank(x: Tensor, rank: int, data_format: str, first: str, last: str) -> None:
    """A ValueError for an unknown ``data_format``, or for fewer than ``rank`` dimensions."""
    check_data_format(data_format)
    if x.dim() < rank:
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} has too few dimensions for data_format={data_format!r}: expected "
            f"{first if data_format == 'channels_first' else last} with any leading batch dimensions."
        )


class _Crop(nn.Module):
    """Holds the arguments; ``forward`` calls the function."""

    perspective: Perspective

    def __init__(self, grid: GridLike, *, data_format: DataFormat = "channels_first") -> None:
        super().__init__()
        self.grid, self.data_format = TileGrid.of(grid), check_data_format(data_format)

    def forward(self, x: Tensor) -> Tensor:
        return crop(x, self.grid, self.perspective, data_format=self.data_format)

    def extra_repr(self) -> str:
        return f"grid=({self.grid.rows}, {self.grid.cols}), data_format={self.data_format!r}"


class LocalCrop(_Crop):
    """Module of [`local_crop`][dualview.local_crop]: contiguous blocks.

    Args:
        grid: Rows and columns of tiles.
        data_format: Whether the channels come before or after height and width.

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)

    Example:
        >>> LocalCrop((2, 3))(torch.zeros(1, 3, 8, 9)).shape
        torch.Size([1, 6, 3, 4, 3])
    """

    perspective: Perspective = "local"


class GlobalStrideCrop(_Crop):
    """Module of [`global_stride_crop`][dualview.global_stride_crop]: interleaved strides.

    Args:
        grid: Rows and columns of tiles.
        data_format: Whether the channels come before or after height and width.

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)

    Example:
        >>> GlobalStrideCrop((2, 3))(torch.zeros(1, 3, 8, 9)).shape
        torch.Size([1, 6, 3, 4, 3])
    """

    perspective: Perspective = "global"


class SubfeatureRecombine(nn.Module):
    """Module of [`recombine`][dualview.recombine]: tiles back onto the grid (Eq. 5 or Eq. 6).

    Args:
        grid: Rows and columns of tiles.
        perspective: "local" (Eq. 5) or "global" (Eq. 6), the crop to undo.
        data_format: Whether the channels come before or after height and width.

    Shape:
        - channels_last: (..., rows*cols, h, w, D) -> (..., rows*h, cols*w, D)
        - channels_first: (..., rows*cols, C, h, w) -> (..., C, rows*h, cols*w)

    Raises:
        ValueError: As [`recombine`][dualview.recombine]; a wrong grid or perspective already at construction.

    Example:
        >>> SubfeatureRecombine((2, 3), "global", data_format="channels_last")(torch.zeros(1, 6, 4, 5, 8)).shape
        torch.Size([1, 8, 15, 8])
    """

    def __init__(self, grid: GridLike, perspective: Perspective, *, data_format: DataFormat = "channels_first") -> None:
        super().__init__()
        self.grid, self.perspective = TileGrid.of(grid), check_perspective(perspective)
        self.data_format = check_data_format(data_format)

    def forward(self, tiles: Tensor) -> Tensor:
        return recombine(tiles, self.grid, self.perspective, data_format=self.data_format)

    def extra_repr(self) -> str:
        return (
            f"grid=({self.grid.rows}, {self.grid.cols}), perspective={self.perspective!r}, "
            f"data_format={self.data_format!r}"
        )
