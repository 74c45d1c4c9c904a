"""Processors that deliver larger images at the token count that a host expects."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from dualview.geometry import GridLike, TileGrid

Processor = TypeVar("Processor")


class _Adapted:
    """What a processor or image processor made from another does in its own way. It is saved as the other one."""

    _original: Any
    _grid: TileGrid

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


@dataclass(frozen=True)
class Recipe:
    """How the processor of a family is adapted.

    Attributes:
        image_processors: Classes of image processors that it was tested with.
        images: What the image processor does in its own way.
        counts: What the processor does in its own way.
        patch_size: Whether the processor counts tokens by its ``patch_size``, which then grows, too.
        any_grid: Whether rows and columns may differ: images are brought to a fixed size whatever their shape.
    """

    image_processors: tuple[str, ...]
    images: type[_Adapted] = _Adapted
    counts: type[_Adapted] = _Adapted
    patch_size: bool = False
    any_grid: bool = False


RECIPES: dict[str, Recipe] = {
    "Gemma3Processor": Recipe(("Gemma3ImageProcessor",), any_grid=True),
    "InternVLProcessor": Recipe(("GotOcr2ImageProcessor",), _TilesAsBefore, any_grid=True),
    "LlavaNextProcessor": Recipe(("LlavaNextImageProcessor",), _ChoosesAsBefore, _CountsAsBefore),
    "LlavaOnevisionProcessor": Recipe(("LlavaOnevisionImageProcessor",), _ChoosesAsBefore, _CountsAsBefore),
    "LlavaProcessor": Recipe(("CLIPImageProcessor", "SiglipImageProcessor"), patch_size=True),
    "PaliGemmaProcessor": Recipe(("SiglipImageProcessor",), any_grid=True),
}
"""By the name of the processor's class."""


def adapt_processor(processor: Processor, grid: GridLike = (2, 2)) -> Processor:
    """A processor whose images are ``grid`` times larger, at as many tokens as before.

    For models attached with ``source="hires"``: their towers see the images reduced to the size that they were trained
    for, and the views are cut from the large ones.

    Args:
        processor: Of LLaVA, LLaVA-NeXT, LLaVA-OneVision, PaliGemma, InternVL or Gemma 3. It stays as it is.
        grid: Rows and columns of tiles, as for [`attach`][dualview.attach]. LLaVA and its successors keep the shape of
            pictures, so that rows and columns must be equal there.

    Returns:
        A processor of the same kind, for images; videos are not enlarged. What its ``save_pretrained`` writes is the
        processor as it was: adapt it again after loading.

    Raises:
        ValueError: The processor has not been tested, is adapted already, or the grid does not suit it.

    Example:
        >>> adapt_processor(object())
        Traceback (most recent call last):
        ValueError: object has not been tested with source="hires". Tested are Gemma3Processor, InternVLProcessor, \
LlavaNextProcessor, LlavaOnevisionProcessor, LlavaProcessor, PaliGemmaProcessor. Attach with source="upsample", which \
needs no other processor.
    """
    grid, name = TileGrid.of(grid), type(processor).__name__
    if isinstance(processor, _Adapted):
        raise ValueError(
            f"this {name} is adapted to a grid of {processor._grid} already: adapt the one it was made of."
        )
    recipe, images = RECIPES.get(name), getattr(processor, "image_processor", None)
    kind = type(images).__name__
    if recipe is None or kind.removesuffix("Pil").removesuffix("Fast") not in recipe.image_processors:
        what = name if recipe is None else f"{name} with {kind}"
        raise ValueError(
            f'{what} has not been tested with source="hires". Tested are {", ".join(RECIPES)}. Attach with '
            'source="upsample", which needs no other processor.'
        )
    if grid.rows != grid.cols and not recipe.any_grid:
        raise ValueError(
            f"grid={grid}: {name} keeps the shape of pictures, so rows and columns must be equal: use "
            f"{(grid.rows,) * 2}."
        )
    adapted = _made_from(processor, recipe.counts, grid)
    larger = _made_from(images, recipe.images, grid)
    for size in ("size", "crop_size"):
        if (found := getattr(larger, size, None)) is not None:
            setattr(larger, size, _times(found, grid))
    cast(Any, adapted).image_processor = larger
    if recipe.patch_size:
        cast(Any, adapted).patch_size = cast(Any, processor).patch_size * grid.rows
    return adapted


def _made_from(original: Processor, mixin: type[_Adapted], grid: TileGrid) -> Processor:
    """A shallow copy of another class, which transformers takes for the original's."""
    kind = type(original)
    made = copy.copy(original)
    made.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "__reduce__": _again})
    made._original, made._grid = original, grid  # type: ignore[attr-defined]
    return made


def _again(self: _Adapted) -> Any:
    """Pickled as the original and the grid: its class has no name to be found by."""
    if hasattr(self, "image_processor"):
        return adapt_processor, (self._original, tuple(self._grid))
    raise TypeError("pickle the adapted processor, not its image processor.")


def _times(size: Any, grid: TileGrid) -> Any:
    """A size of images, enlarged."""
    factors = {"height": grid.rows, "width": grid.cols, "shortest_edge": grid.rows, "longest_edge": grid.rows}
    given = dict(size)
    if unknown := set(given) - set(factors):
        raise ValueError(f"the image processor has a size of {given}: what {sorted(unknown)} would be is not known.")
    return type(size)(**{name: value * factors[name] for name, value in given.items()})
