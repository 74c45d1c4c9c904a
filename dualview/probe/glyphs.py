"""Real glyphs: fonts that matplotlib ships and scikit-learn's handwritten digits, split into training and test.

Outlines become pixels here, not in FreeType, so that a page is the same with every version of the libraries.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Point: TypeAlias = tuple[float, float]
Split: TypeAlias = Literal["train", "test"]

DIGITS = "0123456789"
LETTERS = "ACEFHKLNPRTX"  # none that looks like a digit or like another
NAMES = DIGITS + LETTERS
"""What a glyph can be; its class is its index here."""

FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
        *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmtt10"),
    ),
    "test": ("DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10"),
}
"""Files of matplotlib: DejaVu (Bitstream Vera licence), STIX (OFL 1.1), Computer Modern (public domain)."""

HANDWRITTEN: dict[Split, range] = {"train": range(900, 1350), "test": range(1350, 1797)}
"""Which of the 1,797 handwritten digits (Optical Recognition of Handwritten Digits, UCI, CC BY 4.0)."""

HEIGHT = 96
"""Rows of the drawn outlines; glyphs of a page are resized from these."""


@cache
def glyphs_of(split: Split) -> tuple[tuple[tuple[Array, ...], ...], ...]:
    """For each class its printed and, for digits, its handwritten glyphs: uint8 coverage of any height and width.

    Example:
        >>> test = glyphs_of("test")
        >>> len(test), len(test[0]), len(test[-1]), len(test[-1][0]) == len(FONTS["test"])
        (22, 2, 1, True)
    """
    written: list[list[Array]] = [[] for _ in NAMES]
    for label, image in _handwriting(split):
        written[label].append(image)
    printed = [tuple(_outlined(font, name) for font in FONTS[split]) for name in NAMES]
    return tuple(
        tuple(kind for kind in (one, tuple(other)) if kind) for one, other in zip(printed, written, strict=True)
    )


def resize(image: Array, height: int, width: int) -> Array:
    """An image (H, W) or (H, W, C) of another size, by the mean of the area that a pixel covers, rounded to uint8."""
    rows, cols = _overlaps(image.shape[0], height), _overlaps(image.shape[1], width)
    planes = image.astype(np.float64).reshape(*image.shape[:2], -1).transpose(2, 0, 1)
    out = (rows @ planes @ cols.T).transpose(1, 2, 0).reshape(height, width, *image.shape[2:])
    return np.floor(out + (0.5 - 1e-6)).astype(np.uint8)  # never a tie, so that rounding is the same everywhere


@cache
def _overlaps(of: int, to: int) -> Array:
    """Share of each of ``of`` cells in each of ``to`` cells of the same line; rows sum to 1."""
    edges = np.arange(to + 1) * (of / to)
    cells = np.arange(of)
    shared = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    shared = shared.clip(0)
    whole: Array = shared / shared.sum(1, keepdims=True)
    return whole


def _outlined(font: str, name: str) -> Array:
    polygons = _polygons(font, name)
    points = np.concatenate(polygons)
    low, high = points.min(0), points.max(0)
    scale = HEIGHT / (high[1] - low[1])
    flipped = [(polygon - (low[0], high[1])) * (scale, -scale) for polygon in polygons]
    return _filled(flipped, max(1, int(np.ceil((high[0] - low[0]) * scale))))


@cache
def _font(name: str) -> Any:
    from fontTools.ttLib import TTFont

    font, log = TTFont(shipped("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf")), logging.getLogger("fontTools")
    level = log.level
    log.setLevel(logging.ERROR)  # of dates before 1970
    font.ensureDecompiled()
    log.setLevel(level)
    return font


def _polygons(font: str, name: str) -> list[Array]:
    """Closed outlines in the font's own integer units, curves as eight lines; first point and last are the same."""
    from fontTools.pens.recordingPen import DecomposingRecordingPen

    file = _font(font)
    glyphs = file.getGlyphSet()
    names = next(table.cmap for table in file["cmap"].tables if ord(name) in table.cmap)
    pen = DecomposingRecordingPen(glyphs)
    glyphs[names[ord(name)]].draw(pen)
    polygons: list[list[Any]] = []
    for operation, points in pen.value:
        if operation == "moveTo":
            polygons.append([points[0]])
        elif operation == "lineTo":
            polygons[-1].append(points[0])
        elif operation == "qCurveTo":  # between two control points there is one of the curve, halfway
            *controls, end = points
            ends = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in pairwise(controls)] + [end]
            for control, stop in zip(controls, ends, strict=True):
                polygons[-1] += _curve(polygons[-1][-1], control, stop)
        elif operation == "closePath":
            polygons[-1].append(polygons[-1][0])
    return [np.array(polygon, np.float64) for polygon in polygons]


def _curve(start: Point, control: Point, stop: Point) -> list[Point]:
    """Eight points of a quadratic curve after its start."""
    weights = [((8 - i) ** 2 / 64, i * (8 - i) / 32, i * i / 64) for i in range(1, 9)]
    (y, x), (v, u), (q, p) = start, control, stop
    return [(a * y + b * v + c * q, a * x + b * u + c * p) for a, b, c in weights]


def _filled(polygons: list[Array], width: int, lines: int = 2) -> Array:
    """Coverage of closed outlines, where inner ones run against outer ones: ``lines`` scan lines for each row."""
    start = np.concatenate([polygon[:-1] for polygon in polygons])
    end = np.concatenate([polygon[1:] for polygon in polygons])
    y = (np.arange(HEIGHT * lines)[:, None] + 0.5) / lines
    line, edge = np.nonzero((start[:, 1] <= y) != (end[:, 1] <= y))  # where an edge crosses a scan line
    (x, low), (to_x, high) = start[edge].T, end[edge].T
    x = x + (y[line, 0] - low) * (to_x - x) / (high - low)
    right_of_it = (np.arange(width) + 1 - x[:, None]).clip(0, 1)
    covered = np.zeros((HEIGHT * lines, width))
    np.add.at(covered, line, right_of_it * np.sign(high - low)[:, None])
    covered = np.abs(covered).clip(0, 1).reshape(HEIGHT, lines, width).mean(1)
    drawn: Array = np.floor(covered * 255 + (0.5 - 1e-6)).clip(0, 255).astype(np.uint8)
    return drawn


def _handwriting(split: Split) -> list[tuple[int, Array]]:
    """Labels and images of handwritten digits, from the 8 x 8 pixels that scikit-learn ships."""
    found = []
    for row in _digits()[HANDWRITTEN[split].start : HANDWRITTEN[split].stop]:
        image = row[:-1].reshape(8, 8) * (255 / 16)
        rows, cols = (np.flatnonzero(image.max(axis) > 40) for axis in (1, 0))
        image = np.pad(image[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1], 1)
        image = _stretched(_stretched(image, 6).T, 6).T[3:-3, 3:-3]
        found.append((int(row[-1]), (image * 1.4).clip(0, 255).astype(np.uint8)))
    return found


@cache
def _digits() -> Array:
    return np.loadtxt(shipped("sklearn", "datasets/data/digits.csv.gz"), delimiter=",")


def shipped(package: str, file: str) -> Path:
    """A file that a package ships, without importing the package.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f'the probe needs {package}, which is not installed: pip install -e ".[probe]" in your clone.', name=package
        )
    return Path(spec.origin).parent / file


def _stretched(image: Array, factor: int) -> Array:
    """Rows interpolated linearly, ``factor`` times as many."""
    places = ((np.arange(len(image) * factor) + 0.5) / factor - 0.5).clip(0, len(image) - 1)
    low = np.floor(places).astype(int).clip(max=max(len(image) - 2, 0))
    share = (places - low)[:, None]
    mixed: Array = image[low] * (1 - share) + image[np.minimum(low + 1, len(image) - 1)] * share
    return mixed
