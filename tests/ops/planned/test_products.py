"""How products are arranged: by estimated time, from rates; and only of layers that are what their class made them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dualview as dv
from dualview.ops.planned import products
from dualview.ops.planned.products import Arrangement, Layers, Products, rates_of, seconds_of, sizes_of
from tests.ops.planned.rates import MACHINES, machine

LIKE, LIKE_META = torch.empty(0), torch.empty(0, device="meta")


def features(grid: tuple[int, int], tokens: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    shape = (1, grid[0] * grid[1], *tokens, dim)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


class TestByCountingOperations:
    """Where every kind of work is equally fast."""

    def test_few_queries_are_absorbed(self) -> None:
        dem = dv.DualPerspectiveEnhance.released(1024)
        with machine("operations count"):
            assert [a.absorb for a in dem.products((3, 3), (24, 24), LIKE).directions] == [False, True]
            # 144 queries of 8 heads: 2 * 576 for keys and values, against 2 * 144 + 2 * 7 * 144 * 576 / 1024
            assert not dem.products((4, 4), (24, 24), LIKE).directions[1].absorb

    @pytest.mark.parametrize("tokens, pool", [((2, 3), "cells"), ((3, 2), "map")])
    @pytest.mark.parametrize("dim, in_blocks, in_strides", [(8, 0, 0), (10, 1, 0), (14, 1, 0), (16, 1, 1)])
    def test_fewer_rows_of_attention_are_absorbed_sooner(
        self, dim: int, in_blocks: int, in_strides: int, tokens: tuple[int, int], pool: str
    ) -> None:
        """Two heads, 6 tokens in 6 tiles: 2 * 6 * 6 < 5 d, and over cells, 6 rows in place of 36, 7 * 6 < 5 d."""
        with machine("operations count"):
            found = dv.DualPerspectiveEnhance.paper(dim, num_heads=2).products((2, 3), tokens, LIKE).directions
        expected = [(pool, bool(in_blocks if pool == "cells" else in_strides)), ("map", bool(in_strides))]
        assert [(a.pool, a.absorb) for a in found] == expected
        assert not any(a.fold for a in found), "one matrix is for one head"

    @pytest.mark.parametrize(
        "shared, dim, folds", [(False, 46, True), (False, 48, False), (True, 94, True), (True, 96, False)]
    )
    def test_one_matrix_pays_where_queries_outnumber_channels(self, shared: bool, dim: int, folds: bool) -> None:
        """48 queries; a matrix that both directions share is made once."""
        dem = dv.DualPerspectiveEnhance.paper(dim, share_weights=shared)
        with machine("operations count"):
            found = dem.products((2, 3), (2, 4), LIKE).directions
        assert [(a.absorb, a.fold) for a in found] == [(True, folds)] * 2

    @pytest.mark.parametrize("tokens", [(2, 4), (3, 3)])
    @pytest.mark.parametrize(
        "chosen", [{}, {"share_weights": False}, {"residual": True}, {"bias": True}, {"out_proj": True}]
    )
    def test_values_are_folded_where_nothing_else_follows(
        self, chosen: dict[str, bool], tokens: tuple[int, int]
    ) -> None:
        """And where there are more pooled tokens than half the width, 16."""
        dem = dv.DualPerspectiveEnhance.paper(16, **chosen)
        with machine("operations count"):
            folds = dem.products((2, 3), tokens, LIKE).fold_values
        assert folds == (not chosen.keys() - {"share_weights"} and tokens == (3, 3))

    @pytest.mark.parametrize("options, pools", [
        ({}, ["cells", "map"]),
        ({"fusion": "addition", "residual": True, "out_proj": True, "bias": True}, ["cells", "map"]),
        ({"norm": True}, [None, None]),
        ({"fusion": "multiplication"}, [None, None]),
        ({"fusion": "conv3x3"}, [None, None]),
        ({"readout": "none"}, [None, None]),
        ({"readout": "centre"}, [None, None]),
    ])  # fmt: skip
    def test_averages_are_taken_inside_where_all_that_follows_is_linear(
        self, options: dict[str, object], pools: list[str | None]
    ) -> None:
        dem = dv.DualPerspectiveEnhance.paper(64, **options)
        with machine("operations count"):
            assert [a.pool for a in dem.products((3, 3), (6, 6), LIKE).directions] == pools

    def test_cells_across_blocks_are_averaged_on_the_map(self) -> None:
        with machine("operations count"):
            found = dv.DualPerspectiveEnhance.paper(64).products((3, 3), (5, 6), LIKE).directions
        assert [a.pool for a in found] == ["map", "map"], "cells of 3 rows lie across blocks of 5"


def attention_operations(query: tuple[int, ...], key: tuple[int, ...], *_: object, **__: object) -> int:
    """Two products, of as many queries, keys and columns."""
    return 4 * math.prod(query) * key[2]


ATTENTION_ON_A_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations}


@pytest.mark.parametrize("grid, tokens", [((2, 3), (4, 6)), ((3, 3), (5, 6)), ((4, 4), (8, 8)), ((1, 5), (3, 5))])
@pytest.mark.parametrize("fastest", [name for name, rates in MACHINES.items() if rates is not None])
@pytest.mark.parametrize(
    "options",
    [{}, {"share_weights": False}, {"num_heads": 4}, {"out_proj": True}, {"fusion": "addition"}],
)
def test_what_is_estimated_is_what_is_done(
    options: dict[str, object], fastest: str, grid: tuple[int, int], tokens: tuple[int, int]
) -> None:
    """Counted from outside: operations that run are those that the chosen arrangement was said to have."""
    dem = dv.DualPerspectiveEnhance.paper(32, **options, dtype=torch.float64)
    with machine(fastest):
        chosen = dem.products(grid, tokens, LIKE)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_A_CPU) as done:
            dem(*features(grid, tokens, 32), grid)
    layers = [Layers(*sizes_of(attention)) for attention in (dem.attentions[0], dem.attentions[-1])]
    one_a_second, weights = MACHINES["operations count"], sum(p.numel() for p in dem.fusion.parameters())
    shared = len(dem.attentions) == 1
    assert done.get_total_flops() == seconds_of(dem.plan(grid, tokens), layers, chosen, one_a_second, shared, weights)


class TestByRates:
    @pytest.mark.parametrize(
        "tokens, fastest, absorbs",
        [
            ((6, 6), "projections are free", False),
            ((6, 6), "operations count", True),
            ((8, 8), "operations count", False),
            ((8, 8), "attention is free", True),
        ],
    )
    def test_the_machine_decides_how_and_nothing_else(
        self, tokens: tuple[int, int], fastest: str, absorbs: bool
    ) -> None:
        dem, grid = dv.DualPerspectiveEnhance.released(64).double(), (3, 3)
        given = features(grid, tokens, 64)
        expected = dem(*given, grid)
        with machine(fastest):
            assert [a.absorb for a in dem.products(grid, tokens, LIKE).directions] == [False, absorbs]
            torch.testing.assert_close(dem(*given, grid), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
    def test_nothing_is_arranged_where_nothing_was_measured(self, device: str) -> None:
        assert rates_of(torch.device(device), torch.float32) is None
        with machine("never measured"):
            found = dv.DualPerspectiveEnhance.paper(64).products((3, 3), (6, 6), LIKE)
        assert found == Products((Arrangement(), Arrangement()))

    def test_full_computation_arranges_nothing(self) -> None:
        with dv.full_computation():
            found = dv.DualPerspectiveEnhance.paper(64).products((3, 3), (6, 6), LIKE)
        assert found == Products((Arrangement(), Arrangement()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("n, absorbs", [(2, False), (3, False), (4, False), (5, True)])
    def test_a_hopper_gpu_projects_the_keys_of_the_released_module(
        self, n: int, absorbs: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As measured on an H100 in a graph: absorbing takes 1.5 times as long at 3 x 3 tiles, 0.95 times at 5 x 5."""
        monkeypatch.setattr(products, "capability", lambda device: (9, 0))
        hopper = rates_of(torch.device("cuda"), dtype)
        assert hopper is not None
        monkeypatch.setitem(MACHINES, "hopper", hopper)
        with machine("hopper"):
            found = dv.DualPerspectiveEnhance.released(1024).products((n, n), (24, 24), LIKE)
            assert [a.absorb for a in found.directions] == [False, absorbs]
            paper = dv.DualPerspectiveEnhance.paper(1024).products((n, n), (24, 24), LIKE)
            assert all(a.absorb and a.pool for a in paper.directions)


# --- What may be read -------------------------------------------------------------------------------------------------


def hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: None)


def pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda *_: None)


def backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda *_: None)


def own_forward(layer: nn.Module) -> None:
    layer.forward = layer.forward


def offloaded(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.to("meta"))


def accelerated(layer: nn.Module) -> None:
    layer._hf_hook = object()


def parametrised(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize("touch", [hook, pre_hook, backward_hook, own_forward, offloaded, accelerated, parametrised])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_nothing_is_arranged_around_a_layer_that_was_touched(touch, name: str) -> None:
    dem = dv.DualPerspectiveEnhance.released(64)
    with machine("attention is free"):
        assert dem.products((3, 3), (6, 6), LIKE).directions[1].absorb
        touch(getattr(dem.attentions[0], name))
        assert dem.products((3, 3), (6, 6), LIKE) == Products((Arrangement(), Arrangement()))


@pytest.mark.parametrize("touch", [hook, pre_hook, own_forward, parametrised])
def test_no_average_is_taken_before_a_fusion_that_was_touched(touch) -> None:
    dem = dv.DualPerspectiveEnhance.paper(64)
    with machine("operations count"):
        assert dem.products((3, 3), (6, 6), LIKE).fold_values
        touch(dem.fusion.local_proj)
        found = dem.products((3, 3), (6, 6), LIKE)
    assert [a.pool for a in found.directions] == [None, None]
    assert not found.fold_values


def both_ways(dem: nn.Module) -> tuple[Tensor, Tensor]:
    """Planned, and by the equations."""
    given = features((2, 3), (6, 6), 64)
    planned = dem(*given, (2, 3))
    with dv.full_computation():
        return planned, dem(*given, (2, 3))


class DeclaredAdapter(nn.Module):
    """An adapter that says it is linear, around a layer whose weight it shows."""

    linear = True

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.more = base.weight, base.bias, nn.Linear(64, 32, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.more(x)


HALVES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "low rank": lambda own: nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)),
    "adapter": DeclaredAdapter,
    "with a bias": lambda own: nn.Linear(64, 32),
    "wider": lambda own: nn.Linear(64, 48, bias=False),
}


@pytest.mark.parametrize("fastest", ["operations count", "operations count, then launches"])
@pytest.mark.parametrize("half", HALVES)
def test_values_are_folded_into_plain_layers_alone(half: str, fastest: str) -> None:
    dem = dv.DualPerspectiveEnhance.paper(64).double()
    dem.fusion.local_proj = HALVES[half](dem.fusion.local_proj).double()
    with machine(fastest):
        assert not dem.products((2, 3), (6, 6), LIKE).fold_values
        torch.testing.assert_close(*both_ways(dem))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_values_are_folded_only_beside_projections_without_biases(name: str) -> None:
    dem = dv.DualPerspectiveEnhance.paper(64).double()
    setattr(dem.attentions[0], name, nn.Linear(64, 64).double())
    with machine("operations count, then launches"):
        assert not dem.products((2, 3), (6, 6), LIKE).fold_values
        torch.testing.assert_close(*both_ways(dem))


def test_narrower_projections_are_called() -> None:
    """After structured pruning: the scale of the scores is that of their own width."""
    dem = dv.DualPerspectiveEnhance.paper(64, out_proj=True).double()
    attention = dem.attentions[0]
    attention.q_proj, attention.k_proj, attention.v_proj = (nn.Linear(64, 16, bias=False).double() for _ in range(3))
    attention.out_proj = nn.Linear(16, 64, bias=False).double()
    with machine("attention is free"):
        torch.testing.assert_close(*both_ways(dem))


def test_a_forward_put_into_the_class_of_linear_layers_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    dem, ordinary = dv.DualPerspectiveEnhance.paper(64).double(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 3 * ordinary(self, x))
    torch.testing.assert_close(*both_ways(dem))


@pytest.mark.parametrize("part", ["attentions.0.q_proj", "attentions.0", "fusion"])
def test_a_compiled_graph_is_made_anew_when_a_forward_is_replaced(part: str) -> None:
    torch._dynamo.reset()
    dem, given = dv.DualPerspectiveEnhance.paper(64).double().requires_grad_(False), features((2, 3), (6, 6), 64)
    compiled = torch.compile(lambda *x: dem(*x, (2, 3)), backend="eager")
    torch.testing.assert_close(compiled(*given), dem(*given, (2, 3)))
    layer = dem.get_submodule(part)
    ordinary = layer.forward
    layer.forward = lambda *x: 3 * ordinary(*x)
    torch.testing.assert_close(compiled(*given), dem(*given, (2, 3)))


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_compiled_graph_is_arranged_as_the_call_is(preset: str) -> None:
    torch._dynamo.reset()
    dem = getattr(dv.DualPerspectiveEnhance, preset)(64).double().requires_grad_(False)
    given, operations = features((3, 3), (2, 2), 64), []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        operations.append(counted(lambda: graph(*inputs)))
        return graph

    def counted(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    with machine("operations count"):
        torch.compile(lambda *x: dem(*x, (3, 3)), backend=count, fullgraph=True)(*given)
        planned = counted(lambda: dem(*given, (3, 3)))
    with machine("never measured"):
        as_written = counted(lambda: dem(*given, (3, 3)))
    assert operations == [planned]
    assert planned < as_written


def test_every_bias_has_a_gradient() -> None:
    """That of the keys is zero, but a reducer of gradients waits for it."""
    dem = dv.DualPerspectiveEnhance.paper(64, bias=True).double()
    with machine("attention is free"):
        dem(*features((3, 3), (6, 6), 64), (3, 3)).sum().backward()
    assert all(p.grad is not None for p in dem.parameters())


class OwnLinear(nn.Module):
    """A user's fusion, linear, with a layer of the user's own inside that says so, too."""

    radius, linear = 0, True

    class Halve(nn.Module):
        linear = True

        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    def __init__(self) -> None:
        super().__init__()
        self.halve = self.Halve()

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        return self.halve(v_loc) + v_glo


def test_the_word_of_a_users_fusion_is_taken_until_it_is_touched() -> None:
    dem = dv.DualPerspectiveEnhance.paper(64, fusion=OwnLinear())
    with machine("operations count"):
        assert all(a.pool for a in dem.products((3, 3), (6, 6), LIKE).directions)
        dem.fusion.halve = nn.Dropout()
        assert not any(a.pool for a in dem.products((3, 3), (6, 6), LIKE).directions)
