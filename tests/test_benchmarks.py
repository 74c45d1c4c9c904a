"""The benchmarks themselves: both sides of every case agree, files have their form, the page shows the files."""

import copy
import itertools
import json

import pytest
import torch

from benchmarks import cases, measure, peers, report, results, runner, work
from benchmarks.cases import OURS, registry
from benchmarks.measure import Limits, Place

CPU = Place()


def ids(case):
    return f"{case.suite}: {case.name}"


@pytest.fixture(scope="module")
def document():
    return runner.run(CPU, "tiny", gate="skipped", suites=("photo", "scaling"), progress=False)


@pytest.mark.parametrize("case", registry("tiny"), ids=ids)
def test_sides_agree(case):
    comparison = runner.prepare(case, CPU)
    timed, differences, missing = runner.agreeing(comparison)
    assert next(iter(timed)) == OURS
    assert all(
        reason.startswith(("not installed", "not run", "takes square grids only")) for reason in missing.values()
    )
    assert comparison.targets.keys() <= comparison.sides.keys()
    assert differences or not comparison.sides.keys() - comparison.other - {OURS}


def test_every_suite_has_cases_of_every_size():
    for size in ("tiny", "quick", "full"):
        names = [ids(case) for case in registry(size)]
        assert len(names) == len(set(names))
    suites = {case.suite for case in registry("full")}
    assert suites == {"ops", "photo", "dem", "prefix", "train_step", "preprocess", "import_time", "scaling"}


def test_wrong_values_are_not_timed():
    comparison = runner.prepare(registry("tiny")[0], CPU)
    comparison.sides["wrong"] = lambda: comparison.sides[OURS]() + 1
    timed, _, missing = runner.agreeing(comparison)
    assert "wrong" not in timed
    assert "values differ by" in missing["wrong"]


def test_a_missing_peer_is_reported_with_its_reason():
    case = next(case for case in registry("tiny") if case.suite == "dem")
    object.__setattr__(case, "build", lambda place, build=case.build: _without_library(build(place)))
    rows = runner.rows_of(case, CPU, "tiny")
    row = next(row for row in rows if row["side"] == "NATTEN")
    assert row["seconds"] is None
    assert row["missing"].startswith("not installed: No module named")
    document = _document_of(rows)
    results.check(document)
    assert f"| NATTEN | missing: {row['missing']} |" in report.tables(document)


def _without_library(comparison):
    comparison.sides = {OURS: comparison.sides[OURS], "NATTEN": lambda: peers.need("no_such_library")}
    return comparison


def _document_of(rows):
    head = results.header("cpu", torch.float32, "tiny", "skipped", 0)
    return head | {"limits": {"copy_bytes_per_s": 1.0, "matmul_ops_per_s": 1.0}, "meters": {}, "rows": rows}


def test_direct_attention_is_refused_above_the_budget(monkeypatch):
    monkeypatch.setattr(peers, "memory_of_machine", lambda device: 1000)
    options = {"preset": "released", "n": 2, "d": 32, "batch": 1, "tokens": 4, "mode": "forward"}
    *_, missing = runner.agreeing(cases._enhance(CPU, **options, few=False))
    assert "need" in missing["direct cross-attention, math"]
    assert peers.direct_bytes(5184, 8, 1, 4) == 2 * 8 * 5184**2 * 4


def test_a_part_is_measured_by_name():
    document = runner.run(CPU, "tiny", gate="skipped", suites=("photo: live", "ops: local tokens"), progress=False)
    assert {row["case"] for row in document["rows"]} == {
        "uint8 to normalised, live tiles, n=3",
        "recombine, local tokens, n=2",
    }
    alone = [case.name for case in registry("tiny") if runner._asked(case, "dem: paper, n=2: forward.")]
    assert alone == ["paper, n=2: forward"]
    with pytest.raises(SystemExit, match=r"no case of the tiny selection is called dem: n=9; the suites are \['dem'"):
        runner.run(CPU, "tiny", gate="skipped", suites=("dem: n=9",), progress=False)


def test_document_round_trip(document, tmp_path):
    path = tmp_path / "result.json"
    results.write(document, path)
    assert results.read(path) == json.loads(path.read_text())
    assert {row["role"] for row in document["rows"]} == {"ours", "peer"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(schema_version=0),
        lambda d: d.pop("machine"),
        lambda d: d["rows"][0].update(unknown=1),
        lambda d: d["rows"][0].update(seconds=None),
        lambda d: d["rows"][0].update(ratio="fast"),
    ],
)
def test_schema_refuses(document, damage):
    damaged = copy.deepcopy(document)
    damage(damaged)
    with pytest.raises(ValueError, match=r"schema_version|document|rows"):
        results.check(damaged)


def test_json_is_strict(document, tmp_path):
    damaged = copy.deepcopy(document)
    damaged["rows"][0]["ratio"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        results.write(damaged, tmp_path / "result.json")


def test_compare(document):
    slower = copy.deepcopy(document)
    for row in slower["rows"][1:]:
        row["seconds"]["median"] *= 2
    lines = report.compare(document, slower).splitlines()
    assert "| 1.00 | 1.00 |" in lines[2]
    assert all("| 2.00 | 1.00 |" in line for line in lines[3 : len(document["rows"]) + 2])
    slower["rows"].pop()
    assert report.compare(document, slower).splitlines()[-1].startswith("only old: scaling")


def test_committed_results(document, tmp_path):
    written = tmp_path / "cpu-tiny-float32.json"
    results.write(document, written)
    for path in (written, *sorted(results.FOLDER.glob("*.json"))):
        read = results.read(path)
        assert path.stem == "-".join((read["device"], read["selection"].split()[0], read["dtype"]))
        assert not [row["missing"] for row in read["rows"] if "values differ" in (row["missing"] or "")]
        damaged = tmp_path / "damaged.json"
        damaged.write_text(path.read_text(encoding="utf-8").replace('"median"', '"mean"'), encoding="utf-8")
        with pytest.raises(ValueError, match=r"rows\[\d+\].*median"):
            results.read(damaged)


def test_first_page_shows_the_headlines():
    text = report.FIRST_PAGE.read_text(encoding="utf-8")
    assert report.page(text, report.headlines(report.shown())) == text, "run: python -m benchmarks.report"


def test_page_shows_the_committed_results():
    text = report.PAGE.read_text(encoding="utf-8")
    assert text == report.page(text, report.section(report.shown())), "run: python -m benchmarks.report"


def test_full_results_hide_quick_ones(document, tmp_path):
    for stem in ("cpu-quick-float32", "cpu-full-float32", "cuda-quick-float16", "cuda-full-float16"):
        selection = "full dem" if stem == "cuda-full-float16" else stem.split("-")[1]
        results.write(document | {"selection": selection}, tmp_path / f"{stem}.json")
    assert list(report.shown(tmp_path)) == ["cpu-full-float32", "cuda-full-float16", "cuda-quick-float16"]


def test_plots(document, tmp_path):
    (path,) = report.plots(document, "test", tmp_path)
    assert path.name == "bench-test-scaling.svg"
    first = path.read_bytes()
    report.plots(document, "test", tmp_path)
    assert path.read_bytes() == first


def test_memory_meter():
    def run():
        scratch = torch.ones(1000)
        kept = scratch.sum()
        del scratch
        return torch.ones(500), kept

    assert 4000 <= measure.peak_bytes(run, "cpu") < 4100


def test_difference():
    a = torch.tensor([1.0, -4.0])
    assert measure.difference(a, a) == 0
    assert measure.difference((a, None), (a + 0.4, None)) == pytest.approx(0.4 / 3.6, rel=1e-5)
    assert measure.difference(a, a[:, None]) == float("inf")
    assert measure.difference((a, a), (a, a / 0)) == measure.difference((a, a * float("nan")), (a, a)) == float("inf")
    noise = measure.difference((a, torch.tensor([1e-9])), (a, torch.tensor([0.0])))
    assert noise < 1e-6


def test_limits_are_of_what_binds():
    limits = Limits(copy_bytes_per_s=10.0, matmul_ops_per_s=100.0)
    assert limits.seconds(operations=200, moved=5) == 2
    assert limits.seconds(operations=200, moved=50) == 5
    assert limits.best(Limits(20.0, 50.0)) == Limits(20.0, 100.0)


def test_sides_are_timed_in_turn():
    order = []
    spreads = measure.interleaved(
        {name: lambda name=name: order.append(name) or torch.ones(2**20) for name in "ab"},
        "cpu",
        budget=0.0,
        rounds=(2, 5),
    )
    assert {spread.rounds for spread in spreads.values()} == {2}
    assert len(list(itertools.groupby(order[2:]))) >= 3  # and not all of one before all of the other


def test_work_of_the_loop_is_counted_as_by_hand():
    from dualview import DualPerspectiveEnhance, full_computation

    d, n, tokens = 32, 3, 16
    dem = DualPerspectiveEnhance.released(d)
    with full_computation():
        full = work.dem(dem, (n, n), (4, 4), 1, 4).operations
    positions = n * n * tokens
    per_direction = 4 * positions * d * d + 2 * positions * tokens * d
    assert full == 2 * (2 * per_direction + positions * d * d * 3 / 16)
    assert work.dem(dem, (n, n), (4, 4), 1, 4).operations < full


def test_gpu_script_runs_on_the_cpu(tmp_path, monkeypatch):
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "SUITES", ("photo", "scaling"))
    gpu.measure_type(Place("cpu", torch.bfloat16), "tiny", 100, tmp_path)
    document = results.read(tmp_path / "cpu-tiny-bfloat16.json")
    assert not [row for row in document["rows"] if row["missing"]]
    gpu.measure_type(Place("cpu", torch.bfloat16), "tiny", -1, tmp_path)
    late = results.read(tmp_path / "cpu-tiny-bfloat16.json")
    assert all("were over" in row["missing"] for row in late["rows"])
