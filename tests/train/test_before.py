"""What can be known wrong is said before the first step of the first stage, and leaves nothing behind."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainingArguments

from dualview.train import DualViewTrainer, TrainConfig, run, train
from dualview.train.base import load, load_outline
from dualview.train.config import LoraConfig
from dualview.train.parts import with_lora
from dualview.train.stages import training_arguments
from tests.checks import refuses
from tests.train.data import fields, turns, weights, write_data

SAID = [{"conversations": turns("hello", "hi")}]
LORA = {"rank": 2, "alpha": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("before"))


def never(*args, **kwargs):
    raise AssertionError("a step was taken")


def refused(place, folder, monkeypatch, *parts, **wrong):
    """Both stages, of which the second is wrong."""
    monkeypatch.setattr(DualViewTrainer, "compute_loss", never)
    given = fields(place, **wrong) | {"output": str(folder / "run")}
    before = dict(os.environ)
    with refuses(*parts):
        train(TrainConfig.of(given), report=lambda line: None)
    assert not (folder / "run").exists()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"scheduler": "cosin"}, ("stage2.scheduler='cosin': must be",)),
        ({"rows_per_device": 3}, ("stage2.rows_per_device=3: must divide 4",)),
        ({"precision": "fp16"}, ("stage2.precision='fp16': needs a GPU", "bf16 or fp32")),
        ({"max_length": 4}, ("chats.jsonl, row 11: ", "max_length=4 cuts through an image", "has 4: raise max_length")),
        (
            {"lora": LORA | {"target_modules": "q_proj"}},
            ("stage2.lora.target_modules='q_proj': is the whole name of no",),
        ),
        (
            {"lora": LORA | {"target_modules": r".*\.q_proj"}},
            ("stage2.lora", "also names model.vision_tower", "language"),
        ),
        (
            {"lora": LORA | {"target_modules": r".*language_model.*mlp"}},
            (
                "stage2.lora",
                "such as model.language_model",
            ),
        ),
        (
            {"lora": LORA | {"target_modules": r".*language_model.*(q_proj|mlp)"}},
            ("stage2.lora", "matrices, as model.language_model.layers.0.mlp: name layers such as"),
        ),
        ({"arguments": {"nonsense": 1}}, ("stage2.arguments.nonsense=1: is no argument",)),
        ({"arguments": {"adam_beta2": "high"}}, ("stage2.arguments.adam_beta2='high': must be a number",)),
        ({"arguments": {"adam_beta2": 5}}, ("stage2.arguments={'adam_beta2': 5}: ", "beta")),
        ({"arguments": {"logging_first_step": "yes"}}, ("logging_first_step='yes': must be true or false",)),
        ({"arguments": {"dataloader_prefetch_factor": 1.5}}, ("prefetch_factor=1.5: must be an integer or null",)),
        ({"arguments": {"optim": "adamw_tourch"}}, ("stage2.arguments={'optim': 'adamw_tourch'}: ", "adamw_torch")),
        ({"arguments": {"lr_scheduler_kwargs": {"cycles": 2}}}, ("stage2.arguments={'lr_scheduler_kwargs'", "cycles")),
        ({"scheduler": "cosine_with_min_lr"}, ("stage2.arguments={}: ", "min_lr")),
        ({"arguments": {"eval_strategy": "epoch"}}, ("stage2.arguments={'eval_strategy': 'epoch'}: ", "eval_dataset")),
        ({"arguments": {"report_to": "nobody"}}, ("stage2.arguments={'report_to': 'nobody'}: ", "nobody")),
        ({"arguments": {"fsdp": True}}, ("stage2.arguments={'fsdp': True}: ",)),
        ({"arguments": {"deepspeed": "none.json"}}, ("stage2.arguments={'deepspeed': 'none.json'}: ",)),
    ],
)
def test_what_is_wrong_in_the_second_stage_is_said_before_the_first(place, tmp_path, monkeypatch, wrong, parts):
    refused(place, tmp_path, monkeypatch, *parts, **wrong)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ("rows.json: no such file. Fetch it from https://x",)),
        ("", ("rows.json is no JSON",)),
        ("[]", ("rows.json holds []: must be a list of at least one row",)),
        ('{"id": 1}\n{"id": 2}', ("rows.json is no JSON", "a row a line as .jsonl")),
        (json.dumps({"rows": SAID}), ("rows.json holds {", "must be a list")),
        ('[{"question": "a", "answer": "b"}]', ("rows.json, row 0: conversations=None must be",)),
        ('[{"conversations": [{"role": "user", "content": "a"}]}]', ("rows.json, row 0: turn 0 is", "from: human")),
        (json.dumps([{**SAID[0], "image": "0.png"}]), ("rows.json, row 0: 0 <image> in the text, but 1 images",)),
    ],
)
def test_rows_of_the_second_stage_are_read_before_the_first(place, tmp_path, monkeypatch, text, parts):
    if text is not None:
        (tmp_path / "rows.json").write_text(text)
    data = [{"file": str(tmp_path / "rows.json"), "images": str(place / "images"), "source": "https://x"}]
    refused(place, tmp_path, monkeypatch, *parts, data=data)


def test_folders_that_are_none(place, tmp_path, monkeypatch):
    file, images = str(place / "chats.jsonl"), str(place / "images")
    for one, *parts in (
        ({"file": file, "images": str(tmp_path / "none")}, "none: no such folder of images", "Correct"),
        ({"file": file, "images": file}, "chats.jsonl: is no folder of images"),
        ({"file": images}, "images: is no file"),
    ):
        refused(place, tmp_path, monkeypatch, *parts, data=[one])
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    refused(place, tmp_path, monkeypatch, f"stage2.feature_cache='{cache}': Not a directory", feature_cache=cache)


def test_one_process_that_sees_several_gpus(place, tmp_path, monkeypatch):
    """The most frequent mistake on a large machine, and none of the arguments."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"^one process sees 2 GPUs: .* --nproc-per-node 2 "):
        train(TrainConfig.of(fields(place) | {"output": str(tmp_path / "run")}), report=lambda line: None)


@pytest.mark.parametrize("strict", ["stage1", "stage2"])
def test_what_one_stage_sets_for_the_process_does_not_reach_another(place, tmp_path, monkeypatch, strict):
    """Neither that of the first the second, nor what is looked at before of the second the first."""

    def noted(trainer, **_):
        seen.append(("CUBLAS_WORKSPACE_CONFIG" in os.environ, torch.are_deterministic_algorithms_enabled()))

    monkeypatch.setattr(DualViewTrainer, "train", noted)
    monkeypatch.setattr(DualViewTrainer, "save_result", lambda *_: None)
    given, seen, before = fields(place) | {"output": str(tmp_path / "run")}, [], dict(os.environ)
    given[strict]["arguments"] = {"full_determinism": True}
    monkeypatch.setattr(run, "load", lambda _: load(place / "base"))  # stage 1 writes nothing here
    train(TrainConfig.of(given), report=lambda line: None)
    assert seen == [(stage == strict, stage == strict) for stage in ("stage1", "stage2")]
    assert dict(os.environ) == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_gpu_can_do(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    stage = TrainConfig.of(fields(place, precision="bf16")).stages["stage2"]
    with refuses("stage2.precision='bf16': this GPU has no bfloat16", "fp16 or fp32"):
        training_arguments(stage, "stage2", place, 0)


def test_numbers_that_yaml_takes_for_text(place):
    stage = TrainConfig.of(fields(place, arguments={"adam_epsilon": "1e-7"})).stages["stage2"]
    assert training_arguments(stage, "stage2", place, 0).adam_epsilon == 1e-7
    given = {"lr_scheduler_kwargs": {"min_lr": "1e-6"}}  # text in YAML, and a number in Python's
    stage = TrainConfig.of(fields(place, arguments=given)).stages["stage2"]
    assert training_arguments(stage, "stage2", place, 0).lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_models_that_do_not_belong_to_their_tokenizer_or_weights(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(file.read_text().replace('"id": 63', '"id": 64').replace('"<image>": 63', '"<image>": 64'))
    with refuses("base': its tokenizer has ids up to 64, and the language model 64 rows", "into the directory"):
        load(tmp_path / "base")
    shutil.copytree(place / "base", tmp_path / "base", dirs_exist_ok=True)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with refuses("weights and config.json do not belong together", "model.language_model.layers.2"):
        load(tmp_path / "base")


def test_layers_of_low_rank(place):
    """The same where the model has no weights yet; the tower and the parts that are trained whole have none."""
    for model in (load_outline(place / "base"), AutoModelForImageTextToText.from_pretrained(place / "base")):
        made = with_lora(model, LoraConfig(rank=2, alpha=2), ("dem", "language_model"))
        names = [name for name, _ in made.named_parameters() if "lora_A" in name]
        assert len(names) == 14
        assert all("language_model" in name for name in names)


@pytest.mark.more
def test_low_rank_matrices_do_not_depend_on_what_came_before(place, tmp_path):
    """A run that is stopped in its second stage before the first checkpoint draws those of the whole run."""
    given = fields(place, lora=LORA, max_steps=1) | {"output": str(tmp_path / "run")}
    given["stage1"]["max_steps"] = 1
    found = []
    for resume in (False, True):
        result = train(TrainConfig.of(given), resume=resume, report=lambda line: None)
        found.append(weights(result))
        shutil.rmtree(tmp_path / "run" / "stage2")
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
