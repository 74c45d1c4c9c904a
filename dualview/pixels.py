"""Pixels of arrays and tensors as RGB pictures, by one rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dualview.arguments import shown

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class ImageError(ValueError):
    """A picture cannot be read or written; the message is one line that says which, why, and what to do."""


def from_array(array: np.ndarray[Any, Any], *, channels_last: bool | None = None) -> Tensor:
    """[`load_image`][dualview.load_image] of an array; ``channels_last`` may say what the shape leaves open.

    Raises:
        ImageError: It is no picture, by its shape or its numbers.
    """
    import numpy as np
    import torch

    if array.dtype.kind not in "biuf":
        raise ImageError(f"an array of {array.dtype} is no picture: {_RULE}")
    native = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    if channels_last is None:
        channels_last = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    return from_tensor(torch.from_numpy(native), channels_last=channels_last)


def from_tensor(pixels: Tensor, *, channels_last: bool | None = None) -> Tensor:
    """[`load_image`][dualview.load_image] of a tensor; ``channels_last`` may say what the shape leaves open.

    Raises:
        ImageError: It is no picture, by its shape or its numbers.
    """
    import torch

    if pixels.is_nested or pixels.layout != torch.strided or pixels.is_meta:
        raise ImageError(f"{shown(pixels)} is no picture: give a dense tensor that holds numbers.")
    shape = tuple(pixels.shape)
    if len(shape) == 2:
        pixels = pixels[None]
    elif len(shape) == 3:
        last = shape[0] not in (1, 3, 4) if channels_last is None else channels_last
        pixels = pixels.movedim(-1, 0) if last else pixels
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3, 4) or not pixels.numel():
        raise ImageError(
            f"shape {shape} is no picture: give one of at least one pixel, (H, W), (H, W, C) or (C, H, W), with 1, 3 "
            "or 4 channels."
        )
    pixels = _in_range(pixels)
    if pixels.shape[0] == 4:
        return on_white(pixels)
    return pixels.expand(3, -1, -1).contiguous()


_RULE = (
    "give uint8 (0 to 255), uint16 (0 to 65535), bool, or floating-point numbers from 0 to 1. Divide 0..255 by 255 "
    "or convert it to uint8; clamp what resampling made."
)


def _in_range(pixels: Tensor) -> Tensor:
    """The same as uint8 or as float32 in 0..1."""
    import torch

    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype == torch.uint16:
        return scale_to_8_bits(pixels, 65535)
    if not pixels.is_floating_point():
        raise ImageError(f"numbers of {pixels.dtype} have no range of brightness: {_RULE}")
    low, high = (value.item() for value in torch.aminmax(pixels.detach()))
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ImageError(f"floating-point numbers from {low:g} to {high:g} have no range of brightness: {_RULE}")
    return pixels.to(torch.float32)


def scale_to_8_bits(values: Tensor, white: int) -> Tensor:
    """Brightness 0..white as uint8, rounded to nearest."""
    import torch

    return ((values.to(torch.int32) * 255 + white // 2) // white).to(torch.uint8)


def on_white(pixels: Tensor) -> Tensor:
    """RGB of pixels with an alpha channel, composited on white. (4, H, W) -> (3, H, W)"""
    import torch

    colour, alpha = pixels[:3], pixels[3]
    if pixels.is_floating_point():
        return (colour * alpha + (1 - alpha)).contiguous()
    out, alpha = torch.empty_like(colour, memory_format=torch.contiguous_format), alpha.to(torch.int32)
    for channel, result in zip(colour, out, strict=True):  # one at a time: they need four times the memory
        result.copy_((channel * alpha + 255 * (255 - alpha) + 127) // 255)
    return out
