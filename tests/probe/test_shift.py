"""The shift of an encoder whose tokens have another size: what is seen, and what the labels say."""

import numpy as np
import pytest
from torch.nn import functional as F

from dualview.probe.draws import Draw
from dualview.probe.shift import KINDS, STRIDES, domain_shift


def colours(patch, seen):
    """An encoder that gives the mean colours of a token's quarters, and notes what it was given."""

    def encode(pixels):
        seen.append(tuple(pixels.shape))
        return F.pixel_unshuffle(F.avg_pool2d(pixels, patch // 2), 2).movedim(1, -1)

    return encode


@pytest.mark.parametrize(("patch", "side"), [(14, 336), (16, 192)])
def test_tokens_of_any_size(patch, side):
    seen = []
    train, test = ((draw, draw.chunks()) for draw in (Draw("train", "check", 0, 3), Draw("test", "check", 0, 3)))
    rows = domain_shift(colours(patch, seen), train, test, patch=patch)
    assert {(row["stride"], row["kind"]) for row in rows} == {(n, kind) for n in STRIDES for kind in KINDS}
    assert {shape[-1] for shape in seen} == {side // n for n in STRIDES}
    by = {(row["stride"], row["kind"]): row for row in rows}
    for n in STRIDES:
        glyphs = 0
        for i in range(3):
            for glyph in Draw("test", "check", 0, 3).scene(i).glyphs:
                inside = max(glyph.y, glyph.x) < side
                middle = all(patch * n / 4 <= p % (patch * n) <= 3 * patch * n / 4 for p in (glyph.y, glyph.x))
                glyphs += inside and middle and not glyph.hidden
        assert 0.8 * glyphs <= by[n, "stride"]["glyphs"] <= glyphs  # two may stand in one token
    for kind in KINDS:
        assert by[1, kind]["cosine_thumbnail"] == pytest.approx(1, abs=1e-5)
    for n in STRIDES[1:]:
        assert by[n, "stride"]["cosine_thumbnail"] < by[n, "smoothed stride"]["cosine_thumbnail"] < 1
        assert by[n, "stride"]["cosine_local"] > 0.9


def test_a_token_is_held_against_those_of_its_own_region():
    """A page that is constant in the 48 pixels of a token gives the same colour by every way to cut it."""
    page = np.random.default_rng(0).integers(0, 256, (1, 3, 7, 7), np.uint8).repeat(48, 2).repeat(48, 3)
    known = (Draw("test", "check", 0, 1), [(page, np.zeros((1, 0), np.int64))])
    rows = domain_shift(lambda pixels: F.avg_pool2d(pixels, 16).movedim(1, -1), known, known, patch=16)
    (row,) = (row for row in rows if (row["stride"], row["kind"]) == (3, "stride"))
    assert row["cosine_local"] == pytest.approx(1, abs=1e-5)
