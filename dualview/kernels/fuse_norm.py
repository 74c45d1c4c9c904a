"""What follows the bottlenecks of the released fusion, in one pass: concatenation, residuals, LayerNorm, readout.

Bytes, for N tokens of width D in cells of G tokens, times the itemsize: forward 3 N D read (two maps, two halves) and
N D / G written, where torch's operators one by one move 10 N D, and N D + N D / G more to read out cells. Backward
3 N D + N D / G read and N D written (one gradient serves both maps and, by halves, both bottlenecks), and 8 D bytes
for each of at most 1024 partial sums of the gradients of weight and bias. Nothing but the inputs is kept in between.
576 live tokens, D = 1024, bfloat16, G = 1: 4.7 MB forward, so 1.0 us at 4.8 TB/s; a batch of 32: 151 MB and 31 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.kernels import dispatch


def fuse_norm(
    v_loc: Tensor,
    v_glo: Tensor,
    b_loc: Tensor,
    b_glo: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    cell: Sequence[int] = (1, 1),
    eps: float = 1e-5,
    backend: dispatch.Backend | None = None,
) -> Tensor:
    """LayerNorm([b_loc; b_glo] + v_glo + v_loc), averaged over cells of neighbouring tokens.

    Args:
        v_loc: The enhanced local map.
        v_glo: The enhanced global map.
        b_loc: The bottleneck's output for ``v_loc``.
        b_glo: The bottleneck's output for ``v_glo``.
        weight: Weight of the LayerNorm.
        bias: Bias of the LayerNorm.
        cell: Rows and columns of tokens that are averaged to one.
        eps: Added to the variance.
        backend: See `dualview.kernels.dispatch`.

    Shape:
        - v_loc, v_glo: (..., r*h, s*w, D); b_loc, b_glo: (..., r*h, s*w, D / 2); weight, bias: (D); cell: (r, s)
        - result: (..., h, w, D)

    Raises:
        ValueError: The shapes do not fit each other or the cell.
        RuntimeError: "triton" was asked for and cannot run.
    """
    *batch, height, width, dim = v_loc.shape
    half = (*batch, height, width, dim // 2)
    if (
        v_glo.shape != v_loc.shape
        or not b_loc.shape == b_glo.shape == half
        or not weight.shape == bias.shape == (dim,)
        or dim % 2
        or min(cell) < 1
        or height % cell[0]
        or width % cell[1]
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (v_loc, v_glo, b_loc, b_glo, weight, bias))
        raise ValueError(
            f"fuse_norm got {shapes} for cells of {tuple(cell)}: two maps (..., r*h, s*w, D) of even width, two of "
            "half that width, weight and bias (D), and a cell (r, s)."
        )
    tensors = (v_loc, v_glo, b_loc, b_glo, weight, bias)
    if dispatch.choose("fuse_norm", *tensors, backend=backend).name == "torch":
        return _plain(tensors, cell[0], cell[1], eps)
    # LayerNorm is computed, and its result kept, in float32 under autocast.
    cast = torch.is_autocast_enabled(v_loc.device.type)
    dtype = torch.float32 if cast else _widest(*tensors[:4])
    maps = [x.reshape(v_loc.shape[:-3].numel(), *x.shape[-3:]) for x in tensors[:4]]
    fused: Tensor = _fuse_norm(*maps, weight, bias, cell[0], cell[1], eps, dtype)
    return fused.reshape(*batch, *fused.shape[1:])


def _widest(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _sum(v_loc: Tensor, v_glo: Tensor, b_loc: Tensor, b_glo: Tensor) -> Tensor:
    return torch.cat([b_loc, b_glo], dim=-1) + v_glo + v_loc


def _plain(tensors: Sequence[Tensor], r: int, s: int, eps: float) -> Tensor:
    """The same by torch."""
    *maps, weight, bias = tensors
    normed = F.layer_norm(_sum(*maps), weight.shape, weight, bias, eps)
    if r == s == 1:
        return normed
    cells: Tensor = normed.unflatten(-2, (-1, s)).unflatten(-4, (-1, r))
    return cells.mean((-4, -2))


@torch.library.custom_op("dualview::fuse_norm", mutates_args=())
def _fuse_norm(
    v_loc: Tensor,
    v_glo: Tensor,
    b_loc: Tensor,
    b_glo: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: int,
    s: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    tensors = (v_loc, v_glo, b_loc, b_glo, weight, bias)
    if not dispatch.runs_on(v_loc):
        return _plain([x.to(dtype) for x in tensors], r, s, eps)
    from dualview.kernels.fuse_norm_triton import forward

    return forward([x.contiguous() for x in tensors], r, s, eps, dtype)


@_fuse_norm.register_fake
def _(
    v_loc: Tensor,
    v_glo: Tensor,
    b_loc: Tensor,
    b_glo: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: int,
    s: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    batch, height, width, dim = v_loc.shape
    return v_loc.new_empty((batch, height // r, width // s, dim), dtype=dtype)


@torch.library.custom_op("dualview::fuse_norm_backward", mutates_args=())
def _fuse_norm_backward(
    grad: Tensor,
    v_loc: Tensor,
    v_glo: Tensor,
    b_loc: Tensor,
    b_glo: Tensor,
    weight: Tensor,
    r: int,
    s: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum that is normalised, and (2, D), in float32, of weight and bias."""
    tensors = (grad, v_loc, v_glo, b_loc, b_glo, weight)
    dtype = _widest(v_loc, v_glo, b_loc, b_glo)
    if dispatch.runs_on(v_loc):
        from dualview.kernels.fuse_norm_triton import backward

        return backward([x.contiguous() for x in tensors], r, s, eps, dtype)
    of_cells, *maps, weight = (x.to(dtype) for x in tensors)
    of_tokens = (of_cells / (r * s)).repeat_interleave(r, 1).repeat_interleave(s, 2)
    z, shape = _sum(*maps), list(weight.shape)
    _, mean, rstd = torch.native_layer_norm(z, shape, weight, None, eps)
    of_sum, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        of_tokens, z, shape, mean, rstd, weight, weight, [True, True, True]
    )
    return of_sum, torch.stack([of_weight, of_bias]).float()


@_fuse_norm_backward.register_fake
def _(
    grad: Tensor,
    v_loc: Tensor,
    v_glo: Tensor,
    b_loc: Tensor,
    b_glo: Tensor,
    weight: Tensor,
    r: int,
    s: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    of_sum = v_loc.new_empty(v_loc.shape, dtype=_widest(v_loc, v_glo, b_loc, b_glo))
    return of_sum, weight.new_empty((2, *weight.shape), dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, ctx.r, ctx.s, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    v_loc, v_glo, b_loc, b_glo, weight = ctx.saved_tensors
    of_sum, (of_weight, of_bias) = _fuse_norm_backward(grad, v_loc, v_glo, b_loc, b_glo, weight, ctx.r, ctx.s, ctx.eps)
    half = b_loc.shape[-1]
    shares = of_sum, of_sum, of_sum[..., :half], of_sum[..., half:]
    of_maps = (share.to(x.dtype) for share, x in zip(shares, (v_loc, v_glo, b_loc, b_glo), strict=True))
    return *of_maps, of_weight.to(weight.dtype), of_bias.to(ctx.bias_dtype), None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        'the kernel fuse_norm has no second derivative: compute with backend="torch" what is differentiated twice.'
    )


_fuse_norm.register_autograd(_backward, setup_context=_remember)
_fuse_norm_backward.register_autograd(_no_second_derivative)
