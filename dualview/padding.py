"""Fill images up to whole tiles, with values that their type can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualview.arguments import number_of, shown
from dualview.geometry import Size


def check_pad_value(value: float | Sequence[float]) -> float | tuple[float, ...]:
    """A number, or one per channel in a tuple.

    Raises:
        ValueError: It is neither, or not finite.
    """
    try:
        plain: Any = value.tolist() if hasattr(value, "tolist") else value
    except RuntimeError:  # tensors without contents, or of a layout of their own
        plain = None
    given = tuple(plain) if isinstance(plain, Iterable) else (plain,)
    if not all(math.isfinite(number_of(number)) for number in given):
        raise ValueError(f"pad_value={shown(value)}: give a finite number, or one for each channel in a tuple.")
    numbers = tuple(number if isinstance(number, int) else float(number) for number in given)
    return numbers if isinstance(plain, Iterable) else numbers[0]


def pad_to(images: Tensor, size: Size, value: float | tuple[float, ...]) -> Tensor:
    """Images at the top left of a canvas that is filled with the value.

    Shape:
        (..., C, H, W) -> (..., C, *size)

    Raises:
        ValueError: The type of the images cannot hold the value, or it is not one number per channel.
    """
    numbers = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len(value) != images.shape[-3]:
        raise ValueError(
            f"pad_value={value} for images of shape {tuple(images.shape)}: give one number, or one for each of the "
            f"{images.shape[-3]} channels."
        )
    if wrong := [number for number in numbers if not _holds(images.dtype, number)]:
        raise ValueError(
            f"pad_value={value!r} for images of type {images.dtype}, which cannot hold {wrong[0]!r}: give a number of "
            "the same scale as the pixels, or convert the images first."
        )
    canvas = images.new_empty((*images.shape[:-2], *size))
    canvas[:] = torch.tensor(numbers, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
    canvas[..., : images.shape[-2], : images.shape[-1]] = images
    return canvas


def _holds(dtype: torch.dtype, number: float) -> bool:
    """Whether a finite number stays what it is in this type, up to rounding of fractions where there are fractions."""
    if dtype.is_floating_point or dtype.is_complex:
        return abs(number) <= torch.finfo(dtype).max
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return number % 1 == 0 and low <= number <= high
