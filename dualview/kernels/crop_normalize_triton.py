"""Device code of `dualview.kernels.crop_normalize`. Imports triton, so it is imported only to launch it."""
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.kernels import dispatch

PIXELS = 1024
"""Pixels that a program handles, of all channels: 8 for each of its 128 threads."""


def make(
    images: Tensor,
    factors: Sequence[float],
    offsets: Sequence[float],
    rows: int,
    cols: int,
    local: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel."""
    batch, channels, height, width = images.shape
    h, w = height // rows, width // cols
    local_tiles = dispatch.empty(batch, len(local), channels, h, w, like=images, dtype=dtype)
    stride_tiles = dispatch.empty(batch, len(stride), channels, h, w, like=images, dtype=dtype)
    if not local_tiles.numel() + stride_tiles.numel():
        return local_tiles, stride_tiles
    scales, slots = _tables(
        tuple(factors), tuple(offsets), rows * cols, tuple(local), tuple(stride), str(images.device)
    )
    block_v = min(triton.next_power_of_2(w), 128)
    block_u = min(triton.next_power_of_2(h), PIXELS // block_v)
    blocks = triton.cdiv(h, block_u)
    with torch.cuda.device_of(images):
        _make[(batch * rows * cols * blocks, triton.cdiv(w, block_v))](
            images, local_tiles, stride_tiles, scales, slots,
            rows, cols, h, w, blocks, len(local), len(stride), *images.stride(),
            CHANNELS=channels, BLOCK_U=block_u, BLOCK_V=block_v,
        )  # fmt: skip
    return local_tiles, stride_tiles


@cache  # copied to the device once, and kept: a captured graph may hold the address
def _tables(
    factors: tuple[float, ...],
    offsets: tuple[float, ...],
    tiles: int,
    local: tuple[int, ...],
    stride: tuple[int, ...],
    device: str,
) -> tuple[Tensor, Tensor]:
    """(2, C) factors and offsets; (2, tiles) places of every tile among the live ones of either perspective, or -1."""
    slots = torch.full((2, tiles), -1, dtype=torch.int32)
    for of_perspective, live in zip(slots, (local, stride), strict=True):
        of_perspective[list(live)] = torch.arange(len(live), dtype=torch.int32)
    return torch.tensor((factors, offsets), dtype=torch.float32).to(device), slots.to(device)


@triton.jit(do_not_specialize=("rows", "cols", "blocks", "num_local", "num_stride"))
def _make(
    images, local_tiles, stride_tiles, scales, slots,
    rows, cols, h, w, blocks, num_local, num_stride, of_image, of_channel, of_row, of_col,
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

    local_slot = tl.load(slots + tile)
    in_local = inside & (u < tl.where(local_slot < 0, 0, h))[:, None]
    stride_tile = (y % rows)[:, None] * cols + (x % cols)[None, :]  # global: position = offset * tiles + tile
    stride_slot = tl.load(slots + rows * cols + stride_tile, mask=inside, other=-1)
    in_stride = stride_slot >= 0

    read = images + b * of_image + y.to(tl.int64)[:, None] * of_row + x.to(tl.int64)[None, :] * of_col
    local = local_tiles + (b * num_local + local_slot) * CHANNELS * h * w + u[:, None] * w + v[None, :]
    stride = stride_tiles + (b * num_stride + stride_slot) * CHANNELS * h * w
    stride += (y // rows)[:, None] * w + (x // cols)[None, :]
    for c in tl.static_range(CHANNELS):
        channel = tl.full((), c, tl.int64)
        pixels = tl.load(read + channel * of_channel, mask=inside, other=0).to(tl.float32)
        value = pixels * tl.load(scales + c) + tl.load(scales + CHANNELS + c)
        tl.store(local + channel * h * w, value.to(local_tiles.dtype.element_ty), mask=in_local)
        tl.store(stride + channel * h * w, value.to(stride_tiles.dtype.element_ty), mask=in_stride)
