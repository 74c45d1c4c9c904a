"""Time, memory, agreement of values, and what the machine can do at most. Devices are parameters throughout."""

from __future__ import annotations

import contextlib
import math
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dualview.terminal import native_messages_dropped

Run = Callable[[], Any]
SAMPLE_SECONDS = 1e-2
"""Shortest sample: faster calls are repeated, so that neither the clock nor what ran before matters."""

LONG_SECONDS = 5.0

METERS = {
    "cpu": "running sum of the CPU allocator's events, as torch.profiler reports them (kernels' scratch space too)",
    "cuda": "torch.cuda.max_memory_allocated",
    "child": "high-water mark of the resident memory of a child process",
}


@dataclass(frozen=True)
class Place:
    """Where a case runs, and in which type."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def randn(self, *shape: int) -> Tensor:
        """Normally distributed numbers, the same in every type but for rounding."""
        return torch.randn(shape, device=self.device).to(self.dtype)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample of seconds."""

    median: float
    q1: float
    q3: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Of at least one sample."""
        q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(statistics.median(seconds), q1, q3, len(seconds))


def seconds_of(run: Run, device: str, calls: int = 1) -> float:
    """Seconds per call: by CUDA events on a GPU, by the clock elsewhere."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def captured(run: Run, device: str) -> Run:
    """The call as a CUDA graph; on a CPU, where there are none, the call itself."""
    if device != "cuda":
        return run
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def interleaved(sides: dict[str, Run], device: str, *, budget: float, rounds: tuple[int, int]) -> dict[str, Spread]:
    """Time all sides in turn, so that a change of the machine's speed meets all of them.

    Every round has an order of its own, and a side is called once, untimed, before its sample: what the one before left
    in the caches and in the allocator would count as its time. A call of more than `LONG_SECONDS` is a sample itself.

    Args:
        sides: What to time; every side has been run before, so nothing is compiled or allocated for the first time.
        device: Where it runs.
        budget: Seconds after which no further round is started.
        rounds: Least and most rounds, whatever the budget.
    """
    start, order, shuffle = time.perf_counter(), list(sides), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > budget:
            break
        shuffle(order)
        for name in order:
            once = seconds_of(sides[name], device)
            calls = int(SAMPLE_SECONDS / once) + 1
            samples[name].append(once if once > LONG_SECONDS else seconds_of(sides[name], device, calls))
    return {name: Spread.of(seconds) for name, seconds in samples.items()}


def peak_bytes(run: Run, device: str) -> int:
    """Most bytes held at one time during a call, beyond those held before it; the result counts."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's library logs every start and stop to the file descriptor itself.
    with native_messages_dropped(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()  # noqa: F841 - alive until the meter stops
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of any element, relative to the largest element of its tensor; inf for different shapes.

    A tensor whose elements are below a thousandth of the largest of all is measured against that thousandth: gradients
    that are zero but for rounding have no scale of their own.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(_tensors(ours), _tensors(theirs), strict=True)]
    floor = max((float(b.abs().max()) for _, b in pairs), default=0.0) / 1000 or 1.0
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    found = [float((a - b).abs().max()) / max(float(b.abs().max()), floor) for a, b in pairs if a.numel()]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else float("inf")


def _tensors(value: Any) -> list[Tensor]:
    if value is None or isinstance(value, Tensor):
        return [] if value is None else [value]
    return [tensor for part in value for tensor in _tensors(part)]


@dataclass(frozen=True)
class Limits:
    """What this machine reaches in the two things that bound everything else."""

    copy_bytes_per_s: float
    matmul_ops_per_s: float

    def best(self, other: Limits) -> Limits:
        """The higher of both, as measured at two times."""
        return Limits(
            max(self.copy_bytes_per_s, other.copy_bytes_per_s), max(self.matmul_ops_per_s, other.matmul_ops_per_s)
        )

    def seconds(self, operations: float, moved: float) -> float:
        """Least time for so many operations and bytes, done at the same time."""
        return max(operations / self.matmul_ops_per_s, moved / self.copy_bytes_per_s)


def limits(place: Place) -> Limits:
    """Bytes (read and written) per second of copying 256 MiB, operations per second of a matrix product.

    The fastest of several: what slows the machine down for a moment does not change what it can do at most.
    """
    source = torch.ones(2**28, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    # A GPU is not full with less; half types are slow on a CPU.
    side = 8192 if place.device == "cuda" else 2048 if place.dtype == torch.float32 else 256
    a, b = place.randn(side, side), place.randn(side, side)
    for run in (warm := (lambda: target.copy_(source), lambda: a @ b)):
        run()
    copied, multiplied = (
        min(seconds_of(run, place.device, 20 if place.device == "cuda" else 1) for _ in range(9)) for run in warm
    )
    return Limits(2 * source.numel() / copied, 2 * side**3 / multiplied)


def free_bytes(device: str) -> int:
    """Bytes of the GPU, or of the computer, that a program could still get."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min(of_proc("meminfo", "MemAvailable"), _of_cgroup())


def _of_cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a container leaves; more than any machine has where it sets no limit."""
    try:
        most, held = (int((folder / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroup, or "max"
        return sys.maxsize
    return max(0, most - held)


def of_proc(file: str, field: str) -> int:
    """A field of a file of /proc that is given in kB, in bytes."""
    return int(Path("/proc", file).read_text(encoding="utf-8").partition(f"{field}:")[2].split()[0]) * 1024


@contextlib.contextmanager
def held_to(more: int) -> Iterator[None]:
    """Let this process get so many more bytes: beyond, its allocators fail as they do at the end of the memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (of_proc("self/status", "VmData") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator failed."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
