"""Patches in blocks and in rows, against the image processors that make them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
from transformers.models.glm4v.image_processing_glm4v import Glm4vImageProcessor
from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

from dualview.models.adapter.patches import from_blocks, from_rows, to_blocks, to_rows

sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, sizes, sizes, sizes)
def test_blocks_there_and_back(steps, rows, cols, merge, patch, channels):
    frames = torch.randn(steps, channels, rows * merge * patch, cols * merge * patch)
    patches = to_blocks(frames, patch, merge)
    assert patches.shape == (steps * rows * cols * merge**2, channels * patch**2)
    assert torch.equal(from_blocks(patches, (steps, rows * merge, cols * merge), patch, merge), frames)


@given(sizes, sizes, sizes, sizes)
def test_rows_there_and_back(rows, cols, patch, channels):
    picture = torch.randn(channels, rows * patch, cols * patch)
    assert torch.equal(from_rows(to_rows(picture, patch), (rows, cols), patch), picture)


def picture(height: int, width: int) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("processor", [Qwen2VLImageProcessor, Glm4vImageProcessor])
def test_pictures_of_processors_with_blocks(processor):
    make = processor(do_resize=False, do_normalize=False, do_rescale=False)
    images = [picture(56, 84), picture(112, 28)]
    found = make(images=images, return_tensors="pt")
    pieces = found["pixel_values"].split(found["image_grid_thw"].prod(-1).tolist())
    for image, patches, grid in zip(images, pieces, found["image_grid_thw"].tolist(), strict=True):
        frames = from_blocks(patches, tuple(grid), patch=14, merge=2)
        twice = image.repeat_interleave(2, 0)[None].to(frames.dtype)  # a picture counts as two equal frames
        assert torch.equal(frames, twice)
        assert torch.equal(to_blocks(frames, patch=14, merge=2), patches)


@pytest.mark.parametrize(("processor", "patch"), [(Qwen2VLVideoProcessor, 14), (Qwen3VLVideoProcessor, 16)])
def test_videos_of_processors_with_blocks(processor, patch):
    make = processor(do_resize=False, do_normalize=False, do_rescale=False, do_sample_frames=False)
    video = torch.randint(256, (4, 3, 2 * patch, 4 * patch), dtype=torch.uint8)
    found = make(videos=[video], return_tensors="pt")
    (grid,) = found["video_grid_thw"].tolist()
    frames = from_blocks(found["pixel_values_videos"], tuple(grid), patch=patch, merge=2)
    in_pairs = video.unflatten(0, (2, 2)).transpose(1, 2).flatten(1, 2)  # (steps, colours x frames, H, W)
    assert torch.equal(frames, in_pairs.to(frames.dtype))


def test_pictures_of_processors_with_rows():
    image = picture(128, 512)  # of as many patches as the processors want, so that they do not resize it
    plain = {"do_normalize": False, "do_rescale": False}
    siglip2 = Siglip2ImageProcessor(do_resize=False, **plain)(images=[image], return_tensors="pt")
    lfm2 = Lfm2VlImageProcessor(do_resize=False, do_image_splitting=False, **plain)(images=[image], return_tensors="pt")
    for found in (siglip2, lfm2):
        (rows, cols), patches = found["spatial_shapes"][0].tolist(), found["pixel_values"][0]
        assert torch.equal(from_rows(patches[: rows * cols], (rows, cols), 16), image.to(patches.dtype))
    image = picture(96, 48)
    gemma4 = Gemma4ImageProcessor(do_resize=False, **plain)(images=[image], return_tensors="pt")
    cols, rows = (gemma4["image_position_ids"][0].amax(0) + 1).tolist()
    assert (rows, cols) == (6, 3)
    assert torch.equal(from_rows(gemma4["pixel_values"][0][:18], (6, 3), 16), image.to(gemma4["pixel_values"].dtype))
