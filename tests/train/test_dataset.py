"""Rows, batches and their order."""

import json
from itertools import pairwise

import pytest
import torch
from PIL import Image

from dualview.train import Collator, LlavaDataset
from dualview.train.rows import RowError
from dualview.train.sampler import EpochSampler
from tests.tiny import tiny_model, tiny_processor
from tests.train.data import CAPTIONS, turns, write_data

GOOD = {"image": "0.png", "conversations": turns("<image>\nhi", "yes")}
BAD = {
    "no conversations": ({"image": "0.png"}, "conversations=None must be a list of turns"),
    "an empty conversation": (GOOD | {"conversations": []}, r"conversations=\[\] must be"),
    "an unknown role": (GOOD | {"conversations": [{"from": "bot", "value": "hi"}]}, "turn 0 is .*bot"),
    "a role that is no text": (
        GOOD | {"conversations": [{"from": ["human"], "value": "hi"}]},
        r"turn 0 is .*\['human'\]",
    ),
    "a value that is no text": (GOOD | {"conversations": [{"from": "human", "value": 3}]}, "turn 0 is"),
    "the assistant first": (GOOD | {"conversations": turns("a", "b")[::-1]}, r"turns are from \['gpt', 'human'\]"),
    "no answer": (GOOD | {"conversations": turns("<image> a")}, r"turns are from \['human'\]"),
    "an empty answer": (GOOD | {"conversations": turns("<image> a", " ")}, "turn 1 of assistant is empty"),
    "an empty question": ({"conversations": turns("", "a")}, "turn 0 of user is empty"),
    "too few places": (GOOD | {"conversations": turns("hi", "a")}, "0 <image> in the text, but 1 images"),
    "too many places": (GOOD | {"conversations": turns("<image><image>", "a")}, "2 <image> in the text, but 1 images"),
    "a place in an answer": (GOOD | {"conversations": turns("hi", "a <image>")}, "in a turn that is not human"),
    "a missing picture": (GOOD | {"image": "none.png"}, r"none\.png': no such file"),
    "a picture that is no path": (GOOD | {"image": 3}, "image=3 must be a path"),
    "two fields of pictures": (GOOD | {"images": ["0.png"]}, "image and images are both given"),
    "no object": ([], r"\[\] must be an object"),
    "a name that no file can have": (GOOD | {"image": "x" * 300}, "x': no such file"),
    "half of a character": (GOOD | {"conversations": turns("<image>", "a \ud83d")}, "turn 1 has half of a surrogate"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("rows"))


def dataset(place, tmp_path, rows, form="chat", **options):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return LlavaDataset(tiny_processor(), form, **options).add(tmp_path / "rows.json", place / "images")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_and_fatal_or_skipped(place, tmp_path, kind):
    row, message = BAD[kind]
    with pytest.raises(RowError, match=rf"rows\.json, row 1: .*{message}"):
        dataset(place, tmp_path, [GOOD, row])
    said = []
    data = dataset(place, tmp_path, [GOOD, row, GOOD], bad_rows="skip", report=said.append)
    assert len(data) == 2
    assert len(said) == 1
    assert "rows.json, row 1: " in said[0]
    with pytest.raises(ValueError, match="all 1 rows are bad"):
        dataset(place, tmp_path, [row], bad_rows="skip", report=said.append)


def test_a_picture_that_cannot_be_read_is_found_when_it_is_read(place, tmp_path):
    (place / "images" / "broken.png").write_bytes(b"no picture")
    rows = [GOOD | {"image": "broken.png"}, GOOD | {"image": "1.png"}]
    with pytest.raises(RowError, match=r"row 0: .*broken\.png"):
        dataset(place, tmp_path, rows)[0]
    said = []
    data = dataset(place, tmp_path, rows, bad_rows="skip", report=said.append)
    assert said == []
    for _ in range(2):
        assert torch.equal(data[0]["pixel_values"], data[1]["pixel_values"])  # the next good row stands in
    assert len(said) == 1
    assert "row 0" in said[0]
    alone = dataset(place, tmp_path, rows[:1], bad_rows="skip", report=said.append)
    with pytest.raises(RowError, match="no row can be trained on"):
        alone[0]


def test_captions_have_one_image_and_one_answer(place, tmp_path):
    with pytest.raises(RowError, match=r"row 0: 2 turns and 0 images; a caption row .* use form: chat"):
        dataset(place, tmp_path, [{"conversations": turns("a", "b")}], "plain")
    assert len(dataset(place, tmp_path, CAPTIONS, "plain")) == len(CAPTIONS)


def test_files_that_are_no_rows(place, tmp_path):
    data = LlavaDataset(tiny_processor())
    with pytest.raises(ValueError, match=r"none\.json: no such file. Fetch it from https://x"):
        data.add(tmp_path / "none.json", source="https://x")
    (tmp_path / "rows.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        data.add(tmp_path / "rows.json")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        data.add(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"rows\.json is no JSON"):
        data.add(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match="at least one row"):
        data.add(tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"no such folder of images\. Fetch it from https://x"):
        data.add(place / "captions.json", tmp_path / "none", source="https://x")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_keys_that_are_written_twice(place, tmp_path, name):
    """Python would keep the last value and say nothing."""
    good = json.dumps(GOOD)
    for wrong in (
        good.replace('{"image"', '{"image": "1.png", "image"'),
        good.replace('"value"', '"value": "", "value"'),
    ):
        rows = f"{good}\n{wrong}" if name.endswith("l") else f"[{good}, {wrong}]"
        (tmp_path / name).write_text(f"\ufeff{rows}", encoding="utf-8")  # as some editors begin a file
        with pytest.raises(RowError, match=rf"{name}, row 1: .*(written twice|each key once)"):
            LlavaDataset(tiny_processor()).add(tmp_path / name, place / "images")


@pytest.mark.parametrize("options", [{}, {"max_tiles": 6}])
def test_a_batch_gives_the_loss_of_its_rows(place, options):
    """Padding, joined pictures and text-only rows change nothing: the loss is the mean over all learnt tokens."""
    processor, model = tiny_processor(**options), tiny_model().eval()
    data = LlavaDataset(processor).add(place / "chats.jsonl", place / "images")
    rows, collate = [data[i] for i in (0, 7, 11, 3)], Collator(0)
    sums = [(model(**collate([row])).loss.item() * (n := (row["labels"][1:] != -100).sum().item()), n) for row in rows]
    batch = collate(rows)
    assert batch["attention_mask"].sum() == sum(len(row["input_ids"]) for row in rows)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert ("image_grids" in batch) == bool(options)
    assert model(**batch).loss.item() == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-4)


def test_a_batch_of_text_trains_nothing_of_images_and_leaves_none_out(place):
    model, data = tiny_model().train(), LlavaDataset(tiny_processor()).add(place / "chats.jsonl", place / "images")
    batch = Collator(0)([data[7], data[8]])
    assert "pixel_values" not in batch
    loss = model(**batch).loss
    assert torch.equal(loss, model.eval()(**batch).loss)
    model.train()(**batch).loss.backward()
    for part in (model.model.dem, model.model.multi_modal_projector):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_a_batch_of_text_has_a_loss_in_half_precision(place):
    model = tiny_model().half().train()
    model.model.multi_modal_projector.linear_2.bias.data.fill_(6e4)  # two of them are no number of half precision
    batch = Collator(0)([LlavaDataset(tiny_processor()).add(place / "chats.jsonl", place / "images")[7]])
    assert model(**batch).loss.isfinite()


LENGTHS = [5, -3, 8, -9, 7, 30, -2, 6, 31, -8, 9, 29, -4, 28]


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochSampler(len(LENGTHS), 2, seed, LENGTHS)
        sampler.epoch = epoch
        torch.rand(seed + 1)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert all(sorted(order(0, epoch)) == list(range(len(LENGTHS))) for epoch in range(9))


def test_steps_have_rows_of_a_length_and_of_a_kind():
    sampler, spread = EpochSampler(256, 4, 0, [(-1) ** i * (1 + i * 37 % 251) for i in range(256)]), []
    lengths = [sampler.lengths[i] for i in sampler]
    for step in range(0, 256, 4):
        kinds = {length < 0 for length in lengths[step : step + 4]}
        assert len(kinds) == 1
        spread.append(max(map(abs, lengths[step : step + 4])) - min(map(abs, lengths[step : step + 4])))
    assert sum(spread) / len(spread) < 30  # 150 in random order
    assert any(a[0] * b[0] < 0 for a, b in pairwise([lengths[i : i + 4] for i in range(0, 256, 4)]))


def test_lengths_are_known_without_a_picture(place, tmp_path):
    Image.new("RGB", (8, 8)).save(place / "images" / "gone.png")
    data = dataset(place, tmp_path, [GOOD | {"image": "gone.png"}, {"conversations": turns("a" * 40, "b" * 40)}])
    (place / "images" / "gone.png").unlink()
    assert data.lengths()[0] > 0 > data.lengths()[1]
    assert abs(data.lengths()[1]) == 21
