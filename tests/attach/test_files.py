"""Attached modules on disk."""

import copy
import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

import dualview as dv
from tests.attach.matrix import AT_ONCE, Trial, gradients, logits, open_gates, trial_of
from tests.checks import refuses

DESCRIPTION, WEIGHTS = "dualview_adapter.json", "dualview_adapter.safetensors"


@pytest.fixture
def trial():
    return trial_of("llava")


@pytest.fixture
def saved(trial, tmp_path):
    model = trial.model(True, grid=(2, 3), dem={"preset": "paper", "num_heads": 2})
    dv.save_adapter(model, tmp_path)
    return tmp_path


def test_round_trip(trial, saved):
    again = dv.load_adapter(trial.model(False), saved, **AT_ONCE)
    model = trial.model(True, grid=(2, 3), dem={"preset": "paper", "num_heads": 2})
    assert torch.equal(logits(again, trial.inputs), logits(model, trial.inputs))
    assert sorted(file.name for file in saved.iterdir()) == [DESCRIPTION, WEIGHTS]
    assert all(name == "gate" or name.startswith("dems.0.") for name in load_file(saved / WEIGHTS))


def test_saving_twice_replaces_both(trial, saved):
    dv.save_adapter(trial.model(True), saved)
    again = dv.load_adapter(trial.model(False), saved, **AT_ONCE)
    assert torch.equal(logits(again, trial.inputs), logits(trial.model(True), trial.inputs))


def test_modules_of_ones_own(trial, tmp_path):
    def dem() -> dv.DualPerspectiveEnhance:
        return dv.DualPerspectiveEnhance.paper(32, fusion=dv.AdditionFusion())

    model = trial.model(True, dem=dem())
    dv.save_adapter(model, tmp_path)
    with refuses("dem="):
        dv.load_adapter(trial.model(False), tmp_path)
    again = dv.load_adapter(trial.model(False), tmp_path, dem=dem(), **AT_ONCE)
    assert torch.equal(logits(again, trial.inputs), logits(model, trial.inputs))


def test_options_that_json_does_not_have(trial, tmp_path):
    """A type is written by its name, the device is the host's, and options that are modules are given again."""
    host = copy.deepcopy(trial.bare).bfloat16()
    model = dv.attach(copy.deepcopy(host), dem={"preset": "paper", "dtype": torch.float32, "device": "cpu"})
    open_gates(model)
    dv.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / DESCRIPTION).read_text())["dem"] == {
        "preset": "paper",
        "gate": True,
        "dtype": "float32",
    }
    again = dv.load_adapter(host, tmp_path)
    assert {parameter.dtype for parameter in dv.attached(again).parameters()} == {torch.float32}
    assert torch.equal(logits(again, trial.inputs), logits(model, trial.inputs))

    options = {"preset": "paper", "fusion": dv.AdditionFusion()}
    model = trial.model(True, dem=options)
    dv.save_adapter(model, tmp_path)
    refused(trial, tmp_path, "the same dem=")
    again = dv.load_adapter(trial.model(False), tmp_path, dem=options, **AT_ONCE)
    assert torch.equal(logits(again, trial.inputs), logits(model, trial.inputs))


def test_what_peft_has_trained_is_saved(trial, tmp_path):
    model = get_peft_model(
        trial.model(True, gates=False), LoraConfig(target_modules=["q_proj"], modules_to_save=["dualview"])
    )
    open_gates(model)
    gradients(model, trial.inputs)
    torch.optim.SGD(model.parameters(), 0.1).step()
    dv.save_adapter(model, tmp_path)
    trained = model.get_parameter(
        "base_model.model.model.vision_tower.dualview.modules_to_save.default.dems.0.attentions.0.norm.weight"
    )
    assert torch.equal(load_file(tmp_path / WEIGHTS)["dems.0.attentions.0.norm.weight"], trained)


def test_lora_inside_of_the_module_must_be_merged(trial, tmp_path):
    model = get_peft_model(trial.model(True), LoraConfig(target_modules=r".*dualview.*q_proj"))
    with refuses("q_proj", "merge"):
        dv.save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())


def refused(trial: Trial, folder: object, *parts: str) -> None:
    model = trial.model(False)
    with refuses(*parts):
        dv.load_adapter(model, folder)
    assert torch.equal(logits(model, trial.inputs), trial.before)
    with refuses("nothing is attached"):
        dv.detach(model)


def test_tampered_and_foreign_files(trial, saved):
    description = json.loads((saved / DESCRIPTION).read_text())
    for change, *parts in (
        ({"format": 2}, "format 2", "reads 1"),
        ({"model_type": "paligemma"}, "paligemma", "llava"),
        ({"grid": [2]}, "grid"),
        ({"grid": [0, 2]}, "0"),
        ({"layers": [7]}, "[7]"),
        ({"layers": "all"}, DESCRIPTION),
        ({"source": "elsewhere"}, "elsewhere"),
        ({"dem": {"preset": "unknown"}}, "unknown"),
        ({"dem": {"preset": ["paper"]}}, "preset"),
        ({"dem": {"preset": "paper", "device": "meta"}}, "meta"),
        ({"dem": {"preset": "paper", "dtype": "float99"}}, "float99"),
        ({"format": True}, DESCRIPTION),
        ({"grid": [-2, 2]}, "-2"),
        ({"dem": {"preset": "released", "gate": True}}, "does not fit"),
        ({"more": 1}, DESCRIPTION),
    ):
        (saved / DESCRIPTION).write_text(json.dumps(description | change))
        refused(trial, saved, *parts)
    (saved / DESCRIPTION).write_text("[]")
    refused(trial, saved, DESCRIPTION)
    for content in (b"\xff", b"[" * 100_000, json.dumps(description).encode()[:-20], b""):
        (saved / DESCRIPTION).write_bytes(content)
        refused(trial, saved, DESCRIPTION)

    (saved / DESCRIPTION).write_text(json.dumps(description))
    weights = load_file(saved / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, saved / WEIGHTS)
    refused(trial, saved, WEIGHTS, DESCRIPTION)
    (saved / WEIGHTS).unlink()
    with refuses(WEIGHTS, error=FileNotFoundError):
        dv.load_adapter(trial.model(False), saved)


def with_weights(folder: Path, content: bytes) -> None:
    """Other weights, and a description that vouches for them."""
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / WEIGHTS).write_bytes(content)
    (folder / DESCRIPTION).write_text(json.dumps(description | {"sha256": sha256(content).hexdigest()}))


def test_weights_that_no_save_adapter_has_written(trial, saved):
    weights = load_file(saved / WEIGHTS)
    whole = (saved / WEIGHTS).read_bytes()
    first = next(iter(weights))
    for content, *parts in (
        (whole[:-10], WEIGHTS, "safetensors"),
        (b"", WEIGHTS, "safetensors"),
        (save(weights | {first: torch.full_like(weights[first], torch.nan)}), first, "NaN"),
        (save(weights | {first: weights[first].long()}), first, "int64", "float32"),
        (save({f"other.{name}": value for name, value in weights.items()}), "does not fit"),
        (save(weights | {first: torch.cat([weights[first]] * 2)}), first, "does not fit"),
    ):
        with_weights(saved, content)
        refused(trial, saved, *parts)


def test_another_width_and_another_family(trial, saved):
    refused(trial_of("paligemma"), saved, "paligemma", "'llava'", "of that family")
    narrow = copy.deepcopy(trial)
    narrow.bare = LlavaForConditionalGeneration(narrow_config(trial.bare.config)).eval()
    narrow.before = logits(narrow.bare, narrow.inputs)
    refused(narrow, saved, "does not fit", "another size")


def narrow_config(config: LlavaConfig) -> LlavaConfig:
    config = copy.deepcopy(config)
    config.vision_config.hidden_size = 16
    return config


def test_a_file_where_the_folder_should_be(trial, saved):
    with refuses("holds no", error=FileNotFoundError):
        dv.load_adapter(trial.model(False), saved / WEIGHTS)
    for folder in (saved / WEIGHTS, "\0"):
        with refuses("cannot be made"):
            dv.save_adapter(trial.model(True), folder)


def test_a_second_module_is_refused(trial, saved):
    model = trial.model(True)
    before = logits(model, trial.inputs)
    with refuses("already"):
        dv.load_adapter(model, saved)
    assert torch.equal(logits(model, trial.inputs), before)


def test_a_full_disk_leaves_what_was_there(trial, saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        dv.save_adapter(trial.model(True), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
