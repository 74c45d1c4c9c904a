"""Integers only: the bijections, the grids, and the choice of a grid."""

import copy
import pickle
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dualview as dv
from dualview.arguments import check_size
from dualview.geometry import MOST_TILES, check_perspective, position, split_axis
from tests import reference
from tests.checks import refuses
from tests.strategies import grids, perspectives
from tests.strategies import tiles as tile_sizes

counts = st.integers(1, 6)
sides = st.integers(1, 60)


class TestTileGrid:
    def test_rows_come_first(self) -> None:
        grid = dv.TileGrid(2, 3)
        assert (grid.rows, grid.cols, grid.num_tiles, tuple(grid)) == (2, 3, 6, (2, 3))
        assert grid == dv.TileGrid(rows=2, cols=3) != dv.TileGrid(rows=3, cols=2)
        assert grid.map_size((24, 20)) == (48, 60)
        assert grid.tile_size((48, 60)) == (24, 20)

    @given(grids, grids)
    def test_equals_a_pair(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        grid = dv.TileGrid(*one)
        assert (grid == other) == (other == grid) == (one == other) == (grid == dv.TileGrid(*other))
        assert (grid != other) == (one != other)
        assert hash(grid) == hash(one)
        assert {grid: 1}.get(other) == (1 if one == other else None)
        assert grid not in ("2x3", None, 2, (*one, 1), list(one))

    @given(grids, tile_sizes)
    def test_sizes_are_inverse(self, grid: tuple[int, int], tile: tuple[int, int]) -> None:
        made = dv.TileGrid(*grid)
        assert made.map_size(tile) == (grid[0] * tile[0], grid[1] * tile[1])
        assert made.tile_size(made.map_size(tile)) == tile

    @pytest.mark.parametrize("rows, cols", [(0, 3), (2, 0), (-1, 3), (2, -3), (2.0, 3), (True, 3), (2, "3"), (2, None)])
    def test_refuses_counts(self, rows: object, cols: object) -> None:
        bad = "rows" if rows != 2 or isinstance(rows, float) else "cols"
        with refuses(f"{bad}={rows if bad == 'rows' else cols!r}: must be a positive integer", "height come first"):
            dv.TileGrid(rows, cols)  # type: ignore[arg-type]

    @pytest.mark.parametrize("size", [(0, 9), (4, 0), (-4, 9), (4.0, 9), (True, 9), "49", None])
    def test_tile_size_refuses_what_is_no_size(self, size: Any) -> None:
        with refuses(f"size={size!r}", "two positive integers (height, width)"):
            dv.TileGrid(2, 3).tile_size(size)
        with refuses(f"tile={size!r}", "two positive integers (height, width)"):
            dv.TileGrid(2, 3).map_size(size)

    @pytest.mark.parametrize("size", [(5, 9), (4, 8)])
    def test_tile_size_refuses_what_does_not_divide(self, size: tuple[int, int]) -> None:
        with refuses(f"{size[0]} x {size[1]}", "2 x 3", "rows=2", "cols=3", "positive multiple", "Pad, crop or resize"):
            dv.TileGrid(2, 3).tile_size(size)

    def test_of_takes_grids_and_pairs(self) -> None:
        grid = dv.TileGrid(2, 3)
        assert dv.TileGrid.of(grid) is grid
        for pair in ((2, 3), [2, 3], torch.Size([2, 3])):
            assert dv.TileGrid.of(pair) == grid

    @pytest.mark.parametrize("bad", [6, "2x3", (2,), (2, 3, 4), None, {2, 3}])
    def test_of_refuses_the_rest(self, bad: object) -> None:
        with refuses(f"grid={bad!r}", "pair (rows, cols) of positive integers"):
            dv.TileGrid.of(bad)  # type: ignore[arg-type]

    @given(sides, sides, tile_sizes)
    def test_whole(self, height: int, width: int, tile: tuple[int, int]) -> None:
        if height % tile[0] or width % tile[1]:
            with refuses(f"{height} x {width}", f"{tile[0]} x {tile[1]} tiles", '"pad", "crop" or "resize"'):
                dv.TileGrid.whole((height, width), tile)
        else:
            assert dv.TileGrid.whole((height, width), tile).map_size(tile) == (height, width)

    @given(counts, counts)
    def test_text_round_trip(self, rows: int, cols: int) -> None:
        grid = dv.TileGrid(rows, cols)
        assert str(grid) == f"{rows}x{cols}"
        assert dv.TileGrid.parse(str(grid)) == dv.TileGrid.parse(f" {rows}X{cols}\n") == grid

    @pytest.mark.parametrize(
        "text", ["", "2", "2x", "x3", "0x3", "2x0", "2x3x4", "-2x3", "2 x 3", "2,3", "2.0x3", "axb"]
    )
    def test_parse_refuses(self, text: str) -> None:
        with refuses(f"text={text!r}", "ROWSxCOLS", "rows first", "2x3"):
            dv.TileGrid.parse(text)

    def test_is_a_value(self) -> None:
        grid = dv.TileGrid(2, 3)
        assert repr(grid) == "TileGrid(rows=2, cols=3)"
        assert {grid: "a"}[dv.TileGrid(2, 3)] == "a"
        assert dv.TileGrid(3, 2) not in {grid: "a"}
        for same in (pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid), dv.TileGrid(np.int64(2), np.uint8(3))):
            assert (same, repr(same), tuple(same)) == (grid, repr(grid), (2, 3))
        with pytest.raises(AttributeError):
            grid.rows = 4  # type: ignore[misc]


class TestForImage:
    @pytest.mark.parametrize(
        "size, grid",
        [
            ((336, 336), (1, 1)),
            ((336, 672), (1, 2)),
            ((672, 336), (2, 1)),
            ((1008, 672), (3, 2)),
            ((1007, 673), (2, 2)),
            ((1100, 1700), (3, 5)),  # the paper's floor: 1100 / 336 = 3.27, 1700 / 336 = 5.06
            ((1680, 1344), (5, 4)),
        ],
    )
    def test_table(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        assert tuple(dv.TileGrid.for_image(size, tile=(336, 336))) == grid

    @given(sides, sides, sides, sides)
    def test_is_eq_9_and_10(self, height: int, width: int, h: int, w: int) -> None:
        if height < h or width < w:
            with refuses(f"{height} x {width}", f"{h} x {w}", "at least one must fit", "smaller tile"):
                dv.TileGrid.for_image((height, width), tile=(h, w))
            return
        rows, cols = dv.TileGrid.for_image((height, width), tile=(h, w))
        # floor, said without a division: the last tile fits and one more does not
        assert rows * h <= height < (rows + 1) * h
        assert cols * w <= width < (cols + 1) * w

    @pytest.mark.parametrize("name, size, tile", [("image size", (0, 5), (1, 1)), ("tile", (5, 5), (1, 0))])
    def test_refuses_sizes(self, name: str, size: tuple[int, int], tile: tuple[int, int]) -> None:
        bad = size if name == "image size" else tile
        with refuses(f"{name}={bad!r}", "two positive integers"):
            dv.TileGrid.for_image(size, tile=tile)


def test_check_size_takes_what_counts_as_an_integer() -> None:
    assert check_size(torch.Size([3, 4]), "tile") == check_size(np.array([3, 4]), "tile") == (3, 4)


def test_one_number_is_the_size_of_a_square() -> None:
    assert check_size(336, "tile") == check_size(np.int64(336), "tile") == (336, 336)
    assert dv.TileGrid.for_image((672, 1008), tile=336) == dv.choose_grid((672, 1008), 336, 9) == dv.TileGrid(2, 3)
    assert dv.DualPerspectiveCrop(tile=4)(torch.zeros(3, 8, 12)).grid == dv.TileGrid(2, 3)
    with refuses("tile=0", "two positive integers"):
        check_size(0, "tile")


@pytest.mark.parametrize("bad", [3.0, True, (3,), (3, 4, 5), (3.0, 4), ("3", 4), (True, 4), "34", None])
def test_check_size_refuses(bad: object) -> None:
    with refuses(f"tile={bad!r}", "two positive integers (height, width)"):
        check_size(bad, "tile")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["", "Local", "stride", None])
def test_check_perspective_refuses(bad: str) -> None:
    with refuses(f"perspective={bad!r}", '"local" (contiguous blocks)', '"global" (interleaved strides)'):
        check_perspective(bad)


class TestPosition:
    @given(perspectives, counts, counts)
    def test_is_a_bijection(self, perspective: str, tiles: int, size: int) -> None:
        places = [position(perspective, i, u, tiles, size) for i, u in product(range(tiles), range(size))]
        assert sorted(places) == list(range(tiles * size))

    @given(grids, tile_sizes, perspectives)
    def test_is_eq_11_to_17(self, grid: tuple[int, int], tile: tuple[int, int], perspective: str) -> None:
        for (i, y, x), (big_y, big_x) in reference.cells(perspective, grid, tile):
            row, col = divmod(i, grid[1])
            assert position(perspective, row, y, grid[0], tile[0]) == big_y
            assert position(perspective, col, x, grid[1], tile[1]) == big_x

    @given(perspectives, counts, counts)
    def test_split_axis_says_the_same(self, perspective: str, tiles: int, size: int) -> None:
        factors, tile_factor = split_axis(perspective, tiles, size)
        axis = torch.arange(tiles * size).reshape(factors).movedim(tile_factor, 0)
        for i, u in product(range(tiles), range(size)):
            assert axis[i, u] == position(perspective, i, u, tiles, size)


class TestChooseGrid:
    """The rule: most pixels kept, then least canvas wasted. "Fit" below is the factor by which the image shrinks."""

    @pytest.mark.parametrize(
        "size, max_tiles, grid",
        [
            # whole multiples that fit the budget are taken as they are
            ((1008, 1008), 9, (3, 3)),
            ((1008, 672), 9, (3, 2)),
            ((672, 1008), 9, (2, 3)),
            ((336, 1344), 4, (1, 4)),
            ((1344, 336), 4, (4, 1)),
            # a small image needs one tile, however many are allowed: enlarging gains nothing
            ((336, 336), 9, (1, 1)),
            ((100, 336), 9, (1, 1)),
            ((1, 1), 9, (1, 1)),
            # one pixel more than a tile would be lost in one tile
            ((337, 336), 9, (2, 1)),
            ((336, 337), 9, (1, 2)),
            ((337, 337), 9, (2, 2)),
            # ... but where the budget forbids the second tile, fit 336/337 in one tile
            ((337, 336), 1, (1, 1)),
            # 3 x 3 holds 1000 x 1000 whole (fit 1); with four tiles 2 x 2 fits 0.672, 1 x 4 only 0.336
            ((1000, 1000), 9, (3, 3)),
            ((1000, 1000), 8, (2, 2)),
            ((1000, 1000), 4, (2, 2)),
            # tie in pixels: 1 x 1, 1 x 2 and 2 x 1 all fit 0.336, and one tile wastes nothing
            ((1000, 1000), 2, (1, 1)),
            ((1000, 1000), 3, (1, 1)),
            # one-line extremes: the longest line that the budget allows, 9 * 336 / 5000 = 0.60 of each side
            ((1, 5000), 9, (1, 9)),
            ((5000, 1), 9, (9, 1)),
            ((1, 1000), 9, (1, 3)),
            ((5000, 3), 1, (1, 1)),
            # large images: (rows * 336 / H, cols * 336 / W), the smaller of the two counts
            ((2000, 3000), 6, (2, 3)),  # 0.336, 0.336; 3 x 2 gives 0.224
            ((3000, 2000), 6, (3, 2)),
            ((2000, 3000), 5, (2, 2)),  # 0.224; 1 x 5 gives 0.168
            ((4000, 3000), 9, (3, 3)),  # 0.252; 4 x 2 gives 0.224
            ((4000, 3000), 12, (4, 3)),  # 0.336
            ((3000, 4000), 12, (3, 4)),
            ((1080, 1920), 9, (2, 4)),  # 0.622; 3 x 3 gives 0.525, and 1 x 9 0.311
            ((1080, 1920), 12, (3, 4)),  # 0.7
        ],
    )
    def test_table_for_square_tiles(self, size: tuple[int, int], max_tiles: int, grid: tuple[int, int]) -> None:
        assert tuple(dv.choose_grid(size, tile=(336, 336), max_tiles=max_tiles)) == grid

    @pytest.mark.parametrize(
        "size, max_tiles, grid",
        [
            ((700, 700), 12, (4, 3)),  # 800 x 900 is the first canvas that holds it
            # 600 of 700 fit in 3 x 2, 3 x 3 and 4 x 2 alike; 3 x 2 is the canvas 600 x 600 without waste
            ((700, 700), 11, (3, 2)),
            ((700, 700), 6, (3, 2)),
            ((700, 700), 5, (2, 2)),  # 400 of 700, canvas 400 x 600; 5 x 1 and 3 x 1 reach 300
            ((200, 300), 9, (1, 1)),
            ((300, 200), 9, (2, 1)),  # upright: two rows of 200 hold it
        ],
    )
    def test_table_for_lying_tiles(self, size: tuple[int, int], max_tiles: int, grid: tuple[int, int]) -> None:
        assert tuple(dv.choose_grid(size, tile=(200, 300), max_tiles=max_tiles)) == grid

    @given(sides, sides, st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
    def test_is_the_only_best_of_all_grids(self, height: int, width: int, h: int, w: int, max_tiles: int) -> None:
        best = reference.best_grids((height, width), (h, w), max_tiles)
        assert [tuple(dv.choose_grid((height, width), tile=(h, w), max_tiles=max_tiles))] == best

    @given(sides, sides, st.integers(1, 12), st.integers(1, 12), st.integers(1, 30))
    def test_invariants(self, height: int, width: int, h: int, w: int, max_tiles: int) -> None:
        grid = dv.choose_grid((height, width), tile=(h, w), max_tiles=max_tiles)
        assert grid.num_tiles <= max_tiles
        assert tuple(dv.choose_grid((width, height), tile=(w, h), max_tiles=max_tiles)) == (grid.cols, grid.rows)
        # no row or column beyond what holds the image at full size
        assert (grid.rows - 1) * h < height
        assert (grid.cols - 1) * w < width
        # scaling image and tile alike changes nothing
        assert dv.choose_grid((7 * height, 7 * width), tile=(7 * h, 7 * w), max_tiles=max_tiles) == grid

    def test_refuses(self) -> None:
        with refuses("image size=(0, 5)", "two positive integers"):
            dv.choose_grid((0, 5), tile=(1, 1), max_tiles=3)
        with refuses("tile=(1, -2)", "two positive integers"):
            dv.choose_grid((5, 5), tile=(1, -2), max_tiles=3)
        with refuses("max_tiles=0", "positive integer"):
            dv.choose_grid((5, 5), tile=(1, 1), max_tiles=0)
        with refuses("max_tiles=True", "positive integer"):
            dv.choose_grid((5, 5), tile=(1, 1), max_tiles=True)
        with refuses("max_tiles=100000", "at most 16,384"):
            dv.choose_grid((10**6, 10**6), tile=(1, 1), max_tiles=10**5)

    def test_the_largest_budget_takes_no_time(self) -> None:
        start = time.perf_counter()
        assert dv.choose_grid((10**6, 10**6), tile=(1, 1), max_tiles=MOST_TILES) == dv.TileGrid(128, 128)
        assert dv.choose_grid((1, 10**9), tile=(1, 1), max_tiles=MOST_TILES) == dv.TileGrid(1, MOST_TILES)
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize("make", [dv.TileGrid, lambda *grid: dv.TileGrid.parse("{}x{}".format(*grid))])
def test_a_tile_size_is_no_grid(make: Callable[..., dv.TileGrid]) -> None:
    assert make(128, 128).num_tiles == make(1, MOST_TILES).num_tiles == MOST_TILES
    for rows, cols in ((336, 336), (3000, 3000), (1, MOST_TILES + 1), (10**6, 10**6)):
        with refuses(f"rows={rows}, cols={cols}", f"{rows * cols:,} tiles", "at most 16,384", "pass it as `tile`"):
            make(rows, cols)


def test_numpy_integers_are_integers() -> None:
    grid = dv.TileGrid(*np.array([2, 3]))
    assert grid == dv.TileGrid(2, 3)
    assert type(grid.rows) is int
    with refuses("max_tiles=2.5", "positive integer"):
        dv.choose_grid((10, 10), tile=(4, 4), max_tiles=2.5)
