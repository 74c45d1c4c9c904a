"""Every arm and every seed: features once for each seed, arms side by side, a row for each as soon as it is trained."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import Pool
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dualview.cost import cost_of
from dualview.large.progress import counted
from dualview.probe.arms import Arm, Enhanced
from dualview.probe.attention import attention_of, gradient_norms
from dualview.probe.draws import Draw
from dualview.probe.features import Encode, Views, encode_draw
from dualview.probe.glyphs import Array
from dualview.probe.questions import QUESTIONS
from dualview.probe.scenes import GRID
from dualview.probe.training import Budget, Data, Training

Row = dict[str, Any]

PATCH = 14
"""Pixels a side of a token."""
BURST = 25
"""Steps of an arm that a GPU is given at once, so that it has work while another arm is made ready."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        arms: In the order in which they are trained.
        seeds: Of the encoder, of the pages to train on, and of the arms.
        budget: Of every arm.
        pages: To train on, to check on, to test on, by the height of a page.
        together: How many arms train side by side on a GPU.
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = field(default_factory=Budget)
    pages: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    together: int = 16

    def jobs(self) -> list[tuple[Arm, int]]:
        """Arms with seeds: rank by rank, in each seed by seed."""
        ranks = sorted({arm.rank for arm in self.arms})
        return [
            (arm, seed)
            for rank in ranks
            for place, seed in enumerate(self.seeds)
            for arm in self.arms
            if arm.rank == rank and place < arm.seeds
        ]

    def drawn(self, pool: Pool | None = None) -> dict[Draw, Iterable[tuple[Array, Array]]]:
        """The pages of every draw that is needed, in the order in which they are; a pool begins at once."""
        needed = dict.fromkeys(draw for arm, seed in self.jobs() for draw in self.draws(seed, arm.pixels))
        return {draw: draw.chunks(pool) for draw in needed}

    def draws(self, seed: int, pixels: int) -> tuple[Draw, Draw, Draw]:
        """The pages of a seed: what is tested on is the same for all of them."""
        train, check, test = self.pages[pixels]
        return (
            Draw("train", "train", seed, train, pixels),
            Draw("train", "check", seed, check, pixels),
            Draw("test", "test", 0, test, pixels),
        )


def run_grid(
    plan: Plan,
    encoders: dict[int, Encode],
    drawn: dict[Draw, Iterable[tuple[Array, Array]]],
    *,
    device: torch.device | str = "cpu",
    until: float | None = None,
    progress: bool = False,
) -> Iterator[Row]:
    """Train what a plan names, and give a row for each arm and seed as soon as it is tested.

    Args:
        plan: What to run.
        encoders: A frozen encoder for each seed.
        drawn: The pages of every draw that the plan needs, as `Plan.drawn` gives them.
        device: Where.
        until: The value of `time.monotonic` at which to stop; what is not trained by then has no row.
        progress: Whether bars show what is done.
    """
    encoded: dict[tuple[int, Draw], tuple[Views, Tensor]] = {}
    smooth = any("smooth" in arm.views for arm in plan.arms)

    def features(arm: Arm, seed: int) -> Data:
        parts = []
        for draw in plan.draws(seed, arm.pixels):
            if draw.role == "test":  # every seed's encoder sees these
                drawn[draw] = list(drawn[draw])
            if (seed, draw) not in encoded:
                encoded[seed, draw] = encode_draw(
                    encoders[seed], draw, chunks=drawn[draw], device=device, smooth=smooth, progress=progress
                )
            parts.append(encoded[seed, draw])
        return Data(*parts)

    waiting, active = iter(plan.jobs()), list[_Job]()
    on_gpu = torch.device(device).type == "cuda"
    together, burst = (plan.together, BURST) if on_gpu else (1, 1)
    with counted(len(plan.jobs()), "arms", "arms", shown=progress) as done:
        while until is None or time.monotonic() < until:
            if len(active) < together and (following := next(waiting, None)) is not None:
                arm, seed = following
                active.append(_Job(Training(arm, seed, features(arm, seed), plan.budget)))
            if not active:
                return
            for job in active:
                job.steps(burst)
            for job in [job for job in active if job.training.done == job.training.steps]:
                active.remove(job)
                done(1)
                yield job.row()


class _Job:
    """A training, and what is noted at its start."""

    def __init__(self, training: Training) -> None:
        self.training, self.since = training, time.monotonic()
        self.attention: dict[str, Any] = {}
        self._note("start")

    def steps(self, count: int) -> None:
        """So many steps, or as many as are left; after the first its gradients are noted."""
        for _ in range(min(count, self.training.steps - self.training.done)):
            self.training.step()
            if self.training.done == 1 and isinstance(arm := self.training.model.arm, Enhanced):
                self.training.wait()
                self.attention["gradients"] = gradient_norms(arm.dem)

    def _note(self, when: str) -> None:
        training = self.training
        arm = training.model.arm
        if isinstance(arm, Enhanced):
            views = training.data.check[0]
            few = torch.arange(min(32, len(views)), device=training.device)
            picked = views.pick(few, training.arm.views)
            second = picked[arm.second]
            if arm.second == "thumb":
                second = second[:, None].expand_as(picked["local"])
            self.attention[when] = attention_of(arm.dem, picked["local"], second)

    def row(self) -> Row:
        """What came of it."""
        training, arm = self.training, self.training.arm
        training.wait()
        self._note("end")
        losses = training.losses.tolist()
        every = max(1, len(losses) // 20)
        return {
            "arm": arm.name,
            "table": arm.table,
            "seed": training.seed,
            "pixels": arm.pixels,
            "steps": training.steps,
            "rate": training.budget.rate * arm.rate,
            "curve": training.curve,
            "losses": [round(float(np.mean(losses[i : i + every])), 4) for i in range(0, len(losses), every)],
            "right": packed(training.right(*training.data.test)),
            "blank": {view: packed(training.right(*training.data.test, view)) for view in arm.blanks},
            "attention": self.attention,
            "seconds": round(time.monotonic() - self.since, 2),
        }


@torch.no_grad()
def cost_of_arms(
    arms: tuple[Arm, ...], device: torch.device, dim: int = 160, batch: int = 16
) -> dict[str, dict[str, float]]:
    """What every arm alone costs for one page, its encoder and readout aside.

    Returns:
        parameters: Of the arm.
        operations: Floating-point operations, counted.
        seconds: Median of some calls, in a batch of so many pages.
    """
    found = {}
    for arm in arms:
        side = arm.pixels // GRID // PATCH
        part, times = arm.build(dim).eval(), []

        def call(part: nn.Module, arm: Arm = arm, side: int = side) -> Tensor:
            shapes = {name: (1, *([] if name == "thumb" else [GRID**2]), side, side, dim) for name in arm.views}
            return cast(Tensor, part({name: torch.empty(shape) for name, shape in shapes.items()}))

        operations = cost_of(call, part).operations
        tokens = torch.randn(batch, GRID**2, side, side, dim, device=device)
        views = {name: tokens[:, 0] if name == "thumb" else tokens for name in arm.views}
        part.to(device)
        for _ in range(7):
            since = time.perf_counter()
            part(views)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - since) / batch)
        parameters = sum(p.numel() for p in part.parameters())
        found[arm.name] = {"parameters": parameters, "operations": operations, "seconds": float(np.median(times))}
    return found


def packed(right: Tensor) -> str:
    """Booleans as text."""
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()


def unpacked(text: str, pages: int, questions: int = QUESTIONS) -> Array:
    """What `packed` made of (pages, questions).

    Example:
        >>> right = torch.tensor([[True, False, True], [False, False, True]])
        >>> unpacked(packed(right), 2, 3).tolist() == right.tolist()
        True
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=pages * questions)
    return bits.reshape(pages, questions).astype(bool)
