"""What `dualview.kernels.tile_attention` computes, in plain torch: copies of all tokens, and all scores, are held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Tensors, tables and what else decides the result; shapes as for `tile_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_at: Tensor
    k_at: Tensor
    out_at: Tensor
    key_mask: Tensor | None
    scale: float


def attend(problem: Problem, out_tokens: int) -> Tensor:
    """The result, differentiable any number of times."""
    weights = _weights(problem)
    pooled = (weights.to(problem.q.dtype) @ _rows(problem.v, problem.k_at)).mean(2).transpose(2, 3).flatten(1, 2)
    out_at = problem.out_at.flatten()
    return pooled.index_select(1, torch.where(out_at < 0, out_tokens, out_at).argsort()[:out_tokens])


def gradients(problem: Problem, grad: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    """Those of the gradients of q, k and v that are needed, by the formulas of the kernels."""
    q, k, v, q_at, k_at, out_at, _, scale = problem
    weights, keys = _weights(problem), _rows(k, k_at)
    of_row = _rows(grad, out_at[:, None]) * (out_at >= 0)[:, None, None, :, None] / q_at.shape[1]
    slope = (of_row @ _rows(v, k_at).mT).to(weights.dtype)
    slope = (weights * (slope - (weights * slope).sum(-1, keepdim=True)) * scale).to(q.dtype)
    found = []
    if needed[0]:
        found.append(_put_back(slope @ keys, q_at, q))
    if needed[1]:
        found.append(_put_back(slope.mT @ _rows(q, q_at), k_at, k))
    if needed[2]:
        found.append(_put_back(weights.to(q.dtype).mT @ of_row, k_at, v))
    return found


def _weights(problem: Problem) -> Tensor:
    """The softmax of every row, at least in float32. (B, P, M, H, R, K)"""
    q, k, _, q_at, k_at, _, key_mask, scale = problem
    there = (k_at >= 0)[None]
    if key_mask is not None:
        there = there & key_mask[:, k_at.clamp(min=0)]
    there = there[:, :, :, None, None, :]
    alive = there.any(-1, keepdim=True) & (q_at >= 0)[:, :, None, :, None]
    scores = (_rows(q, q_at) @ _rows(k, k_at).mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    # A row without keys would be NaN: let it attend anywhere, then drop it.
    return scores.masked_fill(~there & alive, float("-inf")).softmax(-1).masked_fill(~(there & alive), 0.0)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Tokens by a table, any for none, heads before them. (B, N, H, C), (P, M, J) -> (B, P, M, H, J, C)"""
    return x[:, at.clamp(min=0)].transpose(3, 4)


def _put_back(rows: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """The inverse, rows of the same tokens added and others zero. (B, P, M, H, J, C) -> the shape of ``like``"""
    summed = rows.sum_to_size(rows.shape[0], *at.shape[:2], like.shape[2], *rows.shape[4:]).transpose(3, 4)
    found = like.new_zeros(like.shape[0], like.shape[1] + 1, *like.shape[2:])  # one more, for no token
    slots = torch.where(at < 0, like.shape[1], at).flatten()
    return found.index_copy(1, slots.long(), summed.flatten(1, 3))[:, :-1].contiguous()
