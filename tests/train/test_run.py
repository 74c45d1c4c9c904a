"""Both stages, from rows to a model that answers; and a run that stops and goes on."""

import json
import os
import shutil
from io import BytesIO

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualview import cli
from dualview.train import Collator, LlavaDataset, TrainConfig, freeze, logs, train, training_arguments
from dualview.train.base import load
from dualview.train.checkpoints import check_checkpoint, checkpoints
from dualview.train.rows import RowError
from dualview.train.sampler import EpochSampler
from dualview.train.trainer import DualViewTrainer
from tests.checks import refuses
from tests.train.data import config, fields, turns, weights, write_data

ENCODER_TO_LLM = (".dem.", ".multi_modal_projector.")
TRAINED = {"stage1": ENCODER_TO_LLM, "stage2": (*ENCODER_TO_LLM, "language", "lm_head")}


drawn_curve = logs.drawn_curve


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """What a curve is drawn of, in place of the picture, which takes a third of so small a training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "drawn_curve", lambda points: json.dumps(points).encode())
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("train"), dropout=0.1)
    train(config(folder), report=lambda line: None)
    return folder


def test_each_stage_trains_its_parts_and_no_others(place):
    before = weights(place / "base")
    for stage, parts in TRAINED.items():
        after = weights(place / "run" / stage / "model")
        assert after.keys() == before.keys()
        for name, value in after.items():
            learnt = any(part in name for part in parts)
            assert torch.equal(value, before[name]) != learnt, (stage, name)
        before = after


def test_what_was_learnt_is_answered(place, tmp_path, capsys):
    """Stage 2 alone, by the command, on one row: the prompt in training is that of `dualview ask`."""
    row = {"image": "0.png", "conversations": turns("<image>\nwhat is it", "cat")}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    stage = fields(place)["stage2"] | {"data": [{"file": str(tmp_path / "rows.json"), "images": str(place / "images")}]}
    stage |= {"batch_size": 1, "rows_per_device": 1, "max_steps": 20, "learning_rate": 1e-2, "save_steps": 20}
    stage |= {"gradient_checkpointing": False}
    run = {"model": str(place / "base"), "output": str(tmp_path / "run"), "stage2": stage}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    model = tmp_path / "run" / "stage2" / "model"
    assert capsys.readouterr().out.endswith(f"wrote {model}: dualview ask PICTURE QUESTION --model {model}\n")
    assert type(AutoModelForImageTextToText.from_pretrained(model)).__name__ == "InfLlavaForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(model)).__name__ == "InfLlavaProcessor"
    argv = ["ask", str(place / "images/0.png"), "what is it", "--model", str(model), "--max-new-tokens", "9"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "c a t\n"


def test_a_run_leaves_logs_and_a_curve_and_nothing_else(place):
    for stage, steps in (("stage1", 3), ("stage2", 6)):
        folder = place / "run" / stage
        assert {path.name for path in folder.iterdir() if not path.name.startswith(("checkpoint", "runs"))} == {
            "data.json", "log.jsonl", "loss.png", "model",
        }  # fmt: skip
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        points = [[line["step"], line["loss"]] for line in lines if "loss" in line]
        assert [step for step, _ in points] == list(range(1, steps + 1))
        assert json.loads((folder / "loss.png").read_bytes()) == points
        assert len(checkpoints(folder)) == 2


def test_the_curve_is_a_picture():
    with Image.open(BytesIO(drawn_curve([(1, 2.0), (2, 1.0)]))) as picture:
        assert (picture.format, picture.size) == ("PNG", (840, 480))
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 9


def test_the_tower_rests_while_the_rest_is_trained(place, tmp_path):
    """Its batch norms and its dropout are those of inference, though `model.train()` comes before every pass."""
    model, processor = load(place / "base")
    data = LlavaDataset(processor).add(place / "chats.jsonl", place / "images")
    stage = config(place).stages["stage2"]
    trainer = DualViewTrainer(freeze(model, stage.train), training_arguments(stage, "stage2", tmp_path, 0), data)
    trainer.compute_loss(model.train(), Collator(0)([data[0]]))
    resting = {name for name, module in model.named_modules() if not module.training}
    assert resting == {name for name, _ in model.named_modules() if name.startswith("model.vision_tower")}


def test_one_process_does_not_train_on_several_gpus(place, tmp_path):
    """transformers would use nn.DataParallel: batches larger than said, and images apart from their rows."""
    model, processor = load(place / "base")
    data = LlavaDataset(processor).add(place / "chats.jsonl", place / "images")
    arguments = training_arguments(config(place).stages["stage2"], "stage2", tmp_path, 0)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"one process sees 2 GPUs: .* --nproc-per-node 2 .*CUDA_VISIBLE_DEVICES"):
        DualViewTrainer(model, arguments, data)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("stages", "passes"),
    [
        pytest.param(("stage1", "stage2"), 2, marks=pytest.mark.more),
        pytest.param(("stage1", "stage2"), 9, marks=pytest.mark.more),
        (("stage2",), 10),
    ],
)
def test_a_run_that_stopped_goes_on_to_the_same_weights(place, tmp_path, monkeypatch, stages, passes):
    """In stage 1 before the first checkpoint; in stage 2 within the first epoch, and within the second.

    Stage 2 alone begins with what stage 1 gave.
    """
    whole, left = DualViewTrainer.compute_loss, [passes]

    def stopping(self, *args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise StoppedError
        return whole(self, *args, **kwargs)

    source = place / "base" if "stage1" in stages else place / "run" / "stage1" / "model"

    def again(**stage2):
        run = fields(place, **stage2)
        chosen = {name: run[name] for name in ("seed", *stages)}
        return TrainConfig.of({"model": str(source), "output": str(tmp_path / "run"), **chosen})

    monkeypatch.setattr(DualViewTrainer, "compute_loss", stopping)
    with pytest.raises(StoppedError):
        train(again(), report=lambda line: None)
    monkeypatch.undo()
    epochs, drawn = [], EpochSampler.__iter__
    monkeypatch.setattr(EpochSampler, "__iter__", lambda self: epochs.append(self.epoch) or drawn(self))
    torch.manual_seed(99)
    train(again(save_steps=1), resume=True, report=lambda line: None)
    assert epochs[-1] == 1  # the second epoch has an order of its own
    assert [path.name for path in checkpoints(tmp_path / "run" / "stage2")] == ["checkpoint-5", "checkpoint-6"]
    for stage in stages:
        expected, found = weights(place / "run" / stage / "model"), weights(tmp_path / "run" / stage / "model")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_is_not_overwritten_and_goes_on_with_its_own_configuration_only(place):
    with pytest.raises(ValueError, match="exists already"):
        train(config(place))
    changed = TrainConfig.of(fields(place, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"stage2.learning_rate=1.0 is not what .* was begun with"):
        train(changed, resume=True)


def test_a_file_that_was_edited_is_seen_when_the_run_goes_on(place, tmp_path):
    """Of a stage with checkpoints and no result: one that is done needs its rows no more."""
    rows, model = place / "chats.jsonl", place / "run" / "stage2" / "model"
    before = rows.read_text()
    rows.write_text(before.replace("it is a", "it is b"))
    try:
        said = []
        assert train(config(place), resume=True, report=said.append) == model
        assert said == [f"all stages are trained already: {model}"]
        model.rename(tmp_path / "model")
        with pytest.raises(ValueError, match=r"chats\.jsonl: 12 good rows, .* was begun with 12 of"):
            train(config(place), resume=True, report=lambda line: None)
    finally:
        (tmp_path / "model").rename(model)
        rows.write_text(before)


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def replaced(folder):
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (emptied, "files.json does not say"),
        (replaced, "files.json does not say"),
        (lambda folder: (folder / "files.json").write_text("[]"), "files.json does not say"),
        (lambda folder: (folder / "trainer_state.json").write_text(""), "trainer_state.json has 0 bytes in place of "),
        (lambda folder: os.truncate(folder / "optimizer.pt", 99), "optimizer.pt has 99 bytes in place of "),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt has no bytes in place of "),
    ],
)
def test_a_checkpoint_that_was_harmed_is_named(place, tmp_path, monkeypatch, harm, message):
    stage = place / "run" / "stage2"
    newest = checkpoints(stage)[-1]
    shutil.copytree(newest, tmp_path / "kept")
    (stage / "model").rename(tmp_path / "model")
    try:
        harm(newest)
        before = sorted(stage.rglob("*"))
        with refuses(
            f"{newest}: is not the checkpoint that was written: ", message, "Move the folder away, and resume"
        ):
            train(config(place), resume=True, report=lambda line: None)
        assert sorted(stage.rglob("*")) == before
    finally:
        newest.unlink() if newest.is_file() else shutil.rmtree(newest)
        (tmp_path / "kept").rename(newest)
        (tmp_path / "model").rename(stage / "model")


def test_a_checkpoint_without_a_list_of_its_files_is_of_an_older_version(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    check_checkpoint(tmp_path)
    (tmp_path / "trainer_state.json").unlink()
    with refuses("files.json does not say"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_result_that_was_harmed_is_named(place, tmp_path, stage):
    model = place / "run" / stage / "model"
    model.rename(tmp_path / "model")
    try:
        model.mkdir()
        with refuses(f"{model}: has no config.json", "Move it away, and resume"):
            train(config(place), resume=True, report=lambda line: None)
    finally:
        model.rmdir()
        (tmp_path / "model").rename(model)


def test_a_model_that_is_missing_leaves_no_folder(place, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="no model there"):
            train(TrainConfig.of(fields(place) | {"model": "none", "output": str(tmp_path / "run")}))
        assert not (tmp_path / "run").exists()


def test_a_model_without_a_processor(place, tmp_path):
    shutil.copytree(
        place / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*processor*", "token*", "*.jinja")
    )
    with pytest.raises(ValueError, match=r"^model=.*base': its processor cannot be loaded: "):
        load(tmp_path / "base")


@pytest.mark.more
def test_a_run_that_a_bad_row_has_ended_goes_on_without_it(place, tmp_path):
    shutil.copy(place / "images" / "0.png", place / "images" / "good.png")
    (place / "images" / "bad.png").write_bytes(b"no picture")
    rows = [{"image": name, "conversations": turns("<image>", "a")} for name in ("good.png", "bad.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = fields(place, max_steps=1, batch_size=2) | {"output": str(tmp_path / "run")}
    run["stage2"]["data"][0]["file"] = str(tmp_path / "rows.json")
    del run["stage1"]
    with pytest.raises(RowError, match="row 1: "):
        train(TrainConfig.of(run), report=lambda line: None)
    run["stage2"]["bad_rows"] = "skip"
    said = []
    assert train(TrainConfig.of(run), resume=True, report=said.append).is_dir()
    assert "row 1: " in said[0]


@pytest.mark.more
def test_lora_is_merged_and_leaves_the_rest_of_the_language_model(place):
    """From weights of bfloat16, which the result has, too."""
    model = AutoModelForImageTextToText.from_pretrained(place / "base", dtype=torch.bfloat16)
    model.save_pretrained(place / "half")
    AutoProcessor.from_pretrained(place / "base").save_pretrained(place / "half")
    run = fields(place, "lora", lora={"rank": 4, "alpha": 8, "target_modules": r".*language_model.*\.(q_proj|v_proj)"})
    run["model"] = str(place / "half")
    again = TrainConfig.of({key: value for key, value in run.items() if key != "stage1"})
    train(again, report=lambda line: None)
    before, after = weights(place / "half"), weights(place / "lora/stage2/model")
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value.dtype == torch.bfloat16
        learnt = any(part in name for part in (*ENCODER_TO_LLM, "q_proj", "v_proj")) and "tower" not in name
        if not learnt:
            assert torch.equal(value, before[name]), name
    assert all(
        not torch.equal(value, before[name]) for name, value in after.items() if "language" in name and "q_proj" in name
    )
    assert any(not torch.equal(value, before[name]) for name, value in after.items() if ".dem." in name)
    last = checkpoints(place / "lora" / "stage2")[-1]
    assert (last / "adapter_model.safetensors").is_file()
    shutil.rmtree(last)
    shutil.rmtree(place / "lora" / "stage2" / "model")
    train(again, resume=True, report=lambda line: None)
    assert all(torch.equal(value, after[name]) for name, value in weights(place / "lora/stage2/model").items())


@pytest.mark.more
def test_resumed_with_fewer_rows_at_once(tmp_path):
    """As where memory did not suffice: the steps have the same rows, and their sums are rounded otherwise."""
    place = write_data(tmp_path)  # without dropout, which would draw other numbers
    run = {name: value for name, value in fields(place).items() if name != "stage1"}
    train(TrainConfig.of(run), report=lambda line: None)
    whole = weights(place / "run" / "stage2" / "model")
    shutil.rmtree(place / "run" / "stage2" / "model")
    shutil.rmtree(checkpoints(place / "run" / "stage2")[-1])
    run["stage2"]["rows_per_device"] = 1
    said = []
    train(TrainConfig.of(run), resume=True, report=said.append)
    assert said[0].startswith("stage2.rows_per_device=1, and was 2")
    found = weights(place / "run" / "stage2" / "model")
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-5)


@pytest.mark.more
def test_resumed_with_processes_that_read_pictures(place, tmp_path):
    found = []
    for name, stopped in (("whole", False), ("stopped", True)):
        run = fields(place, workers=1) | {"output": str(tmp_path / name)}
        again = TrainConfig.of({key: value for key, value in run.items() if key != "stage1"})
        train(again, report=lambda line: None)
        if stopped:
            shutil.rmtree(tmp_path / name / "stage2" / "model")
            shutil.rmtree(checkpoints(tmp_path / name / "stage2")[-1])
            train(again, resume=True, report=lambda line: None)
        found.append(weights(tmp_path / name / "stage2" / "model"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.more
def test_a_bad_row_in_another_process_is_one_line(place, tmp_path, capsys):
    (place / "images" / "broken.png").write_bytes(b"no picture")
    rows = [{"image": name, "conversations": turns("<image>", "a")} for name in ("0.png", "broken.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = fields(place, workers=1) | {"output": str(tmp_path / "run")}
    run["stage2"]["data"][0]["file"] = str(tmp_path / "rows.json")
    del run["stage1"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"dualview train: error: {tmp_path / 'rows.json'}, row 1: ")
    assert "Traceback" not in last
