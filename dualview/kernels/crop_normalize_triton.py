"""The Triton kernel of `dualview.kernels.crop_normalize` and its launch. Imports triton."""
# ruff: noqa: N803 - sizes have the names of the equations
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.kernels import dispatch
from dualview.kernels.tables import table

PIXELS = 1024
"""Pixels that a program handles, of all channels: 8 for each of its 128 threads."""


def make(
    images: Tensor,
    shapes: Sequence[tuple[int, ...]],
    scales: Tensor,
    grid: Sequence[int],
    local: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The live local and the live stride tiles, of these shapes; ``scales`` are (factor, offset) x channels."""
    local_tiles, stride_tiles = (dispatch.empty(*shape, like=images, dtype=dtype) for shape in shapes)
    if not local_tiles.numel() + stride_tiles.numel():
        return local_tiles, stride_tiles
    (batch, _, channels, h, w), (rows, cols) = shapes[0], grid
    index = table(_live_index, rows * cols, (tuple(local), tuple(stride)), like=images)
    block_v = min(triton.next_power_of_2(w), 128)
    block_u = min(triton.next_power_of_2(h), PIXELS // block_v)
    blocks = triton.cdiv(h, block_u)
    with torch.cuda.device_of(images):
        _make[(batch * rows * cols * blocks, triton.cdiv(w, block_v))](
            *(images, local_tiles, stride_tiles, scales, index),
            *(rows, cols, h, w, blocks, len(local), len(stride), *images.stride()),
            CHANNELS=channels,
            BLOCK_U=block_u,
            BLOCK_V=block_v,
        )
    return local_tiles, stride_tiles


def _live_index(device: torch.device, tiles: int, live: tuple[tuple[int, ...], ...]) -> Tensor:
    """(2, tiles): the index of every tile among the live ones of a perspective, or -1."""
    indices = [[chosen.index(tile) if tile in chosen else -1 for tile in range(tiles)] for chosen in live]
    return torch.tensor(indices, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=("rows", "cols", "blocks", "num_local", "num_stride"))
def _make(
    images, local_tiles, stride_tiles, scales, index,
    rows, cols, h, w, blocks, num_local, num_stride, stride_b, stride_c, stride_h, stride_w,
    CHANNELS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program reads a block of pixels of one local tile and writes it there, and to the stride tiles."""
    block = tl.program_id(0)
    rest, u_block = block // blocks, block % blocks
    b, tile = (rest // (rows * cols)).to(tl.int64), rest % (rows * cols)
    u = u_block * BLOCK_U + tl.arange(0, BLOCK_U)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    y, x = (tile // cols) * h + u, (tile % cols) * w + v  # local: position = tile * size + offset
    inside = (u < h)[:, None] & (v < w)[None, :]

    local_index = tl.load(index + tile)
    in_local = inside & (u < tl.where(local_index < 0, 0, h))[:, None]
    stride_tile = (y % rows)[:, None] * cols + (x % cols)[None, :]  # global: position = offset * tiles + tile
    stride_index = tl.load(index + rows * cols + stride_tile, mask=inside, other=-1)
    in_stride = stride_index >= 0

    read = images + b * stride_b + y.to(tl.int64)[:, None] * stride_h + x.to(tl.int64)[None, :] * stride_w
    local = local_tiles + (b * num_local + local_index) * CHANNELS * h * w + u[:, None] * w + v[None, :]
    stride = stride_tiles + (b * num_stride + stride_index) * CHANNELS * h * w
    stride += (y // rows)[:, None] * w + (x // cols)[None, :]
    for c in tl.static_range(CHANNELS):
        channel = tl.full((), c, tl.int64)
        pixels = tl.load(read + channel * stride_c, mask=inside, other=0).to(tl.float32)
        value = pixels * tl.load(scales + c) + tl.load(scales + CHANNELS + c)
        tl.store(local + channel * h * w, value.to(local_tiles.dtype.element_ty), mask=in_local)
        tl.store(stride + channel * h * w, value.to(stride_tiles.dtype.element_ty), mask=in_stride)
