"""Draws for tests, and how answers are counted."""

import pytest
import torch

from dualview.reader.building import build_model
from dualview.reader.evaluate import BARS, HELD_OUT_SEED, Score, answers_of, draw_questions, score
from dualview.reader.glyphs import DIGITS
from dualview.reader.questions import TASKS
from dualview.reader.recipe import Recipe


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
    folders = -(-Recipe().pages // 500)
    assert (1000 + folders) * 1_000_003 < HELD_OUT_SEED
    assert 1_000_003 + Recipe().warm_steps < HELD_OUT_SEED


def test_a_model_with_drawn_weights_is_asked_and_counted():
    torch.manual_seed(0)
    model, processor = build_model(None, 112)
    pictures = torch.randint(256, (3, 3, 336, 336), dtype=torch.uint8)
    texts = ["What is in B5?", "Which is larger, B5 or C7?", "Is there a star?"]
    together = answers_of(model.eval(), processor, pictures, texts)
    alone = [answers_of(model, processor, pictures[i : i + 1], texts[i : i + 1])[0] for i in range(3)]
    assert together == alone
    assert len(score(model, processor, "place", 2, (8.0, 8.0)).right) == 2
