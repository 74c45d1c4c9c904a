"""Bicubic interpolation, and what torch gets wrong about it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.arguments import shown
from dualview.geometry import Size
from dualview.tensors import FLOATS


def bicubic(image: Tensor, size: Size) -> Tensor:
    """Images at another size: bicubic and antialiased, as Pillow does it. (N, C, H, W) -> (N, C, h, w)

    Floating-point values may overshoot; those of uint8 are cut off.
    """
    return upright(_interpolate, image, size)


def resized(images: Tensor, size: Size) -> Tensor:
    """Images of any type at another size, by `bicubic` in at least float32; integers are rounded and kept in range.

    Shape:
        (..., C, H, W) -> (..., C, h, w)
    """
    if images.dtype not in FLOATS and (images.is_complex() or images.is_floating_point() or images.dtype == torch.bool):
        raise TypeError(f"images={shown(images)}: must be real numbers to be interpolated. Convert them first.")
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    small = bicubic(precise.reshape(-1, 1, *images.shape[-2:]), size).reshape(*images.shape[:-2], *size)
    if not images.is_floating_point():
        limits = torch.iinfo(images.dtype)
        small = small.round().clamp(limits.min, limits.max)
    return small.to(images.dtype)


def upright(resizing: Callable[[Tensor, Size], Tensor], image: Tensor, size: Size) -> Tensor:
    """What ``resizing`` makes of the picture, where torch would do something else on a CPU.

    torch 2.11 to 2.15 mix up the rows of floating-point pictures that become one pixel wide, and fail on pictures of
    uint8 that become a single pixel: these go by way of their transpose, or by way of float32.

    Shape:
        (..., C, H, W) -> (..., C, h, w)
    """
    if image.dtype == torch.uint8 and tuple(size) == (1, 1):
        return upright(resizing, image.float(), size).round().clamp(0, 255).to(torch.uint8)
    if size[1] > 1 or not image.is_floating_point():
        return resizing(image, size)
    return resizing(image.mT.contiguous(), (size[1], size[0])).mT


def _interpolate(image: Tensor, size: Size) -> Tensor:
    return F.interpolate(image, size, mode="bicubic", align_corners=False, antialias=True)
