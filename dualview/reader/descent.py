"""The optimiser that the tower, stage 0 and the regression share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Descent:
    """AdamW (betas .9 and .98) under a linear warm-up and a cosine, with gradients of a norm of at most 1.

    Args:
        parameters: What is trained.
        learning_rate: The highest.
        steps: How many there will be.
        warm_up: Steps in which the rate rises.
        decay: Weight decay.
        watch: Called with step and loss.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        learning_rate: float,
        steps: int,
        *,
        warm_up: int = 60,
        decay: float = 0.02,
        watch: Callable[[int, float], None] | None = None,
    ) -> None:
        self.parameters, self.watch, self.done = parameters, watch, 0
        self.rates = [
            learning_rate * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for step in range(steps)
        ]
        self.optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=decay)

    def step(self, loss: Tensor) -> None:
        """One step down a loss, a scalar."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.done]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.watch is not None:
            self.watch(self.done, float(loss.detach()))
        self.done += 1
