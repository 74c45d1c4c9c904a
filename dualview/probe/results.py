"""What a document says: accuracies of arms by task and level, differences between arms, with intervals."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from dualview.probe.document import Document
from dualview.probe.draws import Draw
from dualview.probe.glyphs import Array
from dualview.probe.grid import unpacked
from dualview.probe.questions import SET_OF_TASK, SET_SIZES, TASKS
from dualview.probe.statistics import Interval, bootstrap

TASK, LEVEL, SEAM = 0, 8, 9


class Results:
    """The rows of a document, beside the questions that they answer.

    Args:
        document: What `dualview probe` wrote.
        pixels: Height and width of the pages.
    """

    def __init__(self, document: Document, pixels: int = 336) -> None:
        self.document, self.pixels = document, pixels
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        for row in document["rows"]:
            if row["pixels"] == pixels:
                self.rows.setdefault(row["arm"], {})[row["seed"]] = row

    @property
    def arms(self) -> list[str]:
        """Arms that have rows, in the order of training."""
        order = list(dict.fromkeys(name for name, *_ in self.document["planned"]))
        return [name for name in order if name in self.rows]

    @cached_property
    def questions(self) -> Array:
        """Questions of the pages that all were tested on, (pages, questions, 10)."""
        return Draw("test", "test", 0, self.document["pages"][str(self.pixels)][2], self.pixels).questions()

    def right(self, arm: str, seeds: list[int], blank: str | None = None) -> Array:
        """Which questions an arm answered rightly, (seeds, pages, questions)."""
        rows = [self.rows[arm][seed] for seed in seeds]
        texts = [row["right"] if blank is None else row["blank"][blank] for row in rows]
        return np.stack([unpacked(text, len(self.questions)) for text in texts])

    def weights(self, task: str | None = None, level: int | None = None, seam: bool | None = None) -> Array:
        """What every question counts, (pages, questions): without a task, every task the same."""
        kinds = self.questions[..., TASK]
        if task is None:
            counts: Array = np.array(list(TASKS.values()))[kinds]
            return 1 / (len(TASKS) * counts)
        chosen: Array = kinds == list(TASKS).index(task)
        if level is not None:
            chosen = chosen & (self.questions[..., LEVEL] == level)
        if seam is not None:
            chosen = chosen & (self.questions[..., SEAM] == int(seam))
        return chosen.astype(float)

    def accuracy(
        self,
        arm: str,
        task: str | None = None,
        *,
        level: int | None = None,
        seam: bool | None = None,
        blank: str | None = None,
        against: str | None = None,
    ) -> Interval:
        """Share of right answers, or its difference to that of another arm on the seeds that both have.

        Args:
            arm: Whose.
            task: Of a task; None for the mean over all tasks.
            level: Of questions of one height or period.
            seam: Of what lies on a seam, or does not.
            blank: With this view replaced by its mean.
            against: Another arm, whose accuracy is taken away.
        """
        seeds = [seed for seed in self.rows[arm] if against is None or seed in self.rows[against]]
        weights = self.weights(task, level, seam)
        values = (self.right(arm, seeds, blank) * weights).sum(-1)
        if against is not None:
            values = values - (self.right(against, seeds) * weights).sum(-1)
        return bootstrap(values, weights.sum(-1))

    def facts(self, arm: str) -> dict[str, Any]:
        """The first row of an arm, for what is the same with every seed."""
        return next(iter(self.rows[arm].values()))


def chance(task: str) -> float:
    """Accuracy of a guess among all answers that a task can have."""
    return 1 / SET_SIZES[SET_OF_TASK[task]]


def table(document: Document, pixels: int = 336) -> str:
    """Accuracy of every arm by task, as text for a terminal.

    Example:
        >>> table({"rows": [], "planned": [], "pages": {"336": [8, 4, 8]}}).split()
        ['arm', 'all', 'place', 'marker', 'seam', 'large', 'needle', 'count', 'compare', 'relate', 'grating', 'there']
    """
    results = Results(document, pixels)
    lines: list[tuple[str, ...]] = [("arm", "all", *SHORT)]
    for arm in results.arms:
        means = (results.accuracy(arm, task).mean for task in (None, *TASKS))
        lines.append((arm, *(f"{mean:.3f}" for mean in means)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


SHORT = ("place", "marker", "seam", "large", "needle", "count", "compare", "relate", "grating", "there")
"""Names of the tasks in a narrow table."""
