"""What padding is filled with: numbers that the type of the images can hold, and no others."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dualview as dv
from tests.checks import refuses

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64]


def padded(dtype: torch.dtype, value: object) -> torch.Tensor:
    """One pixel of padding, as it was filled."""
    dcm = dv.DualPerspectiveCrop((2, 2), remainder="pad", pad_value=value)  # type: ignore[arg-type]
    return dcm(torch.zeros(1, 2, 1, dtype=dtype)).local[0, 0, 0, 1]


@given(st.sampled_from(DTYPES), st.integers(-70_000, 70_000) | st.floats(allow_nan=False, allow_infinity=False))
def test_padding_is_the_number_that_was_asked_for_or_none(dtype: torch.dtype, value: float) -> None:
    limits = (0, 1) if dtype == torch.bool else None
    if limits is None:
        info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        limits = info.min, info.max
    if not limits[0] <= value <= limits[1] or (not dtype.is_floating_point and value != int(value)):
        with refuses(f"pad_value={value!r}", str(dtype), "cannot hold"):
            padded(dtype, value)
        return
    filled = padded(dtype, value)
    assert filled.dtype == dtype
    assert filled.isfinite()
    if not dtype.is_floating_point:
        assert filled.item() == value
    else:
        torch.testing.assert_close(filled, torch.tensor(value, dtype=torch.float64).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "dtype"), [(300, torch.uint8), (-1, torch.uint8), (0.48, torch.uint8), (2, torch.bool)]
)
def test_no_value_wraps_around_or_is_cut_off(value: float, dtype: torch.dtype) -> None:
    with refuses(f"pad_value={value}", str(dtype), "the same scale as the pixels"):
        padded(dtype, value)
    with refuses(f"pad_value=(0, {value})"):
        dv.DualPerspectiveCrop((4, 4), remainder="pad", pad_value=(0, value))(torch.zeros(2, 3, 3, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (0.0, float("nan")), "black", None, 1j, [None]])
def test_what_is_no_finite_number_is_refused_at_construction(value: object) -> None:
    with refuses(f"pad_value={value!r}", "finite number", "one for each channel"):
        dv.DualPerspectiveCrop((4, 4), remainder="pad", pad_value=value)  # type: ignore[arg-type]


def test_numbers_of_other_libraries() -> None:
    for value in (np.uint8(7), np.float32(7), Fraction(7), np.array(7), torch.tensor(7), torch.tensor(7.0)):
        assert padded(torch.uint8, value) == 7
    for values in (np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), [1, Fraction(2), np.int64(3)]):
        dcm = dv.DualPerspectiveCrop((2, 2), remainder="pad", pad_value=values)
        assert dcm(torch.zeros(3, 1, 2)).local[0, :, 1, 0].tolist() == [1, 2, 3]
