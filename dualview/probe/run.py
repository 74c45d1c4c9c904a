"""`dualview probe`: encoders, features, arms, studies, one document."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualview.large.progress import counted
from dualview.probe.arms import ARMS, REDUCED
from dualview.probe.document import Document, add_row, new_document, write
from dualview.probe.draws import Draw, drawing
from dualview.probe.encoders import encoder_of, name_of, pretrained_tower
from dualview.probe.grid import Plan, cost_of_arms, run_grid
from dualview.probe.memory import measured_memory
from dualview.probe.shift import domain_shift
from dualview.probe.training import Budget


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        plan: The arms and their budget.
        encoder_steps: Of each encoder's own training.
        shift: Pages to fit on and to test on in the study of the encoder's shift; None leaves it out.
    """

    plan: Plan
    encoder_steps: int
    shift: tuple[int, int] | None = None

    def shift_draws(self) -> dict[int, tuple[Draw, Draw]]:
        """The pages of that study, by seed."""
        train, test = self.shift or (0, 0)
        seeds = self.plan.seeds if self.shift else ()
        return {seed: (Draw("train", "check", seed, train), Draw("test", "check", seed, test)) for seed in seeds}


FULL = Scale(
    Plan(ARMS, budget=Budget(steps=1500), pages={336: (12288, 384, 1020), 1008: (1536, 96, 402)}),
    encoder_steps=2000,
    shift=(300, 300),
)
"""All arms, three seeds: minutes on a large GPU, days on a CPU."""
SMALL = Scale(
    Plan(
        tuple(arm for arm in ARMS if arm.name in REDUCED),
        (0,),
        Budget(steps=300, batch=16, points=5),
        {336: (512, 64, 204)},
    ),
    encoder_steps=1000,
    shift=(48, 48),
)
"""The reduced table: one seed, the arms of REDUCED."""
TINY = Scale(
    Plan(tuple(arm for arm in ARMS if arm.name in REDUCED[:4]), (0,), Budget(4, 4, points=2), {336: (8, 4, 8)}),
    encoder_steps=2,
    shift=(4, 4),
)
"""Nothing is learnt: for tests."""


def run_probe(
    scale: Scale,
    output: Path,
    *,
    device: torch.device | str = "cpu",
    towers: Path | None = None,
    minutes: float | None = None,
    progress: bool = False,
) -> Document:
    """Train encoders and arms, make the studies, and write the document after every row.

    Args:
        scale: How much.
        output: The JSON file; a file of that name is replaced.
        device: Where.
        towers: A folder where trained encoders are kept, or found.
        minutes: After which no arm goes on; the rest is missing from the document.
        progress: Whether bars are shown.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    device, plan = torch.device(device), scale.plan
    processes = cores() if device.type == "cuda" else min(2, cores())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    document = new_document(plan, device)  # draws pages: what is not installed is missed before anything is trained
    encoders = {}
    for seed in plan.seeds:
        tower, fact = _tower(seed, scale.encoder_steps, device, towers, progress)
        encoders[seed] = encoder_of(tower)
        document["encoders"].append(fact)
    with drawing(processes) as pool:
        of_shift = {seed: [(draw, draw.chunks(pool)) for draw in draws] for seed, draws in scale.shift_draws().items()}
        drawn = plan.drawn(pool)  # the pool draws, the device does the rest
        document["memory"] = measured_memory() if device.type == "cuda" else []
        document["cost"] = cost_of_arms(plan.arms, device)
        document["shift"] = [
            {"seed": seed, **row}
            for seed, (train, test) in of_shift.items()
            for row in domain_shift(encoders[seed], train, test, device=device)
        ]
        write(document, output)
        for row in run_grid(plan, encoders, drawn, device=device, until=until, progress=progress):
            add_row(document, row, output)
    return document


def _tower(
    seed: int, steps: int, device: torch.device, towers: Path | None, progress: bool
) -> tuple[nn.Module, dict[str, Any]]:
    since = time.monotonic()
    with counted(steps, f"encoder {seed}", "steps", shown=progress) as done:

        def watch(step: int, loss: float) -> None:
            done(1)

        tower = pretrained_tower(seed, steps, device=device, folder=towers, watch=watch)
    seconds = round(time.monotonic() - since, 1)
    return tower, {"seed": seed, "steps": steps, "tower": name_of(seed, steps), "seconds": seconds}


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
