"""The fusions of Table 5 and of the released weights, against their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dualview as dv
from dualview.ops.fusion import FUSIONS
from tests import reference
from tests.checks import refuses

CLASSES = {
    "linear_concat": dv.LinearConcatFusion,
    "bottleneck_concat": dv.BottleneckConcatFusion,
    "addition": dv.AdditionFusion,
    "weighted_addition": dv.WeightedAdditionFusion,
    "multiplication": dv.MultiplicationFusion,
    "max_pool": dv.MaxPoolFusion,
    "conv3x3": dv.Conv3x3Fusion,
}


sizes = st.sampled_from([(2, 3), (3, 1), (1, 1), (4, 4)])


def randomised(module: nn.Module) -> nn.Module:
    """All parameters drawn anew, so that no bias, norm or logit is at its neutral start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def test_names() -> None:
    assert FUSIONS == CLASSES


@pytest.mark.parametrize("name", CLASSES)
@given(
    dim=st.sampled_from([16, 32]),
    batch=st.integers(0, 2),
    size=sizes,
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_equals_the_formula(name: str, dim: int, batch: int, size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    fusion = randomised(CLASSES[name](dim, dtype=torch.float64))
    v_loc, v_glo = maps(batch, *size, dim)
    fused = fusion(v_loc, v_glo)
    assert fused.shape == v_loc.shape
    weights = dict(fusion.named_parameters())
    for one, loc, glo in zip(fused, v_loc, v_glo, strict=True):
        torch.testing.assert_close(one, reference.fuse(name, loc, glo, weights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"conv3x3"}))
def test_token_by_token(name: str) -> None:
    """Any leading dimensions will do, and no token sees its neighbour."""
    fusion = randomised(CLASSES[name](16, dtype=torch.float64))
    v_loc, v_glo = maps(2, 3, 4, 16)
    fused = fusion(v_loc, v_glo)
    torch.testing.assert_close(fusion(v_loc[1, 2, 3], v_glo[1, 2, 3]), fused[1, 2, 3])


def test_conv_sees_its_neighbours() -> None:
    fusion = dv.Conv3x3Fusion(2, dtype=torch.float64)
    v_loc, v_glo = maps(1, 5, 6, 2)
    v_loc.requires_grad_()
    fusion(v_loc, v_glo)[0, 2, 3].sum().backward()
    seen = v_loc.grad[0].abs().sum(-1) > 0
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(seen, expected)


def test_concatenation_orders() -> None:
    """The paper writes [global; local], the released code concatenates [local, global]."""
    linear = dv.LinearConcatFusion(16)
    nn.init.zeros_(linear.local_proj.weight)
    out = linear(torch.randn(3, 16), torch.randn(3, 16))
    assert (out[:, 8:] == 0).all()
    assert (out[:, :8] != 0).all()

    released = dv.BottleneckConcatFusion(16)
    released.norm = nn.Identity()
    for layer in released.local_bottleneck[::2]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    zero = torch.zeros(3, 16)
    out = released(zero, zero)
    assert (out[:, :8] == 0).all()
    assert (out[:, 8:] != 0).any()


@pytest.mark.parametrize("name", CLASSES)
def test_looks_as_far_as_it_declares(name: str) -> None:
    fusion = randomised(CLASSES[name](16, dtype=torch.float64))
    v_loc, v_glo = maps(1, 7, 7, 16)
    other_loc, other_glo = v_loc.clone(), v_glo.clone()
    other_loc[0, 3, 3] += 9
    other_glo[0, 3, 3] += 9
    reached = (fusion(other_loc, other_glo) != fusion(v_loc, v_glo))[0].any(-1).nonzero()
    assert (reached - 3).abs().max() == fusion.radius


@pytest.mark.parametrize("name", CLASSES)
def test_is_affine_where_it_declares_to_be_linear(name: str) -> None:
    """Then, and only then, an average may be taken before it."""
    fusion = randomised(CLASSES[name](16, dtype=torch.float64))
    one, other = maps(1, 3, 4, 16), maps(1, 3, 4, 16)
    of_means = fusion(*((x + y) / 2 for x, y in zip(one, other, strict=True)))
    assert torch.allclose(of_means, (fusion(*one) + fusion(*other)) / 2) == fusion.linear


def test_parameter_counts() -> None:
    def count(name: str, dim: int) -> int:
        return sum(p.numel() for p in CLASSES[name](dim).parameters())

    d = 32
    assert count("linear_concat", d) == d * d  # Eq. 26: two matrices d x d/2
    assert count("bottleneck_concat", d) == 2 * (d * d // 16 + d // 16 + d // 16 * d // 2 + d // 2) + 2 * d
    assert [count(name, d) for name in ("addition", "multiplication", "max_pool")] == [0, 0, 0]
    assert count("weighted_addition", d) == d
    assert count("conv3x3", d) == 2 * d * d * 9 + d


def test_weighted_addition_starts_in_the_middle_and_stays_between() -> None:
    fusion = dv.WeightedAdditionFusion(2)
    assert fusion(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 5.0])).tolist() == [2.0, 3.0]
    with torch.no_grad():
        fusion.logit.copy_(torch.tensor([100.0, -100.0]))
    assert fusion(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 5.0])).tolist() == [3.0, 1.0]  # all global, all local
    fusion.reset_parameters()
    assert fusion.logit.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["addition", "multiplication", "max_pool"])
def test_the_width_is_optional_where_nothing_is_learnt(name: str) -> None:
    v_loc, v_glo = maps(3, 4)
    assert torch.equal(CLASSES[name]()(v_loc, v_glo), CLASSES[name](4)(v_loc, v_glo))


@pytest.mark.parametrize("name", CLASSES)
def test_gradcheck(name: str) -> None:
    fusion = randomised(CLASSES[name](16, dtype=torch.float64))
    v_loc, v_glo = (x.requires_grad_() for x in maps(1, 2, 3, 16))
    assert torch.autograd.gradcheck(fusion, (v_loc, v_glo), fast_mode=True)


@pytest.mark.parametrize(
    "name, dim, divisor",
    [("linear_concat", 5, 2), ("linear_concat", 0, 2), ("bottleneck_concat", 24, 16), ("bottleneck_concat", -16, 16)],
)
def test_refuses_widths(name: str, dim: int, divisor: int) -> None:
    with refuses(f"dim={dim}", f"positive multiple of {divisor}"):
        CLASSES[name](dim)
