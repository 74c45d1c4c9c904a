"""A reduced series on a CPU of what the GPU's grid did not reach: `python -m benchmarks.probe_cpu [MINUTES]`.

One run, one seed, the same budget for all its arms, so they compare with each other and with no row of another run. The
frozen tower is that of the embedded model, so nothing but arms is trained. Arms that are not done in time have no row.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import torch

from benchmarks.results import FOLDER, header
from dualview.embedded import load_embedded
from dualview.probe.arms import ARMS, FUSIONS, Arm, released
from dualview.probe.document import add_row, new_document
from dualview.probe.draws import drawing
from dualview.probe.encoders import encoder_of
from dualview.probe.grid import Plan, cost_of_arms, run_grid
from dualview.probe.training import Budget

AVERAGE, EMBEDDED = "DEM released, average readout", "DEM released, average readout, linear_concat"
MINE = (
    Arm(EMBEDDED, "5", released(readout="average", fusion="linear_concat")),
    Arm(f"{AVERAGE}, thumbnail for stride", "controls", released("thumb", readout="average"), ("local", "thumb")),
)
"""Arms that the grid does not have: the options of the embedded model, and its readout with a thumbnail."""
ORDER = (
    *("DEM released", AVERAGE, EMBEDDED, "local + thumbnail, linear", "local", "DEM paper + residual + norm"),
    *("thumbnail", "DEM released, linear_concat", "DEM released + thumbnail"),
    *(f"DEM released, {name}" for name in FUSIONS if name not in ("linear_concat", "conv3x3")),
    *(f"DEM released, {source} in both roles" for source in ("global", "sum", "local")),
    *("local + stride, linear", "MLP of as many parameters", f"{AVERAGE}, thumbnail for stride"),
    *("DEM released, conv3x3", "DEM released, learnt phases", "DEM paper"),
)
"""By what matters most to whoever chooses options; conv3x3 takes as long as four others."""
FASTER = (EMBEDDED, "local + thumbnail, linear", "DEM released", "DEM paper + residual + norm")
"""What is trained once more in the end, with twice the learning rate."""


def plan() -> Plan:
    """What is run."""
    known = {arm.name: replace(arm, rank=0, seeds=1, blanks=()) for arm in (*ARMS, *MINE)}
    faster = (replace(known[name], name=f"{name}, 2 x the rate", table="convergence", rate=2) for name in FASTER)
    budget = Budget(steps=400, batch=16)
    return Plan((*(known[name] for name in ORDER), *faster), (0,), budget, {336: (640, 48, 402)})


def main(minutes: float | None) -> None:
    """Train and write what is done after every arm."""
    until = None if minutes is None else time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    mine, device = plan(), torch.device("cpu")
    tower = load_embedded()[0].model.vision_tower.to(memory_format=torch.channels_last)
    made = header("cpu", torch.float32, "probe", "none", 0)
    document = new_document(mine, device)
    document |= {"commit": made["commit"], "machine": made["machine"], "encoders": [{"seed": 0, "tower": "embedded"}]}
    with drawing(2) as pool:
        drawn = mine.drawn(pool)
        document["cost"] = cost_of_arms(mine.arms, device)
        for row in run_grid(mine, {0: encoder_of(tower, 16)}, drawn, until=until, progress=True):
            add_row(document, row, FOLDER / "probe" / "cpu.json")


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else None)
