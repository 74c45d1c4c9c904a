"""The Triton kernel of `dualview.kernels.retile` and its launch. Imports triton."""
# ruff: noqa: N803 - sizes have the names of the equations
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.geometry import Layout, Size, TileGrid, split_axis
from dualview.kernels import dispatch
from dualview.views import shape_in

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Elements are moved as integers of their size: exact for every type, NaNs and their payloads included."""

ELEMENTS = 4096
"""Elements that a program moves: 32 for each of its 128 threads."""


def move(x: Tensor, source: Layout, target: Layout, grid: TileGrid, tile: Size) -> Tensor:
    """The map (B, H, W, D) or (B, rows*cols, h, w, D) in another layout."""
    out = dispatch.empty(*shape_in(target, x, source, grid, tile, "channels_last"), like=x)
    if not out.numel():
        return out
    *_, stride_h, stride_w, stride_d = x.stride()
    stride_tile = 0 if source == "raster" else x.stride(1)
    tile_rows, h, *row_steps = _result_steps(target, grid.rows, tile[0])
    tile_cols, w, *col_steps = _result_steps(target, grid.cols, tile[1])
    of_rows = _source_strides(source, grid.rows, tile[0], grid.cols * stride_tile, stride_h)
    of_cols = _source_strides(source, grid.cols, tile[1], stride_tile, stride_w)
    dim, bits = x.shape[-1], BITS[x.element_size()]
    block_d = min(triton.next_power_of_2(dim), 128)
    block_v = min(triton.next_power_of_2(w), ELEMENTS // block_d)
    programs = (x.shape[0] * tile_rows * tile_cols * h, triton.cdiv(w, block_v), triton.cdiv(dim, block_d))
    with torch.cuda.device_of(x):
        _move[programs](
            *(x.view(bits), out.view(bits), dim, tile_rows, tile_cols, h, w, *row_steps, *col_steps),
            *(x.stride(0), stride_d, *of_rows, *of_cols),
            BLOCK_V=block_v,
            BLOCK_D=block_d,
        )
    return out


def _result_steps(layout: Layout, tiles: int, size: int) -> tuple[int, int, int, int]:
    """Tiles along an axis, positions of one, and the steps from tile to tile and from position to position."""
    if layout == "raster":
        return 1, tiles * size, 0, 1
    (_, inner), tile_factor = split_axis(layout, tiles, size)
    return (tiles, size, inner, 1) if tile_factor == 0 else (tiles, size, 1, inner)


def _source_strides(layout: Layout, tiles: int, size: int, stride_tile: int, stride: int) -> tuple[int, int, int]:
    """The inner factor by which a position on an axis splits, and the strides of its quotient and its remainder."""
    if layout == "raster":
        return tiles * size, 0, stride
    (_, inner), tile_factor = split_axis(layout, tiles, size)
    return (inner, stride_tile, stride) if tile_factor == 0 else (inner, stride, stride_tile)


# Grids and tile sizes that vary from image to image must not make a new kernel each.
GRID = ("tile_rows", "tile_cols", "h", "w", "row_tile", "row_u", "col_tile", "col_v", "row_inner", "col_inner")


@triton.jit(do_not_specialize=GRID)
def _move(
    x, out, dim, tile_rows, tile_cols, h, w, row_tile, row_u, col_tile, col_v,
    stride_b, stride_d, row_inner, stride_row_outer, stride_row_inner, col_inner, stride_col_outer, stride_col_inner,
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
    read_line = b.to(tl.int64) * stride_b + (y // row_inner).to(tl.int64) * stride_row_outer
    read_line += (y % row_inner).to(tl.int64) * stride_row_inner
    column = j * col_tile + v * col_v
    outer = column // col_inner
    read_token = outer.to(tl.int64) * stride_col_outer + (column - outer * col_inner).to(tl.int64) * stride_col_inner
    read = read_line + read_token[:, None] + d.to(tl.int64)[None, :] * stride_d
    write = (line.to(tl.int64) * w + v)[:, None] * dim + d[None, :]
    tl.store(out + write, tl.load(x + read, mask=inside), mask=inside)
