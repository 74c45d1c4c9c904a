"""A report is one file that holds everything: both views of the picture, its tiles, and the answers as text."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dualview.answers import reduced, write_report
from dualview.images import ImageError
from dualview.visualize import draw_tiles

PICTURE = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GRID = (3, 2)


def test_a_report_holds_everything_and_reads_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    write_report(
        path, "a<b>.png", PICTURE, GRID, 'What is "<it>"?', {"with tiles": "7 & 8", "low resolution": "<i>1</i>"}
    )
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert "<h1>What is &quot;&lt;it&gt;&quot;?</h1>" in text
    assert "<dt>with tiles</dt><dd>7 &amp; 8</dd><dt>low resolution</dt><dd>&lt;i&gt;1&lt;/i&gt;</dd>" in text
    assert "<h2>a&lt;b&gt;.png</h2>" in text
    pictures = [
        np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"data:image/png;base64,([^\"]+)", text)
    ]
    expected = [x.permute(1, 2, 0).numpy() for x in (PICTURE, reduced(PICTURE, GRID))]
    expected.append(np.array(draw_tiles(PICTURE, GRID).picture))
    assert expected[1].shape == (30, 60, 3)
    assert len(pictures) == len(expected)
    for drawn, wanted in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(drawn, wanted)


@pytest.mark.parametrize("name, message", [("report.txt", "is not .html"), ("none/report.html", "does not exist")])
def test_a_report_that_cannot_be_written_is_refused(tmp_path, name, message):
    with pytest.raises(ImageError, match=message):
        write_report(tmp_path / name, "t", PICTURE, GRID, "q", {})
    assert not list(tmp_path.iterdir())
