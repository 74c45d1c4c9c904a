"""Processors that deliver larger images at the token count that a host expects, or images of whole tiles."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from dualview.arguments import check_choice
from dualview.geometry import GridLike, TileGrid

Processor = TypeVar("Processor")


class _Adapted:
    """What a processor or image processor made from another does in its own way. It is saved as the other one."""

    _original: Any
    _grid: TileGrid
    _source: str

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.save_pretrained(*args, **kwargs)


class _ChoosesAsBefore(_Adapted):
    """LLaVA-NeXT and LLaVA-OneVision: the resolution of an image is chosen among the host's, and then enlarged."""

    def _get_image_patches(self, image: Any, grid_pinpoints: Any, *args: Any, **kwargs: Any) -> Any:
        enlarged = self._enlarged(image, grid_pinpoints)
        return super()._get_image_patches(image, enlarged, *args, **kwargs)  # type: ignore[misc]

    def get_image_patches(self, image: Any, grid_pinpoints: Any, *args: Any, **kwargs: Any) -> Any:
        """The same in the processors that work with Pillow."""
        enlarged = self._enlarged(image, grid_pinpoints)
        return super().get_image_patches(image, enlarged, *args, **kwargs)  # type: ignore[misc]

    def _enlarged(self, image: Any, grid_pinpoints: Any) -> list[list[int]]:
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(tuple(image.shape[-2:]), grid_pinpoints)
        return [[height * self._grid.rows, width * self._grid.cols]]


class _CountsAsBefore(_Adapted):
    """LLaVA-NeXT and LLaVA-OneVision: tokens are counted by the size that the tower sees."""

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        reduced = self._grid.tile_size((height, width))
        return cast(int, super()._get_number_of_features(orig_height, orig_width, *reduced))  # type: ignore[misc]


class _TilesAsBefore(_Adapted):
    """InternVL: as many tiles of an image as before, which depends on their size."""

    def crop_image_to_patches(self, images: Any, min_patches: int, max_patches: int, *args: Any, **kwargs: Any) -> Any:
        """Tiles of an image, and a thumbnail where they are several."""
        limits = {"min_patches": min_patches, "max_patches": max_patches, "crop_to_patches": True}
        count = self._original.get_number_of_image_patches(*images.shape[-2:], limits)
        tiles = max(count - 1, 1)  # without the thumbnail
        return super().crop_image_to_patches(images, tiles, tiles, *args, **kwargs)  # type: ignore[misc]

    def get_number_of_image_patches(self, *args: Any, **kwargs: Any) -> int:
        """As many as before."""
        return cast(int, self._original.get_number_of_image_patches(*args, **kwargs))


class _BehindEach(_Adapted):
    """Qwen-VL and GLM-V: the patches of each image, and behind them those of the same image, ``grid`` times larger."""

    def _preprocess(self, images: Any, *args: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
        import torch
        from transformers.image_processing_backends import TorchvisionBackend
        from transformers.image_utils import SizeDict

        def made(images: Any, **options: Any) -> Any:
            return super(_BehindEach, self)._preprocess(images, *args, return_tensors="pt", **options)  # type: ignore[misc]

        stock = made(images, **kwargs)
        grids, enlarged = stock["image_grid_thw"][:, 1:].tolist(), []
        for image, grid in zip(images, grids, strict=True):
            height, width = (n * side * kwargs["patch_size"] for n, side in zip(self._grid, grid, strict=True))
            size = SizeDict(height=height, width=width)
            enlarged.append(TorchvisionBackend.resize(cast(Any, self), image, size, kwargs["resample"]))
        large = made(enlarged, **kwargs | {"do_resize": False})
        counts = [rows * cols for rows, cols in grids]
        pieces = zip(
            stock["pixel_values"].split(counts),
            large["pixel_values"].split([count * self._grid.num_tiles for count in counts]),
            strict=True,
        )
        behind_each = torch.cat([part for both in pieces for part in both])
        return type(stock)(data={**stock, "pixel_values": behind_each}, tensor_type=return_tensors)


class _InWholeTiles(_Adapted):
    """Qwen-VL and GLM-V: sides of images are multiples of n tokens, for n x n tiles."""

    def resize(self, images: Any, size: Any, resample: Any, factor: int, **kwargs: Any) -> Any:
        """As before, with larger steps."""
        return super().resize(images, size, resample, factor * self._grid.rows, **kwargs)  # type: ignore[misc]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: Any = None) -> int:
        """Of an image of that size."""
        merge = {"merge_size": cast(Any, self).merge_size * self._grid.rows}
        counted = super().get_number_of_image_patches(height, width, {**(images_kwargs or {}), **merge})  # type: ignore[misc]
        return cast(int, counted)


@dataclass(frozen=True)
class Recipe:
    """How the processor of a family is adapted.

    Attributes:
        image_processors: Classes of image processors that it was tested with.
        images: What the image processor does in its own way.
        counts: What the processor does in its own way.
        patch_size: Whether the processor counts tokens by its ``patch_size``, which then grows, too.
        any_grid: Whether rows and columns may differ: images are brought to a fixed size whatever their shape.
        larger: Whether the image processor's sizes grow.
        pillow: Whether it was tested with the image processor that works with Pillow, too.
    """

    image_processors: tuple[str, ...]
    images: type[_Adapted] = _Adapted
    counts: type[_Adapted] = _Adapted
    patch_size: bool = False
    any_grid: bool = False
    larger: bool = True
    pillow: bool = True


_HIRES = {
    "Gemma3Processor": Recipe(("Gemma3ImageProcessor",), any_grid=True),
    "InternVLProcessor": Recipe(("GotOcr2ImageProcessor",), _TilesAsBefore, any_grid=True),
    "LlavaNextProcessor": Recipe(("LlavaNextImageProcessor",), _ChoosesAsBefore, _CountsAsBefore),
    "LlavaOnevisionProcessor": Recipe(("LlavaOnevisionImageProcessor",), _ChoosesAsBefore, _CountsAsBefore),
    "LlavaProcessor": Recipe(("CLIPImageProcessor", "SiglipImageProcessor"), patch_size=True),
    "PaliGemmaProcessor": Recipe(("SiglipImageProcessor",), any_grid=True),
}
PACKED = {
    "Glm4vProcessor": "Glm4vImageProcessor",
    "Qwen2VLProcessor": "Qwen2VLImageProcessor",
    "Qwen2_5_VLProcessor": "Qwen2VLImageProcessor",
    "Qwen3VLProcessor": "Qwen2VLImageProcessor",
}
RECIPES: dict[str, dict[str, Recipe]] = {
    "hires": _HIRES
    | {name: Recipe((of,), _BehindEach, any_grid=True, larger=False, pillow=False) for name, of in PACKED.items()},
    "native": {name: Recipe((of,), _InWholeTiles, larger=False, pillow=False) for name, of in PACKED.items()},
}
"""By the source of pixels, and the name of the processor's class."""


def adapt_processor(
    processor: Processor, grid: GridLike = (2, 2), source: Literal["hires", "native"] = "hires"
) -> Processor:
    """A processor for a model that is attached with ``source="hires"`` or ``source="native"``.

    For "hires" it delivers images ``grid`` times larger, at as many tokens as before: the tower sees them reduced to
    the size that they had, and the views are cut from the large ones. For "native" it rounds the sides of images to
    whole tiles.

    Args:
        processor: Of LLaVA, LLaVA-NeXT, LLaVA-OneVision, PaliGemma, InternVL or Gemma 3 ("hires"), or of Qwen2-VL,
            Qwen2.5-VL, Qwen3-VL or GLM-4V (both). It stays as it is.
        grid: Rows and columns of tiles, as for [`attach`][dualview.attach]. Where the processor keeps the shape of
            pictures (LLaVA and its successors, and all with "native"), rows and columns must be equal.
        source: As for [`attach`][dualview.attach].

    Returns:
        A processor of the same kind, for images; videos are not enlarged. What its ``save_pretrained`` writes is the
        processor as it was: adapt it again after loading.

    Raises:
        ValueError: The processor has not been tested, is adapted already, or the grid does not suit it.

    Example:
        >>> adapt_processor(object())
        Traceback (most recent call last):
        ValueError: object has not been tested with source="hires". Tested are Gemma3Processor, InternVLProcessor, \
LlavaNextProcessor, LlavaOnevisionProcessor, LlavaProcessor, PaliGemmaProcessor, Glm4vProcessor, Qwen2VLProcessor, \
Qwen2_5_VLProcessor, Qwen3VLProcessor. Attach with source="upsample", which needs no other processor.
    """
    grid, name = TileGrid.of(grid), type(processor).__name__
    check_choice(source, "source", tuple(RECIPES))
    if isinstance(processor, _Adapted):
        raise ValueError(
            f"this {name} is adapted to a grid of {processor._grid} already: adapt the one it was made of."
        )
    recipe, images = RECIPES[source].get(name), getattr(processor, "image_processor", None)
    kind = type(images).__name__
    with_pillow = kind.removesuffix("Pil").removesuffix("Fast") if recipe is not None and recipe.pillow else kind
    if recipe is None or with_pillow not in recipe.image_processors:
        what = name if recipe is None else f"{name} with {kind}"
        raise ValueError(
            f'{what} has not been tested with source="{source}". Tested are {", ".join(RECIPES[source])}. Attach with '
            'source="upsample", which needs no other processor.'
        )
    if grid.rows != grid.cols and not recipe.any_grid:
        raise ValueError(
            f"grid={grid}: {name} keeps the shape of pictures, so rows and columns must be equal: use "
            f"{(grid.rows,) * 2}."
        )
    adapted = _made_from(processor, recipe.counts, grid, source)
    larger = _made_from(images, recipe.images, grid, source)
    for size in ("size", "crop_size") if recipe.larger else ():
        if (found := getattr(larger, size, None)) is not None:
            setattr(larger, size, _times(found, grid))
    cast(Any, adapted).image_processor = larger
    if recipe.patch_size:
        cast(Any, adapted).patch_size = cast(Any, processor).patch_size * grid.rows
    return adapted


def _made_from(original: Processor, mixin: type[_Adapted], grid: TileGrid, source: str) -> Processor:
    """A shallow copy of another class, which transformers takes for the original's."""
    kind = type(original)
    made = copy.copy(original)
    made.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "__reduce__": _again})
    made._original, made._grid, made._source = original, grid, source  # type: ignore[attr-defined]
    return made


def _again(self: _Adapted) -> Any:
    """Pickled as the original and the grid: its class has no name to be found by."""
    if hasattr(self, "image_processor"):
        return adapt_processor, (self._original, tuple(self._grid), self._source)
    raise TypeError("pickle the adapted processor, not its image processor.")


def _times(size: Any, grid: TileGrid) -> Any:
    """A size of images, enlarged."""
    factors = {"height": grid.rows, "width": grid.cols, "shortest_edge": grid.rows, "longest_edge": grid.rows}
    given = dict(size)
    if unknown := set(given) - set(factors):
        raise ValueError(f"the image processor has a size of {given}: what {sorted(unknown)} would be is not known.")
    return type(size)(**{name: value * factors[name] for name, value in given.items()})
