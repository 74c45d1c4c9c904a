"""The Triton kernels of `dualview.kernels.tile_attention`. Imports triton.

Every program takes one image, one p and a block of rows, finds tokens by the tables, and sums in float32. A row is a
query with a head: where all heads ask the same keys, a program has rows of all heads, and reads a block of keys once
for all of them. Scores are not stored; of every row `lse` is, the logarithm (base 2) of its softmax's denominator.
Programs own what they write (rows of the result and of dq, keys of dk and dv), so every sum has one order.

Backward, for a row i and a key j with the weight P, and g the gradient of the output row that i goes to:
dP = g_i . v_j, dS = P (dP - delta_i) with delta_i = sum_j P dP, dq_i = sum_j scale dS k_j, dk_j = sum_i scale dS q_i,
dv_j = sum_i P g_i, all divided by M.
"""
# ruff: noqa: N803 - sizes have the names of the equations
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import triton
import triton.language as tl

LN_2 = tl.constexpr(math.log(2))
# Sizes that vary from image to image must not make a new kernel each.
SIZES = ("P", "M", "R", "K", "H", "tiles_p", "tiles_m", "mask_b")


@triton.jit
def _place(chunks, blocks, groups, tiles):
    """Which chunk of columns, block, group of heads, tile and image a program is for; those of a tile side by side."""
    rest = tl.program_id(0)
    chunk, rest = rest % chunks, rest // chunks
    block, rest = rest % blocks, rest // blocks
    group, rest = rest % groups, rest // groups
    return chunk, block, group.to(tl.int64), (rest % tiles).to(tl.int64), (rest // tiles).to(tl.int64)


@triton.jit
def _rows(start, group, R, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Query and head of every row of a block, and whether there is such a row."""
    row = start + tl.arange(0, BLOCK_R)
    return row // HEADS, group + row % HEADS, row < R * HEADS


@triton.jit
def _tokens(table, entries, ok):
    """Tokens that a table names, and whether it names one."""
    at = tl.load(table + entries, mask=ok, other=-1).to(tl.int64)
    return at, at >= 0


@triton.jit
def _keys(table, start, K, mask, MASKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The keys of a block, and whether they may be attended to."""
    entries = start + tl.arange(0, BLOCK_K)
    at, ok = _tokens(table, entries, entries < K)
    if MASKED:
        ok = ok & (tl.load(mask + at, mask=ok, other=0) != 0)
    return at, ok


@triton.jit
def _take(x, rows, ok, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Columns from ``start`` on of the rows at these offsets; zeros where there is nothing."""
    cols = start + tl.arange(0, BLOCK)
    there = ok[:, None]
    if WIDTH % BLOCK != 0:
        there = there & (cols < WIDTH)[None, :]
    found = tl.load(x + rows[:, None] + cols[None, :], mask=there, other=0.0)
    if UPCAST:
        found = found.to(tl.float32)
    return found


@triton.jit
def _put(x, rows, ok, start, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write columns from ``start`` on."""
    cols = start + tl.arange(0, BLOCK)
    there = ok[:, None] & (cols < WIDTH)[None, :]
    tl.store(x + rows[:, None] + cols[None, :], values.to(x.dtype.element_ty), mask=there)


@triton.jit
def _rounded(values, like, UPCAST: tl.constexpr):
    """``values`` in the type of what ``like`` points to, as a product needs them; with UPCAST rounded to it only."""
    rounded = values.to(like.dtype.element_ty)
    if UPCAST:
        rounded = rounded.to(tl.float32)
    return rounded


@triton.jit
def _products(
    a, a_rows, a_ok, b, b_rows, b_ok,
    WIDTH: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of all rows of ``a`` with all rows of ``b``."""
    total = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for start in range(0, WIDTH, STEP):
        left = _take(a, a_rows, a_ok, start, WIDTH, STEP, UPCAST)
        right = _take(b, b_rows, b_ok, start, WIDTH, STEP, UPCAST)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=(*SIZES, "out_n"))
def attend(
    q, k, v, q_at, k_at, out_at, mask, lse, out,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, out_n,
    P, M, R, K, H, tiles_p, tiles_m, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, VALUES: tl.constexpr, KEEP: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One pass over the keys, with the softmax's maximum as it is so far: ``out`` (VALUES, M = 1), ``lse`` (KEEP)."""
    chunk, block, group, pm, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(R * HEADS, BLOCK_R), H // HEADS, P * M)
    p, m = pm // M, pm % M
    r, h, ok = _rows(block * BLOCK_R, group, R, HEADS, BLOCK_R)
    q_row, asked = _tokens(q_at, pm * R + r, ok)
    keys_of = k_at + (p % tiles_p * tiles_m + m % tiles_m) * K
    q += b * q_b
    k += b * k_b + group * k_h
    v += b * v_b + group * v_h

    highest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    if VALUES:
        collected = tl.zeros((BLOCK_R, CHUNK), tl.float32)
    for start in range(0, K, BLOCK_K):
        at, there = _keys(keys_of, start, K, mask + b * mask_b, MASKED, BLOCK_K)
        scores = _products(q, q_row * q_n + h * q_h, asked, k, at * k_n, there, E, STEP, UPCAST, PRECISION)
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: -inf less -inf would be NaN
        weights = tl.exp2(scores - origin[:, None])
        fade = tl.exp2(highest - origin)
        total = total * fade + tl.sum(weights, 1)
        if VALUES:
            values = _take(v, at * v_n, there, chunk * CHUNK, V, CHUNK, UPCAST)
            weights = _rounded(weights, v, UPCAST)
            collected = tl.dot(weights, values, collected * fade[:, None], input_precision=PRECISION)
        highest = higher

    empty = (total == 0.0) | (q_row < 0)
    if KEEP:
        entry = (b * P * M + pm) * R * H + r * H + h
        if chunk == 0:
            tl.store(lse + entry, tl.where(empty, float("inf"), highest + tl.log2(total)), mask=ok)
    if VALUES:
        out_row, wanted = _tokens(out_at, p * R + r, ok)
        result = tl.where(empty[:, None], 0.0, collected / total[:, None])
        _put(out, ((b * out_n + out_row) * H + h) * V, wanted, chunk * CHUNK, result, V, CHUNK)


@triton.jit(do_not_specialize=(*SIZES, "out_n"))
def attend_pooled(
    q, k, v, q_at, k_at, out_at, mask, lse, out,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, out_n,
    P, M, R, K, H, tiles_p, tiles_m, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``out`` from ``lse``: the weights of all queries of a row that ask the same keys are added before the values."""
    chunk, block, group, p, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(R * HEADS, BLOCK_R), H // HEADS, P)
    r, h, ok = _rows(block * BLOCK_R, group, R, HEADS, BLOCK_R)
    q += b * q_b
    k += b * k_b + group * k_h
    v += b * v_b + group * v_h

    collected = tl.zeros((BLOCK_R, CHUNK), tl.float32)
    for tile in range(tiles_m):
        keys_of = k_at + (p % tiles_p * tiles_m + tile) * K
        for start in range(0, K, BLOCK_K):
            at, there = _keys(keys_of, start, K, mask + b * mask_b, MASKED, BLOCK_K)
            weights = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
            for turn in range(M // tiles_m):
                pm = p * M + tile + turn * tiles_m
                q_row, asked = _tokens(q_at, pm * R + r, ok)
                denominator = tl.load(lse + (b * P * M + pm) * R * H + r * H + h, mask=ok, other=float("inf"))
                scores = _products(q, q_row * q_n + h * q_h, asked, k, at * k_n, there, E, STEP, UPCAST, PRECISION)
                weights += tl.where(there[None, :], tl.exp2(scores * scale - denominator[:, None]), 0.0)
            values = _take(v, at * v_n, there, chunk * CHUNK, V, CHUNK, UPCAST)
            collected = tl.dot(_rounded(weights, v, UPCAST), values, collected, input_precision=PRECISION)

    out_row, wanted = _tokens(out_at, p * R + r, ok)
    _put(out, ((b * out_n + out_row) * H + h) * V, wanted, chunk * CHUNK, collected / M, V, CHUNK)


@triton.jit(do_not_specialize=(*SIZES, "dq_n"))
def query_gradients(
    q, k, v, q_at, k_at, out_at, mask, lse, grad, delta, dq,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, grad_b, grad_n, grad_h, dq_n,
    P, M, R, K, H, tiles_p, tiles_m, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, DELTA: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """With DELTA the pass over the keys that finds ``delta``, else a chunk of ``dq``."""
    chunk, block, group, pm, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(R * HEADS, BLOCK_R), H // HEADS, P * M)
    p, m = pm // M, pm % M
    r, h, ok = _rows(block * BLOCK_R, group, R, HEADS, BLOCK_R)
    q_row, asked = _tokens(q_at, pm * R + r, ok)
    out_row, wanted = _tokens(out_at, p * R + r, ok)
    entry = (b * P * M + pm) * R * H + r * H + h
    denominator = tl.load(lse + entry, mask=ok, other=float("inf"))
    keys_of = k_at + (p % tiles_p * tiles_m + m % tiles_m) * K
    q += b * q_b
    k += b * k_b + group * k_h
    v += b * v_b + group * v_h
    grad += b * grad_b

    if DELTA:
        total = tl.zeros((BLOCK_R,), tl.float32)
    else:
        total = tl.zeros((BLOCK_R, CHUNK), tl.float32)
        mean = tl.load(delta + entry, mask=ok, other=0.0)
    for start in range(0, K, BLOCK_K):
        at, there = _keys(keys_of, start, K, mask + b * mask_b, MASKED, BLOCK_K)
        scores = _products(q, q_row * q_n + h * q_h, asked, k, at * k_n, there, E, STEP, UPCAST, PRECISION)
        weights = tl.where(there[None, :], tl.exp2(scores * scale - denominator[:, None]), 0.0)
        slope = _products(grad, out_row * grad_n + h * grad_h, wanted, v, at * v_n, there, V, STEP, UPCAST, PRECISION)
        if DELTA:
            total += tl.sum(weights * slope, 1)
        else:
            keys = _take(k, at * k_n, there, chunk * CHUNK, E, CHUNK, UPCAST)
            slope = _rounded(weights * (slope - mean[:, None]), k, UPCAST)
            total = tl.dot(slope, keys, total, input_precision=PRECISION)
    if DELTA:
        tl.store(delta + entry, total, mask=ok)
    else:
        _put(dq, ((b * dq_n + q_row) * H + h) * E, asked, chunk * CHUNK, total * (scale * LN_2 / M), E, CHUNK)


@triton.jit(do_not_specialize=(*SIZES, "dk_n"))
def key_gradients(
    q, k, v, q_at, k_at, out_at, mask, lse, grad, delta, dk, dv,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, grad_b, grad_n, grad_h, dk_n,
    P, M, R, K, H, tiles_p, tiles_m, scale,
    E: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of ``dk`` (DK) and of ``dv`` (DV) of the keys of a tile, from all queries that ask it."""
    chunk, block, group, tile, b = _place(tl.cdiv(COLUMNS, CHUNK), tl.cdiv(K, BLOCK_K), H // HEADS, tiles_p * tiles_m)
    at, there = _keys(k_at + tile * K, block * BLOCK_K, K, mask + b * mask_b, MASKED, BLOCK_K)
    q += b * q_b
    k += b * k_b + group * k_h
    v += b * v_b + group * v_h
    grad += b * grad_b

    if DK:
        total_k = tl.zeros((BLOCK_K, CHUNK), tl.float32)
    if DV:
        total_v = tl.zeros((BLOCK_K, CHUNK), tl.float32)
    for turn_p in range(P // tiles_p):
        for turn_m in range(M // tiles_m):
            p = tile // tiles_m + turn_p * tiles_p
            pm = p * M + tile % tiles_m + turn_m * tiles_m
            for start in range(0, R * HEADS, BLOCK_R):
                r, h, ok = _rows(start, group, R, HEADS, BLOCK_R)
                q_row, asked = _tokens(q_at, pm * R + r, ok)
                out_row, wanted = _tokens(out_at, p * R + r, ok)
                entry = (b * P * M + pm) * R * H + r * H + h
                denominator = tl.load(lse + entry, mask=ok, other=float("inf"))
                q_rows, g_rows = q_row * q_n + h * q_h, out_row * grad_n + h * grad_h
                scores = _products(k, at * k_n, there, q, q_rows, asked, E, STEP, UPCAST, PRECISION)
                weights = tl.where(there[:, None], tl.exp2(scores * scale - denominator[None, :]), 0.0)
                if DV:
                    g = _take(grad, g_rows, wanted, chunk * CHUNK, V, CHUNK, UPCAST)
                    total_v = tl.dot(_rounded(weights, grad, UPCAST), g, total_v, input_precision=PRECISION)
                if DK:
                    mean = tl.load(delta + entry, mask=ok, other=0.0)
                    slope = _products(v, at * v_n, there, grad, g_rows, wanted, V, STEP, UPCAST, PRECISION)
                    queries = _take(q, q_rows, asked, chunk * CHUNK, E, CHUNK, UPCAST)
                    slope = _rounded(weights * (slope - mean[None, :]), q, UPCAST)
                    total_k = tl.dot(slope, queries, total_k, input_precision=PRECISION)
    rows_of = (b * dk_n + at) * (H // HEADS) + group
    if DK:
        _put(dk, rows_of * E, there, chunk * CHUNK, total_k * (scale * LN_2 / M), E, CHUNK)
    if DV:
        _put(dv, rows_of * V, there, chunk * CHUNK, total_v / M, V, CHUNK)
