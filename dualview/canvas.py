"""Fit pictures to a size: scale, pad, cut. For the demo, the drawings and INF-LLaVA's processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from dualview.geometry import GridLike, Size, TileGrid
from dualview.images import MEAN_COLOUR, ImageSource, load_image

if TYPE_CHECKING:
    from torch import Tensor

Rest: TypeAlias = Literal["pad", "crop", "resize"]

LONG = 8
"""Pictures longer than this many times their breadth are cut before they are scaled up, where that is cut anyway."""


def fitted_size(size: Size, canvas: Size) -> Size:
    """Size of a picture at the largest scale at which it lies in the canvas, its aspect ratio kept, at least one pixel.

    Example:
        >>> fitted_size((10, 20), (60, 40)), fitted_size((1, 5000), (30, 30))
        ((20, 40), (1, 30))
    """
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (min(full, max(1, round(side * scale))) for side, full in zip(size, canvas, strict=True))
    return height, width


def centred(size: Size, canvas: Size) -> tuple[int, int]:
    """Where the top left corner lies of what stands in the middle of a canvas: negative where it is larger.

    Example:
        >>> centred((2, 9), (5, 4))
        (1, -2)
    """
    top, left = (int((full - side) / 2) for side, full in zip(size, canvas, strict=True))
    return top, left


def middle_part(size: Size, edge: int, crop: Size) -> tuple[tuple[int, int, int], tuple[int, int]] | None:
    """Of a long picture whose shorter side is scaled to ``edge``, the part that a crop of the middle shows.

    Scaling the part alone takes memory for what is shown, whatever the length. It is cut at multiples of the shorter
    side, which are whole pixels at either scale, so the result is that of scaling everything, but for the half pixel by
    which the scaled length is rounded.

    Args:
        size: The picture (height, width).
        edge: What the shorter side is scaled to.
        crop: What is cut out of the middle afterwards (height, width).

    Returns:
        The axis that is cut, where the part starts and how long it is; and where the scaled part's top left corner lies
        on the crop. None for pictures not longer than eight times their breadth, which are scaled as a whole.
    """
    short, long = sorted(size)
    axis = size.index(long)
    full = edge * long // short
    if long <= LONG * short or full <= crop[axis]:
        return None
    first = (full - crop[axis]) // 2
    reach = 3 * max(edge, short)  # of the interpolation, in units of 1 / edge of a pixel
    start = max(0, (first * short - reach) // (edge * short)) * short
    stop = min(long, -(-((first + crop[axis]) * short + reach) // (edge * short)) * short)
    corner = [0, 0]
    corner[axis] = start // short * edge - first
    corner[1 - axis] = int((crop[1 - axis] - edge) / 2)
    return (axis, start, stop - start), (corner[0], corner[1])


def place(image: Tensor, canvas: Size, corner: tuple[int, int], colour: Sequence[float]) -> Tensor:
    """The picture on a canvas of one colour, its top left corner at ``corner``; what lies outside is cut off.

    Shape:
        (C, H, W) -> (C, height, width) of the canvas; the picture itself where nothing is to be done
    """
    import torch

    (top, left), (height, width) = corner, image.shape[-2:]
    if (height, width) == canvas and (top, left) == (0, 0):
        return image
    visible = image[
        :, max(0, -top) : max(0, canvas[0] - top), max(0, -left) : max(0, canvas[1] - left)
    ]  # of the picture, what lies on the canvas
    if tuple(visible.shape[-2:]) == canvas:
        return visible
    whole = torch.empty((image.shape[0], *canvas), dtype=image.dtype, device=image.device)
    whole[:] = torch.tensor(colour, device=image.device).to(image.dtype)[:, None, None]
    top, left = max(0, top), max(0, left)
    whole[:, top : top + visible.shape[1], left : left + visible.shape[2]] = visible
    return whole


def resize(image: Tensor, size: Size) -> Tensor:
    """The picture at another size: bicubic and antialiased, as Pillow does it. (3, H, W) -> (3, h, w)"""
    from dualview.interpolation import bicubic

    resized = bicubic(image[None], size)[0]
    return resized.clamp(0, 1) if image.is_floating_point() else resized


def fit_canvas(image: ImageSource, size: Size) -> Tensor:
    """The whole picture, centred on a canvas of ``size`` = (height, width) at the largest scale that fits, padded.

    The padding has CLIP's mean colour.

    Raises:
        ImageError: [`load_image`][dualview.load_image] refuses the picture.
    """
    pixels = load_image(image)
    pixels = resize(pixels, fitted_size((pixels.shape[1], pixels.shape[2]), size))
    return place(pixels, size, centred((pixels.shape[1], pixels.shape[2]), size), _mean_colour(pixels))


def fit_to_grid(image: ImageSource, grid: GridLike, remainder: Rest = "pad") -> Tensor:
    """A picture whose height is a multiple of the grid's rows and whose width is one of its columns.

    Args:
        image: Whatever [`load_image`][dualview.load_image] takes.
        grid: Rows and columns of tiles.
        remainder: "pad" fills up at the bottom and the right with CLIP's mean colour, "crop" drops pixels there,
            "resize" interpolates to the nearest multiple.

    Raises:
        ValueError: The grid has more rows or columns than the image has pixels, or ``remainder`` is unknown.
    """
    pixels, grid = load_image(image), TileGrid.of(grid)
    size = (pixels.shape[1], pixels.shape[2])
    if size[0] < grid.rows or size[1] < grid.cols:
        raise ValueError(
            f"a grid of {grid} (rows x cols) is larger than the image of {size[0]} x {size[1]} pixels (height x "
            "width): every tile needs at least one pixel. Choose a smaller grid."
        )
    counts = (whole_units(side, count, remainder) for side, count in zip(size, grid, strict=True))
    height, width = (count * unit for count, unit in zip(grid, counts, strict=True))
    return _fit(pixels, (height, width), remainder)


def fit_to_tile(image: ImageSource, tile: Size, remainder: Rest = "pad") -> tuple[Tensor, TileGrid]:
    """The same for tiles of a given size (h, w) in pixels: the picture, and the grid that cuts it into such tiles.

    Raises:
        ValueError: "crop" is asked for, and not one tile fits; or ``remainder`` is unknown.
    """
    pixels = load_image(image)
    size = (pixels.shape[1], pixels.shape[2])
    if remainder == "crop":
        grid = TileGrid.for_image(size, tile)
    else:
        grid = TileGrid(*(max(1, whole_units(side, unit, remainder)) for side, unit in zip(size, tile, strict=True)))
    return _fit(pixels, grid.map_size(tile), remainder), grid


def whole_units(side: int, unit: int, remainder: Rest) -> int:
    """How many units a side is taken for: rounded up, down, or to the nearest.

    Raises:
        ValueError: ``remainder`` is unknown.

    Example:
        >>> [whole_units(7, 4, rest) for rest in ("pad", "crop", "resize")]
        [2, 1, 2]
    """
    match remainder:
        case "pad":
            return -(-side // unit)
        case "crop":
            return side // unit
        case "resize":
            return (2 * side + unit) // (2 * unit)
        case _:
            raise ValueError(f'remainder={remainder!r}: must be "pad", "crop" or "resize".')


def _fit(pixels: Tensor, size: Size, remainder: Rest) -> Tensor:
    return resize(pixels, size) if remainder == "resize" else place(pixels, size, (0, 0), _mean_colour(pixels))


def _mean_colour(pixels: Tensor) -> Sequence[float]:
    return [value / 255 for value in MEAN_COLOUR] if pixels.is_floating_point() else MEAN_COLOUR
