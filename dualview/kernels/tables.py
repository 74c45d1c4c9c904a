"""Tables of indices, made once and kept on the device where they are used: later calls copy nothing from the host.

That makes calls of small batches faster, and lets a CUDA graph capture them: only a table's first call needs the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVarTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

Ts = TypeVarTuple("Ts")

_kept: dict[Hashable, Tensor] = {}
"""Without a bound, for a captured graph may hold an address: a few tables for every grid and size of map."""


def table(make: Callable[[torch.device, *Ts], Tensor], *args: *Ts, like: Tensor) -> Tensor:
    """What ``make`` makes of a device and hashable arguments, on the device of ``like``. Not to be written into.

    Where the call is traced, or ``like`` is a fake tensor, the table is made for this call alone.

    Example:
        >>> table(index_tensor, (2, 0, 1), like=torch.zeros(1))
        tensor([2, 0, 1])
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return make(like.device, *args)
    key: Any = (make, like.device, args)
    if (found := _kept.get(key)) is not None:
        return found
    # What is kept must be of use later: neither an inference tensor, which no backward pass may save, nor a fake one.
    with torch.inference_mode(False), unset_fake_temporarily():
        made = make(torch.device("cpu"), *args).to(like.device)
    ordinary = type(made) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(made)
    return _kept.setdefault(key, made) if ordinary else made  # of two threads that miss, both get the same table


def index_tensor(device: torch.device, indices: tuple[int, ...]) -> Tensor:
    """Indices one by one."""
    return torch.tensor(indices, dtype=torch.long, device=device)
