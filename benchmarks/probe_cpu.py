"""Two readouts and a thumbnail, three seeds, on a CPU: `python -m benchmarks.probe_cpu OUT.json --towers DIR`.

What the grid of the GPU did not reach: the released module read out by an average of every cell, in place of one token
of it. At the scale of `make probe`, so that one thread is enough; its figures are no continuation of the large grid's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dualview.probe.arms import ARMS
from dualview.probe.run import SMALL, Scale, run_probe

NAMES = (
    *("local", "local + thumbnail, linear", "local + stride, linear"),
    *("DEM released", "DEM released, average readout"),
)
ARMS_HERE = tuple(replace(arm, blanks=(), rank=0) for arm in ARMS if arm.name in NAMES)
SCALE = Scale(replace(SMALL.plan, arms=ARMS_HERE, seeds=(0, 1, 2)), SMALL.encoder_steps)
"""Seed by seed, so that arms of one seed can be compared though the last seed is not reached."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the JSON file, written after every arm")
    parser.add_argument("--towers", type=Path, help="folder where trained encoders are kept, and found")
    options = parser.parse_args()
    run_probe(SCALE, options.output, towers=options.towers, progress=True)


if __name__ == "__main__":
    main()
