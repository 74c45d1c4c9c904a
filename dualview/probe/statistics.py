"""Accuracies, and intervals of their differences by a bootstrap over pages and seeds."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from dualview.probe.glyphs import Array


class Interval(NamedTuple):
    """A mean and the interval that holds 95 % of the resampled means."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Array, counts: Array | None = None, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of values, with seeds and pages drawn anew with replacement, both at once.

    Of differences between two arms on the same seeds and pages it is a paired bootstrap. Questions of a page are no
    independent items: their sum counts as one value.

    Args:
        values: Sums over the questions of every page, (seeds, pages).
        counts: How many questions each sum is of, (pages,); 1 where it is omitted.
        resamples: How often to draw.
        seed: Of the draws.

    Example:
        >>> bootstrap(np.ones((2, 50)))
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    values = np.asarray(values, np.float64)
    seeds, pages = values.shape
    counts = np.ones(pages) if counts is None else np.asarray(counts, np.float64)
    of_seeds, of_pages = _drawn(seeds, pages, resamples, seed)
    means = (of_seeds * (of_pages @ values.T)).sum(1) / np.maximum(of_pages @ counts, 1e-9)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.sum() / (seeds * max(counts.sum(), 1e-9))), float(low), float(high))


@cache
def _drawn(seeds: int, pages: int, resamples: int, seed: int) -> tuple[Array, Array]:
    """How often each seed and each page is drawn: shares (resamples, seeds), counts (resamples, pages)."""
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    return of_seeds, rng.multinomial(pages, np.full(pages, 1 / pages), resamples).astype(np.float64)
