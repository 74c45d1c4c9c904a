"""The four readouts against cell-by-cell loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import dualview as dv
from tests import reference
from tests.checks import assert_compiles_once, refuses
from tests.strategies import batches, channels, examples, grids, map_shape
from tests.strategies import tiles as tile_sizes

READOUTS = ["average", "bilinear", "centre", "none"]
odd_grids = st.tuples(st.sampled_from([3, 1, 5]), st.sampled_from([5, 3, 1]))
even_grids = st.tuples(st.sampled_from([2, 4]), st.sampled_from([4, 2]))


def token_map(batch: tuple[int, ...], channel: int, grid: tuple[int, int], tile: tuple[int, int]) -> torch.Tensor:
    return torch.randn(map_shape(batch, channel, grid, tile, "channels_last"), dtype=torch.float64)


@pytest.mark.parametrize("readout", READOUTS)
@given(batch=batches, channel=channels, grid=grids, tile=tile_sizes)
@settings(max_examples=examples(15))
def test_equals_the_loops(
    batch: tuple[int, ...], channel: int, grid: tuple[int, int], tile: tuple[int, int], readout: str
) -> None:
    x = token_map(batch, channel, grid, tile)
    out = dv.read_out(x, grid, readout)
    size = tile if readout != "none" else (grid[0] * tile[0], grid[1] * tile[1])
    assert out.shape == (*batch, *size, channel)
    expected = reference.read_out(x.movedim((-3, -2), (0, 1)), grid, readout).movedim((0, 1), (-3, -2))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@given(odd_grids, tile_sizes)
def test_bilinear_is_exactly_the_centre_of_odd_cells(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    x = token_map((2,), 2, grid, tile)
    out = dv.read_out(x, grid, "bilinear")
    assert torch.equal(out, x[:, grid[0] // 2 :: grid[0], grid[1] // 2 :: grid[1]])
    assert torch.equal(out, dv.read_out(x, grid, "centre"))


@given(even_grids, tile_sizes)
def test_bilinear_is_the_mean_of_the_central_four_of_even_cells(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    x = token_map((2,), 2, grid, tile)
    four = [x[:, grid[0] // 2 - a :: grid[0], grid[1] // 2 - b :: grid[1]] for a in (0, 1) for b in (0, 1)]
    torch.testing.assert_close(dv.read_out(x, grid, "bilinear"), sum(four[1:], four[0]) / 4)


def test_bilinear_looks_at_nothing_else() -> None:
    """Without antialiasing a far neighbour has no say: with it, the whole cell would."""
    x = torch.randn(1, 4 * 2, 6 * 2, 1, dtype=torch.float64, requires_grad=True)
    dv.read_out(x, (4, 6), "bilinear").sum().backward()
    live = [(1, 2), (1, 3), (2, 2), (2, 3)]
    cell = torch.zeros(4, 6, dtype=torch.float64)
    for place in live:
        cell[place] = 0.25
    assert torch.equal(x.grad[0, ..., 0], cell.repeat(2, 2))


def test_mixed_parity() -> None:
    x = token_map((1,), 3, (3, 2), (4, 5))
    expected = (x[:, 1::3, 0::2] + x[:, 1::3, 1::2]) / 2
    torch.testing.assert_close(dv.read_out(x, (3, 2), "bilinear"), expected)


@given(grids, tile_sizes)
def test_average_is_torch_pooling(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    x = token_map((2,), 3, grid, tile)
    pooled = F.avg_pool2d(x.movedim(-1, 1), grid).movedim(1, -1)
    torch.testing.assert_close(dv.read_out(x, grid, "average"), pooled)


def test_none_and_one_by_one_grids_change_nothing() -> None:
    x = token_map((2,), 3, (2, 3), (4, 5))
    assert torch.equal(dv.read_out(x, (2, 3), "none"), x)
    for readout in READOUTS:
        assert torch.equal(dv.read_out(x, (1, 1), readout), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("grid", [(2, 4), (4, 3)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, readout: str, grid: tuple[int, int]) -> None:
    """Computed in float32: the result is that of float32, rounded at the end."""
    x = (torch.randn(3, grid[0] * 5, grid[1] * 4, 7) * 3 + 1).to(dtype)
    out = dv.read_out(x, grid, readout)
    assert out.dtype == dtype
    torch.testing.assert_close(out, dv.read_out(x.float(), grid, readout).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("readout", READOUTS)
def test_gradcheck_and_compile(readout: str) -> None:
    x = torch.randn(1, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: dv.read_out(values, (2, 3), readout), x)
    assert_compiles_once(
        lambda values: dv.read_out(values, (2, 3), readout),
        lambda batch: (torch.arange(48.0 * batch).view(-1, 4, 6, 2),),
    )


def test_refuses() -> None:
    with refuses("readout='mean'", "average", "bilinear", "centre", "none"):
        dv.read_out(torch.zeros(4, 6, 1), (2, 3), "mean")
    with refuses("(4, 6)", "(..., H, W, D)"):
        dv.read_out(torch.zeros(4, 6), (2, 3), "average")
    for readout in READOUTS:
        with refuses("5 x 6", "2 x 3", "positive multiple"):
            dv.read_out(torch.zeros(5, 6, 1), (2, 3), readout)
