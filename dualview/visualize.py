"""Pictures of the two perspectives: which part of an image each tile holds."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from dualview.geometry import GridLike, Perspective, Size, TileGrid
from dualview.images import ImageSource, load_image, to_image
from dualview.ops.tiling import crop, recombine

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom, as Pillow counts: the right and the bottom edge are outside."""
Colour: TypeAlias = tuple[int, int, int]

MOST_TILES = 32
"""Most rows or columns that a picture shows; more could not be told apart."""

_PANEL = 460  # longer side of the photograph, in pixels of the picture
_ZOOM = 336  # longer side of the magnified part
_MARGIN, _GAP, _FRAME = 40, 8, 4
_GUTTER = 100  # between columns; the numbers of the rows stand in it
_TITLE, _TEXT, _SMALL = 30, 20, 17
_INK, _FAINT, _PAPER, _MARK = (28, 32, 40), (96, 103, 115), (255, 255, 255), (255, 214, 10)


class TilePicture(NamedTuple):
    """A drawn picture, and where in it things are.

    Attributes:
        picture: RGB.
        photo: The photograph under its grid.
        local: One box per local tile, in tile order.
        stride: One box per stride tile, in tile order.
        window: The part of the photograph that is magnified, in its own pixels.
        local_zoom: That part, each pixel in the colour of the local tile that it goes to.
        stride_zoom: That part, each pixel in the colour of the stride tile that it goes to.
    """

    picture: Image.Image
    photo: Box
    local: list[Box]
    stride: list[Box]
    window: Box
    local_zoom: Box
    stride_zoom: Box


def check_drawable(grid: TileGrid) -> None:
    """Refuse a grid of more tiles than a picture shows."""
    if max(grid) > MOST_TILES:
        raise ValueError(f"a grid of {grid} cannot be drawn readably: at most {MOST_TILES} rows and {MOST_TILES} cols.")


def draw_tiles(image: ImageSource, grid: GridLike) -> TilePicture:
    """The image under its grid, its local and its stride tiles, and a magnified part that shows which pixel goes where.

    An image smaller than its panel is enlarged by a whole factor without interpolation, so every pixel stays visible.

    Args:
        image: Whatever [`load_image`][dualview.load_image] takes, of a height and a width that are multiples of the
            grid ([`fit_to_grid`][dualview.canvas.fit_to_grid] makes them so).
        grid: Rows and columns of tiles, at most 32 of each.

    Raises:
        ValueError: The image is no multiple of the grid, or the grid has too many tiles to be drawn.
    """
    from PIL import Image, ImageDraw

    grid = TileGrid.of(grid)
    check_drawable(grid)
    pixels = load_image(image)
    photograph = to_image(pixels)
    size = (photograph.height, photograph.width)
    h, w = grid.tile_size(size)
    shown = _shown_tile((h, w), grid)
    photo_size = grid.map_size(shown)
    spread = _spread(grid, shown)
    window = _window(size, grid)
    cell = _ZOOM // max(window[2] - window[0], window[3] - window[1])
    zoom = (cell * (window[3] - window[1]), cell * (window[2] - window[0]))
    titles = _headings(grid, (h, w), window, size)
    lefts, right = [], _MARGIN - _GUTTER
    for heading, panel in zip(titles, (photo_size, spread, spread), strict=True):
        lefts.append(right + _GUTTER)
        right = lefts[-1] + max(panel[1], zoom[1], heading.width())
    top = _MARGIN + 150
    zoom_top = top + max(spread[0], photo_size[0]) + 80
    picture = Image.new("RGB", (right + _MARGIN, zoom_top + zoom[0] + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(picture)
    for left, heading in zip(lefts, titles, strict=True):
        heading.draw(pen, left, zoom_top)

    photo = _paste(picture, photograph, (lefts[0], top + _FRAME), photo_size)
    _draw_grid(pen, photo, grid)
    _draw_window(pen, photo, window, size)
    pen.rectangle([lefts[0] - 5, zoom_top - 5, lefts[0] + zoom[1] + 4, zoom_top + zoom[0] + 4], fill=_MARK)
    _draw_zoom(picture, photograph, window, (lefts[0], zoom_top), cell)

    boxes: list[list[Box]] = []
    zooms: list[Box] = []
    perspectives: tuple[Perspective, Perspective] = ("local", "global")
    for left, perspective in zip(lefts[1:], perspectives, strict=True):
        tiles = [to_image(tile) for tile in crop(pixels, grid, perspective)]
        boxes.append(_draw_tile_grid(picture, pen, tiles, grid, (left, top), shown))
        zooms.append(_draw_zoom(picture, _colour_map(grid, (h, w), perspective), window, (left, zoom_top), cell))
    return TilePicture(picture, photo, boxes[0], boxes[1], window, zooms[0], zooms[1])


class _Heading(NamedTuple):
    """The words of one column."""

    title: str
    lines: tuple[str, str]
    zoom: str

    def width(self) -> int:
        texts = ((self.title, _TITLE), *((text, _TEXT) for text in (*self.lines, self.zoom)))
        return round(max(_font(size).getlength(text) for text, size in texts))

    def draw(self, pen: ImageDraw.ImageDraw, left: int, zoom_top: int) -> None:
        pen.text((left, _MARGIN), self.title, _INK, _font(_TITLE))
        for i, line in enumerate(self.lines):
            pen.text((left, _MARGIN + 46 + 27 * i), line, _FAINT, _font(_TEXT))
        pen.text((left, zoom_top - 16), self.zoom, _INK, _font(_TEXT), anchor="lb")


def _headings(grid: TileGrid, tile: Size, window: Box, size: Size) -> tuple[_Heading, _Heading, _Heading]:
    (rows, cols), (h, w) = grid, tile
    return (
        _Heading(
            "Image",
            (f"{size[0]} x {size[1]} pixels (height x width),", f"grid of {rows} x {cols} tiles (rows x cols)"),
            f"the marked {window[3] - window[1]} x {window[2] - window[0]} pixels, magnified",
        ),
        _Heading(
            "Local tiles",
            (f"{grid.num_tiles} blocks of {h} x {w} neighbouring pixels:", "each a part of the image, in full detail"),
            f"pixel (y, x) is in tile (y // {h}, x // {w})",
        ),
        _Heading(
            "Stride tiles (global)",
            (
                f"{grid.num_tiles} samplings of {h} x {w} pixels, steps of {rows} x {cols}:",
                "each the whole image, coarser",
            ),
            f"pixel (y, x) is in tile (y mod {rows}, x mod {cols})",
        ),
    )


def tile_colour(row: int, col: int, grid: TileGrid) -> Colour:
    """The colour of a tile: hues go round with the tile's index, neighbours differ in lightness too."""
    hue = (row * grid.cols + col) / grid.num_tiles
    red, green, blue = colorsys.hls_to_rgb(hue, 0.45 if (row + col) % 2 else 0.66, 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def _colour_map(grid: TileGrid, tile: Size, perspective: Perspective) -> Image.Image:
    """An image of the size of the photograph: each pixel in the colour of the tile that it goes to."""
    colours = torch.tensor([tile_colour(*divmod(i, grid.cols), grid) for i in range(grid.num_tiles)], dtype=torch.uint8)
    flat: Tensor = colours[:, :, None, None].expand(-1, -1, *tile)
    return to_image(recombine(flat, grid, perspective))


def _shown_tile(tile: Size, grid: TileGrid) -> Size:
    """Size of a tile in the picture: the largest that fits, a whole multiple where tiles are enlarged."""
    scale = _PANEL / max(grid.map_size(tile))
    if scale >= 1:
        return tile[0] * int(scale), tile[1] * int(scale)
    return max(_GAP, round(tile[0] * scale)), max(_GAP, round(tile[1] * scale))


def _spread(grid: TileGrid, shown: Size) -> Size:
    """Height and width of all tiles with frames and gaps."""
    step = 2 * _FRAME + _GAP
    return grid.rows * (shown[0] + step) - _GAP, grid.cols * (shown[1] + step) - _GAP


def _window(size: Size, grid: TileGrid) -> Box:
    """A square of some periods of the strides, where four tiles meet, as near to the middle of the image as one is."""
    side = min(max(12, 4 * max(grid)), 2 * MOST_TILES)

    def span(length: int, tiles: int) -> tuple[int, int]:
        centre = (tiles // 2) * (length // tiles) or length // 2
        start = min(max(0, centre - side // 2), max(0, length - side))
        return start, min(length, start + side)

    (top, bottom), (left, right) = span(size[0], grid.rows), span(size[1], grid.cols)
    return left, top, right, bottom


def _paste(picture: Image.Image, image: Image.Image, at: tuple[int, int], size: Size) -> Box:
    from PIL import Image

    enlarged = size[0] >= image.height and size[1] >= image.width
    how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    picture.paste(image.resize((size[1], size[0]), how), at)
    return at[0], at[1], at[0] + size[1], at[1] + size[0]


def _draw_grid(pen: ImageDraw.ImageDraw, photo: Box, grid: TileGrid) -> None:
    left, top, right, bottom = photo
    dense = (right - left) // grid.cols < 40 or (bottom - top) // grid.rows < 40
    for width, colour in ((1, _PAPER),) if dense else ((5, _INK), (3, _PAPER)):
        for row in range(1, grid.rows):
            y = top + row * (bottom - top) // grid.rows
            pen.line((left, y, right - 1, y), colour, width)
        for col in range(1, grid.cols):
            x = left + col * (right - left) // grid.cols
            pen.line((x, top, x, bottom - 1), colour, width)


def _draw_window(pen: ImageDraw.ImageDraw, photo: Box, window: Box, size: Size) -> None:
    scale_x, scale_y = (photo[2] - photo[0]) / size[1], (photo[3] - photo[1]) / size[0]
    box = (
        photo[0] + window[0] * scale_x - 3,
        photo[1] + window[1] * scale_y - 3,
        photo[0] + window[2] * scale_x + 3,
        photo[1] + window[3] * scale_y + 3,
    )
    pen.rectangle(box, outline=_INK, width=6)
    pen.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=_MARK, width=4)


def _draw_tile_grid(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    tiles: list[Image.Image],
    grid: TileGrid,
    at: tuple[int, int],
    shown: Size,
) -> list[Box]:
    """Tiles in frames of their colours, rows and columns numbered."""
    boxes = []
    step = 2 * _FRAME + _GAP
    for index, tile in enumerate(tiles):
        row, col = divmod(index, grid.cols)
        left, top = at[0] + _FRAME + col * (shown[1] + step), at[1] + _FRAME + row * (shown[0] + step)
        frame = (left - _FRAME, top - _FRAME, left + shown[1] + _FRAME - 1, top + shown[0] + _FRAME - 1)
        pen.rectangle(frame, fill=tile_colour(row, col, grid))
        boxes.append(_paste(picture, tile, (left, top), shown))
        if row == 0 and _labelled(col, shown[1] + step, 50):
            pen.text((left + shown[1] // 2, frame[1] - 5), f"col {col}", _FAINT, _font(_SMALL), anchor="mb")
        if col == 0 and _labelled(row, shown[0] + step, 20):
            pen.text((frame[0] - 6, top + shown[0] // 2), f"row {row}", _FAINT, _font(_SMALL), anchor="rm")
    return boxes


def _labelled(index: int, step: int, room: int) -> bool:
    return index % -(-room // step) == 0


def _draw_zoom(picture: Image.Image, image: Image.Image, window: Box, at: tuple[int, int], cell: int) -> Box:
    from PIL import ImageDraw

    part = image.crop(window)
    box = _paste(picture, part, at, (part.height * cell, part.width * cell))
    pen = ImageDraw.Draw(picture)
    for x in range(box[0], box[2] + 1, cell):
        pen.line((x, box[1], x, box[3]), _PAPER)
    for y in range(box[1], box[3] + 1, cell):
        pen.line((box[0], y, box[2], y), _PAPER)
    return box


def _font(size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return cast("ImageFont.FreeTypeFont", ImageFont.load_default(size))
