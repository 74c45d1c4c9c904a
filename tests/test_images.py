"""Every kind of picture is read as the eye sees it, from wherever it comes, or refused in one line."""

import io
import os
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import dualview as dv
from dualview.images import ImageError, to_image
from dualview.models import InfLlavaImageProcessor
from tests.pictures import OddFile, bmp_of_runs, noise, odd_files, png_header, saved, tiff

FILES = {file.name: file for file in odd_files()}
RAW = {"do_resize": False, "do_pad": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


def seen(pixels):
    return pixels.permute(1, 2, 0).numpy()


def by_opencv(content):
    """RGB on white in 0..255, by a decoder that shares nothing with Pillow."""
    raw = np.frombuffer(content, np.uint8)
    kept = cv2.imdecode(raw, cv2.IMREAD_UNCHANGED)
    upright = cv2.imdecode(raw, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)  # the only ones that OpenCV turns
    image = kept if kept.ndim == 3 and kept.shape[2] == 4 and kept.shape[:2] == upright.shape[:2] else upright
    image = image / np.iinfo(image.dtype).max * 255
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.shape[2] == 4:
        share = image[..., 3:] / 255
        image = image[..., :3] * share + 255 * (1 - share)
    return image[..., ::-1]


def refused(source, *words):
    with pytest.raises(ImageError) as info:
        dv.load_image(source)
    message = str(info.value)
    assert "\n" not in message
    if isinstance(source, Path):
        assert str(source) in message
    for word in words:
        assert word in message


@pytest.fixture(params=FILES.values(), ids=FILES)
def odd(request, tmp_path) -> tuple[OddFile, Path]:
    path = tmp_path / request.param.name
    path.write_bytes(request.param.content)
    return request.param, path


def test_odd_files_are_read_as_the_eye_sees_them(odd):
    """From a path, an open file, an image of Pillow, opened lazily or loaded, and by the processor: always the same."""
    file, path = odd
    loaded = dv.load_image(path)
    assert loaded.dtype == torch.uint8
    assert loaded.is_contiguous()
    assert seen(loaded).shape == file.expected.shape
    assert np.abs(seen(loaded) - file.expected).max() <= file.tolerance
    if file.opencv:
        assert np.abs(seen(loaded) - by_opencv(file.content)).max() <= max(1, file.tolerance)
    others = [str(path), io.BytesIO(file.content), Image.open(path), Image.open(io.BytesIO(file.content))]
    for source in others:
        assert torch.equal(dv.load_image(source), loaded)
    with path.open("rb") as opened:
        assert torch.equal(dv.load_image(opened), loaded)
    for source in (str(path), path, Image.open(path)):
        pixels = InfLlavaImageProcessor(**RAW)(source, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, loaded)


def test_a_loaded_image_of_pillow_is_turned_once(tmp_path):
    file = FILES["turned6.jpg"]
    image = Image.open(io.BytesIO(file.content))
    image.load()
    assert np.abs(seen(dv.load_image(image)) - file.expected).max() <= file.tolerance
    assert image.size == (36, 24)  # the caller's image is as it was


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_thin_images_are_read(tmp_path, size):
    Image.fromarray(noise(*size)).save(tmp_path / "thin.png")
    assert dv.load_image(tmp_path / "thin.png").shape == (3, *size)


class TestArrays:
    """One rule for arrays and tensors, in the loader and in the processor."""

    rgb = noise(5, 9)

    @pytest.fixture(params=["loader", "processor"])
    def load(self, request):
        processor = InfLlavaImageProcessor(**RAW)
        return {
            "loader": dv.load_image,
            "processor": lambda x, **o: processor(x, return_tensors="pt", **o)["pixel_values"][0],
        }[request.param]

    def test_layouts(self, load):
        expected = torch.from_numpy(self.rgb).permute(2, 0, 1)
        chw = np.ascontiguousarray(self.rgb.transpose(2, 0, 1))
        for source in (self.rgb, chw, torch.from_numpy(self.rgb), torch.from_numpy(chw)):
            assert torch.equal(load(source), expected)
        for source in (self.rgb[..., 0], self.rgb[..., :1], chw[:1], torch.from_numpy(chw[0])):
            assert torch.equal(load(source), expected[:1].expand(3, -1, -1))

    def test_arrays_three_pixels_high_and_tensors_three_pixels_wide(self, load):
        low = self.rgb[:3]  # (3, 9, 3)
        expected = torch.from_numpy(low).permute(2, 0, 1)
        assert torch.equal(load(low), expected)
        assert torch.equal(load(expected.clone()), expected)
        narrow = expected[:, :, :3].clone()  # (3, 3, 3)
        assert torch.equal(load(narrow), narrow)
        assert torch.equal(load(np.ascontiguousarray(narrow.permute(1, 2, 0))), narrow)

    def test_the_processor_is_told_the_layout(self):
        low = self.rgb[:3, :3]
        processor = InfLlavaImageProcessor(**RAW)
        for name, axes in (("channels_first", (0, 1, 2)), ("channels_last", (2, 0, 1))):
            for source in (low, torch.from_numpy(low)):
                out = processor(source, return_tensors="pt", input_data_format=name)["pixel_values"][0]
                assert np.array_equal(out.numpy(), low.transpose(axes))

    def test_alpha_is_composited_on_white(self, load):
        rgba = noise(5, 9, 4)
        share = rgba[..., 3:] / 255
        expected = np.round(rgba[..., :3] * share + 255 * (1 - share))
        for source in (rgba, torch.from_numpy(rgba).permute(2, 0, 1)):
            assert np.array_equal(seen(load(source)), expected)
        assert np.abs(seen(load(rgba / 255)) * 255 - expected).max() <= 0.5 + 1e-3
        assert torch.equal(load(Image.fromarray(rgba)), load(rgba))

    @pytest.mark.parametrize("order", ["<u2", ">u2"])
    def test_16_bits_are_scaled(self, load, order):
        deep = np.array([[0, 128, 129], [257, 40000, 65535]])
        expected = torch.from_numpy(np.round(deep / 257)).to(torch.uint8).expand(3, -1, -1)
        assert torch.equal(load(deep.astype(order)), expected)
        assert torch.equal(load(torch.from_numpy(deep.astype(np.uint16))), expected)

    def test_booleans_are_black_and_white(self, load):
        assert load(np.eye(4, dtype=bool))[1].tolist() == (255 * np.eye(4, dtype=int)).tolist()

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    def test_floats_from_0_to_1_stay(self, load, dtype):
        values = (self.rgb / 255).astype(dtype)
        loaded = load(values)
        assert loaded.dtype == torch.float32
        assert np.allclose(seen(loaded), values)

    @pytest.mark.parametrize(
        "source, words",
        [
            (rgb.astype(float), (" to 25", "from 0 to 1", "Divide 0..255 by 255")),
            (rgb / 255 - 0.5, ("from -0.5 to", "from 0 to 1")),
            (np.full((4, 4, 3), np.nan), ("nan",)),
            (np.full((4, 4, 3), np.inf), ("inf",)),
            (rgb.astype(np.int64), ("torch.int64", "give uint8")),
            (rgb.astype(np.int16), ("torch.int16", "give uint8")),
            (torch.zeros(4, 4, 3, dtype=torch.complex64), ("complex64",)),
            (np.zeros((3, 0, 60), np.uint8), ("(3, 0, 60)", "at least one pixel")),
            (np.zeros((0, 0), np.uint8), ("(0, 0)", "at least one pixel")),
            (np.zeros((5, 9, 2), np.uint8), ("(5, 9, 2)", "1, 3 or 4 channels")),
            (torch.zeros(5, 9, 7), ("(5, 9, 7)", "1, 3 or 4 channels")),
        ],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_what_has_no_meaning_is_refused(self, load, source, words):
        with pytest.raises(ImageError) as info:
            load(source)
        assert all(word in str(info.value) for word in words)
        assert "\n" not in str(info.value)

    def test_read_only_and_turned_arrays(self, load):
        fixed = self.rgb.copy()
        fixed.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(seen(load(fixed)), self.rgb)
            assert np.array_equal(seen(load(self.rgb[::-1, ::-2])), self.rgb[::-1, ::-2])


@pytest.mark.parametrize(
    "source, word",
    [
        (None, "NoneType"),
        (3, "int"),
        ([noise(2, 2)], "list"),
        (b"bytes", "bytes"),
        (np.zeros((3, 4, 5, 3), np.uint8), "(3, 4, 5, 3)"),
        (np.array(["a"]), "<U1"),
        (io.StringIO("text"), 'mode "rb"'),
        (Image.new("RGB", (0, 5)), "5 x 0 pixels"),
        (Image.new("F", (4, 4)), "floating-point"),
        ("a\0b.png", "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isprintable() else type(value).__name__,
)
def test_what_is_no_picture_is_refused(source, word):
    refused(source, word)


@pytest.mark.parametrize("mode, word", [("F", "floating-point"), ("I", "32-bit"), ("LAB", "L*a*b*")])
def test_numbers_without_a_range_are_refused(tmp_path, mode, word):
    Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
    refused(tmp_path / "x.tif", word, "8 or 16 bits")


def test_missing_file_folder_and_empty_file(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    refused(tmp_path, "not a file")
    (tmp_path / "e.png").write_bytes(b"")
    refused(tmp_path / "e.png", "0 bytes")
    refused(tmp_path / ("x" * 300 + ".png"), "cannot be read: File name too long.")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a file")


def test_not_an_image(tmp_path):
    (tmp_path / "text.png").write_text("this is text")
    refused(tmp_path / "text.png", "not a picture", "PNG, JPEG")


@pytest.mark.parametrize("name", ["x.eps", "x.png", "x.tif"])
def test_postscript_is_not_run(tmp_path, monkeypatch, name):
    """Pillow would start Ghostscript, whatever the name."""
    path = tmp_path / name
    path.write_bytes(saved(Image.new("RGB", (4, 4)), "EPS"))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **o: pytest.fail("a program was started"))
    refused(path, "not a picture in a format that is read here")


def test_runs_of_a_bmp(tmp_path, monkeypatch):
    """Pillow 12 loses its place in them."""
    content, expected = bmp_of_runs()
    (tmp_path / "runs.bmp").write_bytes(content)
    assert np.array_equal(by_opencv(content), expected)
    if int(PIL.__version__.split(".")[0]) > 12:
        assert np.array_equal(seen(dv.load_image(tmp_path / "runs.bmp")), expected)
    monkeypatch.setattr(PIL, "__version__", "12.3.0")
    refused(tmp_path / "runs.bmp", "Pillow 12.3.0", "install Pillow 13")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_truncated_file(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "may be damaged")


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first and raises at the second
def test_decompression_bomb(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(path, str(Image.MAX_IMAGE_PIXELS), "reduce the picture")


def test_an_unreadable_file_is_neither_missing_nor_damaged(tmp_path, monkeypatch):
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.png")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ImageError, match=r"a\.png cannot be read: Permission denied\.$"):
        dv.load_image(tmp_path / "a.png")


def test_memory_that_ends_is_no_damage(tmp_path, monkeypatch):
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.png")

    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        dv.load_image(tmp_path / "a.png")


def test_to_image_is_the_way_back():
    pixels = noise(4, 7)
    assert np.array_equal(np.array(to_image(dv.load_image(pixels))), pixels)
    assert np.array_equal(np.array(to_image(dv.load_image(pixels / 255))), pixels)


class TestAddresses:
    """The processor takes what processors of transformers take: addresses and base64, through the same loader."""

    content = FILES["rgb16_trns.png"].content

    def pixels(self, source):
        return InfLlavaImageProcessor(**RAW)(source, return_tensors="pt")["pixel_values"][0]

    def test_base64_and_data_urls(self):
        import base64

        text = base64.b64encode(self.content).decode()
        for source in (text, f"data:image/png;base64,{text}"):
            assert torch.equal(self.pixels(source), dv.load_image(io.BytesIO(self.content)))

    def test_http(self, tmp_path):
        (tmp_path / "a.png").write_bytes(self.content)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert torch.equal(self.pixels(f"{address}/a.png"), dv.load_image(tmp_path / "a.png"))
            with pytest.raises(ImageError, match=r"/none\.png cannot be read: .*404"):
                self.pixels(f"{address}/none.png")
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def test_a_path_that_is_not_there(self):
        with pytest.raises(ImageError, match=r"none\.png: no such file"):
            self.pixels("none.png")


def test_turned_tiffs_are_what_pillow_gets_wrong(tmp_path):
    """Where this fails, Pillow has mended it, and `_decode` in dualview/picture_files.py may go."""
    lying = noise(4, 7, 1)[..., 0]
    (tmp_path / "t.tif").write_bytes(tiff(lying, 8, 1, orientation=6))
    assert not np.array_equal(np.array(Image.open(tmp_path / "t.tif")), np.rot90(lying, -1))
