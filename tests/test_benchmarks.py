"""The benchmarks themselves: both sides of every case agree, files have their form, the page shows the files."""

import copy
import dataclasses
import itertools
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dualview as dv
from benchmarks import __main__, cases, children, measure, peers, report, results, runner, work
from benchmarks.cases import KERNELS, OURS, registry
from benchmarks.measure import Limits, Place
from dualview.kernels import dispatch
from tests.checks import refuses

CPU = Place()


def ids(case):
    return f"{case.suite}: {case.name}"


@pytest.fixture(scope="module")
def document():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "interpreting", lambda: False)
        return runner.run(CPU, "tiny", gate="skipped", suites=("photo", "scaling"), progress=False)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """What the machine can do is not asked again, and kernels are interpreted only where a test is about them."""
    monkeypatch.setattr(measure, "limits", lambda place: Limits(1e9, 1e9))
    monkeypatch.setattr(cases, "interpreting", lambda: False)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels are sides on the CPU, too: under the interpreter, which a GPU keeps from being set, and with triton."""
    if not dispatch.interpreting() or find_spec("triton") is None:
        pytest.skip("needs triton and its interpreter")
    monkeypatch.setattr(cases, "interpreting", lambda: True)


@pytest.mark.parametrize(
    "name", [case.name for case in registry("tiny") if case.suite in ("ops", "photo") and "images" not in case.name]
)
def test_kernels_agree(name, kernels):
    case = next(case for case in registry("tiny") if case.name == name)
    timed, _, missing = runner.agreeing(cases.prepare(case, CPU))
    assert KERNELS in timed, missing


@pytest.mark.parametrize("case", registry("tiny"), ids=ids)
def test_sides_agree(case):
    comparison = cases.prepare(case, CPU)
    timed, differences, missing = runner.agreeing(comparison)
    assert next(iter(timed)) == OURS
    assert all(reason.startswith(("not installed", "takes")) for reason in missing.values()), missing
    assert comparison.targets.keys() <= comparison.sides.keys()
    assert differences or not comparison.sides.keys() - comparison.other - missing.keys() - {OURS}


def test_every_suite_has_cases_of_every_size():
    for size in ("tiny", "quick", "full"):
        names = [ids(case) for case in registry(size)]
        assert len(names) == len(set(names))
    suites = {case.suite for case in registry("full")}
    assert suites == {
        "ops", "photo", "dem", "prefix", "train_step", "absorb", "direct", "preprocess", "import_time", "scaling",
        "attach", "large",
    }  # fmt: skip


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("cut", ["local", "global"])
@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_peers_of_the_crops_agree_on_odd_shapes(kind, cut, grid):
    layout = "channels_first" if kind == "images" else "channels_last"
    x = torch.randn(2, 3, 5 * grid[0], 7 * grid[1])
    x = x if kind == "images" else x.movedim(1, -1).contiguous()
    tiles = dv.ops.tiling.crop(x, grid, cut, data_format=layout)
    for name, peer in peers.tiling(kind, cut, compile_too=False).items():
        if name != "pixel (un)shuffle" or grid[0] == grid[1]:
            assert torch.equal(peer(x, grid), tiles), name
            assert torch.equal(peer(tiles, grid, inverse=True), x), name


def test_one_pattern_refuses_tiles_that_are_no_multiple_of_the_grid():
    with pytest.raises(peers.Missing, match="multiple of the grid"):
        peers.retile_by_einops(torch.randn(1, 4, 3, 4, 1), (2, 2), "local", "global")


def test_wrong_values_are_not_timed():
    comparison = cases.prepare(registry("tiny")[0], CPU)
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


def of(suite, name=""):
    return next(case for case in registry("tiny") if case.suite == suite and name in case.name)


PLAIN = "normalise, permute, rearrange twice"


def test_kernels_are_measured_against_the_limit(kernels):
    document = runner.run(CPU, "tiny", gate="skipped", suites=("photo: live",), progress=False)
    rows = {row["side"]: row for row in document["rows"]}
    for side in (OURS, KERNELS):
        row = rows[side]
        assert row["role"] == "ours"
        assert row["limit_seconds"] == row["moved_bytes"] / 1e9
        assert row["fraction"] == row["limit_seconds"] / row["seconds"]["median"]
    assert rows[PLAIN]["fraction"] is None


def test_memory_of_a_container(tmp_path):
    assert measure._of_cgroup(tmp_path) == sys.maxsize
    for most, held, free in ((5000, 2000, 3000), (2000, 5000, 0), ("max", 7, sys.maxsize)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{held}\n")
        assert measure._of_cgroup(tmp_path) == free
    assert 0 < measure.free_bytes("cpu") <= min(measure.of_proc("meminfo", "MemTotal"), measure._of_cgroup())


def test_a_process_that_fails_says_why():
    with refuses("memory of 'nobody'", "ended with 1", "KeyError: 'nobody'", error=RuntimeError):
        children.high_water(of("photo"), CPU, "tiny", "nobody")


def test_our_own_failure_fails_the_command(tmp_path, monkeypatch, capsys):
    """What was measured is written all the same."""

    def build(place):
        raise ValueError("no such thing")

    broken = dataclasses.replace(of("photo", "live"), build=build)
    monkeypatch.setattr(runner, "registry", lambda size: [of("photo", "all"), broken])
    output = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--tiny", "--no-gate", "--threads", "1", "--output", str(output)])
    with pytest.raises(SystemExit, match="photo: uint8 to normalised, live tiles, n=3: failed: ValueError: no such th"):
        __main__.main()
    assert [row["missing"] for row in results.read(output)["rows"]] == [None, None, "failed: ValueError: no such thing"]


def test_memory_that_is_held_ends():
    with measure.held_to(2**27), pytest.raises(RuntimeError) as caught:
        torch.ones(2**26)
    assert measure.out_of_memory(caught.value)
    assert not measure.out_of_memory(ValueError("no"))
    torch.ones(2**26)


def test_direct_attention_fails_in_a_process_of_its_own():
    case, (_, _, math) = of("direct", "n=8"), of("direct").alone
    tokens = (8 * 4) ** 2
    scores = 8 * tokens**2 * 4
    failed = children.alone(case, CPU, "tiny", math, memory=scores)
    assert failed.keys() == {"missing"}
    assert failed["missing"].startswith(f"failed at n = 8: needs more than {scores / 2**30:.1f} GiB (RuntimeError: ")
    done = children.alone(case, CPU, "tiny", math)
    assert done["meter"] == "child"
    assert done["peak_bytes"] > 2 * scores
    assert done["seconds"]["rounds"] == 2


def test_a_sweep_ends_where_all_sides_but_ours_have(monkeypatch):
    ours, sdpa, math = of("direct").alone
    seconds = {"median": 1.0, "q1": 1.0, "q3": 1.0, "rounds": 2}

    def alone(case, place, size, side, memory):
        n = case.params["n"]
        if side == math and n == 3:
            return {"missing": "failed at n = 3"}
        slow = {"median": 61.0} if (side, n) == (sdpa, 4) else {}
        return {"seconds": seconds | slow, "peak_bytes": n, "meter": "child"}

    monkeypatch.setattr(children, "alone", alone)
    monkeypatch.setattr(runner, "_release", lambda place: None)
    document = runner.run(CPU, "full", gate="skipped", suites=("direct",), progress=False)
    found = {(row["params"]["n"], row["side"]): (row["ratio"], row["missing"]) for row in document["rows"]}
    assert found == {
        **{(n, side): (1.0, None) for n in (2, 3, 4) for side in (ours, sdpa, math)},
        (4, sdpa): (61.0, None),
        (3, math): (None, "failed at n = 3"),
        (4, math): (None, "not run: failed in the case released, n=3"),
    }
    assert {row["role"] for row in document["rows"]} == {"ours", "other function"}


def test_a_part_is_measured_by_name():
    document = runner.run(CPU, "tiny", gate="skipped", suites=("photo: live", "ops: local tokens"), progress=False)
    assert {row["case"] for row in document["rows"]} == {
        "uint8 to normalised, live tiles, n=3",
        "recombine, local tokens, n=2",
    }
    alone = [case.name for case in registry("tiny") if runner._asked(case, "dem: paper, n=2: forward.")]
    assert alone == ["paper, n=2: forward"]
    with pytest.raises(
        SystemExit, match=r"no case of the tiny selection is called dem: n=9; the suites are \['absorb'"
    ):
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
        size, *part = read["selection"].split()
        stem = "-".join((read["device"], size, read["dtype"]))
        assert path.stem.startswith(f"{stem}-") if part and path.stem != stem else path.stem == stem
        known = {(case.suite, case.name) for case in registry(size)}
        assert {(row["suite"], row["case"]) for row in read["rows"]} <= known, "measure again: these cases are no more"
        assert not [row["missing"] for row in read["rows"] if "values differ" in (row["missing"] or "")]
        damaged = tmp_path / "damaged.json"
        damaged.write_text(path.read_text(encoding="utf-8").replace('"median"', '"mean"'), encoding="utf-8")
        with pytest.raises(ValueError, match=r"rows\[\d+\].*median"):
            results.read(damaged)


def test_first_page_shows_the_headlines():
    text = report.FIRST_PAGE.read_text(encoding="utf-8")
    assert report.page(text, report.headlines(report.shown())) == text, "run: python -m benchmarks.report"


def test_pages_show_the_committed_results():
    text, documents = report.PAGE.read_text(encoding="utf-8"), report.shown()
    assert text == report.page(text, report.section(documents)), "run: python -m benchmarks.report"
    rows = {path.stem: path.read_text(encoding="utf-8") for path in report.ROWS.glob("*.md")}
    assert rows == {stem: report.rows_page(stem, document) for stem, document in documents.items()}


def test_summary_counts_wins_and_names_losses(document):
    def row(case, side, ratio, role="peer", **other):
        return {"suite": "dem", "case": case, "side": side, "role": role, "ratio": ratio, "missing": None} | other

    rows = [
        row("one", OURS, None, "ours"),
        row("one", "slow", 3.0),
        row("one", "slower", 4.0),
        row("two", "fast", 0.5),
        row("two", "another function", 0.1, "other function"),
        row("two", "broken", None, missing="failed"),
        row("three", "as fast", 0.96),
    ]
    quick = {"device": "cpu", "selection": "quick", "rows": [row("old", "fast", 0.1)]}
    full = {"device": "cpu", "selection": "full dem", "rows": rows}
    lines = report.summary({"b": quick, "a": full}).splitlines()
    assert lines[2] == "| the enhancement module | 2 of 3 | 0.96 | 0.50 |"
    assert lines[-1] == "| two | fast | 0.50 |"
    assert not [line for line in lines if "old" in line or "another function" in line]
    assert "faster by" not in report.summary({"a": full | {"rows": rows[:3]}})
    assert report.summary({"a": full | {"device": "cuda"}}).count("\n") == 1  # a head, and no row
    peers = {r["suite"] for path in report.shown().values() for r in path["rows"] if r["role"] == "peer"}
    assert peers == set(report.SUITES)


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
    assert len(list(itertools.groupby(order))) >= 3  # and not all of one before all of the other


def test_long_calls_are_not_repeated(monkeypatch):
    counts = []
    for least in (0.0, float("inf")):
        monkeypatch.setattr(measure, "LONG_SECONDS", least)
        calls = []
        measure.interleaved({"a": lambda calls=calls: calls.append(0)}, "cpu", budget=0.0, rounds=(3, 3))
        counts.append(len(calls))
    assert counts[0] == 3
    assert counts[1] > 3 * 2


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


def test_tests_that_do_not_pass_are_told(tmp_path, capsys):
    for name, line in (("good", "pass"), ("bad", "assert 1 == 2"), ("slow", "__import__('time').sleep(60)")):
        (tmp_path / f"test_{name}.py").write_text(f"def test_it():\n    {line}\n")
    good, bad, slow = (str(tmp_path / f"test_{name}.py") for name in ("good", "bad", "slow"))
    assert runner.run_tests(good) == "passed"
    assert runner.run_tests(good, bad).startswith("failed: 1 failed, 1 passed in ")
    assert "assert 1 == 2" in capsys.readouterr().err
    assert runner.run_tests(slow, seconds=2) == "failed: not finished in 2 s"


def test_aims_of_copies_on_a_gpu():
    x, peer = torch.empty(2**25 + 1), {"peer": 0.9}
    assert cases._copying({}, x[1:], peer, Place("cuda"), alike=True).fraction_target is None  # it fits into a cache
    copying = [cases._copying({}, x, peer, Place("cuda"), alike=alike) for alike in (True, False)]
    assert [(c.targets, c.fraction_target) for c in copying] == [({}, 0.85), ({}, None)]
    assert cases._copying({}, x, peer, CPU, alike=True).targets == peer


def test_table_of_aims(kernels):
    rows = {row["side"]: row for row in runner.rows_of(of("photo"), CPU, "tiny")}
    rows[OURS] |= {"target": 0.85, "fraction": 0.9}
    rows[KERNELS] |= {"target": 0.85, "fraction": 0.8, "ratio": 0.5}
    rows[PLAIN] |= {"target": 2.0, "ratio": 1.5}
    case = rows[OURS]["case"]
    lines = report._targets({"rows": list(rows.values())}).splitlines()
    assert lines[4:] == [
        f"| {case} | {OURS} | what the machine could do |  | 85% | 90% | yes |",
        f"| {case} | {KERNELS} | what the machine could do |  | 85% | 80% | **no** |",
        f"| {case} | {OURS} | time | {PLAIN} | 2.00 | 1.50 | **no** |",
        f"| {case} | {KERNELS} | time | {PLAIN} | 2.00 | 3.00 | yes |",
    ]


def test_either_way_of_projecting_is_what_it_is_called():
    """And nothing stays forced."""
    sides, operations = cases.prepare(of("absorb"), CPU).sides, {}
    for side in (OURS, "projected throughout", "absorbed throughout", OURS):
        with FlopCounterMode(display=False) as counter:
            sides[side]()
        operations.setdefault(side, []).append(counter.get_total_flops())
    assert len(set(operations[OURS])) == 1
    assert operations["projected throughout"] != operations["absorbed throughout"]


@pytest.mark.parametrize(
    ("seconds", "samples"), [(0.001, [0.001] * 2), (2.0, [2.0] * 2), (children.TOO_LONG + 1, [children.TOO_LONG + 1])]
)
def test_samples_of_a_side_alone(seconds, samples, monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "seconds_of", lambda *given: calls.append(given) or seconds)
    assert children._samples(None, "cpu", 0.0) == samples
    assert len(calls) == len(samples) + (seconds < children.WARM)  # a short first call is not counted
