"""The Triton kernels of `dualview.kernels.retile` and their launch. Imports triton."""
# ruff: noqa: N803 - sizes have the names of the equations
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.geometry import Layout, Size, TileGrid, split_axis
from dualview.kernels import dispatch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Elements are moved as integers of their size: exact for every type, NaNs and their payloads included."""

ELEMENTS = 4096
"""Elements that a program moves: 32 for each of its 128 threads."""

Launch: TypeAlias = tuple[Any, tuple[int, ...], tuple[int, ...], dict[Any, Any]]
"""Kernel, programs along each axis, its arguments after the tensors (sizes, strides, blocks), and what has been loaded:
by device, type and alignment the program that runs, so that a later launch need not find out again which one it is."""


def launch(x: Tensor, shape: tuple[int, ...], images: bool, *move: Any) -> Tensor:
    """A map (B, ...) in another layout.

    Args:
        x: The map.
        shape: Of the result.
        images: Whether channels come first.
        *move: Of images the sizes of their factors and the order of these; of token maps source, target, grid, tile.
    """
    out = dispatch.empty(*shape, like=x)
    if not out.numel():
        return out
    kernel, programs, numbers, loaded = (_of_images if images else _of_tokens)(x.shape, x.stride(), *move)
    place = _, bits, _ = _place(x)
    given = x.view(bits), out.view(bits), *numbers
    with torch.cuda.device_of(x):
        if (program := loaded.get(place)) is not None:
            program[programs](*given)
        else:
            loaded[place] = kernel[programs](*given)
    return out


def _place(x: Tensor) -> tuple[int, torch.dtype, int]:
    """On what it depends, beside the numbers, which program is loaded."""
    return x.get_device(), BITS[x.element_size()], x.data_ptr() % 16


def has_run(x: Tensor, *move: Any) -> bool:
    """Whether the program that moves these tokens has run before."""
    return _place(x) in _of_tokens(x.shape, x.stride(), *move)[-1]


@lru_cache(maxsize=1024)
def _of_tokens(
    shape: tuple[int, ...], strides: tuple[int, ...], source: Layout, target: Layout, grid: TileGrid, tile: Size
) -> Launch:
    (rows, cols), (*_, stride_h, stride_w, stride_d) = grid, strides
    stride_tile = 0 if source == "raster" else strides[1]
    tile_rows, h, *row_steps = _result_steps(target, rows, tile[0])
    tile_cols, w, *col_steps = _result_steps(target, cols, tile[1])
    of_rows = _source_strides(source, rows, tile[0], cols * stride_tile, stride_h)
    of_cols = _source_strides(source, cols, tile[1], stride_tile, stride_w)
    batch, dim = shape[0], shape[-1]
    block_d = min(triton.next_power_of_2(dim), 128)
    block_v = min(triton.next_power_of_2(w), ELEMENTS // block_d)
    programs = (batch * tile_rows * tile_cols * h, triton.cdiv(w, block_v), triton.cdiv(dim, block_d))
    sizes = dim, tile_rows, tile_cols, h, w, *row_steps, *col_steps
    return _move, programs, (*sizes, strides[0], stride_d, *of_rows, *of_cols, block_v, block_d), {}


@lru_cache(maxsize=1024)
def _of_images(
    shape: tuple[int, ...], strides: tuple[int, ...], sizes: tuple[int, ...], order: tuple[int, ...]
) -> Launch:
    """Of the six factors in the order of the result, a program takes those of the width, and lines of the others."""
    seen = torch.empty_strided(shape, strides, device="meta").view(sizes).permute(order)
    made = torch.empty(seen.shape, device="meta").stride()
    lines = [axis for axis in range(5) if axis != (across := 2 if len(shape) == 4 else 4)]  # of tiles, or of a width
    outer, inner = seen.shape[across], seen.shape[5]
    block_q = min(triton.next_power_of_2(inner), 128)
    block_p = min(triton.next_power_of_2(outer), 128, ELEMENTS // block_q)
    several = ELEMENTS // (block_p * block_q)
    count = seen.numel() // (outer * inner)
    numbers = [count, *(seen.shape[axis] for axis in lines[1:]), outer, inner]
    for found in (seen.stride(), made):
        numbers += [*(found[axis] for axis in lines), found[across], found[5]]
    programs = triton.cdiv(count, several), triton.cdiv(outer, block_p), triton.cdiv(inner, block_q)
    return _move_lines, programs, (*numbers, several, block_p, block_q), {}


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


@triton.jit(do_not_specialize=("lines", "size_1", "size_2", "size_3", "outer", "inner"))
def _move_lines(
    x, out, lines, size_1, size_2, size_3, outer, inner, read_0, read_1, read_2, read_3, read_p, read_q,
    write_0, write_1, write_2, write_3, write_p, write_q,
    SEVERAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """A program moves a part of some lines of images, all tiles across: what strides take apart lies side by side."""
    line = tl.program_id(0) * SEVERAL + tl.arange(0, SEVERAL)
    p = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :, None]
    q = (tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, None, :]
    inside = (line < lines)[:, None, None] & (p < outer) & (q < inner)
    three, rest = (line % size_3).to(tl.int64), line // size_3
    two, rest = (rest % size_2).to(tl.int64), rest // size_2
    one, zero = (rest % size_1).to(tl.int64), (rest // size_1).to(tl.int64)
    p, q = p.to(tl.int64), q.to(tl.int64)
    read = (zero * read_0 + one * read_1 + two * read_2 + three * read_3)[:, None, None] + p * read_p + q * read_q
    write = (
        (zero * write_0 + one * write_1 + two * write_2 + three * write_3)[:, None, None] + p * write_p + q * write_q
    )
    tl.store(out + write, tl.load(x + read, mask=inside), mask=inside)
