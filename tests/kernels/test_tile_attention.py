"""Tile attention: torch against the equation, query by query, and the kernels against torch."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualview.geometry import position
from dualview.kernels import dispatch
from dualview.kernels.tile_attention import tile_attention
from dualview.ops.tiling import crop
from tests.checks import assert_compiles_once, refuses
from tests.kernels.conftest import examples, guarded
from tests.strategies import grids
from tests.strategies import tiles as tile_sizes

pytest.importorskip("triton")

few = settings(phases=(Phase.explicit, Phase.generate))  # the interpreter is too slow to search for a simpler example
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
AVERAGES = (None, "members", "tiles")
averages = st.sampled_from(AVERAGES)


@dataclass
class Case:
    """The arguments of one call, and a gradient of its result."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    key_mask: Tensor | None = None
    key_index: Tensor | None = None
    over_tiles: bool = False
    scale: float = 0.3

    def options(self, device: str) -> dict[str, Any]:
        """All arguments but the first three, on a device and between guards."""
        mask, index = (None if x is None else guarded(x.to(device)) for x in (self.key_mask, self.key_index))
        return {"scale": self.scale, "key_mask": mask, "key_index": index, "over_tiles": self.over_tiles}

    def operands(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Queries, keys and values between guards; values that are the keys are the same tensor."""
        q, k = (guarded(x.to(device, dtype)) for x in (self.q, self.k))
        return [q, k, k if self.v is self.k else guarded(self.v.to(device, dtype))]

    def run(self, q: Tensor, k: Tensor, v: Tensor, backend: str = "triton") -> Tensor:
        return tile_attention(q, k, v, **self.options(q.device.type), backend=backend)

    def results(
        self, dtype: torch.dtype, device: str, backend: str, needed: tuple[bool, ...] = (True, True, True)
    ) -> list[Tensor]:
        """The result, and the gradients of those of q, k and v that need one."""
        q, k, v = self.operands(dtype, device)
        wanted = [x for x, need in zip((q, k, v), needed, strict=True) if need]
        for x in wanted:
            x.requires_grad_()
        out = self.run(q, k, v, backend)
        different = wanted[:-1] if v is k and needed[2] else wanted
        grads = torch.autograd.grad(out, different, self.grad.to(device, dtype)) if different else ()
        return [out.detach(), *grads]


def a_case(
    *,
    batch: int = 2,
    tiles: int = 2,
    average: str | None = None,
    groups: int = 3,
    heads: int = 2,
    keys: int = 4,
    e: int = 8,
    v: int = 8,
    one_head: bool = False,
    indexed: bool = False,
    masked: float | None = None,
    spare: int = 3,
) -> Case:
    """Random tensors.

    Args:
        average: Over two members, over the tiles, or not at all.
        one_head: Keys of one head for all heads of queries.
        indexed: Keys among other tokens, in random order.
        masked: The share of keys that may be attended to.
        spare: Tokens that are no keys, with ``indexed``.
        **others: Sizes.
    """
    of_keys = (batch, tiles * keys + spare) if indexed else (batch, tiles, keys)
    key_heads = 1 if one_head else heads
    return Case(
        q=torch.randn(batch, tiles, 2 if average == "members" else 1, groups, heads, e),
        k=torch.randn(*of_keys, key_heads, e),
        v=torch.randn(*of_keys, key_heads, v),
        grad=torch.randn(batch, 1 if average == "tiles" else tiles, groups, heads, v),
        key_mask=None if masked is None else torch.rand(batch, tiles, keys) < masked,
        key_index=torch.randperm(tiles * keys + spare)[: tiles * keys].view(tiles, keys) if indexed else None,
        over_tiles=average == "tiles",
        scale=e**-0.5,
    )


def of_own_values(case: Case) -> Case:
    """The same with keys that are their own values."""
    return replace(case, v=case.k)


def assert_as_exact_as_torch(
    case: Case, dtype: torch.dtype, device: str, needed: tuple[bool, ...] = (True, True, True)
) -> None:
    """The error against float64 is at most twice that of torch, in the result and in every gradient.

    Where torch's is accidentally small, as in a sum of two numbers, a quarter of the last bit is allowed.
    """
    exact = case.results(torch.float64, device, "torch", needed)
    theirs, ours = (case.results(dtype, device, backend, needed) for backend in ("torch", "triton"))
    for name, x, a, b in zip(("out", "first", "second", "third"), exact, theirs, ours, strict=False):
        assert b.dtype == dtype
        assert b.isfinite().all(), name
        error, allowed = (b - x).norm(), 2 * (a - x).norm() + torch.finfo(dtype).eps / 4 * x.norm()
        assert error <= allowed, f"{name}: {error:.2e}, of which {allowed:.2e} are allowed"


# --- The equation -----------------------------------------------------------------------------------------------------


def of_one_query(q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """sum_j softmax_j(scale q . k_j) v_j over the keys that are allowed; zeros without any."""
    collected, total = values.new_zeros(values.shape[1]), 0.0
    for key, value, may in zip(keys, values, allowed, strict=True):
        if may:
            weight = (scale * (q * key).sum()).exp()
            collected, total = collected + weight * value, total + weight
    return collected / total if allowed.any() else collected


def by_the_equation(case: Case) -> Tensor:
    """The result in float64, query by query."""
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    batch, tiles, members, groups, heads, _ = q.shape
    index = case.key_index
    keys = k.shape[2] if index is None else index.shape[1]
    allowed = torch.ones(1, tiles, keys, dtype=torch.bool) if case.key_mask is None else case.key_mask
    allowed = allowed.expand(batch, -1, -1)
    out = q.new_zeros(batch, tiles, members, groups, heads, v.shape[-1])
    for b, t, m, g, h in product(*(range(n) for n in (batch, tiles, members, groups, heads))):
        of_k, of_v = ((x[b, t] if index is None else x[b, index[t]])[:, h % x.shape[-2]] for x in (k, v))
        out[b, t, m, g, h] = of_one_query(q[b, t, m, g, h], of_k, of_v, allowed[b, t], case.scale)
    return out.mean(2).mean(1, keepdim=True) if case.over_tiles else out.mean(2)


cases_for_the_equation = st.builds(
    a_case,
    batch=st.integers(1, 2),
    tiles=st.integers(1, 3),
    average=averages,
    groups=st.integers(1, 3),
    heads=st.integers(1, 2),
    keys=st.integers(1, 4),
    e=st.just(5),
    v=st.just(3),
    one_head=st.booleans(),
    indexed=st.booleans(),
    masked=st.sampled_from([None, 0.5]),
)


@given(case=cases_for_the_equation, same=st.booleans())
@settings(max_examples=examples(30))
def test_torch_is_the_equation(device: str, case: Case, same: bool) -> None:
    case = of_own_values(case) if same else case
    (out,) = case.results(torch.float64, device, "torch", needed=(False, False, False))
    torch.testing.assert_close(out.cpu(), by_the_equation(case), rtol=1e-12, atol=1e-12)


@given(case=cases_for_the_equation, same=st.booleans())
@settings(few, max_examples=examples(8))
def test_the_kernel_is_the_equation(device: str, case: Case, same: bool) -> None:
    case = of_own_values(case) if same else case
    (out,) = case.results(torch.float32, device, "triton", needed=(False, False, False))
    assert out.is_contiguous()
    torch.testing.assert_close(out.cpu().double(), by_the_equation(case), rtol=1e-5, atol=1e-5)


def index_of(perspective: str, grid: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """The tokens of every tile, numbered in raster order. (rows * cols, h * w)"""
    (rows, cols), (h, w) = grid, tile
    tokens = torch.empty(rows, cols, h, w, dtype=torch.int32)
    for i, j, y, x in product(range(rows), range(cols), range(h), range(w)):
        line, column = position(perspective, i, y, rows, h), position(perspective, j, x, cols, w)
        tokens[i, j, y, x] = line * cols * w + column
    return tokens.view(rows * cols, h * w)


@given(grids, tile_sizes, st.sampled_from(["local", "global"]), st.sampled_from(["torch", "triton"]))
@settings(few, max_examples=examples(20))
def test_keys_in_raster_order_by_index(
    device: str, grid: tuple[int, int], tile: tuple[int, int], perspective: str, backend: str
) -> None:
    height, width = grid[0] * tile[0], grid[1] * tile[1]
    q = torch.randn(1, grid[0] * grid[1], 1, 2, 3, 4, device=device)
    keys = torch.randn(1, height, width, 4, device=device)
    tiles = crop(keys, grid, perspective, data_format="channels_last").flatten(2, 3).unsqueeze(3)
    tokens, index = keys.flatten(1, 2).unsqueeze(2), index_of(perspective, grid, tile).to(device)
    by_index = tile_attention(q, tokens, tokens, scale=0.5, key_index=index, backend=backend)
    torch.testing.assert_close(by_index, tile_attention(q, tiles, tiles, scale=0.5, backend="torch"))


# --- The kernels against torch ----------------------------------------------------------------------------------------


@given(
    case=st.builds(
        a_case,
        tiles=st.integers(1, 2),
        average=averages,
        groups=st.integers(8, 36),
        heads=st.integers(1, 3),
        keys=st.integers(8, 40),
        e=st.sampled_from([8, 24, 40, 64]),
        v=st.sampled_from([8, 24, 64, 70]),
        one_head=st.booleans(),
        indexed=st.booleans(),
        masked=st.sampled_from([None, 0.5]),
    ),
    dtype=dtypes,
)
@example(
    case=a_case(tiles=4, groups=9, heads=1, keys=40, e=40, v=24, indexed=True, masked=0.5, average="members"),
    dtype=torch.bfloat16,
)
@example(case=a_case(tiles=6, groups=9, keys=40, one_head=True, average="tiles"), dtype=torch.float16)
@example(case=a_case(groups=35, keys=37, v=70), dtype=torch.float32)
@settings(few, max_examples=examples(3))
def test_error_is_at_most_twice_that_of_torch(device: str, case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(case, dtype, device)


@given(
    case=st.builds(
        a_case,
        tiles=st.integers(1, 3),
        average=averages,
        groups=st.integers(1, 9),
        keys=st.integers(1, 40),
        e=st.sampled_from([1, 17, 8]),
        v=st.sampled_from([3, 5, 33]),
        one_head=st.booleans(),
        indexed=st.booleans(),
        masked=st.sampled_from([None, 0.5, 0.03]),
        spare=st.sampled_from([0, 3, 50]),
    )
)
@settings(few, max_examples=examples(6))
def test_any_shape_and_few_keys(device: str, case: Case) -> None:
    exact = case.results(torch.float64, device, "torch")
    for x, y in zip(case.results(torch.float32, device, "triton"), exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tiles": 2, "groups": 9, "heads": 8, "e": 1024, "v": 1024, "one_head": True},  # absorbed projections
        {"tiles": 2, "groups": 9, "heads": 1, "e": 1024, "v": 1024, "average": "tiles"},
        {"tiles": 1, "groups": 5, "heads": 1, "e": 300, "v": 600},
        {"tiles": 2, "groups": 40, "heads": 2, "e": 128, "v": 128},
        {"tiles": 2, "groups": 5, "heads": 1, "e": 256, "v": 160},
    ],
)
def test_wide_heads(device: str, sizes: dict[str, Any], dtype: torch.dtype) -> None:
    case = a_case(batch=1, keys=40, **sizes)
    assert_as_exact_as_torch(of_own_values(case) if "one_head" in sizes else case, dtype, device)


def test_sums_over_wide_heads_carry_what_rounding_loses(device: str) -> None:
    """1 is half of the last bit of 2^24 in float32: added to that in one sum, the ones between would all be lost."""
    q, k = torch.ones(1, 1, 1, 1, 1, 1024), torch.zeros(1, 1, 2, 1, 1024)
    k[..., 0, :, 0], k[..., 0, :, -1] = 2.0**24, -(2.0**24)
    k[..., 0, :, 64:-64:64] = 1.0
    score = k.double().sum().item()
    v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1)
    case = Case(q, k, v, torch.ones(1, 1, 1, 1, 1), scale=0.1)
    out, *grads = case.results(torch.float32, device, "triton")
    weight = 1 / (1 + torch.tensor(-0.1 * score, dtype=torch.float64).exp())
    torch.testing.assert_close(out.cpu().double().item(), weight.item(), rtol=1e-6, atol=0)
    for found, exact in zip(grads, case.results(torch.float64, device, "torch")[1:], strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)


# --- What the operator promises beside its values ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("average", AVERAGES)
def test_a_query_without_keys_is_zero_forward_and_backward(device: str, average: str | None, backend: str) -> None:
    case = a_case(average=average, keys=5)
    case.key_mask = torch.ones(2, 2, 5, dtype=torch.bool)
    case.key_mask[1] = False
    for x in case.results(torch.float32, device, backend):
        assert (x[1] == 0).all()
        assert x.isfinite().all()
        assert x[0].any()


def heads_first(x: Tensor) -> Tensor:
    return x.movedim(-2, 1).contiguous().movedim(1, -2)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]]


def columns_apart(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def one_image(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


@pytest.mark.parametrize("lay_out", [heads_first, sliced, columns_apart, one_image])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("indexed", [False, True])
def test_strides_do_not_matter(device: str, lay_out: Any, average: str | None, indexed: bool) -> None:
    case = a_case(average=average, groups=5, keys=6, indexed=indexed)
    case = replace(case, **{name: one_image(getattr(case, name)).clone() for name in ("q", "k", "v", "grad")})
    expected = case.results(torch.float32, device, "triton")
    inputs = [lay_out(x.to(device)).requires_grad_() for x in (case.q, case.k, case.v)]
    out = case.run(*inputs)
    grads = torch.autograd.grad(out, inputs, lay_out(case.grad.to(device)))
    for x, same in zip((out, *grads), expected, strict=True):
        assert torch.equal(x, same)


@pytest.mark.more
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_the_layout_of_their_gradient(device: str, dtype: torch.dtype, backend: str) -> None:
    """One and the same call after another, as cuDNN's plan of the first might be used for the second."""
    case = a_case(tiles=4, groups=16, heads=2, keys=16, e=64, v=64)
    exact = case.results(torch.float64, device, "torch")
    inputs = [x.requires_grad_() for x in case.operands(dtype, device)]
    grad = case.grad.to(device, dtype)
    for lay_out in (torch.clone, heads_first, columns_apart, torch.clone):
        found = torch.autograd.grad(case.run(*inputs, backend), inputs, lay_out(grad))
        for x, y in zip(found, exact[1:], strict=True):
            assert (x - y).norm() <= 8 * torch.finfo(dtype).eps * y.norm()


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("needed", [n for n in product([True, False], repeat=3) if any(n)])
def test_only_needed_gradients_are_computed(
    device: str, monkeypatch: pytest.MonkeyPatch, average: str | None, needed: tuple[bool, bool, bool]
) -> None:
    from dualview.kernels import tile_attention_triton as kernels

    launched, ordinary = [], kernels.tuned

    def tuned(kernel: Any, width: int, size: int, own: str, *purpose: Any) -> Any:
        launched.append((kernel.__name__, dict(flag for flag in purpose if isinstance(flag, tuple))))
        return ordinary(kernel, width, size, own, *purpose)

    monkeypatch.setattr(kernels, "tuned", tuned)
    case = a_case(batch=1, average=average, keys=4, heads=1)
    expected = case.results(torch.float64, device, "torch", needed)
    for x, y in zip(case.results(torch.float32, device, "triton", needed), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    of_keys = [flags for name, flags in launched if name == "_key_gradients"]
    assert of_keys == ([{"DK": needed[1], "DV": needed[2]}] if needed[1] or needed[2] else [])
    of_queries = [flags["DELTA"] for name, flags in launched if name == "_query_gradients"]
    assert of_queries == [True] * (average is not None and (needed[0] or needed[1])) + [False] * needed[0]


def test_denominators_are_kept_for_gradients_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, ordinary = [], dispatch.empty

    def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        made.append((shape, dtype))
        return ordinary(*shape, like=like, dtype=dtype)

    monkeypatch.setattr(dispatch, "empty", empty)
    case = a_case(heads=1)
    q, k, v = case.operands(torch.bfloat16, device)
    case.run(q, k, v)
    with torch.no_grad():
        case.run(q.requires_grad_(), k, v)
    assert {shape for shape, dtype in made if dtype == torch.float32} == {(0,)}
    case.run(q, k, v)
    assert ((2, 2, 1, 3, 1), torch.float32) in made


@pytest.mark.parametrize("missing", ["batch", "keys", "groups"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("indexed", [False, True])
def test_nothing_to_do(device: str, missing: str, backend: str, average: str | None, indexed: bool) -> None:
    case = a_case(**{missing: 0}, average=average, indexed=indexed)
    for x in case.results(torch.float32, device, backend):
        assert (x == 0).all()


def arguments(case: Case, device: str, grad: bool) -> list[Any]:
    """Those of the operator, in its order."""
    q, k, v, mask, index = (
        None if x is None else x.to(device) for x in (case.q, case.k, case.v, case.key_mask, case.key_index)
    )
    return [*(x.requires_grad_(grad) for x in (q, k, v)), mask, index, case.scale, case.over_tiles]


@pytest.mark.more
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("where", ["unguarded", "elsewhere"])
@pytest.mark.parametrize("average", AVERAGES)
def test_opcheck(device: str, request: pytest.FixtureRequest, grad: bool, where: str, average: str | None) -> None:
    request.getfixturevalue("unguarded")
    request.getfixturevalue(where)
    case = a_case(average=average, v=5, masked=0.7, indexed=average != "tiles")
    torch.library.opcheck(torch.ops.dualview.tile_attention.default, (*arguments(case, device, grad), grad))


@pytest.mark.more
@pytest.mark.parametrize("where", ["unguarded", "elsewhere"])
@pytest.mark.parametrize("average, needed", [(None, [True] * 3), ("members", [False, True, False])])
def test_opcheck_of_the_backward_pass(
    device: str, request: pytest.FixtureRequest, needed: list[bool], where: str, average: str | None
) -> None:
    request.getfixturevalue("unguarded")
    request.getfixturevalue(where)
    case = a_case(average=average, v=5, masked=0.7)
    given_tensors = arguments(case, device, False)
    out, lse = torch.ops.dualview.tile_attention(*given_tensors, True)
    found = case.grad.to(device), lse, out if average is None else None
    torch.library.opcheck(torch.ops.dualview.tile_attention_backward.default, (*given_tensors, *found, needed))


@pytest.mark.usefixtures("elsewhere")
@given(
    case=st.builds(
        a_case, tiles=st.just(3), average=averages, v=st.just(5), one_head=st.booleans(), indexed=st.booleans(),
        masked=st.sampled_from([None, 0.5]),
    )
)  # fmt: skip
@settings(max_examples=examples(10))
def test_the_operator_runs_where_no_kernel_does(device: str, case: Case) -> None:
    for x, y in zip(*(case.results(torch.float64, device, backend) for backend in ("triton", "torch")), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


class OfTriton(torch.nn.Module):
    """One call of the kernel, to be exported."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tile_attention(q, k, v, scale=0.3, backend="triton")


@pytest.mark.usefixtures("unguarded")
def test_an_exported_program_runs_where_no_kernel_can(device: str, request: pytest.FixtureRequest) -> None:
    case = a_case()
    inputs = tuple(x.requires_grad_() for x in case.operands(torch.float32, device))
    program = torch.export.export(OfTriton(), inputs).module()
    assert "dualview.tile_attention" in program.code
    request.getfixturevalue("elsewhere")
    out = program(*inputs)
    expected = tile_attention(*inputs, scale=0.3, backend="torch")
    torch.testing.assert_close(out, expected)
    pairs = (torch.autograd.grad(x.sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(*pairs)


@pytest.mark.usefixtures("unguarded")
def test_gradients_of_what_was_recorded_without_any_are_refused(device: str) -> None:
    case = a_case()
    given_tensors = arguments(case, device, True)
    out, _ = torch.ops.dualview.tile_attention(*given_tensors, False)
    with refuses("recorded without any", "with gradients enabled", error=RuntimeError):
        out.sum().backward()


@pytest.mark.more
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_to_one_graph_for_all_batches(device: str, backend: str) -> None:
    sizes = a_case(average="members", indexed=True)
    index = sizes.key_index.to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        options = {"scale": 0.3, "key_index": index, "backend": backend}
        alone = q[:, :, :1]
        return (
            tile_attention(q, k, v, key_mask=mask, **options) * 2,
            tile_attention(alone, k, k, **options, over_tiles=True),
            tile_attention(alone, k, v, **options),
        )

    def inputs(batch: int) -> tuple[Tensor, ...]:
        q, k, v = (torch.randn(batch, *x.shape[1:], device=device) for x in (sizes.q, sizes.k, sizes.v))
        return q, k, v, torch.rand(batch, *index.shape, device=device) < 0.8

    assert_compiles_once(attend, inputs, batches=(2, 3))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("same", [False, True])
def test_autocast_makes_all_of_one_type(device: str, average: str | None, same: bool, backend: str) -> None:
    """Sums stay in float32 inside: the result is that of a call with operands of that type, to the bit."""
    case = a_case(average=average, groups=9, keys=9)
    case = of_own_values(case) if same else case
    q, k, v = case.operands(torch.float32, device)
    k = k.requires_grad_()
    v = k if same else v
    with torch.autocast(device, torch.bfloat16):
        out = case.run(q.bfloat16().requires_grad_(), k, v, backend)
        (grad,) = torch.autograd.grad(out, k, case.grad.to(out))
    assert out.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    assert torch.equal(out, case.run(*case.operands(torch.bfloat16, device), backend))
    expected = case.results(torch.bfloat16, device, backend, needed=(True, True, same))[2]
    torch.testing.assert_close(grad, expected.float())


def test_autocast_leaves_float64_alone(device: str) -> None:
    case = a_case(average="members")
    with torch.autocast(device, torch.bfloat16):
        assert case.run(*case.operands(torch.float64, device), backend="torch").dtype == torch.float64


def test_meta_tensors_have_the_shape_of_the_result() -> None:
    for average, tiles in ((None, 2), ("members", 2), ("tiles", 1)):
        case = a_case(average=average, v=5)
        q, k, v = (x.to("meta") for x in (case.q, case.k, case.v))
        assert case.run(q, k, v, backend="auto").shape == (2, tiles, 3, 2, 5)


def test_second_derivatives_are_for_torch(device: str) -> None:
    case = a_case(batch=1, average="members", groups=2, heads=1, keys=3, e=3, v=3)
    q, k, v = (x.requires_grad_() for x in case.operands(torch.float64, device))
    assert torch.autograd.gradgradcheck(partial(case.run, backend="torch"), (q, k, v))
    q, k, v = (x.float() for x in (q, k, v))
    (grad,) = torch.autograd.grad(case.run(q, k, v).sum(), q, create_graph=True)
    with refuses("no second derivative", 'backend="torch"', error=RuntimeError):
        grad.sum().backward()


def test_says_what_does_not_fit(device: str) -> None:
    q, k, v = a_case(keys=4).operands(torch.float32, device)
    index = torch.arange(8, device=device).view(2, 4)

    def call(**changed: Any) -> Tensor:
        return tile_attention(**({"q": q, "k": k, "v": v, "scale": 0.3} | changed))

    three_heads = k.repeat(1, 1, 1, 2, 1)[:, :, :, :3]
    with refuses("k (2, 2, 4, 3, 8)", "(B, T, K, H or 1, E or V)"):
        call(k=three_heads, v=three_heads)
    for wrong in (k[:, :1], k[:1], k[..., :7], three_heads, k[0]):
        with refuses(f"k {tuple(wrong.shape)}", "(B, T, K, H or 1, E or V)", "(B, T, M, G, H, E)"):
            call(k=wrong)
    for wrong in (v[:, :, :3], v[:, :, :, :1]):
        with refuses(f"v {tuple(wrong.shape)}", "as many heads in k as in v"):
            call(v=wrong)
    with refuses("q (2, 1, 3, 2, 8)", "(B, T, M, G, H, E)"):
        call(q=q[:, 0])
    with refuses("torch.float16", "of one floating-point type", "autocast"):
        call(v=v.half())
    with refuses("torch.int64", "of one floating-point type"):
        call(q=q.long(), k=k.long(), v=v.long())
    with refuses("k (2, 2, 4, 2, 8)", "(B, N, H or 1, E or V)", "key_index"):
        call(key_index=index)
    of_tokens = {"k": k.flatten(1, 2), "v": v.flatten(1, 2)}
    for wrong in (index.float(), index[:1], index[0]):
        with refuses(f"key_index {tuple(wrong.shape)} of {wrong.dtype}", "integers", "(2, K)"):
            call(**of_tokens, key_index=wrong)
    for shape, dtype in (
        ((2, 4), torch.bool),
        ((2, 2, 3), torch.bool),
        ((3, 2, 4), torch.bool),
        ((2, 2, 4), torch.float),
    ):
        wrong = torch.ones(shape, dtype=dtype)
        with refuses(f"key_mask {tuple(wrong.shape)} of {wrong.dtype}", "boolean", "(2 or 1, 2, 4)"):
            call(key_mask=wrong.to(device))
    with refuses("over_tiles=True", "(B, T, 1, G, H, E)"):
        call(q=q.repeat(1, 1, 2, 1, 1, 1), over_tiles=True)
    for scale in (-1, 0, float("nan")):
        with refuses(f"scale={float(scale)}", "positive"):
            call(scale=scale)
    with refuses("float64", "cast", error=RuntimeError):
        call(q=q.double(), k=k.double(), v=v.double(), backend="triton")
    with refuses("different devices", "meta", error=RuntimeError):
        call(**of_tokens, key_index=index.to("meta"), backend="triton")


# --- Every choice of block sizes, compiled for an H200 ---------------------------------------------------------------

COMPILE = """
import json, sys
import torch
from dualview.kernels.tile_attention import tile_attention
from tests.kernels.compilation import compile_in_place_of_launching

compile_in_place_of_launching()
for dtype, precision, width, heads, masked, average, indexed, needed in json.loads(sys.argv[1]):
    torch.backends.cuda.matmul.fp32_precision = precision
    shapes = {
        "q": (2, 2, 2 if average == "members" else 1, 4, heads, width),
        "k": (2, 8, 1, width) if indexed else (2, 2, 4, 1, width),
    }
    q, k, v = (
        torch.zeros(shapes[x.replace("v", "k")], dtype=getattr(torch, dtype), requires_grad=x in needed) for x in "qkv"
    )
    options = {
        "key_mask": torch.ones(1, 2, 4, dtype=torch.bool) if masked else None,
        "key_index": torch.arange(8, dtype=getattr(torch, indexed)).view(2, 4) if indexed else None,
        "over_tiles": average == "tiles",
    }
    out = tile_attention(q, k, v, scale=0.3, **options, backend="triton")
    if needed:
        out.sum().backward()
"""

COVERING = [
    # type, precision of float32, width, heads, masked, average, type of the index, gradients
    ("bfloat16", "ieee", 128, 1, True, None, "int64", "qkv"),
    ("bfloat16", "ieee", 256, 8, False, None, None, "qk"),
    ("bfloat16", "ieee", 256, 1, True, "members", "int32", ""),
    ("bfloat16", "ieee", 1024, 8, True, None, None, "qk"),
    ("bfloat16", "ieee", 1024, 1, False, "tiles", None, ""),
    ("float32", "ieee", 128, 8, False, None, "int32", ""),
    ("float32", "ieee", 256, 1, False, None, None, ""),
    ("float32", "tf32", 1024, 1, True, "members", None, "kv"),
    ("float32", "ieee", 1024, 1, False, "tiles", None, "qk"),
]
EVERYTHING = [
    (*types, *sizes)
    for types in (("float32", "ieee"), ("float32", "tf32"), ("bfloat16", "ieee"))
    for sizes in product((128, 256, 1024), (1, 8), (False, True), AVERAGES, (None, "int32"), ("", "qkv", "k", "v"))
]


def compiled(calls: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The programs that these calls would launch, compiled in a process without triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(calls)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_choice_of_blocks_compiles_for_an_h200_and_fits_into_its_shared_memory() -> None:
    """As they are launched, with all that decides which program is compiled: in `make test-all` in every pairing."""
    found = compiled(EVERYTHING if "TEST_ALL" in os.environ else COVERING)
    assert [kernel for kernel in found if kernel["shared"] > 227 * 1024] == []

    def seen(kernel: str, *names: str) -> set[tuple[Any, ...]]:
        return {tuple(x[name] for name in names) for x in found if x["kernel"] == kernel}

    assert seen("_attend", "VALUES", "KEEP") == {(True, True), (True, False), (False, True)}
    assert seen("_query_gradients", "DELTA") == {(True,), (False,)}
    assert seen("_key_gradients", "DK", "DV") == {(True, True), (True, False), (False, True)}
    both = {(False, 1), (False, 8), (True, 1), (True, 8)}
    pairs = [seen(kernel, "MASKED", "HEADS") for kernel in ("_attend", "_key_gradients")]
    assert set().union(*pairs) == both
    choices = Counter(x[:2] for x in seen("_attend", "type", "E", "BLOCK_R", "BLOCK_K", "CHUNK"))
    widths = (128, 256, 1024)
    assert choices == {("*bf16", width): 2 for width in widths} | {("*fp32", width): 1 for width in widths}
    assert seen("_attend_averaged", "type", "INDEXED") >= {("*bf16", False), ("*bf16", True), ("*fp32", False)}


@pytest.mark.gpu
@pytest.mark.parametrize("indexed", [False, True])
def test_more_elements_than_an_int32_counts(device: str, indexed: bool) -> None:
    """The same problem in the last tile of a map of more than 2^31 elements, or at the last of as many tokens."""
    case = a_case(batch=1, tiles=2, groups=64, heads=1, keys=64, e=64, v=64, indexed=indexed, spare=0)
    small = case.results(torch.bfloat16, device, "triton")
    big = replace(case, grad=case.grad.clone())
    if indexed:
        shift = 2**25 + 100
        big.k, big.v = (far(x.to(device, torch.bfloat16), shift, 1) for x in (case.k, case.v))
        big.key_index = case.key_index + shift
        inputs = [case.q.to(device, torch.bfloat16), big.k, big.v]
    else:
        strides = [(2**31 + 64, 2**30 + 64, *x.stride()[2:]) for x in (case.q, case.k, case.v)]
        inputs = [
            spread(x.to(device, torch.bfloat16), stride)
            for x, stride in zip((case.q, case.k, case.v), strides, strict=True)
        ]
    out = big.run(*(x.requires_grad_() for x in inputs))
    grads = torch.autograd.grad(out, inputs, case.grad.to(out))
    assert torch.equal(out, small[0])
    for grad, same in zip(grads, small[1:], strict=True):
        assert torch.equal(grad[:, -same.shape[1] :], same)


def far(x: Tensor, shift: int, dim: int) -> Tensor:
    """``x`` after so many zeros along a dimension."""
    shape = list(x.shape)
    shape[dim] = shift
    return torch.cat([x.new_zeros(shape), x], dim)


def spread(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` with other strides."""
    out = torch.empty(2**31 + 2**20, dtype=x.dtype, device=x.device).as_strided(x.shape, strides)
    return out.copy_(x)


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("indexed", [False, True])
def test_in_a_graph_on_another_stream(device: str, average: str | None, indexed: bool) -> None:
    case = a_case(tiles=4, average=average, groups=64, heads=2, keys=64, e=64, v=64, indexed=indexed)
    q, k, v = (x.requires_grad_() for x in case.operands(torch.bfloat16, device))
    options, grad = case.options(device), case.grad.to(device, torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        out = tile_attention(q, k, v, **options, backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()  # compiled, and the blocks chosen, before it is captured
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            q.normal_()
        graph.replay()
        expected = step()  # sums have one order: the same bits
    stream.synchronize()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)
