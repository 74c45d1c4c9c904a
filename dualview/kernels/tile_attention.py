"""Attention inside tiles: torch's version, the operators around the Triton kernels, and the choice between them.

For a query i and a key j of one tile

    S_ij = scale q_i . k_j,    P = softmax_j(S),    O_i = sum_j P_ij v_j,

and the results of queries that belong together may be averaged. Torch's version has two ways. Its own fused kernel does
what it can do. What it cannot do, average inside or spare the gradients of frozen keys, is done a few tiles at a time,
with the scores computed anew in the backward pass, so that the scores of all tiles are never held. The Triton kernel
does plain attention of heads up to `WIDEST_HEAD`.
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
from dualview.tensors import check_attention

WIDEST_HEAD = 256
"""The widest head of flash attention: of torch's and of the Triton kernel."""


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    members: int = 1,
    backend: dispatch.Backend | None = None,
) -> Tensor:
    """Attention of the queries of every tile to the keys of the same tile.

    Args:
        q: Queries of every tile, any strides.
        k: Keys, of as many heads as the queries or of one head that serves all of them.
        v: Values, of as many heads as the keys; may be the keys themselves.
        scale: Factor of the scores, positive.
        key_mask: True for keys that may be attended to. A query without any gives zeros.
        members: Average over so many queries M of a tile, which stand G apart.
        backend: "auto", "torch" or "triton"; None for what `use_backend` or the environment says.

    Shape:
        - q: (B, T, M * G, H, E)
        - k: (B, T, K, H or 1, E), v: (B, T, K, H or 1, V)
        - key_mask: (B or 1, T, K)
        - result: (B, T, G, H, V)

    Raises:
        ValueError: Shapes or types do not fit together, or ``scale`` is not positive.
        RuntimeError: ``backend`` is "triton", and the kernel cannot run.

    Example:
        >>> q, kv = torch.randn(1, 6, 2, 4, 8), torch.randn(1, 6, 3, 1, 8)  # 6 tiles of 2 queries and 3 keys
        >>> tile_attention(q, kv, kv, scale=0.1).shape
        torch.Size([1, 6, 2, 4, 8])
    """
    q, k, v = _of_autocast(q, k, v)
    problem = Problem(q, k, v, key_mask, float(scale), members)
    check_attention(*problem)
    read = (q, k, v) if key_mask is None else (q, k, v, key_mask)
    if dispatch.choose("tile_attention", *read, backend=backend, refused=_refused(problem)).name == "torch":
        return _by_torch(problem)
    k, v = (x.expand(-1, -1, -1, q.shape[3], -1) for x in (k, v))  # torch sums the gradients of a head that all ask
    return cast(Tensor, _attend(q, k, v, key_mask, problem.scale)[0])


def _refused(problem: Problem) -> list[str]:
    """Why the kernel cannot do this."""
    width, of_values = problem.q.shape[-1], problem.v.shape[-1]
    refused = too_wide(width)
    if problem.members > 1:
        refused.append("it averages nothing: average the result of all queries")
    if of_values != width:
        refused.append(f"values of width {of_values} for keys of {width}: make them equally wide")
    return refused


def too_wide(width: int) -> list[str]:
    """Why the kernel takes no heads of a width; empty if it does."""
    return [] if width <= WIDEST_HEAD else [f"heads of width {width}: use more heads, of at most {WIDEST_HEAD}"]


def _of_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in autocast's type, as for torch's own attention. If ``v`` is ``k``, it stays so."""
    device = q.device.type
    if q.is_meta or q.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    key = k.to(dtype)
    return q.to(dtype), key, key if v is k else v.to(dtype)


# --- By torch --------------------------------------------------------------------------------------------------------


def _by_torch(problem: Problem) -> Tensor:
    """The result; any number of times differentiable where it is made by chunks."""
    q, k, v, key_mask, scale, members = problem
    in_cache = v is k and q.device.type in SCORES_AT_ONCE
    wide = q.is_cuda and q.shape[-1] > WIDEST_HEAD  # for which no fused kernel is fast
    if members > 1 or in_cache or wide or not _fused_is_right(problem):
        of_its_own = v.view_as(v)  # torch.compile refuses a function of the same tensor twice
        return cast(Tensor, _ByChunks.apply(q, k, of_its_own, key_mask, scale, members))
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
    by_query = found.reshape(found.shape[0], q.shape[3], q.shape[2], found.shape[3])  # which copies nothing
    out: Tensor = by_query.unflatten(0, q.shape[:2])
    return by_head(out if alive is None else out.masked_fill(~alive, 0.0))


def _fused_is_right(problem: Problem) -> bool:
    """Whether torch has a fused kernel for this with right gradients: flash attention where cuDNN's could run."""
    q, k, v, key_mask = problem[:4]
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
        members: int,
    ) -> Tensor:  # by the number of parameters torch.compile knows (2.11) that the context is none of them
        with _without_autocast(q):
            return attend_by_chunks(Problem(q, k, v, key_mask, scale, members))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem = Problem(*ctx.saved_tensors, *ctx.options)
        with _without_autocast(grad):
            return *gradients_by_chunks(problem, grad, ctx.needs_input_grad[:3]), None, None, None


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast would narrow the products whose sums are in float32."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


# --- By Triton -------------------------------------------------------------------------------------------------------

PROBLEM = "Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale"


@torch.library.custom_op("dualview::tile_attention", mutates_args=(), schema=f"({PROBLEM}) -> (Tensor, Tensor)")
def _attend(*given: Any) -> tuple[Tensor, Tensor]:
    """The result and, for the backward pass, ``lse``: (B, T, G, H)."""
    problem = Problem(*given)
    if dispatch.runs_on(problem.q):
        from dualview.kernels.tile_attention_triton import forward

        return forward(problem)
    return attend_by_chunks(problem).contiguous(), problem.q.new_zeros(problem.q.shape[:-1], dtype=torch.float32)


@_attend.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "dualview::tile_attention_backward",
    mutates_args=(),
    schema=f"({PROBLEM}, Tensor out, Tensor lse, Tensor grad, bool of_keys) -> Tensor[]",
)
def _attend_backward(*given: Any) -> list[Tensor]:
    """The gradient of q and, if asked for, those of k and v."""
    problem, (out, lse, grad, of_keys) = Problem(*given[:5]), given[5:]
    if dispatch.runs_on(problem.q):
        from dualview.kernels.tile_attention_triton import backward

        return backward(problem, out, lse, grad, of_keys)
    return [x.contiguous() for x in gradients_by_chunks(problem, grad, (True, of_keys, of_keys)) if x is not None]


@_attend_backward.register_fake
def _(*given: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (given[:3] if given[-1] else given[:1])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    of_keys = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dq, *others = _attend_backward(*tensors, ctx.scale, out, lse, grad, of_keys)
    return dq, *(others or (None, None)), None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        'the Triton kernel of tile_attention has no second derivative: use backend="torch", within '
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), for torch's fused kernels have none, either."
    )


_attend.register_autograd(_backward, setup_context=_save)
_attend_backward.register_autograd(_refuse)
