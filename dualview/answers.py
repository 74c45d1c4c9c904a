"""What models answer about pictures, beside the truth where it is known: as one drawing, and as one HTML file."""

from __future__ import annotations

import html
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from dualview.canvas import resize
from dualview.geometry import GridLike, TileGrid
from dualview.images import ImageError, to_image
from dualview.outputs import check_file, replace_file
from dualview.terminal import printable
from dualview.visualize import draw_tiles

if TYPE_CHECKING:
    from PIL import Image, ImageFont

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2028; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse } .small img { width: 336px; image-rendering: pixelated }
th { text-align: left; color: #606773; font-weight: normal } th, td { padding: .3rem 1.2rem .3rem 0 }
td { vertical-align: top; white-space: pre-wrap } .wrong { color: #b3261e }
"""
_INK, _FAINT, _WRONG, _PAPER = (28, 32, 40), (96, 103, 115), (179, 38, 30), (255, 255, 255)
_MARGIN, _LINE, _TITLE, _TEXT = 40, 34, 30, 20


LONGEST = 28
"""Characters of an answer that a drawing or a terminal shows."""


class Asked(NamedTuple):
    """A question about a picture.

    Attributes:
        question: What was asked.
        answers: What was answered, by the name of the view.
        truth: The right answer, where it is known.
    """

    question: str
    answers: Mapping[str, str]
    truth: str | None = None


class Shown(NamedTuple):
    """A picture, and what was asked about it.

    Attributes:
        title: One line.
        picture: Values of 0 to 255, (3, H, W).
        canvas: The same as the model cuts it into tiles, (3, h, w), multiples of the grid.
        grid: Rows and columns of tiles.
        asked: Questions, all answered by the same views.
    """

    title: str
    picture: Tensor
    canvas: Tensor
    grid: GridLike
    asked: Sequence[Asked]


def reduced(picture: Tensor, grid: GridLike) -> Tensor:
    """The picture at the size of one tile: what a model without tiles would see. (3, H, W) -> (3, H/rows, W/cols)

    Args:
        picture: Of a height and a width that are multiples of the grid.
        grid: Rows and columns of tiles.
    """
    return resize(picture, TileGrid.of(grid).tile_size((picture.shape[1], picture.shape[2])))


def table(asked: Sequence[Asked], longest: int | None = None) -> list[list[str]]:
    """Questions and answers in rows, under a row of headings; answers that are not the truth are called wrong.

    Args:
        asked: Questions, all answered by the same views, and all with their truth or all without.
        longest: Most characters of a question or an answer, of which then one line is left; None for all.
    """

    def cell(text: str) -> str:
        line = " ".join(printable(text).split())
        return text if longest is None else line if len(line) <= longest else f"{line[: longest - 3]}..."

    rows = [["question", *["truth"] * (asked[0].truth is not None), *asked[0].answers]]
    for one in asked:
        truth = [] if one.truth is None else [one.truth]
        marks = ["" if one.truth in (None, answer) else " (wrong)" for answer in one.answers.values()]
        given = [cell(answer or "(no answer)") + mark for answer, mark in zip(one.answers.values(), marks, strict=True)]
        rows.append([cell(one.question), *truth, *given])
    return rows


def draw_answers(shown: Sequence[Shown]) -> Image.Image:
    """One drawing of everything: each picture, its answers, what is left of it at the size of one tile, its tiles."""
    from PIL import Image

    parts = [_drawn(one) for one in shown]
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), _PAPER)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _drawn(shown: Shown) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    fonts: dict[int, ImageFont.FreeTypeFont] = {size: ImageFont.load_default(size) for size in (_TITLE, _TEXT)}  # type: ignore[misc]
    picture, tiles = to_image(shown.picture), _tiles(shown)
    small = to_image(reduced(shown.canvas, shown.grid))
    enlarged = small.resize((3 * small.width, 3 * small.height), Image.Resampling.NEAREST)
    rows = table(shown.asked, LONGEST)
    widths = [24 + max(fonts[_TEXT].getlength(row[i]) for row in rows) for i in range(len(rows[0]))]
    left, top = 2 * _MARGIN + picture.width, _MARGIN + 50
    right = left + max(round(sum(widths)), enlarged.width) + _MARGIN
    below = top + _LINE * (len(rows) + 1)
    bottom = max(top + picture.height, below + 40 + enlarged.height)
    whole = Image.new("RGB", (max(right, tiles.width), bottom + tiles.height), _PAPER)
    pen = ImageDraw.Draw(whole)
    pen.text((_MARGIN, _MARGIN), shown.title, _INK, fonts[_TITLE], anchor="ls")
    whole.paste(picture, (_MARGIN, top))
    for number, row in enumerate(rows):
        x = float(left)
        for cell, width in zip(row, widths, strict=True):
            colour = _FAINT if number == 0 else _WRONG if cell.endswith("(wrong)") else _INK
            pen.text((x, top + _LINE * number), cell, colour, fonts[_TEXT])
            x += width
    pen.text((left, below), _size_of(small), _FAINT, fonts[_TEXT])
    whole.paste(enlarged, (left, below + 40))
    whole.paste(tiles, (0, bottom))
    return whole


def _tiles(shown: Shown) -> Image.Image:
    """The drawing of the tiles, without what is magnified in it."""
    drawn = draw_tiles(shown.canvas, shown.grid)
    bottom = max(box[3] for box in (drawn.photo, *drawn.local, *drawn.stride))
    return drawn.picture.crop((0, 0, drawn.picture.width, bottom + _MARGIN))


def check_report(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        ImageError: It does not end in .html, or its folder cannot be written to.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ImageError(f"{path}: the extension {Path(path).suffix!r} is not .html: a report is one HTML file.")
    check_file(path)


def write_report(path: str | os.PathLike[str], title: str, shown: Sequence[Shown]) -> None:
    """One HTML file with everything, pictures included; it reads nothing else. A file of that name is replaced whole.

    Args:
        path: Where the file goes.
        title: One line.
        shown: Pictures, and what was asked about them.

    Raises:
        ImageError: The file cannot be written.
    """
    check_report(path)
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>{''.join(map(_section, shown))}</body></html>\n"
    )
    try:
        replace_file(Path(path).resolve(), memoryview(text.encode()))
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}.") from error


def _section(shown: Shown) -> str:
    (*head,), *rows = table(shown.asked)
    headings = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    answers = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    small = to_image(reduced(shown.canvas, shown.grid))
    return (
        f"<h2>{html.escape(shown.title)}</h2><table><tr>{headings}</tr>{answers}</table>"
        f"<p>{_embedded(to_image(shown.picture))}</p>"
        f'<p class="small">{_embedded(small)}<br>{_size_of(small)}</p>{_embedded(_tiles(shown))}'
    )


def _cell(text: str) -> str:
    wrong = ' class="wrong"' * text.endswith("(wrong)")
    return f"<td{wrong}>{html.escape(text)}</td>"


def _size_of(small: Image.Image) -> str:
    return f"what is left of it at the size of one tile: {small.height} x {small.width} pixels"


def _embedded(image: Image.Image) -> str:
    held = BytesIO()
    image.save(held, "PNG")
    return f'<img alt="" src="data:image/png;base64,{b64encode(held.getvalue()).decode()}">'
