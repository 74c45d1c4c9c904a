"""The Triton kernels of `dualview.kernels.tile_attention`, and their launches. Imports triton.

Every program takes one image, one tile, and a block of rows or of keys, and sums in float32. A row is a query with a
head: where all heads ask the same keys, a program has rows of all heads, and reads a block of keys once for all of
them. Scores are not stored; of every row `lse` is, the logarithm (base 2) of its softmax's denominator. Programs own
what they write (rows of the result and of dq, keys of dk and dv), so every sum has one order.

Products of float32 over the width of a head are summed in pieces of STEP columns, and what the sum of the pieces loses
by rounding is carried along (Kahan). So the error is that of STEP + 2 additions, whatever the width.

Backward, for a row i and a key j with the weight P, and g the gradient of the row of the result that i goes to:
dP = g_i . v_j, dS = P (dP - delta_i) with delta_i = sum_j P dP, dq_i = sum_j scale dS k_j, dk_j = sum_i scale dS q_i,
dv_j = sum_i P g_i, all divided by the number of queries that are averaged.

Heads of up to 256 columns are held whole. Of wider ones 64 rows do not fit: 64 x 1024 sums in float32 are 256 KiB, all
registers of a multiprocessor. Two ways out, in operations (multiplications and additions) and in bytes of half
precision that are read, per pair of a query and a key at E = V = 1024, where 2 E + 2 V = 4096 operations are due:

* 32 rows with all columns: 4096 operations; 2 E / 32 + 2 E / 64 + 2 V / 32 = 160 bytes for keys, for queries anew with
  every block of 64 keys, and for values;
* 64 rows with 512 columns, and the scores worked out once per chunk: 2 * 2 E + 2 V = 6144 operations;
  2 * (2 E / 64 + 2 E / 64 + 2 * 512 / 64) = 160 bytes, but the matrix units are fully used by 64 rows only.

An H200 does 4096 operations a clock per multiprocessor and reads at most 64 bytes from its second cache: both wait for
memory, for 2.5 clocks a pair. Which is faster is tried on the GPU. Backward likewise, for dq and dk 6144 operations and
256 bytes or 10240 and 288, for dv 4096 and 160 or 6144 and 160; delta, with averages only, 4096 and 192 or 128.

With averages, weights of several queries are added before they meet the values, which needs `lse` first: a pass over
the keys for it, 2 E, then one of 2 E + 2 V operations; 2 E + 2 V / M where the M queries of a row ask the same keys.
"""
# ruff: noqa: N803 - sizes have the names of the equations
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.kernels import dispatch
from dualview.kernels.chunked_attention import Problem

BOTH_FIT = 128
"""Widest head for which the sums of dk and of dv are held together."""
WIDE = 256
"""Widest head that is held whole."""
LOG2_E = math.log2(math.e)


# --- Launches --------------------------------------------------------------------------------------------------------


def forward(problem: Problem, keep_lse: bool) -> tuple[Tensor, Tensor]:
    """The result (B, T or 1, G, H, V), and ``lse`` (B, T, M, G, H) if it is kept, else an empty tensor."""
    problem = _arranged(problem)
    batch, tiles, members, groups, heads, _ = problem.q.shape
    columns, rows = problem.values.shape[-1], tiles * members
    results, averaged = 1 if problem.over_tiles else tiles, problem.over_tiles or members > 1
    out = dispatch.empty(batch, results, groups, heads, columns, like=problem.q)
    lse_shape = (batch, tiles, members, groups, heads) if keep_lse or averaged else (0,)
    lse = dispatch.empty(*lse_shape, like=out, dtype=torch.float32)
    if out.numel() == 0:  # and nothing to try blocks on
        pass
    elif averaged:
        _launch(_attend, problem, (lse, out), "BLOCK_R", rows, 1, VALUES=False, KEEP=True)
        _launch(_attend_averaged, problem, (lse, out), "BLOCK_R", results, columns)
    else:
        _launch(_attend, problem, (lse, out), "BLOCK_R", rows, columns, VALUES=True, KEEP=keep_lse)
    return out, lse if keep_lse else dispatch.empty(0, like=lse)


def backward(problem: Problem, grad: Tensor, lse: Tensor, out: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    """Those of the gradients of q, k and v that are needed.

    Without averages ``out`` gives delta, with the rounding of its type; with averages a pass over the keys does.
    """
    problem, grad = _arranged(problem), _columns_together(grad)
    q, k, v, (need_q, need_k, need_v) = problem.q, problem.k, problem.values, needed
    dq, dk, dv = (dispatch.empty(*x.shape, like=x) if need else x for x, need in zip((q, k, v), needed, strict=True))
    found = [x for x, need in zip((dq, dk, dv), needed, strict=True) if need]
    nothing = grad.numel() == 0 or problem.keys == 0
    if nothing or problem.key_index is not None:  # tokens that are no key keep their zeros
        found = [x.zero_() for x in found]
    if nothing:
        return found
    rows, strides, delta = q.shape[1] * q.shape[2], grad.stride()[:4], dispatch.empty(*lse.shape, like=lse)
    if out is not None:
        delta = grad.to(torch.float32, copy=True).mul_(out).sum(-1).unsqueeze(2).contiguous()
    elif need_q or need_k:
        _launch(_query_gradients, problem, (lse, grad, delta, dq, *strides), "BLOCK_R", rows, 1, DELTA=True)
    if need_q:
        _launch(_query_gradients, problem, (lse, grad, delta, dq, *strides), "BLOCK_R", rows, q.shape[-1], DELTA=False)
    both_fit = max(k.shape[-1], v.shape[-1]) <= BOTH_FIT
    for of_k, of_v in [(need_k, need_v)] if both_fit else [(need_k, False), (False, need_v)]:
        columns = max(of_k * k.shape[-1], of_v * v.shape[-1])
        if columns:
            given = (lse, grad, delta, dk, dv, *strides)
            _launch(_key_gradients, problem, given, "BLOCK_K", q.shape[1], columns, DK=of_k, DV=of_v)
    return found


def _columns_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _arranged(problem: Problem) -> Problem:
    """With what the kernels rely on: columns side by side, table and mask contiguous."""
    q, k, v = (_columns_together(x) for x in (problem.q, problem.k, problem.values))
    key_mask, key_index = (None if x is None else x.contiguous() for x in (problem.key_mask, problem.key_index))
    return problem._replace(q=q, k=k, v=v, key_mask=key_mask, key_index=key_index)


def _launch(
    kernel: Any, problem: Problem, given: Sequence[Any], own: str, times: int, columns: int, **flags: bool
) -> None:
    """A program for every chunk of columns, block, group of heads and image, so many times.

    Args:
        kernel: What is launched.
        problem: What every kernel reads.
        given: What this one is given beside.
        own: "BLOCK_R" or "BLOCK_K": whether a program owns rows or keys.
        times: Sets of rows or of keys in an image.
        columns: Columns of what is written.
        **flags: Constants of the kernel.
    """
    (q, k, _, mask, index, scale, over_tiles), v = problem, problem.values
    batch, tiles, members, groups, heads, width = q.shape
    together = heads if k.shape[-2] == 1 else 1  # heads of a program: all where they ask the same keys
    owned = groups * together if own == "BLOCK_R" else problem.keys

    def programs(config: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(columns, config["CHUNK"]) * triton.cdiv(owned, config[own])
        return (blocks * (heads // together) * times * batch,)

    tokens = k.shape[1] if index is not None else tiles * problem.keys
    sizes: tuple[Any, ...] = tiles, members, groups, problem.keys, heads, tokens, tiles if over_tiles else 1
    if dispatch.interpreting():  # of which the one of triton 3.6 cannot count up to a tensor, with numpy 2.4
        sizes = tuple(tl.constexpr(size) for size in sizes)
    of_keys = [(x.stride(0), *(x.stride()[1:3] if index is None else (0, x.stride(1))), x.stride(-2)) for x in (k, v)]
    of_mask = mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0
    purpose = (together, columns == 1, *flags.items())
    with torch.cuda.device_of(q):
        tuned(kernel, max(width, v.shape[-1]), q.element_size(), own, *purpose)[programs](
            *(q, k, v, q if index is None else index, q if mask is None else mask.view(torch.uint8), *given),
            *(*q.stride()[:5], *of_keys[0], *of_keys[1], of_mask, *sizes, scale * LOG2_E),
            E=width,
            V=v.shape[-1],
            HEADS=together,
            INDEXED=index is not None,
            MASKED=mask is not None,
            UPCAST=dispatch.interpreting(),
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            COLUMNS=columns,
            **flags,
        )


@cache
def tuned(kernel: Any, width: int, size: int, own: str, *purpose: object) -> Any:
    """The kernel for heads of a width and numbers of ``size`` bytes, with the block sizes to try at its first call.

    ``purpose`` is whatever else makes a program of its own: each finds its own block sizes.

    What a block needs of the 227 KiB of shared memory, at the widest; buffers count twice while the next is loaded:

    * to 128 columns, half precision: own rows of two operands, 2 * 128 * 128 * 2 bytes = 64 KiB; two others,
      2 * 2 * 64 * 128 * 2 = 64 KiB
    * to 256: 2 * 64 * 256 * 2 = 64 KiB and 2 * 2 * 64 * 256 * 2 = 128 KiB
    * wider: values, 64 * 1024 * 2 = 128 KiB or 64 * 512 * 2 = 64 KiB; pieces of two operands for the scores,
      (64 + 64) * 64 * 2 = 16 KiB, twice before the values come
    * float32: 32 * 512 * 4 = 64 KiB and 2 * 32 * 32 * 4 = 8 KiB

    Compiled for an H200, by Triton 3.6 as by 3.9, no kernel needs more than 193 KiB.
    """
    other = "BLOCK_K" if own == "BLOCK_R" else "BLOCK_R"
    whole = triton.next_power_of_2(max(width, 16))

    def config(rows: int, others: int, step: int, chunk: int, warps: int, stages: int) -> Any:
        sizes = {own: rows, other: others, "STEP": step, "CHUNK": min(chunk, whole)}
        return triton.Config(sizes, num_warps=warps, num_stages=stages)

    if dispatch.interpreting():  # it cannot measure, and so takes one
        configs = [config(32, 32, 32, 64, 4, 1) if width <= WIDE else config(32, 32, 64, 512, 4, 1)]
    elif size == 4:
        configs = [config(32, 32, 32, 512, 4 if width <= BOTH_FIT else 8, 2)]
    elif width <= BOTH_FIT:
        configs = [config(64, 64, whole, whole, 4, 3), config(128, 64, whole, whole, 8, 3)]
    elif width <= WIDE:
        configs = [config(64, 64, whole, whole, 8, 2), config(64, 32, whole, whole, 4, 2)]
    else:
        configs = [config(32, 64, 64, 1024, 8, 3), config(64, 64, 64, 512, 8, 3)]
    return triton.autotune(configs, key=[])(kernel)


# --- On the device ---------------------------------------------------------------------------------------------------

LN_2 = tl.constexpr(math.log(2))
# Sizes that vary from image to image must not make a new kernel each. A row of the result is the mean over S tiles.
SIZES = ("stride_mask", "T", "M", "G", "K", "H", "N", "S")


@triton.jit
def _place(chunks, blocks, groups, times):
    """Which chunk of columns, block, group of heads, tile and image a program is for; those of a tile side by side."""
    rest = tl.program_id(0)
    chunk, rest = rest % chunks, rest // chunks
    block, rest = rest % blocks, rest // blocks
    group, rest = rest % groups, rest // groups
    return chunk, block, group.to(tl.int64), (rest % times).to(tl.int64), (rest // times).to(tl.int64)


@triton.jit
def _rows(start, group, G, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Query and head of every row of a block, and whether there is such a row."""
    row = start + tl.arange(0, BLOCK_R)
    return (row // HEADS).to(tl.int64), group + row % HEADS, row < G * HEADS


@triton.jit
def _keys(index, mask, stride_mask, b, t, start, K, INDEXED: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tokens that are the keys of a block of tile t, and whether they may be attended to."""
    key = start + tl.arange(0, BLOCK_K)
    allowed = key < K
    token = key.to(tl.int64)
    if INDEXED:
        token = tl.load(index + t * K + key, mask=allowed, other=0).to(tl.int64)
    if MASKED:
        allowed = allowed & (tl.load(mask + b * stride_mask + t * K + key, mask=allowed, other=0) != 0)
    return token, allowed


@triton.jit
def _take(x, rows, ok, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Columns from ``start`` on of the rows at these offsets; zeros where there is nothing."""
    cols = start + tl.arange(0, BLOCK)
    there = ok[:, None]
    if WIDTH % BLOCK != 0:
        there = there & (cols < WIDTH)[None, :]
    found = tl.load(x + rows[:, None] + cols[None, :], mask=there, other=0.0)
    return found.to(tl.float32 if UPCAST else x.dtype.element_ty)


@triton.jit
def _put(x, rows, ok, start, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write columns from ``start`` on."""
    cols = start + tl.arange(0, BLOCK)
    there = ok[:, None] & (cols < WIDTH)[None, :]
    tl.store(x + rows[:, None] + cols[None, :], values.to(x.dtype.element_ty), mask=there)


@triton.jit
def _rounded(values, like, UPCAST: tl.constexpr):
    """``values`` in the type of what ``like`` points to, as a product needs them; with UPCAST rounded to it only."""
    return values.to(like.dtype.element_ty).to(tl.float32 if UPCAST else like.dtype.element_ty)


@triton.jit
def _products(
    a, a_rows, a_ok, b, b_rows, b_ok,
    WIDTH: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of all rows of ``a`` with all rows of ``b``."""
    total = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    excess = total
    for start in range(0, WIDTH, STEP):
        left = _take(a, a_rows, a_ok, start, WIDTH, STEP, UPCAST)
        right = tl.trans(_take(b, b_rows, b_ok, start, WIDTH, STEP, UPCAST))
        if a.dtype.element_ty == tl.float32 and WIDTH > STEP:
            piece = tl.dot(left, right, input_precision=PRECISION) - excess
            higher = total + piece
            excess = (higher - total) - piece  # what rounding has added
            total = higher
        else:
            total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=SIZES)
def _attend(
    q, k, v, index, mask, lse, out,
    stride_qb, stride_qt, stride_qm, stride_qg, stride_qh, stride_kb, stride_kt, stride_kn, stride_kh,
    stride_vb, stride_vt, stride_vn, stride_vh, stride_mask, T, M, G, K, H, N, S, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, INDEXED: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One pass over the keys, with the softmax's maximum so far: ``out`` (VALUES, where M = S = 1), ``lse`` (KEEP)."""
    chunk, block, group, tm, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(G * HEADS, BLOCK_R), H // HEADS, T * M)
    t, m = tm // M, tm % M
    g, h, ok = _rows(block * BLOCK_R, group, G, HEADS, BLOCK_R)
    row = ((b * T * M + tm) * G + g) * H + h
    q_rows = b * stride_qb + t * stride_qt + m * stride_qm + g * stride_qg + h * stride_qh

    highest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    collected = tl.zeros((BLOCK_R, CHUNK), tl.float32)
    for start in range(0, K, BLOCK_K):
        n, allowed = _keys(index, mask, stride_mask, b, t, start, K, INDEXED, MASKED, BLOCK_K)
        k_rows = b * stride_kb + t * stride_kt + group * stride_kh + n * stride_kn
        scores = _products(q, q_rows, ok, k, k_rows, allowed, E, STEP, UPCAST, PRECISION)
        scores = tl.where(allowed[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: -inf less -inf would be NaN
        weights = tl.exp2(scores - origin[:, None])
        fade = tl.exp2(highest - origin)
        total = total * fade + tl.sum(weights, 1)
        if VALUES:
            v_rows = b * stride_vb + t * stride_vt + group * stride_vh + n * stride_vn
            values = _take(v, v_rows, allowed, chunk * CHUNK, V, CHUNK, UPCAST)
            weights = _rounded(weights, v, UPCAST)
            collected = tl.dot(weights, values, collected * fade[:, None], input_precision=PRECISION)
        highest = higher

    empty = total == 0.0
    if KEEP:  # noqa: SIM102 - decided when the kernel is compiled, and the next line when it runs
        if chunk == 0:
            tl.store(lse + row, tl.where(empty, float("inf"), highest + tl.log2(total)), mask=ok)
    if VALUES:
        result = tl.where(empty[:, None], 0.0, collected / total[:, None])
        _put(out, row * V, ok, chunk * CHUNK, result, V, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def _attend_averaged(
    q, k, v, index, mask, lse, out,
    stride_qb, stride_qt, stride_qm, stride_qg, stride_qh, stride_kb, stride_kt, stride_kn, stride_kh,
    stride_vb, stride_vt, stride_vn, stride_vh, stride_mask, T, M, G, K, H, N, S, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, INDEXED: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``out`` from ``lse``: the weights of all queries of a row that ask the same keys are added before the values."""
    chunk, block, group, p, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(G * HEADS, BLOCK_R), H // HEADS, T // S)
    g, h, ok = _rows(block * BLOCK_R, group, G, HEADS, BLOCK_R)

    collected = tl.zeros((BLOCK_R, CHUNK), tl.float32)
    for turn in range(S):
        t = p * S + turn
        for start in range(0, K, BLOCK_K):
            n, allowed = _keys(index, mask, stride_mask, b, t, start, K, INDEXED, MASKED, BLOCK_K)
            k_rows = b * stride_kb + t * stride_kt + group * stride_kh + n * stride_kn
            v_rows = b * stride_vb + t * stride_vt + group * stride_vh + n * stride_vn
            weights = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
            for m in range(M):
                q_rows = b * stride_qb + t * stride_qt + m * stride_qm + g * stride_qg + h * stride_qh
                row = (((b * T + t) * M + m) * G + g) * H + h
                denominator = tl.load(lse + row, mask=ok, other=float("inf"))
                scores = _products(q, q_rows, ok, k, k_rows, allowed, E, STEP, UPCAST, PRECISION)
                weights += tl.where(allowed[None, :], tl.exp2(scores * scale - denominator[:, None]), 0.0)
            values = _take(v, v_rows, allowed, chunk * CHUNK, V, CHUNK, UPCAST)
            collected = tl.dot(_rounded(weights, v, UPCAST), values, collected, input_precision=PRECISION)
    _put(out, (((b * (T // S) + p) * G + g) * H + h) * V, ok, chunk * CHUNK, collected / (M * S), V, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def _query_gradients(
    q, k, v, index, mask, lse, grad, delta, dq, stride_gb, stride_gt, stride_gg, stride_gh,
    stride_qb, stride_qt, stride_qm, stride_qg, stride_qh, stride_kb, stride_kt, stride_kn, stride_kh,
    stride_vb, stride_vt, stride_vn, stride_vh, stride_mask, T, M, G, K, H, N, S, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, INDEXED: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, DELTA: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """With DELTA the pass over the keys that finds ``delta``, else a chunk of ``dq``."""
    chunk, block, group, tm, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(G * HEADS, BLOCK_R), H // HEADS, T * M)
    t, m = tm // M, tm % M
    g, h, ok = _rows(block * BLOCK_R, group, G, HEADS, BLOCK_R)
    row = ((b * T * M + tm) * G + g) * H + h
    q_rows = b * stride_qb + t * stride_qt + m * stride_qm + g * stride_qg + h * stride_qh
    g_rows = b * stride_gb + t // S * stride_gt + g * stride_gg + h * stride_gh
    denominator = tl.load(lse + row, mask=ok, other=float("inf"))

    mean = tl.load(delta + row, mask=ok, other=0.0)  # not there yet with DELTA, and not used
    total = tl.zeros((BLOCK_R,) if DELTA else (BLOCK_R, CHUNK), tl.float32)
    for start in range(0, K, BLOCK_K):
        n, allowed = _keys(index, mask, stride_mask, b, t, start, K, INDEXED, MASKED, BLOCK_K)
        k_rows = b * stride_kb + t * stride_kt + group * stride_kh + n * stride_kn
        v_rows = b * stride_vb + t * stride_vt + group * stride_vh + n * stride_vn
        scores = _products(q, q_rows, ok, k, k_rows, allowed, E, STEP, UPCAST, PRECISION)
        weights = tl.where(allowed[None, :], tl.exp2(scores * scale - denominator[:, None]), 0.0)
        slope = _products(grad, g_rows, ok, v, v_rows, allowed, V, STEP, UPCAST, PRECISION)
        if DELTA:
            total += tl.sum(weights * slope, 1)
        else:
            keys = _take(k, k_rows, allowed, chunk * CHUNK, E, CHUNK, UPCAST)
            slope = _rounded(weights * (slope - mean[:, None]), k, UPCAST)
            total = tl.dot(slope, keys, total, input_precision=PRECISION)
    if DELTA:
        tl.store(delta + row, total, mask=ok)
    else:
        _put(dq, row * E, ok, chunk * CHUNK, total * (scale * LN_2 / (M * S)), E, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def _key_gradients(
    q, k, v, index, mask, lse, grad, delta, dk, dv, stride_gb, stride_gt, stride_gg, stride_gh,
    stride_qb, stride_qt, stride_qm, stride_qg, stride_qh, stride_kb, stride_kt, stride_kn, stride_kh,
    stride_vb, stride_vt, stride_vn, stride_vh, stride_mask, T, M, G, K, H, N, S, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, INDEXED: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of ``dk`` (DK) and of ``dv`` (DV) of the keys of a tile, from all queries that ask it."""
    chunk, block, group, t, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(K, BLOCK_K), H // HEADS, T)
    n, allowed = _keys(index, mask, stride_mask, b, t, block * BLOCK_K, K, INDEXED, MASKED, BLOCK_K)
    k_rows = b * stride_kb + t * stride_kt + group * stride_kh + n * stride_kn
    v_rows = b * stride_vb + t * stride_vt + group * stride_vh + n * stride_vn

    total_k = tl.zeros((BLOCK_K, CHUNK), tl.float32)
    total_v = tl.zeros((BLOCK_K, CHUNK), tl.float32)
    for m in range(M):
        for start in range(0, G * HEADS, BLOCK_R):
            g, h, ok = _rows(start, group, G, HEADS, BLOCK_R)
            row = (((b * T + t) * M + m) * G + g) * H + h
            q_rows = b * stride_qb + t * stride_qt + m * stride_qm + g * stride_qg + h * stride_qh
            g_rows = b * stride_gb + t // S * stride_gt + g * stride_gg + h * stride_gh
            denominator = tl.load(lse + row, mask=ok, other=float("inf"))
            scores = _products(k, k_rows, allowed, q, q_rows, ok, E, STEP, UPCAST, PRECISION)
            weights = tl.where(allowed[:, None], tl.exp2(scores * scale - denominator[None, :]), 0.0)
            if DV:
                slopes = _take(grad, g_rows, ok, chunk * CHUNK, V, CHUNK, UPCAST)
                total_v = tl.dot(_rounded(weights, grad, UPCAST), slopes, total_v, input_precision=PRECISION)
            if DK:
                mean = tl.load(delta + row, mask=ok, other=0.0)
                slope = _products(v, v_rows, allowed, grad, g_rows, ok, V, STEP, UPCAST, PRECISION)
                queries = _take(q, q_rows, ok, chunk * CHUNK, E, CHUNK, UPCAST)
                slope = _rounded(weights * (slope - mean[None, :]), q, UPCAST)
                total_k = tl.dot(slope, queries, total_k, input_precision=PRECISION)
    there = block * BLOCK_K + tl.arange(0, BLOCK_K) < K
    rows = (b * N + (n if INDEXED else t * K + n)) * (H // HEADS) + group
    if DK:
        _put(dk, rows * E, there, chunk * CHUNK, total_k * (scale * LN_2 / (M * S)), E, CHUNK)
    if DV:
        _put(dv, rows * V, there, chunk * CHUNK, total_v / (M * S), V, CHUNK)
