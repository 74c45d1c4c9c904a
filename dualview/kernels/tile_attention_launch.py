"""Launches of the tile attention kernels: which run, and in blocks of which size. Imports triton.

Heads of up to 256 columns are held whole. Of wider ones 64 rows do not fit: 64 x 1024 sums in float32 are 256 KiB, all
registers of a multiprocessor. Two ways out, in operations (multiplications and additions) and in bytes of half
precision that are read, per pair of a query and a key at E = V = 1024, where 2 E + 2 V = 4096 operations are due:

* 32 rows with all columns: 4096 operations; 2 E / 32 + 2 E / 64 + 2 V / 32 = 160 bytes for keys, for queries anew with
  every block of 64 keys, and for values;
* 64 rows with 512 columns, and the scores worked out once per chunk: 2 * 2 E + 2 V = 6144 operations;
  2 * (2 E / 64 + 2 E / 64 + 2 * 512 / 64) = 160 bytes, but the matrix units are fully used by 64 rows only.

An H200 does 4096 operations a clock per multiprocessor and reads at most 64 bytes from its second cache: both wait for
memory, for 2.5 clocks a pair. Which is faster is tried on the GPU. Backward likewise, for dq and dk 6144 operations and
256 bytes or 10240 and 288, for dv 4096 and 160 or 6144 and 160; delta, with pooling only, 4096 and 192 or 128.

With pooling, weights of several queries are added before they meet the values, which needs `lse` first: a pass over the
keys for it, 2 E, then one of 2 E + 2 V operations; 2 E + 2 V / M where the M queries of a row ask the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualview.kernels import dispatch
from dualview.kernels import tile_attention_triton as kernels
from dualview.kernels.tile_attention_plain import Problem

BOTH_FIT = 128
"""Widest head for which the sums of dk and of dv are held together."""
WIDE = 256
"""Widest head that is held whole."""
LOG2_E = 1.4426950408889634


def forward(problem: Problem, out_tokens: int, keep_lse: bool) -> tuple[Tensor, Tensor]:
    """The result, and ``lse`` if it is to be kept: (B, P, M, R, H), or nothing."""
    problem = _arranged(problem)
    q, v, (p, m, r) = problem.q, problem.v, problem.q_at.shape
    heads, width = q.shape[2], v.shape[-1]
    out = dispatch.empty(q.shape[0], out_tokens, heads, width, like=q)
    pooled = m > 1
    shape = (q.shape[0], p, m, r, heads) if keep_lse or pooled else (0,)
    lse = dispatch.empty(*shape, like=q, dtype=torch.float32)
    if out.numel() == 0:  # and nothing to try blocks on
        pass
    elif pooled:
        _by_rows(kernels.attend, problem, (lse, out), (out_tokens,), 1, p * m, VALUES=False, KEEP=True)
        _by_rows(kernels.attend_pooled, problem, (lse, out), (out_tokens,), width, p)
    else:
        _by_rows(kernels.attend, problem, (lse, out), (out_tokens,), width, p, VALUES=True, KEEP=keep_lse)
    return out, lse if keep_lse else dispatch.empty(0, like=lse)


def backward(problem: Problem, grad: Tensor, lse: Tensor, out: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    """Those of the gradients of q, k and v that are needed.

    Without pooling ``out`` gives delta, with the rounding of its type; with pooling a pass over the keys does.
    """
    problem = _arranged(problem)
    q, k, v, (p, m, _) = problem.q, problem.k, problem.v, problem.q_at.shape
    found = [_zeros(x) for x, need in zip((q, k, v), needed, strict=True) if need]
    if grad.numel() == 0 or problem.k_at.numel() == 0:
        return found
    need_q, need_k, need_v = needed
    grad = _rows(grad)
    strides = grad.stride()[:3]
    dq = found[0] if need_q else q
    dk, dv = found[int(need_q)] if need_k else k, found[-1] if need_v else v
    delta = dispatch.empty(*lse.shape, like=lse)
    if out is not None:
        slopes = grad.to(torch.float32, copy=True).mul_(out).sum(-1)
        at = problem.out_at.long()
        delta.copy_(slopes[:, at].masked_fill((at < 0)[..., None], 0.0).unsqueeze(2))
    elif need_q or need_k:
        _by_rows(kernels.query_gradients, problem, (lse, grad, delta, dq), (*strides, 0), 1, p * m, DELTA=True)
    if need_q:
        tokens = (*strides, q.shape[1])
        _by_rows(kernels.query_gradients, problem, (lse, grad, delta, dq), tokens, q.shape[-1], p * m, DELTA=False)
    widths = {name: x.shape[-1] for name, x, need in (("DK", q, need_k), ("DV", v, need_v)) if need}
    both_fit = len(widths) == 2 and max(widths.values()) <= BOTH_FIT
    tiles_p, tiles_m, keys = problem.k_at.shape
    for wanted in [widths] if both_fit else [{name: width} for name, width in widths.items()]:
        flags = {name: name in wanted for name in ("DK", "DV")}
        tensors, tokens, columns = (lse, grad, delta, dk, dv), (*strides, k.shape[1]), max(wanted.values())
        _launch(kernels.key_gradients, problem, tensors, tokens, columns, keys, "BLOCK_K", tiles_p * tiles_m, **flags)
    return found


def _zeros(like: Tensor) -> Tensor:
    """A gradient before it is written: tokens without any keep the zeros, and which these are the GPU alone knows."""
    return dispatch.empty(*like.shape, like=like).zero_()


def _rows(x: Tensor) -> Tensor:
    """With columns side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _arranged(problem: Problem) -> Problem:
    """With what the kernels rely on: columns side by side, tables and mask contiguous."""
    return problem._replace(
        q=_rows(problem.q),
        k=_rows(problem.k),
        v=_rows(problem.v),
        q_at=problem.q_at.contiguous(),
        k_at=problem.k_at.contiguous(),
        out_at=problem.out_at.contiguous(),
        key_mask=None if problem.key_mask is None else problem.key_mask.contiguous(),
    )


def _heads_together(problem: Problem) -> int:
    """Heads whose rows one program holds: all where they ask the same keys."""
    return problem.q.shape[2] if problem.k.shape[2] == 1 else 1


def _by_rows(
    kernel: Any,
    problem: Problem,
    tensors: Sequence[Tensor],
    strides: Sequence[int],
    columns: int,
    times: int,
    **flags: bool,
) -> None:
    """A program for every block of the rows of ``times`` tiles."""
    rows = problem.q_at.shape[2] * _heads_together(problem)
    _launch(kernel, problem, tensors, strides, columns, rows, "BLOCK_R", times, **flags)


def _launch(
    kernel: Any,
    problem: Problem,
    tensors: Sequence[Tensor],
    strides: Sequence[int],
    columns: int,
    places: int,
    block: str,
    tiles: int,
    **flags: bool,
) -> None:
    """A program for every chunk of ``columns``, block of ``places``, group of heads, tile and image."""
    q, k, v, mask = problem.q, problem.k, problem.v, problem.key_mask
    batch, _, heads, width = q.shape
    groups = heads // _heads_together(problem)

    def grid(config: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(columns, config["CHUNK"]) * triton.cdiv(places, config[block])
        return (blocks * groups * tiles * batch,)

    purpose = (_heads_together(problem), columns == 1, *flags.items())
    sizes = (*problem.q_at.shape, problem.k_at.shape[2], heads, *problem.k_at.shape[:2])
    if dispatch.interpreting():  # of which the one of triton 3.6 cannot count up to a tensor, with numpy 2.4
        sizes = tuple(tl.constexpr(size) for size in sizes)
    bits = q if mask is None else mask.view(torch.uint8)
    with torch.cuda.device_of(q):
        tuned(kernel, max(width, v.shape[-1]), q.element_size(), block, *purpose)[grid](
            *(q, k, v, problem.q_at, problem.k_at, problem.out_at, bits, *tensors),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], bits.stride(0) if bits.shape[0] > 1 else 0, *strides),
            *(*sizes, problem.scale * LOG2_E),
            E=width,
            V=v.shape[-1],
            HEADS=_heads_together(problem),
            MASKED=mask is not None,
            UPCAST=dispatch.interpreting(),
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            COLUMNS=columns,
            **flags,
        )


@cache
def tuned(kernel: Any, width: int, size: int, own: str, *purpose: object) -> Any:
    """The kernel for heads of a width and numbers of ``size`` bytes, with the block sizes to try at its first call.

    ``purpose`` is whatever else makes a program of its own: each finds its own block sizes.

    What a block needs of the 227 KiB of shared memory, at the widest; buffers count twice while the next is loaded:

    * to 128 columns, half precision: own rows of two operands, 2 * 128 * 128 * 2 bytes = 64 KiB; two others,
      2 * 2 * 64 * 128 * 2 = 64 KiB
    * to 256: 2 * 64 * 256 * 2 = 64 KiB and 2 * 2 * 64 * 256 * 2 = 128 KiB
    * wider: values, 64 * 1024 * 2 = 128 KiB or 64 * 512 * 2 = 64 KiB; pieces of two operands for the scores,
      (64 + 64) * 64 * 2 = 16 KiB, twice before the values come
    * float32: 32 * 512 * 4 = 64 KiB and 2 * 32 * 32 * 4 = 8 KiB

    Compiled for an H200, by Triton 3.6 as by 3.9, no kernel needs more than 193 KiB.
    """
    other = "BLOCK_K" if own == "BLOCK_R" else "BLOCK_R"
    whole = triton.next_power_of_2(max(width, 16))

    def config(rows: int, others: int, step: int, chunk: int, warps: int, stages: int) -> Any:
        sizes = {own: rows, other: others, "STEP": step, "CHUNK": min(chunk, whole)}
        return triton.Config(sizes, num_warps=warps, num_stages=stages)

    if dispatch.interpreting():  # it cannot measure, and so takes one
        configs = [config(32, 32, 32, 64, 4, 1) if width <= WIDE else config(32, 32, 64, 512, 4, 1)]
    elif size == 4:
        configs = [config(32, 32, 32, 512, 4 if width <= BOTH_FIT else 8, 2)]
    elif width <= BOTH_FIT:
        configs = [config(64, 64, whole, whole, 4, 3), config(128, 64, whole, whole, 8, 3)]
    elif width <= WIDE:
        configs = [config(64, 64, whole, whole, 8, 2), config(64, 32, whole, whole, 4, 2)]
    else:
        configs = [config(32, 64, 64, 1024, 8, 3), config(64, 64, 64, 512, 8, 3)]
    return triton.autotune(configs, key=[])(kernel)
