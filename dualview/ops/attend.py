"""softmax(Q K^T) V inside tiles: by torch's own kernel, or a few tiles at a time where that one does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.kernels.dispatch import Backend, choose
from dualview.ops.gather import Pooling
from dualview.ops.tables import table

SCORES_AT_ONCE = {"cpu": 2**19}
"""Scores of each image that the cache of a device holds: keys that are their own values are met there by a few tiles at
a time, and elsewhere by torch's own kernel."""
MOST_SCORES = 2**25
"""Scores of each image that are held at one time on other devices, for what torch's own kernel cannot do."""


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    pool: Pooling | None = None,
    at: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale q k^T) v for every tile and head, pooled inside if asked.

    Shape:
        - q: (B, T, heads, Q, E); key_mask: (B or 1, T, K)
        - k, v: (B, T, heads, K, E) and (B, T, heads, K, V); or one tensor for both (``v is k``) and for all heads,
          (B, T, 1, K, E), or (B, tokens, E) with the places ``at`` (T, K) of each tile's keys, each at most once
        - result: (B, T, heads, Q, V), or with pooled T and Q
    """
    inside = pool if pool is not None and pool.inside else None
    if choose("tile_attention", q, k, v, backend=backend).name == "triton":
        return _by_kernel(q, k, v, key_mask, scale, inside, at)
    mask = alive = None
    if key_mask is not None:
        mask = key_mask[:, :, None, None, :]
        alive = mask.any(-1, keepdim=True)
        mask = mask | ~alive  # a row without keys would be NaN: let it attend anywhere, then drop it
    if inside is not None or (v is k and q.device.type in SCORES_AT_ONCE):
        return _by_chunks(q, k, None if v is k else v, at, mask, alive, scale, inside)
    heads = q.shape[2:4]
    if v is k:  # all heads ask the same keys: as many more rows of one
        q, k = q.flatten(2, 3).unsqueeze(2), _of_tiles(k, at, slice(None))
        v = k
    flat_mask = None if mask is None else mask.expand(q.shape[0], -1, -1, -1, -1).flatten(0, 1)
    attended = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=flat_mask, scale=scale
    )
    tiles: Tensor = attended.flatten(1, 2).unflatten(1, heads).unflatten(0, q.shape[:2])
    return tiles if alive is None else tiles.masked_fill(~alive, 0.0)


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, pool: Pooling | None, at: Tensor | None
) -> Tensor:
    """By the Triton kernel, which finds the keys of a tile by a table and averages inside."""
    from dualview.kernels.tile_attention import tile_attention

    def tokens(x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.transpose(2, 3).flatten(1, 2)

    q_at = table(_asking, q.shape[1], q.shape[3], pool, like=q)
    out_at = table(_tile_by_tile, q_at.shape[0], q_at.shape[2], like=q)
    if at is None:
        keys, key = table(_tile_by_tile, k.shape[1], k.shape[3], like=k), tokens(k)
        value = key if v is k else tokens(v)
    else:
        keys, key = at.to(torch.int32), k.unsqueeze(2)
        value = key
    k_at = keys.unsqueeze(1 if q_at.shape[0] == keys.shape[0] else 0)
    mask = key_mask
    if mask is not None:
        mask = mask.flatten(1)
        if at is not None:
            mask = mask.new_zeros(mask.shape[0], k.shape[1]).index_copy(1, at.flatten(), mask)
    out = tile_attention(
        tokens(q), key, value, q_at, k_at, out_at, out_at.numel(), scale=scale, key_mask=mask, backend="triton"
    )
    rows: Tensor = out.unflatten(1, out_at.shape).transpose(2, 3)
    return rows


def _tile_by_tile(device: torch.device, tiles: int, rows: int) -> Tensor:
    """The tokens of tiles that lie one after the other."""
    return torch.arange(tiles * rows, device=device, dtype=torch.int32).view(tiles, rows)


def _asking(device: torch.device, tiles: int, queries: int, pool: Pooling | None) -> Tensor:
    """Queries that lie tile by tile, by the rows of the result that they are averaged to."""
    at = _tile_by_tile(device, tiles, queries)
    return at.unsqueeze(1) if pool is None else pool.members(at)


def _by_chunks(q: Tensor, k: Tensor, v: Tensor | None, *options: Any) -> Tensor:
    """`_AttendByChunks`, with tensors of one type under autocast too, as torch's own kernel would have them."""
    device, attend = q.device.type, _AttendByChunks.apply
    if device == "meta" or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return cast(Tensor, attend(q, k, v, *options))
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        tensors = (None if x is None else x.to(dtype) for x in (q, k, v))
        return cast(Tensor, attend(*tensors, *options))


class _AttendByChunks(torch.autograd.Function):
    """Scores of a few tiles at a time, computed anew in the backward pass: those of all tiles are never held.

    Torch's own kernel, which does likewise, neither pools nor leaves out the gradients of keys that need none, such as
    frozen features. All operations of the backward pass are differentiable in turn.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        at: Tensor | None,
        mask: Tensor | None,
        alive: Tensor | None,
        scale: float,
        pool: Pooling | None,
    ) -> Tensor:
        over_tiles, out = _over_tiles(pool), None
        for chunk in _chunks(q, k, at):
            keys = _of_tiles(k, at, chunk)
            weights = _pooled(_weights(q[:, chunk], keys, _of(mask, chunk), _of(alive, chunk), scale), pool)
            rows, values = weights.to(q.dtype), keys if v is None else v[:, chunk]
            if over_tiles:  # the sum over tiles is one product, over the keys of all of them
                rows = rows.permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1)
                values = values.transpose(1, 2).flatten(2, 3).unsqueeze(1)
                total = _product(rows, values).to(weights.dtype)
                out = total if out is None else out.add_(total)
            else:
                out = _put(_product(rows, values), chunk, out, q.shape[1])
        assert out is not None
        out = out / q.shape[1] if over_tiles else out
        return out if out.dtype == q.dtype else out.to(q.dtype)  # torch 2.11 compiles a cast that casts nothing wrongly

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.pool = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, at, mask, alive = ctx.saved_tensors
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
        over_tiles, of_q, of_k, of_v = _over_tiles(ctx.pool), None, None, None
        if over_tiles:  # every tile has the same share in the mean
            grad = grad / q.shape[1]
        for chunk in _chunks(q, k, at):
            keys = _of_tiles(k, at, chunk)
            weights = _weights(q[:, chunk], keys, _of(mask, chunk), _of(alive, chunk), ctx.scale)
            of_rows = grad if over_tiles else grad[:, chunk]
            values = (keys if v is None else v[:, chunk]).to(weights.dtype)
            of_pooled = _product(of_rows.to(weights.dtype), values.transpose(-2, -1))
            of_weights = _spread(of_pooled, ctx.pool)
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * ctx.scale
            of_scores = of_scores.to(q.dtype)
            if needs_q:
                of_q = _put(_product(of_scores, keys), chunk, of_q, q.shape[1])
            if needs_v or (needs_k and v is None):
                of_values = _sum_over_rows(_pooled(weights, ctx.pool).to(q.dtype), of_rows, keys)
            if needs_k:
                of_keys = _sum_over_rows(of_scores, q[:, chunk], keys)
                of_keys = of_keys + of_values if v is None else of_keys
                of_k = _put(of_keys, chunk, of_k, q.shape[1]) if at is None else _add(of_keys, at[chunk], of_k, k)
            if needs_v:
                of_v = _put(of_values, chunk, of_v, q.shape[1])
        return of_q, of_k, of_v, None, None, None, None, None


def _chunks(q: Tensor, k: Tensor, at: Tensor | None) -> Iterator[slice]:
    """The tiles, as many at a time as the scores of one image allow: whatever the batch, to suit an exported graph."""
    of_a_tile = q.shape[2] * q.shape[3] * (k.shape[3] if at is None else at.shape[1])
    step = max(1, SCORES_AT_ONCE.get(q.device.type, MOST_SCORES) // max(1, of_a_tile))
    return (slice(first, min(first + step, q.shape[1])) for first in range(0, max(1, q.shape[1]), step))


def _of_tiles(k: Tensor, at: Tensor | None, chunk: slice) -> Tensor:
    """The keys of some tiles, (B, tiles, heads or 1, K, E)."""
    if at is None:
        return k[:, chunk]
    places = at[chunk]
    keys: Tensor = k.index_select(1, places.flatten()).unflatten(1, places.shape).unsqueeze(2)
    return keys


def _of(mask: Tensor | None, chunk: slice) -> Tensor | None:
    return None if mask is None else mask[:, chunk]


def _weights(q: Tensor, keys: Tensor, mask: Tensor | None, alive: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) of some tiles, zeros where no key may be attended to, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _product(q.to(wide) * scale, keys.to(wide).transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    return weights if alive is None else weights.masked_fill(~alive, 0.0)


def _over_tiles(pool: Pooling | None) -> bool:
    return pool is not None and pool.direction.pool == "tiles"


def _pooled(weights: Tensor, pool: Pooling | None) -> Tensor:
    return weights if pool is None or _over_tiles(pool) else pool.rows(weights)


def _spread(of_pooled: Tensor, pool: Pooling | None) -> Tensor:
    return of_pooled if pool is None or _over_tiles(pool) else pool.spread(of_pooled)


def _product(rows: Tensor, b: Tensor) -> Tensor:
    """(B, T, heads, R, C) times (B, T, heads or 1, C, D): what all heads share is met by the rows of all at once."""
    if rows.shape[2] == b.shape[2]:
        return rows @ b
    product: Tensor = (rows.flatten(2, 3).unsqueeze(2) @ b).squeeze(2).unflatten(2, rows.shape[2:4])
    return product


def _sum_over_rows(a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    """a^T b, of every head or, where the keys are shared, summed over all of them."""
    if a.shape[2] == k.shape[2]:
        return a.transpose(-2, -1) @ b
    return (a.flatten(2, 3).transpose(-2, -1) @ b.flatten(2, 3)).unsqueeze(2)


def _put(part: Tensor, chunk: slice, whole: Tensor | None, tiles: int) -> Tensor:
    """Put the part of some tiles in its place; in memory the heads come first, as the projections around need them."""
    if chunk.start == 0 and chunk.stop == tiles:
        return part
    if whole is None:
        batch, _, heads, rows, width = part.shape
        whole = part.new_empty(heads, batch, tiles, rows, width).permute(1, 2, 0, 3, 4)
    whole[:, chunk] = part
    return whole


def _add(of_keys: Tensor, places: Tensor, whole: Tensor | None, k: Tensor) -> Tensor:
    """Put the gradients of some tiles' keys in their places among all tokens; those that are no key have zeros."""
    part = of_keys.squeeze(2).flatten(1, 2)
    whole = part.new_zeros(part.shape[0], *k.shape[1:]) if whole is None else whole
    return whole.index_copy_(1, places.flatten(), part)
