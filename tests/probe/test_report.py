"""The page of the probe says what the committed results say, and these are of pages that can be drawn anew."""

import json
import re
from contextlib import nullcontext

import numpy as np
import pytest

from benchmarks import probe_cpu
from benchmarks.probe_cpu import AVERAGE, EMBEDDED, FASTER
from benchmarks.probe_report import FIGURE, GAPS, MAIN, PAGE, REDUCED_GAPS, RELEASED, WHY, load, page
from benchmarks.probe_tables import (
    by_offset,
    differences,
    found_elsewhere,
    not_reached,
    of_paper,
    operating_points,
    signed,
)
from dualview.probe.arms import ARMS
from dualview.probe.document import missing
from dualview.probe.draws import Draw, digest
from dualview.probe.grid import Plan
from dualview.probe.questions import TASKS
from dualview.probe.results import TASK, Results
from dualview.probe.run import FULL
from dualview.probe.shift import KINDS
from dualview.probe.statistics import Interval
from dualview.probe.training import Budget


@pytest.fixture(scope="module")
def document():
    return load("h100")


@pytest.fixture(scope="module")
def results(document):
    return Results(document)


@pytest.fixture(scope="module")
def reduced():
    return load("cpu")


@pytest.mark.more
def test_the_page_is_that_of_the_results(document, reduced):
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(document, reduced, load("backbone")), "run python -m benchmarks.probe_report"
    assert FIGURE.read_text(encoding="utf-8").startswith("<?xml")


def test_results_are_of_these_pages_arms_and_tasks(document):
    images, questions = digest(Draw("test", "test", 0, document["digest"]["pages"]))
    assert document["digest"] == {"pages": 12, "images": images, "questions": questions}
    assert document["tasks"] == TASKS
    assert document["pages"] == {str(pixels): list(counts) for pixels, counts in FULL.plan.pages.items()}
    assert document["planned"] == [[arm.name, arm.table, seed, arm.pixels] for arm, seed in FULL.plan.jobs()]
    assert set(document["cost"]) == {arm.name for arm in ARMS}
    assert document["machine"]["gpu"]


def test_first_rank_is_complete_and_what_is_missing_is_listed(document, reduced):
    left = {arm for arm, _ in missing(document)}
    assert not left & {arm.name for arm in ARMS if arm.rank == 0}
    measured = {row["arm"] for row in reduced["rows"]}
    texts = not_reached(document, measured), found_elsewhere(document, reduced)
    for text, arms in zip(texts, (left - measured, left & measured), strict=True):
        assert text.count("\n") + 1 == len(arms)
        assert all(re.search(rf"^- {re.escape(arm)}: seed [0-9, ]+$", text, re.MULTILINE) for arm in arms)
    assert not_reached(document).count("\n") + 1 == len(left)


def test_the_reduced_series_is_one_run_in_the_order_that_was_fixed(document, reduced):
    plan = probe_cpu.plan()
    assert reduced["planned"] == [[arm.name, arm.table, seed, arm.pixels] for arm, seed in plan.jobs()]
    assert [row["arm"] for row in reduced["rows"]] == [arm for arm, *_ in reduced["planned"]][: len(reduced["rows"])]
    assert {row["steps"] for row in reduced["rows"]} == {reduced["budget"]["steps"]} == {plan.budget.steps}
    assert reduced["pages"] == {"336": list(plan.pages[336])}
    assert reduced["digest"] == document["digest"]
    assert reduced["commit"]
    assert reduced["machine"]["name"]


def test_the_reduced_series_writes_what_is_done(tmp_path, monkeypatch):
    (tmp_path / "probe").mkdir()
    arms = tuple(arm for arm in probe_cpu.plan().arms if arm.name in (EMBEDDED, "local"))
    tiny = Plan(arms, (0,), Budget(2, 2, points=2), {336: (4, 2, 4)})
    monkeypatch.setattr(probe_cpu, "plan", lambda: tiny)
    monkeypatch.setattr(probe_cpu, "FOLDER", tmp_path)
    monkeypatch.setattr(probe_cpu, "drawing", lambda processes: nullcontext())
    probe_cpu.main(None)
    found = json.loads((tmp_path / "probe" / "cpu.json").read_text())
    assert [row["arm"] for row in found["rows"]] == [EMBEDDED, "local"]
    assert Results(found).right("local", [0]).shape[1] == 4
    assert found["encoders"] == [{"seed": 0, "tower": "embedded"}]


@pytest.mark.more
def test_every_task_has_a_thousand_items(results):
    for task in TASKS:
        assert results.weights(task).sum() >= 1000


@pytest.mark.more
def test_claims_of_the_text(results):
    """The sentences that no number of the results is put into."""
    by_name = {name: results.accuracy(arm, task, against=of) for name, (arm, of, task) in GAPS.items()}
    better = ("thumbnail_helps", "thumbnail_helps_large", "thumbnail_in_dem", "paper_residual", "fixed_linear_place")
    assert all(by_name[name].low > 0 for name in (*better, "fixed_linear", "smooth_gain"))
    assert all(by_name[name].high < 0 for name in ("released_local", "released_linear", "paper_local"))
    assert by_name["stride_thumbnail"].low < 0 < by_name["stride_thumbnail"].high
    assert by_name["thumbnail_smooth"].low < 0 < by_name["thumbnail_smooth"].high
    norm = results.accuracy("DEM paper + norm", against="DEM paper")
    assert norm.low < 0 < norm.high
    assert results.accuracy("DEM paper, logits x 8", against="DEM paper").high < 0
    assert results.accuracy("DEM paper, 8 heads", against="DEM paper").low > 3 / 100
    cost = results.document["cost"]
    ratio = cost["DEM paper + residual + norm"]["operations"] / cost["MLP of as many parameters"]["operations"]
    assert 14 < ratio < 16
    for task, most in {"find a needle": 0.14, "count": 0.19, "relate": 0.37, "is it there": 0.6}.items():
        assert all(results.accuracy(arm, task).mean < most for arm in results.arms), task
    on, off = (
        results.accuracy("local + thumbnail, linear", "read at a seam", seam=seam, against="local").mean
        for seam in (True, False)
    )
    assert (round(100 * on), round(100 * off)) == (8, 2)


@pytest.mark.more
def test_what_a_cover_alone_tells_of_what_is_there(results):
    """On a page without a cover "no" or "yes", on one with it "yes" or "cannot tell": the more frequent of both."""
    draw, kinds = Draw("test", "test", 0, len(results.questions)), list(TASKS)
    answers = results.questions[results.questions[..., TASK] == kinds.index("is it there")][:, 7].reshape(
        draw.count, -1
    )
    covered = np.array([any(glyph.hidden for glyph in draw.scene(i).glyphs) for i in range(draw.count)])
    right = sum(np.unique(answers[which], return_counts=True)[1].max() for which in (covered, ~covered))
    assert right / answers.size == pytest.approx(0.61, abs=0.005)


@pytest.mark.more
def test_arms_still_gained_in_the_second_half(results):
    for arm in results.arms:
        curves = [dict(map(tuple, row["curve"])) for row in results.rows[arm].values()]
        gained = sum(curve[1500] - curve[750] for curve in curves) / len(curves)
        assert 0.5 / 100 < gained < 3.5 / 100


@pytest.mark.more
def test_tables_have_every_arm_that_was_trained(results):
    for arm in (*MAIN, *WHY):
        assert arm in results.rows
    assert of_paper(results, "6").count("\n") == 7
    assert "| DEM released |" in of_paper(results, "4")
    assert of_paper(results, "5") == "Not reached."


@pytest.mark.more
def test_pairs_of_which_one_was_not_trained_are_left_out(results):
    rows = differences(results, (("local", "stride"), ("local", EMBEDDED), (EMBEDDED, "local"))).splitlines()[2:]
    (cells,) = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    assert cells[:2] == ["local", "stride"]
    assert cells[2] == signed(results.accuracy("local", against="stride"))
    assert cells[4] == signed(results.accuracy("local", "read a large glyph", against="stride"))


@pytest.mark.more
def test_distance_of_a_glyph_in_its_cell(results):
    rows = [line.split("|")[1:-1] for line in by_offset(results, ("local", "DEM released")).splitlines()[2:]]
    local, released = ([float(cell) for cell in row[1:]] for row in rows)
    assert abs(local[0] - released[0]) < 3
    assert released[3] < 0.5 * local[3]


@pytest.mark.more
def test_claims_of_the_text_on_the_reduced_series(reduced):
    results = Results(reduced)
    gaps = {name: results.accuracy(arm, task, against=of) for name, (arm, of, task) in REDUCED_GAPS.items()}
    assert gaps["average"].low > 0
    assert gaps["concat"].low < 0 < gaps["concat"].high < 0.01
    assert gaps["average_linear"].low < 0
    assert gaps["average_linear"].mean < 0.005
    assert gaps["embedded_linear"].high < 0
    place = results.accuracy(EMBEDDED, "read at a place", against=AVERAGE)
    assert place.low < 0 < place.high
    over_paper = results.accuracy(AVERAGE, against="DEM paper + residual + norm")
    assert over_paper.low > 0
    assert 0.01 < over_paper.mean < 0.02
    fusions = [arm for arm, table, *_ in reduced["planned"] if table == "5" and arm in results.arms and arm != EMBEDDED]
    differences = {arm: results.accuracy(arm, against=RELEASED) for arm in fusions if arm != RELEASED}
    assert len(differences) == 6
    assert differences.pop("DEM released, conv3x3").low > 0.02
    assert [arm for arm, found in differences.items() if found.high < 0] == ["DEM released, linear_concat"]
    assert all(-0.012 < found.mean < 0.012 for found in differences.values())
    assert gaps["average_thumb"].low < 0 < gaps["average_thumb"].high
    assert gaps["phases"].high < 0
    shares = [[results.accuracy(arm + rate).mean for arm in FASTER] for rate in ("", ", 2 x the rate")]
    assert [sorted(range(4), key=of.__getitem__) for of in shares] == 2 * [[2, 3, 0, 1]]
    gains = {arm: faster - slower for arm, slower, faster in zip(FASTER, *shares, strict=True)}
    assert max(gains, key=gains.__getitem__) == RELEASED
    far = [float(row.split("|")[-2]) for row in by_offset(results, (RELEASED, AVERAGE)).splitlines()[2:]]
    assert 1.8 < far[1] / far[0] < 2.2
    cost = reduced["cost"]
    assert 4.5 < cost[AVERAGE]["operations"] / cost[RELEASED]["operations"] < 5.5


def test_claims_of_the_text_on_a_pretrained_network():
    rows = {(row["stride"], row["kind"]): row for row in load("backbone")["shift"]}
    assert list(rows) == [(n, kind) for n in (2, 3, 4) for kind in KINDS]
    thumbnail, stride, smooth = (rows[3, kind] for kind in KINDS)
    assert [round(row["cosine_thumbnail"], 2) for row in (stride, smooth)] == [0.88, 0.98]
    assert smooth["reconstruction"] < thumbnail["reconstruction"]
    assert 1 / 13 < stride["reconstruction"] / thumbnail["reconstruction"] - 1 < 1 / 11
    assert all(row["accuracy"] < 0.11 and row["accuracy_own"] < 0.11 for row in rows.values())


def test_signs_and_bold():
    assert signed(Interval(0.01, -0.02, 0.03)) == "+1.0 (-2.0 to +3.0)"
    assert signed(Interval(-0.05, -0.06, -0.01)) == "**-5.0 (-6.0 to -1.0)**"


def test_operating_points_are_the_largest_that_fit():
    rows = [
        {"grid": n, "what": what, "scores": scores, "training": training, "peak_bytes": peak}
        for n, peak in ((1, 10 * 2**20), (2, 200 * 2**20), (3, None))
        for what in ("as the readout needs", "all tokens", "direct cross-attention")
        for scores in ("fused", "materialised")
        for training in (False, True)
    ]
    lines = operating_points({"memory": rows}, (8, 32, 1024)).splitlines()
    assert lines[2].split("|")[3:-1] == [" none ", " 336 ", " 672 "]
