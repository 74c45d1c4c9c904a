"""Attention inside tiles: by torch's own fused kernel, or a few tiles at a time.

For a query i and a key j of one tile

    S_ij = scale q_i . k_j,    P = softmax_j(S),    O_i = sum_j P_ij v_j,

and the results of queries that belong together may be averaged, in a tile and over tiles. Torch's fused kernel does
what it can do. What it cannot do, average inside or spare the gradients of frozen keys, is done a few tiles at a time,
with the scores computed anew in the backward pass, so that the scores of all tiles are never held.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.kernels import dispatch
from dualview.kernels.chunked_attention import (
    SCORES_AT_ONCE,
    Problem,
    attend_by_chunks,
    by_head,
    gradients_by_chunks,
    mask_and_alive,
)

WIDEST_HEAD = 256
"""The widest head of torch's flash attention."""


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    cells: tuple[int, int, int, int] | None = None,
    tiles: int = 0,
) -> Tensor:
    """Attention of the queries of every tile to the keys of the same tile. Whoever calls it has checked the arguments.

    Args:
        q: Queries of every tile, any strides.
        k: Keys, of as many heads as the queries or of one head that serves all of them.
        v: Values, of as many heads as the keys; may be the keys themselves.
        scale: Factor of the scores, positive.
        key_mask: True for keys that may be attended to. A query without any gives zeros.
        cells: (h, r, w, s): the Q queries of a tile are h * r rows of w * s tokens, and each r x s of them are
            averaged, which leaves G = h * w; None: none are, and G = Q.
        tiles: Add up the results of all tiles, divided by this number; 0 keeps tiles apart.

    Shape:
        - q: (B, T, Q, H, E)
        - k: (B, T, K, H or 1, E), v: (B, T, K, H or 1, V)
        - key_mask: (B or 1, T, K)
        - result: (B, T, G, H, V), or (B, 1, G, H, V) added up

    Example:
        >>> q, kv = torch.randn(1, 6, 2, 4, 8), torch.randn(1, 6, 3, 1, 8)  # 6 tiles of 2 queries and 3 keys
        >>> tile_attention(q, kv, kv, scale=0.1).shape
        torch.Size([1, 6, 2, 4, 8])
        >>> tile_attention(q, kv, kv, scale=0.1, cells=(1, 2, 1, 1), tiles=6).shape
        torch.Size([1, 1, 1, 4, 8])
    """
    q, k, v = _of_autocast(q, k, v)
    # No fused kernel is fast for wide heads on a GPU, or as fast as scores in the cache of a CPU.
    scores = q.shape[-1] > WIDEST_HEAD if q.is_cuda else v is k and q.device.type in SCORES_AT_ONCE
    if cells or tiles or scores or not _fused_is_right(q, k, v, key_mask):
        # A view, for torch.compile refuses a function of the same tensor twice.
        return cast(Tensor, _ByChunks.apply(q, k, v.view_as(v), key_mask, scale, cells, tiles))
    rows, keys, values = by_head(q), by_head(k), by_head(v)
    if keys.shape[2] < rows.shape[2]:  # the queries of all heads ask one head of keys
        rows = rows.flatten(2, 3).unsqueeze(2)
    rows, keys, values = (x.flatten(0, 1) for x in (rows, keys, values))
    mask, alive = mask_and_alive(key_mask, slice(None))
    if _cudnn_may_run(q, k, v):
        rows, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (rows, keys, values))
        found = torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values, scale=scale)[0]
    else:
        flat_mask = None if mask is None else mask.expand(q.shape[0], -1, -1, -1, -1).flatten(0, 1)
        found = F.scaled_dot_product_attention(rows, keys, values, attn_mask=flat_mask, scale=scale)
    out = found.reshape(*q.shape[:2], q.shape[3], q.shape[2], found.shape[3])  # which copies nothing
    return by_head(out if alive is None else out.masked_fill(~alive, 0.0))


def _of_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in autocast's type, as for torch's own attention. If ``v`` is ``k``, it stays so."""
    device = q.device.type
    if q.is_meta or q.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    key = k.to(dtype)
    return q.to(dtype), key, key if v is k else v.to(dtype)


def _fused_is_right(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> bool:
    """Whether torch has a fused kernel for this with right gradients: flash attention where cuDNN's could run."""
    width = k.shape[-1]
    fits_flash = v.shape[-1] == width and width <= WIDEST_HEAD and width % 8 == 0
    flash = key_mask is None and fits_flash and torch.backends.cuda.is_flash_attention_available()
    return flash or not _cudnn_may_run(q, k, v)


def _cudnn_may_run(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's attention could take cuDNN's backward pass, whose gradients may be wrong.

    Torch 2.11 keeps cuDNN's plan of the backward pass by the shapes and strides of q, k and v alone. A plan made for
    other strides of the gradient of the output is used again: it reads the wrong elements, or outside of the tensor
    (seen on an H100, cuDNN 9.19). Any attention of the same shapes in the process may have made the plan, so no layout
    of ours helps; and the switches that turn cuDNN off are process-wide.
    """
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and recorded and half and dispatch.is_new(q.device)  # cuDNN's attention takes no older GPU


class _ByChunks(torch.autograd.Function):
    """Attention a few tiles at a time. All operations of the backward pass are differentiable in turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        scale: float,
        cells: tuple[int, int, int, int] | None,
        tiles: int,
    ) -> Tensor:  # by the number of parameters torch.compile knows (2.11) that the context is none of them
        with _without_autocast(q):
            return attend_by_chunks(Problem(q, k, v, key_mask, scale, cells, tiles))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem = Problem(*ctx.saved_tensors, *ctx.options)
        with _without_autocast(grad):
            return *gradients_by_chunks(problem, grad, ctx.needs_input_grad[:3]), None, None, None, None


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast would narrow the products whose sums are in float32."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()
