"""Many pages with their questions, by a seed, in as many processes as are allowed."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from typing import TypeAlias

import numpy as np

from dualview.probe.glyphs import Array, Split
from dualview.probe.pages import VERSION, draw_page
from dualview.probe.questions import Question, ask
from dualview.probe.scenes import SIZES, Scene, draw_scene

SPLITS: tuple[Split, ...] = ("train", "test")
ROLES = ("train", "check", "test")
CHUNK = 32
"""Pages that one process draws at a time."""


@dataclass(frozen=True)
class Draw:
    """Which pages: those of a split, by a seed, so many, of a size. Draws of other seeds or roles share no page.

    Attributes:
        split: Whose glyphs and photographs they have.
        role: "train", "check" or "test", so that one seed serves all three.
        seed: Of the draw.
        count: Number of pages.
        pixels: Height and width of a page, a multiple of 336.
    """

    split: Split
    role: str
    seed: int
    count: int
    pixels: int = 336

    def scene(self, index: int) -> Scene:
        """What stands on one page; sizes of glyphs take turns."""
        return draw_scene(self._random(index), SIZES[index % len(SIZES)], self.pixels)

    def page(self, index: int) -> tuple[Array, list[Question]]:
        """One page and its questions."""
        scene = self.scene(index)
        return draw_page(scene, self.split), ask(scene, self._random(index, 1))

    def questions(self) -> Array:
        """The questions of all pages, (pages, questions, 10), without drawing any."""
        return np.array([ask(self.scene(i), self._random(i, 1)) for i in range(self.count)], np.int64)

    def _random(self, *of: int) -> np.random.Generator:
        kind = (SPLITS.index(self.split), ROLES.index(self.role))
        return np.random.default_rng((VERSION, *kind, self.seed, self.pixels, *of))

    def chunk(self, start: int) -> tuple[Array, Array]:
        """Pages (n, 3, H, W) uint8 and questions (n, questions, 10) of the next `CHUNK` pages."""
        drawn = [self.page(i) for i in range(start, min(start + CHUNK, self.count))]
        pages = np.stack([page for page, _ in drawn]).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(pages), np.array([questions for _, questions in drawn], np.int64)

    def chunks(self, pool: Pool | None = None) -> Iterator[tuple[Array, Array]]:
        """All chunks in order; a pool of processes begins to draw them at once."""
        return (map if pool is None else pool.imap)(self.chunk, range(0, self.count, CHUNK))


Drawn: TypeAlias = tuple[Draw, Iterable[tuple[Array, Array]]]
"""A draw and its chunks."""


@contextmanager
def drawing(processes: int) -> Iterator[Pool | None]:
    """So many processes that draw pages, or None for the one that there is."""
    if processes < 2:
        yield None
        return
    ignored = (signal.SIGINT, signal.SIG_IGN)  # of ctrl-C the one that asked them speaks
    with get_context("spawn").Pool(processes, signal.signal, ignored) as pool:
        yield pool


def digest(draw: Draw) -> tuple[str, str]:
    """Hashes of all images and of all questions of a draw.

    Example:
        >>> digest(Draw("test", "test", 0, 2)) == digest(Draw("test", "test", 0, 2))
        True
        >>> digest(Draw("test", "test", 0, 2))[0] == digest(Draw("test", "test", 1, 2))[0]
        False
    """
    images, questions = hashlib.sha256(), hashlib.sha256()
    for pages, asked in draw.chunks():
        images.update(pages.tobytes())
        questions.update(asked.astype("<i8").tobytes())
    return images.hexdigest(), questions.hexdigest()
