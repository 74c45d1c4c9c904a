"""One side of a case in a process of its own: its high-water mark, or its time too, or how it fails.

The process is told the case by its name, and builds it from the same random numbers.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import measure
from benchmarks.cases import Case, Size, prepare, registry
from benchmarks.measure import Place, Run

TOO_LONG = 60.0
"""Seconds of a call after which it is not repeated."""

WARM = 1.0
"""Seconds of a first call after which it counts: what a process does only once is little beside it."""

BUDGETS = {"tiny": 0.0, "quick": 0.0, "full": 5.0}
"""Seconds for the samples of a side that is measured alone; there are at least two."""


def high_water(case: Case, place: Place, size: Size, side: str) -> int:
    """High-water mark, in bytes, of a process that runs a side once."""
    done = _start("run_once", case, place, size, side)
    if done.returncode:
        raise RuntimeError(f"the process for the memory of {side!r} ended with {done.returncode}: {_last_line(done)}")
    return int(done.stdout.split()[-1])


def run_once(size: Size, suite: str, name: str, side: str, dtype: str, threads: int) -> None:
    """Run in a process of its own: one side once, then print the high-water mark.

    Of itself it is read from /proc, for ru_maxrss begins with what the parent held; of its children, which were started
    by a small process, it is ru_maxrss.
    """
    _, run = _side(size, suite, name, side, dtype, threads)
    run()
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(of_children if suite == "import_time" else measure.of_proc("self/status", "VmHWM"))


def alone(case: Case, place: Place, size: Size, side: str, memory: int | None = None) -> dict[str, Any]:
    """Time and peak memory of a side, or the reason why there are none, as fields of a row.

    Args:
        case: The case.
        place: On a CPU the side has a process of its own; a GPU's memory ends by itself.
        size: The selection that the case is of.
        side: The side.
        memory: Bytes that the process may get, if less than what is free when it starts.
    """
    if place.device == "cuda":
        return _outcome(prepare(case, place).sides[side], place, size, case, measure.free_bytes("cuda"))
    done = _start("run_alone", case, place, size, side, memory)
    if done.returncode:
        return {"missing": f"failed at n = {case.params['n']}: exit status {done.returncode}: {_last_line(done)}"}
    fields: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return fields


def run_alone(size: Size, suite: str, name: str, side: str, dtype: str, threads: int, memory: int | None) -> None:
    """Run in a process of its own that may get no more than the memory that is free; print what `alone` returns."""
    case, run = _side(size, suite, name, side, dtype, threads)
    free = measure.free_bytes("cpu")
    most = free if memory is None else min(free, memory)
    with measure.held_to(most):
        fields = _outcome(run, Place(), size, case, most)
    print(json.dumps(fields))


def _outcome(run: Run, place: Place, size: Size, case: Case, most: int) -> dict[str, Any]:
    try:
        if place.device == "cuda":
            peak, meter = measure.peak_bytes(run, "cuda"), "cuda"
        samples = _samples(run, place.device, BUDGETS[size])
        if place.device == "cpu":
            peak, meter = measure.of_proc("self/status", "VmHWM"), "child"
    except Exception as error:
        reason = described(error)
        if measure.out_of_memory(error):
            reason = f"needs more than {most / 2**30:.1f} GiB ({reason})"
        return {"missing": f"failed at n = {case.params['n']}: {reason}"}
    return {"seconds": asdict(measure.Spread.of(samples)), "peak_bytes": peak, "meter": meter}


def _samples(run: Run, device: str, budget: float) -> list[float]:
    """Seconds of calls, one after the other: nothing else runs in between that could leave anything behind."""
    start = time.perf_counter()
    first = measure.seconds_of(run, device)
    samples = [first] if first > WARM else []
    while first < TOO_LONG and (len(samples) < 2 or time.perf_counter() - start < budget):
        samples.append(measure.seconds_of(run, device, int(measure.SAMPLE_SECONDS / first) + 1))
    return samples


def described(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def _last_line(done: Any) -> str:
    return (done.stderr.strip() or "no output").splitlines()[-1][:200]


def _start(function: str, case: Case, place: Place, size: Size, side: str, *more: Any) -> Any:
    given = (size, case.suite, case.name, side, str(place.dtype).removeprefix("torch."), torch.get_num_threads(), *more)
    code = f"from benchmarks.children import {function}; {function}(*{given!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def _side(size: Size, suite: str, name: str, side: str, dtype: str, threads: int) -> tuple[Case, Run]:
    torch.set_num_threads(threads)
    case = next(case for case in registry(size) if (case.suite, case.name) == (suite, name))
    return case, prepare(case, Place(dtype=getattr(torch, dtype))).sides[side]
