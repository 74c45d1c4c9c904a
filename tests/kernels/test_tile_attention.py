"""Tile attention: torch against the equation, query by query, and the kernels against torch."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualview.kernels import dispatch
from dualview.kernels.tile_attention import tile_attention
from tests.checks import assert_compiles_once, refuses
from tests.kernels.conftest import examples, guarded

pytest.importorskip("triton")

few = settings(phases=(Phase.explicit, Phase.generate))  # the interpreter is too slow to search for a simpler example
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
AVERAGES = (None, "members")
BACKENDS_AND_AVERAGES = [("triton", None), *(("torch", average) for average in AVERAGES)]
"""The kernel takes no averages."""


@dataclass
class Case:
    """The arguments of one call, and a gradient of its result."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    key_mask: Tensor | None = None
    members: int = 1
    scale: float = 0.3

    def options(self, device: str) -> dict[str, Any]:
        """All arguments but the first three, on a device and between guards."""
        mask = None if self.key_mask is None else guarded(self.key_mask.to(device))
        return {"scale": self.scale, "key_mask": mask, "members": self.members}

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
    v: int | None = None,
    one_head: bool = False,
    masked: float | None = None,
) -> Case:
    """Random tensors.

    Args:
        average: Over two members, over the tiles, or not at all.
        v: Width of the values, that of the keys if None.
        one_head: Keys of one head for all heads of queries.
        masked: The share of keys that may be attended to.
        **others: Sizes.
    """
    members, of_keys = 2 if average == "members" else 1, (batch, tiles, keys, 1 if one_head else heads)
    v = e if v is None else v
    return Case(
        q=torch.randn(batch, tiles, members * groups, heads, e),
        k=torch.randn(*of_keys, e),
        v=torch.randn(*of_keys, v),
        grad=torch.randn(batch, tiles, groups, heads, v),
        key_mask=None if masked is None else torch.rand(batch, tiles, keys) < masked,
        members=members,
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
    batch, tiles, queries, heads, _ = q.shape
    allowed = torch.ones(1, tiles, k.shape[2], dtype=torch.bool) if case.key_mask is None else case.key_mask
    allowed = allowed.expand(batch, -1, -1)
    out = q.new_zeros(batch, tiles, queries, heads, v.shape[-1])
    for b, t, i, h in product(*(range(n) for n in (batch, tiles, queries, heads))):
        of_k, of_v = (x[b, t, :, h % x.shape[-2]] for x in (k, v))
        out[b, t, i, h] = of_one_query(q[b, t, i, h], of_k, of_v, allowed[b, t], case.scale)
    groups = queries // case.members
    return sum(out[:, :, m * groups : (m + 1) * groups] for m in range(case.members)) / case.members


def cases_for_the_equation(**options: Any) -> st.SearchStrategy[Case]:
    return st.builds(
        a_case,
        batch=st.integers(1, 2),
        tiles=st.integers(1, 3),
        groups=st.integers(1, 3),
        heads=st.integers(1, 2),
        keys=st.integers(1, 4),
        e=st.just(5),
        one_head=st.booleans(),
        masked=st.sampled_from([None, 0.5]),
        **options,
    )


@given(case=cases_for_the_equation(average=st.sampled_from(AVERAGES), v=st.just(3)), same=st.booleans())
@settings(max_examples=examples(30))
def test_torch_is_the_equation(device: str, case: Case, same: bool) -> None:
    case = of_own_values(case) if same else case
    (out,) = case.results(torch.float64, device, "torch", needed=(False, False, False))
    torch.testing.assert_close(out.cpu(), by_the_equation(case), rtol=1e-12, atol=1e-12)


@given(case=cases_for_the_equation(), same=st.booleans())
@settings(few, max_examples=examples(8))
def test_the_kernel_is_the_equation(device: str, case: Case, same: bool) -> None:
    case = of_own_values(case) if same else case
    (out,) = case.results(torch.float32, device, "triton", needed=(False, False, False))
    assert out.is_contiguous()
    torch.testing.assert_close(out.cpu().double(), by_the_equation(case), rtol=1e-5, atol=1e-5)


# --- The kernels against torch ----------------------------------------------------------------------------------------


@given(
    case=st.builds(
        a_case,
        tiles=st.integers(1, 2),
        groups=st.integers(8, 36),
        heads=st.integers(1, 3),
        keys=st.integers(8, 40),
        e=st.sampled_from([8, 24, 40, 64, 70]),
        one_head=st.booleans(),
        masked=st.sampled_from([None, 0.5]),
    ),
    dtype=dtypes,
)
@example(case=a_case(tiles=4, groups=9, heads=1, keys=40, e=40, masked=0.5), dtype=torch.bfloat16)
@example(case=a_case(tiles=2, groups=9, heads=8, keys=40, one_head=True), dtype=torch.bfloat16)
@example(case=a_case(tiles=6, groups=9, keys=40, one_head=True), dtype=torch.float16)
@example(case=a_case(groups=35, keys=37, e=70), dtype=torch.float32)
@settings(few, max_examples=examples(3))
def test_error_is_at_most_twice_that_of_torch(device: str, case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(case, dtype, device)


@given(
    case=st.builds(
        a_case,
        tiles=st.integers(1, 3),
        groups=st.integers(1, 9),
        keys=st.integers(1, 40),
        e=st.sampled_from([1, 3, 17, 8, 33]),
        one_head=st.booleans(),
        masked=st.sampled_from([None, 0.5, 0.03]),
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
        {"tiles": 2, "groups": 40, "heads": 2, "e": 128},
        {"tiles": 1, "groups": 9, "heads": 8, "e": 128, "one_head": True},  # absorbed projections
        {"tiles": 2, "groups": 5, "heads": 1, "e": 160},
        {"tiles": 2, "groups": 40, "heads": 1, "e": 256},
    ],
)
def test_wide_heads(device: str, sizes: dict[str, Any], dtype: torch.dtype) -> None:
    case = a_case(batch=1, keys=40, **sizes)
    assert_as_exact_as_torch(of_own_values(case) if "one_head" in sizes else case, dtype, device)


@pytest.mark.parametrize(
    "sizes, reason, remedy",
    [
        ({"e": 257}, "heads of width 257", "use more heads, of at most 256"),
        ({"average": "members"}, "it averages nothing", "average the result of all queries"),
        ({"v": 5}, "values of width 5 for keys of 8", "make them equally wide"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(
    device: str, sizes: dict[str, Any], reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = a_case(**sizes)
    operands = case.operands(torch.float32, device)
    with refuses("the kernel tile_attention cannot run", f"{reason}: {remedy}", 'backend="auto"', error=RuntimeError):
        case.run(*operands)
    monkeypatch.setitem(dispatch.MEASURED, "tile_attention", "2.0x on some GPU")
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert torch.equal(case.run(*operands, "auto"), case.run(*operands, "torch"))


# --- What the operator promises beside its values ---------------------------------------------------------------------


@pytest.mark.parametrize("backend, average", BACKENDS_AND_AVERAGES)
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


LAYOUTS = (heads_first, sliced, columns_apart, one_image)


@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_strides_do_not_matter(device: str, first: int) -> None:
    """Of no two tensors are they the same."""
    case = a_case(groups=5, keys=6, masked=0.5)
    names = ("q", "k", "v", "grad", "key_mask")
    case = replace(case, **{name: one_image(getattr(case, name)).clone() for name in names})
    expected = case.results(torch.float32, device, "triton")
    q, k, v, grad = (
        LAYOUTS[(first + i) % len(LAYOUTS)](getattr(case, name).to(device)) for i, name in enumerate(names[:4])
    )
    inputs, mask = [x.requires_grad_() for x in (q, k, v)], case.key_mask.to(device)
    for laid_out in (columns_apart(mask), one_image(mask), guarded(mask[:1])):
        out = tile_attention(*inputs, scale=case.scale, key_mask=laid_out, backend="triton")
        for x, same in zip((out, *torch.autograd.grad(out, inputs, grad)), expected, strict=True):
            assert torch.equal(x, same)


@pytest.mark.more
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_the_layout_of_their_gradient(device: str, dtype: torch.dtype, backend: str) -> None:
    """One and the same call after another, as cuDNN's plan of the first might be used for the second."""
    case = a_case(tiles=4, groups=16, heads=2, keys=16, e=64)
    exact = case.results(torch.float64, device, "torch")
    inputs = [x.requires_grad_() for x in case.operands(dtype, device)]
    grad = case.grad.to(device, dtype)
    for lay_out in (torch.clone, heads_first, columns_apart, torch.clone):
        found = torch.autograd.grad(case.run(*inputs, backend), inputs, lay_out(grad))
        for x, y in zip(found, exact[1:], strict=True):
            assert (x - y).norm() <= 8 * torch.finfo(dtype).eps * y.norm()


@pytest.mark.parametrize("needed", [n for n in product([True, False], repeat=3) if any(n)])
def test_keys_without_gradients_launch_no_kernel(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: tuple[bool, bool, bool]
) -> None:
    from dualview.kernels import tile_attention_triton as kernels

    launched, ordinary = [], kernels._launch

    def launch(kernel: Any, *given: Any) -> None:
        launched.append(kernel)
        ordinary(kernel, *given)

    monkeypatch.setattr(kernels, "_launch", launch)
    case = a_case(batch=1, keys=4, heads=1)
    expected = case.results(torch.float64, device, "torch", needed)
    for x, y in zip(case.results(torch.float32, device, "triton", needed), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    of_keys = [kernels._key_gradients] if needed[1] or needed[2] else []
    assert launched == [kernels._attend, kernels._query_gradients, *of_keys]


@pytest.mark.parametrize("missing", ["batch", "keys", "groups"])
@pytest.mark.parametrize("backend, average", BACKENDS_AND_AVERAGES)
def test_nothing_to_do(device: str, missing: str, backend: str, average: str | None) -> None:
    case = a_case(**{missing: 0}, average=average)
    for x in case.results(torch.float32, device, backend):
        assert (x == 0).all()


def arguments(case: Case, device: str, grad: bool) -> list[Any]:
    """Those of the operator, in its order."""
    q, k, v = (x.to(device).requires_grad_(grad) for x in (case.q, case.k, case.v))
    return [q, k, v, None if case.key_mask is None else case.key_mask.to(device), case.scale]


@pytest.mark.more
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("where", ["unguarded", "elsewhere"])
@pytest.mark.parametrize("masked", [None, 0.7])
def test_opcheck(device: str, request: pytest.FixtureRequest, grad: bool, where: str, masked: float | None) -> None:
    request.getfixturevalue("unguarded")
    request.getfixturevalue(where)
    case = a_case(masked=masked)
    torch.library.opcheck(torch.ops.dualview.tile_attention.default, tuple(arguments(case, device, grad)))


@pytest.mark.more
@pytest.mark.parametrize("where", ["unguarded", "elsewhere"])
@pytest.mark.parametrize("of_keys", [False, True])
def test_opcheck_of_the_backward_pass(device: str, request: pytest.FixtureRequest, of_keys: bool, where: str) -> None:
    request.getfixturevalue("unguarded")
    request.getfixturevalue(where)
    case = a_case(masked=0.7)
    given_tensors = arguments(case, device, False)
    found = torch.ops.dualview.tile_attention(*given_tensors)
    given_tensors += [*found, case.grad.to(device), of_keys]
    torch.library.opcheck(torch.ops.dualview.tile_attention_backward.default, tuple(given_tensors))


@pytest.mark.usefixtures("elsewhere")
@given(
    case=st.builds(a_case, tiles=st.just(3), e=st.just(5), one_head=st.booleans(), masked=st.sampled_from([None, 0.5])),
    needed=st.sampled_from([n for n in product([True, False], repeat=3) if any(n)]),
)
@settings(max_examples=examples(10))
def test_the_operator_runs_where_no_kernel_does(device: str, case: Case, needed: tuple[bool, bool, bool]) -> None:
    pairs = (case.results(torch.float64, device, backend, needed) for backend in ("triton", "torch"))
    for x, y in zip(*pairs, strict=True):
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


@pytest.mark.more
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_to_one_graph_for_all_batches(device: str, backend: str) -> None:
    sizes = a_case(groups=4)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        call = partial(tile_attention, q, scale=0.3, backend=backend)
        out = call(k, v, key_mask=mask) * 2, call(k[:, :, :, :1], v[:, :, :, :1])
        return out if backend == "triton" else (*out, call(k, v, key_mask=mask, members=2))

    def inputs(batch: int) -> tuple[Tensor, ...]:
        q, k, v = (torch.randn(batch, *x.shape[1:], device=device) for x in (sizes.q, sizes.k, sizes.v))
        return q, k, v, torch.rand(batch, *k.shape[1:3], device=device) < 0.8

    assert_compiles_once(attend, inputs, batches=(2, 3))


@pytest.mark.parametrize("backend, average", BACKENDS_AND_AVERAGES)
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
    for average in AVERAGES:
        case = a_case(average=average, v=5)
        q, k, v = (x.to("meta") for x in (case.q, case.k, case.v))
        assert case.run(q, k, v, backend="auto").shape == (2, 2, 3, 2, 5)


def test_second_derivatives_are_for_torch(device: str) -> None:
    for average in AVERAGES:
        case = a_case(batch=1, average=average, groups=2, heads=1, keys=3, e=3)
        operands = [x.requires_grad_() for x in case.operands(torch.float64, device)]
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.autograd.gradgradcheck(partial(case.run, backend="torch"), operands)
    q, k, v = (x.requires_grad_() for x in a_case().operands(torch.float32, device))
    (grad,) = torch.autograd.grad(a_case().run(q, k, v).sum(), q, create_graph=True)
    with refuses("no second derivative", 'backend="torch"', "sdpa_kernel(SDPBackend.MATH)", error=RuntimeError):
        grad.sum().backward()


def test_says_what_does_not_fit(device: str) -> None:
    q, k, v = a_case(keys=4).operands(torch.float32, device)

    def call(**changed: Any) -> Tensor:
        return tile_attention(**({"q": q, "k": k, "v": v, "scale": 0.3} | changed))

    three_heads = k.repeat(1, 1, 1, 2, 1)[:, :, :, :3]
    with refuses("k (2, 2, 4, 3, 8)", "(B, T, K, H or 1, E or V)"):
        call(k=three_heads, v=three_heads)
    for wrong in (k[:, :1], k[:1], k[..., :7], three_heads, k[0]):
        with refuses(f"k {tuple(wrong.shape)}", "(B, T, K, H or 1, E or V)", "(B, T, Q, H, E)"):
            call(k=wrong)
    for wrong in (v[:, :, :3], v[:, :, :, :1]):
        with refuses(f"v {tuple(wrong.shape)}", "as many heads in k as in v"):
            call(v=wrong)
    with refuses("q (2, 3, 2, 8)", "(B, T, Q, H, E)"):
        call(q=q[:, 0])
    with refuses("torch.float16", "of one floating-point type", "autocast"):
        call(v=v.half())
    with refuses("torch.int64", "of one floating-point type"):
        call(q=q.long(), k=k.long(), v=v.long())
    for shape, dtype in (
        ((2, 4), torch.bool),
        ((2, 2, 3), torch.bool),
        ((3, 2, 4), torch.bool),
        ((2, 2, 4), torch.float),
    ):
        wrong = torch.ones(shape, dtype=dtype)
        with refuses("key_mask=", str(shape), str(dtype), "boolean", "(2, 2, 4) or (1, 2, 4)"):
            call(key_mask=wrong.to(device))
    for members in (0, -1, 2):
        with refuses(f"members={members}", "must divide the 3 queries"):
            call(members=members)
    for scale in (-1, 0, float("nan")):
        with refuses(f"scale={float(scale)}", "positive"):
            call(scale=scale)
    with refuses("float64", "cast", error=RuntimeError):
        call(q=q.double(), k=k.double(), v=v.double(), backend="triton")
    with refuses("different devices", "meta", error=RuntimeError):
        call(key_mask=torch.ones(2, 2, 4, dtype=torch.bool, device="meta"), backend="triton")


# --- Every choice of block sizes, compiled for an H100 ---------------------------------------------------------------

COMPILE = """
import json, sys
import torch
from dualview.kernels.tile_attention import tile_attention
from tests.kernels.compilation import compile_in_place_of_launching

compile_in_place_of_launching()
for dtype, precision, width, heads, masked, needed in json.loads(sys.argv[1]):
    torch.backends.cuda.matmul.fp32_precision = precision
    shapes = {"q": (2, 2, 4, heads, width), "k": (2, 2, 4, 1, width), "v": (2, 2, 4, 1, width)}
    q, k, v = (torch.zeros(shapes[x], dtype=getattr(torch, dtype), requires_grad=x in needed) for x in "qkv")
    mask = torch.ones(1, 2, 4, dtype=torch.bool) if masked else None
    out = tile_attention(q, k, v, scale=0.3, key_mask=mask, backend="triton")
    if needed:
        out.sum().backward()
"""

TYPES = (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
WIDTHS = (16, 72, 128, 160, 256)
COVERING = [
    # type, precision of float32, width, heads, masked, gradients
    ("bfloat16", "ieee", 128, 8, True, "qkv"),
    ("bfloat16", "ieee", 256, 1, False, "qk"),
    ("float16", "ieee", 72, 8, False, "q"),
    ("float32", "ieee", 128, 8, False, "qkv"),
    ("float32", "ieee", 256, 1, True, "v"),
    ("float32", "tf32", 16, 1, True, "kv"),
]
EVERYTHING = [
    (*types, *sizes) for types in TYPES for sizes in product(WIDTHS, (1, 8), (False, True), ("", "q", "qkv", "k", "v"))
]


def compiled(calls: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The programs that these calls would launch, compiled in a process without triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(calls)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_choice_of_blocks_compiles_for_an_h100_and_fits_into_its_shared_memory() -> None:
    """As they are launched, with all that decides which program is compiled: in `make test-all` in every pairing."""
    calls = EVERYTHING if "TEST_ALL" in os.environ else COVERING
    found = compiled(calls)
    assert [program for program in found if program["shared"] > 227 * 1024] == []
    assert {program["kernel"] for program in found} == {"_attend", "_query_gradients", "_key_gradients"}

    def of_call(dtype: str, precision: str, width: int, heads: int, masked: bool, needed: str) -> set[tuple[Any, ...]]:
        kernels = ["_attend"] + ["_query_gradients"] * bool(needed) + ["_key_gradients"] * bool({*"kv"} & {*needed})
        types = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
        return {(kernel, types[dtype], precision, width, masked) for kernel in kernels}

    names = ("kernel", "type", "PRECISION", "E", "MASKED")
    assert {tuple(x[name] for name in names) for x in found} == set().union(*(of_call(*call) for call in calls))


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device: str) -> None:
    """The same problem in the last tile of a map of more than 2^31 elements."""
    case = a_case(batch=1, tiles=2, groups=64, heads=1, keys=64, e=64)
    small = case.results(torch.bfloat16, device, "triton")
    inputs = [far_apart(x.to(device, torch.bfloat16)).requires_grad_() for x in (case.q, case.k, case.v)]
    out = case.run(*inputs)
    grads = torch.autograd.grad(out, inputs, far_apart(case.grad.to(out)))
    for x, same in zip((out, *grads), small, strict=True):
        assert torch.equal(x, same)


def far_apart(x: Tensor) -> Tensor:
    """``x`` with tiles that lie 2^31 elements apart."""
    out = torch.empty(2**31 + 2**20, dtype=x.dtype, device=x.device)
    return out.as_strided(x.shape, (2**31 + 64, 2**31 + 64, *x.stride()[2:])).copy_(x)


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("one_head", [False, True])
def test_in_a_graph_on_another_stream(device: str, one_head: bool) -> None:
    case = a_case(tiles=4, groups=64, heads=2, keys=64, e=64, masked=0.5, one_head=one_head)
    q, k, v = (x.requires_grad_() for x in case.operands(torch.bfloat16, device))
    options, grad = case.options(device), case.grad.to(device, torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        out = tile_attention(q, k, v, **options, backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()  # compiled before it is captured
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            q.normal_()
        graph.replay()
        expected = step()  # sums have one order: the same bits
    stream.synchronize()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)
