"""What is no tensor, what has its channels last and what is a tile size are refused with the remedy."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dualview as dv

GRID = (2, 2)
NUMBERS = {"mean": [0.5] * 3, "std": [0.25] * 3}
DEM = dv.DualPerspectiveEnhance.paper(8, num_heads=2)
CALLS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "local_crop": ("x", lambda x: dv.local_crop(x, GRID)),
    "global_stride_crop": ("x", lambda x: dv.global_stride_crop(x, GRID)),
    "LocalCrop": ("x", dv.LocalCrop(GRID)),
    "recombine": ("tiles", lambda x: dv.recombine(x, GRID, "local")),
    "SubfeatureRecombine": ("tiles", dv.SubfeatureRecombine(GRID, "global")),
    "normalized_crop": ("images", lambda x: dv.normalized_crop(x, GRID, **NUMBERS)),
    "low_pass": ("x", lambda x: dv.low_pass(x, GRID)),
    "read_out": ("x", lambda x: dv.read_out(x, GRID, "average")),
    "DualPerspectiveCrop": ("images", dv.DualPerspectiveCrop((4, 4))),
    "DualPerspectiveCrop of a list": ("images[1]", lambda x: dv.DualPerspectiveCrop((4, 4))([torch.rand(3, 4, 4), x])),
    "TileBatch.collate": ("tiles[0]", lambda x: dv.TileBatch.collate([x], [GRID])),
    "DualPerspectiveEnhance": ("stride_tiles", lambda x: DEM(torch.rand(1, 4, 2, 2, 8), x, GRID)),
    "DirectReadout": ("local_tiles", lambda x: dv.DirectReadout()(x, torch.rand(1, 4, 2, 2, 8), GRID)),
    "tile_attention": ("key", lambda x: dv.tile_attention(torch.rand(1, 1, 4, 8), x, x, num_heads=2)),
    "DualViewEncoder": ("pixels", dv.DualViewEncoder(lambda tiles: tiles, DEM, tile=(4, 4), grid=GRID)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        (np.zeros((8, 8, 3), np.uint8), "torch.from_numpy(x)"),
        ("photo.jpg", "dualview.load_image(x)"),
        (3.5, "torch.as_tensor(x)"),
        (None, "torch.as_tensor(x)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_tensor_is_named_with_its_conversion(call: str, wrong: object, remedy: str) -> None:
    name, function = CALLS[call]
    with pytest.raises(TypeError) as refused:
        function(wrong)
    message = str(refused.value)
    assert message.startswith(f"{name} must be a torch.Tensor, not "), message
    assert type(wrong).__name__ in message
    assert remedy in message


def test_any_sequence_of_tensors_is_a_list_of_images() -> None:
    images = [torch.rand(3, 4, 8), torch.rand(3, 8, 4)]
    tiles = dv.DualPerspectiveCrop((4, 4))(deque(images))
    assert torch.equal(tiles.local.data, dv.DualPerspectiveCrop((4, 4))(images).local.data)


def test_a_pillow_image_is_sent_to_load_image() -> None:
    pillow = pytest.importorskip("PIL.Image")
    with pytest.raises(TypeError, match=r"PIL\.Image\.Image\. To convert it: dualview\.load_image\(x\)"):
        dv.local_crop(pillow.new("RGB", (8, 8)), GRID)  # type: ignore[arg-type]


def test_a_list_of_tensors_is_sent_to_stack() -> None:
    with pytest.raises(TypeError, match=r"not list\. To convert it: torch\.stack\(x\)"):
        dv.local_crop([torch.rand(3, 4, 4)], GRID)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 2))
def test_one_image_with_its_channels_last_is_refused_where_they_should_come_first(
    first: int, height: int, width: int, cols: int
) -> None:
    x = torch.rand(first, height, width * cols)

    def cut(image: Tensor) -> Tensor:
        return dv.local_crop(image, (1, cols))

    if first > 16 and width * cols in (3, 4):
        with pytest.raises(ValueError, match="its channels seem to come last"):
            cut(x)
        x = x[None]  # the remedy for maps that are meant
    assert torch.equal(cut(x), torch.stack(x.split(width, dim=-1), dim=-4))


def test_a_tile_size_given_as_the_grid_is_recognised() -> None:
    image = torch.rand(3, 64, 64)
    with pytest.raises(ValueError, match="was a tile size meant") as refused:
        dv.local_crop(image, (64, 64))
    assert "64 x 64" in str(refused.value)
    assert dv.local_crop(image, (32, 64)).shape == (2048, 3, 2, 1)  # small tiles, but no single cells
    assert dv.local_crop(image[:, :32, :32], (32, 32)).shape == (1024, 3, 1, 1)  # as many as may be


def test_the_name_of_the_crop_is_corrected_to_that_of_the_perspective() -> None:
    with pytest.raises(ValueError, match=r"'stride'.*\"global\" \(interleaved strides\)"):
        dv.recombine(torch.rand(4, 3, 2, 2), GRID, "stride")  # type: ignore[call-overload]
