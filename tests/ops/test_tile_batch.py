"""Tiles of mixed-grid batches: packed, taken apart, and put back without a mix-up."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dualview as dv
from tests.checks import fresh, refuses
from tests.strategies import channels, data_formats, grids, map_shape, numbered, perspectives
from tests.strategies import tiles as tile_sizes

CROPS = {"local": dv.local_crop, "global": dv.global_stride_crop}
mixed = st.lists(grids, min_size=1, max_size=4)


def batch_of(*grid_list: tuple[int, int], perspective: str | None = None) -> dv.TileBatch:
    """Tiles (rows*cols, 2, 3, 4) per image, every element another number."""
    tiles = [numbered((rows * cols, 2, 3, 4)) + 1000 * k for k, (rows, cols) in enumerate(grid_list)]
    return dv.TileBatch.collate(tiles, grid_list, perspective)


@given(mixed, tile_sizes, channels, perspectives, data_formats)
def test_recombine_undoes_the_crops(
    grid_list: list[tuple[int, int]], tile: tuple[int, int], channel: int, perspective: str, data_format: str
) -> None:
    images = [numbered(map_shape((), channel, grid, tile, data_format)) + 10000 * k for k, grid in enumerate(grid_list)]
    tiles = [CROPS[perspective](x, g, data_format=data_format) for x, g in zip(images, grid_list, strict=True)]
    batch = dv.TileBatch.collate(tiles, grid_list, perspective)
    for arguments in ((), (grid_list,), (None, perspective), (grid_list, perspective)):
        back = dv.recombine(batch, *arguments, data_format=data_format)
        assert len(back) == len(images)
        assert all(torch.equal(a, b) for a, b in zip(back, images, strict=True))
        assert all(fresh(x, batch.data) for x in back)


@given(mixed, st.integers(-5, 5), st.integers(-5, 5))
def test_split_and_slice(grid_list: list[tuple[int, int]], start: int, stop: int) -> None:
    batch = batch_of(*grid_list, perspective="local")
    parts = batch.split()
    assert len(batch) == len(grid_list) == len(parts)
    assert torch.equal(torch.cat(parts), batch.data)
    assert [len(part) for part in parts] == [rows * cols for rows, cols in grid_list]
    assert all(part.untyped_storage().data_ptr() == batch.data.untyped_storage().data_ptr() for part in parts)
    some = batch.slice(start, stop)
    assert some.perspective == "local"
    assert [tuple(grid) for grid in some.grids] == grid_list[start:stop]
    assert some.offsets[0] == 0
    assert len(some.split()) == len(parts[start:stop])
    assert all(torch.equal(a, b) for a, b in zip(some.split(), parts[start:stop], strict=True))


def test_offsets_count_tiles() -> None:
    batch = batch_of((2, 3), (1, 2), (1, 1))
    assert batch.offsets == (0, 6, 8, 9)
    assert batch.grids == (dv.TileGrid(2, 3), dv.TileGrid(1, 2), dv.TileGrid(1, 1))
    assert batch.data[6, 0, 0, 0] == 1000  # the first tile of the second image
    same = dv.TileBatch(batch.data, [0, 6, 8, 9], [(2, 3), (1, 2), (1, 1)])
    assert same.offsets == batch.offsets
    assert same.grids == batch.grids


def test_with_data_keeps_the_images() -> None:
    batch = batch_of((2, 3), (1, 2), perspective="global")
    features = batch.with_data(numbered((8, 5, 7, 2)))
    assert (features.grids, features.offsets, features.perspective) == (batch.grids, batch.offsets, "global")
    assert [x.shape for x in dv.recombine(features, data_format="channels_last")] == [(10, 21, 2), (5, 14, 2)]
    with refuses("(7, 5)", "must be 8 tiles"):
        batch.with_data(torch.zeros(7, 5))


def test_empty_and_pickled() -> None:
    empty = batch_of((2, 3)).slice(0, 0)
    assert (len(empty), empty.offsets, empty.split(), dv.recombine(empty, perspective="local")) == (0, (0,), [], [])
    batch = batch_of((2, 3), (1, 2), perspective="local")
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.data, batch.data)
    assert (again.offsets, again.grids, again.perspective) == (batch.offsets, batch.grids, "local")


class TestRefusals:
    @pytest.mark.parametrize("offsets", [(0, 6), (0, 2, 8), (0, 6, 9), (1, 7, 9), ()])
    def test_offsets(self, offsets: tuple[int, ...]) -> None:
        with refuses(str(offsets), "['2x3', '1x2']", "(0, 6, 8)", "running sum", "TileBatch.collate"):
            dv.TileBatch(torch.zeros(8, 1), offsets, ((2, 3), (1, 2)))

    def test_data(self) -> None:
        with refuses("(7, 1)", "['2x3', '1x2']", "must be 8 tiles"):
            dv.TileBatch(torch.zeros(7, 1), (0, 6, 8), ((2, 3), (1, 2)))
        with refuses("()", "must be 1 tiles"):
            dv.TileBatch(torch.zeros(()), (0, 1), ((1, 1),))

    @pytest.mark.parametrize(
        "shapes, grid_list",
        [
            ([(6, 4, 4), (3, 4, 4)], [(2, 3), (1, 2)]),  # wrong count
            ([(2, 4, 4), (6, 4, 4)], [(2, 3), (1, 2)]),  # right total, wrong order
            ([(6, 4, 4), (2, 4, 5)], [(2, 3), (1, 2)]),  # wrong size
            ([(6, 4, 4)], [(2, 3), (1, 2)]),  # a grid too many
            ([], []),
        ],
    )
    def test_collate(self, shapes: list[tuple[int, ...]], grid_list: list[tuple[int, int]]) -> None:
        named = [f"{rows}x{cols}" for rows, cols in grid_list]
        with refuses(str(shapes), str(named), "one grid per image", "the same tile size"):
            dv.TileBatch.collate([torch.zeros(shape) for shape in shapes], grid_list)

    def test_wrong_perspective(self) -> None:
        batch = batch_of((2, 3), perspective="local")
        with refuses("perspective='global'", "'local' perspective", "scramble", "Omit the argument"):
            dv.recombine(batch, perspective="global")
        with refuses("does not record its perspective", '"local" or "global"'):
            dv.recombine(batch_of((2, 3)))
        for call in (
            lambda: batch_of((2, 3), perspective="stride"),
            lambda: dv.recombine(batch_of((2, 3)), perspective="stride"),
        ):
            with refuses("perspective='stride'"):
                call()

    @pytest.mark.parametrize("wrong", [[(3, 2), (1, 2)], [(2, 3)], [(1, 2), (2, 3)]])
    def test_wrong_grids(self, wrong: object) -> None:
        with refuses(repr(wrong), "['2x3', '1x2']", "omit the argument"):
            dv.recombine(batch_of((2, 3), (1, 2), perspective="local"), wrong)
        with refuses("grid=TileGrid(rows=2, cols=3)", "one per image"):
            dv.recombine(batch_of((2, 3), (1, 2), perspective="local"), dv.TileGrid(2, 3))
