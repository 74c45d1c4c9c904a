"""A stage in transformers' words, and what it refuses before anything is trained."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import is_tensorboard_available

from dualview.arguments import check_choice, check_count, check_instance, check_path, number_of, shown
from dualview.train.config import ROWS_PER_DEVICE, STAGES, StageConfig
from dualview.train.plain import number_of_text

GIVEN = {
    "learning_rate": "learning_rate",
    "max_grad_norm": "max_grad_norm",
    "scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",  # a number below 1 is a part of all steps
    "weight_decay": "weight_decay",
    "epochs": "num_train_epochs",
    "workers": "dataloader_num_workers",
    "save_steps": "save_steps",
    "logging_steps": "logging_steps",
}
"""Fields of a stage that transformers has under another name, or the same."""
FIXED: tuple[str, ...] = (
    *("output_dir", "seed", "data_seed", "remove_unused_columns", "save_total_limit", "max_steps", "bf16", "fp16"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "activation_checkpointing", "train_sampling_strategy"),
    *GIVEN.values(),
)
"""Arguments that fields of the configuration stand for."""


def rows_per_device(stage: StageConfig, name: str, processes: int) -> tuple[int, int]:
    """Rows of one pass and passes of one step, so that all processes together reach the batch size.

    Raises:
        ValueError: They cannot.
    """
    share, rest = divmod(stage.batch_size, processes)
    if rest or not share:
        raise ValueError(
            f"{name}.batch_size={stage.batch_size}: must be a multiple of the number of processes, {processes}."
        )
    if stage.rows_per_device is not None:
        rows = stage.rows_per_device
    else:
        rows = max(rows for rows in range(1, min(ROWS_PER_DEVICE[name], share) + 1) if share % rows == 0)
    if share % rows:
        raise ValueError(
            f"{name}.rows_per_device={rows}: must divide {share}, the part that one of {processes} processes has of "
            f"batch_size={stage.batch_size}."
        )
    return rows, share // rows


def check_stage(stage: StageConfig, name: str, processes: int) -> None:
    """Raise a ValueError for what transformers would refuse when the stage begins, or do otherwise than is said."""
    rows_per_device(stage, name, processes)
    check_choice(stage.scheduler, f"{name}.scheduler", [each.value for each in SchedulerType])
    given_arguments(stage, name)
    gpu = _on_gpu(stage)
    if stage.precision == "fp16" and not gpu:
        raise ValueError(f"{name}.precision='fp16': needs a GPU, and there is none here: take bf16 or fp32.")
    if stage.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{name}.precision='bf16': this GPU has no bfloat16: take fp16 or fp32.")


def _on_gpu(stage: StageConfig) -> bool:
    return torch.cuda.is_available() and not stage.arguments.get("use_cpu")


KINDS = {bool: "true or false", int: "an integer", float: "a number", NoneType: "null"}
"""Types of arguments that transformers takes unseen, and stumbles over when they are used."""


def given_arguments(stage: StageConfig, name: str) -> dict[str, Any]:
    """The arguments that a stage passes on, numbers that YAML took for text as numbers.

    Raises:
        ValueError: There is no such argument, a field of the stage stands for it, or its value is of another type.
    """
    fields, hints = {each.name for each in dataclasses.fields(TrainingArguments)}, get_type_hints(TrainingArguments)
    given = {}
    for key, value in stage.arguments.items():
        said = f"{name}.arguments.{key}={shown(value)}: "
        if key in FIXED:
            raise ValueError(f"{said}is said by another field of the stage; use it.")
        if key not in fields:
            raise ValueError(f"{said}is no argument of transformers' TrainingArguments.")
        kinds = get_args(hints[key]) or (hints[key],)
        given[key] = number_of_text(value) if float in kinds else value
        if key == "lr_scheduler_kwargs" and isinstance(value, Mapping):
            given[key] = {each: number_of_text(number) for each, number in value.items()}
        fits = type(value) in kinds or (float in kinds and not math.isnan(number_of(given[key])))
        if not fits and KINDS.keys() >= set(kinds):
            raise ValueError(f"{said}must be {' or '.join(KINDS[kind] for kind in kinds)}.")
    return given


@contextmanager
def of_one_stage() -> Iterator[None]:
    """What transformers sets for the whole process within the block is taken back: the next stage may be another.

    It tells accelerate of a stage by variables of the environment, and makes torch deterministic.
    """
    before, cudnn = dict(os.environ), torch.backends.cudnn
    strict, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kept = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        torch.use_deterministic_algorithms(strict, warn_only=warned)
        cudnn.deterministic, cudnn.benchmark = kept


@contextmanager
def refusals(stage: StageConfig, name: str) -> Iterator[None]:
    """What transformers stumbles over within the block is said as an error of the stage's arguments."""
    try:
        yield
    except Exception as error:  # whatever it and accelerate, or packages that they call, have to say
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name}.arguments={shown(dict(stage.arguments))}: transformers refuses to begin so: {text}"
        ) from error


def training_arguments(
    stage: StageConfig, name: str, folder: str | Path, seed: int, processes: int = 1
) -> TrainingArguments:
    """The stage in transformers' words.

    Args:
        stage: The stage.
        name: "stage1" or "stage2".
        folder: Of the stage's checkpoints and logs.
        seed: Of whatever is random.
        processes: How many train together.

    Raises:
        TypeError: The stage or the folder is none.
        ValueError: The batch size cannot be reached, or transformers refuses an argument.

    Example:
        >>> from dualview.train import TrainConfig
        >>> stage = TrainConfig.of({"model": "base", "output": "run", "stage2": {"data": [{"file": "rows.json"}]}})
        >>> arguments = training_arguments(stage.stages["stage2"], "stage2", "run/stage2", seed=0, processes=8)
        >>> arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        (8, 2)
    """
    check_instance(stage, "stage", StageConfig, "a StageConfig; TrainConfig.of makes them")
    check_choice(name, "name", STAGES)
    check_path(folder, "folder")
    seed, processes = check_count(seed, "seed", low=0), check_count(processes, "processes")
    check_stage(stage, name, processes)
    rows, passes = rows_per_device(stage, name, processes)
    gpu = _on_gpu(stage)
    values: dict[str, Any] = {theirs: getattr(stage, ours) for ours, theirs in GIVEN.items()}
    values |= {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": passes,
        "max_steps": stage.max_steps or -1,
        "bf16": stage.precision == "bf16",
        "fp16": stage.precision == "fp16",
        "tf32": True if gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        "optim": "adamw_torch",
        "seed": seed,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,  # a loss that is no number is to be seen
        "report_to": "tensorboard" if is_tensorboard_available() else "none",
        "use_cpu": not gpu,
        "ddp_find_unused_parameters": False,  # INF-LLaVA uses all of them for every batch
        "dataloader_persistent_workers": stage.workers > 0,
        "label_names": ["labels"],
        _checkpointing(): stage.gradient_checkpointing,
        f"{_checkpointing()}_kwargs": {"use_reentrant": False},
    }
    with refusals(stage, name):
        return TrainingArguments(**{**values, **given_arguments(stage, name)})


def _checkpointing() -> str:
    """What computing activations twice is called: transformers has renamed it between the versions that are taken."""
    names = {each.name for each in dataclasses.fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
