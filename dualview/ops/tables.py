"""Tables of indices, made once and kept on the device where they are used: later calls copy nothing from the host.

That makes calls of small batches faster, and lets a CUDA graph capture them: only a table's first call needs the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TypeVarTuple

import torch
from torch import Tensor, nn

Ts = TypeVarTuple("Ts")


def table(make: Callable[[torch.device, *Ts], Tensor], *args: *Ts, like: Tensor) -> Tensor:
    """What ``make`` makes of a device and hashable arguments, for the device of ``like``. Not to be written into.

    Where the call is traced, or ``like`` is a fake tensor, the table is made on the spot and not kept.

    Example:
        >>> table(listed, (2, 0, 1), like=torch.zeros(1))
        tensor([2, 0, 1])
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return make(like.device, *args)
    with _one_at_a_time:
        return _kept(make, like.device, args)


_one_at_a_time = Lock()
"""Two threads that miss would make two tables, of which one would be freed while it is in use."""


@cache  # without a bound: a captured graph may hold the address. A few tables for every grid and size of map
def _kept(make: Callable[..., Tensor], device: torch.device, args: tuple[Hashable, ...]) -> Tensor:
    """A table that outlives the call, complete on the device when this returns.

    It is made in a thread of its own, which knows nothing of what the caller is in the middle of, such as inference
    mode, fake tensors or a function transform: a tensor of these would be of no use later.
    """
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(lambda: make(torch.device("cpu"), *args).to(device)).result()


def listed(device: torch.device, indices: tuple[int, ...]) -> Tensor:
    """Indices one by one."""
    return torch.tensor(indices, device=device)
