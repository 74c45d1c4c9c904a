"""Attention inside tiles, with the scores of a few tiles at a time: plain functions, forward and backward.

Inside, heads come before queries and keys: queries are (B, T, H, M * G, E), keys (B, T, H or 1, K, E), scores
(B, T, H, M * G, K).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    v: Tensor | None
    """None where the keys are their own values."""
    key_mask: Tensor | None
    key_index: Tensor | None
    scale: float
    over_tiles: bool

    @property
    def values(self) -> Tensor:
        """The values, whether or not they are the keys."""
        return self.k if self.v is None else self.v

    @property
    def keys(self) -> int:
        """Number of keys of a tile."""
        return self.k.shape[2] if self.key_index is None else self.key_index.shape[1]


def attend_by_chunks(problem: Problem) -> Tensor:
    """The result, (B, T or 1, G, H, V)."""
    q, parts, total = problem.q, [], None
    for chunk in _chunks(problem):
        keys, values = keys_and_values(problem, chunk)
        weights = _weights(problem, keys, chunk)
        pooled = _mean_over_members(weights).to(q.dtype)
        if problem.over_tiles:  # the sum over tiles is one product with the keys of all of them
            pooled = pooled.permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1)
            values = values.transpose(1, 2).flatten(2, 3).unsqueeze(1)
            part = _product(pooled, values).to(weights.dtype)
            total = part if total is None else total.add_(part)
        else:
            parts.append(_product(pooled, values))
    out = _joined(parts) if total is None else total / q.shape[1]
    out = out if out.dtype == q.dtype else out.to(q.dtype)  # torch 2.11 compiles a cast that casts nothing wrongly
    return out.transpose(2, 3)


def gradients_by_chunks(
    problem: Problem, grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, where needed: dS = P (dP - sum_j P dP), dq = scale dS k, dk = scale dS^T q, dv = P^T g.

    Where the keys are their own values, dk is the gradient of both.
    """
    q, k, v, index = problem.q, problem.k, problem.v, problem.key_index
    tiles, members, (need_q, need_k, need_v) = q.shape[1], q.shape[2], needed
    dq: list[Tensor] = []
    dk: list[Tensor] = []
    dv: list[Tensor] = []
    grad = grad.transpose(2, 3)
    grad = grad / tiles if problem.over_tiles else grad  # every tile has the same share in the mean
    for chunk in _chunks(problem):
        keys, values = keys_and_values(problem, chunk)
        weights, g = _weights(problem, keys, chunk), grad if problem.over_tiles else grad[:, chunk]
        slope = _slope(g, values, over_tiles=problem.over_tiles).unsqueeze(3)
        slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * (problem.scale / members)
        slope = slope.to(q.dtype).flatten(3, 4)
        if need_q:
            dq.append(_product(slope, keys))
        if need_v or (need_k and v is None):
            of_values = _sum_over_rows(_mean_over_members(weights).to(q.dtype), g, keys.shape[2])
        if need_v:
            dv.append(of_values)
        if need_k:
            of_keys = _sum_over_rows(slope, rows_of(q[:, chunk]), keys.shape[2])
            dk.append(of_keys + of_values if v is None else of_keys)
    of_q = _joined(dq).unflatten(3, q.shape[2:4]).permute(0, 1, 3, 4, 2, 5) if need_q else None
    of_k, of_v = (_in_order(parts, index, x) if parts else None for parts, x in ((dk, k), (dv, problem.values)))
    return of_q, of_k, of_v


def _slope(g: Tensor, values: Tensor, *, over_tiles: bool) -> Tensor:
    """The gradient of the weights of some tiles: that of the result times their values. (B, T, H, G, K)"""
    if not over_tiles:
        return _wide_product(g, values.mT)
    of_all = _wide_product(g, values.transpose(1, 2).flatten(2, 3).unsqueeze(1).mT)  # of all tiles in one product
    by_tile: Tensor = of_all.unflatten(-1, values.shape[1:4:2]).squeeze(1).movedim(3, 1)
    return by_tile


def _chunks(problem: Problem) -> Iterator[slice]:
    """The tiles, as many at a time as the scores of one image allow: whatever the batch, to suit an exported graph."""
    _, tiles, *rows, _ = problem.q.shape
    most = SCORES_AT_ONCE.get(problem.q.device.type, MOST_SCORES)
    step = max(1, most // max(1, torch.Size(rows).numel() * problem.keys))
    return (slice(first, min(first + step, tiles)) for first in range(0, max(1, tiles), step))


def rows_of(q: Tensor) -> Tensor:
    """(B, T, M, G, H, E) -> (B, T, H, M * G, E)"""
    rows: Tensor = q.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
    return rows


def keys_and_values(problem: Problem, chunk: slice) -> tuple[Tensor, Tensor]:
    """The keys and the values of some tiles, (B, tiles, H or 1, K, E or V)."""
    index = None if problem.key_index is None else problem.key_index[chunk]
    keys = _of_tiles(problem.k, index, chunk)
    return keys, keys if problem.v is None else _of_tiles(problem.v, index, chunk)


def _of_tiles(k: Tensor, index: Tensor | None, chunk: slice) -> Tensor:
    tiles = k[:, chunk] if index is None else k.index_select(1, index.flatten()).unflatten(1, index.shape)
    return tiles.transpose(2, 3)


def mask_and_alive(key_mask: Tensor | None, chunk: slice) -> tuple[Tensor | None, Tensor | None]:
    """What the queries of some tiles may attend to, and whether there is anything: (B or 1, tiles, 1, 1, K or 1).

    A softmax over no key would be NaN: such queries attend anywhere, and their results are then set to zero.
    """
    if key_mask is None:
        return None, None
    mask = key_mask[:, chunk, None, None, :]
    alive = mask.any(-1, keepdim=True)
    return mask | ~alive, alive


def _weights(problem: Problem, keys: Tensor, chunk: slice) -> Tensor:
    """softmax(scale q k^T) of some tiles in at least float32, zeros where no key may be attended to. (.., M, G, K)"""
    rows, members_and_groups = rows_of(problem.q[:, chunk]), problem.q.shape[2:4]
    scores: Tensor = _wide_product(rows, keys.mT, problem.scale).unflatten(3, members_and_groups)
    mask, alive = mask_and_alive(problem.key_mask, chunk)
    if mask is None or alive is None:
        return scores.softmax(-1)
    mask, alive = mask.unsqueeze(3), alive.unsqueeze(3)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~alive, 0.0)


def _mean_over_members(weights: Tensor) -> Tensor:
    """(B, T, H, M, G, K) -> (B, T, H, G, K)"""
    return weights.squeeze(3) if weights.shape[3] == 1 else weights.mean(3)


def _wide_product(rows: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """The product times ``scale``, with sums and result in at least float32.

    On a GPU the operands keep their half type, for the matrix units; not where a second derivative is recorded, which
    that product of torch has none for.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    if not rows.is_cuda or rows.dtype == wide or torch.is_grad_enabled():
        return _product(rows.to(wide) * scale if scale != 1 else rows.to(wide), b.to(wide))
    together = rows.flatten(2, 3).unsqueeze(2) if b.shape[2] < rows.shape[2] else rows
    flat = torch.bmm(together.flatten(0, 2), b.expand(together.shape[0], *b.shape[1:]).flatten(0, 2), out_dtype=wide)
    product: Tensor = flat.unflatten(0, together.shape[:3]).reshape(*rows.shape[:-1], b.shape[-1])
    return product.mul_(scale) if scale != 1 else product


def _product(rows: Tensor, b: Tensor) -> Tensor:
    """(B, T, H, R, C) times (B, T, H or 1, C, D): what all heads share is met by the rows of all at once."""
    if rows.shape[2] == b.shape[2]:
        return rows @ b
    product: Tensor = (rows.flatten(2, 3).unsqueeze(2) @ b).squeeze(2).unflatten(2, rows.shape[2:4])
    return product


def _sum_over_rows(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """a^T b of every head or, where all share their keys, the sum over heads. (B, T, H, R, C or D) -> (.., C, D)"""
    if a.shape[2] == heads:
        return a.mT @ b
    return (a.flatten(2, 3).mT @ b.flatten(2, 3)).unsqueeze(2)


def _joined(parts: list[Tensor]) -> Tensor:
    """The tiles of all chunks; in memory the heads come first, as the projections around need them."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.permute(2, 0, 1, 3, 4) for part in parts], 2).permute(1, 2, 0, 3, 4)


def _in_order(parts: list[Tensor], key_index: Tensor | None, like: Tensor) -> Tensor:
    """The gradients of all keys as the keys lie; tokens that are no key of any tile get zeros."""
    keys = torch.cat([part.transpose(2, 3) for part in parts], 1) if len(parts) > 1 else parts[0].transpose(2, 3)
    if key_index is None:
        return keys
    whole = keys.new_zeros(keys.shape[0], *like.shape[1:])
    return whole.index_copy_(1, key_index.flatten().long(), keys.flatten(1, 2))
