"""The Triton kernels of `dualview.kernels.tile_attention`, and their launches. Imports triton.

Flash attention of each image, tile and head. Every program takes a block of queries or of keys of one head, holds its
whole width, and sums in float32. Scores are not stored; of every query `lse` is, the logarithm (base 2) of its
softmax's denominator. Programs own what they write, so every sum has one order.

Backward, for a query i and a key j with the weight P, and g the gradient of the result: dP = g_i . v_j,
dS = P (dP - delta_i) with delta_i = g_i . out_i, dq_i = sum_j scale dS k_j, dk_j = sum_i scale dS q_i,
dv_j = sum_i P g_i.
"""
# ruff: noqa: N803 - sizes have the names of the equations
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.kernels import dispatch
from dualview.kernels.chunked_attention import Problem

# --- Launches --------------------------------------------------------------------------------------------------------


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """The result (B, T, G, H, E), and ``lse`` (B, T, G, H)."""
    q = problem.q
    out, lse = dispatch.empty(*q.shape, like=q), dispatch.empty(*q.shape[:-1], like=q, dtype=torch.float32)
    _launch(_attend, problem, (out, lse), q.shape[2])
    return out, lse


def backward(problem: Problem, out: Tensor, lse: Tensor, grad: Tensor, of_keys: bool) -> list[Tensor]:
    """The gradient of q and, if asked for, those of k and v."""
    grad = _columns_together(grad)
    delta = (grad.float() * out).sum(-1)
    given = (lse, delta.contiguous(), grad, *grad.stride()[:4])
    found = [dispatch.empty(*x.shape, like=x) for x in ((problem.q, problem.k, problem.k) if of_keys else (problem.q,))]
    _launch(_query_gradients, problem, (*given, found[0]), problem.q.shape[2])
    if of_keys:
        _launch(_key_gradients, problem, (*given, *found[1:]), problem.k.shape[2])
    return found


def _columns_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: Any, problem: Problem, given: tuple[Any, ...], owned: int) -> None:
    """A program for every block of the ``owned`` queries or keys of every head, tile and image.

    Blocks are of 64 queries and 64 keys: nine of them make a tile of 24 x 24 tokens. Where the sums that a program
    holds, two for the gradients of keys, have more than 256 columns, blocks are of 32, so that registers suffice.
    Products of float32 are made without matrix units, of blocks of 32 and over 32 columns at a time, for every thread
    holds its rows of the operands. The interpreter takes those blocks, too.
    """
    batch, tiles, groups, heads, width = problem.q.shape
    small, whole = problem.q.element_size() == 4 or dispatch.interpreting(), triton.next_power_of_2(max(width, 16))
    sums = whole * (2 if kernel is _key_gradients else 1)
    block = 32 if small or sums > 256 else 64
    programs = batch * tiles * heads * triton.cdiv(owned, block)
    if programs == 0:
        return
    sizes: tuple[Any, ...] = tiles, groups, problem.k.shape[2], heads
    if dispatch.interpreting():  # of which the one of triton 3.6 cannot count up to a tensor, with numpy 2.4
        sizes = tuple(tl.constexpr(size) for size in sizes)
    read = [_columns_together(x) for x in problem[:3]]
    strides = [stride for x in read for stride in x.stride()[:4]]
    mask = None if problem.key_mask is None else problem.key_mask.contiguous()
    of_mask = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    with torch.cuda.device_of(problem.q):
        kernel[(programs,)](
            *(*read, problem.q if mask is None else mask.view(torch.uint8), *given),
            *(*strides, of_mask, *sizes, problem.scale),
            E=width,
            MASKED=mask is not None,
            UPCAST=dispatch.interpreting(),
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            BLOCK=block,
            STEP=32 if small else whole,
            WHOLE=whole,
            num_warps=4 if sums <= 128 else 8,
            num_stages=3 if width <= 128 and not small else 2,
        )


# --- On the device ---------------------------------------------------------------------------------------------------

LOG2_E = tl.constexpr(math.log2(math.e))
# Sizes that vary from image to image must not make a new kernel each.
SIZES = ("stride_mask", "T", "G", "K", "H")


@triton.jit
def _block(count, H, T, BLOCK: tl.constexpr):
    """The first of its queries or keys, head, tile and image of a program; those of a tile side by side."""
    blocks = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    rest = (program // blocks).to(tl.int64)
    return program % blocks * BLOCK, rest % H, rest // H % T, rest // H // T


@triton.jit
def _allowed(mask, tile, key, K, MASKED: tl.constexpr):
    """Which of these keys of a tile there are and may be attended to."""
    allowed = key < K
    if MASKED:
        allowed = allowed & (tl.load(mask + tile + key, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def _take(x, rows, ok, start, E: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Columns from ``start`` on of the rows at these offsets; zeros where there is nothing."""
    cols = start + tl.arange(0, BLOCK)
    found = tl.load(x + rows[:, None] + cols[None, :], mask=ok[:, None] & (cols < E)[None, :], other=0.0)
    return found.to(tl.float32 if UPCAST else x.dtype.element_ty)


@triton.jit
def _put(x, rows, ok, values, E: tl.constexpr, WHOLE: tl.constexpr):
    """Write whole rows."""
    cols = tl.arange(0, WHOLE)
    there = ok[:, None] & (cols < E)[None, :]
    tl.store(x + rows[:, None] * E + cols[None, :], values.to(x.dtype.element_ty), mask=there)


@triton.jit
def _rounded(values, like, UPCAST: tl.constexpr):
    """``values`` rounded to the type of ``like``, in which a product takes them; with UPCAST float32 again."""
    return values.to(like.dtype.element_ty).to(tl.float32 if UPCAST else like.dtype.element_ty)


@triton.jit
def _products(
    a, a_rows, a_ok, b, b_rows, b_ok,
    E: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of all rows of ``a`` with all rows of ``b``."""
    total = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for start in range(0, E, STEP):
        left = _take(a, a_rows, a_ok, start, E, STEP, UPCAST)
        right = _take(b, b_rows, b_ok, start, E, STEP, UPCAST)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=SIZES)
def _attend(
    q, k, v, mask, out, lse,
    stride_qb, stride_qt, stride_qg, stride_qh, stride_kb, stride_kt, stride_kn, stride_kh,
    stride_vb, stride_vt, stride_vn, stride_vh, stride_mask, T, G, K, H, scale,
    E: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One pass over the keys, with the softmax's maximum so far."""
    start, h, t, b = _block(G, H, T, BLOCK)
    row = start + tl.arange(0, BLOCK)
    ok = row < G
    q_rows = b * stride_qb + t * stride_qt + h * stride_qh + row.to(tl.int64) * stride_qg

    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    collected = tl.zeros((BLOCK, WHOLE), tl.float32)
    for first in range(0, K, BLOCK):
        key = first + tl.arange(0, BLOCK)
        allowed = _allowed(mask, b * stride_mask + t * K, key, K, MASKED)
        k_rows = b * stride_kb + t * stride_kt + h * stride_kh + key.to(tl.int64) * stride_kn
        v_rows = b * stride_vb + t * stride_vt + h * stride_vh + key.to(tl.int64) * stride_vn
        scores = _products(q, q_rows, ok, k, k_rows, allowed, E, STEP, UPCAST, PRECISION)
        scores = tl.where(allowed[None, :], scores * (scale * LOG2_E), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: -inf less -inf would be NaN
        weights = tl.exp2(scores - origin[:, None])
        fade = tl.exp2(highest - origin)
        total = total * fade + tl.sum(weights, 1)
        values = _take(v, v_rows, allowed, 0, E, WHOLE, UPCAST)
        weights = _rounded(weights, v, UPCAST)
        collected = tl.dot(weights, values, collected * fade[:, None], input_precision=PRECISION)
        highest = higher

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    index = ((b * T + t) * G + row) * H + h
    tl.store(lse + index, tl.where(empty, float("inf"), highest + tl.log2(total)), mask=ok)
    _put(out, index, ok, collected / total[:, None], E, WHOLE)


@triton.jit(do_not_specialize=SIZES)
def _query_gradients(
    q, k, v, mask, lse, delta, grad, stride_gb, stride_gt, stride_gg, stride_gh, dq,
    stride_qb, stride_qt, stride_qg, stride_qh, stride_kb, stride_kt, stride_kn, stride_kh,
    stride_vb, stride_vt, stride_vn, stride_vh, stride_mask, T, G, K, H, scale,
    E: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``dq`` of the queries of a block, from all keys of their tile."""
    start, h, t, b = _block(G, H, T, BLOCK)
    row = start + tl.arange(0, BLOCK)
    ok = row < G
    q_rows = b * stride_qb + t * stride_qt + h * stride_qh + row.to(tl.int64) * stride_qg
    g_rows = b * stride_gb + t * stride_gt + h * stride_gh + row.to(tl.int64) * stride_gg
    index = ((b * T + t) * G + row) * H + h
    denominator = tl.load(lse + index, mask=ok, other=float("inf"))
    mean = tl.load(delta + index, mask=ok, other=0.0)

    total = tl.zeros((BLOCK, WHOLE), tl.float32)
    for first in range(0, K, BLOCK):
        key = first + tl.arange(0, BLOCK)
        allowed = _allowed(mask, b * stride_mask + t * K, key, K, MASKED)
        k_rows = b * stride_kb + t * stride_kt + h * stride_kh + key.to(tl.int64) * stride_kn
        v_rows = b * stride_vb + t * stride_vt + h * stride_vh + key.to(tl.int64) * stride_vn
        scores = _products(q, q_rows, ok, k, k_rows, allowed, E, STEP, UPCAST, PRECISION)
        weights = tl.where(allowed[None, :], tl.exp2(scores * (scale * LOG2_E) - denominator[:, None]), 0.0)
        slope = _products(grad, g_rows, ok, v, v_rows, allowed, E, STEP, UPCAST, PRECISION)
        slope = _rounded(weights * (slope - mean[:, None]), k, UPCAST)
        total = tl.dot(slope, _take(k, k_rows, allowed, 0, E, WHOLE, UPCAST), total, input_precision=PRECISION)
    _put(dq, index, ok, total * scale, E, WHOLE)


@triton.jit(do_not_specialize=SIZES)
def _key_gradients(
    q, k, v, mask, lse, delta, grad, stride_gb, stride_gt, stride_gg, stride_gh, dk, dv,
    stride_qb, stride_qt, stride_qg, stride_qh, stride_kb, stride_kt, stride_kn, stride_kh,
    stride_vb, stride_vt, stride_vn, stride_vh, stride_mask, T, G, K, H, scale,
    E: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` of the keys of a block, from all queries of their tile."""
    start, h, t, b = _block(K, H, T, BLOCK)
    key = start + tl.arange(0, BLOCK)
    allowed = _allowed(mask, b * stride_mask + t * K, key, K, MASKED)
    k_rows = b * stride_kb + t * stride_kt + h * stride_kh + key.to(tl.int64) * stride_kn
    v_rows = b * stride_vb + t * stride_vt + h * stride_vh + key.to(tl.int64) * stride_vn

    total_k = tl.zeros((BLOCK, WHOLE), tl.float32)
    total_v = tl.zeros((BLOCK, WHOLE), tl.float32)
    for first in range(0, G, BLOCK):
        row = first + tl.arange(0, BLOCK)
        ok = row < G
        q_rows = b * stride_qb + t * stride_qt + h * stride_qh + row.to(tl.int64) * stride_qg
        g_rows = b * stride_gb + t * stride_gt + h * stride_gh + row.to(tl.int64) * stride_gg
        index = ((b * T + t) * G + row) * H + h
        denominator = tl.load(lse + index, mask=ok, other=float("inf"))
        mean = tl.load(delta + index, mask=ok, other=0.0)
        scores = _products(k, k_rows, allowed, q, q_rows, ok, E, STEP, UPCAST, PRECISION)
        weights = tl.where(allowed[:, None], tl.exp2(scores * (scale * LOG2_E) - denominator[None, :]), 0.0)
        slopes = _take(grad, g_rows, ok, 0, E, WHOLE, UPCAST)
        total_v = tl.dot(_rounded(weights, grad, UPCAST), slopes, total_v, input_precision=PRECISION)
        slope = _products(v, v_rows, allowed, grad, g_rows, ok, E, STEP, UPCAST, PRECISION)
        slope = _rounded(weights * (slope - mean[None, :]), q, UPCAST)
        total_k = tl.dot(slope, _take(q, q_rows, ok, 0, E, WHOLE, UPCAST), total_k, input_precision=PRECISION)
    index = ((b * T + t) * K + key) * H + h
    _put(dk, index, key < K, total_k * scale, E, WHOLE)
    _put(dv, index, key < K, total_v, E, WHOLE)
