"""Pictures to the pixels that INF-LLaVA takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from dualview.geometry import choose_grid
from dualview.ops.tiling import local_crop


class InfLlavaImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """Arguments beyond those of every image processor.

    max_tiles (`int`, *optional*):
        Most tiles per image; gives each image a grid of its own.
    tile_size (`dict`, *optional*):
        Size of a tile, with ``max_tiles``.
    """

    max_tiles: int | None
    tile_size: int | dict[str, int] | None


class InfLlavaImageProcessor(TorchvisionBackend):
    """Pad to a square with the mean colour, resize, normalise, as the released model was trained in its second stage.

    The default size is 1008 pixels, three tiles of 336 a side. The released inference code leaves CLIP's 336 and lets
    the model enlarge the picture, which loses its detail: ``InfLlavaImageProcessor(size=336)`` reproduces that. The
    first training stage did not pad but cut out the centre: ``do_pad=False``.

    With ``max_tiles`` every image gets a grid of its own, chosen by [`choose_grid`][dualview.choose_grid]: it is scaled
    to fit the grid with its aspect ratio kept, and the rest of the canvas, at the bottom and the right, is filled with
    the mean colour. The result then holds the local tiles of all images, ``image_grids`` and ``image_sizes``.

    Args:
        **kwargs: Any argument of an image processor of transformers (``size``, ``crop_size``, ``do_pad``,
            ``image_mean``, ...), and ``max_tiles`` and ``tile_size`` (336 by default). All may be given in a call,
            too. Without ``crop_size`` the square that is cut out has the ``size``.

    Shape:
        - pixel_values: (num_images, 3, 1008, 1008); with ``max_tiles`` (total_tiles, 3, 336, 336)
        - image_grids, with ``max_tiles``: (num_images, 2), rows and columns
        - image_sizes, with ``max_tiles``: (num_images, 2), height and width of the picture on its canvas

    Example:
        >>> picture = torch.randint(256, (3, 400, 600), dtype=torch.uint8)
        >>> InfLlavaImageProcessor()(picture, return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 1008, 1008])
        >>> InfLlavaImageProcessor(max_tiles=6)(picture, return_tensors="pt")["image_grids"]
        tensor([[2, 2]])
    """

    valid_kwargs = InfLlavaImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 1008}  # noqa: RUF012 - transformers' own form
    default_to_square = False
    tile_size = {"height": 336, "width": 336}  # noqa: RUF012
    max_tiles = None
    do_pad = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        tile = kwargs.get("tile_size")
        if isinstance(tile, int):
            kwargs["tile_size"] = {"height": tile, "width": tile}
        standard: dict[str, Any] = super()._standardize_kwargs(**kwargs)
        return standard

    def _validate_preprocess_kwargs(
        self, *, size: SizeDict | None = None, crop_size: SizeDict | None = None, **kwargs: Any
    ) -> None:
        # transformers asks for a crop_size wherever there is a crop; here it follows the size of each call.
        super()._validate_preprocess_kwargs(size=size, crop_size=crop_size or size, **kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        do_pad: bool,
        return_tensors: Any = None,
        max_tiles: int | None = None,
        tile_size: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        def normalise(image: Tensor) -> Tensor:
            pixels: Tensor = self.rescale_and_normalize(
                image, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            return pixels

        if max_tiles is not None and tile_size is not None:
            tile = (tile_size["height"], tile_size["width"])
            grids = [choose_grid((image.shape[-2], image.shape[-1]), tile, max_tiles) for image in images]
            fitted = [
                self._fit(image, grid.map_size(tile), resample) for image, grid in zip(images, grids, strict=True)
            ]
            tiles = [
                local_crop(normalise(_pad(image, grid.map_size(tile), (0, 0), image_mean)), grid)
                for image, grid in zip(fitted, grids, strict=True)
            ]
            data = {
                "pixel_values": torch.cat(tiles),
                "image_grids": torch.tensor([tuple(grid) for grid in grids]),
                "image_sizes": torch.tensor([tuple(image.shape[-2:]) for image in fitted]),
            }
            return BatchFeature(data=data, tensor_type=return_tensors)

        crop = crop_size or SizeDict(height=size.height or size.shortest_edge, width=size.width or size.shortest_edge)
        pixels = []
        for picture in images:
            image = picture
            if do_pad:
                side = max(image.shape[-2:])
                top, left = (side - image.shape[-2]) // 2, (side - image.shape[-1]) // 2
                image = _pad(image, (side, side), (top, left), image_mean)
            if do_resize:
                image = self.resize(image, size, resample)
            if do_center_crop:
                image = self.center_crop(image, crop)
            pixels.append(normalise(image))
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)

    def _fit(self, image: Tensor, canvas: tuple[int, int], resample: Any) -> Tensor:
        """The image scaled to fit the canvas, its aspect ratio kept."""
        height, width = image.shape[-2:]
        scale = min(canvas[0] / height, canvas[1] / width)
        scaled = tuple(
            min(full, max(1, round(side * scale))) for side, full in zip((height, width), canvas, strict=True)
        )
        resized: Tensor = self.resize(image, SizeDict(height=scaled[0], width=scaled[1]), resample)
        return resized


def _pad(image: Tensor, size: tuple[int, int], corner: tuple[int, int], mean: tuple[float, ...]) -> Tensor:
    """The image on a canvas of the mean colour, its top left corner at ``corner``."""
    (height, width), (top, left) = image.shape[-2:], corner
    if (height, width) == size:
        return image
    fill = list(mean) if image.is_floating_point() else [int(value * 255) for value in mean]
    padding = [left, top, size[1] - width - left, size[0] - height - top]
    padded: Tensor = tv.pad(image, padding, fill=fill)
    return padded
