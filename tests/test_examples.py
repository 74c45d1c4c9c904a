"""The scripts of examples/ do what the documentation says that they do."""

import ast
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


def run(name, capsys, monkeypatch, folder):
    """What the script prints, run in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def shown(name):
    """What the page says that the script prints."""
    section = next(part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if f"`examples/{name}.py`" in part)
    (printed,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    return printed


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_says_what_one_learns_and_is_shown(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert "What you learn: " in doc
    assert f"python examples/{path.name}" in doc
    assert f'--8<-- "examples/{path.name}"' in PAGE
    assert not re.search("labels ?= ?(tokens|input_ids)$", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_document_page(capsys, monkeypatch, tmp_path):
    printed = run("document_page", capsys, monkeypatch, tmp_path)
    assert printed.startswith(shown("document_page"))
    drawn = Image.open(tmp_path / "document_page.png")
    committed = Image.open(ROOT / "docs" / "assets" / "document_page.png")
    assert drawn.size == committed.size == (976, 376)
    assert len(drawn.getcolors(2**20)) > 100


def test_own_encoder(capsys, monkeypatch, tmp_path):
    printed = run("own_encoder", capsys, monkeypatch, tmp_path)
    assert printed.startswith(shown("own_encoder"))
    assert "timm's vit_tiny_patch16_224\n  alone:          96 x 96 pixels -> (1, 6, 6, 192)" in printed


def test_train_with_masked_labels(capsys, monkeypatch, tmp_path):
    printed = run("train_with_masked_labels", capsys, monkeypatch, tmp_path)
    assert printed.startswith(shown("train_with_masked_labels"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    (right,) = re.findall(r"new images: (\d+)% right", printed)
    assert losses[-1] < losses[0] / 4
    assert int(right) > 80  # guessing gives 17


def test_masked_labels_leave_everything_else_out():
    """The loss of the answer alone, worked out by hand, and no gradient at any other position."""
    script = runpy.run_path(str(ROOT / "examples" / "train_with_masked_labels.py"))
    tokens, pixels, labels = script["examples"](3)
    logits = torch.randn(*tokens.shape, script["VOCABULARY"], requires_grad=True)
    loss = script["loss_of"](logits, labels)
    by_hand = -logits[:, -2].log_softmax(-1).gather(1, tokens[:, -1:]).mean()
    assert torch.allclose(loss, by_hand)
    loss.backward()
    assert logits.grad[:, -2].abs().min() > 0
    assert logits.grad[:, :-2].abs().max() == logits.grad[:, -1].abs().max() == 0
    marked = pixels.mean(1).unflatten(1, (2, -1)).unflatten(3, (3, -1)).amax((2, 4)).flatten(1).argmax(1)
    assert torch.equal(marked, tokens[:, -1])


def test_aerial_overlap(capsys, monkeypatch, tmp_path):
    printed = run("aerial_overlap", capsys, monkeypatch, tmp_path)
    assert printed.startswith(shown("aerial_overlap"))
    seams, margin = (int(count) for count in re.findall(r": (\d+) pixels get another class", printed))
    assert seams > 500
    assert margin <= 5  # of 307,200: scores that are equal but for rounding
    (difference,) = re.findall(r"with margin 12: .*differ by (\S+) at most", printed)
    assert float(difference) < 1e-5
    committed = Image.open(ROOT / "docs" / "assets" / "aerial_overlap.png")
    assert Image.open(tmp_path / "aerial_overlap.png").size == committed.size == (960, 240)


def test_slide_larger_than_memory(capsys, monkeypatch, tmp_path):
    printed = run("slide_larger_than_memory", capsys, monkeypatch, tmp_path)
    assert printed == shown("slide_larger_than_memory")


@pytest.mark.more
def test_attach_to_llava(capsys, monkeypatch, tmp_path):
    printed = run("attach_to_llava", capsys, monkeypatch, tmp_path)
    printed = "".join(f"{line}\n" for line in printed.splitlines() if not line.startswith("{"))  # without Trainer's log
    of_digits = re.compile(r"\d+(\.\d+)?")
    assert of_digits.sub("0", printed) == of_digits.sub("0", shown("attach_to_llava"))
    large, small, alone, _, hires = (int(percent) for percent in re.findall(r"pixels: +(\d+)% right", printed))
    assert large > 95
    assert max(small, alone) < 30  # guessing gives 10
    assert hires > 60
    losses = [(float(first), float(last)) for first, last in re.findall(r"loss ([\d.]+) to ([\d.]+)", printed)]
    assert losses[-1][1] < losses[-1][0] / 2
    assert float(re.findall(r"the gate: 0 to ([\d.]+)", printed)[-1]) > 0.05


if "TEST_ALL" in os.environ:  # it takes minutes

    @pytest.mark.more
    def test_attach_to_llava_with_trl(capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        script = runpy.run_path(str(ROOT / "examples" / "attach_to_llava.py"))
        host, processor = script["small_llava"]()
        script["with_trainer"](host, script["examples"](14, 2000), processor, max_steps=100, learning_rate=3e-3)
        model, larger = script["tuned"](host, processor, "hires", script["with_trl"])
        first, last = map(float, re.findall(r"SFTTrainer: loss ([\d.]+) to ([\d.]+)", capsys.readouterr().out)[0])
        assert last < first / 2
        assert model.base_model.model.model.vision_tower.dualview.modules_to_save["default"].gate.abs().mean() > 0.05
        assert script["right"](model, script["examples"](7, 200), larger) > 0.6
