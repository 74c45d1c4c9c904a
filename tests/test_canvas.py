"""Pictures are fitted to sizes: scaled as Pillow does it, padded with the mean colour, cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualview.canvas import LONG, centred, fit_canvas, fit_to_grid, fit_to_tile, middle_part, place, resize
from dualview.geometry import TileGrid
from dualview.images import CLIP_MEAN, CLIP_STD, MEAN_COLOUR
from tests.checks import refuses
from tests.pictures import noise

sides = st.integers(1, 12)


def seen(pixels):
    return pixels.permute(1, 2, 0).numpy()


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_fit_canvas_scales_and_centres():
    image = Image.new("RGB", (20, 10), (10, 200, 30))
    canvas = seen(fit_canvas(image, (60, 40)))  # the image becomes 20 high, 40 wide
    assert canvas.shape == (60, 40, 3)
    assert (canvas[:20] == MEAN_COLOUR).all()
    assert (canvas[20:40] == (10, 200, 30)).all()
    assert (canvas[40:] == MEAN_COLOUR).all()
    shares = seen(fit_canvas(np.array(image) / 255, (60, 40)))
    assert np.abs(shares * 255 - canvas).max() < 1e-4


def test_fit_canvas_of_the_same_shape_keeps_pixels():
    pixels = noise(6, 9)
    assert np.array_equal(seen(fit_canvas(pixels, (6, 9))), pixels)


def test_fit_canvas_of_a_line():
    canvas = seen(fit_canvas(Image.new("RGB", (50_000, 1), "red"), (29, 30)))
    expected = np.full((29, 30, 3), MEAN_COLOUR)
    expected[14] = (255, 0, 0)  # one pixel high still, in the middle
    assert np.array_equal(canvas, expected)


@pytest.mark.parametrize("size", [(9, 12), (90, 1), (1, 1)])
def test_a_picture_that_becomes_a_single_pixel(size):
    """torch's own interpolation of bytes fails."""
    image = tensor(noise(*size))
    exact = resize(image.double() / 255, (1, 1)) * 255
    assert torch.equal(resize(image, (1, 1)), exact.round().to(torch.uint8))


def test_the_mean_colour_is_nearly_zero_when_normalised():
    assert np.abs((np.array(MEAN_COLOUR) / 255 - CLIP_MEAN) / CLIP_STD).max() < 0.02


@given(sides, sides, sides, sides, st.integers(-9, 9), st.integers(-9, 9))
def test_place_is_what_loops_do(height, width, rows, cols, top, left):
    pixels = noise(height, width)
    expected = np.empty((rows, cols, 3), np.uint8)
    for y in range(rows):
        for x in range(cols):
            inside = 0 <= y - top < height and 0 <= x - left < width
            expected[y, x] = pixels[y - top, x - left] if inside else (1, 2, 3)
    assert np.array_equal(seen(place(tensor(pixels), (rows, cols), (top, left), (1, 2, 3))), expected)


@pytest.mark.parametrize("size", [(12, 8), (3, 5), (7, 40), (1, 1), (5, 1), (20, 1), (1, 30)])
def test_resize_is_pillows(size):
    pixels = noise(7, 11)
    expected = np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(seen(resize(tensor(pixels), size)) - expected).max() <= 2  # both round twice
    shares = seen(resize(tensor(pixels / 255).float(), size))
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert np.abs(shares * 255 - expected).max() <= 2.5


@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 20), st.integers(1, 30), st.booleans())
def test_the_middle_part_is_the_middle_of_everything(short, long, edge, shown, upright):
    """Scaled alone, the part has the pixels that a crop of the whole shows, where lengths scale to whole pixels."""
    long += short
    size = (long, short) if upright else (short, long)
    crop = (shown, 25)
    part = middle_part(size, edge, crop)
    axis = int(not upright)
    full = edge * long // short
    if long <= LONG * short or full <= crop[axis]:
        assert part is None
        return
    assert part is not None
    (along, start, length), corner = part
    assert along == axis
    assert 0 <= start < start + length <= long
    assert length <= max(crop[axis] * short / edge, 0) + 8 * max(1, short / edge) + 2 * short
    if edge * long % short:
        return
    pixels = tensor(noise(*size)).float() / 255
    whole_size = (full, edge) if upright else (edge, full)
    whole = place(resize(pixels, whole_size), crop, centred(whole_size, crop), (0, 0, 0))
    cut = pixels.narrow(1 + axis, start, length)
    cut_size = (length * edge // short, edge) if upright else (edge, length * edge // short)
    assert length * edge % short == 0
    torch.testing.assert_close(place(resize(cut, cut_size), crop, corner, (0, 0, 0)), whole, atol=2e-4, rtol=0)


@pytest.mark.parametrize("remainder, size", [("pad", (8, 12)), ("crop", (4, 9)), ("resize", (8, 12))])
def test_fit_to_grid(remainder, size):
    pixels = noise(7, 11)
    fitted = seen(fit_to_grid(pixels, (4, 3), remainder))
    assert fitted.shape[:2] == size
    if remainder == "pad":
        assert np.array_equal(fitted[:7, :11], pixels)
        assert (fitted[7:] == MEAN_COLOUR).all()
        assert (fitted[:, 11:] == MEAN_COLOUR).all()
    elif remainder == "crop":
        assert np.array_equal(fitted, pixels[:4, :9])
    else:
        assert np.array_equal(fitted, seen(resize(tensor(pixels), (8, 12))))


def test_resize_goes_to_the_nearest_multiple():
    assert fit_to_grid(Image.new("RGB", (10, 9)), (4, 3), "resize").shape == (3, 8, 9)
    assert fit_to_grid(Image.new("RGB", (11, 10)), (4, 3), "resize").shape == (3, 12, 12)


@pytest.mark.parametrize("remainder", ["pad", "crop", "resize"])
def test_an_image_that_fits_is_unchanged(remainder):
    pixels = noise(8, 9)
    assert np.array_equal(seen(fit_to_grid(pixels, (4, 3), remainder)), pixels)
    fitted, grid = fit_to_tile(pixels, (2, 3), remainder)
    assert np.array_equal(seen(fitted), pixels)
    assert grid == TileGrid(4, 3)


@pytest.mark.parametrize("remainder, grid", [("pad", (3, 3)), ("crop", (2, 2)), ("resize", (2, 3))])
def test_fit_to_tile(remainder, grid):
    pixels = noise(7, 11)
    fitted, made = fit_to_tile(pixels, (3, 4), remainder)
    assert tuple(made) == grid
    assert fitted.shape == (3, 3 * grid[0], 4 * grid[1])
    if remainder != "resize":
        height, width = (min(a, b) for a, b in zip(fitted.shape[1:], (7, 11), strict=True))
        assert np.array_equal(seen(fitted)[:height, :width], pixels[:height, :width])


def test_errors():
    image = Image.new("RGB", (5, 4))
    for grid in ((5, 2), (2, 6)):
        with refuses(f"grid of {grid[0]}x{grid[1]} ", "image of 4 x 5 pixels"):
            fit_to_grid(image, grid)
    with refuses("remainder='drop'", '"pad", "crop" or "resize"'):
        fit_to_grid(image, (2, 2), "drop")
    with refuses("smaller than one tile of 5 x 2"):
        fit_to_tile(image, (5, 2), "crop")
    assert fit_to_tile(image, (50, 20), "resize")[1] == TileGrid(1, 1)
