"""Attention of a few tiles at a time, against a softmax over all of them at once."""

from collections.abc import Callable
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

import dualview as dv
from dualview.ops import attend
from dualview.ops.attend import attend_rows
from dualview.ops.gather import Pooling

GRID, TOKENS = (2, 3), (4, 6)


def pooling(over: str) -> Pooling:
    """The pooling of one direction of the paper's module on a grid of 2 x 3 tiles of 4 x 6 tokens."""
    plan = dv.DualPerspectiveEnhance.paper(8).plan(GRID, TOKENS)
    (direction,) = (d for d in plan.directions if d.pool == over)
    return Pooling(direction, dv.TileGrid.of(GRID), TOKENS)


def average(x: Tensor, over: str | None) -> Tensor:
    """Mean of every cell of attended tokens (B, 6, heads, 24, V), token by token."""
    if over is None:
        return x
    if over == "tiles":
        return sum(x[:, t] for t in range(6)).unsqueeze(1) / 6
    cells = [
        sum(x[:, :, :, (2 * r + i) * 6 + 3 * c + j] for i in range(2) for j in range(3)) / 6
        for r in range(2)
        for c in range(2)
    ]
    return torch.stack(cells, dim=3)


def at_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, over: str | None) -> Tensor:
    """All scores held at the same time, and the average last."""
    scores = torch.einsum("bthqe,bthke->bthqk", q, k.expand(-1, -1, q.shape[2], -1, -1)) * scale
    if mask is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~mask[:, :, None, None], -1e30)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True) if mask is None else scores.softmax(-1)
    if mask is not None:
        weights = weights * mask.any(-1)[:, :, None, None, None]
    return average(torch.einsum("bthqk,bthkv->bthqv", weights, v.expand(-1, -1, q.shape[2], -1, -1)), over)


def tensors(heads: int, *, shared: bool, batch: int = 2, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 6, heads, 24, 4, dtype=torch.float64)
    k = torch.randn(batch, 6, 1 if shared else heads, keys, 4, dtype=torch.float64)
    return q, k, k if shared else torch.randn(*k.shape[:-1], 3, dtype=torch.float64)


@pytest.fixture(params=[1, 250, 10**9], ids=["tile by tile", "two at a time", "all at once"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Scores at a time: a tile has 120 of each head."""
    monkeypatch.setitem(attend.SCORES_AT_ONCE, "cpu", request.param)
    return request.param


def case(over: str | None, *, keys: str, masked: bool) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """What is differentiated, and a function of it: ours, or all at once."""
    q, k, v = tensors(2, shared=keys != "own")
    places = torch.randperm(40)[:30].view(6, 5) if keys == "elsewhere" else None
    mask = torch.rand(2, 6, 5) < 0.6 if masked else None
    if mask is not None:
        mask[0, 2], mask[1, 3, 0] = False, True  # a tile without any key, and one with
    pool = None if over is None else pooling(over)

    def run(q: Tensor, k: Tensor, v: Tensor | None = None, *, plain: bool = False) -> Tensor:
        if not plain:
            return attend_rows(q, k, k if v is None else v, mask, 0.7, pool, places)
        k = k if places is None else k[:, places].unsqueeze(2)
        return at_once(q, k, k if v is None else v, mask, 0.7, over)

    if places is not None:
        k = torch.randn(2, 40, 4, dtype=torch.float64)  # of which ten are no keys
    return tuple(x.requires_grad_() for x in ((q, k, v) if keys == "own" else (q, k))), run


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", ["own", "shared", "elsewhere"])
@pytest.mark.parametrize("over", [None, "tiles", "cells"])
def test_equals_all_at_once(over: str | None, keys: str, masked: bool) -> None:
    given, run = case(over, keys=keys, masked=masked)
    ours, expected = run(*given), run(*given, plain=True)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    pairs = (torch.autograd.grad((out * weight).sum(), given) for out in (ours, expected))
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "over, keys", [(None, "shared"), ("tiles", "own"), ("tiles", "elsewhere"), ("cells", "shared")]
)
def test_double_backward(over: str | None, keys: str, masked: bool) -> None:
    given, run = case(over, keys=keys, masked=masked)

    def size_of_gradient(*, plain: bool) -> Tensor:
        gradients = torch.autograd.grad(run(*given, plain=plain).cos().sum(), given, create_graph=True)
        return sum(g.square().sum() for g in gradients)

    pairs = (torch.autograd.grad(size_of_gradient(plain=plain), given) for plain in (False, True))
    torch.testing.assert_close(*pairs, rtol=1e-8, atol=1e-10)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_gradcheck(heads: int, tiles: int, keys: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(2, tiles, heads, 3, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, tiles, 1, keys, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: attend_rows(q, k, k, None, 0.7), (q, k))


@pytest.mark.parametrize("over", ["tiles", "cells", None])
def test_no_scores_are_kept(over: str | None) -> None:
    q, k, _ = tensors(1, shared=True, keys=50)
    kept: list[int] = []
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend_rows(q.requires_grad_(), k, k, None, 0.7, None if over is None else pooling(over))
    assert sorted(kept) == sorted([q.numel(), k.numel()])


def test_frozen_keys_cost_no_gradient() -> None:
    q, k, _ = tensors(2, shared=True)

    def operations(*wanted: Tensor) -> int:
        out = attend_rows(q, k, k, None, 0.7).sum()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out, wanted)
        return counter.get_total_flops()

    q.requires_grad_()
    product = 2 * q.numel() * 5
    assert operations(q) == 3 * product  # scores, gradient of the weights, gradient of the queries
    k.requires_grad_()
    assert operations(q, k) == 5 * product


class ProductCounter(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "over, keys, needed",
    [
        (over, keys, needed)
        for over, keys in [("tiles", "own"), ("cells", "own"), ("cells", "shared"), (None, "elsewhere")]
        for needed in product([False, True], repeat=3 if keys == "own" else 2)
        if any(needed)
    ],
)
def test_what_is_frozen_costs_no_product(over: str | None, keys: str, needed: tuple[bool, ...]) -> None:
    given, run = case(over, keys=keys, masked=False)
    for x, need in zip(given, needed, strict=True):
        x.requires_grad_(need)
    out = run(*given).sum()
    with ProductCounter() as products:
        torch.autograd.grad(out, [x for x in given if x.requires_grad])
    # Two for the scores and the gradient of the weights, and one for each of q, k and v, of which two may be one.
    assert products.count == 2 + sum(needed) + (keys != "own" and needed[1])


@pytest.mark.parametrize("over", ["tiles", "cells", None])
@pytest.mark.parametrize("at_once, chunks", [(1, [1] * 6), (250, [2, 2, 2]), (500, [4, 2]), (720, [6])])
def test_few_scores_are_held_at_one_time(
    over: str | None, at_once: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one image: a tile has 120."""
    seen, ordinary = [], attend._weights
    monkeypatch.setitem(attend.SCORES_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(attend, "_weights", lambda q, *others: (seen.append(q.shape[1]), ordinary(q, *others))[1])
    q, k, _ = tensors(1, shared=True)
    out = attend_rows(q.requires_grad_(), k, k, None, 0.7, None if over is None else pooling(over))
    assert seen == chunks
    out.sum().backward()
    assert seen == 2 * chunks


@pytest.mark.parametrize("over", ["tiles", "cells", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(over: str | None, dtype: torch.dtype) -> None:
    """Scores of 20 and more stay in float32, as in torch's own kernel."""
    pool = None if over is None else pooling(over)
    q, k, _ = (x.to(dtype).requires_grad_() for x in tensors(2, shared=True))
    out = attend_rows(q, k, k, None, 8.0, pool)
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k))
    exact = at_once(wide[0], wide[1], wide[1], None, 8.0, over)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
    of_ours, of_exact = torch.autograd.grad(out.sum(), (q, k)), torch.autograd.grad(exact.sum(), wide)
    for ours, expected in zip(of_ours, of_exact, strict=True):
        torch.testing.assert_close(
            ours.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * expected.abs().max()
        )


def test_autocast_leaves_float64_alone() -> None:
    q, k, _ = tensors(2, shared=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend_rows(q, k, k, None, 0.7).dtype == torch.float64
        assert attend_rows(q.float(), k.float(), k.float(), None, 0.7, pooling("tiles")).dtype == torch.bfloat16


def test_by_torchs_own_kernel_where_there_is_no_cache_to_stay_in(monkeypatch: pytest.MonkeyPatch) -> None:
    given, run = case(None, keys="elsewhere", masked=True)
    expected = run(*given, plain=True)
    monkeypatch.delitem(attend.SCORES_AT_ONCE, "cpu")
    monkeypatch.delattr(attend, "_by_chunks")
    torch.testing.assert_close(run(*given), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.usefixtures("chunk")
def test_vmap(in_dims: tuple[int | None, int | None]) -> None:
    q, k, _ = tensors(2, shared=True, batch=3)
    sides = [x if dim is None else x.unsqueeze(1) for x, dim in zip((q, k), in_dims, strict=True)]
    if None in in_dims:
        sides[in_dims.index(None)] = sides[in_dims.index(None)][:1]
    out = torch.func.vmap(lambda q, k: attend_rows(q, k, k, None, 0.7), in_dims=in_dims)(*sides)
    expected = at_once(*(x if dim is None else x.squeeze(1) for x, dim in zip(sides, in_dims, strict=True)),
                       sides[1] if in_dims[1] is None else sides[1].squeeze(1), None, 0.7, None)  # fmt: skip
    torch.testing.assert_close(out.squeeze(1), expected, rtol=1e-10, atol=1e-12)
