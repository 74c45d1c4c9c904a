"""Attention inside tiles, with tokens in any order: tables say where the tokens of a tile lie.

One row of the result is

    out[b, out_at[p, r], h] = mean over m of softmax_j(scale q[b, q_at[p, m, r], h] . k[b, k_at[p, m, j], h]) v[b, ...]

Unpooled attention has M = 1 and a tile for every p. Average pooling of the result is taken inside: over M tiles whose
queries at one place make one row (P = 1), or over the M queries of a cell that all ask one tile.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dualview.kernels import dispatch
from dualview.kernels import tile_attention_plain as plain
from dualview.kernels.tile_attention_plain import Problem


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_at: Tensor,
    k_at: Tensor,
    out_at: Tensor,
    out_tokens: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    backend: dispatch.Backend | None = None,
) -> Tensor:
    """Attention of queries to the keys of their tile, and the mean over M of what they collect.

    No query, key or result is copied into another order. The tables are checked where they are on the CPU; those on
    another device are taken as they are, so make and check them on the CPU (`check_tables`) and move them.

    Args:
        q: Queries, in any order and with any strides; so are keys and values.
        k: Keys, one head for each of the queries' or one for all of them.
        v: Values with as many heads as the keys; may be the keys themselves.
        q_at: Tokens of ``q``, each named once at most; -1 for no query, which adds zeros to the mean.
        k_at: Tokens of ``k`` and ``v``; -1 for no key. Each is a key of one tile only: where p or m does not matter
            to the keys, that dimension is 1.
        out_at: Tokens of the result, each named exactly once; -1 for none.
        out_tokens: Number of tokens of the result.
        scale: Factor of the scores, positive.
        key_mask: True for keys that may be attended to. A row without any is zero, and so is its gradient.
        backend: "auto", "torch" or "triton"; None for what `use_backend` or the environment says.

    Shape:
        - q: (B, Nq, H, E); k: (B, Nk, H or 1, E); v: (B, Nk, H or 1, V); key_mask: (B or 1, Nk)
        - q_at: (P, M, R); k_at: (P or 1, M or 1, K); out_at: (P, R); all int32
        - result: (B, out_tokens, H, V)

    Raises:
        ValueError: Shapes, types, devices or tables do not fit together, or ``scale`` is not positive.
        RuntimeError: ``backend`` is "triton", and the kernel cannot run.

    Example:
        >>> q, kv = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 1, 8)  # two tiles of two queries and three keys
        >>> q_at, k_at = torch.arange(4, dtype=torch.int32), torch.arange(6, dtype=torch.int32)
        >>> out_at = q_at.view(2, 2)
        >>> tile_attention(q, kv, kv, q_at.view(2, 1, 2), k_at.view(2, 1, 3), out_at, 4, scale=0.1).shape
        torch.Size([1, 4, 2, 8])
    """
    q, k, v = _of_autocast(q, k, v)
    _check(q, k, v, q_at, k_at, out_at, scale, key_mask)
    if q_at.device.type == "cpu" and not torch.compiler.is_compiling():
        check_tables(q_at, k_at, out_at, q.shape[1], k.shape[1], out_tokens)
    problem = Problem(q, k, v, q_at, k_at, out_at, key_mask, float(scale))
    read = (q, k, v) if key_mask is None else (q, k, v, key_mask)
    if dispatch.choose("tile_attention", *read, backend=backend).name == "torch":
        return plain.attend(problem, out_tokens)
    keep_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out: Tensor
    out, _ = _attend(*problem, out_tokens, keep_lse)
    return out


def check_tables(q_at: Tensor, k_at: Tensor, out_at: Tensor, q_tokens: int, k_tokens: int, out_tokens: int) -> None:
    """Whether the tables of `tile_attention` name tokens as they must; reads them, so keep them on the CPU for it.

    Raises:
        ValueError: A table names a token that there is not, or one twice, or the result has one that none names.
    """
    for name, table, tokens, rule in (
        ("q_at", q_at, q_tokens, "a query asks once at most. Repeat it in q for every time that it is to ask"),
        ("k_at", k_at, k_tokens, "a key belongs to one tile. Let k_at have 1 where p or m does not matter"),
        ("out_at", out_at, out_tokens, "all are named once. Set out_tokens to how many there are"),
    ):
        named = table.flatten().sort().values.tolist()
        if named and not -1 <= named[0] <= named[-1] < tokens:
            raise ValueError(
                f"{name} names tokens from {named[0]} to {named[-1]} of {tokens}: they are numbered from 0, and -1 "
                "stands for none."
            )
        found = [token for token in named if token >= 0]
        twice = [a for a, b in pairwise(found) if a == b]
        if twice or (name == "out_at" and len(found) != tokens):
            what = f"token {twice[0]} twice" if twice else f"{len(found)} of the {tokens} tokens of the result"
            raise ValueError(f"{name} names {what}: {rule}.")


def _of_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All of the type that autocast wants, as for torch's own attention; ``v is k`` kept."""
    device = q.device.type
    if q.is_meta or q.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    key = k.to(dtype)
    return q.to(dtype), key, key if v is k else v.to(dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, out_at: Tensor, scale: float, key_mask: Tensor | None
) -> None:
    """Raise a ValueError where shapes, types, devices or the scale do not fit."""
    if (
        not q.dim() == k.dim() == v.dim() == 4
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or k.shape[:3] != v.shape[:3]
        or k.shape[2] not in (1, q.shape[2])
        or not q.dtype == k.dtype == v.dtype
    ):
        given = ", ".join(f"{n} {tuple(x.shape)} of {x.dtype}" for n, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(
            f"tile_attention got {given}: they must be (B, Nq, H, E), (B, Nk, H or 1, E) and (B, Nk, H or 1, V), "
            "with as many heads in k as in v, and of one type. Cast them, or call it under torch.autocast."
        )
    tables = (("q_at", q_at), ("k_at", k_at), ("out_at", out_at))
    if (
        [x.dim() for _, x in tables] != [3, 3, 2]
        or q_at.shape[::2] != out_at.shape
        or any(k_at.shape[dim] not in (1, q_at.shape[dim]) for dim in (0, 1))
        or any(x.dtype != torch.int32 for _, x in tables)
    ):
        given = ", ".join(f"{n} {tuple(x.shape)} of {x.dtype}" for n, x in tables)
        raise ValueError(
            f"tile_attention got {given}: the tables must be (P, M, R), (P or 1, M or 1, K) and (P, R), and of "
            "torch.int32."
        )
    if key_mask is not None and (
        key_mask.dtype != torch.bool or tuple(key_mask.shape) not in ((1, k.shape[1]), tuple(k.shape[:2]))
    ):
        raise ValueError(
            f"tile_attention got key_mask {tuple(key_mask.shape)} of {key_mask.dtype}: it must be boolean, True for "
            f"keys that may be attended to, of shape ({k.shape[0]} or 1, {k.shape[1]})."
        )
    devices = {str(x.device) for x in (q, k, v, q_at, k_at, out_at, key_mask) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tile_attention got tensors on {', '.join(sorted(devices))}: move them to one device.")
    if not scale > 0:
        raise ValueError(f"scale={scale}: must be positive; usual is E ** -0.5 = {q.shape[3] ** -0.5:.4g}.")


@torch.library.custom_op("dualview::tile_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_at: Tensor,
    k_at: Tensor,
    out_at: Tensor,
    key_mask: Tensor | None,
    scale: float,
    out_tokens: int,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The kernels' result, and if it is to be kept ``lse`` for the backward pass: (B, P, M, R, H)."""
    problem = Problem(q, k, v, q_at, k_at, out_at, key_mask, scale)
    if dispatch.runs_on(q):
        from dualview.kernels.tile_attention_launch import forward

        return forward(problem, out_tokens, keep_lse)
    return plain.attend(problem, out_tokens), q.new_zeros(_lse_shape(q, q_at, keep_lse), dtype=torch.float32)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out_tokens, keep_lse = rest[-2:]
    lse = q.new_empty(_lse_shape(q, q_at, keep_lse), dtype=torch.float32)
    return q.new_empty(q.shape[0], out_tokens, q.shape[2], v.shape[3]), lse


def _lse_shape(q: Tensor, q_at: Tensor, keep: bool) -> tuple[int, ...]:
    return (q.shape[0], *q_at.shape, q.shape[2]) if keep else (0,)


@torch.library.custom_op("dualview::tile_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_at: Tensor,
    k_at: Tensor,
    out_at: Tensor,
    key_mask: Tensor | None,
    scale: float,
    grad: Tensor,
    lse: Tensor,
    out: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    """Those of the gradients of q, k and v that are needed; the result is wanted where M = 1."""
    problem = Problem(q, k, v, q_at, k_at, out_at, key_mask, scale)
    if dispatch.runs_on(q):
        from dualview.kernels.tile_attention_launch import backward

        return backward(problem, grad, lse, out, needed)
    return plain.gradients(problem, grad, needed)


@_attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip((q, k, v), rest[-1], strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _, ctx.keep_lse = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, out if inputs[3].shape[1] == 1 else None)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, lse, out = ctx.saved_tensors
    needed = [grad is not None and need for need in ctx.needs_input_grad]
    if any(needed) and not ctx.keep_lse:
        raise RuntimeError(
            "gradients of a tile_attention that was recorded without any: record or export it with gradients enabled."
        )
    found = iter(_attend_backward(*tensors, ctx.scale, grad, lse, out, needed[:3]) if any(needed) else ())
    return tuple(next(found) if need else None for need in needed)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        'the Triton kernel of tile_attention has no second derivative: use backend="torch", which is any number of '
        "times differentiable."
    )


_attend.register_autograd(_backward, setup_context=_save)
_attend_backward.register_autograd(_refuse)
