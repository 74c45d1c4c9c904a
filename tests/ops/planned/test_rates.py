"""The committed rates, and that choices by them are those of the committed measurements."""

import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dualview as dv
from benchmarks import rates
from benchmarks.cases import OURS
from benchmarks.results import FOLDER
from dualview.ops.planned import products
from dualview.ops.planned.products import Arrangement, Layers, Products, Rates, rates_of, seconds_of, sizes_of
from tests.ops.planned.rates import MACHINES, of

LIKE_META = torch.empty(0, device="meta")
RECORDS = pytest.mark.parametrize(
    "record", products.records(), ids=lambda record: f"{record['device']} {record['dtypes'][0]}"
)


class Question(NamedTuple):
    """How are the products arranged of a module for a grid of tiles?"""

    preset: str
    grid: tuple[int, int]
    dim: int = 1024
    tokens: int = 24


QUESTIONS = [Question(preset, (n, n)) for preset, n in product(("paper", "released"), (2, 3, 4, 5))]


@cache
def dem_of(preset: str, dim: int) -> dv.DualPerspectiveEnhance:
    found: dv.DualPerspectiveEnhance = getattr(dv.DualPerspectiveEnhance, preset)(dim, device="meta")
    return found


def chosen(asked: Question, of_device: Rates | None) -> Products:
    with rates.assumed(of_device):
        tokens = asked.tokens, asked.tokens
        return dem_of(asked.preset, asked.dim).products(asked.grid, tokens, LIKE_META)


def estimates(asked: Question, of_device: Rates) -> dict[Products, float]:
    """Every way to arrange the products, and its time."""
    dem, paper = dem_of(asked.preset, asked.dim), asked.preset == "paper"
    plan, layers = dem.plan(asked.grid, (asked.tokens, asked.tokens)), [Layers(*sizes_of(dem.attentions[0]))] * 2
    weights = sum(p.numel() for p in dem.fusion.parameters()) if paper else 0
    ways = products._candidates(plan, layers, shared=True, averaged=paper, concat=paper)
    return {way: seconds_of(plan, layers, way, of_device, True, weights) for way in ways}


def as_committed(record: dict[str, Any], dtype: str, *, training: bool) -> Rates:
    """The rates of a record, as they stand in the file."""
    found = record["training"] if training and "training" in record else record["forward"]
    elements = found["moved"] / (2 * getattr(torch, dtype).itemsize)
    attention = tuple((width, rate) for width, rate in found["attention"])
    return Rates(found["dense"], attention, found["pooled"], elements, found["launch"])


@RECORDS
@pytest.mark.parametrize("training", [False, True])
def test_choices_are_those_of_the_committed_figures(
    training: bool, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all ways to arrange them the one with the least time, worked out from the file."""
    device, _, sm = record["device"].partition(" sm_")
    monkeypatch.setattr(products, "capability", lambda device: (int(sm[:-1]), int(sm[-1])))
    for dtype, asked in product(record["dtypes"], QUESTIONS):
        found = rates_of(torch.device(device), getattr(torch, dtype), training=training)
        assert found == as_committed(record, dtype, training=training)
        times = estimates(asked, found)
        best = min(times, key=lambda way: times[way])
        expected = best._replace(seconds=times[best], estimates=tuple(times.values()))
        assert chosen(asked, found) == expected


@RECORDS
def test_one_choice_serves_batches_of_all_sizes(record: dict[str, Any]) -> None:
    """The images of a batch share its launches. What is best for one image costs at most 3 % more in a larger batch."""
    for dtype, training, asked in product(record["dtypes"], (False, True), QUESTIONS):
        alone = as_committed(record, dtype, training=training)
        way = rates.order_of(chosen(asked, alone))
        for batch in (8, 16, 32):
            times = estimates(asked, alone._replace(launch=alone.launch / batch))
            assert times[way] <= 1.03 * min(times.values())


@RECORDS
def test_every_record_says_where_it_comes_from(record: dict[str, Any]) -> None:
    assert record["source"]
    for found in (record[name] for name in ("forward", "training") if name in record):
        numbers = [found["dense"], found["pooled"], found["moved"], *(rate for _, rate in found["attention"])]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        assert found["attention"] == sorted(found["attention"])


# --- What was measured ------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One case: what it took in the arrangements that were tried, and the rates by which one is chosen now."""

    name: str
    asked: Question
    took: dict[Products, float]
    of_device: Rates | None

    def loss(self) -> float:
        """The time of what is chosen now over the least of those tried; fails if it was not tried."""
        way = rates.order_of(chosen(self.asked, self.of_device))
        tried = self.took.get(way, self.took.get(way._replace(together=False)))
        assert tried is not None, f"{self.name}: {way} was not measured"
        return tried / min(self.took.values())


def least_by_way(asked: Question, took: list[tuple[Rates | None, float]]) -> dict[Products, float]:
    """Times by the way of the products; sides may differ in name alone."""
    found: dict[Products, float] = {}
    for assumed, time in took:
        way = rates.order_of(chosen(asked, assumed))
        found[way] = min(time, found.get(way, math.inf))
    return found


def rates_on(device: str, dtype: str, *, training: bool) -> Rates | None:
    found = [record for record in products.records() if record["device"] == device and dtype in record["dtypes"]]
    return as_committed(found[0], dtype, training=training) if found else None


BY_NAME: dict[str, Rates | None] = {
    "absorb all": MACHINES["attention is free"],
    "projections are free": MACHINES["projections are free"],
    "never measured": None,
}
"""Arrangements of the files of 2026-11-26."""

AUTO = {"released": "never measured", "paper": "absorb all"}
"""How "auto" arranged 3 x 3 tiles then, as written or absorbed and averaged; its times are those of that side."""


def on_an_h100() -> Iterator[Measured]:
    """Both runs of 2026-11-26, as CUDA graphs: of an arrangement, the host's launches say nothing."""
    for file in ("enhancement-before-removal", "enhancement"):
        cases: dict[Any, list[tuple[Rates | None, float]]] = {}
        for row in json.loads((FOLDER / "h100" / f"{file}.json").read_text(encoding="utf-8"))["rows"]:
            side = AUTO[row["preset"]] if row["side"] == "auto" else row["side"]
            if side in BY_NAME:
                cases.setdefault((row["preset"], row["B"], row["mode"]), []).append((BY_NAME[side], row["graph_ms"]))
        for (name, batch, mode), took in cases.items():
            preset, _, size = name.partition(", ")
            asked = Question(preset, (int(size[0]), int(size[0])) if size else (3, 3))
            of_device = rates_on("cuda sm_90", "bfloat16", training=mode == "frozen")
            yield Measured(f"{file}: {name}, {mode}, batch {batch}", asked, least_by_way(asked, took), of_device)


def by_the_gpu_script(document: dict[str, Any]) -> Iterator[Measured]:
    """Of a result file of `python -m benchmarks.gpu`."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        _, _, way = row["side"].partition(f"{OURS}, ")
        if row["suite"] == "dem" and way in rates.WAYS and row["graph_ms"] is not None:
            cases.setdefault(row["case"], []).append(row | {"way": way})
    for name, rows in cases.items():
        params = rows[0]["params"]
        asked = Question(params["preset"], (params["n"], params["n"]), params["d"], params["tokens"])
        took = least_by_way(asked, [(rates.WAYS[row["way"]], row["graph_ms"]) for row in rows])
        of_device = rates_on(document["rates_of"], params["dtype"], training=params["mode"] != "forward")
        yield Measured(f"{document['machine']['name']}: {name}", asked, took, of_device)


def of_result_files(folder: Path = FOLDER / "gpu") -> Iterator[Measured]:
    """Of all that are no trial of the script in small sizes."""
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["selection"] != "tiny":
            yield from by_the_gpu_script(document)


def compared(cases: Iterator[Measured]) -> list[Measured]:
    """Those that say something of a choice: with several arrangements, on a device with rates."""
    return [case for case in cases if len(case.took) > 1 and case.of_device is not None]


@pytest.mark.parametrize("case", [*compared(on_an_h100()), *compared(of_result_files())], ids=lambda case: case.name)
def test_what_is_chosen_was_measured_to_be_the_fastest(case: Measured) -> None:
    assert case.loss() <= 1.05


def test_what_was_compared_on_an_h100() -> None:
    """Both passes are among it, and both choices."""
    found = {case.name.partition(": ")[2] for case in compared(on_an_h100())}
    assert found == {
        "released, forward, batch 16",
        "released, frozen, batch 8",
        "paper, forward, batch 16",
        "released, 5 x 5, forward, batch 1",
        "released, 5 x 5, forward, batch 8",
    }


def test_rows_of_the_gpu_script_are_compared_in_the_same_way(tmp_path: Path) -> None:
    """On a CPU absorbing is chosen for 3 x 3 tiles: fails where a row says that projecting takes half the time."""
    params = {"preset": "released", "n": 3, "d": 1024, "tokens": 24, "mode": "forward", "dtype": "bfloat16"}
    row = {"suite": "dem", "case": "released", "params": params}
    took = {"projected": 2.0, "absorbed": 1.0, "in the fewest launches": 2.1}
    rows = [row | {"side": f"{OURS}, {name}", "graph_ms": time} for name, time in took.items()]
    rows += [row | {"side": OURS, "graph_ms": 1.0}, row | {"side": "loop over tiles", "graph_ms": 0.1}]
    document = {"machine": {"name": "a CPU"}, "rates_of": "cpu", "rows": rows, "selection": "gpu"}
    (case,) = compared(by_the_gpu_script(document))
    assert case.loss() == 1
    rows[0]["graph_ms"] = 0.5
    (case,) = compared(by_the_gpu_script(document))
    assert case.loss() == 2
    for selection, count in (("gpu", 1), ("tiny", 0)):
        (tmp_path / "cpu.json").write_text(json.dumps(document | {"selection": selection}), encoding="utf-8")
        assert len(list(of_result_files(tmp_path))) == count


def on_a_cpu() -> Iterator[Measured]:
    """The suite "absorb": as written, absorbed in both directions, and as chosen, absorbed where few ask many."""
    document = json.loads((FOLDER / "cpu-full-float32.json").read_text(encoding="utf-8"))
    both = Arrangement(), Arrangement(absorb=True)
    ways = {"projected throughout": both[:1] * 2, "absorbed throughout": both[1:] * 2, OURS: both}
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        if row["suite"] == "absorb":
            cases.setdefault(row["case"], []).append(row)
    for name, rows in cases.items():
        params = rows[0]["params"]
        took = {Products(ways[row["side"]]): row["seconds"]["median"] for row in rows}
        of_device = rates_on("cpu", "float32", training=params["mode"] != "forward")
        yield Measured(name, Question("released", (params["rows"], params["cols"])), took, of_device)


@pytest.mark.parametrize("case", list(on_a_cpu()), ids=lambda case: case.name)
def test_one_set_of_rates_decides_both_passes_on_a_cpu(case: Measured) -> None:
    """Forward, what is chosen is the fastest or within 2 %; in training, within 6.1 %."""
    assert case.loss() <= (1.02 if case.name.endswith("forward") else 1.061)


def test_gradients_of_all_that_may_be_chosen_were_compared_on_an_h100() -> None:
    """With float64: the largest error of any gradient over that of torch's own attention, written out."""
    folder, compared_with = FOLDER / "h100", set()
    for file in ("enhancement-before-removal", "enhancement"):
        for found in json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))["gradients"]:
            assert max(ours / plain for ours, plain in found["errs"].values()) <= 1.4
            if found["backend"] == "torch":
                compared_with.add((found["preset"], found["n"], found["dtype"], found["masked"], found["way"]))
    every = product(("released", "paper"), (2, 3), ("torch.bfloat16", "torch.float16"), (False, True))
    assert compared_with >= {(*case, way) for case in every for way in ("auto", "absorb all")}
    rows = json.loads((folder / "attention-backward.json").read_text(encoding="utf-8"))["rows"]
    worst = {row["side"]: max(row["errors"].values()) for row in rows if row["backend"] == "default"}
    assert all(worst[side] <= worst["loop"] for side in ("absorbed", "projected"))
    assert worst["full"] > 1, "cuDNN's plan of another layout"


# --- Both passes ------------------------------------------------------------------------------------------------------


FORWARD, TRAINING = of(), of(dense=1e6)
"""Of a machine for which projections are free where gradients are recorded."""


def absorbs(dem: dv.DualPerspectiveEnhance, like: torch.Tensor) -> bool:
    return dem.products((3, 3), (6, 6), like).directions[1].absorb


def test_rates_of_both_passes_decide_where_gradients_are_recorded() -> None:
    dem, like = dv.DualPerspectiveEnhance.released(64), torch.empty(0)
    with rates.assumed(FORWARD, TRAINING):
        assert not absorbs(dem, like)
        with torch.no_grad():
            assert absorbs(dem, like)
        dem.requires_grad_(False)
        assert absorbs(dem, like), "no gradient is recorded"
        assert not absorbs(dem, torch.empty(0, requires_grad=True)), "that of the features is"
    with rates.assumed(FORWARD):
        assert absorbs(dem.requires_grad_(True), like), "only a forward pass was measured"


def test_a_compiled_graph_is_arranged_for_its_passes() -> None:
    torch._dynamo.reset()
    dem = dv.DualPerspectiveEnhance.released(64).double()
    tiles, operations = torch.randn(2, 1, 9, 6, 6, 64, dtype=torch.float64), []

    def counted(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        operations.append(counted(lambda: graph(*inputs)))
        return graph

    with rates.assumed(FORWARD, TRAINING):
        compiled = torch.compile(lambda *x: dem(*x, (3, 3)), backend=count, fullgraph=True)
        expected = []
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                compiled(*tiles)
                expected.append(counted(lambda: dem(*tiles, (3, 3))))
    assert operations == expected
    assert operations[0] > operations[1]


def test_rates_of_both_passes_are_read_from_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"dense": 1.0, "attention": [[64, 2.0]], "pooled": 3.0, "moved": 8.0, "launch": 4.0}
    both = {"device": "cpu", "dtypes": ["float32"], "forward": record, "training": record | {"dense": 0.5}}
    monkeypatch.setattr(products, "records", lambda: [both])
    forward = Rates(1.0, ((64, 2.0),), 3.0, 1.0, 4.0)
    assert rates_of(torch.device("cpu"), torch.float32) == forward
    assert rates_of(torch.device("cpu"), torch.float32, training=True) == forward._replace(dense=0.5)
    del both["training"]
    assert rates_of(torch.device("cpu"), torch.float32, training=True) == forward


def test_the_command_prints_records_that_can_be_contributed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rates", "--device", "cpu", "--tiny", "--threads", "1"])
    rates.main()
    (record,) = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(products, "records", lambda: [record])
    for training in (False, True):
        found = rates_of(torch.device("cpu"), torch.float32, training=training)
        assert found is not None
        assert found == as_committed(record, "float32", training=training)
        assert [width for width, _ in found.attention] == [8, 32]
        assert all(math.isfinite(x) and x > 0 for x in (found.dense, found.pooled, found.moved, found.launch))
    assert rates_of(torch.device("cpu"), torch.float32) != rates_of(torch.device("cpu"), torch.float32, training=True)
    assert rates_of(torch.device("cpu"), torch.bfloat16) is None


# --- What the pages say -----------------------------------------------------------------------------------------------


def page(name: str) -> str:
    return (FOLDER.parent.parent / "docs" / name).read_text(encoding="utf-8")


def chosen_and_other(case: Measured, unit: float = 1.0) -> tuple[str, str]:
    """The time of what is chosen, and that of the fastest other arrangement that was tried, in milliseconds."""
    way = rates.order_of(chosen(case.asked, case.of_device))
    way = way if way in case.took else way._replace(together=False)
    others = (time for other, time in case.took.items() if other != way)
    mine, other = (f"{time / unit:#.3g}".rstrip(".") for time in (case.took[way], min(others)))
    return mine, other


def test_the_page_has_what_was_compared() -> None:
    text = page("fast-path.md").replace("**", "")
    for case in compared(on_an_h100()):
        if case.name.startswith("enhancement: "):
            mine, other = chosen_and_other(case)
            assert f"| {mine} ms | {other} ms |" in text, case.name
    on_cpu = [chosen_and_other(case, 0.001) for case in on_a_cpu()]
    for forward, both in zip(on_cpu[::2], on_cpu[1::2], strict=True):
        assert f"| {forward[0]} / {both[0]} ms | {forward[1]} / {both[1]} ms |" in text


def test_the_page_of_the_kernels_has_the_rows_of_the_h100() -> None:
    text = page("kernels.md").replace("**", "")
    rows = json.loads((FOLDER / "h100" / "enhancement.json").read_text(encoding="utf-8"))["rows"]
    found = {
        tuple(row.get(name) for name in ("preset", "mode", "op", "B", "side")): (row["eager_ms"], row["graph_ms"])
        for row in rows
    }

    def cell(digits: tuple[int, int], *key: Any) -> str:
        times = found.get(key)
        return " / ".join(f"{x:.{n}f}" for x, n in zip(times, digits, strict=True)) if times else ""

    modes = {"forward": ("forward", (1, 8, 16, 32)), "forward and backward, frozen features": ("frozen", (8,))}
    for preset, (said, (mode, batches)) in product(("released", "paper"), modes.items()):
        for batch in batches:
            sides = ("loop over tiles", "batched SDPA", "auto")
            cells = [cell((2, 2), preset, mode, None, batch, side) for side in sides]
            assert f"| {preset}, {said} | {batch} | {' | '.join(cells)} |" in text
    for batch in (1, 8, 32):
        sides = ("plain torch", "dualview torch", "dualview triton")
        cells = [cell((2, 3), None, None, "crop_normalize", batch, side) for side in sides]
        assert f"| {batch} | {' | '.join(cells)} |" in text
    for batch in (1, 8, 16, 32):
        cells = [cell((3, 3), "released", "forward", None, batch, side) for side in ("auto, triton", "auto")]
        assert f"| {batch} | {' | '.join(cells)} |" in text
