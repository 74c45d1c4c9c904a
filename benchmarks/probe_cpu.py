"""Two readouts of the released module beside linear layers, three seeds, on a CPU: `python -m benchmarks.probe_cpu`.

What the grid of the GPU did not reach: the released module read out by an average of every cell, in place of one token
of it. At the scale of `make probe`, so that its figures are no continuation of the large grid's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.probe_tables import by_task, markdown, signed
from dualview.probe.arms import ARMS
from dualview.probe.document import Document
from dualview.probe.results import Results
from dualview.probe.run import SMALL, Scale, run_probe

AVERAGE = "DEM released, average readout"
AGAINST = ("DEM released", "local + thumbnail, linear", "local + stride, linear", "local")
SCALE = Scale(
    replace(
        SMALL.plan,
        arms=tuple(replace(arm, blanks=(), rank=0) for arm in ARMS if arm.name in (AVERAGE, *AGAINST)),
        seeds=(0, 1, 2),
    ),
    SMALL.encoder_steps,
)
"""Of one rank: seed by seed, so that the arms of a seed can be compared though the last seed is not reached."""


def report(document: Document) -> str:
    """Accuracy by task, and what the average is worth, in points, with the interval over the seeds that both have."""
    results = Results(document)
    rows = [[arm, signed(results.accuracy(AVERAGE, against=arm))] for arm in AGAINST]
    return f"{by_task(results, (*AGAINST, AVERAGE))}\n\n{markdown((f'{AVERAGE}, against', 'points'), rows)}"


def main() -> None:
    """Run it, and print its tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("cpu.json"), help="results, written after every arm")
    parser.add_argument("--towers", type=Path, help="folder where trained encoders are kept, and found")
    options = parser.parse_args()
    print(report(run_probe(SCALE, options.output, towers=options.towers, progress=True)))


if __name__ == "__main__":
    main()
