"""Intervals against cases that are known."""

import numpy as np
import pytest

from dualview.probe.statistics import bootstrap


def test_one_seed_is_as_wide_as_a_share_of_many():
    values = (np.arange(400) % 2)[None]
    mean, low, high = bootstrap(values)
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 400), rel=0.1)


def test_seeds_are_drawn_anew_too():
    """Two seeds that differ in everything: a quarter of the draws has one of them twice, a quarter the other."""
    values = np.stack([np.zeros(1000), np.ones(1000)])
    assert bootstrap(values) == (0.5, 0, 1)


def test_paired_differences_are_narrower_than_their_parts():
    rng = np.random.default_rng(0)
    hard = rng.random(600)
    first, second = (rng.random((3, 600)) < hard for _ in range(2))
    better = first | (rng.random((3, 600)) < 0.05)
    paired = bootstrap(better.astype(float) - first)
    assert paired.low > 0
    assert paired.high - paired.low < 0.5 * (bootstrap(first)[2] - bootstrap(first)[1])
    assert bootstrap(first.astype(float) - first) == (0, 0, 0)
    apart = bootstrap(second.astype(float) - first)
    assert apart.low < 0 < apart.high


def test_pages_count_as_often_as_they_were_asked_about():
    values, counts = np.array([[4.0, 0, 1]]), np.array([4, 1, 0])
    assert bootstrap(values[:, :2], counts[:2]).mean == pytest.approx(0.8)
    assert bootstrap(np.zeros((1, 2)), np.zeros(2)).mean == 0


def test_the_same_every_time():
    values = np.random.default_rng(1).random((3, 50))
    assert bootstrap(values) == bootstrap(values)
