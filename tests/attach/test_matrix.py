"""The support matrix: every cell says what happens."""

import os
from functools import cache

import pytest

from dualview.models.adapter.hosts import HOSTS, REFUSED
from dualview.models.adapter.processors import RECIPES
from tests.attach.hosts import PACKED, SQUARE
from tests.attach.matrix import CELLS, ENLARGED, PAGE, Trial, described, on_page, tried

FAMILIES = (*SQUARE, *PACKED)
QUICK = ("llava", "qwen2_5_vl")
COMPILED = FAMILIES if "TEST_ALL" in os.environ else QUICK  # takes half a minute for each family

trial_of = cache(Trial)


def tries(family: str, cell: str) -> object:
    quick = family in QUICK and cell != "compile"
    return pytest.param(family, cell, marks=[] if quick else pytest.mark.more, id=f"{family}-{cell}")


@pytest.mark.parametrize(
    ("family", "cell"),
    [tries(family, cell) for family in FAMILIES for cell in CELLS if cell != "compile" or family in COMPILED],
)
def test_cell(family, cell):
    assert tried(trial_of(family), cell) == on_page()[family][cell]


def test_the_page_has_a_row_for_every_family():
    assert set(on_page()) == set(FAMILIES) == {*HOSTS, "llava_pixtral"}
    page = PAGE.read_text(encoding="utf-8")
    for family in FAMILIES:
        assert f"| `{family}` | {' | '.join(described(family))} |" in page
    assert all(f"`{family}`" in page for family in REFUSED)
    assert len(ENLARGED) == len(RECIPES)


@pytest.mark.parametrize("cell", CELLS)
def test_few_cells_are_as_the_host(cell):
    """What no host can do is not tried well."""
    assert sum(cells[cell] != "yes" for cells in on_page().values()) <= 2
