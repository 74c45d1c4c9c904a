"""The table of docs/training.md is the one that the script computes."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sizes():
    spec = importlib.util.spec_from_file_location("training_sizes", ROOT / "scripts" / "training_sizes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table(sizes):
    assert sizes.table() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_parameters_are_those_of_the_released_model(sizes):
    of = sizes.parts()
    assert of.dem_and_projector == 4_400_256 + 20_979_712
    assert of.layers * of.layer + 2 * of.vocabulary * of.width + of.width == of.language_model
    assert 8.35e9 < of.tower + of.dem_and_projector + of.language_model < 8.37e9
