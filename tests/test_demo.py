"""The demo asks about pictures that no training saw, and says of every answer whether it is right."""

import re
from functools import cache

import pytest
import torch

from dualview import demo
from dualview.demo import CODE_HEIGHT, HEIGHT, SIDE, draw_page, draw_photograph, run_demo, with_names
from dualview.embedded import learnt, measured
from dualview.images import load_image, to_image
from dualview.reader.evaluate import HELD_OUT_SEED
from dualview.reader.glyphs import CHARACTERS, HELD_OUT_FONTS
from dualview.reader.questions import place
from tests.tiny import photograph

PHOTO = photograph(30, 40)
OF_PAGE, OF_PHOTO = cache(draw_page), cache(lambda seed: draw_photograph(PHOTO, seed))


def test_fonts_and_seeds_are_those_of_tests(monkeypatch):
    drawn = []

    def render(pages, side, atlas, photographs):
        drawn.append((pages, side, atlas, photographs))
        return torch.zeros(1, 3, side, side)

    monkeypatch.setattr(demo, "render", render)
    monkeypatch.setattr(demo, "build_atlas", lambda fonts: fonts)
    draw_page(5)
    draw_photograph(PHOTO, 5)
    for pages, side, fonts, _ in drawn:
        assert pages.seed == HELD_OUT_SEED + 5
        assert (side, fonts) == (SIDE, HELD_OUT_FONTS) == (1008, HELD_OUT_FONTS)
    assert [set(pages.heights.unique().tolist()) for pages, *_ in drawn] == [{HEIGHT}, {CODE_HEIGHT}]
    assert drawn[0][3] is None
    assert drawn[1][3].shape == (1, 3, SIDE, SIDE)


def test_a_seed_is_one_page_and_one_code():
    for scenes, drawn in ((OF_PAGE, draw_page), (OF_PHOTO, lambda seed: draw_photograph(PHOTO, seed))):
        first, again, other = scenes(3), drawn(3), scenes(4)
        assert first.title == again.title
        assert torch.equal(first.picture, again.picture)
        assert first.questions == again.questions
        assert not torch.equal(first.picture, other.picture)
        assert first.questions != other.questions


def test_a_page_is_asked_what_has_been_learnt(monkeypatch):
    """Two questions of each kind, where there are two."""
    monkeypatch.setattr(demo, "learnt", lambda: ["place", "large", "spell"])
    asked = [question.task for question in draw_page(3).questions]
    assert asked == ["place", "place", "large", "spell", "spell"]


def test_the_largest_seed():
    assert draw_page(2**63 - 1).questions


def test_the_code_of_the_photograph_is_what_is_asked_for():
    scene = OF_PHOTO(3)
    start = re.fullmatch(r"Your photograph, with a code pasted from ([A-F])([1-8]) on", scene.title)
    *places, spell = scene.questions
    first, row = "ABCDEFGH".index(start[1]), int(start[2]) - 1
    assert len(spell.answer) == 3
    assert set(spell.answer) <= set(CHARACTERS)
    assert spell.cells == tuple((row, first + i) for i in range(3))
    for question, cell, glyph in zip(places, spell.cells, spell.answer, strict=True):
        assert question == ("place", f"What is in {place(cell)}?", glyph, (cell,))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (40, 30)])
def test_a_photograph_of_any_size_is_seen_around_the_code(size):
    """One colour stays that colour but for the noise, away from the row of the code."""
    scene = draw_photograph(torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, *size), 0)
    row = scene.questions[0].cells[0][0] * SIDE // 8
    away = torch.cat([scene.picture[:, :row], scene.picture[:, row + SIDE // 8 :]], 1).float()
    assert (away.mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


def test_the_names_of_cells_stand_beside_them():
    picture = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)
    named = with_names(picture)
    assert torch.equal(named[:, 40:, 40:], picture)
    for border in (named[:, :40, 40:], named[:, 40:, :40].mT):
        inked = (border < 128).any(0).any(0).view(8, 126)
        assert inked[:, 43:83].any(1).all()
        assert not inked[:, :43].any()


@pytest.fixture
def said(monkeypatch):
    """Answers in place of those of the models: the first right everywhere but for one, the second wrong everywhere."""
    asked = []

    def answers_of(model, processor, pictures, questions):
        asked.append((model, pictures, questions))
        truths = [q.answer for scene in (OF_PAGE(4), OF_PHOTO(4)) for q in scene.questions]
        return ["mistaken", *truths[1:]] if model.model.dem is not None else ["-"] * len(truths)

    monkeypatch.setattr(demo, "answers_of", answers_of)
    return asked


def test_what_is_printed_and_written(said, tmp_path, capsys):
    out = tmp_path / "out.png"
    shown = run_demo(PHOTO, out, seed=4)
    printed = capsys.readouterr().out
    scenes = [OF_PAGE(4), OF_PHOTO(4)]
    for _, pictures, questions in said:
        assert questions == [question.text for scene in scenes for question in scene.questions]
        assert torch.equal(pictures[0], scenes[0].picture)
        assert torch.equal(pictures[-1], scenes[1].picture)
    lines = [re.split(r"  +", line) for line in printed.splitlines()]
    first = scenes[0].questions[0]
    assert [first.text, first.answer, "mistaken (wrong)", "- (wrong)"] in lines
    for question in [*scenes[0].questions[1:], *scenes[1].questions]:
        assert [question.text, question.answer, question.answer, "- (wrong)"] in lines
    counts = [len(scene.questions) for scene in scenes]
    assert ["right", f"{counts[0] - 1} of {counts[0]}", f"0 of {counts[0]}"] in lines
    assert ["right", f"{counts[1]} of {counts[1]}", f"0 of {counts[1]}"] in lines
    for kind, task in measured()["tasks"].items():
        shares = f"{task['dual']['accuracy']:.3f} with tiles, {task['low-res']['accuracy']:.3f} low resolution"
        line = f"{kind}: {shares}, of {task['questions']} questions"
        assert (line in printed) == (kind.split(",")[0] in learnt())
    assert f"Wrote {out} and {tmp_path / 'out.html'}" in printed
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert '<td class="wrong">mistaken (wrong)</td>' in text
    assert load_image(out).shape[1] > 2 * SIDE
    assert [tuple(one.canvas.shape) for one in shown] == [(3, 336, 336)] * 2
    small = to_image(scenes[0].picture).reduce(3)
    assert (shown[0].canvas.float() - load_image(small).float()).abs().mean() < 8
