"""Questions about a page, with their answers."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

from dualview.reader.glyphs import CHARACTERS, CLASSES, DIGITS, SHAPES
from dualview.reader.pages import CELLS, COVERED, EMPTY, Pages

Cell = tuple[int, int]
TASKS = {
    "place": 4,
    "marker": 5,
    "where": 4,
    "spell": 2,
    "large": 1,
    "compare": 3,
    "presence": 2,
}
"""What is asked, and how often of 21 times."""


class Question(NamedTuple):
    """A question about a page.

    Attributes:
        task: A name of `TASKS`.
        text: The question.
        answer: The answer.
        cells: The cells that it is about, rows and columns from 0.
    """

    task: str
    text: str
    answer: str
    cells: tuple[Cell, ...] = ()


def ask(
    pages: Pages, index: int, random: Random, tasks: dict[str, int] | None = None, count: int = 21
) -> list[Question]:
    """Questions about one page, each once.

    Args:
        pages: The pages.
        index: Which of them.
        random: Source of all choices.
        tasks: Kinds of questions and how often each is asked, in place of `TASKS`. One that the page has no answer to
            is left out.
        count: How many are tried.
    """
    kinds: list[list[int]] = pages.kinds[index].tolist()
    large, weights = int(pages.large[index]), TASKS if tasks is None else tasks
    chosen = random.choices(list(weights), list(weights.values()), k=count)
    if tasks is None:
        chosen = [task for task, times in TASKS.items() for _ in range(times)]
        random.shuffle(chosen)
    found = [MAKERS[task](kinds, large, random) for task in chosen]
    return list({question.text: question for question in found if question is not None}.values())


def place(cell: Cell) -> str:
    """A cell as in a spreadsheet: a letter for its column, a number for its row."""
    return f"{'ABCDEFGH'[cell[1]]}{cell[0] + 1}"


def name(kind: int) -> str:
    """A class as an answer says it."""
    if kind < 0:
        return "nothing"
    return CLASSES[kind] if kind < len(CHARACTERS) else f"a {CLASSES[kind]}"


def caption(pages: Pages, index: int, random: Random) -> str:
    """What stands in every cell of a page, in any order: "." for nothing, "#" for a part of the large character.

    In one fixed order the place in the text would say as much as the names, and nobody would learn these.
    """
    kinds = pages.kinds[index].tolist()
    cells = [(row, col) for row in range(CELLS) for col in range(CELLS)]
    random.shuffle(cells)
    marks = {EMPTY: ".", COVERED: "#"}

    def mark(kind: int) -> str:
        return marks.get(kind) or (CLASSES[kind] if kind < len(CHARACTERS) else f" {CLASSES[kind]}")

    large = int(pages.large[index])
    listed = "".join(f" {place((r, c))}{mark(kinds[r][c])}" for r, c in cells)
    return f"{listed} large {'none' if large == EMPTY else CHARACTERS[large]}"


def _cells(kinds: list[list[int]], low: int, high: int) -> list[Cell]:
    return [(r, c) for r in range(CELLS) for c in range(CELLS) if low <= kinds[r][c] < high]


def _place(kinds: list[list[int]], large: int, random: Random) -> Question | None:
    cell = random.choice(_cells(kinds, EMPTY, len(CLASSES)))
    if kinds[cell[0]][cell[1]] == EMPTY and random.random() < 0.6:
        cell = random.choice(_cells(kinds, 0, len(CLASSES)) or [cell])
    return Question("place", f"What is in {place(cell)}?", name(kinds[cell[0]][cell[1]]), (cell,))


def _marker(kinds: list[list[int]], large: int, random: Random) -> Question | None:
    marked = [
        (r, c) for r, c in _cells(kinds, len(CHARACTERS), len(CLASSES)) if c + 1 < CELLS and kinds[r][c + 1] >= EMPTY
    ]
    if not marked:
        return None
    r, c = random.choice(marked)
    return Question("marker", f"What is right of the {CLASSES[kinds[r][c]]}?", name(kinds[r][c + 1]), ((r, c + 1),))


def _where(kinds: list[list[int]], large: int, random: Random) -> Question | None:
    shape = random.choice(SHAPES)
    cells = _cells(kinds, CLASSES.index(shape), CLASSES.index(shape) + 1)
    answer = f"in {place(cells[0])}" if cells else "nowhere"
    return Question("where", f"Where is the {shape}?", answer, tuple(cells[:1]))


def _spell(kinds: list[list[int]], large: int, random: Random) -> Question | None:
    written = set(_cells(kinds, 0, len(CHARACTERS)))
    starts = [(r, c) for r, c in sorted(written) if {(r, c + 1), (r, c + 2)} <= written]
    if not starts:
        return None
    r, c = random.choice(starts)
    cells = ((r, c), (r, c + 1), (r, c + 2))
    code = "".join(CHARACTERS[kinds[r][c]] for r, c in cells)
    return Question("spell", f"What do {place(cells[0])}, {place(cells[1])} and {place(cells[2])} spell?", code, cells)


def _large(kinds: list[list[int]], large: int, random: Random) -> Question | None:
    return Question("large", "What is the large character?", "none" if large == EMPTY else CHARACTERS[large])


def _compare(kinds: list[list[int]], large: int, random: Random) -> Question | None:
    digits = _cells(kinds, 0, len(DIGITS))
    if len(digits) < 2:
        return None
    for _ in range(20):
        a, b = random.sample(digits, 2)
        x, y = kinds[a[0]][a[1]], kinds[b[0]][b[1]]
        if x != y and (a[0] // 3, a[1] // 3) != (b[0] // 3, b[1] // 3):
            return Question("compare", f"Which is larger, {place(a)} or {place(b)}?", str(max(x, y)), (a, b))
    return None


def _presence(kinds: list[list[int]], large: int, random: Random) -> Question | None:
    kind = random.randrange(len(CLASSES))
    cells = _cells(kinds, kind, kind + 1)
    if not cells and random.random() < 0.3:
        cells = _cells(kinds, 0, len(CLASSES))
        kind = kinds[cells[0][0]][cells[0][1]] if cells else kind
        cells = _cells(kinds, kind, kind + 1)
    article = "a" if kind >= len(CHARACTERS) else "the character"
    return Question("presence", f"Is there {article} {CLASSES[kind]}?", "yes" if cells else "no", tuple(cells[:1]))


MAKERS: dict[str, Any] = {
    "place": _place,
    "marker": _marker,
    "where": _where,
    "spell": _spell,
    "large": _large,
    "compare": _compare,
    "presence": _presence,
}
