"""Attention between corresponding tiles, against a softmax by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dualview as dv
from tests import reference
from tests.checks import refuses

leading = st.sampled_from([(2, 3), (3,), (2, 1, 2), (0,), (0, 3), ()])
heads = st.sampled_from([1, 2, 4])


def tensors(lead: tuple[int, ...], queries: int, keys: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*lead, n, dim, dtype=torch.float64) for n in (queries, keys, keys))


def loop(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    lead = q.shape[:-2]
    masks = [None] * lead.numel() if mask is None else mask.expand(k.shape[:-1]).reshape(-1, k.shape[-2])
    parts = zip(*(x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)), masks, strict=True)
    out = [reference.attend(a, b, c, num_heads, m) for a, b, c, m in parts]
    return torch.stack(out).reshape(q.shape) if out else torch.zeros_like(q)


@given(leading, st.integers(1, 5), st.integers(1, 6), heads, st.integers(0, 99))
def test_equals_the_softmax_by_hand(lead: tuple[int, ...], queries: int, keys: int, num_heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(lead, queries, keys, 8)
    out = dv.tile_attention(q, k, v, num_heads=num_heads)
    torch.testing.assert_close(out, loop(q, k, v, num_heads), rtol=1e-10, atol=1e-10)


@given(leading, heads, st.sampled_from(["full", "keys", "tiles"]), st.integers(0, 99))
def test_masks(lead: tuple[int, ...], num_heads: int, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(lead, 3, 5, 8)
    shape = {"full": (*lead, 5), "keys": (5,), "tiles": (*lead[-1:], 5)}[kind]
    mask = torch.rand(shape) < 0.4  # many rows have no key at all
    out = dv.tile_attention(q, k, v, num_heads=num_heads, key_mask=mask)
    torch.testing.assert_close(out, loop(q, k, v, num_heads, mask), rtol=1e-10, atol=1e-10)


def test_a_row_without_keys_is_zero_forward_and_backward() -> None:
    q, k, v = (x.requires_grad_() for x in tensors((2,), 3, 5, 8))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    out = dv.tile_attention(q, k, v, key_mask=mask)
    assert (out[1] == 0).all()
    assert (out[0] != 0).all()
    out.sum().backward()
    for x in (q, k, v):
        assert (x.grad[1] == 0).all()
        assert x.grad.isfinite().all()
    assert torch.autograd.gradcheck(lambda *x: dv.tile_attention(*x, num_heads=2, key_mask=mask), (q, k, v))


def test_a_row_without_keys_never_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels differ in what they make of such a row, zeros or NaN: ours does not depend on it."""

    def naive(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
        scores = (q @ k.mT * scale).masked_fill(~attn_mask, float("-inf"))
        return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", naive)
    q, k, v = (x.requires_grad_() for x in tensors((2,), 3, 5, 8))
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    out = dv.tile_attention(q, k, v, num_heads=2, key_mask=mask)
    out.sum().backward()
    assert (out[1] == 0).all()
    for x in (out, q.grad, k.grad, v.grad):
        assert x.isfinite().all()


def test_masked_keys_do_not_matter() -> None:
    q, k, v = tensors((2,), 3, 5, 8)
    mask = torch.tensor([True, False, True, True, False])
    out = dv.tile_attention(q, k, v, num_heads=2, key_mask=mask)
    k[:, ~mask] = 1e6
    v[:, ~mask] = -1e6
    assert torch.equal(dv.tile_attention(q, k, v, num_heads=2, key_mask=mask), out)
    torch.testing.assert_close(out, dv.tile_attention(q, k[:, mask], v[:, mask], num_heads=2))


def test_order_of_keys_does_not_matter_and_order_of_tiles_does() -> None:
    q, k, v = tensors((4,), 3, 5, 8)
    out = dv.tile_attention(q, k, v)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(dv.tile_attention(q, k[:, order], v[:, order]), out)
    assert not torch.allclose(dv.tile_attention(q, k.flip(0), v.flip(0)), out)


def test_masks_do_not_change_the_width_of_bf16() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in tensors((2,), 3, 5, 8))
    mask = torch.ones(5, dtype=torch.bool)
    out = dv.tile_attention(q, k, v, num_heads=2, key_mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, dv.tile_attention(q, k, v, num_heads=2), rtol=0.02, atol=0.02)


class TestModule:
    @given(heads, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
    def test_equals_the_formula(
        self, num_heads: int, bias: bool, out_proj: bool, residual: bool, norm: bool, masked: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        module = dv.TileAttention(
            8, num_heads=num_heads, bias=bias, out_proj=out_proj, residual=residual, norm=norm, dtype=torch.float64
        )
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        weights = dict(module.named_parameters())
        query, key, _ = tensors((2, 3), 4, 5, 8)
        mask = torch.rand(2, 3, 5) < 0.5 if masked else None
        expected = loop(
            *(reference.linear(x, weights, n) for x, n in ((query, "q_proj"), (key, "k_proj"), (key, "v_proj"))),
            num_heads,
            mask,
        )
        if out_proj:
            expected = reference.linear(expected, weights, "out_proj")
        if residual:
            expected = expected + query
        if norm:
            expected = reference.layer_norm(expected, weights, "norm")
        torch.testing.assert_close(module(query, key, mask), expected, rtol=1e-9, atol=1e-9)

    def test_parameters_are_those_asked_for(self) -> None:
        def names(**options: bool) -> set[str]:
            return {name for name, _ in dv.TileAttention(8, **options).named_parameters()}

        plain = {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
        assert names() == plain
        assert names(bias=True) == plain | {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
        assert names(out_proj=True) == plain | {"out_proj.weight"}
        assert names(norm=True) == plain | {"norm.weight", "norm.bias"}
        assert names(residual=True) == plain

    def test_xavier_start_draws_each_projection_on_its_own(self) -> None:
        module = dv.TileAttention(64, bias=True, out_proj=True, norm=True)
        weights = [p.weight for p in (module.q_proj, module.k_proj, module.v_proj, module.out_proj)]
        bound = (6 / 128) ** 0.5
        for k, weight in enumerate(weights):
            assert weight.abs().max() <= bound
            assert weight.abs().max() > 0.95 * bound  # uniform up to the bound: neither smaller nor constant
            assert all(not torch.equal(weight, other) for other in weights[:k])
        assert all((p.bias == 0).all() for p in (module.q_proj, module.k_proj, module.v_proj, module.out_proj))
        assert (module.norm.weight == 1).all()
        assert module.norm.eps == 1e-5

    def test_identical_start_as_in_the_released_code(self) -> None:
        module = dv.TileAttention(64, bias=True, out_proj=True, init="identical")
        weights = [p.weight for p in (module.q_proj, module.k_proj, module.v_proj, module.out_proj)]
        assert all(torch.equal(weight, weights[0]) for weight in weights)
        assert len({weight.data_ptr() for weight in weights}) == 4  # equal, not tied
        before = weights[0].clone()
        module.reset_parameters()
        assert all(torch.equal(weight, weights[0]) for weight in weights)
        assert not torch.equal(weights[0], before)

    def test_prints_its_arguments(self) -> None:
        text = dv.TileAttention(8, num_heads=2, residual=True).extra_repr()
        assert text == "dim=8, num_heads=2, residual=True, init='xavier'"

    def test_every_weight_has_a_gradient(self) -> None:
        module = dv.TileAttention(8, num_heads=2, bias=True, out_proj=True, residual=True, norm=True)
        out = module(torch.randn(2, 3, 8), torch.randn(2, 4, 8))
        (out * torch.randn_like(out)).sum().backward()
        for name, parameter in module.named_parameters():
            # the key bias adds a constant to each row of scores and drops out of the softmax
            assert (parameter.grad.abs().max() > 1e-5) == (name != "k_proj.bias"), name


class TestRefusals:
    @pytest.mark.parametrize(
        "query, key, value",
        [
            ((2, 3, 8), (2, 5, 8), (2, 4, 8)),
            ((2, 3, 8), (3, 5, 8), (3, 5, 8)),
            ((2, 3, 8), (2, 5, 4), (2, 5, 4)),
            ((2, 3, 8), (5, 8), (5, 8)),
        ],
    )
    def test_shapes(self, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
        with refuses(str(query), str(key), str(value), "one shape", "the same leading dimensions and width"):
            dv.tile_attention(torch.zeros(query), torch.zeros(key), torch.zeros(value))

    def test_heads(self) -> None:
        x = torch.zeros(2, 3, 8)
        for bad in (0, -1, 3):
            with refuses(f"num_heads={bad}", "positive divisor of the width 8"):
                dv.tile_attention(x, x, x, num_heads=bad)
            with refuses(f"num_heads={bad}", "positive divisor of the width 8"):
                dv.TileAttention(8, num_heads=bad)

    def test_init(self) -> None:
        with refuses("init='normal'", '"xavier" or "identical"'):
            dv.TileAttention(8, init="normal")
        assert isinstance(dv.TileAttention(8), nn.Module)
