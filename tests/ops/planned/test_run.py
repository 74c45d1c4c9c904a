"""The live tokens with their products in any order: the results of the equations, nothing for dead tiles."""

import copy
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dualview as dv
from benchmarks.measure import peak_bytes
from dualview.kernels.chunked_attention import SCORES_AT_ONCE
from dualview.ops.planned.products import Layers, _candidates, sizes_of
from dualview.ops.planned.run import product_of_weights
from dualview.switches import planning
from tests.ops.planned.rates import MACHINES, machine
from tests.strategies import examples, some

GRIDS = [(1, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 3), (3, 2), (4, 2), (4, 4), (5, 5), (5, 3), (1, 5), (6, 3)]
FUSIONS = [
    "linear_concat", "bottleneck_concat", "addition", "weighted_addition", "multiplication", "max_pool", "conv3x3"
]  # fmt: skip
READOUTS = ["average", "bilinear", "centre", "none"]
DIM = 16


class Neighbours(nn.Module):
    """A fusion that declares nothing: it may look anywhere, and looks two tokens to the right."""

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        return v_glo + v_loc.roll(-2, dims=2)


class Blurred(nn.Module):
    """A fusion that looks one token around, and must see whole maps."""

    radius, linear = 1, True

    def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
        return v_glo + nn.functional.avg_pool2d(v_loc.movedim(-1, 1), 3, 1, padding=1).movedim(1, -1)


ARITHMETICS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "autocast": (torch.float32, True),
}
"""Types of parameters and tokens, and whether products are made in bfloat16 all the same."""


OWN = {"neighbours": Neighbours(), "blurred": Blurred()}


def inputs(grid, tokens, dtype=torch.float64, batch=2):
    shape = (batch, grid[0] * grid[1], *tokens, DIM)
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype, requires_grad=True)


def build(preset="released", dtype=torch.float64, **options):
    dem = getattr(dv.DualPerspectiveEnhance, preset)(DIM, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in dem.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return dem


def run(dem, tiles, grid, mask, direction, *, autocast=False):
    """Output and all gradients, zeros where there is none."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dem(*tiles, grid, mask)
    targets = [*tiles, *dem.parameters()]
    grads = torch.autograd.grad((out * direction[: out.shape[1], : out.shape[2]]).sum(), targets, allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(targets, grads, strict=True)]


@contextmanager
def at_most(scores, rows=1):
    """Within the block so many scores of an image are held at a time, and queries of so many rows projected."""
    with patch.dict(SCORES_AT_ONCE, cpu=scores), patch("dualview.ops.planned.run.LEAST_ROWS", rows):
        yield


def mask_of(kind, size):
    """No key mask, one for both maps, or one for each."""
    if kind is None:
        return None
    mask = torch.rand(2, *size) < 0.6
    return (mask, torch.rand(*size) < 0.6) if kind == "pair" else mask


of_every_preset = {
    "share_weights": st.booleans(),
    "readout": st.sampled_from(READOUTS),
    "enhance": st.sampled_from(["both", "both", "global", "local"]),
    "source": st.sampled_from(["dual", "dual", "local", "global", "sum"]),
}
options = st.fixed_dictionaries(
    {
        "num_heads": st.sampled_from([1, 2, 8]),
        "pairing": st.sampled_from(["paper", "released"]),
        "bias": st.booleans(),
        "out_proj": st.booleans(),
        "residual": st.booleans(),
        "norm": st.booleans(),
        "gate": st.booleans(),
    }
    | of_every_preset
)
token_maps = st.tuples(st.integers(1, 7), st.integers(1, 7))
masks = st.sampled_from([None, "one", "pair"])
machines = st.sampled_from(list(MACHINES))
seeds = st.integers(0, 999)


@settings(max_examples=examples(100))
@given(
    options,
    st.sampled_from([*FUSIONS, *OWN]),
    st.sampled_from(GRIDS),
    token_maps,
    masks,
    machines,
    st.sampled_from([1, 500, 2**19]),
    seeds,
)
def test_planned_equals_the_equations_in_outputs_and_gradients(
    chosen, fusion, grid, tokens, masked, fastest, few, seed
):
    torch.manual_seed(seed)
    if chosen["enhance"] == "both":
        chosen = chosen | {"fusion": OWN.get(fusion, fusion)}
    dem = build("paper", **chosen)
    tiles = inputs(grid, tokens)
    size = grid[0] * tokens[0], grid[1] * tokens[1]
    mask = mask_of(masked, size)
    direction = torch.randn(*size, DIM, dtype=torch.float64)
    with dv.full_computation():
        expected = run(dem, tiles, grid, mask, direction)
    live = dem.plan(grid, tokens).live
    with machine(fastest):
        got = run(dem, tiles, grid, mask, direction)
        alone = dem(tiles[0][:, list(live.local)], tiles[1][:, list(live.stride)], grid, mask, live=live)
        with torch.no_grad(), at_most(few):
            not_recorded = dem(*tiles, grid, mask)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(alone, got[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(not_recorded, got[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@settings(max_examples=examples(25))
@given(
    st.sampled_from(["paper", "released"]),
    st.fixed_dictionaries(of_every_preset) | options,
    st.sampled_from([None, *FUSIONS, *OWN]),  # None: that of the preset
    st.sampled_from(GRIDS),
    token_maps,
    masks,
    machines,
    seeds,
)
def test_planned_errs_as_full_does(arithmetic, preset, chosen, fusion, grid, tokens, masked, fastest, seed):
    """Against float64, outputs and gradients err at most twice as much, and a few roundings more.

    The outputs do so tile by tile, too, where no gradient is recorded.

    Both make about as many roundings, but not the same: matrices are multiplied with each other, averages are taken
    sooner, sums have more terms or fewer. So the errors are of one size, and it is chance which is the larger. What is
    allowed beside is relative to the output or the largest gradient, for in what nearly cancels the roundings of the
    terms remain. It is more in float32: sums of half types are float32, too, and only their results are rounded. The
    most that was needed of it, in 15,000 examples of each arithmetic: 9 of 16 eps in float32, 2 of 4 elsewhere.
    """
    torch.manual_seed(seed)
    dtype, autocast = ARITHMETICS[arithmetic]
    if fusion is not None and chosen["enhance"] == "both":
        chosen = chosen | {"fusion": OWN.get(fusion, fusion)}
    dem = build(preset, dtype, **chosen)
    tiles = inputs(grid, tokens, dtype)
    size = grid[0] * tokens[0], grid[1] * tokens[1]
    mask, direction = mask_of(masked, size), torch.randn(*size, DIM, dtype=dtype)
    with machine(fastest):
        planned = run(dem, tiles, grid, mask, direction, autocast=autocast)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), at_most(1):
            by_tiles = dem(*tiles, grid, mask)
    with dv.full_computation():
        full = run(dem, tiles, grid, mask, direction, autocast=autocast)
        wide = [x.detach().double().requires_grad_() for x in tiles]
        exact = run(copy.deepcopy(dem).double(), wide, grid, mask, direction.double())

    roundings = (16 if arithmetic == "float32" else 4) * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert planned[0].dtype == full[0].dtype

    def assert_errs_as_full_does(name, planned, full, exact, scale):
        error, allowed = (float((x.double() - exact).norm()) for x in (planned, full))
        assert error <= 2 * allowed + roundings * scale, f"{name}: {error:.2e}, in full {allowed:.2e}"

    assert by_tiles.dtype == full[0].dtype
    for name, out in {"output": planned[0], "output tile by tile": by_tiles}.items():
        assert_errs_as_full_does(name, out, full[0], exact[0], float(exact[0].norm()))
    if isinstance(dem.fusion, dv.MaxPoolFusion):
        return  # its gradient jumps from one map to the other where they cross, and rounding moves that place
    largest = max(float(x.norm()) for x in exact[1])
    names = ["local tiles", "stride tiles", *dict(dem.named_parameters())]
    for name, *found, gradient in zip(names, planned[1], full[1], exact[1], strict=True):
        # Not where it is nothing but rounding: of the bias of the keys, which adds the same to all scores of a query,
        # and of all scores where there is one key.
        if gradient.norm() > 1e-9 * largest:
            assert_errs_as_full_does(name, *found, gradient, largest)


@pytest.mark.parametrize("tokens, pool", [((4, 6), "cells"), ((5, 6), "map")])
@pytest.mark.parametrize("pairing", ["paper", "released"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("masked", [None, "one", "pair"])
@pytest.mark.parametrize("fastest", ["operations count", "attention is free"])
def test_averages_taken_inside_are_those_of_the_equations(fastest, masked, residual, pairing, tokens, pool):
    """Few random sizes have cells that fill blocks. A whole tile of either perspective is masked besides."""
    grid = (2, 3)
    dem = build("paper", pairing=pairing, residual=residual, bias=True, out_proj=True, num_heads=2)
    tiles, size = inputs(grid, tokens), (grid[0] * tokens[0], grid[1] * tokens[1])
    mask = mask_of(masked, size)
    for part in () if mask is None else mask if masked == "pair" else (mask,):
        part[..., : tokens[0], : tokens[1]] = False
        part[..., :: grid[0], :: grid[1]] = False
    direction = torch.randn(*size, DIM, dtype=torch.float64)
    with dv.full_computation():
        expected = run(dem, tiles, grid, mask, direction)
    with machine(fastest):
        assert {a.pool for a in dem.products(grid, tokens, tiles[0]).directions} == {pool, "map"}
        torch.testing.assert_close(run(dem, tiles, grid, mask, direction), expected, rtol=1e-8, atol=1e-9)
        with torch.no_grad(), at_most(1):  # tile by tile
            torch.testing.assert_close(dem(*tiles, grid, mask), expected[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share_weights", [False, True])
def test_every_arrangement_gives_the_same(share_weights, bias):
    """No machine is fastest with some of them: to fold W_q W_k^T for one of two directions that share it, say."""
    dem, tiles, grid = build("paper", share_weights=share_weights, bias=bias), inputs((2, 3), (4, 6)), (2, 3)
    direction = torch.randn(8, 18, DIM, dtype=torch.float64)
    with dv.full_computation():
        expected = run(dem, tiles, grid, None, direction)
    layers = [Layers(*sizes_of(dem.attentions[index])) for index in (-1, 0)]
    ways = list(_candidates(dem.plan(grid, (4, 6)), layers, shared=share_weights, averaged=True, concat=True))
    assert len(ways) == 18 + (4 + share_weights) * (not bias)
    for way in ways:
        with patch("dualview.ops.enhance.products_of", return_value=way):
            torch.testing.assert_close(run(dem, tiles, grid, None, direction), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("grid, tokens", [((1, 1), (3, 4)), ((3, 1), (6, 4)), ((3, 3), (6, 6))])
@pytest.mark.parametrize("source", ["dual", "sum"])
@pytest.mark.parametrize("fusion", ["bottleneck_concat", "max_pool"])
@pytest.mark.parametrize("masked, bias", [(None, True), ("pair", False)])
def test_both_directions_together_are_those_of_the_equations(masked, fusion, bias, source, grid, tokens):
    """Hardly a random module is computed so: the directions must share their layers, and one must ask one tile."""
    dem = build(fusion=fusion, bias=bias, source=source)
    tiles, size = inputs(grid, tokens), (grid[0] * tokens[0], grid[1] * tokens[1])
    mask, direction = mask_of(masked, size), torch.randn(*size, DIM, dtype=torch.float64)
    with dv.full_computation():
        expected = run(dem, tiles, grid, mask, direction)
    with machine("launches count"):
        assert dem.products(grid, tokens, tiles[0]).together
        torch.testing.assert_close(run(dem, tiles, grid, mask, direction), expected, rtol=1e-8, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(dem(*tiles, grid, mask), expected[0], rtol=1e-8, atol=1e-9)


def folded_together(dem, grid, tokens):
    """The arrangement with all weights folded, and the keys of both directions in one product."""
    layers = [Layers(*sizes_of(dem.attentions[0]))] * 2
    ways = _candidates(dem.plan(grid, tokens), layers, shared=True, averaged=True, concat=True)
    (way,) = (way for way in ways if way.fold_values and way.together)
    return patch("dualview.ops.enhance.products_of", return_value=way)


@pytest.fixture
def folds():
    """Sees the weights that are multiplied for both directions."""
    with patch("dualview.ops.planned.run.product_of_weights", wraps=product_of_weights) as seen:
        yield seen


@pytest.mark.parametrize("grid, tokens", [((1, 1), (3, 4)), ((3, 1), (6, 4)), ((2, 3), (4, 6)), ((2, 3), (4, 3))])
@pytest.mark.parametrize("source", ["dual", "local", "global", "sum"])
@pytest.mark.parametrize("pairing", ["paper", "released"])
def test_keys_of_both_directions_in_one_product_give_the_same(pairing, source, grid, tokens, folds):
    """Also where the tiles that are given are in an order of their own."""
    dem, tiles = build("paper", pairing=pairing, source=source), inputs(grid, tokens)
    live = tuple(torch.randperm(grid[0] * grid[1]).tolist() for _ in range(2))
    with torch.no_grad():
        with dv.full_computation():
            expected = dem(*tiles, grid)
        with folded_together(dem, grid, tokens):
            torch.testing.assert_close(dem(*tiles, grid), expected, rtol=1e-8, atol=1e-9)
            mixed = dem(*(x[:, order] for x, order in zip(tiles, live, strict=True)), grid, live=live)
            torch.testing.assert_close(mixed, expected, rtol=1e-8, atol=1e-9)
    assert folds.call_count == 2


@pytest.mark.parametrize("masked, recorded, large", [("pair", False, False), (None, True, False), (None, False, True)])
def test_directions_follow_one_another(masked, recorded, large, folds):
    """Where keys are masked, where a backward pass would have to join maps again, where the kernel moves large ones."""
    grid, tokens = (2, 3), (4, 6)
    dem, tiles, mask = build("paper"), inputs(grid, tokens), mask_of(masked, (8, 18))
    with torch.set_grad_enabled(recorded):
        with folded_together(dem, grid, tokens), patch("dualview.ops.planned.run.takes_kernel", return_value=large):
            planned = dem(*tiles, grid, mask)
        with dv.full_computation():
            torch.testing.assert_close(planned, dem(*tiles, grid, mask), rtol=1e-8, atol=1e-9)
    folds.assert_not_called()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_keys_of_both_directions_in_one_product_err_as_full_does(arithmetic, folds):
    torch.manual_seed(0)
    (dtype, autocast), grid, tokens = ARITHMETICS[arithmetic], (2, 3), (8, 6)
    dem, tiles = build("paper", dtype), inputs(grid, tokens, dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with folded_together(dem, grid, tokens):
            planned = dem(*tiles, grid)
        with dv.full_computation():
            full = dem(*tiles, grid)
    with torch.no_grad(), dv.full_computation():
        exact = copy.deepcopy(dem).double()(*(x.double() for x in tiles), grid)
    assert planned.dtype == full.dtype
    assert (planned.double() - exact).norm() <= 2 * (full.double() - exact).norm()
    folds.assert_called_once()


def test_small_weights_of_half_type_are_not_lost_in_their_product(folds):
    """In float16 what is smaller than 6e-5 has fewer digits: the product of two weights is not divided further."""
    torch.manual_seed(0)
    dim, grid, tokens = 64, (2, 3), (4, 6)
    dem = dv.DualPerspectiveEnhance.paper(dim, dtype=torch.float16)
    tiles = torch.randn(2, 2, 6, *tokens, dim, dtype=torch.float16)
    with torch.no_grad():
        for parameter in dem.parameters():
            parameter.copy_(0.002 * torch.randn_like(parameter))
        with folded_together(dem, grid, tokens):
            planned = dem(*tiles, grid)
        with dv.full_computation():
            full = dem(*tiles, grid)
            exact = copy.deepcopy(dem).double()(*tiles.double(), grid)
    assert (planned.double() - exact).norm() <= 2 * (full.double() - exact).norm()
    folds.assert_called_once()


def test_vmap_of_keys_of_both_directions_in_one_product(folds):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    dem, grid, tokens = build("paper"), (2, 3), (4, 6)
    tiles = inputs(grid, tokens, batch=3)
    with torch.no_grad(), folded_together(dem, grid, tokens):
        each = torch.func.vmap(lambda *tiles: dem(*(x.unsqueeze(0) for x in tiles), grid).squeeze(0))(*tiles)
    assert folds.call_count == 1
    with torch.no_grad(), dv.full_computation():
        torch.testing.assert_close(each, dem(*tiles, grid), rtol=1e-8, atol=1e-9)


def test_a_compiled_graph_has_keys_of_both_directions_in_one_product():
    dem, grid, tokens = build("paper"), (2, 3), (4, 6)
    tiles, products = inputs(grid, tokens), []

    def count(graph, inputs):
        called = [node.target for node in graph.graph.nodes]
        products.append({of.__name__: called.count(of) for of in (torch.bmm, torch.addmm, torch.baddbmm)})
        return graph

    torch._dynamo.reset()
    with torch.no_grad(), machine("operations count, then launches"):
        found = torch.compile(dem, fullgraph=True, backend=count)(*tiles, grid)
        with dv.full_computation():
            torch.testing.assert_close(found, dem(*tiles, grid), rtol=1e-8, atol=1e-9)
    assert products == [{"bmm": 1, "addmm": 1, "baddbmm": 1}], "of the weights, with the keys, and over the tiles"


@pytest.mark.parametrize("fastest", ["launches count", "never measured"])
@pytest.mark.parametrize("readout", ["bilinear", "none"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_live_tiles_may_come_in_any_order(preset, readout, fastest):
    dem, tiles, grid = build(preset, readout=readout), inputs((3, 3), (6, 6)), (3, 3)
    live = torch.randperm(9).tolist(), torch.randperm(9).tolist()
    with torch.no_grad(), machine(fastest):
        mixed = dem(*(x[:, order] for x, order in zip(tiles, live, strict=True)), grid, live=live)
        torch.testing.assert_close(mixed, dem(*tiles, grid), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fusion", ["addition", "multiplication", "bottleneck_concat"])
@pytest.mark.parametrize("masked", [None, "one"])
def test_planned_has_the_type_of_full_under_autocast(fusion, masked):
    """Where the values' bias is added by hand, and no linear layer follows."""
    plain = {"num_heads": 1, "bias": True, "out_proj": False, "residual": False, "norm": False}
    dem = build(**plain, fusion=fusion, readout="centre", dtype=torch.float32)
    tiles, mask = inputs((3, 3), (6, 6), torch.float32, batch=1), mask_of(masked, (18, 18))
    mask = None if mask is None else mask[:1]
    with torch.autocast("cpu", torch.bfloat16), machine("attention is free"):
        assert all(a.absorb for a in dem.products((3, 3), (6, 6), tiles[0]).directions)
        planned = dem(*tiles, (3, 3), mask)
        with dv.full_computation():
            assert planned.dtype == dem(*tiles, (3, 3), mask).dtype


@pytest.mark.parametrize(
    "grid, fusion, readout, arithmetic",
    some(product(GRIDS, ["bottleneck_concat", "conv3x3"], ["bilinear", "centre"], ["float64", *ARITHMETICS]), 3),
)
def test_dead_tiles_neither_act_nor_learn(grid, fusion, readout, arithmetic):
    """Noise in a dead tile leaves the output bit-equal; its gradient is exactly zero; every live tile acts."""
    torch.manual_seed(0)
    dtype, autocast = ARITHMETICS.get(arithmetic, (torch.float64, False))
    dem = build(fusion=fusion, readout=readout, dtype=dtype)
    tokens = (6, 5)
    tiles = inputs(grid, tokens, dtype, batch=1)
    direction = torch.randn(grid[0] * tokens[0], grid[1] * tokens[1], DIM, dtype=dtype)
    out, gradients = run(dem, tiles, grid, None, direction, autocast=autocast)
    live = dem.plan(grid, tokens).live
    for gradient, present in zip(gradients[:2], live, strict=True):
        for tile in range(grid[0] * grid[1]):
            assert (gradient[:, tile].abs().max() > 0) == (tile in present)
    noisy = [map_.detach().clone() for map_ in tiles]
    for map_, present in zip(noisy, live, strict=True):
        for tile in set(range(grid[0] * grid[1])) - set(present):
            map_[:, tile] = torch.empty_like(map_[:, tile]).uniform_(-1, 1) * torch.finfo(dtype).max
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(dem(*noisy, grid), out)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("grid", [(2, 3), (3, 3)])
def test_error_is_at_most_twice_that_of_the_full_computation(grid, preset, arithmetic):
    """Of the output, and of all gradients together, where chance evens out."""
    torch.manual_seed(0)
    dtype, autocast = ARITHMETICS[arithmetic]
    dem, tiles = build(preset), inputs(grid, (6, 6))
    direction = torch.randn(6 * grid[0], 6 * grid[1], DIM, dtype=dtype)
    with dv.full_computation():
        exact, of_exact = run(dem, tiles, grid, None, direction.double())
    dem = dem.to(dtype)
    tiles = [x.detach().to(dtype).requires_grad_() for x in tiles]
    planned, of_planned = run(dem, tiles, grid, None, direction, autocast=autocast)
    with dv.full_computation():
        full, of_full = run(dem, tiles, grid, None, direction, autocast=autocast)

    def error(found, exact):
        differences = [(x.double() - y).flatten() for x, y in zip(found, exact, strict=True)]
        return torch.cat(differences).square().mean().sqrt()

    assert error([planned], [exact]) <= 2 * error([full], [exact]) + 1e-9
    assert error(of_planned, of_exact) <= 2 * error(of_full, of_exact) + 1e-9


def test_a_forward_that_was_put_into_a_fusion_may_look_anywhere():
    """What its class declares was said of another forward."""
    dem, tiles = build(fusion="conv3x3", readout="centre"), inputs((1, 5), (3, 5))
    ordinary = dem.fusion.forward
    dem.fusion.forward = lambda v_loc, v_glo: ordinary(v_loc, v_glo.roll(-2, dims=2))
    with torch.no_grad():
        planned = dem(*tiles, (1, 5))
        with dv.full_computation():
            torch.testing.assert_close(planned, dem(*tiles, (1, 5)), rtol=1e-8, atol=1e-9)


def test_a_forward_that_accelerate_has_wrapped_is_that_of_its_class():
    """Unless another one had been put there before."""
    dem = build(fusion="conv3x3", readout="centre")
    plan = dem.plan((1, 5), (3, 5))
    add_hook_to_module(dem.fusion, ModelHook())
    assert dem.plan((1, 5), (3, 5)) == plan
    remove_hook_from_module(dem.fusion)
    dem.fusion.forward = lambda v_loc, v_glo: v_glo.roll(-2, dims=2)
    add_hook_to_module(dem.fusion, ModelHook())
    assert dem.plan((1, 5), (3, 5)) != plan


def test_the_switch_is_restored_after_an_error():
    assert planning()
    dem = build()
    with pytest.raises(ValueError), dv.full_computation():  # noqa: PT011 - any error
        dem(*inputs((2, 2), (2, 2)), (3, 3))
    assert planning()


def test_only_live_keys_are_projected():
    """Seen from outside, the tokens that meet W_k: one stride tile and all nine blocks, against all of both maps."""
    dem, (local, stride) = build(), inputs((3, 3), (6, 6), batch=1)
    seen = []
    dem.attentions[0].k_proj.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    dem(local, stride, (3, 3))
    planned, seen[:] = seen[:], []
    for keys, expected in zip(planned, (stride[:, 4:5], local), strict=True):
        assert torch.equal(keys, expected.flatten(1, 3))
    with dv.full_computation():
        dem(local, stride, (3, 3))
    assert [x.shape[:-1].numel() for x in (*planned, *seen)] == [36, 9 * 36, 324, 324]


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_tiles_are_gathered_a_few_at_a_time(preset):
    """Where no gradient is recorded, no copy of all queries, keys or results is ever held."""
    dem, tiles = getattr(dv.DualPerspectiveEnhance, preset)(128), torch.randn(2, 1, 25, 20, 20, 128)
    with torch.no_grad(), machine("attention is free"), at_most(1):
        dem(*tiles, (5, 5))
        peak = peak_bytes(lambda: dem(*tiles, (5, 5)), "cpu")
    assert peak < 0.6 * tiles[0].nbytes


def test_queries_of_a_few_tiles_are_projected_together():
    """Of 9 tiles with 4 queries each, as many at a time as have the rows that are asked for."""
    dem, tiles, seen = dv.DualPerspectiveEnhance.released(16), torch.randn(2, 1, 9, 6, 6, 16), []
    for least in (1, 5, 12, 1000):
        seeing = patch("torch.nn.functional.linear", wraps=torch.nn.functional.linear)
        with torch.no_grad(), machine("attention is free"), at_most(1, least), seeing as linear:
            dem(*tiles, (3, 3))
        of_queries = [call.args[0] for call in linear.call_args_list if call.args[1] is dem.attentions[0].q_proj.weight]
        seen.append({x.shape[1] for x in of_queries if x.shape[2] == 4})
    assert seen == [{1}, {1, 2}, {3}, {9}]
