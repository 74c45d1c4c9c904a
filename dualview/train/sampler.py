"""The order of rows: it depends on seed and epoch alone, so that a resumed run goes on in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from dualview.train.dataset import split_by_kind


class EpochSampler(Sampler[int]):
    """Rows in random order, those of a batch of about one length where lengths are given.

    Rows with and without an image come in batches of their own, as in the released training code; what is left of
    both at the end of an epoch is mixed.

    Args:
        count: Number of rows.
        batch_size: Rows of one step of the optimiser, over all processes.
        seed: Of the order.
        lengths: About how many tokens each row has, negative without an image; None for an order that is random.

    Example:
        >>> sorted(EpochSampler(4, batch_size=2, seed=0))
        [0, 1, 2, 3]
    """

    def __init__(self, count: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.count, self.batch_size, self.seed, self.lengths = count, batch_size, seed, lengths
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=generator).tolist())
        batches, rest = [], []
        for kind in split_by_kind(self.lengths):
            lengths = [abs(self.lengths[index]) for index in kind]
            order = [kind[i] for i in _grouped(lengths, self.batch_size, generator)]
            whole = len(order) - len(order) % self.batch_size
            batches += [order[i : i + self.batch_size] for i in range(0, whole, self.batch_size)]
            rest += order[whole:]
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([index for batch in mixed for index in batch] + rest)


def _grouped(lengths: list[int], batch_size: int, generator: torch.Generator) -> list[int]:
    return list(get_length_grouped_indices(lengths, batch_size, generator=generator)) if lengths else []


class TellEpoch(TrainerCallback):
    """Tells the sampler which epoch begins: also after a resume, and behind whatever accelerate wraps it in."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first row of an epoch is drawn."""
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)
