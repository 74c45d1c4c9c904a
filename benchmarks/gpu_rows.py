"""Rows of a GPU: every side eager and as a CUDA graph, its values and gradients compared before its time counts."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.children import described
from benchmarks.gpu_process import RUNNING
from benchmarks.measure import Place, Run

WRONG = 2.0
"""Largest error against float64, as a multiple of that of the loop over tiles in the same type."""
MOST = 0.5
"""Largest error of any side: wrong ones err by 1 and more, and sums of few numbers may cancel."""


@dataclass
class Rows:
    """What is measured, in order, until the time is over.

    Attributes:
        place: Where, and in which type.
        deadline: `time.monotonic` after which nothing is measured.
        rounds: Samples of each time.
        found: The rows: suite, case, params, side, eager_ms, graph_ms, peak_bytes, error, missing.
        keep: Called whenever a row is begun or has its figures.
    """

    place: Place
    deadline: float
    rounds: int = 5
    found: list[dict[str, Any]] = field(default_factory=list)
    keep: Callable[[], None] = lambda: None

    def measure(
        self,
        suite: str,
        case: str,
        params: dict[str, Any],
        sides: dict[str, Run],
        exact: Callable[[], Any] | None = None,
        reference: str | None = None,
        other: str = "",
        graphs: bool = True,
    ) -> None:
        """Measure the sides of one case, but those that have a row.

        Args:
            suite: The kind of case.
            case: Its name.
            params: What the name stands for.
            sides: What is run.
            exact: Gives the values in float64 that all sides are compared with; None where none are compared.
            reference: The side whose error is taken for unavoidable: it comes first, where there are ``exact`` values.
            other: A side that computes another function.
            graphs: Whether the sides are captured, too.
        """
        known = {row["side"]: row for row in self.found if (row["suite"], row["case"]) == (suite, case)}
        true: Any = None
        for name, run in sides.items():
            if name in known:
                continue
            row = known[name] = {"suite": suite, "case": case, "params": params, "side": name}
            row |= dict.fromkeys(("eager_ms", "graph_ms", "peak_bytes", "error", "missing", "no_graph"))
            row["missing"] = RUNNING
            self.found.append(row)
            self.keep()
            try:
                if time.monotonic() > self.deadline:
                    raise peers.Missing("the time of this call was over")
                value = run()
                if exact is not None and name != other:
                    true = exact() if true is None else true
                    self._compare(row, value, true, known.get(reference or ""))
                del value
                row["eager_ms"] = milliseconds(run, self.place.device, self.rounds)
                row["peak_bytes"] = measure.peak_bytes(run, self.place.device)
            except peers.Missing as reason:
                row["missing"] = str(reason)
            except Exception as error:  # whatever a library raises: its row says so, and the others are measured
                row["missing"] = f"failed: {described(error)}"
                self.go_on_only_if_the_device_answers()
            else:
                row["missing"] = None
                if graphs:
                    row["no_graph"] = RUNNING
                    self.keep()
                    self._as_graph(row, run)
            finally:
                print(shown(row), flush=True)
                self.keep()
        self.release()

    def _compare(self, row: dict[str, Any], value: Any, true: Any, reference: dict[str, Any] | None) -> None:
        """Note the error of a side; raise `peers.Missing` if it is much larger than that of the reference."""
        error = errors(value, true)
        row["error"] = min(error, 1e9)  # JSON knows no infinity
        if reference is None or reference["error"] is None:
            raise peers.Missing("not compared: the side that all are compared with has no values")
        if not error <= min(WRONG * reference["error"] + 1e-6, MOST):
            raise peers.Missing(f"wrong: error {error:.1e}, and {reference['error']:.1e} of the {reference['side']}")

    def go_on_only_if_the_device_answers(self) -> None:
        """After some errors a GPU does nothing more for a process: another one has to go on.

        Raises:
            SystemExit: The GPU does not answer.
        """
        if self.place.device == "cuda":
            try:
                torch.ones(8, device="cuda").sum().item()
            except Exception as error:
                raise SystemExit(f"the GPU does not answer: {described(error)}") from error

    def _as_graph(self, row: dict[str, Any], run: Run) -> None:
        try:
            row["graph_ms"] = milliseconds(measure.captured(run, self.place.device), self.place.device, self.rounds)
            row["no_graph"] = None
        except Exception as error:
            row["no_graph"] = described(error)
            self.go_on_only_if_the_device_answers()

    def release(self) -> None:
        """Forget a case: its tensors, its graphs, and what was compiled for it."""
        gc.collect()
        torch.compiler.reset()
        if self.place.device == "cuda":
            torch.cuda.empty_cache()


def milliseconds(run: Run, device: str, rounds: int) -> float:
    """The median of some samples, each of a hundredth of a second at least."""
    run()
    once = measure.seconds_of(run, device)
    calls = max(1, int(measure.SAMPLE_SECONDS / once))
    return 1000 * statistics.median(measure.seconds_of(run, device, calls) for _ in range(rounds))


def errors(value: Any, exact: Any) -> float:
    """The largest relative error of any tensor, by its norm; infinite where there is none or it is not finite."""
    found = [_error(x, y) for x, y in zip(_listed(value), _listed(exact), strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in found)


def _error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm().clamp_min(1e-30)) if x.shape == y.shape else float("inf")


def _listed(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def shown(row: dict[str, Any]) -> str:
    """A row in one line."""
    times = [f"{name} {row[key]:.3f} ms" for name, key in (("eager", "eager_ms"), ("graph", "graph_ms")) if row[key]]
    more = [f"error {row['error']:.1e}"] if row["error"] is not None else []
    more += [f"missing: {row['missing']}"] if row["missing"] else []
    more += [f"no graph: {row['no_graph']}"] if row["no_graph"] else []
    return f"{row['suite']}: {row['case']}: {row['side']}: {', '.join(times + more)}"
