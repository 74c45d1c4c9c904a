"""Pictures as tensors: one loader for files, Pillow's images, arrays and tensors.

What cannot be read is an [`ImageError`][dualview.pixels.ImageError], whose message is one line for the user.
"""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union, cast

from dualview.arguments import shown
from dualview.pixels import ImageError, from_array, from_tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

__all__ = ["CLIP_MEAN", "CLIP_STD", "MEAN_COLOUR", "ImageError", "ImageSource", "load_image", "to_image"]

ImageSource: TypeAlias = Union[str, os.PathLike[str], IO[bytes], "Image.Image", "np.ndarray[Any, Any]", "Tensor"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)
"""What padding is filled with, rounded down as INF-LLaVA's processor does: nearly zero after CLIP's normalisation."""


def load_image(source: ImageSource) -> Tensor:
    """A picture as an RGB tensor, as the eye sees it.

    Files (PNG, JPEG, GIF, BMP, TIFF, WebP, PPM, JPEG 2000, AVIF) and Pillow's images become uint8. They are turned as
    their EXIF orientation says, and transparent pixels are composited on white. Grey of 9 to 16 bits is scaled to 8,
    not clipped. Of an animation the first frame is taken. CMYK is converted without colour management.

    Arrays and tensors are grey, RGB or RGBA: (H, W) or (H, W, C), or (C, H, W). Where the shape leaves it open, an
    array is (H, W, C) and a tensor (C, H, W). uint8 is taken as it is, uint16 is scaled to 8 bits, booleans are black
    and white. Floating-point numbers must lie in 0..1 and become float32; other numbers have no range of brightness and
    are refused. The result may share the memory of what was given.

    Args:
        source: A path, a file opened for reading bytes, an image of Pillow, an array of NumPy or a tensor.

    Shape:
        (3, H, W), uint8 in 0..255, or float32 in 0..1

    Raises:
        ImageError: There is no such file, or it is no picture in a format that is read, damaged, or larger than
            Pillow's limit against decompression bombs; or the numbers have no known range; or the shape is not that of
            a picture.
        ModuleNotFoundError: Pillow is not installed, and the source is neither an array nor a tensor.

    Example:
        >>> import numpy as np
        >>> load_image(np.full((2, 5), 65535, dtype=np.uint16))[:, 0, 0]
        tensor([255, 255, 255], dtype=torch.uint8)
    """
    import numpy as np
    import torch

    if isinstance(source, torch.Tensor):
        return from_tensor(source)
    if isinstance(source, np.ndarray):
        return from_array(source)
    try:
        from dualview.picture_files import from_pillow, read_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'dualview.load_image needs pillow ({error}): run pip install -e ".[hf]" in your clone.', name=error.name
        ) from error
    made = not isinstance(source, type)
    if isinstance(source, (str, os.PathLike)) or (made and hasattr(source, "read")):
        return read_file(cast("str | os.PathLike[str] | IO[bytes]", source))
    if made and hasattr(source, "getexif"):
        return from_pillow(cast("Image.Image", source))
    raise ImageError(
        f"source={shown(source)}: a {type(source).__name__} is no picture. "
        "Give a path, an open file, an image of Pillow, an array or a tensor."
    )


def to_image(pixels: Tensor) -> Image.Image:
    """The picture of Pillow that shows (3, H, W) pixels, uint8 or floating point in 0..1."""
    from PIL import Image

    if pixels.is_floating_point():
        pixels = (pixels * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
