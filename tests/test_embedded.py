"""The models that come with the package: files, loading, answers, what their card says, and how they get there."""

import hashlib
import importlib.util
import json
import math
import re
import shutil
import socket
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import dualview as dv
from dualview import cli, embedded
from dualview.embedded import KNOWN, embedded_folder, load_embedded, measured
from dualview.images import load_image, to_image
from dualview.models import InfLlavaForConditionalGeneration, InfLlavaProcessor
from dualview.models.reader import ReaderVisionModel
from dualview.reader.evaluate import BARS, answers_of, draw_questions, score
from dualview.reader.pages import sample_pages
from dualview.reader.questions import TASKS, ask
from tests.checks import refuses

FOLDER = Path(embedded.__file__).parent
VIEWS = ("dual", "low-res")
SHORT = ("--max-new-tokens", "24")  # as `answers_of` has it


@pytest.fixture(scope="module")
def models():
    return {view: load_embedded(view) for view in VIEWS}


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "embed.py"
    spec = importlib.util.spec_from_file_location("embed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_few_and_small():
    files = [file for view in VIEWS for file in (FOLDER / view).rglob("*")]
    assert {file.suffix for file in files} == {".json", ".jinja", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for view in VIEWS:
        weights = load_file(FOLDER / view / "model.safetensors")
        assert {x.dtype for x in weights.values() if x.is_floating_point()} == {torch.float16}
        assert all(x.isfinite().all() for x in weights.values())


def test_loading_needs_no_network_and_no_pickle(monkeypatch):
    def never(*_, **__):
        raise AssertionError("must not be called")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(torch, "load", never)
    model, processor = dv.load_embedded()
    assert type(model) is InfLlavaForConditionalGeneration
    assert type(processor) is InfLlavaProcessor
    assert type(model.model.vision_tower) is ReaderVisionModel
    assert not model.training
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    assert model.model.dem is not None
    assert load_embedded("low-res")[0].model.dem is None


def test_the_auto_classes_load_the_same(models):
    found = AutoModelForImageTextToText.from_pretrained(FOLDER / "dual", dtype=torch.float32)
    assert type(found) is InfLlavaForConditionalGeneration
    for name, value in models["dual"][0].state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    assert type(AutoProcessor.from_pretrained(FOLDER / "dual")) is InfLlavaProcessor


def test_answers_are_the_same_each_time(models):
    pictures, questions = draw_questions("place", 4, 336, (8, 28), seed=99)
    texts = [question.text for question in questions]
    for view, pair in models.items():
        first = answers_of(*pair, pictures, texts)
        assert first == answers_of(*load_embedded(view), pictures, texts)


@pytest.mark.parametrize("view", VIEWS)
def test_answers_are_those_of_generate_on_the_picture(models, view):
    """Whatever the length of the questions beside, and though the picture is encoded apart."""
    model, processor = models[view]
    for task in ("place", "compare", "spell"):
        pictures, questions = draw_questions(task, 2, 336, (8, 28), seed=5)
        given = answers_of(model, processor, pictures, [question.text for question in questions])
        for picture, question, answer in zip(pictures, questions, given, strict=True):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(images=picture, text=text, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert answer == processor.decode(ids, skip_special_tokens=True).strip()


def test_learnt_is_what_is_better_than_one_answer_to_all(monkeypatch):
    tasks = {
        "place, 8 px digits": {"dual": {"interval": [0.2, 0.3]}, "constant": 0.1},
        "where": {"dual": {"interval": [0.4, 0.6]}, "constant": 0.4},
        "large": {"dual": {"interval": [0.9, 1.0]}, "constant": 0.3},
        "place, 28 px digits": {"dual": {"interval": [0.1, 0.3]}, "constant": 0.2},
    }
    monkeypatch.setattr(embedded, "measured", lambda: {"tasks": tasks})
    assert embedded.weak_tasks(tasks) == ["where", "place, 28 px digits"]
    assert embedded.learnt() == ["large"], "a kind is learnt when all that was asked of it is"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("bar", ["place, 8 px digits", "large"])
def test_as_often_right_as_the_card_says(models, view, bar):
    """On a draw of its own, within three standard errors of what was measured on many."""
    share, count = measured()["tasks"][bar][view]["accuracy"], 16
    task, heights, digits = BARS[bar]
    right = sum(score(*models[view], task, count, heights, digits=digits, seed=17).right)
    reach = 3 * math.sqrt(max(share * (1 - share), 0.02) / count)
    assert share - reach <= right / count <= share + reach


def test_the_card_says_what_was_measured(script):
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == script.card(FOLDER)
    tasks = measured()["tasks"]
    assert tasks.keys() == BARS.keys()
    for bar, task in tasks.items():
        assert task["questions"] >= 100
        assert f"| {bar} | {task['questions']} | {task['dual']['accuracy']:.3f} [" in script.row(bar, task)


def test_the_page_says_what_was_measured(script):
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text, measured()["tasks"]) == text
    other = {**measured()["tasks"]}
    other["where"] = {**other["where"], "gap": {"accuracy": 0.5, "interval": [0.25, 0.75]}}
    assert "| 50.0 (25.0 to 75.0) |" in script.page(text, other)


def test_a_question_of_every_kind_is_named():
    pages = sample_pages(40, (8, 28), 0)
    asked = [question for index in range(len(pages)) for question in ask(pages, index, Random(index))]
    for task, known in zip(TASKS, KNOWN, strict=True):
        forms = {form(question.text) for question in asked if question.task == task}
        assert form(known) in forms


def form(question):
    """The question without what is named in it."""
    return re.sub(r"\b([A-H][1-8]|circle|cross|diamond|square|star|triangle)\b", "_", question)


def test_bad_input(tmp_path, monkeypatch):
    with refuses("view='tiles'", '"dual"', '"low-res"'):
        load_embedded("tiles")
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    with refuses("install it again", str(tmp_path / "low-res"), error=FileNotFoundError):
        load_embedded("low-res")


class TestAsk:
    """`dualview ask` and `dualview chat` without --model."""

    @pytest.fixture
    def page(self, tmp_path):
        pictures, questions = draw_questions("place", 1, 336, (14, 14), seed=3)
        to_image(pictures[0]).save(tmp_path / "page.png")
        return tmp_path / "page.png", pictures, questions[0].text

    def test_the_answer_is_that_of_the_model(self, page, models, capsys):
        path, pictures, question = page
        assert cli.main(["ask", str(path), question, *SHORT]) == 0
        out, err = capsys.readouterr()
        assert [out.strip()] == answers_of(*models["dual"], pictures, [question])
        for known in KNOWN:
            assert known in err

    def test_both_models_answer(self, page, models, tmp_path, capsys):
        path, pictures, question = page
        report = tmp_path / "report.html"
        asked = ["ask", str(path), question, *SHORT, "--compare", "low-res", "--report", str(report)]
        assert cli.main(asked) == 0
        out, err = capsys.readouterr()
        given = [answers_of(*models[view], pictures, [question])[0] for view in VIEWS]
        assert out.split("\n") == ["with tiles:", given[0], "low resolution:", given[1], f"wrote {report}", ""]
        assert err.count("embedded model") == 1
        assert f"<th>with tiles</th><th>low resolution</th></tr><tr><td>{question}</td>" in report.read_text()

    def test_bad_input_is_one_line(self, page, tmp_path, monkeypatch, capsys):
        path, _, question = page
        assert cli.main(["ask", str(tmp_path / "none.png"), question]) == 1
        assert capsys.readouterr().err == f"dualview ask: error: {tmp_path / 'none.png'}: no such file.\n"
        monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
        assert cli.main(["ask", str(path), question]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"{tmp_path / 'dual'}: the weights that come with the package are not there: install it again" in err

    @pytest.mark.parametrize(
        "more, line",
        [([" "], "QUESTION is ' ': write what"), (["What?", "--device", "abacus"], "--device abacus: ")],
    )
    def test_bad_arguments_are_one_line(self, page, more, line, capsys):
        assert cli.main(["ask", str(page[0]), *more]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith(f"dualview ask: error: {line}")

    def test_help_says_what_it_knows(self, capsys):
        for command in ("ask", "chat"):
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
            told = " ".join(capsys.readouterr().out.split())
            assert all(known in told for known in KNOWN)


class TestPacking:
    """`scripts/embed.py`."""

    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "README.md"))
        return folder

    def test_what_is_packed_is_what_was_trained(self, script, source, tmp_path):
        weights = load_file(source / "dual" / "model.safetensors")
        name = next(name for name, x in weights.items() if x.ndim == 2)
        weights = {key: x.float() for key, x in weights.items()}
        weights[name] = weights[name] + 1
        save_file(weights, source / "dual" / "model.safetensors", {"format": "pt"})
        results = json.loads((source / "results.json").read_text())
        results["minutes"]["an abacus"] = 7.0
        results["wall_minutes"], results["photographs"] = 44.0, {"skimage/grass.png": "CC0, linolafett"}
        results["recipe"]["photographs"] = 0.2
        for task in results["tasks"].values():
            task["questions"] = 2
        (source / "results.json").write_text(json.dumps(results))
        place = tmp_path / "place"
        shutil.copytree(source, place)
        page = tmp_path / "page.md"
        shutil.copy(script.PAGE, page)
        script.embed(source, place, page)
        packed = load_file(place / "dual" / "model.safetensors")
        assert torch.equal(packed[name], weights[name].half())
        assert packed.keys() == weights.keys()
        card = (place / "README.md").read_text()
        for said in (
            "an abacus 7.0",
            "one call of `make reader`, in 44.0 minutes",
            "of 20% of the pages",
            "grass.png (CC0",
        ):
            assert said in card
        assert page.read_text() == script.page(script.PAGE.read_text(), results["tasks"])
        assert {path.name for path in place.iterdir()} == {*VIEWS, "results.json", "README.md"}

    def test_what_is_too_large_or_not_measured_changes_nothing(self, script, source, tmp_path, monkeypatch):
        place = tmp_path / "place"
        shutil.copytree(source, place)
        before = hashes(place)
        (source / "results.json").write_text('{"tasks": {}}')
        with refuses("results.json lacks ['compare, 8 px'", "let `make reader` run to its end"):
            script.embed(source, place)
        monkeypatch.setattr(script, "MOST", 1_000_000)
        with refuses("bytes in float16", "1,000,000"):
            script.embed(source, place)
        assert hashes(place) == before
        assert {path.name for path in tmp_path.iterdir()} == {"run", "place"}


def hashes(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_any_picture_is_answered(models, tmp_path):
    """Whatever comes out."""
    for size in ((1, 1), (700, 20), (60, 2000)):
        to_image(torch.randint(256, (3, *size), dtype=torch.uint8)).save(tmp_path / "a.png")
        assert isinstance(answers_of(*models["dual"], load_image(tmp_path / "a.png")[None], ["Why?"])[0], str)
    assert embedded_folder("dual") == FOLDER / "dual"
