"""Attention inside tiles: torch's version, the operators around the Triton kernels, and the choice between them.

Queries come in groups, and the results of a group may be averaged. For a query i and a key j of one tile

    S_ij = scale q_i . k_j,    P = softmax_j(S),    O_i = sum_j P_ij v_j,    result = mean of O_i over a group.

Torch's version has two ways. Its own fused kernel does what it can do. What it cannot do, average inside or spare the
gradients of frozen keys, is done a few tiles at a time, with the scores computed anew in the backward pass, so that the
scores of all tiles are never held.
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
    gradients_by_chunks,
    keys_and_values,
    mask_and_alive,
    rows_of,
)

WIDEST_FLASH_HEAD = 256


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    key_index: Tensor | None = None,
    over_tiles: bool = False,
    backend: dispatch.Backend | None = None,
) -> Tensor:
    """Attention of the queries of every tile to the keys of the same tile, averaged over groups of queries.

    Args:
        q: Queries of every tile in M x G, averaged over M; any strides.
        k: Keys, of as many heads as the queries or of one head that serves all of them.
        v: Values, of as many heads as the keys; may be the keys themselves.
        scale: Factor of the scores, positive.
        key_mask: True for keys that may be attended to. A query without any gives zeros.
        key_index: For keys that lie in another order: the token that is the j-th key of tile t, each once at most.
        over_tiles: Average over the tiles in place of M, which is 1.
        backend: "auto", "torch" or "triton"; None for what `use_backend` or the environment says.

    Shape:
        - q: (B, T, M, G, H, E)
        - k: (B, T, K, H or 1, E), v: (B, T, K, H or 1, V); with key_index (T, K): (B, N, H or 1, E or V)
        - key_mask: (B or 1, T, K)
        - result: (B, T, G, H, V), or (B, 1, G, H, V) over tiles

    Raises:
        ValueError: Shapes or types do not fit together, or ``scale`` is not positive.
        RuntimeError: ``backend`` is "triton", and the kernel cannot run.

    Example:
        >>> q, kv = torch.randn(1, 6, 1, 2, 4, 8), torch.randn(1, 6, 3, 1, 8)  # 6 tiles of 2 queries and 3 keys
        >>> tile_attention(q, kv, kv, scale=0.1).shape
        torch.Size([1, 6, 2, 4, 8])
    """
    q, k, v = _of_autocast(q, k, v)
    problem = Problem(q, k, v, key_mask, key_index, float(scale), over_tiles)
    _check(problem)
    read = [x for x in problem[:5] if x is not None]
    if dispatch.choose("tile_attention", *read, backend=backend).name == "torch":
        return _by_torch(problem._replace(v=None if v is k else v))
    keep_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return cast(Tensor, _attend(*problem, keep_lse)[0])


def _of_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All of the type that autocast wants, as for torch's own attention; ``v is k`` is kept."""
    device = q.device.type
    if q.is_meta or q.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    key = k.to(dtype)
    return q.to(dtype), key, key if v is k else v.to(dtype)


def _check(problem: Problem) -> None:
    """Raise a ValueError where shapes, types or the scale do not fit."""
    (q, k, _, key_mask, key_index, scale, over_tiles), v = problem, problem.values
    of_tiles = q.shape[:2] if key_index is None else q.shape[:1]
    if (
        q.dim() != 6
        or not k.dim() == v.dim() == len(of_tiles) + 3
        or k.shape[: len(of_tiles)] != of_tiles
        or k.shape[:-1] != v.shape[:-1]
        or k.shape[-2] not in (1, q.shape[4])
        or k.shape[-1] != q.shape[-1]
        or not q.dtype == k.dtype == v.dtype
        or not q.is_floating_point()
    ):
        layout = "(B, T, K, H or 1, E or V)" if key_index is None else "(B, N, H or 1, E or V), for a key_index"
        raise ValueError(
            f"tile_attention got q {_shown(q)}, k {_shown(k)}, v {_shown(v)}: q must be (B, T, M, G, H, E), k and v "
            f"{layout}, with as many heads in k as in v, and all of one floating-point type. Cast them, or call it "
            "under torch.autocast."
        )
    if over_tiles and q.shape[2] != 1:
        raise ValueError(f"tile_attention got q {_shown(q)} and over_tiles=True: q must be (B, T, 1, G, H, E) then.")
    batch, tiles = q.shape[:2]
    if key_index is not None and (
        key_index.dim() != 2 or key_index.shape[0] != tiles or key_index.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"tile_attention got key_index {_shown(key_index)}: it must be integers of shape ({tiles}, K)."
        )
    shapes = [(images, tiles, problem.keys) for images in (1, batch)]
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) not in shapes):
        raise ValueError(
            f"tile_attention got key_mask {_shown(key_mask)}: it must be boolean, True for keys that may be attended "
            f"to, of shape ({batch} or 1, {tiles}, {problem.keys})."
        )
    if not scale > 0:
        raise ValueError(f"tile_attention got scale={scale}: it must be positive, such as E ** -0.5.")


def _shown(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"


# --- By torch --------------------------------------------------------------------------------------------------------


def _by_torch(problem: Problem) -> Tensor:
    """The result, differentiable any number of times."""
    q, k, v, key_mask, _, scale, over_tiles = problem
    in_cache = v is None and q.device.type in SCORES_AT_ONCE
    if over_tiles or q.shape[2] > 1 or in_cache or not _fused_is_right(problem):
        return cast(Tensor, _ByChunks.apply(*problem))
    rows, (keys, values) = rows_of(q), keys_and_values(problem, slice(None))
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
    by_head: Tensor = found.flatten(1, 2).unflatten(1, (q.shape[4], q.shape[3])).unflatten(0, q.shape[:2])
    by_head = by_head if alive is None else by_head.masked_fill(~alive, 0.0)
    return by_head.transpose(2, 3)


def _fused_is_right(problem: Problem) -> bool:
    """Whether torch has a fused kernel for this with right gradients: flash attention where cuDNN's could run."""
    q, k, v, key_mask = problem[:4]
    width = k.shape[-1]
    fits_flash = (v is None or v.shape[-1] == width) and width <= WIDEST_FLASH_HEAD and width % 8 == 0
    flash = key_mask is None and fits_flash and torch.backends.cuda.is_flash_attention_available()
    return flash or not _cudnn_may_run(q, k, v)


def _cudnn_may_run(q: Tensor, k: Tensor, v: Tensor | None) -> bool:
    """Whether torch's attention could take cuDNN's backward pass, whose gradients may be wrong.

    Torch 2.11 keeps cuDNN's plan of the backward pass by the shapes and strides of q, k and v alone. A plan made for
    other strides of the gradient of the output is used again: it reads the wrong elements, or outside of the tensor
    (seen on an H100, cuDNN 9.19). Any attention of the same shapes in the process may have made the plan, so no layout
    of ours helps; and the switches that turn cuDNN off are process-wide.
    """
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v))
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and recorded and half and dispatch.is_new(q.device)  # cuDNN's attention takes no older GPU


class _ByChunks(torch.autograd.Function):
    """Attention a few tiles at a time. All operations of the backward pass are differentiable in turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        key_mask: Tensor | None,
        key_index: Tensor | None,
        scale: float,
        over_tiles: bool,
    ) -> Tensor:  # by the number of parameters torch.compile knows (2.11) that the context is none of them
        with _without_autocast(q):
            return attend_by_chunks(Problem(q, k, v, key_mask, key_index, scale, over_tiles))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.over_tiles = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, key_index = ctx.saved_tensors
        problem = Problem(q, k, v, key_mask, key_index, ctx.scale, ctx.over_tiles)
        with _without_autocast(grad):
            return *gradients_by_chunks(problem, grad, ctx.needs_input_grad[:3]), None, None, None, None


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast would narrow the products whose sums are in float32."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


# --- By Triton -------------------------------------------------------------------------------------------------------

PROBLEM = "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? key_index, float scale, bool over_tiles"
FORWARD = f"({PROBLEM}, bool keep_lse) -> (Tensor, Tensor)"
BACKWARD = f"({PROBLEM}, Tensor grad, Tensor lse, Tensor? out, bool[] needed) -> Tensor[]"


@torch.library.custom_op("dualview::tile_attention", mutates_args=(), schema=FORWARD)
def _attend(*given: Any) -> tuple[Tensor, Tensor]:
    """The result and, if it is kept for the backward pass, ``lse``: (B, T, M, G, H)."""
    problem, keep_lse = Problem(*given[:-1]), given[-1]
    if dispatch.runs_on(problem.q):
        from dualview.kernels.tile_attention_triton import forward

        return forward(problem, keep_lse)
    lse = problem.q.new_zeros(problem.q.shape[:5] if keep_lse else (0,), dtype=torch.float32)
    return attend_by_chunks(problem).contiguous(), lse


@_attend.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    q, _, v, _, _, _, over_tiles, keep_lse = given
    lse = q.new_empty(q.shape[:5] if keep_lse else (0,), dtype=torch.float32)
    return q.new_empty(q.shape[0], 1 if over_tiles else q.shape[1], *q.shape[3:5], v.shape[-1]), lse


@torch.library.custom_op("dualview::tile_attention_backward", mutates_args=(), schema=BACKWARD)
def _attend_backward(*given: Any) -> list[Tensor]:
    """Those of the gradients of q, k and v that are needed; ``out`` is given where nothing is averaged."""
    problem, (grad, lse, out, needed) = Problem(*given[:7]), given[7:]
    if dispatch.runs_on(problem.q):
        from dualview.kernels.tile_attention_triton import backward

        return backward(problem, grad, lse, out, needed)
    found = gradients_by_chunks(problem, grad, needed)
    return [x.contiguous() for x, need in zip(found, needed, strict=True) if need and x is not None]


@_attend_backward.register_fake
def _(*given: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip(given[:3], given[-1], strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.over_tiles, ctx.keep_lse = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    averaged = ctx.over_tiles or inputs[0].shape[2] > 1
    ctx.save_for_backward(*tensors, lse, None if averaged else out)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, lse, out = ctx.saved_tensors
    needed = [grad is not None and need for need in ctx.needs_input_grad]
    if any(needed) and not ctx.keep_lse:
        raise RuntimeError(
            "gradients of a tile_attention that was recorded without any: record or export it with gradients enabled."
        )
    given = (*tensors, ctx.scale, ctx.over_tiles, grad, lse, out, needed[:3])
    found = iter(_attend_backward(*given) if any(needed) else ())
    return tuple(next(found) if need else None for need in needed)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        'the Triton kernel of tile_attention has no second derivative: use backend="torch", which is any number of '
        "times differentiable."
    )


_attend.register_autograd(_backward, setup_context=_save)
_attend_backward.register_autograd(_refuse)
