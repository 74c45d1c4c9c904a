"""The plan: what it leaves out changes nothing, and what it leaves out is what can be left out."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dualview as dv
from dualview.geometry import position
from dualview.ops.plan import SPEED_OF_ABSORBED, AxisCut, planning
from dualview.ops.readout import read_out

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


class Cells(nn.Module):
    """A linear fusion that averages cells."""

    radius, linear, cells = 0, True, True

    def forward(self, v_loc: Tensor, v_glo: Tensor, *, cell: tuple[int, int] = (1, 1)) -> Tensor:
        return read_out(v_glo + 2 * v_loc, cell, "average")


ARITHMETICS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "autocast": (torch.float32, True),
}
"""Types of parameters and tokens, and whether products are made in bfloat16 all the same."""


OWN = {"neighbours": Neighbours(), "blurred": Blurred(), "cells": Cells()}


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
        "low_pass": st.booleans(),
    }
    | of_every_preset
)
token_maps = st.tuples(st.integers(1, 7), st.integers(1, 7))
masks = st.sampled_from([None, "one", "pair"])
seeds = st.integers(0, 999)


@settings(max_examples=150)
@given(
    options,
    st.sampled_from([*FUSIONS, *OWN]),
    st.sampled_from(GRIDS),
    token_maps,
    masks,
    seeds,
)
def test_planned_equals_full_in_outputs_and_gradients(chosen, fusion, grid, tokens, masked, seed):
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
    got = run(dem, tiles, grid, mask, direction)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)

    # The live tiles alone are enough.
    live = dem.plan(grid, tokens).live
    alone = dem(tiles[0][:, list(live.local)], tiles[1][:, list(live.stride)], grid, mask, live=live)
    torch.testing.assert_close(alone, got[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@settings(max_examples=60)
@given(
    st.sampled_from(["paper", "released"]),
    st.fixed_dictionaries(of_every_preset) | options,
    st.sampled_from([None, *FUSIONS, *OWN]),  # None: that of the preset
    st.sampled_from(GRIDS),
    token_maps,
    masks,
    seeds,
)
def test_planned_errs_as_full_does(arithmetic, preset, chosen, fusion, grid, tokens, masked, seed):
    """Against float64, outputs and gradients err at most twice as much, and a few roundings more.

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
    planned = run(dem, tiles, grid, mask, direction, autocast=autocast)
    with dv.full_computation():
        full = run(dem, tiles, grid, mask, direction, autocast=autocast)
        wide = [x.detach().double().requires_grad_() for x in tiles]
        exact = run(copy.deepcopy(dem).double(), wide, grid, mask, direction.double())

    roundings = (16 if arithmetic == "float32" else 4) * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert planned[0].dtype == full[0].dtype

    def assert_errs_as_full_does(name, planned, full, exact, scale):
        error, allowed = (float((x.double() - exact).norm()) for x in (planned, full))
        assert error <= 2 * allowed + roundings * scale, f"{name}: {error:.2e}, in full {allowed:.2e}"

    assert_errs_as_full_does("output", planned[0], full[0], exact[0], float(exact[0].norm()))
    if isinstance(dem.fusion, dv.MaxPoolFusion):
        return  # its gradient jumps from one map to the other where they cross, and rounding moves that place
    largest = max(float(x.norm()) for x in exact[1])
    names = ["local tiles", "stride tiles", *dict(dem.named_parameters())]
    for name, *found, gradient in zip(names, planned[1], full[1], exact[1], strict=True):
        # Not where it is nothing but rounding: of the bias of the keys, which adds the same to all scores of a query,
        # and of all scores where there is one key.
        if gradient.norm() > 1e-9 * largest:
            assert_errs_as_full_does(name, *found, gradient, largest)


@pytest.mark.parametrize("fusion", ["addition", "multiplication", "bottleneck_concat"])
@pytest.mark.parametrize("masked", [None, "one"])
def test_planned_has_the_type_of_full_under_autocast(fusion, masked):
    """Where the values' bias is added by hand, and no linear layer follows."""
    plain = {"num_heads": 1, "bias": True, "out_proj": False, "residual": False, "norm": False}
    dem = build(**plain, fusion=fusion, readout="centre", dtype=torch.float32)
    tiles, mask = inputs((3, 3), (6, 6), torch.float32, batch=1), mask_of(masked, (18, 18))
    mask = None if mask is None else mask[:1]
    with torch.autocast("cpu", torch.bfloat16):
        planned = dem(*tiles, (3, 3), mask)
        with dv.full_computation():
            assert planned.dtype == dem(*tiles, (3, 3), mask).dtype
    assert any(d.absorb for d in dem.plan((3, 3), (6, 6)).directions)


@pytest.mark.parametrize("arithmetic", ["float64", *ARITHMETICS])
@pytest.mark.parametrize("readout", ["bilinear", "centre"])
@pytest.mark.parametrize("fusion", ["bottleneck_concat", "conv3x3"])
@pytest.mark.parametrize("grid", GRIDS)
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


@pytest.mark.parametrize("n, stride", [(1, (0,)), (2, (0, 1, 2, 3)), (3, (4,)), (4, (5, 6, 9, 10)), (5, (12,))])
def test_live_tiles_of_the_released_module(n, stride):
    """The table of the released readout: all local tiles, and the central offsets of the stride tiles."""
    live = dv.DualPerspectiveEnhance.released(1024).plan((n, n), (24, 24)).live
    assert live == (tuple(range(n * n)), stride)


def test_convolution_widens_what_is_read():
    dem = dv.DualPerspectiveEnhance.released(DIM, fusion="conv3x3")
    assert dem.plan((3, 3), (24, 24)).live.stride == tuple(range(9))
    assert dem.plan((5, 5), (24, 24)).live.stride == (6, 7, 8, 11, 12, 13, 16, 17, 18)


@pytest.mark.parametrize("grid, tokens", [((3, 3), (24, 24)), ((5, 5), (24, 24)), ((3, 2), (7, 4)), ((1, 4), (3, 8))])
def test_as_many_queries_as_the_readout_reads(grid, tokens):
    plan = dv.DualPerspectiveEnhance.released(1024).plan(grid, tokens)
    per_axis = [(1 if n % 2 else 2) * size for n, size in zip(grid, tokens, strict=True)]
    assert [len(positions) for positions in plan.read] == per_axis
    for d in plan.directions:
        assert d.keys == tokens[0] * tokens[1]
        assert d.num_tiles * d.queries >= per_axis[0] * per_axis[1]
    if all(n % 2 and size % n == 0 for n, size in zip(grid, tokens, strict=True)):
        assert [(d.num_tiles, d.queries) for d in plan.directions] == [(1, 576), (9, 64)]


def test_absorbing_is_chosen_by_the_count_of_operations():
    """Few queries against many keys: absorb. As many queries as keys, eight heads: project."""
    local, of_global = dv.DualPerspectiveEnhance.released(1024).plan((3, 3), (24, 24)).directions
    assert (local.queries, local.absorb) == (576, False)
    assert (of_global.queries, of_global.absorb) == (64, True)
    # 144 queries of 8 heads: 2 * 576 * 1024 for keys and values, against (2 * 144 + 2 * 7 * 144 * 576 / 1024) * 1024
    assert not dv.DualPerspectiveEnhance.released(1024).plan((4, 4), (24, 24)).directions[1].absorb


@pytest.mark.parametrize("tokens, pool", [((2, 3), "cells"), ((3, 2), "map")])
@pytest.mark.parametrize("dim, in_blocks, in_strides", [(8, 0, 0), (10, 1, 0), (14, 1, 0), (16, 1, 1)])
def test_absorbing_pays_sooner_with_fewer_rows_of_attention(dim, in_blocks, in_strides, tokens, pool):
    """Two heads, 6 tokens in 6 tiles: 2 * 6 * 6 < 5 d, and over cells, 6 rows in place of 36, 7 * 6 < 5 d."""
    plan = dv.DualPerspectiveEnhance.paper(dim, num_heads=2).plan((2, 3), tokens)
    expected = [(pool, bool(in_blocks if pool == "cells" else in_strides)), ("tiles", bool(in_strides))]
    assert [(d.pool, d.absorb) for d in plan.directions] == expected
    assert not any(d.fold for d in plan.directions), "one matrix is for one head"


@pytest.mark.parametrize("dim", [46, 48])
def test_one_matrix_pays_where_queries_outnumber_channels(dim):
    plan = dv.DualPerspectiveEnhance.paper(dim).plan((2, 3), (2, 4))
    assert [(d.num_tiles * d.queries, d.absorb, d.fold) for d in plan.directions] == [(48, True, dim < 48)] * 2


@pytest.mark.parametrize("tokens", [(2, 4), (3, 3)])
@pytest.mark.parametrize(
    "chosen", [{}, {"share_weights": False}, *({name: True} for name in ("bias", "out_proj", "residual", "norm"))]
)
def test_values_are_folded_where_nothing_else_follows(chosen, tokens):
    """And where there are more pooled tokens than half the width."""
    dem, folded = build("paper", **chosen), []
    dem.fusion.register_forward_hook(
        lambda _, __, given, ___: folded.append(given.get("values") is not None), with_kwargs=True
    )
    tiles = [x.detach() for x in inputs((2, 3), tokens)]
    alone = not chosen.keys() - {"share_weights"}
    assert (dem.attentions[0].value_matrix is not None) == alone
    with dv.full_computation():
        expected = dem(*tiles, (2, 3))
    torch.testing.assert_close(dem(*tiles, (2, 3)), expected, rtol=1e-9, atol=1e-9)
    assert folded == [False, alone and tokens == (3, 3)]


@pytest.mark.parametrize("tokens", [(4, 6), (6, 4)])
@pytest.mark.parametrize(
    "grid, surround",
    [((1, 1), "none"), ((3, 3), "windows"), ((1, 9), "windows"), ((9, 1), "windows"), ((5, 3), "windows")]
    + [(grid, "map") for grid in ((1, 7), (7, 1), (2, 3), (3, 2), (4, 4))],
)
def test_windows_pay_where_one_token_in_nine_is_read(grid, surround, tokens):
    for fusion in ("conv3x3", OWN["blurred"]):
        dem, seen = build(fusion=fusion), []
        dem.fusion.register_forward_hook(
            lambda _, __, given, ___, seen=seen: seen.append(given.get("windows", False)), with_kwargs=True
        )
        assert dem.plan(grid, tokens).surround == surround
        tiles = [x.detach() for x in inputs(grid, tokens, batch=1)]
        with dv.full_computation():
            expected = dem(*tiles, grid)
        torch.testing.assert_close(dem(*tiles, grid), expected, rtol=1e-8, atol=1e-9)
        assert seen == [False, surround == "windows" and fusion == "conv3x3"]


@pytest.mark.parametrize("speed, absorbed", [(0.0, [False, False]), (1.0, [False, True]), (float("inf"), [True, True])])
def test_the_speed_of_a_device_decides(speed, absorbed, monkeypatch):
    """How it is computed, and nothing else."""
    dem, grid, tokens = dv.DualPerspectiveEnhance.released(64, num_heads=1).double(), (3, 3), (8, 8)
    tiles = torch.randn(2, 1, 9, *tokens, 64, dtype=torch.float64)
    expected = dem(*tiles, grid)
    monkeypatch.setitem(SPEED_OF_ABSORBED, "cpu", speed)
    assert [d.absorb for d in dem.plan(grid, tokens).directions] == absorbed
    torch.testing.assert_close(dem(*tiles, grid), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (4, 4), (3, 3)])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("fusion", ["bottleneck_concat", "linear_concat", "conv3x3", "cells", "neighbours"])
def test_a_fusion_that_averages_cells_is_told_which(fusion, readout, grid):
    """Cells of the tokens that are read; none where all are kept, none that it has not declared, none in full."""
    dem, tokens, seen = build(fusion=OWN.get(fusion, fusion), readout=readout, norm=False), (2, 3), []
    dem.fusion.register_forward_hook(
        lambda _, __, given, out: seen.append((given.get("cell"), tuple(out.shape[1:3]))), with_kwargs=True
    )
    tiles = [x.detach() for x in inputs(grid, tokens, batch=1)]
    with dv.full_computation():
        expected = dem(*tiles, grid)
    torch.testing.assert_close(dem(*tiles, grid), expected, rtol=1e-8, atol=1e-9)
    in_full, planned = seen
    assert in_full == (None, (grid[0] * tokens[0], grid[1] * tokens[1]))
    if fusion not in ("bottleneck_concat", "cells") or readout == "none":
        assert planned[0] is None
        return
    read = {"average": grid, "bilinear": tuple(2 - n % 2 for n in grid), "centre": (1, 1)}[readout]
    # what is linear comes after the average
    assert planned == ((1, 1) if fusion == "cells" else read, tokens)


@pytest.mark.parametrize("pairing, smoothed", [("paper", "global"), ("released", "local")])
@pytest.mark.parametrize("query", ["local", "global"])
def test_a_filter_reaches_into_every_tile_of_keys_cut_by_strides(query, pairing, smoothed):
    """Tokens so few that blocks die too: those of keys that are cut by blocks stay dead."""
    sharp, smooth = (
        dv.DualPerspectiveEnhance.released(DIM, pairing=pairing, enhance=query, low_pass=low_pass).plan((3, 5), (1, 2))
        for low_pass in (False, True)
    )
    assert all(len(tiles) < 15 for tiles in sharp.live)
    everything = {("stride" if query == "local" else "local"): tuple(range(15))} if query == smoothed else {}
    assert smooth.live == sharp.live._replace(**everything)


def test_pooling_moves_inside_where_it_may():
    def pools(**options):
        plan = dv.DualPerspectiveEnhance.paper(64, **options).plan((3, 3), (6, 6))
        return plan.commutes, [d.pool for d in plan.directions]

    assert pools() == (True, ["cells", "tiles"])
    assert pools(fusion="addition", residual=True, out_proj=True, bias=True) == (True, ["cells", "tiles"])
    assert pools(norm=True) == (False, [None, None])
    assert pools(fusion="multiplication") == (False, [None, None])
    assert pools(fusion="conv3x3") == (False, [None, None])
    assert pools(readout="none") == (False, [None, None])
    assert pools(readout="centre") == (False, [None, None])
    plan = dv.DualPerspectiveEnhance.paper(64).plan((3, 3), (5, 6))
    assert [d.pool for d in plan.directions] == ["map", "tiles"], "cells of 3 rows lie across blocks of 5"


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
        assert torch.equal(keys, expected.flatten(2, 3))
    with dv.full_computation():
        dem(local, stride, (3, 3))
    assert [x.shape[:-1].numel() for x in (*planned, *seen)] == [36, 9 * 36, 324, 324]


@given(st.sampled_from(["local", "global"]), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_axis_cut_sorts_positions_into_tiles(perspective, tiles, size, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(tiles * size, generator=generator) < 0.5
    live = sorted({*keep.nonzero().flatten().tolist(), 0})
    cut = AxisCut.of(perspective, live, tiles, size)
    assert [cut.positions[slot] for slot in cut.slots] == live
    owner = {position(perspective, t, u, tiles, size): t for t, u in itertools.product(range(tiles), range(size))}
    groups = [cut.positions[i : i + cut.per_tile] for i in range(0, len(cut.positions), cut.per_tile)]
    assert [{owner[p] for p in group} for group in groups] == [{t} for t in cut.tiles]
    assert set(cut.positions) == set(live)
    whole = cut.widened(perspective, tiles, size)
    assert whole.whole
    assert set(whole.positions) == {p for p, t in owner.items() if t in cut.tiles}
