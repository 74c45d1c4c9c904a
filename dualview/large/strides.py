"""Stride tiles and a picture on disk, one gathered from the other in one pass over the source.

A stride tile has pixels in every chunk of a picture. Tile by tile, each chunk would be decoded once for every tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dualview.geometry import DataFormat, Size, TileGrid, tile_slice
from dualview.large.sources import Source, blocks

Block = tuple[slice, slice]


def gather(source: Source, grid: TileGrid, tile: Size, tiles: Any, done: Callable[[int], object]) -> None:
    """Fill ``tiles``, (rows*cols, C, h, w) or (rows*cols, h, w, C), from the source."""
    for rows, cols in source.blocks():
        block = source.read(rows, cols)
        for number, here, there in _pieces(grid, tile, rows, cols):
            tiles[(number, *_at(there, source.data_format))] = block[_at(here, source.data_format)]
        done((rows.stop - rows.start) * (cols.stop - cols.start))


def scatter(tiles: Any, grid: TileGrid, picture: Any, size: Size, chunk: Size, data_format: DataFormat) -> None:
    """Fill a picture from stride tiles: the inverse."""
    first = data_format == "channels_first"
    tile, channels = (tiles.shape[2:], tiles.shape[1]) if first else (tiles.shape[1:3], tiles.shape[3])
    for rows, cols in blocks(size, chunk, channels * tiles.dtype.itemsize):
        plane = rows.stop - rows.start, cols.stop - cols.start
        block = np.empty((channels, *plane) if first else (*plane, channels), tiles.dtype)
        for number, here, there in _pieces(grid, tile, rows, cols):
            block[_at(here, data_format)] = tiles[(number, *_at(there, data_format))]
        picture[_at((rows, cols), data_format)] = block


def _at(block: Block, data_format: DataFormat) -> tuple[slice, ...]:
    return (slice(None), *block) if data_format == "channels_first" else block


def _pieces(grid: TileGrid, tile: Size, rows: slice, cols: slice) -> Iterator[tuple[int, Block, Block]]:
    """Of every tile with pixels in a block: its number, and where these pixels are in the block and in the tile."""
    across = [_common(tile_slice("global", j, grid.cols, tile[1]), tile[1], cols) for j in range(grid.cols)]
    for i in range(grid.rows):
        down = _common(tile_slice("global", i, grid.rows, tile[0]), tile[0], rows)
        for j, along in enumerate(across):
            if down and along:
                yield i * grid.cols + j, (down[0], along[0]), (down[1], along[1])


def _common(positions: slice, count: int, span: slice) -> tuple[slice, slice] | None:
    """The positions of a tile on an axis that lie in a span: where in the span, and where in the tile.

    Example:
        >>> _common(slice(1, 11, 3), 4, slice(4, 9))
        (slice(0, 4, 3), slice(1, 3, None))
    """
    start, step = positions.start, positions.step
    first, stop = max(0, -(-(span.start - start) // step)), min(count, -(-(span.stop - start) // step))
    if first >= stop:
        return None
    at = start + first * step - span.start
    return slice(at, at + (stop - first - 1) * step + 1, step), slice(first, stop)
