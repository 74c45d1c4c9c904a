"""The filter before a stride crop."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

import dualview as dv
from tests import reference
from tests.checks import assert_compiles_once, fresh, refuses
from tests.strategies import batches, channels, data_formats, examples, grids, map_shape
from tests.strategies import tiles as tile_sizes


@given(batches, channels, grids, tile_sizes, data_formats)
@settings(max_examples=examples(15))
def test_equals_the_loops(
    batch: tuple[int, ...], channel: int, grid: tuple[int, int], tile: tuple[int, int], data_format: str
) -> None:
    x = torch.randn(map_shape(batch, channel, grid, tile, data_format), dtype=torch.float64)
    plane = (-2, -1) if data_format == "channels_first" else (-3, -2)
    expected = reference.low_pass(x.movedim(plane, (0, 1)), grid).movedim((0, 1), plane)
    smooth = dv.low_pass(x, grid, data_format=data_format)
    assert smooth.shape == x.shape
    assert smooth.is_contiguous()
    torch.testing.assert_close(smooth, expected, rtol=1e-12, atol=1e-12)


@given(grids, tile_sizes)
def test_constants_stay_and_no_tiles_mean_no_filter(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    constant = torch.full((2, 3, grid[0] * tile[0], grid[1] * tile[1]), 0.7, dtype=torch.float64)
    torch.testing.assert_close(dv.low_pass(constant, grid), constant)
    x = torch.randn_like(constant)
    assert torch.equal(dv.low_pass(x, (1, 1)), x)


@pytest.mark.parametrize("grid", [(1, 3), (3, 1), (3, 5)])
def test_is_the_antialiased_reduction(grid: tuple[int, int]) -> None:
    """Where the grid is odd, the centre stride tile of the smooth image is torch's antialiased bilinear thumbnail.

    Away from the border, where torch drops what lies outside and the filter repeats the edge.
    """
    x = torch.randn(1, 2, grid[0] * 6, grid[1] * 7, dtype=torch.float64)
    centre = dv.global_stride_crop(dv.low_pass(x, grid), grid)[:, grid[0] * grid[1] // 2]
    thumbnail = F.interpolate(x, (6, 7), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(centre[..., 1:-1, 1:-1], thumbnail[..., 1:-1, 1:-1])


def test_removes_what_would_alias() -> None:
    """A grating at half the sampling rate is a constant to every stride tile, but another one to each."""
    grating = torch.tensor([1.0, -1.0]).repeat(12).expand(1, 1, 6, 24)
    assert dv.global_stride_crop(grating, (1, 2)).abs().max() == 1
    assert dv.global_stride_crop(dv.low_pass(grating, (1, 2)), (1, 2))[..., 1:-1].abs().max() < 1e-6


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_does_not_alias_the_input_where_it_filters(data_format: str) -> None:
    x = torch.randn(2, 4, 6, 4)
    assert fresh(dv.low_pass(x, (2, 3), data_format=data_format), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 8, 9).to(dtype)
    smooth = dv.low_pass(x, (2, 3))
    assert smooth.dtype == dtype
    torch.testing.assert_close(smooth.double(), dv.low_pass(x.double(), (2, 3)), rtol=2e-2, atol=2e-2)


def test_gradcheck_and_compile() -> None:
    x = torch.randn(1, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: dv.low_pass(values, (2, 3), data_format="channels_last"), x)
    assert_compiles_once(
        lambda values: dv.low_pass(values, (2, 3)), lambda batch: (torch.arange(48.0 * batch).view(-1, 2, 4, 6),)
    )


def test_refuses() -> None:
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with refuses(str(dtype), "floating-point", "Convert it first", error=TypeError):
            dv.low_pass(torch.zeros(3, 4, 6, dtype=dtype), (2, 3))
    with refuses("(4, 6)", "channels_first", "(..., C, H, W)"):
        dv.low_pass(torch.zeros(4, 6), (2, 3))
    with refuses("grid=5"):
        dv.low_pass(torch.zeros(3, 4, 6), 5)
    with refuses("data_format='NHWC'"):
        dv.low_pass(torch.zeros(3, 4, 6), (2, 3), data_format="NHWC")
