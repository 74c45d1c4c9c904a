"""Every row of the page for users of other libraries: both sides give the same tensor, and what differs is so."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dualview as dv

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
TEXT = PAGE.read_text(encoding="utf-8")
(NAMES,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def rows_of(section):
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            theirs, ours, differs = cells
            yield theirs.strip("`"), ours.strip("`"), differs


SECTIONS = {
    title: ("\n".join(re.findall(r"^`(from .*)`$", body, re.MULTILINE)), list(rows_of(body)))
    for title, body in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
}


def namespace(imports=""):
    names = {}
    exec(NAMES + imports, names)
    return names


def test_page_has_all_libraries():
    assert {title: len(rows) for title, (_, rows) in SECTIONS.items() if rows} == {
        "torch": 9,
        "einops": 4,
        "kornia": 4,
        "timm": 4,
        "MONAI": 4,
        "s2wrapper": 3,
    }


@pytest.mark.parametrize(
    "title, row",
    [pytest.param(t, row, id=f"{t}-{i}") for t, (_, found) in SECTIONS.items() for i, row in enumerate(found)],
)
def test_both_sides_are_equal(title, row):
    theirs, ours, differs = row
    imports = SECTIONS[title][0]
    for library in re.findall(r"^from (\w+)", imports):
        pytest.importorskip(library)
    names = namespace(imports)
    one, other = eval(theirs, names), eval(ours, names)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if "up to rounding" in differs else 0)


def test_differences_of_torch():
    x = torch.rand(2, 3, 9, 15)  # 4 x 5 fits twice into the height, and one row is left over
    for dtype in (torch.uint8, torch.int64):
        with pytest.raises(NotImplementedError):
            F.unfold(x.to(dtype), (4, 5), stride=(4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert F.unfold(x, (4, 5), stride=(4, 5)).shape[-1] == 6
        assert x.unfold(2, 4, 4).unfold(3, 5, 5).shape[2:4] == (2, 3)
    assert {tuple(x[..., i::2, :].shape[2:]) for i in range(2)} == {(5, 15), (4, 15)}
    assert x[..., 1::2, :].data_ptr() != dv.global_stride_crop(x[..., :8, :], (2, 1))[:, 1].data_ptr()
    with pytest.raises(ValueError, match="9 x 15"):
        dv.local_crop(x, (2, 3))


def test_differences_of_the_others():
    from einops import rearrange
    from kornia.contrib import extract_tensor_patches
    from timm.models.maxxvit import window_partition

    x = torch.rand(2, 1, 9, 15)
    shared = rearrange(x, "b c (r h) (k w) -> b (r k) c h w", r=1, k=1)
    assert shared.data_ptr() == x.data_ptr() != dv.local_crop(x, (1, 1)).data_ptr()
    with pytest.warns(UserWarning, match="dropped"):
        assert extract_tensor_patches(x, window_size=(4, 5), stride=(4, 5)).shape[1] == 6
    assert window_partition(x[:, :, :8].movedim(1, -1), (4, 5)).shape[0] == 2 * 6


def test_differences_of_monai():
    inferers = pytest.importorskip("monai.inferers")
    x, seen = torch.rand(1, 1, 9, 15), []
    assert len(list(inferers.SlidingWindowSplitter((4, 5))(x))) == 3 * 3  # the last row of windows is padded
    inferers.sliding_window_inference(x[:, :, :8], (4, 5), 1, lambda tile: seen.append(tile) or tile)
    assert len(seen) > 2 * 3


def test_differences_of_s2wrapper():
    s2wrapper = pytest.importorskip("s2wrapper")
    with pytest.raises(AssertionError, match="square"):
        s2wrapper.forward(torch.nn.Identity(), torch.rand(1, 3, 8, 12), scales=[1, 2])
