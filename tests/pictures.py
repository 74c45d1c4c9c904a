"""Small odd picture files, written byte by byte where Pillow does not write them, with what each must look like."""

import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)
HEIGHT, WIDTH = 3, 8  # of most files: whole bytes at 1, 2 and 4 bits a pixel
LEVELS = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)


class OddFile(NamedTuple):
    """A file and its picture.

    Attributes:
        name: With the extension.
        content: Its bytes.
        expected: (height, width, 3) in 0..255.
        tolerance: By how much a decoder may differ.
        opencv: Whether OpenCV reads it as the format says.
    """

    name: str
    content: bytes
    expected: np.ndarray
    tolerance: float = 0
    opencv: bool = True


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Values (height, width) or (height, width, channels) of ``depth`` bits."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row for row in packed(values, depth))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends after saying so."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def packed(values: np.ndarray, depth: int) -> Iterator[bytes]:
    """Rows of big-endian numbers of 1 to 16 bits, without gaps."""
    for row in values.reshape(len(values), -1):
        yield np.packbits([int(bit) for value in row for bit in f"{value:0{depth}b}"]).tobytes()


def tiff(values: np.ndarray, depth: int, photometric: int, orientation: int = 1, extra: int | None = None) -> bytes:
    """An uncompressed little-endian TIFF of one strip; ``extra`` says what a fourth channel means."""
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    data = values.astype("<u2").tobytes() if depth == 16 else b"".join(packed(values, depth))
    offset, after = 8, 8 + len(data)
    bits = depth if samples == 1 else after
    fields = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, samples, bits), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, offset), (274, 3, 1, orientation), (277, 3, 1, samples), (278, 4, 1, height),
        (279, 4, 1, len(data)), *([(338, 3, 1, extra)] if extra is not None else []),
    ]  # fmt: skip
    many = struct.pack(f"<{samples}H", *[depth] * samples) if samples > 1 else b""
    directory = struct.pack("<H", len(fields)) + b"".join(struct.pack("<HHII", *f) for f in fields) + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", after + len(many)) + data + many + directory


def bmp_of_runs() -> tuple[bytes, np.ndarray]:
    """A BMP of 4 bits with runs, plain stretches and ends of lines, bottom row first; and its palette's indices."""
    rows = (
        bytes([5, 0x12, 3, 0x33, 0, 0]),  # 1 2 1 2 1, 3 3 3
        bytes([0, 5, 0x45, 0x01, 0x20, 0, 3, 0x22, 0, 0]),  # as they stand: 4 5 0 1 2, padded to two bytes; 2 2 2
        bytes([8, 0x66, 0, 1]),  # 6 eight times, and the end
    )
    palette = np.append(noise(8, 1)[:, 0], np.zeros((8, 1), np.uint8), axis=1)  # blue, green, red, 0
    data, start = b"".join(rows), 54 + 4 * 8
    header = struct.pack("<IiiHHIIiiII", 40, 8, 3, 1, 4, 2, len(data), 2835, 2835, 8, 0)
    content = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette.tobytes() + data
    index = np.array([[6] * 8, [4, 5, 0, 1, 2, 2, 2, 2], [1, 2, 1, 2, 1, 3, 3, 3]])
    return content, palette[index][..., 2::-1].astype(float)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=float)[..., None], 3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours and alpha in 0..255."""
    share = np.asarray(alpha, dtype=float)[..., None] / 255
    return colour * share + 255 * (1 - share)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What is stored as ``pixels``, as the EXIF tag says that it is to be seen."""
    pixels = pixels.swapaxes(0, 1) if orientation > 4 else pixels
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def hole(values: np.ndarray, transparent: int) -> np.ndarray:
    return np.where(values == transparent, 0, 255)


def grey_pngs() -> Iterator[OddFile]:
    for depth in (1, 2, 4, 8, 16):
        most = 2**depth - 1
        values = LEVELS * 2731 % (most + 1)
        seen = grey(values * 255 / most)
        yield OddFile(f"grey{depth}.png", png(values, depth, 0), seen, 0.5)
        clear = int(values[1, 2])
        trns = (b"tRNS", struct.pack(">H", clear))
        # OpenCV drops the transparency of grey
        content = png(values, depth, 0, trns)
        yield OddFile(f"grey{depth}_trns.png", content, on_white(seen, hole(values, clear)), 0.5, False)


def colour_pngs() -> Iterator[OddFile]:
    deep = (noise(HEIGHT, WIDTH).astype(int) * 257) ^ 77
    yield OddFile("rgb16.png", png(deep, 16, 2), deep / 257, 1)
    trns = (b"tRNS", struct.pack(">3H", *deep[1, 2]))
    clear = np.where((deep == deep[1, 2]).all(-1), 0, 255)
    yield OddFile("rgb16_trns.png", png(deep, 16, 2, trns), on_white(deep / 257, clear), 1)
    rgba = (noise(HEIGHT, WIDTH, 4).astype(int) * 257) ^ 77
    yield OddFile("rgba16.png", png(rgba, 16, 6), on_white(rgba[..., :3] / 257, rgba[..., 3] / 257), 2)
    la = rgba[..., :2]
    yield OddFile("la16.png", png(la, 16, 4), on_white(grey(la[..., 0] / 257), la[..., 1] / 257), 2)
    palette, alphas = noise(1, 4)[0], np.array([255, 0, 100])
    plte = [(b"PLTE", palette.tobytes()), (b"tRNS", bytes(alphas.tolist()))]
    index = LEVELS % 4
    seen = on_white(palette[index], np.append(alphas, 255)[index])
    yield OddFile("palette2_trns.png", png(index, 2, 3, *plte), seen, 1)


def tiffs() -> Iterator[OddFile]:
    for depth in (1, 8, 16):
        most = 2**depth - 1
        values = LEVELS * 2731 % (most + 1)
        yield OddFile(
            f"white_is_zero{depth}.tif", tiff(values, depth, 0), grey((most - values) * 255 / most), 0.5, depth < 16
        )
    twelve = LEVELS * 171 % 4096
    yield OddFile("grey12.tif", tiff(twelve, 12, 1), grey(twelve * 255 / 4095), 0.5, False)
    rgba = noise(HEIGHT, WIDTH, 4)
    # OpenCV gives colours multiplied by alpha
    yield OddFile("rgba.tif", tiff(rgba, 8, 2, extra=2), on_white(rgba[..., :3], rgba[..., 3]), 0.6, False)
    alpha = rgba[..., 3:].astype(int)
    premultiplied = np.concatenate([rgba[..., :3] * alpha // 255, alpha], axis=2)
    seen = premultiplied[..., :3] + 255 - alpha
    yield OddFile("premultiplied.tif", tiff(premultiplied, 8, 2, extra=1), seen, 1.6, False)
    for orientation in (5, 6, 7, 8):
        lying = noise(4, 7)
        name, seen = f"turned{orientation}", turned(lying, orientation).astype(float)
        yield OddFile(f"{name}_rgb.tif", tiff(lying, 8, 2, orientation), seen)
        yield OddFile(f"{name}_grey.tif", tiff(lying[..., 0], 8, 1, orientation), grey(seen[..., 0]))
        deep = lying[..., 0].astype(int) * 257
        yield OddFile(f"{name}_grey16.tif", tiff(deep, 16, 1, orientation), grey(seen[..., 0]))
        with_alpha = np.concatenate([lying, np.full((4, 7, 1), 255)], axis=2)
        yield OddFile(f"{name}_rgba.tif", tiff(with_alpha, 8, 2, orientation, extra=2), seen)


def others() -> Iterator[OddFile]:
    cmyk = np.repeat(np.repeat(noise(2, 3, 4), 16, 0), 16, 1)
    seen = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    image = Image.frombytes("CMYK", (48, 32), cmyk.tobytes())
    yield OddFile("cmyk.tif", saved(image, "TIFF"), seen, 1)
    yield OddFile("cmyk.jpg", saved(image, "JPEG", quality=100), seen, 12)
    smooth = np.add.outer(np.arange(24), np.arange(36) * 2).astype(np.uint8)[..., None] + np.array(
        [0, 40, 90], np.uint8
    )
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = saved(Image.fromarray(smooth), "JPEG", quality=100, exif=exif)
        yield OddFile(f"turned{orientation}.jpg", content, turned(smooth, orientation).astype(float), 6)
    for maxval in (100, 1000, 65535):
        values = LEVELS * 2731 % (maxval + 1)
        kind = "u1" if maxval < 256 else ">u2"
        content = f"P5 {WIDTH} {HEIGHT} {maxval}\n".encode() + values.astype(kind).tobytes()
        yield OddFile(f"max{maxval}.pgm", content, grey(values * 255 / maxval), 0.6, maxval == 65535)
    bits = LEVELS % 3 % 2
    yield OddFile("bits.pbm", f"P4 {WIDTH} {HEIGHT}\n".encode() + b"".join(packed(bits, 1)), grey(255 * (1 - bits)))
    coloured = Image.fromarray(noise(5, 7))
    yield OddFile(
        "palette.bmp", saved(coloured.quantize(16), "BMP"), np.array(coloured.quantize(16).convert("RGB")) * 1.0
    )
    rgba = np.repeat(np.repeat(noise(2, 3, 4), 16, 0), 16, 1)
    seen = on_white(rgba[..., :3], rgba[..., 3])
    yield OddFile("alpha.webp", saved(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), seen, 0.6)
    yield OddFile(
        "grey16.jp2",
        saved(Image.fromarray((LEVELS * 2731).astype(np.uint16)), "JPEG2000"),
        grey(LEVELS * 2731 / 257),
        0.5,
    )
    yield OddFile("smooth.avif", saved(Image.fromarray(smooth), "AVIF", quality=100), smooth.astype(float), 8)
    frames = [Image.new("RGBA", (4, 3), colour) for colour in ((200, 10, 10, 255), (0, 0, 250, 255))]
    frames[0].putpixel((1, 2), (0, 0, 0, 0))
    seen = np.full((3, 4, 3), (200.0, 10.0, 10.0))
    seen[2, 1] = WHITE
    yield OddFile("moving.gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), seen)


MAKERS: tuple[Callable[[], Iterator[OddFile]], ...] = (grey_pngs, colour_pngs, tiffs, others)


def odd_files() -> list[OddFile]:
    return [file for make in MAKERS for file in make()]
