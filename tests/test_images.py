"""Every kind of picture file is read as the eye sees it, or refused in one line."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dualview.images import (
    CLIP_MEAN,
    CLIP_STD,
    MEAN_COLOUR,
    SAVED_AS,
    ImageError,
    fit_canvas,
    load_image,
    save_image,
    to_image,
    to_tensor,
)
from dualview.models import InfLlavaImageProcessor


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_header(width, height):
    """A PNG that claims a size and ends after saying so."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def refused(path, *words):
    with pytest.raises(ImageError) as info:
        load_image(path)
    message = str(info.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_rgb_is_read_exactly(tmp_path):
    pixels = noise(5, 9)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image), pixels)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_thin_images_are_read(tmp_path, size):
    Image.fromarray(noise(*size)).save(tmp_path / "thin.png")
    assert load_image(tmp_path / "thin.png").size == (size[1], size[0])


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 7 5 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    with Image.open(path) as opened:
        assert opened.mode.startswith("I")  # the case this test is about
    grey = np.array(load_image(path))
    expected = np.round(values.astype(float) / 257)
    for channel in range(3):
        assert np.array_equal(grey[..., channel], expected)


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 4), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "c.jpg").getpixel((4, 2))
    assert red > 245
    assert max(green, blue) < 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    path = tmp_path / "t.png"
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putpalette([200, 0, 0, 0, 0, 0])
        image.putdata([0, 1, 0])
        image.save(path, transparency=1)
        expected = [(200, 0, 0), (255, 255, 255), (200, 0, 0)]
    elif mode == "RGBA":
        image = Image.new("RGBA", (3, 1))
        image.putdata([(200, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
        image.save(path)
        expected = [(200, 0, 0), (255, 255, 255), (127, 127, 127)]
    else:
        image = Image.new("LA", (3, 1))
        image.putdata([(40, 255), (0, 0), (0, 128)])
        image.save(path)
        expected = [(40, 40, 40), (255, 255, 255), (127, 127, 127)]
    loaded = load_image(path)
    assert [loaded.getpixel((x, 0)) for x in range(3)] == expected


def test_exif_orientation_is_applied(tmp_path):
    pixels = noise(4, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(load_image(tmp_path / "turned.png")), np.rot90(pixels, -1))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("mode, word", [("F", "floating-point"), ("I", "32-bit")])
def test_numbers_without_a_range_are_refused(tmp_path, mode, word):
    Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
    refused(tmp_path / "x.tif", word, "8 or 16 bits")


def test_missing_file(tmp_path):
    refused(tmp_path / "none.png", "no such file")


def test_folder(tmp_path):
    refused(tmp_path, "not a file")


def test_empty_file(tmp_path):
    (tmp_path / "e.png").write_bytes(b"")
    refused(tmp_path / "e.png", "0 bytes")


def test_not_an_image(tmp_path):
    (tmp_path / "text.png").write_text("this is text")
    refused(tmp_path / "text.png", "not a picture")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_truncated_file(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path)


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first and raises at the second
def test_decompression_bomb(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    refused(path, str(Image.MAX_IMAGE_PIXELS), "reduce the picture")


def test_an_unreadable_file_is_not_called_missing(tmp_path, monkeypatch):
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.png")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", denied)
    refused(tmp_path / "a.png", "Permission denied")


@pytest.mark.parametrize("suffix", SAVED_AS)
def test_save(tmp_path, suffix):
    image = Image.new("RGB", (20, 10), (200, 30, 90))
    path = tmp_path / f"out{suffix.upper()}"
    save_image(image, path)
    assert load_image(path).size == (20, 10)
    assert np.abs(np.array(load_image(path)).astype(int) - (200, 30, 90)).max() <= 4


@pytest.mark.parametrize(
    "name, word",
    [("x.xyz", "'.xyz' is none of .png"), ("x", "'' is none of .png"), ("none/x.png", "does not exist")],
)
def test_save_refuses(tmp_path, name, word):
    with pytest.raises(ImageError, match=word):
        save_image(Image.new("RGB", (2, 2)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_where_writing_fails(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ImageError, match="cannot be written: Is a directory"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "x.png")


def test_fit_canvas_scales_and_centres():
    image = Image.new("RGB", (20, 10), (10, 200, 30))
    canvas = np.array(fit_canvas(image, (60, 40)))  # the image becomes 20 high, 40 wide
    assert canvas.shape == (60, 40, 3)
    assert (canvas[:20] == MEAN_COLOUR).all()
    assert (canvas[20:40] == (10, 200, 30)).all()
    assert (canvas[40:] == MEAN_COLOUR).all()


def test_fit_canvas_of_the_same_shape_keeps_pixels():
    pixels = noise(6, 9)
    assert np.array_equal(np.array(fit_canvas(Image.fromarray(pixels), (6, 9))), pixels)


def test_padding_has_the_colour_of_the_models_processor():
    image = Image.new("RGB", (6, 4), "red")
    processor = InfLlavaImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    padded = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.array_equal(padded, np.array(fit_canvas(image, (6, 6))))
    assert np.abs((np.array(MEAN_COLOUR) / 255 - CLIP_MEAN) / CLIP_STD).max() < 0.02


def test_fit_canvas_of_a_line():
    canvas = np.array(fit_canvas(Image.new("RGB", (50_000, 1), "red"), (29, 30)))
    expected = np.full((29, 30, 3), MEAN_COLOUR)
    expected[14] = (255, 0, 0)  # one pixel high still, in the middle
    assert np.array_equal(canvas, expected)


def test_tensor_round_trip():
    pixels = noise(4, 7)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 4, 7)
    assert tensor[1, 2, 5] == pixels[2, 5, 1]
    assert np.array_equal(np.array(to_image(tensor)), pixels)
