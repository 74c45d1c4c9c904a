"""What stands where on a page, decided before anything is drawn.

A page has four quadrants: two hold small glyphs on a lattice of 42-pixel cells, one holds a large glyph, one four
gratings. All small glyphs of a page have the same height, the page's level of difficulty.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dualview.probe.glyphs import DIGITS, NAMES, Array

CELL = 42
"""Pixels of a cell: three tokens of 14."""
GRID = 3
"""Tiles along a side of a page."""
SIZES = (6, 8, 10, 14, 20, 28)
"""Heights of small glyphs in pixels."""
LARGE = (56, 84, 112, 140)
"""Heights of the large glyph on a page of 336 pixels."""
PERIODS = (3, 4, 5, 6, 8, 12)
"""Periods of gratings in pixels; a stride of 3 keeps those above 6."""
ANGLES = (0, 45, 90, 135)
"""Directions of gratings in degrees."""
MARKERS = ("red", "green", "blue", "yellow")
"""Colours of the rings that mark four of the small glyphs."""
GLYPHS = 32
"""Small glyphs of a page, whatever its size."""

_DIGIT_CLASSES = np.arange(len(DIGITS))


@dataclass
class Glyph:
    """A small glyph: its cell, its class, the pixel of its centre, and what is done to it."""

    row: int
    col: int
    name: int
    y: int
    x: int
    marker: int | None = None
    hidden: bool = False


@dataclass
class Grating:
    """A grating: its patch of the page's 4 x 4, its period in pixels and its direction's index in ANGLES."""

    row: int
    col: int
    period: int
    angle: int


@dataclass
class Scene:
    """All of a page.

    Attributes:
        pixels: Height and width of the page.
        size: Height of small glyphs.
        glyphs: The small glyphs.
        needles: Two classes of which the page has one glyph each.
        counted: A class of which the page has ``count``.
        count: How many, 0 to 5.
        absent: A class that the page has not.
        large: Class and height of the large glyph, and the quadrant that it is in.
        gratings: Four gratings.
        seed: Where the drawing goes on.
    """

    pixels: int
    size: int
    glyphs: list[Glyph]
    needles: tuple[int, int]
    counted: int
    count: int
    absent: int
    large: tuple[int, int, int]
    gratings: list[Grating]
    seed: int
    cells: int = field(init=False)

    def __post_init__(self) -> None:
        self.cells = self.pixels // CELL


def draw_scene(rng: np.random.Generator, size: int, pixels: int = 336) -> Scene:
    """A scene of small glyphs of a height, on a page of a number of pixels.

    Example:
        >>> scene = draw_scene(np.random.default_rng(0), 8)
        >>> len(scene.glyphs), scene.cells, sum(g.marker is not None for g in scene.glyphs)
        (32, 8, 4)
    """
    cells = pixels // CELL
    half = cells // 2
    quadrants = rng.permutation(4)
    places = [
        (row + half * (q // 2), col + half * (q % 2))
        for q in quadrants[:2]
        for row in range(half)
        for col in range(half)
    ]
    chosen = [places[i] for i in rng.permutation(len(places))[:GLYPHS]]
    needles, counted, absent = (int(c) for c in rng.permutation(len(NAMES))[:4]), 0, 0
    first, second, counted, absent = needles
    count = int(rng.integers(0, 6))
    names = [first, second, *[counted] * count]
    others = np.setdiff1d(np.arange(len(NAMES)), [first, second, counted, absent])
    digits = np.intersect1d(others, _DIGIT_CLASSES)
    letters = np.setdiff1d(others, digits)
    while len(names) < GLYPHS:
        names.append(int(rng.choice(digits if rng.random() < 0.5 else letters)))
    glyphs = [
        Glyph(row, col, name, _place(rng, row, size, pixels), _place(rng, col, size, pixels))
        for (row, col), name in zip(chosen, names, strict=True)
    ]
    kept = 2 + count
    if rng.random() < 0.5:
        for i in rng.integers(kept, GLYPHS, int(rng.integers(1, 4))):
            glyphs[i].hidden = True
    seen = [i for i in rng.permutation(GLYPHS) if not glyphs[i].hidden]
    for marker, i in enumerate(seen[: len(MARKERS)]):
        glyphs[i].marker = marker
    large = (int(rng.integers(len(NAMES))), int(rng.choice(LARGE)) * pixels // 336, int(quadrants[2]))
    top, left = 2 * (int(quadrants[3]) // 2), 2 * (int(quadrants[3]) % 2)
    gratings = [
        Grating(top + i // 2, left + i % 2, int(rng.choice(PERIODS)), int(rng.integers(len(ANGLES)))) for i in range(4)
    ]
    order = [int(i) for i in rng.permutation(GLYPHS)]
    return Scene(
        pixels=pixels,
        size=size,
        glyphs=[glyphs[i] for i in order],
        needles=(first, second),
        counted=counted,
        count=count,
        absent=absent,
        large=large,
        gratings=gratings,
        seed=int(rng.integers(2**62)),
    )


def tile_of(pixel: int, pixels: int) -> int:
    """The row or column of tiles that a pixel lies in."""
    return pixel * GRID // pixels


def on_seam(glyph: Glyph, scene: Scene) -> bool:
    """Whether a seam between tiles goes through the middle half of a glyph's height or width."""
    reach = scene.size // 4
    return any(tile_of(p - reach, scene.pixels) != tile_of(p + reach - 1, scene.pixels) for p in (glyph.y, glyph.x))


def has_seam(cell: int, pixels: int) -> bool:
    """Whether a seam between tiles goes through a row or column of cells."""
    return tile_of(cell * CELL, pixels) != tile_of((cell + 1) * CELL - 1, pixels)


def _place(rng: np.random.Generator, cell: int, size: int, pixels: int) -> int:
    """The centre of a glyph along an axis: within its cell, and where a seam goes through it half of them on it."""
    low, high = cell * CELL + size // 2 + 1, (cell + 1) * CELL - size // 2 - 1
    free = int(rng.integers(low, high + 1))
    if not has_seam(cell, pixels):
        return free
    seam = next(p for p in range(cell * CELL, (cell + 1) * CELL) if tile_of(p, pixels) != tile_of(p - 1, pixels))
    if rng.random() < 0.5:
        return seam
    away = [p for p in range(low, high + 1) if abs(p - seam) >= size // 2 + 1]
    return int(rng.choice(away)) if away else free


def positions(scene: Scene) -> Array:
    """Row, column, class and centre of all small glyphs: (GLYPHS, 5)."""
    return np.array([(g.row, g.col, g.name, g.y, g.x) for g in scene.glyphs])
