"""Device code of `dualview.kernels.retile`. Imports triton, so it is imported only to launch it."""
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.geometry import AxisSplit, Size, split_axis

if TYPE_CHECKING:
    from dualview.kernels.retile import Layout

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Elements are moved as integers of their size: exact for every type, NaNs and their payloads included."""

ELEMENTS = 4096
"""Elements that a program moves: 32 for each of its 128 threads."""


def move(x: Tensor, out: Tensor, source: Layout, target: Layout, rows: int, cols: int, size: Size) -> None:
    """Launch the kernel, on a map of ``size`` (H, W)."""
    if not out.numel():
        return
    height, width = size
    tile_rows, h, *row_steps = _writing(target, rows, height)
    tile_cols, w, *col_steps = _writing(target, cols, width)
    of_tile = 0 if source == "raster" else x.stride(1)
    reading = (
        *_reading(source, rows, height, cols * of_tile, x.stride(-3)),
        *_reading(source, cols, width, of_tile, x.stride(-2)),
    )
    dim, bits = x.shape[-1], BITS[x.element_size()]
    block_d = min(triton.next_power_of_2(dim), 128)
    block_v = min(triton.next_power_of_2(w), ELEMENTS // block_d)
    programs = (x.shape[0] * tile_rows * tile_cols * h, triton.cdiv(w, block_v), triton.cdiv(dim, block_d))
    with torch.cuda.device_of(x):
        _move[programs](
            x.view(bits), out.view(bits), dim, tile_rows, tile_cols, h, w, *row_steps, *col_steps,
            x.stride(0), x.stride(-1), *reading, BLOCK_V=block_v, BLOCK_D=block_d,
        )  # fmt: skip


def _split(layout: Layout, tiles: int, length: int) -> tuple[int, int, AxisSplit]:
    """Tiles along an axis, positions of one, and how the axis splits; a map in raster order is one tile."""
    if layout == "raster":
        return 1, length, split_axis("local", 1, length)
    return tiles, length // tiles, split_axis(layout, tiles, length // tiles)


def _writing(layout: Layout, tiles: int, length: int) -> tuple[int, int, int, int]:
    """Tiles, positions of one, and the steps along the axis from tile to tile and from offset to offset."""
    tiles, size, (factors, tile_factor) = _split(layout, tiles, length)
    return (tiles, size, factors[1], 1) if tile_factor == 0 else (tiles, size, 1, factors[1])


def _reading(layout: Layout, tiles: int, length: int, of_tile: int, of_offset: int) -> tuple[int, int, int]:
    """The inner factor by which a position splits, and the strides of its quotient and of its remainder."""
    _, _, (factors, tile_factor) = _split(layout, tiles, length)
    return (factors[1], of_tile, of_offset) if tile_factor == 0 else (factors[1], of_offset, of_tile)


# Grids and tile sizes that vary from image to image must not make a new kernel each.
GRID = ("tile_rows", "tile_cols", "h", "w", "row_tile", "row_u", "col_tile", "col_v", "row_inner", "col_inner")


@triton.jit(do_not_specialize=GRID)
def _move(
    x, out, dim, tile_rows, tile_cols, h, w, row_tile, row_u, col_tile, col_v,
    x_batch, x_dim, row_inner, x_row_outer, x_row_inner, col_inner, x_col_outer, x_col_inner,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program moves some tokens of one line of the result: row u of tile (i, j) of image b.

    What the tokens of a line share is worked out once for all threads; one division per token is left.
    """
    line = tl.program_id(0)
    u, tile = line % h, line // h
    j, tile_row = tile % tile_cols, tile // tile_cols
    i, b = tile_row % tile_rows, tile_row // tile_rows
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (v < w)[:, None] & (d < dim)[None, :]

    y = i * row_tile + u * row_u
    read_line = b.to(tl.int64) * x_batch + (y // row_inner).to(tl.int64) * x_row_outer
    read_line += (y % row_inner).to(tl.int64) * x_row_inner
    column = j * col_tile + v * col_v
    outer = column // col_inner
    read_token = outer.to(tl.int64) * x_col_outer + (column - outer * col_inner).to(tl.int64) * x_col_inner
    read = read_line + read_token[:, None] + d.to(tl.int64)[None, :] * x_dim
    write = (line.to(tl.int64) * w + v)[:, None] * dim + d[None, :]
    tl.store(out + write, tl.load(x + read, mask=inside), mask=inside)
