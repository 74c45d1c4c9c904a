"""`python -m benchmarks.gpu` without a GPU: it goes through, nothing that was measured is lost, aims are judged."""

import json
import os
import pickle
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_bars, gpu_process, measure, peers, results, runner
from benchmarks.cases import KERNELS, LOOP, OURS
from benchmarks.gpu_process import RUNNING, ResultFile, keep_running
from benchmarks.gpu_rows import Rows
from benchmarks.measure import Limits, Place
from dualview.kernels import dispatch
from tests import gpu_processes
from tests.ops.planned.test_rates import by_the_gpu_script, compared

CPU = Place()
BFLOAT16 = Place("cpu", torch.bfloat16)
LIMITS = {"copy_bytes_per_s": 1e12, "matmul_ops_per_s": 1e14}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "limits", lambda place: Limits(1e9, 1e9))


def header(gate: str = "skipped: tiny") -> dict[str, Any]:
    return results.header("cpu", torch.bfloat16, "tiny", gate, 0) | {"rates_of": "cpu"}


def test_arrangements_by_hand_are_those_that_differ() -> None:
    """And every one is measured beside "auto"."""
    rows = Rows(BFLOAT16, float("inf"), rounds=1)
    for preset, n in (("released", 3), ("released", 2), ("paper", 3)):
        gpu._enhance(rows, gpu.Sizes(tiny=True), LIMITS, gpu.Step(preset, 1, n=n))
    sides: dict[str, list[str]] = {}
    for row in rows.found:
        sides.setdefault(row["case"], []).append(row["side"].removeprefix(f"{OURS}, "))
    ends = [LOOP, OURS], ["limit of projected operations"]
    assert list(sides.values()) == [
        ends[0] + ways + ends[1]
        for ways in (
            ["projected", "absorbed", "in the fewest launches"],
            ["projected"],  # 3 x 3 tokens of 2 x 2 tiles are too few to be absorbed
            ["projected", "absorbed", "as written"],
        )
    ]


@pytest.mark.more
def test_every_line_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.json"
    gpu.measured(BFLOAT16, True, header(), float("inf"), path, False)
    document = ResultFile.begun(path).document
    assert document["sections"] == {section.__name__: "done" for section in gpu.SECTIONS}
    assert {row["suite"] for row in document["rows"]} == {"dem", "prefix", "ops", "host", "photo"}
    ours = [row for row in document["rows"] if row["side"] in (OURS, LOOP, gpu_bars.BATCHED, gpu_bars.BY_VIEW)]
    # At these sizes errors of absorbed products in bfloat16 vary by more than they may where a figure counts.
    assert all(row["error"] is None or row["error"] < 0.05 for row in ours)
    assert not [row["missing"] for row in ours if row["missing"] and not row["missing"].startswith("wrong: error")]
    assert {(p["n"], p["dtype"], p["mode"]) for row in document["rows"] if (p := row["params"]).get("mode")} == {
        (3, "bfloat16", gpu.ALL_GRADIENTS),
        *(
            (n, dtype, mode)
            for n in (2, 3)
            for dtype in ("bfloat16", "float16")
            for mode in (gpu.FORWARD, gpu.BACKWARD)
        ),
    }
    assert len(compared(by_the_gpu_script(document))) >= 6
    verdicts = {bar["verdict"].partition(":")[0] for bar in document["bars"]}
    assert verdicts == {"reached", "fell short", "not measured"}


def test_the_command_tests_first_and_measures_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(runner, "run_tests", lambda *given, seconds: calls.append((given, seconds)) or "failed: 1")

    def run(target: Callable[..., None], path: Path, end: float) -> bool:
        pickle.loads(pickle.dumps(target))(path, False)
        return True

    def section(*given: Any) -> None:
        calls.append(dispatch.BACKEND.value()[0])

    monkeypatch.setattr(gpu, "keep_running", run)
    monkeypatch.setattr(gpu, "SECTIONS", (section,))
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--output", str(tmp_path)])
    gpu.main()
    assert calls[0] == (("--numprocesses", str(len(os.sched_getaffinity(0))), "tests/kernels"), gpu.TEST_SECONDS)
    assert calls[1:] == ["torch"]  # kernels that failed are not measured
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text(encoding="utf-8"))
    assert (document["gate"], document["rates_of"]) == ("failed: 1", "cpu")
    assert {"commit", "versions", "machine", "limits", "sections", "bars"} <= document.keys()
    printed = capsys.readouterr().out
    assert "not measured aim 0.12" in printed
    assert "0 aims reached, 0 fell short, " in printed
    monkeypatch.setattr(gpu, "keep_running", lambda *given: False)
    with pytest.raises(SystemExit, match="Nothing was measured"):
        gpu.main()


class OnlyNames(Rows):
    """Notes what would be measured, of tensors without contents."""

    def measure(self, suite: str, case: str, params: dict[str, Any], sides: dict[str, Any], *_: Any, **__: Any) -> None:
        row = {"suite": suite, "case": case, "params": params}
        figures = dict.fromkeys(("eager_ms", "graph_ms", "peak_bytes"), 1.0) | dict.fromkeys(("missing", "no_graph"))
        self.found += [row | {"side": side} | figures for side in sides]


@pytest.mark.more
def test_every_aim_has_its_rows() -> None:
    """Of a run in full sizes: all batches, grids, types and passes, and no aim without its sides."""
    rows = OnlyNames(Place("meta", torch.bfloat16), float("inf"))
    with torch.device("meta"):
        for section in gpu.SECTIONS:
            section(rows, gpu.Sizes(tiny=False), LIMITS)
    found = gpu_bars.bars(rows.found, LIMITS)
    assert not [bar for bar in found if bar["measured"] is None]
    steps = {
        (p["preset"], p["n"], p["dtype"], p["mode"], p["batch"])
        for row in rows.found
        if (p := row["params"]).get("mode") and row["side"] == OURS
    }
    modes, types = (gpu.FORWARD, gpu.BACKWARD), ("bfloat16", "float16")
    assert steps == {
        *product(("released", "paper"), (3, 5), types, modes, (1, 8, 16, 32)),
        *product(("released", "paper"), (3,), ("bfloat16",), (gpu.ALL_GRADIENTS,), (8,)),
    }
    peers_of = {row["side"] for row in rows.found if row["case"] == "released, batch 16: forward"}
    assert {"FlexAttention", "FlexAttention, FLASH", "varlen attention", "NATTEN", gpu_bars.COMPILED} <= peers_of


def test_the_time_of_a_call_is_under_eight_minutes() -> None:
    assert gpu.SECONDS + gpu.MORE_SECONDS <= 470
    assert gpu.TEST_SECONDS < gpu.SECONDS / 2


# --- Nothing is lost --------------------------------------------------------------------------------------------------


def test_another_process_goes_on_where_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert keep_running(gpu_processes.ends_in_the_middle, path, time.monotonic() + 120)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["sections"] == {
        "fails": "failed: no such thing",
        "measures": "done",
        "cannot begin": "failed: the process ended while this was prepared",
        "last": "done",
    }
    found = {row["name"]: row["done"] for row in document["rows"]}
    assert found == {"one": True, "two": False, "three": True, "four": True}
    assert {name.name for name in tmp_path.iterdir()} == {"rows.json"}


@pytest.mark.parametrize("clock", ["time", "monotonic"])
def test_what_was_measured_survives_a_hang(clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that hangs is ended and the next one follows, or the time is over: by clocks that do not wait for it."""
    path = tmp_path / "rows.json"
    clocks = {name: getattr(time, name) for name in ("time", "monotonic")}
    real = clocks[clock]

    def hurried() -> float:
        """An hour later once the second row has been begun, until another process goes on."""
        document = ResultFile.begun(path).document if path.exists() else {"rows": []}
        hangs = len(document["rows"]) == 2 and document["sections"] == {"measures": "begun at row 0"}
        return float(real() + 3600 * hangs)

    monkeypatch.setattr(gpu_process, "time", SimpleNamespace(**clocks | {clock: hurried}))
    assert keep_running(gpu_processes.hangs, path, time.monotonic() + 600, silent=600)
    found = {row["name"]: row["done"] for row in ResultFile.begun(path).document["rows"]}
    assert found == {"one": True, "two": False} | ({"three": True} if clock == "time" else {})


def test_what_was_measured_before_is_not_taken_for_new(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("{}", encoding="utf-8")
    assert not keep_running(gpu_processes.cannot_begin, path, time.monotonic() + 60)
    assert path.read_text(encoding="utf-8") == "{}"


def test_a_row_is_written_before_it_has_a_figure() -> None:
    """What ends the process is known by it, and not begun again; a crash in a graph leaves the eager time."""
    rows, written = Rows(CPU, float("inf"), 1), []
    rows.keep = lambda: written.append([(row["missing"], row["no_graph"], bool(row["eager_ms"])) for row in rows.found])
    rows.measure("suite", "case", {}, {"one": int})
    assert written == [[(RUNNING, None, False)], [(None, RUNNING, True)], [(None, None, True)]]
    rows.measure("suite", "case", {}, {"one": lambda: pytest.fail("it ran again"), "two": int})
    assert [row["side"] for row in rows.found] == ["one", "two"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "rows.json", {"rows": [1]})
    file.write()
    file.document["rows"].append(float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        file.write()
    assert ResultFile.begun(file.path).document == {"rows": [1]}


def test_a_gpu_that_answers_no_more_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its row has the reason."""
    rows = Rows(Place("cuda"), float("inf"), 1)

    def fault() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", lambda *_, **__: fault())
    with pytest.raises(SystemExit, match="the GPU does not answer"):
        rows.measure("suite", "case", {}, {"one": fault, "two": fault})
    assert [row["missing"] for row in rows.found] == ["failed: RuntimeError: an illegal memory access was encountered"]


def test_a_section_that_loses_the_gpu_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next section has another one; what has not been begun is said, too."""

    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def prepares(*given: Any) -> None:
        monkeypatch.setattr(torch, "ones", fault)
        fault()

    def follows(*given: Any) -> None: ...

    monkeypatch.setattr(gpu, "SECTIONS", (prepares, follows))
    path, ones = tmp_path / "rows.json", torch.ones
    with pytest.raises(SystemExit, match="the GPU does not answer"):
        gpu.measured(Place("cuda"), True, header(), float("inf"), path, False)
    assert gpu_bars.summary(ResultFile.begun(path).document).splitlines()[-2:] == [
        "section prepares: failed: RuntimeError: an illegal memory access was encountered",
        "section follows: not begun",
    ]
    monkeypatch.setattr(torch, "ones", lambda *given, device, **_: ones(*given))
    gpu.measured(Place("cuda"), True, header(), float("inf"), path, True)
    assert ResultFile.begun(path).document["sections"]["follows"] == "done"


# --- Only what is right counts ----------------------------------------------------------------------------------------


def test_gpu_rows_count_only_what_is_right() -> None:
    rows = Rows(CPU, float("inf"))
    exact = torch.arange(4.0).double()
    sides = {
        "reference": lambda: exact.float() + 0.01,
        OURS: lambda: exact.float() + 0.015,
        "wrong": lambda: exact.float() + 0.03,
        "not finite": lambda: exact.float() / 0,
        "another": lambda: exact.float() * 7,
        "broken": lambda: peers.need("no_such_library"),
    }
    rows.measure("suite", "case", {}, sides, lambda: exact, "reference", other="another")
    found = {row["side"]: row for row in rows.found}
    assert [name for name, row in found.items() if row["eager_ms"]] == ["reference", OURS, "another"]
    assert found["wrong"]["missing"].startswith("wrong: error ")
    assert found["not finite"]["missing"].startswith("wrong: error inf")
    assert found["broken"]["missing"].startswith("not installed: ")
    json.dumps(rows.found, allow_nan=False)
    late = Rows(CPU, 0.0)
    late.measure("suite", "case", {}, sides)
    assert {row["missing"] for row in late.found} == {"the time of this call was over"}


def test_nothing_counts_that_could_not_be_compared() -> None:
    rows = Rows(CPU, float("inf"))
    exact = torch.arange(4.0).double()
    sides = {"reference": lambda: peers.need("no_such_library"), OURS: exact.float}
    rows.measure("suite", "case", {}, sides, lambda: exact, "reference")
    assert rows.found[1]["missing"].startswith("not compared: ")
    wrong = {"reference": lambda: exact.float() * 2, OURS: lambda: exact.float() * 2}
    rows.measure("suite", "of a wrong reference", {}, wrong, lambda: exact, "reference")
    assert [row["missing"] for row in rows.found[2:]] == ["wrong: error 1.0e+00, and 1.0e+00 of the reference"] * 2


def test_wrong_gradients_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A side with the right values and gradients of another layout, as cuDNN's attention gives them."""

    class OtherLayout(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad.flip(1)

    def attend(*given: Any) -> torch.Tensor:
        return OtherLayout.apply(right(*given))  # type: ignore[no-any-return]

    right = peers.tiles_as_batch
    monkeypatch.setattr(peers, "tiles_as_batch", attend)
    rows = Rows(BFLOAT16, float("inf"), rounds=1)
    for mode in (gpu.FORWARD, gpu.BACKWARD):
        gpu._enhance(rows, gpu.Sizes(tiny=True), LIMITS, gpu.Step("released", 5, mode), peers_too=True)
    assert not [row["missing"] for row in rows.found if row["side"] == LOOP and row["missing"]]
    batched = [row["missing"] for row in rows.found if row["side"] == gpu_bars.BATCHED]
    assert batched[0] is None
    assert batched[1].startswith("wrong: error ")


# --- Aims -------------------------------------------------------------------------------------------------------------


def rows_with(*sides: tuple[str, str, float, float]) -> list[dict[str, Any]]:
    """Rows of a case with one side after the other: name, eager, graph."""
    row = dict.fromkeys(("params", "peak_bytes", "error", "missing", "no_graph"))
    return [
        row | {"suite": "dem", "case": case, "side": side, "eager_ms": eager, "graph_ms": graph}
        for case, side, eager, graph in sides
    ]


def test_gpu_bars_say_what_was_reached() -> None:
    one, sixteen = "released, batch 1: forward", "released, batch 16: forward"
    times = (one, LOOP, 5.0, 1.3), (one, OURS, 1.0, 0.1), (sixteen, LOOP, 13.0, 12.0), (sixteen, OURS, 2.0, 1.0)
    rows = rows_with(*times)
    rows[-1] |= {"eager_ms": None, "missing": "wrong: error 1.0e+00"}
    found = {bar["bar"]: bar for bar in gpu_bars.bars(rows, {"copy_bytes_per_s": 1e12, "matmul_ops_per_s": 1e14})}
    assert found[f"{one}, graph, ms"] == {
        "bar": f"{one}, graph, ms", "aim": 0.12, "measured": 0.1, "verdict": "reached"
    }  # fmt: skip
    assert found[f"{one}, graph, against the loop"]["measured"] == 13
    assert found[f"{sixteen}, against the loop"]["verdict"] == f"not measured: {sixteen}, {OURS}: wrong: error 1.0e+00"
    assert "no row" in found["paper, batch 1: forward, graph, ms"]["verdict"]
    assert found[f"{one}, eager, over the fastest side"]["verdict"] == "reached"
    slow = {bar["bar"]: bar for bar in gpu_bars.bars(rows_with((one, LOOP, 1.0, 0.1), (one, OURS, 2.0, 0.2)), {})}
    assert slow[f"{one}, graph, ms"]["verdict"] == "fell short"
    assert slow[f"{one}, graph, over the fastest side"]["verdict"] == "fell short"
    assert f"fell short   aim 0.12   measured 0.2      {one}, graph, ms" in gpu_bars.table(list(slow.values()))


def test_the_summary_names_what_fell_short_and_what_failed() -> None:
    one = "released, batch 1: forward"
    rows = rows_with((one, LOOP, 1.0, 0.1), (one, OURS, 2.0, 0.2), (one, "peer", 1.0, 0.1), (one, "other", 1.0, 0.1))
    rows += rows_with((one, "crashes", 1.0, 0.1), (one, "crashes in a graph", 3.0, 0.1))
    rows[2] |= {"missing": "wrong: error 1.0e+00", "eager_ms": None, "graph_ms": None}
    rows[3] |= {"missing": "not installed: natten", "eager_ms": None, "graph_ms": None}
    rows[4] |= {"missing": RUNNING, "eager_ms": None, "graph_ms": None}
    rows[5] |= {"no_graph": RUNNING, "graph_ms": None}
    document = {"rows": rows, "bars": gpu_bars.bars(rows, {}), "sections": {"one": "done", "two": "failed: no"}}
    lines = gpu_bars.summary(document).splitlines()
    assert lines[0].startswith("0 aims reached, 4 fell short, ")
    assert f"fell short: {one}, graph, ms: 0.2, aimed at 0.12" in lines
    assert lines[-4:] == [
        f"{one}, peer: wrong: error 1.0e+00",
        f"{one}, crashes: {RUNNING}",
        f"{one}, crashes in a graph: {RUNNING}",
        "section two: failed: no",
    ]


def test_the_host_may_take_twice_as_long_as_for_a_view() -> None:
    case = "re-tile, one small map"
    rows = rows_with((case, gpu_bars.BY_VIEW, 1.0, 1.0), (case, OURS, 2.1, 1.0), (case, KERNELS, 2.4, 1.0))
    for row in rows:
        row["suite"] = "host"
    found = {bar["bar"]: bar["verdict"] for bar in gpu_bars.bars(rows, {}) if bar["bar"].startswith(case)}
    end = f"host time over that of {gpu_bars.BY_VIEW}"
    assert found == {f"{case}, {OURS}, {end}": "fell short", f"{case}, {KERNELS}, {end}": "reached"}
