"""Attention of a few tiles at a time, against a softmax over all of them at once."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dualview.kernels.chunked_attention import SCORES_AT_ONCE
from dualview.kernels.tile_attention import tile_attention

AVERAGES = (None, "cells", "tiles", "cells and tiles")
TILES, ROWS, KEYS = 6, 12, 5
"""Of every image, of every tile and head, and of every tile."""
CELLS = (2, 1, 2, 3)
"""The queries of a tile as 2 x 2 cells of 1 x 3."""


def at_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, average: str | None) -> Tensor:
    """All scores held at the same time, and the average last."""
    k, v = (x.expand(-1, -1, -1, q.shape[3], -1) for x in (k, v))
    scores = 0.7 * torch.einsum("btqhe,btkhe->btqhk", q, k)
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[:, :, None, None, :]
    weights = torch.where(allowed, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    out = torch.einsum("btqhk,btkhv->btqhv", weights, v)
    if "cells" in (average or ""):
        out = out.unflatten(2, CELLS).mean((3, 5)).flatten(2, 3)
    return out.mean(1, keepdim=True) if "tiles" in (average or "") else out


def queries(heads: int, *, batch: int = 2) -> Tensor:
    return torch.randn(batch, TILES, ROWS, heads, 4, dtype=torch.float64)


def averaging(average: str | None) -> dict[str, Any]:
    """The arguments that ask for an average."""
    average = average or ""
    return {"cells": CELLS if "cells" in average else None, "tiles": TILES if "tiles" in average else 0}


def keys(heads: int, *, batch: int = 2, count: int = KEYS, width: int = 4) -> Tensor:
    return torch.randn(batch, TILES, count, heads, width, dtype=torch.float64)


@pytest.fixture(params=[1, 250, 10**9], ids=["tile by tile", "two at a time", "all at once"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Scores at a time: a tile has 60 of each head."""
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", request.param)
    return request.param


@dataclass
class Call:
    """What is differentiated, and what the functions of it need beside."""

    inputs: list[Tensor]
    average: str | None
    mask: Tensor | None

    def ours(self, q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        options = {"key_mask": self.mask} | averaging(self.average)
        return tile_attention(q, k, k if v is None else v, scale=0.7, **options)

    def reference(self, q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        return at_once(q, k, k if v is None else v, self.mask, self.average)


def a_call(average: str | None, kind: str, *, masked: bool) -> Call:
    """A call on random tensors.

    Args:
        average: Over what is averaged.
        kind: "own" keys and values of every head; "shared": keys of one head that are their own values.
        masked: Whether some keys may not be attended to; one tile has none left.
    """
    mask = torch.rand(2, TILES, KEYS) < 0.6 if masked else None
    if mask is not None:
        mask[0, 2], mask[1, 3, 0] = False, True
    inputs = [queries(2), keys(2 if kind == "own" else 1)]
    if kind == "own":
        inputs.append(keys(2, width=3))
    return Call([x.requires_grad_() for x in inputs], average, mask)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["own", "shared"])
@pytest.mark.parametrize("average", AVERAGES)
def test_equals_all_at_once(average: str | None, kind: str, masked: bool) -> None:
    call = a_call(average, kind, masked=masked)
    out, expected = call.ours(*call.inputs), call.reference(*call.inputs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    pairs = (torch.autograd.grad((x * weight).sum(), call.inputs) for x in (out, expected))
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("average, kind", [(None, "shared"), *product(("cells", "cells and tiles"), ("own", "shared"))])
def test_double_backward(average: str | None, kind: str, masked: bool) -> None:
    call = a_call(average, kind, masked=masked)

    def size_of_gradient(function: Callable[..., Tensor]) -> Tensor:
        gradients = torch.autograd.grad(function(*call.inputs).cos().sum(), call.inputs, create_graph=True)
        return sum(g.square().sum() for g in gradients)

    pairs = (torch.autograd.grad(size_of_gradient(of), call.inputs) for of in (call.ours, call.reference))
    torch.testing.assert_close(*pairs, rtol=1e-8, atol=1e-10)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_gradcheck(heads: int, tiles: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(2, tiles, 3, heads, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, tiles, count, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: tile_attention(q, k, k, scale=0.7), (q, k))


@pytest.mark.parametrize("average", AVERAGES)
def test_no_scores_are_kept(average: str | None) -> None:
    q, k = queries(1).requires_grad_(), keys(1, count=50)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        tile_attention(q, k, k, scale=0.7, **averaging(average))
    assert sorted(kept) == sorted([q.numel(), k.numel(), k.numel()])  # the keys, and the same as values


def test_frozen_keys_cost_no_gradient() -> None:
    q, k = queries(2), keys(1)

    def operations(*wanted: Tensor) -> int:
        out = tile_attention(q, k, k, scale=0.7).sum()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out, wanted)
        return counter.get_total_flops()

    q.requires_grad_()
    one = 2 * q.numel() * KEYS
    assert operations(q) == 3 * one  # scores, gradient of the weights, gradient of the queries
    k.requires_grad_()
    assert operations(q, k) == 5 * one


class Operations(TorchDispatchMode):
    """The operations of torch in a block, with the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, torch.Size | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket, result.shape if isinstance(result, Tensor) else None))
        return result

    def of(self, *kinds: Any) -> list[torch.Size | None]:
        return [shape for func, shape in self.seen if func in kinds]


@pytest.mark.parametrize(
    "average, kind, needed",
    [
        (average, kind, needed)
        for average, kind in [("cells", "own"), ("cells and tiles", "shared"), (None, "shared")]
        for needed in product([False, True], repeat=3 if kind == "own" else 2)
        if any(needed)
    ],
)
def test_what_is_frozen_costs_no_product(average: str | None, kind: str, needed: tuple[bool, ...]) -> None:
    call = a_call(average, kind, masked=False)
    for x, need in zip(call.inputs, needed, strict=True):
        x.requires_grad_(need)
    out = call.ours(*call.inputs).sum()
    with Operations() as operations:
        torch.autograd.grad(out, [x for x in call.inputs if x.requires_grad])
    # Two for the scores and the gradient of the weights, and one for each of q, k and v, of which two may be one.
    products = operations.of(torch.ops.aten.bmm, torch.ops.aten.mm)
    assert len(products) == 2 + sum(needed) + (kind != "own" and needed[1])


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("most, chunks", [(1, [1] * 6), (125, [2, 2, 2]), (250, [4, 2]), (360, [6])])
def test_few_scores_are_held_at_one_time(
    average: str | None, most: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one image, whatever the batch: a tile has 60."""
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", most)
    q, k = queries(1).requires_grad_(), keys(1)
    with Operations() as operations:
        out = tile_attention(q, k, k, scale=0.7, **averaging(average))
        assert [shape[1] for shape in operations.of(torch.ops.aten._softmax)] == chunks
        out.sum().backward()
    assert [shape[1] for shape in operations.of(torch.ops.aten._softmax)] == 2 * chunks


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(average: str | None, dtype: torch.dtype) -> None:
    """Scores of 20 and more stay in float32, as in torch's own kernel."""
    q, k = (x.to(dtype).requires_grad_() for x in (queries(2), keys(1)))
    out = tile_attention(q, k, k, scale=8.0, **averaging(average))
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k))
    exact = at_once(wide[0] * (8.0 / 0.7), wide[1], wide[1], None, average)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2 * eps)
    of_ours, of_exact = torch.autograd.grad(out.sum(), (q, k)), torch.autograd.grad(exact.sum(), wide)
    for ours, expected in zip(of_ours, of_exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1.25 * eps * expected.abs().max())


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_by_torchs_own_kernel_where_there_is_no_cache_to_stay_in(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of their own are never met a few tiles at a time, unless something is averaged."""
    call = a_call(None, kind, masked=True)
    if kind == "own":
        call.inputs[2] = keys(2).requires_grad_()  # as wide as the keys, which is what that kernel takes
    else:
        monkeypatch.delitem(SCORES_AT_ONCE, "cpu")
    with Operations() as operations:
        out = call.ours(*call.inputs)
    fused = [func for func, _ in operations.seen if "scaled_dot_product" in str(func)]
    assert len(fused) == 1
    assert not operations.of(torch.ops.aten.bmm, torch.ops.aten._softmax)
    torch.testing.assert_close(out, call.reference(*call.inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.usefixtures("chunk")
def test_vmap(in_dims: tuple[int | None, int | None]) -> None:
    q, k = (x.unsqueeze(1) for x in (queries(2, batch=3), keys(1, batch=3)))
    q, k = (x if dim == 0 else x[0] for x, dim in zip((q, k), in_dims, strict=True))
    out = torch.func.vmap(lambda q, k: tile_attention(q, k, k, scale=0.7), in_dims=in_dims)(q, k)
    flat = [x.squeeze(1) if dim == 0 else x for x, dim in zip((q, k), in_dims, strict=True)]
    torch.testing.assert_close(out.squeeze(1), at_once(*flat, flat[1], None, None), rtol=1e-10, atol=1e-12)


def test_an_average_over_tiles_reads_no_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that torch.compile generates for a GPU multiply by zero what torch's own pass over."""

    def as_generated(first: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> Tensor:
        return beta * first + alpha * (a @ b)

    q, k = queries(2), keys(1)
    expected = tile_attention(q, k, k, scale=0.7, tiles=TILES)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    monkeypatch.setattr(torch, "baddbmm", as_generated)
    torch.testing.assert_close(tile_attention(q, k, k, scale=0.7, tiles=TILES), expected, rtol=1e-10, atol=1e-12)
