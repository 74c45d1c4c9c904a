"""How far a reader has to go (scripts/structure.py prints the figures), and that no import makes a circle."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "structure.py"
MOST = {
    "DEM as written: files": 5,
    "DEM as written: functions": 20,
    "DEM planned: files": 7,
    "which backend runs: files": 2,
    "pixels to tokens: files": 10,
    "statements of ops and kernels": 1700,
}


@pytest.fixture(scope="module")
def figures() -> dict[str, int]:
    run = subprocess.run([sys.executable, str(SCRIPT)], check=True, capture_output=True, text=True)
    rows = (line.split(maxsplit=1) for line in run.stdout.splitlines() if line.lstrip()[:1].isdigit())
    return {name: int(figure) for figure, name in rows}


@pytest.mark.parametrize("name", MOST)
def test_no_figure_grows(figures: dict[str, int], name: str) -> None:
    assert 0 < figures[name] <= MOST[name]
