"""Pages and questions: the same for the same seed, true answers, and nothing of the tests in the training."""

import hashlib
from random import Random

import pytest
import torch

from dualview.models.view_plan import interpolate
from dualview.reader.drawing import contrasting
from dualview.reader.glyphs import (
    CHARACTERS,
    CLASSES,
    HELD_OUT_FONTS,
    SHAPES,
    TRAINING_FONTS,
    build_atlas,
)
from dualview.reader.pages import CELLS, COVERED, EMPTY, covered, render, sample_pages
from dualview.reader.pretrain import BACKGROUND, MEAN, NOT_JUDGED, STD, _labels, draw_pages, draw_tiles
from dualview.reader.questions import TASKS, ask, caption, place

FONTS = ("DejaVuSans", "cmr10")


def digest(seed):
    pages = sample_pages(3, (8, 28), seed)
    said = [(q.task, q.text, q.answer) for i in range(3) for q in ask(pages, i, Random(seed))]
    return hashlib.sha256(repr((pages.kinds.tolist(), pages.large.tolist(), said)).encode()).hexdigest()[:16]


def test_pages_and_questions_of_a_seed_are_the_same_everywhere():
    assert digest(0) == "21a05e33cd97a649"
    assert digest(1) == "30a064cfba9d7577"


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


def test_sparse_pages_have_a_code_alone():
    plain, mixed, codes = (sample_pages(200, (8, 28), 1, sparse) for sparse in (0.0, 0.3, 1.0))
    thin = (mixed.kinds != plain.kinds).flatten(1).any(1)
    assert 40 < int(thin.sum()) < 80
    for name in ("heights", "shifts", "large", "large_height", "large_centre"):
        assert torch.equal(getattr(mixed, name), getattr(plain, name)), name
    assert torch.equal(codes.kinds == COVERED, plain.kinds == COVERED)
    lengths = set()
    for kinds in codes.kinds:
        rows, columns = (kinds >= 0).nonzero(as_tuple=True)
        assert len(set(rows.tolist())) <= 1
        assert all(kinds[r, c] < len(CHARACTERS) for r, c in zip(rows, columns, strict=True))
        if len(rows) and not (kinds == COVERED).any():
            assert int(columns[-1] - columns[0]) == len(rows) - 1
            lengths.add(len(rows))
    assert lengths == {1, 2, 3}
    assert {int(c) for c in (codes.kinds >= 0).nonzero()[:, 2]} == set(range(CELLS))


def test_photographs_stand_behind_pages():
    """Of any sizes; a part of one for each page, and glyphs on plates."""
    behind = [torch.zeros(3, 60, 90), torch.ones(3, 200, 120)]
    pages = sample_pages(12, (8, 28), 4, sparse=1.0)
    pages.large.fill_(EMPTY)
    drawn = render(pages, 112, build_atlas(FONTS), behind)
    assert {round(float(page.median())) for page in drawn} == {0, 1}
    tiles = draw_pages(2, (8, 8), 4, build_atlas(FONTS), behind[:1]).tiles * STD + MEAN
    assert float(tiles.median()) < 0.1, "the tower sees them, too"


def test_ink_differs_from_paper():
    papers = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    ink = contrasting(papers, 0.3, torch.Generator().manual_seed(1))
    assert float((ink.mean(-1) - papers.mean(-1)).abs().min()) > 0.2  # colours at the end of the range are cut off


def test_glyphs_lie_where_labels_say():
    """A glyph is seen where its label is, and not where the background is."""
    tiles = draw_tiles(8, 112, 6, torch.Generator().manual_seed(0), build_atlas(FONTS), cells=4)
    assert set(tiles.labels.unique().tolist()) <= {*range(len(CLASSES)), BACKGROUND, NOT_JUDGED}
    glyph = (tiles.labels >= 0) & (tiles.labels < BACKGROUND)
    spread = tiles.pixels.unfold(2, 14, 14).unfold(3, 14, 14).mean(1).flatten(3).std(-1)
    assert float(spread[glyph].median()) > 2 * float(spread[tiles.labels == BACKGROUND].median())


@pytest.mark.parametrize(
    ("middle", "height", "named"),
    [
        ((21.0, 21.0), 8.0, {(1, 1)}),
        ((26.5, 21.0), 8.0, {(1, 1), (2, 1)}),  # two pixels from a border, or less: both patches
        ((28.0, 28.0), 8.0, {(1, 1), (1, 2), (2, 1), (2, 2)}),
        ((-1.0, 21.0), 8.0, {(0, 1)}),
        ((21.0, 21.0), 40.0, {(r, c) for r in range(3) for c in range(3)}),
    ],
)
def test_patches_name_the_glyph_whose_middle_is_near(middle, height, named):
    labels = _labels(
        torch.tensor([[[5]]]),
        torch.tensor([[[False]]]),
        torch.tensor(middle).view(1, 1, 1, 2),
        torch.full((1, 1, 1), height),
        4,
    )[0]
    assert {tuple(at) for at in (labels == 5).nonzero().tolist()} == named
    assert int((labels == BACKGROUND).sum()) == 16 - len(named)


def test_patches_name_the_nearest_glyph_and_none_that_lies_outside():
    kinds, empty = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[False, False], [False, True]]])
    centre = torch.tensor([[[[7.0, 7.0], [7.0, 15.0]], [[-9.0, 49.0], [49.0, 49.0]]]])
    labels = _labels(kinds, empty, centre, torch.tensor([[[8.0, 8.0], [60.0, 8.0]]]), 4)[0]
    assert labels[0, 0] == 1
    assert labels[0, 1] == 2
    assert labels[0, 3] == NOT_JUDGED  # within a large glyph whose middle is not seen
    assert labels[3, 3] == BACKGROUND  # an empty cell


def test_pages_to_train_the_tower_on_are_cut_as_a_model_cuts_them():
    atlas = build_atlas(FONTS)
    seen, pages = draw_pages(3, (8, 28), 7, atlas), sample_pages(3, (8, 28), 7)
    assert seen.tiles.shape == (3, 9, 3, 112, 112)
    pixels = render(pages, 336, atlas)
    torch.testing.assert_close(seen.tiles[0, 5] * STD + MEAN, pixels[0, :, 112:224, 224:])
    assert seen.wholes.shape == (6, 3, 112, 112)
    thumbnails = interpolate(pixels, (112, 112))
    torch.testing.assert_close(seen.wholes[:3] * STD + MEAN, thumbnails)
    eighth = pixels[:, :, 2::3, 1::3]  # for the seed is 7
    torch.testing.assert_close(seen.wholes[3:] * STD + MEAN, eighth)
    written = pages.kinds >= 0
    small, whole = seen.labels
    assert torch.equal(whole[:3], whole[3:])
    whole = whole[:3]
    assert torch.equal(small[written], pages.kinds[written])
    assert torch.equal(small == NOT_JUDGED, pages.kinds == COVERED)
    large = covered(pages)
    assert large.any((1, 2)).tolist() == (pages.large != EMPTY).tolist()
    assert torch.equal(whole[large], pages.large[:, None, None].expand_as(large)[large])
    assert torch.equal(whole[~large & written], pages.kinds[~large & written])
