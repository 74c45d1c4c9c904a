"""From a case to rows: check the values, time all sides in turn, meter their memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import measure, results
from benchmarks.cases import OURS, Case, Comparison, Size, registry
from benchmarks.measure import Limits, Place, Run
from benchmarks.peers import Missing

SEED = 0
GATE = (
    "tests/ops",
    "tests/models/test_dual_view_encoder.py",
    "tests/models/test_view_plan.py",
    "tests/test_benchmarks.py",
)


def gate() -> str:
    """Run the tests that the figures rest on; figures of wrong code are worth nothing."""
    two = ["--numprocesses", "2", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *two, *GATE]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        raise SystemExit("The tests are not green, so nothing is measured (--no-gate measures all the same).")
    return "passed"


def run(
    place: Place,
    size: Size,
    *,
    gate: str,
    suites: tuple[str, ...] = (),
    deadline: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure all cases of a size, or some of them; ``deadline`` in seconds from now leaves the rest out.

    ``suites`` holds names of suites, or of cases: ``"prefix: n=3"`` is every case of that suite with n=3 in its name,
    and with a full stop at its end a name stands for itself alone.
    """
    start = time.perf_counter()
    cases = [case for case in registry(size) if not suites or any(_asked(case, name) for name in suites)]
    if not cases:
        known = sorted({case.suite for case in registry(size)})
        raise SystemExit(f"no case of the {size} selection is called {' or '.join(suites)}; the suites are {known}.")
    document = results.header(place.device, place.dtype, " ".join((size, *suites)), gate, SEED)
    rows, reached = [], measure.limits(place)
    with tqdm(cases, disable=not progress) as bar:
        for case in bar:
            bar.set_postfix_str(f"{case.suite}: {case.name}")
            late = deadline is not None and time.perf_counter() - start > deadline
            try:
                rows += late_rows(case, deadline) if late else rows_of(case, place, size)
            except Exception as error:  # such as too little memory for our side: what is measured is not lost
                rows.append(_empty_row(case, OURS, _failed(error)))
            _release(place)
    reached = reached.best(measure.limits(place))
    for row in rows:
        _set_against(row, reached)
    document |= {"limits": asdict(reached), "meters": measure.METERS, "rows": rows}
    document["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    results.check(document)
    return document


def _asked(case: Case, name: str) -> bool:
    suite, _, part = name.partition(":")
    exact = part.endswith(".")  # "dem: released, n=3: forward." is that case alone
    return case.suite == suite.strip() and (part.strip(" .") == case.name if exact else part.strip() in case.name)


def prepare(case: Case, place: Place) -> Comparison:
    """The sides of a case, from the same random numbers every time."""
    torch.manual_seed(SEED)
    return case.build(place)


def agreeing(comparison: Comparison) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Run every side once, which also warms it up, and sort them.

    Returns:
        The sides to time, the difference of values of each peer, and why the others are missing.
    """
    ours = comparison.sides[OURS]()
    timed, differences, missing = {OURS: comparison.sides[OURS]}, {}, {}
    for name, side in comparison.sides.items():
        if name == OURS:
            continue
        try:
            theirs = side()
        except Missing as reason:
            missing[name] = str(reason)
        except Exception as error:  # whatever a library raises: its row says so, and the others are measured
            missing[name] = _failed(error)
        else:
            if name not in comparison.other:
                differences[name] = measure.difference(ours, theirs)
                if not differences[name] <= comparison.tolerance:
                    missing[name] = f"values differ by {differences[name]:.1e}, more than {comparison.tolerance:.0e}"
                    continue
            timed[name] = side
    return timed, differences, missing


def _failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def rows_of(case: Case, place: Place, size: Size) -> list[dict[str, Any]]:
    """Measure one case."""
    comparison = prepare(case, place)
    timed, differences, missing = agreeing(comparison)
    budget, rounds = {"tiny": (0.0, (1, 1)), "quick": (1.0, (3, 50)), "full": (20.0, (3, 50)), "gpu": (2.0, (3, 50))}[
        size
    ]
    spreads = measure.interleaved(timed, place.device, budget=budget, rounds=rounds)
    if case.process and place.device == "cpu":
        meter, peaks = "child", {name: child_peak(case, place, size, name) for name in timed}
    else:
        meter, peaks = place.device, {name: measure.peak_bytes(run, place.device) for name, run in timed.items()}
    rows = []
    for name in comparison.sides:
        seconds, peak = spreads.get(name), peaks.get(name)
        row = _empty_row(case, name, missing.get(name))
        row["role"] = "ours" if name == OURS else "other function" if name in comparison.other else "peer"
        row["difference"] = _finite(differences.get(name))
        row["tolerance"] = None if name == OURS or name in comparison.other else comparison.tolerance
        row["target"] = comparison.targets.get(name)
        row["memory_target"] = comparison.memory_targets.get(name)
        if seconds is not None and peak is not None:
            row |= {"seconds": asdict(seconds), "peak_bytes": peak, "meter": meter}
            row["ratio"] = seconds.median / spreads[OURS].median
            row["memory_ratio"] = peak / peaks[OURS] if peaks[OURS] > 0 else None
        if name == OURS and comparison.work is not None:
            row |= {"operations": comparison.work.operations, "moved_bytes": comparison.work.moved}
        rows.append(row)
    return rows


def _set_against(row: dict[str, Any], reached: Limits) -> None:
    """Compare the time of our side with the least that this machine needs for its work."""
    if row["operations"] is not None:
        row["limit_seconds"] = reached.seconds(row["operations"], row["moved_bytes"])
        row["fraction"] = row["limit_seconds"] / row["seconds"]["median"]


def late_rows(case: Case, deadline: float | None) -> list[dict[str, Any]]:
    """The row of a case that there was no time for."""
    return [_empty_row(case, OURS, f"not run: the {deadline:.0f} seconds of this call were over")]


def _empty_row(case: Case, side: str, missing: str | None) -> dict[str, Any]:
    row = dict.fromkeys(results.ROW)
    return row | {
        "suite": case.suite, "case": case.name, "params": case.params, "side": side, "role": "ours", "missing": missing
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None


def child_peak(case: Case, place: Place, size: Size, side: str) -> int:
    """High-water mark of a process that builds the case and runs one side of it once."""
    given = (size, case.suite, case.name, side, str(place.dtype).removeprefix("torch."), torch.get_num_threads())
    code = f"from benchmarks.runner import child; child(*{given!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def child(size: Size, suite: str, name: str, side: str, dtype: str, threads: int) -> None:
    """Run in a process of its own: one side once, then print the high-water mark in bytes.

    Of itself it is read from /proc, for ru_maxrss begins with what the parent held; of its children, which were started
    by a small process, it is ru_maxrss.
    """
    import resource

    case = next(case for case in registry(size) if (case.suite, case.name) == (suite, name))
    torch.set_num_threads(threads)
    prepare(case, Place(dtype=getattr(torch, dtype))).sides[side]()
    if suite == "import_time":
        kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    else:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    print(kilobytes * 1024)


def _release(place: Place) -> None:
    """Forget a case: its tensors, and what was compiled for it."""
    gc.collect()
    torch.compiler.reset()
    if place.device == "cuda":
        torch.cuda.empty_cache()
