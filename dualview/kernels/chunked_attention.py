"""Attention inside tiles, with the scores of a few tiles at a time: plain functions, forward and backward.

Inside, heads come before queries and keys: queries are (B, T, H, Q, E), keys (B, T, H or 1, K, E), scores
(B, T, H, Q, K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

SCORES_AT_ONCE = {"cpu": 2**19}
"""Scores of one image that the cache of a device holds."""
MOST_SCORES = 2**25
"""The same for a device without an entry: a bound of memory alone."""


class Problem(NamedTuple):
    """What decides the result of `dualview.kernels.tile_attention.tile_attention`, with its shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    scale: float
    cells: tuple[int, int, int, int] | None = None
    tiles: int = 0


def attend_by_chunks(problem: Problem) -> Tensor:
    """The result, (B, T or 1, G, H, V)."""
    parts: list[Tensor] = []
    for chunk in _chunks(problem):
        pooled, values = _mean_of_cells(_weights(problem, chunk), problem.cells), problem.v[:, chunk]
        if not problem.tiles:
            parts.append(_product(pooled.to(values.dtype), by_head(values)))
            continue
        # The sum over tiles is part of the product: the keys of all tiles stand side by side.
        pooled = pooled.permute(0, 2, 3, 1, 4).to(values.dtype, memory_format=torch.contiguous_format)
        pooled, values = pooled.flatten(3).unsqueeze(1), values.flatten(1, 2).unsqueeze(1)
        share = _product(pooled, by_head(values), partial(_share, tiles=problem.tiles))
        parts = [parts[0] + share.to(torch.promote_types(share.dtype, torch.float32))] if parts else [share]
    return _joined([part.to(problem.q.dtype) for part in parts])


def gradients_by_chunks(problem: Problem, grad: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of q, k and v, None where they are not needed."""
    if problem.tiles:
        grad = (grad / problem.tiles).expand(-1, problem.q.shape[1], -1, -1, -1)
    found = [_gradients(problem, grad, needed, chunk) for chunk in _chunks(problem)]
    return [None if of[0] is None else _joined(cast(list[Tensor], list(of))) for of in zip(*found, strict=True)]


def _gradients(problem: Problem, grad: Tensor, needed: Sequence[bool], chunk: slice) -> tuple[Tensor | None, ...]:
    """Those of some tiles: dS = P (dP - sum_j P dP), dq = scale dS k, dk = scale dS^T q, dv = P^T g."""
    need_q, need_k, need_v = needed
    h, r, w, s = problem.cells or (problem.q.shape[2], 1, 1, 1)
    weights = _weights(problem, chunk)
    rows, keys, values, g = (by_head(x[:, chunk]) for x in (*problem[:3], grad))
    of_cells = _product(g, values.mT, _wide).unflatten(3, (h, 1, w, 1))
    of_each = weights.unflatten(3, (h, r, w, s))
    slope = of_each * (of_cells - (of_each * of_cells).sum(-1, keepdim=True)) * (problem.scale / (r * s))
    slope = slope.to(rows.dtype).flatten(3, 6)
    dq = _product(slope, keys) if need_q else None
    dk = _sum_over_rows(slope, rows, keys.shape[2]) if need_k else None
    dv = _sum_over_rows(_mean_of_cells(weights, problem.cells).to(rows.dtype), g, keys.shape[2]) if need_v else None
    return dq, dk, dv


def chunks(tiles: int, scores: int, device: torch.device, least: int = 1) -> list[slice]:
    """The tiles, as many at a time as `SCORES_AT_ONCE` allows, or ``least``; each has so many scores."""
    step = max(least, SCORES_AT_ONCE.get(device.type, MOST_SCORES) // max(1, scores))
    return [slice(first, min(first + step, tiles)) for first in range(0, max(1, tiles), step)]


def _chunks(problem: Problem) -> list[slice]:
    """Those of one image, whatever the batch: to suit an exported graph."""
    _, tiles, *rows, _ = problem.q.shape
    return chunks(tiles, torch.Size(rows).numel() * problem.k.shape[2], problem.q.device)


def by_head(x: Tensor) -> Tensor:
    """Heads before queries or keys, and back again. (B, T, Q or K, H, E) -> (B, T, H, Q or K, E)"""
    return x.transpose(2, 3)


def mask_and_alive(key_mask: Tensor | None, chunk: slice) -> tuple[Tensor | None, Tensor | None]:
    """What the queries of some tiles may attend to, and whether there is anything: (B or 1, tiles, 1, 1, K or 1).

    A softmax over no key would be NaN: such queries attend anywhere, and their results are then set to zero.
    """
    if key_mask is None:
        return None, None
    mask = key_mask[:, chunk, None, None, :]
    alive = mask.any(-1, keepdim=True)
    return mask | ~alive, alive


def _weights(problem: Problem, chunk: slice) -> Tensor:
    """softmax(scale q k^T) of some tiles in at least float32, zeros where no key may be attended to. (.., Q, K)"""
    rows, keys = by_head(problem.q[:, chunk]), by_head(problem.k[:, chunk])
    weights = _product(rows, keys.mT, _wide)
    weights = weights if problem.scale == 1 else weights.mul_(problem.scale)
    mask, alive = mask_and_alive(problem.key_mask, chunk)
    if mask is None or alive is None:
        return weights.softmax(-1)
    return weights.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~alive, 0.0)


def _mean_of_cells(weights: Tensor, cells: tuple[int, int, int, int] | None) -> Tensor:
    """(B, T, H, Q, K) -> (B, T, H, G, K)"""
    if cells is None:
        return weights
    split = weights.unflatten(3, cells)
    # On a CPU the mean of two dimensions that are not neighbours takes 15 times as long as two means.
    return cast(Tensor, (split.mean((4, 6)) if split.is_cuda else split.mean(6).mean(4)).flatten(3, 4))


def _share(a: Tensor, b: Tensor, tiles: int) -> Tensor:
    """The product divided by a number, in one operation.

    Its first operand adds nothing, but must be finite: the products that torch.compile generates multiply it by zero.
    """
    rows, values = a.flatten(0, 2), b.flatten(0, 2)
    finite = values[:, :1] if values.shape[1] else values.new_zeros(1)
    return cast(Tensor, torch.baddbmm(finite, rows, values, beta=0, alpha=1 / tiles).unflatten(0, a.shape[:3]))


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """The product with sums and result in at least float32.

    On a GPU the operands keep their half type, for the matrix units. That product of torch has no second derivative:
    where one is recorded, the operands become float32.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if not a.is_cuda or a.dtype == wide or torch.is_grad_enabled():
        return a.to(wide) @ b.to(wide)
    return cast(Tensor, torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out_dtype=wide).unflatten(0, a.shape[:3]))


def _product(rows: Tensor, b: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """(B, T, H, R, C) times (B, T, H or 1, C, D). The rows of all heads meet a shared operand in one product."""
    if rows.shape[2] == b.shape[2]:
        return multiply(rows, b)
    product: Tensor = multiply(rows.flatten(2, 3).unsqueeze(2), b).squeeze(2).unflatten(2, rows.shape[2:4])
    return product


def _sum_over_rows(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """a^T b of every head or, where all share their keys, the sum over heads. (B, T, H, R, C or D) -> (.., C, D)"""
    if a.shape[2] == heads:
        return a.mT @ b
    return (a.flatten(2, 3).mT @ b.flatten(2, 3)).unsqueeze(2)


def _joined(parts: list[Tensor]) -> Tensor:
    """The tiles of all chunks, (B, T, R, H, D); in memory the heads come first, as the projections around need them."""
    if len(parts) == 1:
        return by_head(parts[0])
    return torch.cat([part.permute(2, 0, 1, 3, 4) for part in parts], 2).permute(1, 2, 3, 0, 4)
