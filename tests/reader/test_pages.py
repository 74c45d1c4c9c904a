"""Pages and questions: the same for the same seed, true answers, and nothing of the tests in the training."""

import hashlib
from random import Random

import pytest
import torch

from dualview.reader.drawing import contrasting
from dualview.reader.glyphs import (
    CHARACTERS,
    CLASSES,
    HELD_OUT_FONTS,
    SHAPES,
    TRAINING_FONTS,
    build_atlas,
)
from dualview.reader.pages import CELLS, COVERED, EMPTY, render, sample_pages
from dualview.reader.pretrain import BACKGROUND, NOT_JUDGED, draw_tiles
from dualview.reader.questions import TASKS, ask, caption, place

FONTS = ("DejaVuSans", "cmr10")


def digest(seed):
    pages = sample_pages(3, (8, 28), seed)
    said = [(q.task, q.text, q.answer) for i in range(3) for q in ask(pages, i, Random(seed))]
    return hashlib.sha256(repr((pages.kinds.tolist(), pages.large.tolist(), said)).encode()).hexdigest()[:16]


def test_pages_and_questions_of_a_seed_are_the_same_everywhere():
    assert digest(0) == "8a1fb6c4b9c1734a"
    assert digest(1) == "d1dc8179ab784278"


def test_pictures_of_a_seed_are_the_same():
    atlas = build_atlas(FONTS)
    first, again, other = (render(sample_pages(2, (8, 28), seed), 112, atlas) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 3, 112, 112)
    torch.testing.assert_close(first * 255, (first * 255).round(), atol=1e-4, rtol=0)
    tiles, same = (draw_tiles(2, 56, 6, torch.Generator().manual_seed(3), atlas) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(tiles, same, strict=True))


def test_fonts_of_the_tests_are_never_trained_on():
    assert not set(TRAINING_FONTS) & set(HELD_OUT_FONTS)
    assert not torch.equal(build_atlas(FONTS[:1]).texels, build_atlas(FONTS[1:]).texels)


def cell_of(name):
    return int(name[1]) - 1, "ABCDEFGH".index(name[0])


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_true(seed):
    """Found again from the text of the question alone."""
    pages, asked = sample_pages(1, (8, 28), seed), set()
    kinds, large = pages.kinds[0].tolist(), int(pages.large[0])
    shapes = {kinds[r][c]: (r, c) for r in range(CELLS) for c in range(CELLS) if kinds[r][c] >= len(CHARACTERS)}

    def said(r, c):
        kind = kinds[r][c]
        return "nothing" if kind < 0 else CLASSES[kind] if kind < len(CHARACTERS) else f"a {CLASSES[kind]}"

    for question in ask(pages, 0, Random(seed)):
        asked.add(question.task)
        words = question.text.rstrip("?").replace(",", "").split()
        cells = [cell_of(word) for word in words if len(word) == 2 and word[0] in "ABCDEFGH" and word[1].isdigit()]
        if question.task == "place":
            assert question.answer == said(*cells[0])
        elif question.task == "marker":
            r, c = shapes[CLASSES.index(words[-1])]
            assert question.answer == said(r, c + 1)
        elif question.task == "where":
            found = shapes.get(CLASSES.index(words[-1]))
            assert question.answer == (f"in {place(found)}" if found else "nowhere")
        elif question.task == "spell":
            assert question.answer == "".join(said(*cell) for cell in cells)
        elif question.task == "compare":
            assert question.answer == str(max(int(said(*cell)) for cell in cells))
            assert len({(r // 3, c // 3) for r, c in cells}) == 2
        elif question.task == "large":
            assert question.answer == ("none" if large == EMPTY else CHARACTERS[large])
        else:
            kind = CLASSES.index(words[-1])
            assert question.answer == ("yes" if any(kind in row for row in kinds) else "no")
    assert asked >= {"place", "compare", "presence"}
    assert set(TASKS) == {"place", "marker", "where", "spell", "large", "compare", "presence"}


def test_each_question_is_asked_once_and_shapes_stand_once():
    pages = sample_pages(20, (8, 28), 1)
    for index in range(20):
        texts = [question.text for question in ask(pages, index, Random(index))]
        assert len(texts) == len(set(texts))
        kinds = pages.kinds[index].flatten().tolist()
        assert all(kinds.count(len(CHARACTERS) + n) <= 1 for n in range(len(SHAPES)))
        assert (COVERED in kinds) == (int(pages.large[index]) != EMPTY)


def test_a_caption_says_what_stands_in_every_cell():
    pages = sample_pages(1, (8, 28), 2)
    words = caption(pages, 0, Random(0))
    for r in range(CELLS):
        for c in range(CELLS):
            kind = int(pages.kinds[0, r, c])
            mark = {EMPTY: ".", COVERED: "#"}.get(kind) or (
                CLASSES[kind] if kind < len(CHARACTERS) else f" {CLASSES[kind]}"
            )
            assert f" {place((r, c))}{mark}" in words


def test_ink_differs_from_paper():
    papers = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    ink = contrasting(papers, 0.3, torch.Generator().manual_seed(1))
    assert float((ink.mean(-1) - papers.mean(-1)).abs().min()) > 0.2  # colours at the end of the range are cut off


def test_glyphs_lie_where_labels_say():
    """A glyph is seen where its label is, and not where the background is."""
    atlas = build_atlas(FONTS)
    tiles = draw_tiles(8, 112, 6, torch.Generator().manual_seed(0), atlas, cells=4)
    assert set(tiles.labels.unique().tolist()) <= {*range(len(CLASSES)), BACKGROUND, NOT_JUDGED}
    glyph = (tiles.labels >= 0) & (tiles.labels < BACKGROUND)
    assert torch.equal(glyph, tiles.heights > 0)
    spread = tiles.pixels.unfold(2, 14, 14).unfold(3, 14, 14).mean(1).flatten(3).std(-1)
    assert float(spread[glyph].median()) > 2 * float(spread[tiles.labels == BACKGROUND].median())
