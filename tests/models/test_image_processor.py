"""INF-LLaVA's pictures: one rule for every kind of numbers, padding of the mean colour, memory of the output."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

import dualview as dv
from dualview import canvas
from dualview.models import InfLlavaImageProcessor
from tests.checks import refuses
from tests.pictures import noise

HALF = {"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1 / 255}
LYING = noise(20, 40)


def pixels(source, **options):
    return InfLlavaImageProcessor(size=28)(source, return_tensors="pt", **options)["pixel_values"][0]


class TestPadding:
    """What is padded is nearly zero once it is normalised, and never black."""

    @pytest.mark.parametrize("kind", ["bytes", "16 bits", "floats", "picture"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"rescale_factor": 1 / 127.5},
            {"image_mean": 0.5, "image_std": 0.5},
            {"image_mean": [0.1, 0.5, 0.9], "image_std": 0.25},
            {"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1 / 127.5},
        ],
        ids=str,
    )
    def test_is_the_mean(self, kind, options):
        source = {
            "bytes": LYING,
            "16 bits": LYING.astype(np.uint16) * 257,
            "floats": LYING / 255,
            "picture": Image.fromarray(LYING),
        }[kind]
        out = pixels(source, **options)
        assert out.shape == (3, 28, 28)
        step = options.get("rescale_factor", 1 / 255) / np.min(options.get("image_std", 0.26))
        assert out[:, :7].abs().max() <= (1e-5 if kind == "floats" else step + 1e-5)
        assert out[:, 21:].abs().max() <= (1e-5 if kind == "floats" else step + 1e-5)
        assert out[:, 7:21].abs().amax((0, 2)).min() > 0.3
        torch.testing.assert_close(out, pixels(LYING, **options), atol=4 * step, rtol=0)

    @pytest.mark.parametrize("options", [{"image_mean": None}, {"image_mean": 0.5}, {}], ids=str)
    def test_without_normalisation_it_is_the_mean_colour(self, options):
        mean = 0.5 if options.get("image_mean") else np.array(InfLlavaImageProcessor.image_mean)
        for source, unit in ((LYING, 255), (LYING / 255, 1)):
            out = pixels(source, do_normalize=False, **options)
            expected = np.broadcast_to(mean, 3)
            assert np.abs(out[:, 0, 0].numpy() - expected).max() <= 1 / 255
            out = pixels(source, do_normalize=False, do_rescale=False, **options)
            assert np.abs(out[:, 0, 0].numpy() - expected * unit).max() <= unit / 255

    def test_without_rescaling(self):
        """Floats in 0..1 are normalised as they are; a mean in 0..255 belongs to bytes."""
        assert pixels(LYING / 255, do_rescale=False)[:, :7].abs().max() < 1e-5
        torch.testing.assert_close(pixels(LYING / 255, do_rescale=False), pixels(LYING / 255), atol=1e-5, rtol=0)
        out = pixels(LYING, do_rescale=False, image_mean=127.0, image_std=1.0)
        assert out[:, :7].abs().max() == 0
        assert (pixels(LYING, do_rescale=False)[:, :7] > 300).all()  # the mean colour, on the scale of the picture

    def test_a_mean_beyond_white_is_white(self):
        """Not what is left of it when it does not fit into a byte."""
        out = pixels(LYING, rescale_factor=1 / 1000, do_normalize=False)
        assert torch.allclose(out[:, 0, 0], torch.tensor(255 / 1000))

    def test_a_crop_larger_than_the_picture_shows_no_black(self):
        out = pixels(LYING, crop_size=40)
        assert out.shape == (3, 40, 40)
        assert out[:, :6].abs().max() < 0.02
        out = pixels(LYING, do_pad=False, do_resize=False, crop_size=60)
        assert out.shape == (3, 60, 60)
        assert out[:, :, :10].abs().max() < 0.02

    def test_under_max_tiles(self):
        for source in (LYING, LYING / 255):
            processor = InfLlavaImageProcessor(max_tiles=4, tile_size={"height": 16, "width": 20})
            out = processor(source, return_tensors="pt", **HALF)
            assert out["image_grids"].tolist() == [[2, 2]]
            assert out["image_sizes"].tolist() == [[20, 40]]
            whole = dv.recombine(out["pixel_values"], (2, 2), "local")
            assert whole[:, 20:].abs().max() < 0.01
            assert whole[:, :20].abs().max() > 0.5


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [(0.5, 0.5), "half", [0.5, None, 0.5], (1, 2, 3, 4), float("nan")], ids=str)
def test_a_mean_is_one_number_or_three(name, value):
    with refuses(f"{name}={value!r}", "one number or three"):
        InfLlavaImageProcessor(**{name: value})


def test_a_deviation_is_not_zero():
    with refuses("image_std=0", "none may be 0"):
        InfLlavaImageProcessor(image_std=0)


def test_floats_are_the_bytes_that_they_stand_for():
    square = noise(28, 28)
    torch.testing.assert_close(pixels(square / 255), pixels(square), atol=1e-5, rtol=0)
    for size in ((200, 1), (900, 5), (1, 200)):  # one pixel wide at the end, or high
        thin = noise(*size)
        torch.testing.assert_close(pixels(thin / 255), pixels(thin), atol=3 / 255 / 0.26, rtol=0)
    with refuses("from 0 to 1", "Divide 0..255 by 255"):
        pixels(square.astype(np.float32))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 7), (300, 3), (1, 900)])
@pytest.mark.parametrize(
    "options", [{}, {"size": {"height": 44, "width": 60}}, {"crop_size": {"height": 20, "width": 50}}], ids=str
)
def test_is_the_picture_fitted_and_centred(size, options):
    """Pixel by pixel what Pillow makes of it, in the middle of a canvas of the mean colour."""
    picture = Image.fromarray(noise(*size))
    out = pixels(picture, do_normalize=False, do_rescale=False, **options)
    target = options.get("size", {"height": 28, "width": 28})
    canvas_size = (target["height"], target["width"])
    shown = tuple(max(1, round(s * t / max(size))) for s, t in zip(size, canvas_size, strict=True))
    crop = options.get("crop_size", target)
    expected = np.empty((crop["height"], crop["width"], 3))
    expected[:] = [122, 116, 104]
    scaled = np.asarray(picture.resize(shown[::-1], Image.Resampling.BICUBIC)).astype(float)
    top, left = (int((c - t) / 2) + (t - s) // 2 for c, t, s in zip(crop.values(), canvas_size, shown, strict=True))
    for y in range(expected.shape[0]):
        for x in range(expected.shape[1]):
            if 0 <= y - top < shown[0] and 0 <= x - left < shown[1]:
                expected[y, x] = scaled[y - top, x - left]
    assert np.abs(out.numpy().transpose(1, 2, 0) - expected).max() <= 2  # both round twice


@pytest.mark.parametrize("size", [(2, 60), (60, 2), (4, 100), (28, 300), (14, 500)])
@pytest.mark.parametrize("crop", [28, 10, 50])
def test_long_pictures_are_cut_before_they_are_scaled_with_the_same_result(size, crop, monkeypatch):
    picture = noise(*size)
    out = pixels(picture, do_pad=False, crop_size=crop)
    monkeypatch.setattr(canvas, "LONG", 10**9)
    torch.testing.assert_close(out, pixels(picture, do_pad=False, crop_size=crop), atol=2 / 255 / 0.26, rtol=0)


@pytest.mark.more
def test_memory_is_that_of_the_output():
    """Of one process that reads them all: the most that it has held shows the worst of them."""
    pictures = [
        ((20_000, 1), {}),
        ((1, 20_000), {}),
        ((1, 20_000), {"do_pad": False}),
        ((1000, 1), {"do_pad": False}),
        ((20_000, 1), {"do_resize": False}),
        ((20_000, 1), {"max_tiles": 6}),
    ]
    code = f"""
        import resource
        import torch
        from PIL import Image
        from dualview.models import InfLlavaImageProcessor
        torch.set_num_threads(1)
        processor = InfLlavaImageProcessor()
        processor(Image.new("RGB", (4, 4)), return_tensors="pt")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for size, options in {pictures}:
            processor(Image.new("RGB", size, "red"), return_tensors="pt", **options)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    held = [int(line) for line in run.stdout.splitlines()]
    assert len(held) == len(pictures)
    assert max(held) < 100 * 1024, held  # KiB


class TestMaxTiles:
    """What a grid of its own decides cannot be asked for as well."""

    processor = InfLlavaImageProcessor(max_tiles=6, tile_size=28)

    @pytest.mark.parametrize(
        "options, given",
        [
            ({"size": 84}, "size="),
            ({"crop_size": 20}, "crop_size="),
            ({"do_pad": False}, "do_pad=False"),
            ({"do_resize": False}, "do_resize=False"),
            ({"tile_size": None}, "tile_size=None"),
        ],
        ids=str,
    )
    def test_refuses(self, options, given):
        with refuses(given, "max_tiles=6", "Leave it out"):
            self.processor(LYING, return_tensors="pt", **options)
        if None not in options.values():
            with refuses(given, "max_tiles=6", "Leave it out"):
                InfLlavaImageProcessor(max_tiles=6, **options)(LYING, return_tensors="pt")

    @pytest.mark.parametrize("tile", [{"height": 28}, {"height": 0, "width": 28}, (28, 2.5), "28", True])
    def test_refuses_tiles(self, tile):
        with refuses("tile_size="):
            InfLlavaImageProcessor(max_tiles=6, tile_size=tile)

    @pytest.mark.parametrize("budget", [0, -1, 10**5])
    def test_refuses_budgets(self, budget):
        with refuses(f"max_tiles={budget}", "at most 16,384"):
            self.processor(LYING, max_tiles=budget, return_tensors="pt")

    def test_tile_sizes(self):
        for tile in (14, (14, 14), {"height": 14, "width": 14}):
            out = InfLlavaImageProcessor(max_tiles=6, tile_size=tile)(LYING, return_tensors="pt")
            assert out["pixel_values"].shape[-2:] == (14, 14)

    def test_what_is_saved_is_what_is_loaded(self, tmp_path):
        self.processor.save_pretrained(tmp_path)
        again = InfLlavaImageProcessor.from_pretrained(tmp_path)
        assert torch.equal(
            again(LYING, return_tensors="pt")["pixel_values"],
            self.processor(LYING, return_tensors="pt")["pixel_values"],
        )


@pytest.mark.parametrize("options", [{}, {"max_tiles": 6}], ids=str)
def test_no_picture(options):
    for empty in ([], [[]]):
        with refuses("images=[]", "at least one picture"):
            InfLlavaImageProcessor(**options)(empty, return_tensors="pt")


def test_batches_and_flat_arrays():
    batch = np.stack([noise(28, 28), noise(28, 28)[::-1]])
    each = torch.stack([pixels(image) for image in batch])
    for source in (list(batch), batch, [[batch[0]], [batch[1]]], torch.from_numpy(batch).permute(0, 3, 1, 2)):
        assert torch.equal(InfLlavaImageProcessor(size=28)(source, return_tensors="pt")["pixel_values"], each)
    flat = [image[..., 0] for image in batch]
    grey = InfLlavaImageProcessor(size=28)(flat, return_tensors="pt")["pixel_values"]
    assert torch.equal(grey[0], pixels(Image.fromarray(flat[0])))


def test_the_loader_is_the_public_one(tmp_path):
    Image.fromarray(LYING).save(tmp_path / "a.png")
    assert torch.equal(pixels(str(tmp_path / "a.png")), pixels(dv.load_image(tmp_path / "a.png")))
