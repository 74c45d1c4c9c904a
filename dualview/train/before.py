"""What is looked at before the first step, for all stages that are to come: the first of them may take days."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dualview.arguments import shown
from dualview.train.base import load_outline, load_processor
from dualview.train.checkpoints import check_checkpoint, checkpoints
from dualview.train.config import StageConfig, TrainConfig
from dualview.train.dataset import LlavaDataset
from dualview.train.folder import check_rows
from dualview.train.parts import with_lora
from dualview.train.rows import Row
from dualview.train.stages import of_one_stage, refusals, training_arguments
from dualview.train.trainer import DualViewTrainer, check_gpus


def ready(
    config: TrainConfig, stages: Mapping[str, StageConfig], source: Path, report: Callable[[str], None]
) -> dict[str, LlavaDataset]:
    """The rows of stages, when whatever can be known wrong with these stages has been looked at.

    Args:
        config: Of the run.
        stages: Those that have no result yet.
        source: Directory of the model that training begins with.
        report: Called with a line for what is skipped.

    Raises:
        ValueError: Rows, pictures, layers, a checkpoint or an argument of transformers are wrong; the message says
            which of them, and of which stage.
    """
    from accelerate import PartialState

    found = {}
    for name, stage in stages.items():
        state, folder = PartialState(), Path(config.output) / name
        for newest in checkpoints(folder)[-1:]:
            check_checkpoint(newest)
        if stage.lora is not None:
            try:
                with_lora(load_outline(source), stage.lora, stage.train)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        data, files = _rows(stage, load_processor(source), report if state.is_main_process else _nothing)
        check_rows(files, folder, write=state.is_main_process)
        _ = data[max(range(len(data)), key=lambda index: len(data.rows[index].images))]  # `max_length` cuts it first
        data.report = report  # every process reads rows of its own
        _check_trainer(stage, name, folder, data, config.seed, state.num_processes)
        if stage.feature_cache is not None:
            _check_folder(stage.feature_cache, f"{name}.feature_cache")
        found[name] = data
    return found


def _rows(
    stage: StageConfig, processor: Any, report: Callable[[str], None]
) -> tuple[LlavaDataset, list[tuple[str, list[Row]]]]:
    """All rows of a stage, and those of each of its files."""
    images = {}
    if getattr(processor.image_processor, "max_tiles", None) is None:
        images["do_pad"] = stage.pad_images
    data = LlavaDataset(
        processor,
        stage.form,
        max_length=stage.max_length,
        bad_rows="skip" if stage.bad_rows == "skip" else "error",
        images_kwargs=images,
        report=report,
    )
    files = []
    for one in stage.data:
        before = len(data)
        data.add(one.file, one.images, source=one.source)
        files.append((one.file, data.rows[before:]))
    return data, files


def _nothing(line: str) -> None:
    """Another process reports it."""


def _check_trainer(stage: StageConfig, name: str, folder: Path, data: LlavaDataset, seed: int, processes: int) -> None:
    """What transformers refuses when it begins, it refuses for a model of one weight, too."""
    model = nn.Linear(1, 1)
    model.config = PreTrainedConfig()
    with of_one_stage():
        arguments = training_arguments(stage, name, folder, seed, processes)
        unset_hf_deepspeed_config()
        if arguments.deepspeed:  # which has an optimiser and a schedule of its own
            return
        check_gpus(arguments)
        with refusals(stage, name):
            trainer = DualViewTrainer(model, arguments, data)
            if not arguments.optim_target_modules:  # which names layers
                trainer.create_optimizer_and_scheduler(stage.max_steps or 1)


def _check_folder(folder: str, name: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}={shown(folder)}: {error.strerror}; name a folder that can be made.") from error
