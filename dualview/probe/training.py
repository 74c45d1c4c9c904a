"""Train an arm with its readout on frozen features; on a GPU a step is a graph, and many arms train side by side."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.kernels.dispatch import use_backend
from dualview.probe.arms import Arm
from dualview.probe.features import Views
from dualview.probe.readout import Readout

ANSWER = 7
"""Column of a question that holds the answer."""


@dataclass(frozen=True)
class Budget:
    """What every arm gets.

    Attributes:
        steps: Of AdamW (betas .9 and .98, decay .01), after 5 % of warm-up by a cosine.
        batch: Pages of 336 pixels in a step, all their questions with them; of 1008 a third.
        rate: Highest learning rate.
        points: Of the curve, besides the end.
    """

    steps: int = 3000
    batch: int = 64
    rate: float = 1e-3
    points: int = 10


@dataclass
class Data:
    """Features and questions of one seed: to train on, to check on, to test on."""

    train: tuple[Views, Tensor]
    check: tuple[Views, Tensor]
    test: tuple[Views, Tensor]


class Answering(nn.Module):
    """An arm and its readout. Views and questions (B, Q, 10) to logits (B, Q, answers)."""

    def __init__(self, arm: Arm, data: Data) -> None:
        super().__init__()
        dim = data.train[0].thumb.shape[-1]
        self.arm, self.readout = arm.build(dim), Readout(dim, arm.pixels)

    def forward(self, views: dict[str, Tensor], questions: Tensor) -> Tensor:
        return cast(Tensor, self.readout(self.arm(views), questions))


class Training:
    """One arm and one seed, trained step by step.

    Args:
        arm: Which arm.
        seed: Of the weights and of the order of pages; the same order for every arm.
        data: What to train on.
        budget: How long.
    """

    def __init__(self, arm: Arm, seed: int, data: Data, budget: Budget) -> None:
        self.arm, self.seed, self.data, self.budget = arm, seed, data, budget
        self.device = data.train[1].device
        self.steps = round(budget.steps * arm.times)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(arm.name.encode()) + seed)
            self.model = Answering(arm, data).to(self.device)
        self.parameters = list(self.model.parameters())
        batch = min(budget.batch * 336 // arm.pixels, len(data.train[0]))
        self.order = _batches(len(data.train[0]), batch, self.steps, seed).to(self.device)
        rate, warm = budget.rate * arm.rate, max(1, self.steps // 20)
        rates = [rate * min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * s / self.steps))) for s in range(self.steps)]
        self.rates = torch.tensor(rates, device=self.device)
        self.rate = torch.zeros((), device=self.device)
        self.losses = torch.zeros(self.steps, device=self.device)
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.rate, betas=(0.9, 0.98), weight_decay=0.01, capturable=on_gpu, fused=on_gpu
        )
        self.done, self.curve = 0, list[tuple[int, float]]()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if on_gpu else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    def step(self) -> None:
        """One step; on a GPU the third one records a graph, which later ones repeat."""
        if self.stream is None:
            self._step()
        else:
            with torch.cuda.stream(self.stream):
                if self.done == 2:
                    self.graph = torch.cuda.CUDAGraph()
                    self.graph.capture_begin(capture_error_mode="thread_local")
                    self._step()
                    self.graph.capture_end()
                if self.graph is None:
                    self._step()
                else:
                    self.graph.replay()
        self.done += 1
        if self.done % max(1, self.steps // self.budget.points) == 0 or self.done == self.steps:
            right = self.right(*self.data.check)
            self.curve.append((self.done, float(right.float().mean())))

    def _step(self) -> None:
        views, questions = self.data.train
        index = self.order.index_select(0, self.at)[0]
        asked = questions.index_select(0, index)
        with use_backend("torch"):
            logits = self.model(views.pick(index, self.arm.views), asked)
        loss = F.cross_entropy(logits.flatten(0, 1), asked[..., ANSWER].flatten())
        if gradients := [p.grad for p in self.parameters if p.grad is not None]:
            torch._foreach_zero_(gradients)  # in place: a graph keeps their addresses
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=self.stream is not None)
        self.rate.copy_(self.rates.index_select(0, self.at)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.at, loss.detach()[None])
        self.at += 1

    @torch.no_grad()
    def right(self, views: Views, questions: Tensor, blank: str | None = None) -> Tensor:
        """Which questions are answered rightly, (pages, questions); a view named ``blank`` is replaced by its mean."""
        right = []
        self.model.eval()
        stream = torch.cuda.stream(self.stream) if self.stream is not None else use_backend("torch")
        with stream, use_backend("torch"):
            for index in torch.arange(len(questions), device=self.device).split(256):
                picked = views.pick(index, self.arm.views)
                if blank is not None:
                    picked[blank] = mean_of(views, blank).expand_as(picked[blank])
                asked = questions.index_select(0, index)
                right.append(self.model(picked, asked).argmax(-1) == asked[..., ANSWER])
            whole = torch.cat(right).cpu()
        self.model.train()
        return whole

    def wait(self) -> None:
        """Return when the GPU has done all steps."""
        if self.stream is not None:
            self.stream.synchronize()


def mean_of(views: Views, name: str) -> Tensor:
    """The mean token of a view, what stands for one that is blank."""
    flat = getattr(views, name).flatten(0, -2)
    return cast(Tensor, flat[:: max(1, len(flat) // 100_000)].float().mean(0))


def _batches(count: int, batch: int, steps: int, seed: int) -> Tensor:
    """Which pages each step has: (steps, batch), every page once before any comes again."""
    random = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch // count)
    order = torch.cat([torch.randperm(count, generator=random) for _ in range(rounds)])
    return order[: steps * batch].view(steps, batch)
