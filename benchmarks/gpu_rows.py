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
from benchmarks.measure import Place, Run

WRONG = 2.0
"""Largest error against float64, as a multiple of that of the loop over tiles in the same type."""


@dataclass
class Rows:
    """What is measured, in order, until the time is over.

    Attributes:
        place: Where, and in which type.
        deadline: `time.perf_counter` after which nothing is measured.
        rounds: Samples of each time.
        found: The rows: suite, case, params, side, eager_ms, graph_ms, peak_bytes, error, missing.
    """

    place: Place
    deadline: float
    rounds: int = 5
    found: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self,
        suite: str,
        case: str,
        params: dict[str, Any],
        sides: dict[str, Run],
        exact: Any = None,
        reference: str | None = None,
        other: str = "",
        graphs: bool = True,
    ) -> None:
        """Measure the sides of one case.

        Args:
            suite: The kind of case.
            case: Its name.
            params: What the name stands for.
            sides: What is run.
            exact: Values in float64 that all sides are compared with; None where values are compared elsewhere.
            reference: The side whose error is taken for unavoidable; it comes first.
            other: A side that computes another function.
            graphs: Whether the sides are captured, too.
        """
        allowed = None
        for name, run in sides.items():
            row = {"suite": suite, "case": case, "params": params, "side": name}
            row |= dict.fromkeys(("eager_ms", "graph_ms", "peak_bytes", "error", "missing", "no_graph"))
            self.found.append(row)
            try:
                if time.perf_counter() > self.deadline:
                    raise peers.Missing("the time of this call was over")
                value = run()
                if exact is not None and name != other:
                    error = errors(value, exact)
                    row["error"] = min(error, 1e9)  # JSON knows no infinity
                    allowed = error if name == reference else allowed
                    if allowed is not None and not error <= WRONG * allowed + 1e-6:
                        row["missing"] = f"wrong: error {error:.1e}, and {allowed:.1e} of the {reference}"
                        continue
                del value
                row["eager_ms"] = milliseconds(run, self.place.device, self.rounds)
                row["peak_bytes"] = measure.peak_bytes(run, self.place.device)
            except peers.Missing as reason:
                row["missing"] = str(reason)
            except Exception as error:  # whatever a library raises: its row says so, and the others are measured
                row["missing"] = f"failed: {described(error)}"
            else:
                if graphs:
                    self._as_graph(row, run)
            finally:
                print(shown(row), flush=True)
        self.release()

    def _as_graph(self, row: dict[str, Any], run: Run) -> None:
        try:
            row["graph_ms"] = milliseconds(captured(run, self.place.device), self.place.device, self.rounds)
        except Exception as error:
            row["no_graph"] = described(error)
            if self.place.device == "cuda":
                torch.cuda.synchronize()

    def release(self) -> None:
        """Forget a case: its tensors, its graphs, and what was compiled for it."""
        gc.collect()
        torch.compiler.reset()
        if self.place.device == "cuda":
            torch.cuda.empty_cache()


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


def quietly(section: Callable[[], None], name: str) -> None:
    """Run a section; what it cannot even prepare is printed, and the next one follows."""
    try:
        section()
    except Exception as error:
        print(f"{name}: failed: {described(error)}", flush=True)
