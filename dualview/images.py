"""Picture files: read any of them as RGB, fit a picture to a canvas, save one.

Every problem with a file is an [`ImageError`][dualview.images.ImageError], whose message is one line for the user.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dualview.geometry import Size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)
"""What padding is filled with, rounded down as INF-LLaVA's processor does: nearly zero after CLIP's normalisation."""

SAVED_AS = (".png", ".jpg", ".jpeg", ".webp")


class ImageError(ValueError):
    """A picture file cannot be read or written; the message is one line that says which, why, and what to do."""


def load_image(path: str | Path) -> Image.Image:
    """Read a picture file as 8-bit RGB, turned as its EXIF orientation says.

    Transparent pixels are composited on white. Grayscale of 16 bits is scaled, not clipped. Of an animation the first
    frame is taken. CMYK is converted without colour management.

    Args:
        path: A file in any format that Pillow reads.

    Raises:
        ImageError: The file does not exist, is no picture, is damaged, holds more pixels than Pillow's limit against
            decompression bombs, or holds numbers without a defined range (32-bit integers, floating point).
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    try:
        if not path.exists():
            raise ImageError(f"{path}: no such file.")
        if not path.is_file():
            raise ImageError(f"{path} is not a file: give the path of one picture.")
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes).")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _to_rgb(image, path)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not a picture in a format that Pillow reads.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"{path} holds more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs: "
            "reduce the picture first."
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble over
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path} cannot be read: {reason}. The file may be damaged.") from error


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format in ("PNG", "PPM")):
        return _scale_16_bit(upright).convert("RGB")
    if upright.mode in ("I", "F"):
        kind = "floating-point" if upright.mode == "F" else "32-bit"
        raise ImageError(
            f"{path} holds {kind} numbers, whose range of brightness is not defined: save it with 8 or 16 bits per "
            "channel first."
        )
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return upright.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257, rounded to nearest


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture; the extension says the format.

    Raises:
        ImageError: The extension is unknown, the folder does not exist, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SAVED_AS:
        raise ImageError(f"{path}: the extension {path.suffix!r} is none of {', '.join(SAVED_AS)}: use one of them.")
    if not path.parent.is_dir():
        raise ImageError(f"{path}: the folder {path.parent} does not exist: make it first.")
    try:
        image.save(path, quality=92, optimize=True)  # each format takes the options that it knows
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}.") from error


def fit_canvas(image: Image.Image, size: Size) -> Image.Image:
    """The whole picture, centred on a canvas of ``size`` = (height, width) at the largest scale that fits, padded.

    The padding has CLIP's mean colour. INF-LLaVA's processor pads before it scales, which for a picture of 1 x N pixels
    takes memory for N x N; here scaling comes first, so the pixels next to the padding differ slightly from its own.
    """
    from PIL import Image

    height, width = size
    scale = min(height / image.height, width / image.width)
    fitted = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    canvas = Image.new("RGB", (width, height), MEAN_COLOUR)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    return canvas


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels of an RGB picture as uint8, (3, H, W)."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """The RGB picture of (3, H, W) uint8 pixels."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
