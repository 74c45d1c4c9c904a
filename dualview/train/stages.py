"""A stage: which parts are trained, and with which of transformers' training arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import is_tensorboard_available

from dualview.arguments import check_choice, check_count, check_instance, check_path, shown
from dualview.train.config import PARTS, ROWS_PER_DEVICE, STAGES, LoraConfig, StageConfig

MODULES = {"dem": "dem", "projector": "multi_modal_projector", "language_model": "language_model"}
"""Names of the parts in an `InfLlavaModel`."""
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


def freeze(model: nn.Module, train: tuple[str, ...] | list[str]) -> nn.Module:
    """Train some parts of an INF-LLaVA and no others; the vision tower never.

    Args:
        model: An `InfLlavaForConditionalGeneration`.
        train: Some of "dem", "projector" and "language_model", to which its head belongs.

    Returns:
        The model.

    Raises:
        TypeError: The model is another.
        ValueError: There is no such part.

    Example:
        >>> from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> config = InfLlavaConfig(vision_config={**sizes, "image_size": 28, "patch_size": 14},
        ...                         text_config={**sizes, "vocab_size": 64}, grid=(2, 3), image_token_id=63)
        >>> model = freeze(InfLlavaForConditionalGeneration(config), ["dem", "projector"])
        >>> sorted({name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad})
        ['dem', 'multi_modal_projector']
    """
    from dualview.models.inf_llava import InfLlavaForConditionalGeneration

    check_instance(model, "model", InfLlavaForConditionalGeneration, "an InfLlavaForConditionalGeneration")
    if not isinstance(train, (tuple, list)):
        raise ValueError(f"train={shown(train)}: must be a list of some of {', '.join(PARTS)}.")
    for part in train:
        check_choice(part, "train", PARTS)
    inner: Any = model.base_model
    model.requires_grad_(False)
    for part in train:
        getattr(inner, MODULES[part]).requires_grad_(True)
    if "language_model" in train:
        head: Any = getattr(model, "lm_head")  # noqa: B009 - nn.Module knows no names
        head.requires_grad_(True)
    return model


def with_lora(model: nn.Module, lora: LoraConfig, train: tuple[str, ...] | list[str]) -> nn.Module:
    """Peft's model: low-rank matrices in the language model, and the other parts trained as they are.

    Args:
        model: An `InfLlavaForConditionalGeneration`.
        lora: Rank, scale and layers.
        train: As for [`freeze`][dualview.train.freeze].
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    whole = [MODULES[part] for part in train if part != "language_model"]
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=whole or None,
    )
    made: nn.Module = get_peft_model(model, config)
    return made


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
    known = {each.name for each in dataclasses.fields(TrainingArguments)}
    for key in stage.arguments:
        if key in FIXED:
            raise ValueError(
                f"{name}.arguments.{key}={shown(stage.arguments[key])}: is said by another field of the stage; use it."
            )
        if key not in known:
            raise ValueError(
                f"{name}.arguments.{key}={shown(stage.arguments[key])}: is no argument of transformers' "
                "TrainingArguments."
            )


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
    gpu = torch.cuda.is_available() and not stage.arguments.get("use_cpu")
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
    try:
        return TrainingArguments(**{**values, **stage.arguments})
    except (TypeError, AttributeError) as error:  # what transformers stumbles over
        raise ValueError(f"{name}.arguments={shown(dict(stage.arguments))}: {error}") from error


def _checkpointing() -> str:
    """What computing activations twice is called: transformers has renamed it between the versions that are taken."""
    names = {each.name for each in dataclasses.fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
