"""A whole run on few pages: the document, its results, its figure, and the command."""

import json
import re
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from inspect import getsource

import numpy as np
import pytest
import torch
from torch import nn

from dualview import cli
from dualview.models.reader import ReaderVisionConfig
from dualview.probe import backgrounds, encoders, figure, glyphs, pages, run
from dualview.probe.arms import ARMS
from dualview.probe.document import missing, write
from dualview.probe.figure import draw
from dualview.probe.grid import Plan, packed, unpacked
from dualview.probe.questions import QUESTIONS, TASKS
from dualview.probe.results import Results, chance, table
from dualview.probe.run import FULL, SMALL, TINY, run_probe
from dualview.probe.training import Budget
from dualview.reader import pretrain as pretraining


def small_tower(seed, steps, **_):
    """In place of the trained one: the mean colours of a patch's quarters, mixed by random weights."""
    torch.manual_seed(seed)
    mix = nn.Linear(12, 16)

    def encode(pixels):
        quarters = nn.functional.avg_pool2d(pixels, 7).unfold(2, 2, 2).unfold(3, 2, 2)
        return mix(quarters.movedim(1, -1).flatten(3))

    return encode


@pytest.fixture
def quick(monkeypatch):
    """Processes and towers that take no time."""
    monkeypatch.setattr(run, "pretrained_tower", small_tower)
    monkeypatch.setattr(run, "encoder_of", torch.no_grad())
    monkeypatch.setattr(run, "cores", lambda: 1)
    monkeypatch.setattr(run, "SMALL", TINY)


def test_a_run_from_pages_to_the_figure(quick, tmp_path, capsys, monkeypatch):
    path, drawn = tmp_path / "probe.json", []
    monkeypatch.setattr(figure, "draw", lambda document: drawn.append(draw(document)) or drawn[0])
    assert cli.main(["probe", "-o", str(path)]) == 0
    document = json.loads(path.read_text())
    names = [arm.name for arm in TINY.plan.arms]
    assert [row["arm"] for row in document["rows"]] == names
    assert missing(document) == []
    assert [(tmp_path / "probe.png").read_bytes()] == drawn
    assert drawn[0].startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert table(document) in shown
    assert all(name in shown for name in names)

    draws = TINY.plan.draws(0, 336)
    results = Results(document)
    assert np.array_equal(results.questions, draws[2].questions())
    for row in document["rows"]:
        right = results.right(row["arm"], [0])[0]
        assert right.shape == (draws[2].count, QUESTIONS)
        by_task = [results.accuracy(row["arm"], task).mean for task in TASKS]
        kinds = results.questions[..., 0]
        assert by_task == pytest.approx([right[kinds == task].mean() for task in range(len(TASKS))])
        assert results.accuracy(row["arm"]).mean == pytest.approx(np.mean(by_task))
        assert [step for step, _ in row["curve"]] == [2, 4]
    dem = results.facts("DEM released")
    assert set(dem["attention"]) == {"start", "gradients", "end"}
    assert set(dem["blank"]) == {"local", "stride"}
    cost = document["cost"]
    assert cost["DEM released"]["operations"] > cost["local"]["operations"] == 0
    assert cost["DEM released"]["parameters"] > cost["local"]["parameters"] == 0
    assert results.accuracy("local", against="local") == (0, 0, 0)
    kinds = {(row["stride"], row["kind"]) for row in document["shift"]}
    assert len(kinds) == len(document["shift"]) == 12
    for row in document["shift"]:
        if row["stride"] == 1:
            assert row["cosine_thumbnail"] == pytest.approx(1, abs=1e-5)
            assert row["cosine_local"] == pytest.approx(1, abs=1e-5)


@pytest.mark.more
def test_the_same_seed_gives_the_same_answers(quick, tmp_path):
    scale = replace(TINY, plan=replace(TINY.plan, arms=TINY.plan.arms[:2]))
    documents = [run_probe(scale, tmp_path / f"{name}.json") for name in "ab"]
    assert draw(documents[0]) == draw(json.loads((tmp_path / "b.json").read_text()))
    first, second = (document["rows"] for document in documents)
    assert [row["right"] for row in first] == [row["right"] for row in second]
    assert [row["losses"] for row in first] == [row["losses"] for row in second]


def test_what_time_does_not_suffice_for_is_listed(quick, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(run, "cost_of_arms", lambda *_: {})
    document = run_probe(replace(TINY, shift=None), tmp_path / "probe.json", minutes=1)
    left = missing(document)
    assert 0 < len(left) < len(TINY.plan.arms)
    assert [(row["arm"], row["seed"]) for row in document["rows"]] + left == [(a.name, s) for a, s in TINY.plan.jobs()]


def test_a_document_is_whole_while_it_grows(tmp_path):
    document = {
        "rows": [{"arm": "a", "n": 1}, {"arm": "b", "n": None}],
        "planned": [["a", "6", 0, 336]],
        "x": {"y": [1]},
    }
    write(document, tmp_path / "d.json")
    assert json.loads((tmp_path / "d.json").read_text()) == document
    write(document | {"rows": []}, tmp_path / "d.json")
    assert json.loads((tmp_path / "d.json").read_text())["rows"] == []
    assert [file.name for file in tmp_path.iterdir()] == ["d.json"]


def test_jobs_go_rank_by_rank_and_seed_by_seed():
    jobs = FULL.plan.jobs()
    assert [arm.rank for arm, _ in jobs] == sorted(arm.rank for arm, _ in jobs)
    assert {seed for arm, seed in jobs if arm.name == "DEM released"} == {0, 1, 2}
    assert {seed for arm, seed in jobs if arm.pixels == 1008} == {0}
    assert len(set(jobs)) == len(jobs)
    assert {arm for arm, _ in jobs} == set(ARMS)
    first = Plan(ARMS, (4, 7), Budget()).jobs()
    assert [seed for arm, seed in first if arm.rank == 0] == sorted(seed for arm, seed in first if arm.rank == 0)


def test_test_pages_are_the_same_for_every_seed_and_enough():
    pages = {FULL.plan.draws(seed, 336)[2] for seed in FULL.plan.seeds}
    assert len(pages) == 1
    assert pages.pop().count >= 1000  # of every task at least one question a page
    trained = {FULL.plan.draws(seed, 336)[0] for seed in FULL.plan.seeds}
    assert len(trained) == 3
    assert len(SMALL.plan.arms) == 8


def test_answers_as_text():
    right = torch.rand(13, QUESTIONS) < 0.5
    assert np.array_equal(unpacked(packed(right), 13), right.numpy())
    assert chance("count") == pytest.approx(1 / 6)


def test_a_tower_is_kept_and_found(tmp_path):
    made = encoders.pretrained_tower(3, 1, folder=tmp_path)
    found = encoders.pretrained_tower(3, 1, folder=tmp_path)
    pixels = torch.rand(2, 3, 28, 42)
    tokens = encoders.encoder_of(made)(pixels)
    assert tokens.shape == (2, 2, 3, 160)
    torch.testing.assert_close(encoders.encoder_of(found)(pixels), tokens)
    torch.testing.assert_close(encoders.encoder_of(found, 1)(pixels), tokens, atol=1e-5, rtol=1e-4)


def test_a_tower_has_the_name_of_all_that_decides_it(monkeypatch):
    names = [encoders.name_of(0, 1), encoders.name_of(1, 1), encoders.name_of(0, 2)]
    assert encoders.name_of(0, 1) == names[0]
    monkeypatch.setattr(encoders.inspect, "getsource", lambda module: "another training")
    names.append(encoders.name_of(0, 1))
    monkeypatch.undo()
    monkeypatch.setattr("dualview.models.reader.ReaderVisionConfig", lambda: ReaderVisionConfig(hidden_size=80))
    names.append(encoders.name_of(0, 1))
    assert len(set(names)) == 5


def test_the_name_of_a_tower_is_of_every_module_that_trains_or_draws():
    used = {
        name
        for module in encoders.TRAINING
        for name in re.findall(r"^from (dualview\.reader\.\w+) import", getsource(import_module(module)), re.MULTILINE)
    }
    assert used <= {*encoders.TRAINING}


@pytest.mark.parametrize("output", ["nowhere/probe.json", "folder.json", "probe.png", "probe.jpg", "probe"])
def test_an_output_that_cannot_be_written_is_refused_first(quick, tmp_path, monkeypatch, capsys, output):
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(run, "run_probe", None)
    assert cli.main(["probe", "-o", str(tmp_path / output)]) == 1
    assert "probe" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--device", "gpu"), ("--device", "meta"), ("--towers", __file__)])
def test_what_is_not_there_is_refused_first(tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.setattr(run, "run_probe", None)
    assert cli.main(["probe", "-o", str(tmp_path / "probe.json"), option, value]) == 1
    assert capsys.readouterr().err.startswith(f"dualview probe: error: {option} {value}: ")


def test_a_file_in_the_place_of_the_towers_is_refused_before_any_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(pretraining, "pretrain", None)
    with pytest.raises(FileExistsError, match="file"):
        encoders.pretrained_tower(0, 1, folder=tmp_path / "file")


@pytest.mark.parametrize("package", ["sklearn", "skimage"])
def test_a_missing_package_is_named_before_any_training(package, tmp_path, monkeypatch, capsys):
    for name, home in (("glyphs_of", glyphs), ("photographs", backgrounds)):  # not those that are loaded already
        monkeypatch.setattr(pages, name, getattr(home, name).__wrapped__)
    monkeypatch.setattr(glyphs, "_digits", glyphs._digits.__wrapped__)
    monkeypatch.setattr(glyphs, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setattr(run, "pretrained_tower", None)
    assert cli.main(["probe", "-o", str(tmp_path / "probe.json")]) == 1
    assert capsys.readouterr().err == (
        f'dualview probe: error: {package} is not installed: run pip install -e ".[probe]" in your clone\n'
    )
