"""`assert_tile_order` accepts every right pipeline and says of every wrong one what landed where."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dualview import global_stride_crop, local_crop
from dualview.testing import assert_tile_order, coordinate_images
from tests import reference, strategies
from tests.checks import refuses

GRID, TILE = (2, 3), (4, 5)
BLOCKS = "b c (r h) (s w) -> b (r s) c h w"
STRIDES = "b c (h r) (w s) -> b (r s) c h w"


def blocks(x: Tensor, pattern: str = BLOCKS) -> Tensor:
    return rearrange(x, pattern, r=GRID[0], s=GRID[1])


def wrong(fn: Callable[[Tensor], object], *parts: str, **options: object) -> str:
    """The function must be found wrong, with all parts in the message."""
    with pytest.raises(AssertionError) as caught:
        assert_tile_order(fn, GRID, TILE, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


# --- Coordinate images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_coordinate_images_hold_row_column_and_place(data_format: str) -> None:
    images = coordinate_images((3, 4), batch=2, data_format=data_format)
    assert images.shape == ((2, 3, 3, 4) if data_format == "channels_first" else (2, 3, 4, 3))
    assert images.dtype == torch.float32
    for b in range(2):
        for y in range(3):
            for x in range(4):
                pixel = images[b, :, y, x] if data_format == "channels_first" else images[b, y, x]
                assert pixel.tolist() == [y, x, b]
    with refuses("size=(3, 0)"):
        coordinate_images((3, 0))


# --- Right pipelines --------------------------------------------------------------------------------------------------


@given(strategies.grids, strategies.tiles, strategies.perspectives, strategies.data_formats, st.integers(1, 3))
def test_accepts_the_reference_and_nothing_else(
    grid: tuple[int, int], tile: tuple[int, int], perspective: str, data_format: str, batch: int
) -> None:
    def check(cut_by: str) -> None:
        assert_tile_order(
            lambda x: reference.crop(x, grid, cut_by, data_format),
            grid,
            tile,
            perspective=perspective,
            data_format=data_format,
            batch=batch,
        )

    check(perspective)
    other = "global" if perspective == "local" else "local"
    same = all(n == 1 or side == 1 for n, side in zip(grid, tile, strict=True))  # then both cut alike
    if same:
        check(other)
    else:
        with pytest.raises(AssertionError):
            check(other)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: local_crop(x, GRID),
        blocks,
        lambda x: blocks(x).flatten(0, 1),
        lambda x: blocks(x).to(torch.uint8),
        lambda x: blocks(x).to(torch.int64),
        lambda x: blocks(x).bfloat16(),
        lambda x: blocks(x).double().requires_grad_(),
        lambda x: list(blocks(x)),  # a tensor for each image
        lambda x: tuple(blocks(x).flatten(0, 1)),  # a tensor for each tile
        lambda x: [list(tiles) for tiles in blocks(x)],
        lambda x: blocks(x).numpy(),
        lambda x: [blocks(image[None]).numpy()[0] for image in x],
        lambda x: [np.uint8(tile.numpy()) for tile in blocks(x).flatten(0, 1)],
    ],
)
def test_accepts_every_form_of_right_tiles(fn: Callable[[Tensor], object]) -> None:
    assert_tile_order(fn, GRID, TILE)


def test_accepts_channels_last_pipelines_on_arrays() -> None:
    def tiles_of(image: np.ndarray) -> list[np.ndarray]:
        return [image[i * 4 : i * 4 + 4, j * 5 : j * 5 + 5] for i in range(2) for j in range(3)]

    assert_tile_order(
        lambda x: [tiles_of(np.uint8(image.numpy())) for image in x], GRID, TILE, data_format="channels_last"
    )
    assert_tile_order(
        lambda x: [[x[b, i::2, j::3] for i in range(2) for j in range(3)] for b in range(3)],
        GRID,
        TILE,
        perspective="global",
        data_format="channels_last",
        batch=3,
    )


def test_a_pipeline_may_write_into_its_input() -> None:
    def greedy(x: Tensor, order: list[int]) -> Tensor:
        tiles = local_crop(x, GRID)[:, order]
        x.zero_()
        return tiles

    assert_tile_order(lambda x: greedy(x, [0, 1, 2, 3, 4, 5]), GRID, TILE)
    wrong(lambda x: greedy(x, [1, 0, 2, 3, 4, 5]), "place 1: should be local tile (row 0, column 1) of image 0")


# --- Wrong pipelines --------------------------------------------------------------------------------------------------


def test_global_in_place_of_local_and_the_other_way_round() -> None:
    wrong(
        lambda x: global_stride_crop(x, GRID),
        "tiles are not in local order: 12 of 12 are wrong, on a 2x3 grid of 4 x 5 tiles",
        "place 1: should be local tile (row 0, column 1) of image 0, is global tile (row 0, column 1) of image 0",
        "place 11: should be local tile (row 1, column 2) of image 1, is global tile (row 1, column 2) of image 1",
    )
    wrong(
        lambda x: local_crop(x, GRID),
        "tiles are not in global order",
        "place 2: should be global tile (row 0, column 2) of image 0, is local tile (row 0, column 2) of image 0",
        perspective="global",
    )


@pytest.mark.parametrize("perspective", ["local", "global"])
def test_tiles_numbered_column_by_column(perspective: str) -> None:
    pattern = {"local": BLOCKS, "global": STRIDES}[perspective].replace("(r s)", "(s r)")
    message = wrong(
        lambda x: blocks(x, pattern),
        "8 of 12 are wrong",
        f"place 1: should be {perspective} tile (row 0, column 1) of image 0, "
        f"is {perspective} tile (row 1, column 0) of image 0",
        perspective=perspective,
    )
    assert "place 0:" not in message, "the first and the last tile are right"


def test_swapped_tiles() -> None:
    message = wrong(
        lambda x: blocks(x)[:, [0, 1, 5, 3, 4, 2]],
        "4 of 12 are wrong",
        "place 2: should be local tile (row 0, column 2) of image 0, is local tile (row 1, column 2) of image 0",
        "place 11: should be local tile (row 1, column 2) of image 1, is local tile (row 0, column 2) of image 1",
    )
    assert re.findall(r"place (\d+)", message) == ["2", "5", "8", "11"]


def test_images_mixed_up() -> None:
    wrong(
        lambda x: blocks(x).flip(0),
        "place 0: should be local tile (row 0, column 0) of image 0, is local tile (row 0, column 0) of image 1",
        "place 6: should be local tile (row 0, column 0) of image 1, is local tile (row 0, column 0) of image 0",
    )
    wrong(  # tile-major: the first tile of every image, then the second of every image
        lambda x: blocks(x).transpose(0, 1).flatten(0, 1),
        "place 1: should be local tile (row 0, column 1) of image 0, is local tile (row 0, column 0) of image 1",
    )


def test_grid_transposed() -> None:
    """Three rows of two tiles in place of two rows of three, on an image of 8 x 15."""
    with pytest.raises(AssertionError, match=r"made \(1, 6, 3, 2, 5\) of images of \(1, 3, 6, 10\)"):
        assert_tile_order(lambda x: local_crop(x, (3, 2)), (2, 2), (3, 5), batch=1)
    with pytest.raises(AssertionError, match="not in local order"):
        assert_tile_order(lambda x: local_crop(x, (3, 2)).reshape(2, 6, 3, 6, 6), (2, 3), (6, 6))


def test_heights_and_widths_exchanged() -> None:
    wrong(
        lambda x: blocks(x).transpose(-1, -2),
        "made (2, 6, 3, 5, 4) of images of (2, 3, 8, 15)",
        "expected (12, 3, 4, 5) or (2, 6, ...)",
        "2x3 tiles of 4 x 5 (height x width)",
    )


@pytest.mark.parametrize(
    ("turn", "how"),
    [
        (lambda t: t.flip(-2), "upside down"),
        (lambda t: t.flip(-1), "mirrored left to right"),
        (lambda t: t.flip(-1, -2), "rotated by 180 degrees"),
        (lambda t: t.transpose(-1, -2), "rows and columns exchanged"),
    ],
)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_turned_tiles_are_named(turn: Callable[[Tensor], Tensor], how: str, data_format: str) -> None:
    def fn(x: Tensor) -> Tensor:
        first = x if data_format == "channels_first" else x.movedim(-1, 1)
        tiles = turn(local_crop(first, GRID))
        return tiles if data_format == "channels_first" else tiles.movedim(2, -1)

    with pytest.raises(AssertionError) as caught:
        assert_tile_order(fn, GRID, (4, 4), data_format=data_format)
    assert f"is local tile (row 0, column 1) of image 0, {how}" in str(caught.value)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_tiles_from_between_are_described_by_their_corners(data_format: str) -> None:
    def fn(x: Tensor) -> Tensor:
        plane = (2, 3) if data_format == "channels_first" else (1, 2)
        return local_crop(x.roll((-1, -2), plane), GRID, data_format=data_format)

    wrong(
        fn,
        "place 0: should be local tile (row 0, column 0) of image 0, is no tile of either perspective: its corners "
        "hold (row, column) (1, 2) (1, 6) at the top, (4, 2) (4, 6) at the bottom, of image 0",
        data_format=data_format,
    )


def test_long_lists_are_cut_short() -> None:
    message = wrong(lambda x: global_stride_crop(x, GRID), "24 of 24 are wrong", "... and 12 more", batch=4)
    assert len(re.findall(r"place \d+:", message)) == 12


@pytest.mark.parametrize(
    ("fn", "given"),
    [
        (lambda x: blocks(x) / 255, "torch.float32 values of 0 to 0.0549"),
        (lambda x: (blocks(x) - 7) / 3, "values of -2.33333 to 2.33333"),
        (lambda x: blocks(x) * float("nan"), "values of nan to nan"),
    ],
)
def test_changed_values_are_told_from_a_wrong_order(fn: Callable[[Tensor], Tensor], given: str) -> None:
    wrong(fn, "changed pixel values, not only their places: coordinates of 0 to 14", given, "Leave out normalisation")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_types_too_narrow_for_the_coordinates_are_named(dtype: torch.dtype) -> None:
    grid, tile = (1, 2), (3, 150)
    with pytest.raises(
        AssertionError, match=rf"changed pixel values.*0 to 299 became {dtype} values.*within 256 x 256"
    ):
        assert_tile_order(lambda x: local_crop(x, grid).to(torch.int64).to(dtype), grid, tile)
    assert_tile_order(lambda x: local_crop(x, grid).half(), grid, tile)
    assert_tile_order(lambda x: local_crop(x, grid).to(torch.int64).to(dtype), grid, (3, 128))


def test_wrong_counts_and_shapes() -> None:
    wrong(lambda x: blocks(x)[:, :5], "made (2, 5, 3, 4, 5)", "expected (12, 3, 4, 5) or (2, 6, ...)")
    wrong(lambda x: blocks(x).reshape(4, 3, 3, 4, 5), "made (4, 3, 3, 4, 5)")
    wrong(lambda x: x, "made (2, 3, 8, 15)")
    wrong(lambda x: blocks(x).movedim(2, -1), "made (2, 6, 4, 5, 3)")


def test_refuses_arguments_that_make_no_sense() -> None:
    with refuses("rows=0"):
        assert_tile_order(blocks, (0, 3), TILE)
    with refuses("tile=(4, 0)"):
        assert_tile_order(blocks, GRID, (4, 0))
    with refuses("perspective='rows'"):
        assert_tile_order(blocks, GRID, TILE, perspective="rows")
