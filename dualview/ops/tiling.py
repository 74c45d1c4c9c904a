"""Cut images and token maps into local blocks or global strides, and put them back.

All three operations are one permutation of elements, so they are exact for every dtype, differentiable, and inverse to
each other. Prior art, used as oracles in the tests: timm's window and grid partition (MaxViT), pixel unshuffle, unfold
with dilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, overload

from torch import Tensor, nn

from dualview.arguments import check_choice
from dualview.blending import cut
from dualview.dual_tiles import DualPerspectiveTileBatch, DualPerspectiveTiles
from dualview.geometry import (
    DATA_FORMATS,
    Border,
    DataFormat,
    GridLike,
    Perspective,
    Size,
    SizeLike,
    TileGrid,
    check_perspective,
    grid_or_tile,
)
from dualview.kernels.dispatch import Backend
from dualview.kernels.retile import retile
from dualview.ops.tile_batch import TileBatch
from dualview.views import check_result_size, grid_for, tile_size


def local_crop(
    x: Tensor,
    grid: GridLike | None = None,
    *,
    tile: SizeLike | None = None,
    overlap: SizeLike | None = None,
    border: Border = "shift",
    data_format: DataFormat = "channels_first",
    backend: Backend | None = None,
) -> Tensor:
    """Cut a map into contiguous blocks, row by row (Eq. 11-13 of arXiv 2407.16198).

    Tile (i, j) of a map X is X[i*h : (i+1)*h, j*w : (j+1)*w]; it has index i * cols + j.

    Args:
        x: Images or token maps of any dtype, device and memory format.
        grid: Rows and columns of tiles.
        tile: In place of ``grid``: the size (h, w) of a tile, or one number for a square.
        overlap: With ``tile``: how much neighbouring tiles share, (height, width) or one number for both, from 0 on.
            Maps of any size are then covered; [`blend_tiles`][dualview.blend_tiles] is the inverse.
        border: With ``overlap``, where the last tiles would reach beyond the map: "shift" moves them inside, "pad"
            leaves them where they are and fills them up with zeros.
        data_format: Whether the channels come before or after height and width.
        backend: "auto", "torch" or "triton"; None for what [`use_backend`][dualview.use_backend] says. The kernel moves
            channels-first maps only where this argument is "triton".

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)
        - with ``overlap``: the same with tiles of (h, w), rows = ceil((H - overlap) / (h - overlap)) and cols alike

    Returns:
        A new contiguous tensor that shares no memory with ``x``.

    Raises:
        ValueError: H or W is not a positive multiple of the grid or the tile, both or neither of the two are given,
            ``x`` has fewer than three dimensions, its channels seem to come last under "channels_first", or an argument
            is not one of the choices. With ``overlap``: it is no smaller than the tile, or the map is smaller than one
            tile under "shift".
        TypeError: ``x`` is no tensor.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> import torch
        >>> x = torch.arange(8).reshape(1, 2, 4)
        >>> local_crop(x, (1, 2)).tolist()
        [[[[0, 1], [4, 5]]], [[[2, 3], [6, 7]]]]
        >>> local_crop(x, tile=2, overlap=1).tolist()
        [[[[0, 1], [4, 5]]], [[[1, 2], [5, 6]]], [[[2, 3], [6, 7]]]]
    """
    if overlap is not None:
        return cut(x, grid, tile, overlap, border, data_format)
    return crop(x, grid, "local", tile=tile, data_format=data_format, backend=backend)


def global_stride_crop(
    x: Tensor,
    grid: GridLike | None = None,
    *,
    tile: SizeLike | None = None,
    data_format: DataFormat = "channels_first",
    backend: Backend | None = None,
) -> Tensor:
    """Cut a map into interleaved strides (Eq. 14-17 of arXiv 2407.16198).

    Tile (i, j) of a map X is X[i::rows, j::cols]; it has index i * cols + j and covers the whole map at a lower rate.

    Args:
        x: Images or token maps of any dtype, device and memory format.
        grid: Rows and columns of tiles.
        tile: In place of ``grid``: the size (h, w) of a tile, or one number for a square.
        data_format: Whether the channels come before or after height and width.
        backend: "auto", "torch" or "triton"; None for what [`use_backend`][dualview.use_backend] says. The kernel moves
            channels-first maps only where this argument is "triton".

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)

    Returns:
        A new contiguous tensor that shares no memory with ``x``.

    Raises:
        ValueError: H or W is not a positive multiple of the grid or the tile, both or neither of the two are given,
            ``x`` has fewer than three dimensions, its channels seem to come last under "channels_first", or an argument
            is not one of the choices.
        TypeError: ``x`` is no tensor.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> import torch
        >>> x = torch.arange(8).reshape(1, 2, 4)
        >>> global_stride_crop(x, (1, 2)).tolist()
        [[[[0, 2], [4, 6]]], [[[1, 3], [5, 7]]]]
    """
    return crop(x, grid, "global", tile=tile, data_format=data_format, backend=backend)


def crop(
    x: Tensor,
    grid: GridLike | None,
    perspective: Perspective,
    *,
    tile: SizeLike | None = None,
    data_format: DataFormat = "channels_first",
    backend: Backend | None = None,
) -> Tensor:
    """[`local_crop`][dualview.local_crop] or [`global_stride_crop`][dualview.global_stride_crop], by name."""
    if grid is None or tile is not None:
        grid = grid_for(x, grid, tile, data_format)
    return retile(x, "raster", check_perspective(perspective), grid, data_format=data_format, backend=backend)


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
    tiles: DualPerspectiveTiles,
    grid: GridLike | Perspective | None = ...,
    perspective: Perspective | None = ...,
    *,
    data_format: DataFormat = ...,
    size: Size | None = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def recombine(
    tiles: TileBatch | DualPerspectiveTileBatch,
    grid: Sequence[GridLike] | Perspective | None = ...,
    perspective: Perspective | None = ...,
    *,
    data_format: DataFormat = ...,
    size: Size | None = ...,
    backend: Backend | None = ...,
) -> list[Tensor]: ...
def recombine(
    tiles: Tensor | TileBatch | DualPerspectiveTiles | DualPerspectiveTileBatch,
    grid: GridLike | Sequence[GridLike] | Perspective | None = None,
    perspective: Perspective | None = None,
    *,
    data_format: DataFormat = "channels_first",
    size: Size | None = None,
    backend: Backend | None = None,
) -> Tensor | list[Tensor]:
    """Put tiles back on the two-dimensional grid: the inverse of the crop of the same perspective (Eq. 5-6).

    Args:
        tiles: Tiles in the order that the crops give them; or a record of tiles, which knows its grids:
            [`TileBatch`][dualview.TileBatch] or what [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] made.
        grid: Rows and columns of tiles. Omitted for a record: ``recombine(tiles, "local")``.
        perspective: "local" or "global", the crop to undo. A plain tensor cannot show that it is of the other
            perspective, or of a grid of as many tiles; a record is refused then. A ``TileBatch`` that knows its
            perspective needs none.
        data_format: Whether the channels come before or after height and width.
        size: The (H, W) that the result must have, checked if given.
        backend: As for the crops.

    Shape:
        - channels_first: (..., rows*cols, C, h, w) -> (..., C, rows*h, cols*w)
        - channels_last: (..., rows*cols, h, w, D) -> (..., rows*h, cols*w, D)
        - ``TileBatch``, ``DualPerspectiveTileBatch``: a list with one map per image

    Returns:
        A new contiguous tensor that shares no memory with ``tiles``, or a list of them.

    Raises:
        ValueError: The tiles are of the wrong count, size or (where it is recorded) perspective.
        TypeError: ``tiles`` is no tensor.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> import torch
        >>> x = torch.arange(24).reshape(1, 4, 6)
        >>> torch.equal(recombine(global_stride_crop(x, (2, 3)), (2, 3), "global"), x)
        True
    """
    if isinstance(grid, str) and perspective is None:
        grid, perspective = None, grid
    if not isinstance(tiles, Tensor) and isinstance(tiles, DualPerspectiveTiles | DualPerspectiveTileBatch):
        grid, tiles = tiles.checked_grid(grid), tiles.of(perspective)  # type: ignore[arg-type]
    if not isinstance(tiles, Tensor) and isinstance(tiles, TileBatch):
        grids = tiles.checked_grids(grid, "grid")
        recorded = tiles.checked_perspective(perspective)
        return [
            recombine(image, g, recorded, data_format=data_format, size=size, backend=backend)
            for image, g in zip(tiles.split(), grids, strict=True)
        ]
    if grid is None or perspective is None:
        raise ValueError(
            f"recombine(tiles, grid={grid!r}, perspective={perspective!r}): a plain tensor records neither, so both "
            'must be given: recombine(tiles, (rows, cols), "local" or "global").'
        )
    perspective, (known, plain) = check_perspective(perspective), cast("tuple[GridLike, Tensor]", (grid, tiles))
    if size is not None:
        known = TileGrid.of(known)
        check_result_size(size, known, tile_size(plain, perspective, known, data_format, "tiles"))
    return retile(plain, perspective, "raster", known, data_format=data_format, backend=backend, name="tiles")


class _Crop(nn.Module):
    """Holds the arguments; ``forward`` calls the function."""

    perspective: Perspective

    def __init__(
        self, grid: GridLike | None = None, *, tile: SizeLike | None = None, data_format: DataFormat = "channels_first"
    ) -> None:
        super().__init__()
        self.grid, self.tile = grid_or_tile(grid, tile)
        self.data_format = check_choice(data_format, "data_format", DATA_FORMATS)

    def forward(self, x: Tensor) -> Tensor:
        """Cut a map into tiles."""
        return crop(x, self.grid, self.perspective, tile=self.tile, data_format=self.data_format)

    def extra_repr(self) -> str:
        return (
            f"tile={self.tile}" if self.grid is None else f"grid=({self.grid.rows}, {self.grid.cols})"
        ) + f", data_format={self.data_format!r}"


class LocalCrop(_Crop):
    """Module of [`local_crop`][dualview.local_crop]: contiguous blocks.

    Args:
        grid: Rows and columns of tiles.
        tile: In place of ``grid``: the size (h, w) of a tile, or one number for a square.
        data_format: Whether the channels come before or after height and width.

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)

    Example:
        >>> import torch
        >>> LocalCrop((2, 3))(torch.zeros(1, 3, 8, 9)).shape
        torch.Size([1, 6, 3, 4, 3])
    """

    perspective: Perspective = "local"


class GlobalStrideCrop(_Crop):
    """Module of [`global_stride_crop`][dualview.global_stride_crop]: interleaved strides.

    Args:
        grid: Rows and columns of tiles.
        tile: In place of ``grid``: the size (h, w) of a tile, or one number for a square.
        data_format: Whether the channels come before or after height and width.

    Shape:
        - channels_first: (..., C, H, W) -> (..., rows*cols, C, H/rows, W/cols)
        - channels_last: (..., H, W, D) -> (..., rows*cols, H/rows, W/cols, D)

    Example:
        >>> import torch
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
        >>> import torch
        >>> SubfeatureRecombine((2, 3), "global", data_format="channels_last")(torch.zeros(1, 6, 4, 5, 8)).shape
        torch.Size([1, 8, 15, 8])
    """

    def __init__(self, grid: GridLike, perspective: Perspective, *, data_format: DataFormat = "channels_first") -> None:
        super().__init__()
        self.grid, self.perspective = TileGrid.of(grid), check_perspective(perspective)
        self.data_format = check_choice(data_format, "data_format", DATA_FORMATS)

    def forward(self, tiles: Tensor) -> Tensor:
        """Put tiles back."""
        return recombine(tiles, self.grid, self.perspective, data_format=self.data_format)

    def extra_repr(self) -> str:
        return (
            f"grid=({self.grid.rows}, {self.grid.cols}), perspective={self.perspective!r}, "
            f"data_format={self.data_format!r}"
        )
