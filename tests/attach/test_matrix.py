"""The support matrix: every cell says what happens."""

import os
import re
from collections.abc import Iterator

import pytest

from dualview.models.adapter.hosts import HOSTS, REFUSED
from dualview.models.adapter.processors import PACKED as PACKED_PROCESSORS
from dualview.models.adapter.processors import RECIPES
from tests.attach.hosts import PACKED, SQUARE
from tests.attach.matrix import CELLS, ENLARGED, PAGE, RUN, VERSION, described, on_page, trial_of, tried

FAMILIES = (*SQUARE, *PACKED)
QUICK = ("llava", "qwen2_5_vl")  # every cell, always
MORE = ("gemma3", "internvl", "mistral3", "qwen3_vl")  # every cell, by `make test-more`; the others by `make test-all`
PINS = (PAGE.parents[1] / "constraints" / "oldest.txt").read_text(encoding="utf-8")
OLDEST = re.search(r"^transformers==(\d+\.\d+)", PINS, re.MULTILINE)[1]
NEWER = ("perception_lm",)  # the host alone fails with the oldest versions


def tries() -> Iterator[object]:
    for family in FAMILIES if VERSION != OLDEST else [one for one in FAMILIES if one not in NEWER]:
        for cell in CELLS:
            slow = cell == "compile" and family != "llava"  # half a minute each
            quick = family in QUICK and cell != "compile"
            often = quick or (not slow and family in (*QUICK, *MORE))
            if often or "TEST_ALL" in os.environ:
                yield pytest.param(family, cell, marks=[] if quick else pytest.mark.more, id=f"{family}-{cell}")


@pytest.mark.parametrize(("family", "cell"), list(tries()))
def test_cell(family, cell):
    assert tried(trial_of(family), cell) == on_page()[family][cell]


def test_the_page_has_a_row_for_every_family():
    assert set(on_page()) == set(FAMILIES) == {*HOSTS, "llava_pixtral"}
    page = PAGE.read_text(encoding="utf-8")
    for family in FAMILIES:
        assert f"| `{family}` | {' | '.join(described(family))} |" in page
    assert all(f"`{family}`" in page for family in REFUSED)
    for family, row in on_page().items():
        versions = row[RUN].split(", ")
        assert (OLDEST in versions) == (family not in NEWER)
        assert versions[-1] != OLDEST  # and a newer one
    assert len(ENLARGED) + len(PACKED_PROCESSORS) == len(RECIPES["hires"])


@pytest.mark.parametrize("cell", CELLS)
def test_few_cells_are_as_the_host(cell):
    """What no host can do is not tried well."""
    assert sum(cells[cell] == "as host" for cells in on_page().values()) <= 2
