"""Normalised tiles are the tiles of the normalised image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dualview as dv
from dualview.geometry import LiveTiles
from dualview.ops.normalized_crop import normalized_crop
from tests.checks import refuses
from tests.strategies import batches, grids
from tests.strategies import tiles as tile_sizes

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@given(
    batches,
    grids,
    tile_sizes,
    st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_equals_normalising_and_cutting(batch, grid, tile, dtype, last, some, seed):
    torch.manual_seed(seed)
    images = torch.randint(256, (*batch, 3, grid[0] * tile[0], grid[1] * tile[1]))
    images = images.to(torch.uint8) if dtype == torch.uint8 else images.to(dtype) / 255
    values = images.double() / (255 if dtype == torch.uint8 else 1)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    normal = (values - mean) / std
    n = grid[0] * grid[1]
    live = LiveTiles(*(tuple(i for i in range(n) if torch.rand(()) < 0.5) for _ in range(2))) if some else None
    given_images = images.movedim(-3, -1) if last else images
    before = given_images.clone()
    made = normalized_crop(
        given_images, grid, mean=MEAN, std=STD, live=live, dtype=torch.float64,
        data_format="channels_last" if last else "channels_first",
    )  # fmt: skip
    assert torch.equal(given_images, before)
    for tiles, cut, wanted in zip(made, (dv.local_crop, dv.global_stride_crop), live or (None, None), strict=True):
        expected = cut(normal, grid)
        if wanted is not None:
            expected = expected[..., list(wanted), :, :, :]
        assert tiles.is_contiguous()
        torch.testing.assert_close(tiles, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_type_of_the_tiles(dtype):
    made = normalized_crop(torch.zeros(3, 4, 6, dtype=torch.uint8), (2, 3), mean=MEAN, std=STD, dtype=dtype)
    assert made.local.dtype == made.stride.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_rounds_once(dtype, grad):
    """Both ways of computing, in blocks and at once, round the exact value to the narrower type."""
    image = torch.rand(3, 40, 60, requires_grad=grad)
    exact = normalized_crop(image.detach(), (2, 3), mean=MEAN, std=STD, dtype=torch.float32)
    for made, value in zip(normalized_crop(image, (2, 3), mean=MEAN, std=STD, dtype=dtype), exact, strict=True):
        assert (made != value.to(dtype)).float().mean() < 1e-3


def test_gradient_of_a_floating_point_image():
    image = torch.rand(3, 4, 6, dtype=torch.float64, requires_grad=True)

    def tiles(x):
        return torch.cat(normalized_crop(x, (2, 3), mean=MEAN, std=STD, dtype=torch.float64))

    assert torch.autograd.gradcheck(tiles, image)


def test_refusals():
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    with refuses("mean=[0.5]", "3 channels", "one number per channel"):
        normalized_crop(image, (2, 3), mean=[0.5], std=STD)
    with refuses("std=[0.5]", "3 channels", "one number per channel"):
        normalized_crop(image, (2, 3), mean=MEAN, std=[0.5])
    with refuses("not 0"):
        normalized_crop(image, (2, 3), mean=MEAN, std=[1.0, 0.0, 1.0])
    with refuses("torch.int64", "uint8", error=TypeError):
        normalized_crop(image.long(), (2, 3), mean=MEAN, std=STD)
    with refuses("5 x 6", "multiple"):
        normalized_crop(torch.zeros(3, 5, 6), (2, 3), mean=MEAN, std=STD)
