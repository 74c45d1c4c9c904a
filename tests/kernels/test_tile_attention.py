"""Tile attention against the equation, query by query."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualview.kernels.tile_attention import tile_attention
from tests.checks import assert_compiles_once
from tests.kernels.conftest import examples, guarded

AVERAGES = (None, "cells", "tiles")


@dataclass
class Case:
    """The arguments of one call, and a gradient of its result."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    key_mask: Tensor | None = None
    cells: tuple[int, int, int, int] | None = None
    added: int = 0
    scale: float = 0.3

    def options(self, device: str) -> dict[str, Any]:
        """All arguments but the first three, on a device and between guards."""
        mask = None if self.key_mask is None else guarded(self.key_mask.to(device))
        return {"scale": self.scale, "key_mask": mask, "cells": self.cells, "tiles": self.added}

    def operands(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Queries, keys and values between guards; values that are the keys are the same tensor."""
        q, k = (guarded(x.to(device, dtype)) for x in (self.q, self.k))
        return [q, k, k if self.v is self.k else guarded(self.v.to(device, dtype))]

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tile_attention(q, k, v, **self.options(q.device.type))

    def results(self, dtype: torch.dtype, device: str, needed: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
        """The result, and the gradients of those of q, k and v that need one."""
        q, k, v = self.operands(dtype, device)
        wanted = [x for x, need in zip((q, k, v), needed, strict=True) if need]
        for x in wanted:
            x.requires_grad_()
        out = self.run(q, k, v)
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
        average: Over two rows of the cells, over the tiles, or not at all.
        v: Width of the values, that of the keys if None.
        one_head: Keys of one head for all heads of queries.
        masked: The share of keys that may be attended to.
        **others: Sizes.
    """
    cells = (1, 2, groups, 1) if average == "cells" else None
    of_keys = batch, tiles, keys, 1 if one_head else heads
    v = e if v is None else v
    return Case(
        q=torch.randn(batch, tiles, 2 * groups if cells else groups, heads, e),
        k=torch.randn(*of_keys, e),
        v=torch.randn(*of_keys, v),
        grad=torch.randn(batch, 1 if average == "tiles" else tiles, groups, heads, v),
        key_mask=None if masked is None else torch.rand(batch, tiles, keys) < masked,
        cells=cells,
        added=tiles if average == "tiles" else 0,
        scale=e**-0.5,
    )


def of_own_values(case: Case) -> Case:
    """The same with keys that are their own values."""
    return replace(case, v=case.k)


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
    out = out if case.cells is None else out.unflatten(2, case.cells).mean((3, 5)).flatten(2, 3)
    return out.sum(1, keepdim=True) / case.added if case.added else out


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
def test_is_the_equation(device: str, case: Case, same: bool) -> None:
    case = of_own_values(case) if same else case
    (out,) = case.results(torch.float64, device, needed=(False, False, False))
    torch.testing.assert_close(out.cpu(), by_the_equation(case), rtol=1e-12, atol=1e-12)


# --- What it promises beside its values -------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
def test_a_query_without_keys_is_zero_forward_and_backward(device: str, average: str | None) -> None:
    case = a_case(average=average, keys=5)
    case.key_mask = torch.ones(2, 2, 5, dtype=torch.bool)
    case.key_mask[1] = False
    for x in case.results(torch.float32, device):
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
    expected = case.results(torch.float64, device)
    q, k, v, grad = (
        LAYOUTS[(first + i) % len(LAYOUTS)](getattr(case, name).to(device, torch.float64))
        for i, name in enumerate(names[:4])
    )
    inputs, mask = [x.requires_grad_() for x in (q, k, v)], case.key_mask.to(device)
    for laid_out in (columns_apart(mask), one_image(mask), guarded(mask[:1])):
        out = tile_attention(*inputs, scale=case.scale, key_mask=laid_out)
        for x, same in zip((out, *torch.autograd.grad(out, inputs, grad)), expected, strict=True):
            torch.testing.assert_close(x, same, rtol=1e-12, atol=1e-12)


@pytest.mark.more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_the_layout_of_their_gradient(device: str, dtype: torch.dtype) -> None:
    """One and the same call after another, as cuDNN's plan of the first might be used for the second."""
    case = a_case(tiles=4, groups=16, heads=2, keys=16, e=64)
    exact = case.results(torch.float64, device)
    inputs = [x.requires_grad_() for x in case.operands(dtype, device)]
    grad = case.grad.to(device, dtype)
    for lay_out in (torch.clone, heads_first, columns_apart, torch.clone):
        found = torch.autograd.grad(case.run(*inputs), inputs, lay_out(grad))
        for x, y in zip(found, exact[1:], strict=True):
            assert (x - y).norm() <= 8 * torch.finfo(dtype).eps * y.norm()


@pytest.mark.parametrize("missing", ["batch", "keys", "groups"])
@pytest.mark.parametrize("average", AVERAGES)
def test_nothing_to_do(device: str, missing: str, average: str | None) -> None:
    case = a_case(**{missing: 0}, average=average)
    for x in case.results(torch.float32, device):
        assert (x == 0).all()


@pytest.mark.more
def test_compiles_to_one_graph_for_all_batches(device: str) -> None:
    sizes = a_case(groups=4)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        call = partial(tile_attention, q, scale=0.3)
        shared = call(k[:, :, :, :1], v[:, :, :, :1])
        return call(k, v, key_mask=mask) * 2, shared, call(k, v, key_mask=mask, cells=(2, 2, 1, 1), tiles=2)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        q, k, v = (torch.randn(batch, *x.shape[1:], device=device) for x in (sizes.q, sizes.k, sizes.v))
        return q, k, v, torch.rand(batch, *k.shape[1:3], device=device) < 0.8

    assert_compiles_once(attend, inputs, batches=(2, 3))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("same", [False, True])
def test_autocast_makes_all_of_one_type(device: str, average: str | None, same: bool) -> None:
    """Sums stay in float32 inside: the result is that of a call with operands of that type, to the bit."""
    case = a_case(average=average, groups=9, keys=9)
    case = of_own_values(case) if same else case
    q, k, v = case.operands(torch.float32, device)
    k = k.requires_grad_()
    v = k if same else v
    with torch.autocast(device, torch.bfloat16):
        out = case.run(q.bfloat16().requires_grad_(), k, v)
        (grad,) = torch.autograd.grad(out, k, case.grad.to(out))
    assert out.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    assert torch.equal(out, case.run(*case.operands(torch.bfloat16, device)))
    expected = case.results(torch.bfloat16, device, needed=(True, True, same))[2]
    torch.testing.assert_close(grad, expected.float())


def test_autocast_leaves_float64_alone(device: str) -> None:
    case = a_case(average="cells")
    with torch.autocast(device, torch.bfloat16):
        assert case.run(*case.operands(torch.float64, device)).dtype == torch.float64


def test_meta_tensors_have_the_shape_of_the_result() -> None:
    for average in AVERAGES:
        case = a_case(average=average, v=5)
        q, k, v = (x.to("meta") for x in (case.q, case.k, case.v))
        assert case.run(q, k, v).shape == (2, 1 if average == "tiles" else 2, 3, 2, 5)


def test_second_derivatives(device: str) -> None:
    for average in AVERAGES:
        case = a_case(batch=1, average=average, groups=2, heads=1, keys=3, e=3)
        operands = [x.requires_grad_() for x in case.operands(torch.float64, device)]
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.autograd.gradgradcheck(case.run, operands)
