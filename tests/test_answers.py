"""A report is one file that holds everything: both views of the picture, its tiles, and the answers as text."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dualview.answers import Asked, Shown, draw_answers, reduced, table, write_report
from dualview.images import ImageError
from dualview.visualize import draw_tiles

PICTURE = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GRID = (3, 2)


ASKED = [
    Asked('What is "<it>"?', {"with tiles": "7 & 8", "low resolution": "<i>1</i>"}, "7 & 8"),
    Asked("And this?", {"with tiles": "", "low resolution": "x\n" * 40}, "x"),
]
SHOWN = Shown("a<b>.png", PICTURE.flip(2), PICTURE, GRID, ASKED)


def test_answers_that_are_not_the_truth_are_called_wrong():
    assert table(ASKED) == [
        ["question", "truth", "with tiles", "low resolution"],
        ['What is "<it>"?', "7 & 8", "7 & 8", "<i>1</i> (wrong)"],
        ["And this?", "x", "(no answer) (wrong)", "x\n" * 40 + " (wrong)"],
    ]
    assert table(ASKED, longest=9)[2][1:] == ["x", "(no an... (wrong)", "x x x ... (wrong)"]
    unknown = [Asked("What?", {"with tiles": "7"})]
    assert table(unknown) == [["question", "with tiles"], ["What?", "7"]]


def test_a_report_holds_everything_and_reads_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    write_report(path, "of <both>", [SHOWN, SHOWN._replace(title="second")])
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert "<h1>of &lt;both&gt;</h1><h2>a&lt;b&gt;.png</h2>" in text
    assert "<h2>second</h2>" in text
    assert "<td>What is &quot;&lt;it&gt;&quot;?</td><td>7 &amp; 8</td><td>7 &amp; 8</td>" in text
    assert '<td class="wrong">&lt;i&gt;1&lt;/i&gt; (wrong)</td>' in text
    pictures = [
        np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"data:image/png;base64,([^\"]+)", text)
    ]
    expected = [x.permute(1, 2, 0).numpy() for x in (PICTURE.flip(2), reduced(PICTURE, GRID))]
    assert expected[1].shape == (30, 60, 3)
    assert len(pictures) == 6
    for drawn, wanted in zip(pictures[3:5], expected, strict=True):
        np.testing.assert_array_equal(drawn, wanted)
    tiles = np.array(draw_tiles(PICTURE, GRID).picture)
    np.testing.assert_array_equal(pictures[2], tiles[: len(pictures[2])])


def test_a_drawing_holds_picture_tiles_and_what_is_left_at_low_resolution():
    drawn = np.array(draw_answers([SHOWN, SHOWN]))
    assert len(drawn) % 2 == 0
    half = len(drawn) // 2
    np.testing.assert_array_equal(drawn[:half], drawn[half:])
    small = reduced(PICTURE, GRID).repeat_interleave(3, 1).repeat_interleave(3, 2)
    tiles = np.array(draw_tiles(PICTURE, GRID).picture)[190:400]
    beside, below = 2 * 40 + PICTURE.shape[2], 90 + 34 * (len(ASKED) + 2) + 40
    for part, left, top in ((PICTURE.flip(2), 40, 90), (small, beside, below)):
        wanted = part.movedim(0, -1).numpy()
        found = drawn[top : top + wanted.shape[0], left : left + wanted.shape[1]]
        np.testing.assert_array_equal(found, wanted)
    starts = [y for y in range(half - len(tiles)) if (drawn[y : y + len(tiles), : tiles.shape[1]] == tiles).all()]
    assert len(starts) == 1


@pytest.mark.parametrize("name, message", [("report.txt", "is not .html"), ("none/report.html", "does not exist")])
def test_a_report_that_cannot_be_written_is_refused(tmp_path, name, message):
    with pytest.raises(ImageError, match=message):
        write_report(tmp_path / name, "t", [SHOWN])
    assert not list(tmp_path.iterdir())
