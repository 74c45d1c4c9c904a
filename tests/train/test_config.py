"""A configuration: the paper's values, and an error for whatever cannot be."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from dualview.train import TrainConfig, training_arguments
from dualview.train.checkpoints import checkpoints, clear, prune, publish, staging
from dualview.train.stages import rows_per_device

DATA = {"data": [{"file": "rows.json"}]}
RUN = {"model": "base", "output": "run"}
CONFIGS = sorted((Path(__file__).parents[2] / "dualview" / "train" / "configs").glob("inf_llava*.yaml"))


def stage2(**fields):
    return RUN | {"stage2": DATA | fields}


def test_the_stages_of_the_paper():
    config = TrainConfig.of(RUN | {"stage1": DATA, "stage2": DATA})
    one, two = config.stages["stage1"], config.stages["stage2"]
    assert (one.learning_rate, one.batch_size, one.form, one.train) == (1e-3, 256, "plain", ("dem", "projector"))
    assert (two.learning_rate, two.batch_size, two.form) == (2e-5, 128, "chat")
    assert two.train == ("dem", "projector", "language_model")
    for stage in (one, two):
        assert (stage.epochs, stage.scheduler, stage.warmup_ratio, stage.weight_decay) == (1, "cosine", 0.03, 0)
        assert (stage.precision, stage.max_length, stage.lora) == ("bf16", 2048, None)
    arguments = training_arguments(one, "stage1", Path("run"), 5, processes=8)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * 8 == 256
    assert arguments.learning_rate == 1e-3
    assert arguments.get_warmup_steps(1000) == 30
    assert arguments.optim == "adamw_torch"
    assert arguments.seed == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], r"fields=\[\]: must be fields"),
        (RUN, "stage1, stage2: none is given"),
        (RUN | {"stage3": DATA}, "stage3=.*is no field; there are model, output"),
        ({"output": "run", "stage1": DATA}, "model=None: must be a folder"),
        (RUN | {"model": {"language_model": "llm"}, "stage1": DATA}, "model: .* has no vision_tower"),
        (RUN | {"model": {"vision_tower": "v", "language_model": ""}, "stage1": DATA}, "model.language_model='': must"),
        (
            RUN | {"model": {"vision_tower": "v", "language_model": "l", "grid": 0}, "stage1": DATA},
            "model.grid=0: must",
        ),
        (RUN | {"seed": -1, "stage1": DATA}, "seed=-1: must be an integer of at least 0"),
        (RUN | {"stage1": {}}, "stage1.data=None: must be a list"),
        (RUN | {"stage1": {"data": [{"images": "x"}]}}, "stage1.data: .* has no file"),
        (RUN | {"stage1": {"data": [{"file": ""}]}}, "stage1.data.file='': must be a text"),
        (RUN | {"stage1": {"data": [{"file": "a", "url": "b"}]}}, "stage1.data.url='b': is no field"),
        (stage2(learning_rat=1), "stage2.learning_rat=1: is no field; there are .*learning_rate"),
        (stage2(learning_rate="fast"), "stage2.learning_rate='fast': must be a positive, finite number"),
        (stage2(learning_rate=-1), "stage2.learning_rate=-1: must be a positive"),
        (stage2(epochs=0), "stage2.epochs=0: must be a positive"),
        (stage2(batch_size=1.5), "stage2.batch_size=1.5: must be a positive integer"),
        (stage2(max_steps=0), "stage2.max_steps=0: must be"),
        (stage2(workers=-1), "stage2.workers=-1: must be"),
        (stage2(warmup_ratio=1), "stage2.warmup_ratio=1: must be at least 0 and below 1"),
        (stage2(weight_decay=-0.1), "stage2.weight_decay=-0.1: must not be negative"),
        (stage2(precision="bf61"), "stage2.precision='bf61': must be \"bf16\""),
        (stage2(form="captions"), "stage2.form='captions': must be \"plain\""),
        (stage2(bad_rows="ignore"), 'stage2.bad_rows=\'ignore\': must be "error" or "skip"'),
        (stage2(train=["tower"]), r"stage2.train=\['tower'\]: must be some of dem, projector, language_model"),
        (stage2(train=3), r"stage2.train=\[3\]: must be some of dem, projector, language_model"),
        (stage2(train=[["dem"]]), r"stage2.train=\[\['dem'\]\]: must be some of dem"),
        (stage2(train=[]), r"stage2.train=\[\]: must be some of dem"),
        (stage2(scheduler=3), "stage2.scheduler=3: must be a text"),
        (stage2(feature_cache=True), "stage2.feature_cache=True: must be a text"),
        (stage2(group_by_length=1), "stage2.group_by_length=1: must be True or False"),
        (stage2(lora={"rank": 0}), "stage2.lora.rank=0: must be"),
        (stage2(lora={"r": 8}), "stage2.lora.r=8: is no field"),
        (stage2(lora={"target_modules": "("}), r"stage2.lora.target_modules='\(': must be a regular expression"),
        (RUN | {"seed": 2**32, "stage1": DATA}, "seed=4294967296: must be an integer"),
        (RUN | {"stage1": DATA | {"lora": True}}, "stage1.lora=.*leaves the language model as it is"),
        (stage2(arguments=[1]), r"stage2.arguments=\[1\]: must be fields"),
        (stage2(arguments={"run_name": date(2026, 1, 1)}), "stage2.arguments.run_name=.*: must be a text, a finite"),
        (stage2(arguments={"a": [{"b": float("nan")}]}), "stage2.arguments.a.b=nan: must be a text, a finite"),
    ],
)
def test_errors_name_field_value_and_rule(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig.of(fields)


def test_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(stage2(learning_rate="1e-4", lora=True)))  # PyYAML takes 1e-4 for text
    config = TrainConfig.load(file)
    assert config.stages["stage2"].learning_rate == 1e-4
    assert config.stages["stage2"].lora.rank == 128
    assert TrainConfig.of(config.plain()) == config
    for text in ("a: [", "[" * 500):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"run\.yaml is no YAML"):
            TrainConfig.load(file)
    file.write_text("model: a\nstage1: {data: [], epochs: 1, epochs: 2}")
    with pytest.raises(ValueError, match=r"'epochs' is written twice, .*line 2"):
        TrainConfig.load(file)
    file.write_text("model: 3")
    with pytest.raises(ValueError, match=r"run\.yaml: model=3"):
        TrainConfig.load(file)
    with pytest.raises(ValueError, match=r"none\.yaml: no such file"):
        TrainConfig.load(tmp_path / "none.yaml")


def test_arguments_of_transformers():
    config = TrainConfig.of(stage2(arguments={"adam_beta2": 0.98}))
    assert training_arguments(config.stages["stage2"], "stage2", Path("run"), 0).adam_beta2 == 0.98
    said = "said by another field"
    for arguments, message in (
        ({"bf16": False}, said),
        ({"train_sampling_strategy": "sequential"}, said),  # DualViewTrainer has an order of its own
        ({"nonsense": 1}, "nonsense"),
        ({"fsdp": [1]}, "fsdp"),
    ):
        config = TrainConfig.of(stage2(arguments=arguments))
        with pytest.raises(ValueError, match=rf"stage2.arguments.*{message}"):
            training_arguments(config.stages["stage2"], "stage2", Path("run"), 0)


def test_logs_of_tensorboard_where_it_is_installed(monkeypatch):
    stage = TrainConfig.of(stage2()).stages["stage2"]
    for installed, expected in ((True, ["tensorboard"]), (False, [])):
        monkeypatch.setattr("dualview.train.stages.is_tensorboard_available", lambda is_it=installed: is_it)
        assert training_arguments(stage, "stage2", "run", 0).report_to == expected


@pytest.mark.parametrize(
    ("batch_size", "rows", "processes", "expected"),
    [(128, None, 1, (8, 16)), (128, None, 64, (2, 1)), (6, None, 1, (6, 1)), (14, None, 1, (7, 2)), (8, 4, 2, (4, 1))],
)
def test_gradients_are_accumulated_up_to_the_batch(batch_size, rows, processes, expected):
    stage = TrainConfig.of(stage2(batch_size=batch_size, rows_per_device=rows)).stages["stage2"]
    assert rows_per_device(stage, "stage2", processes) == expected


def test_a_batch_that_cannot_be_reached():
    stage = TrainConfig.of(stage2(batch_size=6, rows_per_device=4)).stages["stage2"]
    with pytest.raises(ValueError, match="batch_size=6: must be a multiple of the number of processes, 4"):
        rows_per_device(stage, "stage2", 4)
    with pytest.raises(ValueError, match="rows_per_device=4: must divide 3"):
        rows_per_device(stage, "stage2", 2)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_papers_mixtures_name_what_to_fetch(file):
    config = TrainConfig.load(file)
    assert list(config.stages) == ["stage1", "stage2"]
    assert all(one.source and "http" in one.source for stage in config.stages.values() for one in stage.data)


def test_there_are_mixtures():
    assert [file.stem for file in CONFIGS] == ["inf_llava", "inf_llava_more_data"]


def test_the_launchers_configurations_are_known_to_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    sharded = load_config_from_file(str(CONFIGS[0].with_name("fsdp2.yaml")))  # refuses keys that it does not know
    assert (sharded.distributed_type, sharded.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    assert set(sharded.fsdp_config) <= {action.dest for action in launch_command_parser()._actions}
    for stage in (2, 3):
        zero = HfDeepSpeedConfig(str(CONFIGS[0].with_name(f"zero{stage}.json")))
        assert (zero.is_zero2(), zero.is_zero3(), zero.is_offload()) == (stage == 2, stage == 3, False)


def test_checkpoints_have_their_name_when_they_are_complete(tmp_path):
    for step in (2, 10, 4):
        written = staging(tmp_path) / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "weights").write_text(str(step))
        assert written not in checkpoints(tmp_path)
        publish(written, tmp_path / written.name)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    prune(tmp_path, 2)
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]
