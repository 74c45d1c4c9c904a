"""From a case to rows: check the values, time all sides in turn, meter their memory."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import children, measure, peers, results
from benchmarks.cases import KERNELS, OURS, SEED, Case, Comparison, Size, prepare, registry
from benchmarks.measure import Limits, Place, Run

GATE = (
    "tests/ops",
    "tests/models/test_dual_view_encoder.py",
    "tests/models/test_view_plan.py",
    "tests/test_benchmarks.py",
)
BUDGETS = {"tiny": 0.0, "quick": 1.0, "full": 10.0}
"""Seconds for the rounds of a case; short cases have many rounds, and no case has fewer than these."""
LEAST_ROUNDS = {"tiny": 1, "quick": 3, "full": 3}


def gate(device: str) -> str:
    """Run the tests that the figures rest on; figures of wrong code are worth nothing."""
    of_kernels = ("tests/kernels",) if device == "cuda" else ()
    verdict = run_tests("-x", "--numprocesses", "2", "--dist", "loadfile", *GATE, *of_kernels)
    if verdict != "passed":
        raise SystemExit(f"The tests {verdict}, so nothing is measured (--no-gate measures all the same).")
    return verdict


def run_tests(*arguments: str, seconds: float | None = None) -> str:
    """Run pytest with these arguments, for so long at most; "passed", or how it failed, with its output printed."""
    options = ("-q", "-p", "no:cacheprovider", "--confcutdir", "tests")  # above there are examples, not tests
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = ""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # pytest, and the workers that it started
        output, _ = process.communicate()
        late = f"failed: not finished in {seconds:.0f} s"
    if process.returncode == 0:
        return "passed"
    print(output[-6000:], file=sys.stderr, flush=True)
    return late or f"failed: {(output.strip() or 'no output').splitlines()[-1].strip('= ')}"


def run(
    place: Place,
    size: Size,
    *,
    gate: str,
    suites: tuple[str, ...] = (),
    progress: bool = True,
    memory: int | None = None,
) -> dict[str, Any]:
    """Measure all cases of a size, or some of them.

    Args:
        place: Where, and in which type.
        size: Which selection.
        gate: How the tests went.
        suites: Names of suites, or of cases: ``"prefix: n=3"`` is every case of that suite with n=3 in its name, and
            with a full stop at its end a name stands for itself alone.
        progress: Show a bar.
        memory: Bytes that a side which is measured alone may get; None for all that is free.
    """
    cases = [case for case in registry(size) if not suites or any(_asked(case, name) for name in suites)]
    if not cases:
        known = sorted({case.suite for case in registry(size)})
        raise SystemExit(f"no case of the {size} selection is called {' or '.join(suites)}; the suites are {known}.")
    document = results.header(place.device, place.dtype, " ".join((size, *suites)), gate, SEED)
    rows, reached, ended = [], measure.limits(place), {}
    with tqdm(cases, disable=not progress) as bar:
        for case in bar:
            bar.set_postfix_str(f"{case.suite}: {case.name}")
            try:
                if case.alone:
                    rows += rows_alone(case, place, size, ended, memory)
                else:
                    rows += rows_of(case, place, size)
            except Exception as error:  # such as too little memory for our side: what is measured is not lost
                rows.append(_empty_row(case, OURS, f"failed: {children.described(error)}"))
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
        except peers.Missing as reason:
            missing[name] = str(reason)
        except Exception as error:  # whatever a library raises: its row says so, and the others are measured
            missing[name] = f"failed: {children.described(error)}"
        else:
            if name not in comparison.other:
                differences[name] = measure.difference(ours, theirs)
                if not differences[name] <= comparison.tolerance:
                    missing[name] = f"values differ by {differences[name]:.1e}, more than {comparison.tolerance:.0e}"
                    continue
            timed[name] = side
    return timed, differences, missing


def rows_of(case: Case, place: Place, size: Size) -> list[dict[str, Any]]:
    """Measure one case."""
    comparison = prepare(case, place)
    timed, differences, missing = agreeing(comparison)
    spreads = measure.interleaved(timed, place.device, budget=BUDGETS[size], rounds=(LEAST_ROUNDS[size], 50))
    if case.process and place.device == "cpu":
        with ThreadPoolExecutor(2) as pool:  # what they hold does not depend on who else is there
            meter, found = "child", pool.map(partial(children.high_water, case, place, size), timed)
            peaks = dict(zip(timed, found, strict=True))
    else:
        meter, peaks = place.device, {name: measure.peak_bytes(run, place.device) for name, run in timed.items()}
    rows = []
    for name in comparison.sides:
        row = _empty_row(case, name, missing.get(name))
        own = name in (OURS, KERNELS)
        row["role"] = "ours" if own else "other function" if name in comparison.other else "peer"
        row["difference"] = _finite(differences.get(name))
        row["tolerance"] = None if name == OURS or name in comparison.other else comparison.tolerance
        if name in timed:
            row |= {"seconds": asdict(spreads[name]), "peak_bytes": peaks[name], "meter": meter}
            row["target"] = comparison.fraction_target if own else comparison.targets.get(name)
            row["memory_target"] = comparison.memory_targets.get(name)
            if own and comparison.work is not None:
                row |= {"operations": comparison.work.operations, "moved_bytes": comparison.work.moved}
        rows.append(row)
    _set_ratios(rows)
    return rows


def rows_alone(case: Case, place: Place, size: Size, ended: dict[str, str], memory: int | None) -> list[dict[str, Any]]:
    """Measure one case of a sweep, every side in a process of its own, where it may fail.

    A side that failed, or of which one call took too long, is not run again: ``ended`` holds the reasons, and is filled
    here. When all but ours have ended there are no more rows.
    """
    if ended.keys() >= set(case.alone) - {OURS}:
        return []
    rows = []
    for name in case.alone:
        row = _empty_row(case, name, ended.get(name))
        row["role"] = "ours" if name == OURS else "other function"
        if name not in ended:
            row |= children.alone(case, place, size, name, memory)
            _release(place)
        rows.append(row)
    for row in rows:
        if row["missing"] is not None:
            ended.setdefault(row["side"], f"not run: failed in the case {case.name}")
        elif row["seconds"]["median"] > children.TOO_LONG:
            ended[row["side"]] = f"not run: a call took {row['seconds']['median']:.0f} s in the case {case.name}"
    _set_ratios(rows)
    return rows


def _set_ratios(rows: list[dict[str, Any]]) -> None:
    """Time and memory of all sides of a case over ours."""
    ours = next(row for row in rows if row["side"] == OURS)
    for row in rows:
        if ours["seconds"] is not None and row["seconds"] is not None:
            row["ratio"] = row["seconds"]["median"] / ours["seconds"]["median"]
            row["memory_ratio"] = row["peak_bytes"] / ours["peak_bytes"] if ours["peak_bytes"] > 0 else None


def _set_against(row: dict[str, Any], reached: Limits) -> None:
    """Compare the time of our side with the least that this machine needs for its work."""
    if row["operations"] is not None:
        row["limit_seconds"] = reached.seconds(row["operations"], row["moved_bytes"])
        row["fraction"] = row["limit_seconds"] / row["seconds"]["median"]


def _empty_row(case: Case, side: str, missing: str | None) -> dict[str, Any]:
    row = dict.fromkeys(results.ROW)
    return row | {
        "suite": case.suite, "case": case.name, "params": case.params, "side": side, "role": "ours", "missing": missing
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None


def _release(place: Place) -> None:
    """Forget a case: its tensors, and what was compiled for it."""
    gc.collect()
    torch.compiler.reset()
    if place.device == "cuda":
        torch.cuda.empty_cache()
