"""Device code of `dualview.kernels.fuse_norm`. Imports triton, so it is imported only to launch it."""
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.kernels import dispatch

PROGRAMS = 1024
"""Most partial sums of the gradients of weight and bias; each is of at least four cells."""


def forward(tensors: Sequence[Tensor], r: int, s: int, eps: float, dtype: torch.dtype) -> Tensor:
    """Launch the forward kernel on contiguous tensors: the four maps, weight and bias."""
    batch, height, width, dim = tensors[0].shape
    out = dispatch.empty(batch, height // r, width // s, dim, like=tensors[0], dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(out):
            _forward[(out.numel() // dim,)](*tensors, out, width // s, **_constants(dim, r, s, eps))
    return out


def backward(tensors: Sequence[Tensor], r: int, s: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel on contiguous tensors: the gradient of the result, the four maps and weight."""
    grad, v_loc = tensors[:2]
    cells, width, dim = grad.shape[:3].numel(), grad.shape[2], grad.shape[3]
    programs = min(triton.cdiv(cells, 4), PROGRAMS)
    of_sum = dispatch.empty(*v_loc.shape, like=v_loc, dtype=dtype)
    partial = dispatch.empty(2, programs, dim, like=v_loc, dtype=torch.float32)
    if cells:
        with torch.cuda.device_of(v_loc):
            _backward[(programs,)](*tensors, of_sum, partial, cells, width, **_constants(dim, r, s, eps))
    return of_sum, partial.sum(1)  # in one order, always


def _constants(dim: int, r: int, s: int, eps: float) -> dict[str, Any]:
    block = triton.next_power_of_2(dim)
    return {"DIM": dim, "R": r, "S": s, "EPS": eps, "BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


@triton.jit
def _normalized(v_loc, v_glo, b_loc, b_glo, token, d, DIM: tl.constexpr, EPS: tl.constexpr):
    """A token before weight and bias, zeros beyond its width, and the reciprocal of its deviation."""
    inside, half = d < DIM, DIM // 2
    z = tl.load(v_glo + token * DIM + d, mask=inside, other=0).to(tl.float32)
    z += tl.load(v_loc + token * DIM + d, mask=inside, other=0).to(tl.float32)
    z += tl.load(b_loc + token * half + d, mask=d < half, other=0).to(tl.float32)
    z += tl.load(b_glo + token * half + d - half, mask=inside & (d >= half), other=0).to(tl.float32)
    centred = tl.where(inside, z - tl.sum(z) / DIM, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / DIM + EPS)
    return centred * scale, scale


@triton.jit
def _first_token(cell, w, R: tl.constexpr, S: tl.constexpr):
    """The first token of a cell of a map that is w cells wide. Its token (i, j) comes i * w * S + j later."""
    return (cell // w) * R * w * S + (cell % w) * S


@triton.jit(do_not_specialize=("w",))
def _forward(
    v_loc, v_glo, b_loc, b_glo, weight, bias, out, w,
    DIM: tl.constexpr, R: tl.constexpr, S: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes the token of one cell. Weight and bias are the same for all of its tokens, so they come last."""
    cell = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(R):
        for j in range(S):
            token = _first_token(cell, w, R, S) + i * w * S + j
            normalized, _ = _normalized(v_loc, v_glo, b_loc, b_glo, token, d, DIM, EPS)
            total += normalized
    mean = total / (R * S)
    scaled = mean * tl.load(weight + d, mask=d < DIM).to(tl.float32) + tl.load(bias + d, mask=d < DIM).to(tl.float32)
    tl.store(out + cell * DIM + d, scaled.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=("cells", "w"))
def _backward(
    grad, v_loc, v_glo, b_loc, b_glo, weight, of_sum, partial, cells, w,
    DIM: tl.constexpr, R: tl.constexpr, S: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes every so many-th cell, normalises its tokens anew, and adds up what weight and bias receive."""
    programs = tl.num_programs(0)
    cell = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < DIM
    scaling = tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    while cell < cells:
        of_cell = tl.load(grad + cell * DIM + d, mask=inside, other=0).to(tl.float32)
        of_bias += of_cell
        of_token = of_cell / (R * S)
        of_normalized = of_token * scaling
        mean = tl.sum(of_normalized) / DIM
        for i in range(R):
            for j in range(S):
                token = _first_token(cell, w, R, S) + i * w * S + j
                normalized, scale = _normalized(v_loc, v_glo, b_loc, b_glo, token, d, DIM, EPS)
                of_weight += of_token * normalized
                along = tl.sum(of_normalized * normalized) / DIM
                of_z = (of_normalized - mean - normalized * along) * scale
                tl.store(of_sum + token * DIM + d, of_z.to(of_sum.dtype.element_ty), mask=inside)
        cell += programs
    place = tl.program_id(0) * DIM + d
    tl.store(partial + place, of_weight, mask=inside)
    tl.store(partial + programs * DIM + place, of_bias, mask=inside)
