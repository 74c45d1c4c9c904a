"""Which implementation runs, a Triton kernel or plain torch, and why.

The backend is the first that is given of these: the argument of the call, `use_backend`, the environment variable
DUALVIEW_BACKEND (read when this module is imported), "auto". Only "auto" falls back: "triton" raises where
the kernel cannot run. Nothing here imports triton; a kernel imports it when it is launched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from dualview.arguments import check_choice
from dualview.switches import Switch

Backend: TypeAlias = Literal["auto", "torch", "triton"]
BACKENDS = get_args(Backend)

MEASURED: dict[str, str] = {
    "retile": (
        "measured on an H100: maps of 128 MiB and more by the kernel (stride crop of 324 MiB: 0.256 ms, and 0.566 by "
        "torch), smaller ones by torch, which takes the host less time"
    ),
    "crop_normalize": "measured on an H100: 8 photographs in 0.05 ms within a CUDA graph, and 0.37 ms by torch",
}
"""Why "auto" chooses a kernel, or where: the GPU and the figure by which it beats the best of torch."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
KERNEL_TYPES: dict[str, tuple[torch.dtype, ...]] = {
    "retile": (*FLOATS, torch.float64, torch.bool, *INTEGERS),
    "crop_normalize": (*FLOATS, torch.uint8),
}
"""The kernels, and the types of the tensors that each takes."""

OLDEST = (8, 0)
"""Least compute capability for the kernels: the first with bfloat16 in its matrix units."""


class Choice(NamedTuple):
    """The implementation that runs, and why."""

    name: Literal["torch", "triton"]
    reasons: tuple[str, ...]


_of_environment: Any = check_choice(
    os.environ.get("DUALVIEW_BACKEND", "auto"), "the environment variable DUALVIEW_BACKEND", BACKENDS
)
BACKEND: Switch[tuple[Backend, str]] = Switch("dualview_backend", (_of_environment, "DUALVIEW_BACKEND"))
"""The backend that is asked for, and by what."""
_triton_installed = find_spec("triton") is not None


def use_backend(backend: Backend) -> AbstractContextManager[None]:
    """Within the context, calls that are not told otherwise use this backend.

    In eager code it holds for the thread or the asyncio task that entered the context. In what `torch.compile` compiles
    it holds for the whole process.

    Args:
        backend: "torch"; "triton", which raises where a kernel cannot run; or "auto", which takes a kernel where it can
            run and has been measured to be faster, and torch elsewhere.

    Raises:
        ValueError: ``backend`` is none of the three.

    Example:
        >>> with use_backend("torch"):
        ...     choose("retile", torch.zeros(1)).name
        'torch'
    """
    return BACKEND.holding((check_choice(backend, "backend", BACKENDS), "use_backend"))


def choose(kernel: str, x: Tensor, *, backend: Backend | None = None, refused: Sequence[str] = ()) -> Choice:
    """The implementation for one call, with the reasons.

    Args:
        kernel: A name among `KERNEL_TYPES`.
        x: What the kernel would read.
        backend: What the call asks for; None if nothing.
        refused: Reasons that the caller sees why the kernel cannot run, each with its remedy after a colon.

    Raises:
        RuntimeError: "triton" was asked for, in whatever way, and the kernel cannot run.
        ValueError: ``backend`` is none of the three.
    """
    asked, by = (
        BACKEND.value() if backend is None else (check_choice(backend, "backend", BACKENDS), "the argument of the call")
    )
    if asked == "torch":
        return Choice("torch", (f'backend="torch", by {by}',))
    reasons = (*_refusals(kernel, x), *refused)
    if asked == "triton":
        if reasons:
            raise RuntimeError(
                f'backend="triton" (by {by}), but the kernel {kernel} cannot run. {"; ".join(reasons)}; or use '
                'backend="auto", which falls back to torch.'
            )
        return Choice("triton", (f'backend="triton", by {by}',))
    if not reasons and interpreting():
        reasons = ('under the interpreter a kernel is slow; backend="triton" runs it',)
    return Choice("torch", reasons) if reasons else Choice("triton", (MEASURED[kernel],))


def interpreting() -> bool:
    """Whether triton runs kernels in Python, without a GPU: TRITON_INTERPRET=1, set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for another device."""
    return _capability(device) if device.type == "cuda" else None


@cache  # asking torch takes longer than all else here
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def is_new(device: torch.device) -> bool:
    """Whether a device is a GPU of at least the capability `OLDEST`. All of these have flash attention, too."""
    found = capability(device)
    return found is not None and found >= OLDEST


# All that torch.compiler.assume_constant_result does, but importing it loads the whole compiler.
for _constant in (interpreting, capability, is_new):
    _constant._dynamo_marked_constant = True  # type: ignore[union-attr]


def runs_on(x: Tensor) -> bool:
    """Whether a kernel can be launched on this tensor, as far as its device is concerned."""
    return _triton_installed and (x.is_cuda or interpreting())


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of ``like``: all outputs and scratch space of the kernels."""
    return like.new_empty(shape, dtype=dtype)


def _refusals(kernel: str, x: Tensor) -> tuple[str, ...]:
    """Why the kernel cannot run, whatever the call is about; empty if it can."""
    reasons = []
    if not _triton_installed:
        reasons.append("triton is not installed: pip install triton, on Linux")
    elif not runs_on(x):
        reasons.append(
            f"the tensor is on {x.device}: move it to a CUDA device, or set TRITON_INTERPRET=1 before triton is "
            "imported to try the kernel without a GPU"
        )
    elif (found := capability(x.device)) is not None and found < OLDEST and not interpreting():
        reasons.append(
            f"the tensor is on a GPU of compute capability {found[0]}.{found[1]}: move it to one of "
            f"{OLDEST[0]}.{OLDEST[1]} or newer"
        )
    if x.dtype not in KERNEL_TYPES[kernel]:
        reasons.append(f"a tensor of {x.dtype}: cast it to one of {', '.join(map(str, KERNEL_TYPES[kernel]))}")
    return tuple(reasons)
