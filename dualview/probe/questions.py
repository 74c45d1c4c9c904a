"""Questions about a scene, as rows of integers, with the answers that the scene gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dualview.probe.glyphs import DIGITS, NAMES, Array
from dualview.probe.scenes import ANGLES, CELL, MARKERS, Glyph, Scene, has_seam, on_seam, tile_of

TASKS = {
    "read at a place": 10,
    "read at a marker": 4,
    "read at a seam": 4,
    "read a large glyph": 1,
    "find a needle": 2,
    "count": 1,
    "compare": 6,
    "relate": 1,
    "direction of a grating": 4,
    "is it there": 3,
}
"""Every task and how many questions of it a page has."""

QUESTIONS = sum(TASKS.values())
"""Questions of a page."""

PATCHES = 4
"""Rows and columns of patches that an answer about a place is one of."""

SET_SIZES = {
    "glyph": len(NAMES),
    "patch": PATCHES**2,
    "count": 6,
    "order": 3,
    "side": 4,
    "angle": len(ANGLES),
    "there": 3,
}
"""Sets of answers, and how many each has."""
_STARTS = dict(zip(SET_SIZES, np.cumsum([0, *SET_SIZES.values()]).tolist(), strict=False))
ANSWERS = sum(SET_SIZES.values())
"""Classes of all answers together."""
SET_OF_TASK = dict(
    zip(TASKS, ("glyph", "glyph", "glyph", "glyph", "patch", "count", "order", "side", "angle", "there"), strict=True)
)


class Question(NamedTuple):
    """One question, its answer, and what makes it hard.

    Attributes:
        task: Index in TASKS.
        row: Row of the cell, quadrant or patch that it names, from 1; 0 for none.
        col: Its column.
        other_row: Row of a second cell.
        other_col: Its column.
        name: Class of the glyph that it names, or len(NAMES) + index of a marker, from 1; 0 for none.
        other_name: Class of a second glyph.
        answer: Index among ANSWERS.
        level: Height of the glyph or period of the grating, in pixels.
        seam: Whether what it asks for lies on a seam between tiles.
    """

    task: int
    row: int = 0
    col: int = 0
    other_row: int = 0
    other_col: int = 0
    name: int = 0
    other_name: int = 0
    answer: int = 0
    level: int = 0
    seam: int = 0


def allowed_answers() -> Array:
    """Which answers a task can have: (tasks, ANSWERS), bool."""
    allowed = np.zeros((len(TASKS), ANSWERS), bool)
    for task, name in enumerate(SET_OF_TASK.values()):
        allowed[task, _STARTS[name] : _STARTS[name] + SET_SIZES[name]] = True
    return allowed


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions about a scene, in the order of TASKS.

    Example:
        >>> from dualview.probe.scenes import draw_scene
        >>> len(ask(draw_scene(np.random.default_rng(0), 8), np.random.default_rng(1))) == sum(TASKS.values())
        True
    """
    seen = [scene.glyphs[i] for i in rng.permutation(len(scene.glyphs)) if not scene.glyphs[i].hidden]
    by_seam = [g for g in seen if has_seam(g.row, scene.pixels) or has_seam(g.col, scene.pixels)]
    size, start = scene.size, _STARTS

    def cell(task: int, glyph: Glyph, row: bool = True, marker: int = 0) -> Question:
        place = (glyph.row + 1, glyph.col + 1) if row else (0, 0)
        return Question(task, *place, name=marker, answer=glyph.name, level=size, seam=int(on_seam(glyph, scene)))

    def named(name: int) -> Glyph:
        return next(g for g in scene.glyphs if g.name == name)

    marked = [g for g in seen if g.marker is not None]
    many = list(TASKS.values())
    asked = [cell(0, g) for g in seen[: many[0]]]
    asked += [cell(1, g, False, len(NAMES) + 1 + g.marker) for g in marked if g.marker is not None]
    asked += [cell(2, g) for g in (by_seam + seen)[: many[2]]]
    name, height, quadrant = scene.large
    asked.append(Question(3, quadrant // 2 + 1, quadrant % 2 + 1, answer=name, level=height, seam=1))
    patch = scene.pixels // PATCHES
    for needle in scene.needles:
        glyph = named(needle)
        answer = start["patch"] + (glyph.row * CELL // patch) * PATCHES + glyph.col * CELL // patch
        asked.append(Question(4, name=needle + 1, answer=answer, level=size, seam=int(on_seam(glyph, scene))))
    asked.append(Question(5, name=scene.counted + 1, answer=start["count"] + scene.count, level=size))
    asked += [_compare(seen, wanted, scene, rng) for wanted in rng.integers(0, 3, many[6])]
    first, second = (named(needle) for needle in scene.needles)
    side = 2 * (second.row > first.row) + (second.col > first.col)
    names = (scene.needles[0] + 1, scene.needles[1] + 1)
    asked.append(Question(7, name=names[0], other_name=names[1], answer=start["side"] + side, level=size))
    asked += [
        Question(8, g.row + 1, g.col + 1, answer=start["angle"] + g.angle, level=g.period) for g in scene.gratings
    ]
    return asked + [_presence(scene, seen, rng) for _ in range(many[9])]


def _compare(seen: list[Glyph], wanted: int, scene: Scene, rng: np.random.Generator) -> Question:
    """Whether the digit in one cell is smaller than, equal to or larger than that of a cell in another tile."""
    digits = [g for g in seen if g.name < len(DIGITS)] or seen
    tiles = [(tile_of(g.y, scene.pixels), tile_of(g.x, scene.pixels)) for g in digits]
    pairs = [(a, b) for i, a in enumerate(digits) for j, b in enumerate(digits) if tiles[i] != tiles[j]]
    fitting = [(a, b) for a, b in pairs if 1 + np.sign(a.name - b.name) == wanted]
    possible = fitting or pairs or [(digits[0], digits[-1])]
    first, second = possible[int(rng.integers(len(possible)))]
    order = _STARTS["order"] + 1 + int(np.sign(first.name - second.name))
    return Question(6, first.row + 1, first.col + 1, second.row + 1, second.col + 1, answer=order, level=scene.size)


def _presence(scene: Scene, seen: list[Glyph], rng: np.random.Generator) -> Question:
    """Whether a glyph is on the page: 0 no, 1 yes, 2 cannot tell, where it is not seen and something is covered."""
    covered = [g.name for g in scene.glyphs if g.hidden]
    draw = rng.random()
    name = scene.absent
    if draw < 0.4:
        name = seen[int(rng.integers(len(seen)))].name
    elif draw < 0.7 and covered:
        name = covered[int(rng.integers(len(covered)))]
    answer = 1 if any(g.name == name for g in seen) else 2 if covered else 0
    return Question(9, name=name + 1, answer=_STARTS["there"] + answer, level=scene.size)


NAMED = len(NAMES) + len(MARKERS) + 1
"""Values of a question's ``name``."""
