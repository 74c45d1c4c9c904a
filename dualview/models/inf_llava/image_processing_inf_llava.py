"""Pictures to the pixels that INF-LLaVA takes."""

from __future__ import annotations

import binascii
import os
from base64 import b64decode
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from dualview.arguments import check_count, check_mapping, check_numbers, check_size, shown
from dualview.canvas import centred, fitted_size, middle_part, place
from dualview.geometry import Size, choose_grid
from dualview.images import ImageError, load_image
from dualview.interpolation import upright
from dualview.models.inf_llava.input_checks import check_options, plain_size
from dualview.ops.tiling import local_crop
from dualview.pixels import from_array, from_tensor


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
    """Fit to a square, pad with the mean colour, normalise, as the released model was trained in its second stage.

    The default size is 1008 pixels, three tiles of 336 a side. The released inference code leaves CLIP's 336 and lets
    the model enlarge the picture, which loses its detail: ``InfLlavaImageProcessor(size=336)`` reproduces that. The
    first training stage did not pad but cut out the centre: ``do_pad=False``. Where the released code pads to a square
    and then scales it, here scaling comes first, so that memory does not grow with the aspect ratio; the pixels next to
    the padding differ slightly.

    With ``max_tiles`` every image gets a grid of its own, chosen by [`choose_grid`][dualview.choose_grid]: it is scaled
    to fit the grid with its aspect ratio kept, and the rest of the canvas, at the bottom and the right, is filled with
    the mean colour. The result then holds the local tiles of all images, ``image_grids`` and ``image_sizes``.

    Pictures are whatever [`load_image`][dualview.load_image] takes, and addresses and base64 as everywhere in
    transformers. They become RGB. Floating-point pixels lie in 0..1 and stand for the bytes 0..255 that
    ``rescale_factor`` scales: they give what the same picture in uint8 gives.

    Args:
        **kwargs: Any argument of an image processor of transformers (``size``, ``crop_size``, ``do_pad``,
            ``image_mean``, ...), and ``max_tiles`` and ``tile_size`` (336 by default). All may be given in a call,
            too. Without ``crop_size`` the square that is cut out has the ``size``.

    Shape:
        - pixel_values: (num_images, 3, 1008, 1008); with ``max_tiles`` (total_tiles, 3, 336, 336)
        - image_grids, with ``max_tiles``: (num_images, 2), rows and columns
        - image_sizes, with ``max_tiles``: (num_images, 2), height and width of the picture on its canvas

    Raises:
        ImageError: A picture is refused by [`load_image`][dualview.load_image].
        ValueError: There is no picture; ``image_mean`` or ``image_std`` is not one number or three; the mean colour is
            none that bytes can have; or ``size``, ``crop_size``, ``do_pad`` or ``do_resize`` is given beside
            ``max_tiles``, which decides all of them.

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

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["pixel_values", "image_grids", "image_sizes"] if self.max_tiles is not None else ["pixel_values"]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """How many rows of ``pixel_values`` a picture of a size gives.

        Args:
            height: Of the picture in pixels.
            width: Likewise.
            images_kwargs: Arguments of the call, where they differ from those of the processor.
        """
        height, width = check_count(height, "height"), check_count(width, "width")
        more = {} if images_kwargs is None else check_mapping(images_kwargs, "images_kwargs")
        given = {"max_tiles": self.max_tiles, "tile_size": self.tile_size, **more}
        if given["max_tiles"] is None:
            return 1
        tile = self._standardize_kwargs(tile_size=given["tile_size"])["tile_size"]
        return choose_grid((height, width), (tile["height"], tile["width"]), given["max_tiles"]).num_tiles

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths, addresses and base64 to tensors; what is a picture already stays as it is."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(each) for each in source]
        if isinstance(source, str):
            return load_image(_file_of(source))
        # transformers knows neither of the two
        unknown = isinstance(source, os.PathLike) or getattr(source, "ndim", None) == 2
        return load_image(source) if unknown else source

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """One picture as an RGB tensor, uint8 or floating point in 0..1."""
        last = None if input_data_format is None else ChannelDimension(input_data_format) == ChannelDimension.LAST
        if isinstance(image, Tensor):
            pixels = from_tensor(image, channels_last=last)
        elif isinstance(image, np.ndarray):
            pixels = from_array(image, channels_last=last)
        else:
            pixels = load_image(image)
        return pixels if device is None else pixels.to(device)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        check_options(kwargs)
        tile = kwargs.get("tile_size")
        if tile is not None:
            pair: Any = (tile.get("height"), tile.get("width")) if isinstance(tile, dict) else tile
            kwargs["tile_size"] = dict(zip(("height", "width"), check_size(pair, "tile_size"), strict=True))
        for name in ("size", "crop_size"):
            kwargs[name] = plain_size(kwargs.get(name), name)
        for name in ("image_mean", "image_std"):
            kwargs[name] = _per_channel(kwargs.get(name), name)
        standard: dict[str, Any] = super()._standardize_kwargs(**kwargs)
        return standard

    def _validate_preprocess_kwargs(
        self, *, size: SizeDict | None = None, crop_size: SizeDict | None = None, **kwargs: Any
    ) -> None:
        # transformers asks for a crop_size wherever there is a crop; here it follows the size of each call.
        try:
            super()._validate_preprocess_kwargs(size=size, crop_size=crop_size or size, **kwargs)
        except ValueError as error:
            given = ", ".join(f"{name}={kwargs.get(name)}" for name in ("image_mean", "image_std", "rescale_factor"))
            raise ValueError(f"size={size}, crop_size={crop_size}, {given}: {error}") from None
        if kwargs.get("max_tiles") is None:
            return
        usual = self._standardize_kwargs(size=type(self).size, default_to_square=self.default_to_square)["size"]
        ignored = {"size": size} if size != usual else {}
        ignored |= {"crop_size": crop_size} if crop_size is not None else {}
        ignored |= {name: False for name in ("do_pad", "do_resize") if not kwargs.get(name)}
        if ignored or kwargs.get("tile_size") is None:
            given = ", ".join(f"{name}={value}" for name, value in (ignored or {"tile_size": None}).items())
            raise ValueError(
                f"{given} beside max_tiles={kwargs['max_tiles']}: with max_tiles every picture is scaled and padded to "
                "a grid of its own, of tiles of tile_size. Leave it out, or give max_tiles=None."
            )

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
        image_mean: tuple[float, ...] | None,
        image_std: tuple[float, ...] | None,
        do_pad: bool,
        return_tensors: Any = None,
        max_tiles: int | None = None,
        tile_size: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("images=[]: give at least one picture.")

        def padded(image: Tensor, canvas: Size, corner: tuple[int, int]) -> Tensor:
            return place(image, canvas, corner, _colour(image, image_mean, rescale_factor if do_rescale else None))

        def normalise(image: Tensor) -> Tensor:
            factor = rescale_factor * (255 if image.is_floating_point() else 1)
            pixels: Tensor = self.rescale_and_normalize(image, do_rescale, factor, do_normalize, image_mean, image_std)
            return pixels

        if max_tiles is not None and tile_size is not None:
            tile = (tile_size["height"], tile_size["width"])
            grids = [choose_grid(_size(image), tile, max_tiles) for image in images]
            fitted = [
                self._scaled(image, fitted_size(_size(image), grid.map_size(tile)), resample)
                for image, grid in zip(images, grids, strict=True)
            ]
            tiles = [
                local_crop(normalise(padded(image, grid.map_size(tile), (0, 0))), grid)
                for image, grid in zip(fitted, grids, strict=True)
            ]
            data = {
                "pixel_values": torch.cat(tiles),
                "image_grids": torch.tensor([tuple(grid) for grid in grids]),
                "image_sizes": torch.tensor([_size(image) for image in fitted]),
            }
            return BatchFeature(data=data, tensor_type=return_tensors)

        cut = crop_size or SizeDict(height=size.height or size.shortest_edge, width=size.width or size.shortest_edge)
        crop = (cut.height, cut.width) if do_center_crop and cut.height and cut.width else None
        pixels = [
            normalise(padded(*self._fitted(image, size if do_resize else None, crop, do_pad, resample)))
            for image in images
        ]
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)

    def _fitted(
        self, image: Tensor, size: SizeDict | None, crop: Size | None, pad: bool, resample: Any
    ) -> tuple[Tensor, Size, tuple[int, int]]:
        """The picture at its final scale, the canvas it is shown on, and where on that its top left corner lies."""
        before = _size(image)
        square = (max(before), max(before)) if pad else before
        shown = square if size is None else self._target(square, size)
        if not pad and crop and size is not None and set(dict(size)) == {"shortest_edge"}:
            part = middle_part(before, size.shortest_edge, crop)
            if part is not None:
                (axis, start, length), corner = part
                image = image.narrow(1 + axis, start, length)
                scaled = self._target(_size(image), size)
                return self._scaled(image, scaled, resample), crop, corner
        after = tuple(max(1, round(side * new / old)) for side, new, old in zip(before, shown, square, strict=True))
        image = self._scaled(image, (after[0], after[1]), resample)
        top, left = centred(_size(image), shown)
        if crop is not None:
            top, left = (a + b for a, b in zip((top, left), centred(shown, crop), strict=True))
        return image, crop or shown, (top, left)

    def _target(self, before: Size, size: SizeDict) -> Size:
        """The size that ``resize`` gives, asked of a picture without contents."""
        return _size(self.resize(torch.empty(3, *before, device="meta"), size, PILImageResampling.BILINEAR))

    def _scaled(self, image: Tensor, size: Size, resample: Any) -> Tensor:
        if _size(image) == size:
            return image

        def resizing(pixels: Tensor, to: Size) -> Tensor:
            scaled: Tensor = self.resize(pixels, SizeDict(height=to[0], width=to[1]), resample)
            return scaled

        resized = upright(resizing, image, size)
        return resized.clamp(0, 1) if image.is_floating_point() else resized


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _file_of(source: str) -> str | BytesIO:
    """What [`load_image`][dualview.load_image] opens: a path, or the bytes of an address or of base64."""
    if source.startswith(("http://", "https://", "data:")):
        try:
            with urlopen(source, timeout=60) as answer:
                return BytesIO(answer.read())
        except (OSError, ValueError) as error:
            raise ImageError(f"{source[:100]} cannot be read: {error}.") from error
    if len(source) > 64 and not os.path.isfile(source):  # noqa: PTH113 - Path raises where a name is too long
        with suppress(binascii.Error):
            decoded = BytesIO(b64decode(source, validate=True))
            decoded.name = shown(source)
            return decoded
    return source


def _per_channel(value: Any, name: str) -> tuple[float, ...] | None:
    """Three numbers, of one or three."""
    if value is None:
        return None
    single = not isinstance(value, Iterable) or getattr(value, "shape", None) == ()
    try:
        return tuple(check_numbers([value] * 3 if single else value, name, 3, zero=name != "image_std"))
    except ValueError:
        rule = "one number or three, for red, green and blue" + ("; none may be 0" if name == "image_std" else "")
        raise ValueError(f"{name}={shown(value)}: give {rule}.") from None


def _colour(image: Tensor, mean: tuple[float, ...] | None, rescale_factor: float | None) -> list[float]:
    """The mean colour in the units of the pixels: nearly zero once they are normalised.

    Bytes are cut off, not rounded, as in the released code. Without a mean it is CLIP's.
    """
    white = 1 if image.is_floating_point() else 255
    values = mean or OPENAI_CLIP_MEAN
    if rescale_factor is not None:
        values = [value / (rescale_factor * 255) * white for value in values]
    elif max(values) <= 1:  # a share of white, and not the brightness itself
        values = [value * white for value in values]
    return [min(max(value, 0), white) for value in values]
