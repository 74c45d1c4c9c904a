"""The picture shows the right pixels at the right places."""

import numpy as np
import pytest
import torch
from PIL import Image

from dualview.geometry import TileGrid
from dualview.visualize import draw_tiles, tile_colour

CASES = [
    ((6, 10), (2, 5)),
    ((12, 9), (4, 3)),
    ((4, 30), (1, 6)),
    ((15, 5), (5, 1)),
    ((70, 98), (7, 2)),
    ((8, 6), (1, 1)),
]


def noise(height, width):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def centres(picture, box, height, width):
    """The pixels in the middles of height x width equal fields of a box of the picture."""
    left, top, right, bottom = box
    part = np.array(picture)[top:bottom, left:right]
    assert part.shape[0] % height == 0
    assert part.shape[1] % width == 0
    y, x = part.shape[0] // height, part.shape[1] // width
    return part[y // 2 :: y, x // 2 :: x]


@pytest.mark.parametrize("size, grid", CASES)
def test_every_tile_shows_its_own_pixels(size, grid):
    pixels = noise(*size)
    drawn = draw_tiles(Image.fromarray(pixels), grid)
    rows, cols = grid
    h, w = size[0] // rows, size[1] // cols
    assert len(drawn.local) == len(drawn.stride) == rows * cols
    for i in range(rows):
        for j in range(cols):
            local = centres(drawn.picture, drawn.local[i * cols + j], h, w)
            assert np.array_equal(local, pixels[i * h : (i + 1) * h, j * w : (j + 1) * w])
            stride = centres(drawn.picture, drawn.stride[i * cols + j], h, w)
            assert np.array_equal(stride, pixels[i::rows, j::cols])


@pytest.mark.parametrize("size, grid", CASES)
def test_tiles_stand_as_in_the_grid_and_apart(size, grid):
    drawn = draw_tiles(Image.fromarray(noise(*size)), grid)
    rows, cols = grid
    for boxes in (drawn.local, drawn.stride):
        for i in range(rows):
            for j in range(cols):
                left, top, right, bottom = boxes[i * cols + j]
                assert 0 <= left < right <= drawn.picture.width
                assert 0 <= top < bottom <= drawn.picture.height
                if j:
                    assert left > boxes[i * cols + j - 1][2]
                if i:
                    assert top > boxes[(i - 1) * cols + j][3]


@pytest.mark.parametrize("size_grid", CASES)
def test_frames_have_the_colours_of_their_tiles(size_grid):
    size, grid = size_grid
    drawn = draw_tiles(Image.fromarray(noise(*size)), grid)
    for boxes in (drawn.local, drawn.stride):
        for index, (left, top, right, bottom) in enumerate(boxes):
            colour = tile_colour(*divmod(index, grid[1]), TileGrid(*grid))
            corners = [(left - 1, top - 1), (right, top - 1), (left - 1, bottom), (right, bottom)]
            assert [drawn.picture.getpixel(corner) for corner in corners] == [colour] * 4


@pytest.mark.parametrize("size, grid", CASES)
def test_magnified_pixels_have_the_colours_of_their_tiles(size, grid):
    drawn = draw_tiles(Image.fromarray(noise(*size)), grid)
    h, w = size[0] // grid[0], size[1] // grid[1]
    left, top, right, bottom = drawn.window
    assert 0 <= left < right <= size[1]
    assert 0 <= top < bottom <= size[0]
    local = centres(drawn.picture, drawn.local_zoom, bottom - top, right - left)
    stride = centres(drawn.picture, drawn.stride_zoom, bottom - top, right - left)
    for y in range(top, bottom):
        for x in range(left, right):
            assert tuple(local[y - top, x - left]) == tile_colour(y // h, x // w, TileGrid(*grid))
            assert tuple(stride[y - top, x - left]) == tile_colour(y % grid[0], x % grid[1], TileGrid(*grid))


def test_the_window_lies_where_four_blocks_meet():
    drawn = draw_tiles(Image.new("RGB", (90, 120)), (4, 3))
    left, top, right, bottom = drawn.window
    assert top < 60 < bottom
    assert left < 30 < right


def test_the_photograph_is_shown_under_its_grid():
    pixels = noise(6, 10)
    drawn = draw_tiles(Image.fromarray(pixels), (2, 5))
    assert np.array_equal(centres(drawn.picture, drawn.photo, 6, 10), pixels)
    left, top, right, bottom = drawn.photo
    for row in range(1, 2):  # white lines between the blocks, in the middle of a pixel's width
        assert drawn.picture.getpixel((left + 20, top + row * (bottom - top) // 2)) == (255, 255, 255)
    for col in range(1, 5):
        assert drawn.picture.getpixel((left + col * (right - left) // 5, top + 20)) == (255, 255, 255)


def test_a_large_image_is_reduced():
    image = Image.new("RGB", (3000, 2000), (9, 99, 199))
    image.paste((250, 10, 10), (0, 0, 1000, 1000))
    drawn = draw_tiles(image, (2, 3))
    assert drawn.picture.width < 2500
    middles = [drawn.picture.getpixel(((b[0] + b[2]) // 2, (b[1] + b[3]) // 2)) for b in drawn.local]
    assert middles == [(250, 10, 10)] + 5 * [(9, 99, 199)]


@pytest.mark.parametrize("grid", [(2, 5), (3, 3), (7, 4), (12, 12)])
def test_colours_of_tiles_differ(grid):
    grid = TileGrid(*grid)
    colours = {tile_colour(row, col, grid) for row in range(grid.rows) for col in range(grid.cols)}
    assert len(colours) == grid.num_tiles


def test_errors():
    image = Image.new("RGB", (5, 4))
    with pytest.raises(ValueError, match="cannot be cut by a grid of 3 x 5 tiles"):
        draw_tiles(image, (3, 5))
    with pytest.raises(ValueError, match="grid of 33x1 cannot be drawn readably: at most 32"):
        draw_tiles(Image.new("RGB", (1, 33)), (33, 1))


def test_pictures_of_any_kind_are_drawn():
    pixels = noise(6, 10)
    expected = np.array(draw_tiles(Image.fromarray(pixels), (2, 5)).picture)
    for source in (pixels, torch.from_numpy(pixels).permute(2, 0, 1), pixels / 255):
        assert np.array_equal(np.array(draw_tiles(source, (2, 5)).picture), expected)
