"""The probe's pages and questions: fixed by the seed, right by another way of counting, split without overlap."""

from collections import Counter

import numpy as np
import pytest

from dualview.probe.backgrounds import PHOTOGRAPHS, photographs
from dualview.probe.draws import Draw, digest, drawing
from dualview.probe.glyphs import FONTS, HANDWRITTEN, NAMES, glyphs_of, resize
from dualview.probe.pages import draw_page
from dualview.probe.questions import ANSWERS, QUESTIONS, TASKS, Question, allowed_answers, ask
from dualview.probe.scenes import CELL, GLYPHS, MARKERS, SIZES, draw_scene, on_seam, tile_of
from dualview.reader.glyphs import TRAINING_FONTS

PAGES = "22a802faca3afe61e8100d0006bff5860d346b0127cf9d01aa388d62084ad356"
ASKED = "ca339dbfa2fc2cd46f62664867b97b3ad07ab15872294d11c0d42c2862211de8"
TASK = list(TASKS)


def scenes(count=60, pixels=336):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng, SIZES[seed % len(SIZES)], pixels)
        yield scene, ask(scene, rng)


def test_pages_of_a_seed_are_the_same_everywhere():
    """Of version 1, with the oldest and the newest libraries and on other machines: change VERSION with these."""
    assert digest(Draw("test", "test", 0, 12)) == (PAGES, ASKED)


@pytest.mark.more
def test_processes_draw_the_same():
    draw = Draw("train", "check", 3, 40)
    with drawing(2) as pool:
        for (pages, asked), (others, otherwise) in zip(draw.chunks(pool), draw.chunks(), strict=True):
            assert np.array_equal(pages, others)
            assert np.array_equal(asked, otherwise)
    assert np.array_equal(draw.questions(), np.concatenate([asked for _, asked in draw.chunks()]))


def test_draws_of_another_split_role_or_seed_have_other_scenes():
    draws = [Draw(split, role, seed, 1) for split in ("train", "test") for role in ("check", "test") for seed in (0, 1)]
    assert len({str(draw.scene(0)) for draw in draws}) == len(draws)


def test_splits_share_nothing():
    assert not set(FONTS["train"]) & set(FONTS["test"])
    assert not set(HANDWRITTEN["train"]) & set(HANDWRITTEN["test"])
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    assert not set(FONTS["test"]) & set(TRAINING_FONTS)  # nor has the encoder seen them
    for train, test in zip(glyphs_of("train"), glyphs_of("test"), strict=True):
        seen = {image.tobytes() for kind in train for image in kind}
        assert not seen & {image.tobytes() for kind in test for image in kind}
    shown = {picture.tobytes() for picture in photographs("train", 336)}
    assert not shown & {picture.tobytes() for picture in photographs("test", 336)}


@pytest.mark.parametrize("pixels", [336, 1008])
def test_a_scene_is_what_it_says(pixels):
    for scene, _ in scenes(20, pixels):
        names = Counter(glyph.name for glyph in scene.glyphs)
        assert len({(g.row, g.col) for g in scene.glyphs}) == GLYPHS
        assert [names[needle] for needle in scene.needles] == [1, 1]
        assert (names[scene.counted], names[scene.absent]) == (scene.count, 0)
        assert sorted(g.marker for g in scene.glyphs if g.marker is not None) == list(range(len(MARKERS)))
        for g in scene.glyphs:
            assert (g.y // CELL, g.x // CELL) == (g.row, g.col)
            assert not (g.hidden and (g.marker is not None or g.name in (*scene.needles, scene.counted)))


def test_answers_by_another_way_of_counting():
    starts = {task: int(np.flatnonzero(allowed)[0]) for task, allowed in zip(TASK, allowed_answers(), strict=True)}
    for scene, asked in scenes():
        at = {(g.row + 1, g.col + 1): g for g in scene.glyphs}
        for q in map(Question._make, asked):
            task, answer = TASK[q.task], q.answer - starts[TASK[q.task]]
            assert allowed_answers()[q.task, q.answer]
            first, second = at.get((q.row, q.col)), at.get((q.other_row, q.other_col))
            of_name = [g for g in scene.glyphs if g.name == q.name - 1]
            if task in ("read at a place", "read at a seam"):
                assert (first.name, first.hidden, q.seam) == (answer, False, on_seam(first, scene))
            elif task == "read at a marker":
                assert [g.name for g in scene.glyphs if g.marker == q.name - 1 - len(NAMES)] == [answer]
            elif task == "find a needle":
                patch = scene.pixels // 4
                cell = of_name[0]
                assert answer == (cell.row * CELL // patch) * 4 + cell.col * CELL // patch
            elif task == "count":
                assert answer == len(of_name)
            elif task == "compare":
                assert answer == (first.name > second.name) + (first.name >= second.name)
                assert {
                    (tile_of(g.y, scene.pixels), tile_of(g.x, scene.pixels)) for g in (first, second)
                }.__len__() == 2
            elif task == "relate":
                other = next(g for g in scene.glyphs if g.name == q.other_name - 1)
                assert answer == 2 * (other.row > of_name[0].row) + (other.col > of_name[0].col)
            elif task == "is it there":
                seen = [g for g in of_name if not g.hidden]
                covered = any(g.hidden for g in scene.glyphs)
                assert answer == (1 if seen else 2 if covered else 0)


def test_questions_are_in_the_order_of_tasks_and_their_answers_vary():
    asked = np.array([questions for _, questions in scenes(200)])
    assert asked.shape == (200, QUESTIONS, 10)
    assert [TASK[task] for task in asked[0, :, 0]] == [task for task, count in TASKS.items() for _ in range(count)]
    for task, allowed in enumerate(allowed_answers()):
        answers = asked[asked[..., 0] == task][:, 7]
        most = Counter(answers.tolist()).most_common(1)[0][1] / len(answers)
        assert most < 2.2 / allowed.sum() + 0.05, TASK[task]
    at_seams = asked[asked[..., 0] == TASK.index("read at a seam")][:, 9]
    assert 0.35 < at_seams.mean() < 0.75
    assert asked[..., 7].max() < ANSWERS


def test_what_is_hidden_is_not_on_the_page():
    """Pages that differ in a covered glyph alone are the same but for its edge."""
    rng = np.random.default_rng(5)
    scene = draw_scene(rng, 14)
    other = draw_scene(np.random.default_rng(5), 14)
    scene.glyphs[3].hidden, scene.glyphs[3].marker = True, None
    other.glyphs[3].hidden, other.glyphs[3].marker = True, None
    before = draw_page(scene, "train")
    other.glyphs[3].name = (other.glyphs[3].name + 1) % 10
    changed = np.argwhere((draw_page(other, "train") != before).any(-1))
    y, x = scene.glyphs[3].y, scene.glyphs[3].x
    inside = np.abs(changed - (y, x)).max(-1) <= 14
    assert not inside.any()


def test_resize_takes_the_mean_of_the_area():
    image = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    assert resize(image, 2, 3).tolist() == [[35, 55, 75], [155, 175, 195]]
    assert np.array_equal(resize(image, 4, 6), image)
    assert resize(np.full((7, 5, 3), 9, np.uint8), 11, 3).min() == 9
