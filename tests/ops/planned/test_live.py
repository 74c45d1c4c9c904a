"""Which tokens and tiles live: integers, the same on every device."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dualview as dv
from dualview.geometry import position
from dualview.ops.planned.live import AxisCut

DIM = 16


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
    assert plan.cell == tuple(1 if n % 2 else 2 for n in grid)
    for d in plan.directions:
        assert d.keys == tokens[0] * tokens[1]
        assert d.num_tiles * d.queries >= per_axis[0] * per_axis[1]
    if all(n % 2 and size % n == 0 for n, size in zip(grid, tokens, strict=True)):
        assert [(d.num_tiles, d.queries) for d in plan.directions] == [(1, 576), (9, 64)]


def test_everything_lives_in_full():
    dem = dv.DualPerspectiveEnhance.released(DIM)
    with dv.full_computation():
        plan = dem.plan((3, 3), (6, 4))
    assert plan.live == (tuple(range(9)), tuple(range(9)))
    assert [(d.num_tiles, d.queries, d.keys) for d in plan.directions] == [(9, 24, 24)] * 2


@given(st.sampled_from(["local", "global"]), st.integers(1, 5), st.integers(1, 6), st.sets(st.integers(0, 29)))
def test_axis_cut_sorts_positions_into_tiles(perspective, tiles, size, drawn):
    live = sorted({p for p in drawn if p < tiles * size} | {0})
    cut = AxisCut.of(perspective, live, tiles, size)
    assert [cut.positions[k] for k in cut.index] == live
    owner = {position(perspective, t, u, tiles, size): t for t, u in itertools.product(range(tiles), range(size))}
    groups = [cut.positions[i : i + cut.per_tile] for i in range(0, len(cut.positions), cut.per_tile)]
    assert [{owner[p] for p in group} for group in groups] == [{t} for t in cut.tiles]
    assert set(cut.positions) == set(live)
    whole = cut.widened(tiles, size, perspective)
    assert whole.whole
    assert set(whole.positions) == {p for p, t in owner.items() if t in cut.tiles}
