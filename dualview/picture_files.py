"""Picture files to tensors, and Pillow's images with them: what each kind of file means by its numbers."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from dualview.pixels import ImageError, on_white, scale_to_8_bits

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
"""Formats of Pillow that are opened: those that the tests compare with another decoder."""

WITH_ALPHA = {"La": "LA", "RGBa": "RGBA"}
"""Modes whose colours are multiplied by alpha, and what they are converted to before anything else."""

RUN_LENGTHS = (1, 2)
"""The compressed kinds of BMP."""

TRNS_STEP = {"L;2": 85, "L;4": 17}
"""Pillow scales grey of 2 and 4 bits to 8 as it decodes, but not the grey level that a PNG declares transparent."""


def read_file(source: str | os.PathLike[str] | IO[bytes]) -> Tensor:
    """[`load_image`][dualview.load_image] of a path or an open file.

    Raises:
        ImageError: It cannot be read, or is no picture in one of the formats.
    """
    if not isinstance(source, (str, os.PathLike)):
        name = getattr(source, "name", None)
        name = name if isinstance(name, str) else "the open file"
        with _reading(name):
            return _of_file(source, name)
    name = os.fspath(source) or "the path ''"
    with _reading(name):
        found = Path(source).stat()
        if not stat.S_ISREG(found.st_mode):
            raise ImageError(f"{name} is not a file: give the path of one picture.")
        if found.st_size == 0:
            raise ImageError(f"{name} is empty (0 bytes): copy or download it again.")
        # Opened here, for Pillow maps what it opens by itself into memory, and mixes up the sides of turned TIFF files.
        with Path(source).open("rb") as file:
            return _of_file(file, name)


def from_pillow(image: Image.Image) -> Tensor:
    """[`load_image`][dualview.load_image] of an image of Pillow.

    Raises:
        ImageError: It cannot be decoded, holds no pixel, or its numbers have no known range.
    """
    name = str(getattr(image, "filename", "")) or f"the image of mode {image.mode}"
    with _reading(name):
        return _pixels(image, name)


def _of_file(file: IO[bytes], name: str) -> Tensor:
    if not isinstance(file.read(0), bytes):
        raise ImageError(f'{name} is open as text: open it for reading bytes, with mode "rb".')
    image = Image.open(file, formats=FORMATS)
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError  # where Pillow only warns
    return _pixels(image, name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever goes wrong is one line: the file, why, what to do."""
    try:
        yield
    except (ImageError, MemoryError, ImportError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in a format that is read here: {', '.join(FORMATS)}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"{name} holds more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs: "
            "reduce the picture first."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ImageError(f"{name}: no such file.") from None
        if error.strerror:  # what the system says; Pillow's own have none
            raise ImageError(f"{name} cannot be read: {error.strerror}.") from error
        raise _damaged(name, error) from error
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble over
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name} cannot be read: {reason.rstrip('.')}. The file may be damaged.")


def _pixels(image: Image.Image, name: str) -> Tensor:
    if 0 in image.size:
        raise ImageError(f"{name} has {image.height} x {image.width} pixels (height x width): at least one is needed.")
    if (
        image.format == "BMP"
        and image.info.get("compression") in RUN_LENGTHS
        and int(PIL.__version__.split(".")[0]) < 13
    ):
        raise ImageError(
            f"{name} is a BMP with run lengths, which Pillow {PIL.__version__} may decode wrongly: install Pillow 13 "
            "or newer, or save it as PNG."
        )
    raw = _raw_mode(image)
    _decode(image)
    transparent, white, inverted = (
        image.info.get("transparency"),
        _white(image),
        _tag(image, PHOTOMETRIC_INTERPRETATION) == 0,
    )
    upright = ImageOps.exif_transpose(image)
    if white is not None:
        return _deep_grey(upright, white, inverted, transparent)
    if upright.mode in ("I", "F", "LAB"):
        kind = {"I": "32-bit or signed numbers", "F": "floating-point numbers", "LAB": "colours of L*a*b*"}
        raise ImageError(
            f"{name} holds {kind[upright.mode]}, whose range of brightness is not defined here: save it as grey or RGB "
            "with 8 or 16 bits per channel first."
        )
    if raw in TRNS_STEP and isinstance(transparent, int):
        upright.info["transparency"] = transparent * TRNS_STEP[raw]
    elif raw == "RGB;16B" and transparent is not None:
        upright.info["transparency"] = tuple(value >> 8 for value in transparent)  # as Pillow does with the pixels
    if upright.has_transparency_data:
        if upright.mode in WITH_ALPHA:
            upright = upright.convert(WITH_ALPHA[upright.mode])
        return on_white(_to_tensor(upright.convert("RGBA")))
    return _to_tensor(upright.convert("RGB")).contiguous()


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0)


def _raw_mode(image: Image.Image) -> str:
    """How the file packs its pixels, as Pillow calls it; "" where they are decoded already."""
    tiles = getattr(image, "tile", None)
    args: Any = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _decode(image: Image.Image) -> None:
    """Load the pixels; by reading the file, never by mapping it into memory (see `read_file`)."""
    if not isinstance(image, ImageFile.ImageFile):
        return
    filename, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = filename


def _tag(image: Image.Image, number: int) -> Any:
    """A field of a TIFF file; None of anything else."""
    return getattr(image, "tag_v2", {}).get(number) if image.format == "TIFF" else None


def _white(image: Image.Image) -> int | None:
    """The number that stands for white in grey of more than 8 bits; None of everything else."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, BITSPERSAMPLE)
        return 65535 if bits is None else int(2 ** bits[0] - 1)
    return 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else None


def _deep_grey(image: Image.Image, white: int, inverted: bool, transparent: int | None) -> Tensor:
    values = torch.from_numpy(np.array(image).astype(np.int32))
    grey = scale_to_8_bits(white - values if inverted else values, white)
    if transparent is not None:
        grey = grey.masked_fill(values == transparent, 255)
    return grey.expand(3, -1, -1).contiguous()
