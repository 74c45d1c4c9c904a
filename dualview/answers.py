"""What a model answers with its tiles, and from the picture at the size of one tile, as one HTML file."""

from __future__ import annotations

import html
import os
from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dualview.canvas import resize
from dualview.geometry import GridLike, TileGrid
from dualview.images import ImageError, to_image
from dualview.outputs import check_file, replace_file
from dualview.visualize import draw_tiles

if TYPE_CHECKING:
    from PIL import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2028; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse } dt { color: #606773 }
dd { margin: 0 0 .6rem; white-space: pre-wrap } td { padding: .3rem .8rem .3rem 0; vertical-align: top }
"""


def reduced(picture: Tensor, grid: GridLike) -> Tensor:
    """The picture at the size of one tile: what a model without tiles would see. (3, H, W) -> (3, H/rows, W/cols)

    Args:
        picture: Of a height and a width that are multiples of the grid.
        grid: Rows and columns of tiles.
    """
    return resize(picture, TileGrid.of(grid).tile_size((picture.shape[1], picture.shape[2])))


def check_report(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        ImageError: It does not end in .html, or its folder cannot be written to.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ImageError(f"{path}: the extension {Path(path).suffix!r} is not .html: a report is one HTML file.")
    check_file(path)


def write_report(
    path: str | os.PathLike[str],
    title: str,
    picture: Tensor,
    grid: GridLike,
    question: str,
    answers: Mapping[str, str],
) -> None:
    """One HTML file with everything, pictures included; it reads nothing else. A file of that name is replaced whole.

    Args:
        path: Where the file goes.
        title: One line.
        picture: Values of 0 to 255, (3, H, W), multiples of the grid.
        grid: Rows and columns of tiles that the model cuts it into.
        question: What was asked.
        answers: What was answered, by the name of the view.

    Raises:
        ImageError: The file cannot be written.
    """
    check_report(path)
    given = "".join(f"<dt>{html.escape(view)}</dt><dd>{html.escape(answer)}</dd>" for view, answer in answers.items())
    small = reduced(picture, grid)
    views = "".join(
        f"<td>{_embedded(to_image(pixels))}<br>{name}, {pixels.shape[1]} x {pixels.shape[2]} pixels</td>"
        for name, pixels in (("in full", picture), ("at the size of one tile", small))
    )
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{html.escape(question)}</h1><dl>{given}</dl><h2>{html.escape(title)}</h2><table><tr>{views}</tr></table>"
        f"<h2>Its tiles</h2>{_embedded(draw_tiles(picture, grid).picture)}</body></html>\n"
    )
    try:
        replace_file(Path(path).resolve(), memoryview(text.encode()))
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}.") from error


def _embedded(image: Image.Image) -> str:
    held = BytesIO()
    image.save(held, "PNG")
    return f'<img alt="" src="data:image/png;base64,{b64encode(held.getvalue()).decode()}">'
