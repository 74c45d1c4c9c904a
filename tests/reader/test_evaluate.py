"""Draws for tests, and how answers are counted."""

import math

import pytest
import torch

from dualview.reader import evaluate
from dualview.reader.building import build_model
from dualview.reader.evaluate import BARS, HELD_OUT_SEED, Score, answers_of, compared, draw_questions, measured, score
from dualview.reader.glyphs import DIGITS
from dualview.reader.questions import TASKS
from dualview.reader.recipe import SHARD, Recipe
from tests.checks import refuses


def test_intervals_are_wilsons():
    assert Score((True,) * 45 + (False,) * 5).accuracy == 0.9
    low, high = Score((True,) * 45 + (False,) * 5).interval
    assert (round(low, 3), round(high, 3)) == (0.786, 0.957)  # as tables have it
    assert Score((True,) * 10).interval[1] == pytest.approx(1)


@pytest.mark.parametrize("bar", sorted(BARS))
def test_draws_are_what_the_bars_ask_for(bar):
    task, heights, digits = BARS[bar]
    assert task in TASKS
    pictures, questions = draw_questions(task, 2, 112, heights, digits=digits)
    again, same = draw_questions(task, 2, 112, heights, digits=digits)
    assert torch.equal(pictures, again)
    assert questions == same
    assert pictures.shape == (2, 3, 112, 112)
    assert {question.task for question in questions} == {task}
    assert not digits or all(question.answer in DIGITS for question in questions)


def test_seeds_of_tests_are_not_those_of_training():
    for recipe, first in ((Recipe(seed=999_999), HELD_OUT_SEED), (Recipe(), HELD_OUT_SEED % 2**32)):
        shards = -(-recipe.pages // SHARD)
        assert (recipe.seed * 1000 + shards) * 1_000_003 < first
        assert recipe.seed * 1_000_003 + recipe.warm_steps + recipe.large_steps < first
    with refuses("seed=1000000", "999,999"):
        Recipe(seed=1_000_000)


def test_two_models_are_compared_question_by_question():
    found = compared({"place": [True] * 8 + [False] * 2}, {"place": [True] * 4 + [False] * 6})["place"]
    assert found["questions"] == 10
    assert (found["dual"]["accuracy"], found["low-res"]["accuracy"], found["gap"]["accuracy"]) == (0.8, 0.4, 0.4)
    reach = 1.96 * math.sqrt(0.24 / 9)  # four of ten differences are 1, the others 0
    assert found["gap"]["interval"] == pytest.approx([0.4 - reach, 0.4 + reach], abs=1e-4)
    assert found["dual"]["interval"] == pytest.approx(Score((True,) * 8 + (False,) * 2).interval, abs=1e-4)


def test_a_model_with_drawn_weights_is_asked_and_counted():
    torch.manual_seed(0)
    model, processor = build_model(None, 112)
    pictures = torch.randint(256, (3, 3, 336, 336), dtype=torch.uint8)
    texts = ["What is in B5?", "Which is larger, B5 or C7?", "Is there a star?"]
    together = answers_of(model.eval(), processor, pictures, texts)
    alone = [answers_of(model, processor, pictures[i : i + 1], texts[i : i + 1])[0] for i in range(3)]
    assert together == alone
    assert len(score(model, processor, "place", 2, (8.0, 8.0)).right) == 2


def test_what_is_measured_is_what_each_kind_scores(monkeypatch):
    """Kinds share pages, and each is encoded once."""
    torch.manual_seed(0)
    model, processor = build_model(None, 112)
    encoded, encode = [], model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda pixels: encoded.extend(pixels) or encode(pixels))
    answer = "7"  # in place of a model that has learnt nothing
    monkeypatch.setattr(processor.tokenizer, "batch_decode", lambda ids, **_: [answer] * len(ids))
    found, apart = measured(model.eval(), processor, 3, batch=4), {}
    once = len(encoded)
    for name, (task, heights, digits) in BARS.items():
        apart[name] = list(score(model, processor, task, 3, heights, digits=digits).right)
    assert found == apart
    assert once < len(encoded) - once == 3 * len(BARS)
    assert any(any(right) for right in found.values())


def test_every_question_is_asked_about_its_own_page(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "_seen", lambda model, processor, pictures: pictures)

    def said(model, processor, seen, questions):
        asked.extend(zip(seen, questions, strict=True))
        return ["-"] * len(questions)

    monkeypatch.setattr(evaluate, "_said", said)
    model, processor = build_model(None, 14)
    measured(model, processor, 3, batch=4)
    at = iter(asked)
    for heights in dict.fromkeys(heights for _, heights, _ in BARS.values()):
        for task, of_task, digits in BARS.values():
            if of_task == heights:
                for picture, question in zip(*draw_questions(task, 3, 42, heights, digits=digits), strict=True):
                    seen, text = next(at)
                    assert text == question.text
                    assert torch.equal(seen, picture)
    assert next(at, None) is None
