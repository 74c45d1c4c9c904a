"""A run of training: the stages one after the other, each from the result of the one before, and resumable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from dualview.arguments import check_callable, check_flags, check_instance, shown
from dualview.terminal import say
from dualview.train.base import make_base
from dualview.train.checkpoints import checkpoints
from dualview.train.config import StageConfig, TrainConfig
from dualview.train.dataset import LlavaDataset
from dualview.train.features import FeatureCache
from dualview.train.folder import check_rows, run_folder
from dualview.train.logs import LossLog
from dualview.train.rows import RowError, check_files
from dualview.train.stages import check_stage, freeze, training_arguments, with_lora
from dualview.train.trainer import DualViewTrainer


def train(config: TrainConfig, *, resume: bool = False, report: Callable[[str], None] = say) -> Path:
    """Train an INF-LLaVA in the stages of a configuration.

    Args:
        config: What to train, on what, and how.
        resume: Go on with a run that was stopped, from its last checkpoint, or from its beginning where there is none.
            On one CPU the weights in the end are those of a run that was not stopped, bit for bit.
        report: Called with a line for what is skipped, and for every result.

    Returns:
        The directory of the last stage's model, which `AutoModelForImageTextToText` and `AutoProcessor` load.

    Raises:
        TypeError: The configuration is none.
        ValueError: Data or model are missing or wrong; the folder of the run is there already, and ``resume`` is False;
            another process trains in it; or the run was begun with another configuration or other rows.

    Example:
        ``train(TrainConfig.load("run.yaml"))``; the page on training has one that runs.
    """
    from accelerate import PartialState

    check_instance(config, "config", TrainConfig, "a TrainConfig; TrainConfig.load reads one")
    check_flags(resume=resume)
    check_callable(report, "report", "a function of a line")

    state = PartialState(cpu=not torch.cuda.is_available())
    for name, stage in config.stages.items():  # all of them now: the first may take days
        check_stage(stage, name, state.num_processes)
        for one in stage.data:
            check_files(one.file, one.images, one.source)
    alone = run_folder(config, resume=resume, report=report) if state.is_main_process else nullcontext()
    with alone:
        state.wait_for_everyone()
        return _train_stages(config, state, report)


def _train_stages(config: TrainConfig, state: Any, report: Callable[[str], None]) -> Path:
    output = Path(config.output)
    if isinstance(config.model, str):
        source = Path(config.model)
    else:
        source = output / "base"
        if state.is_main_process and not source.is_dir():
            make_base(config.model, source, config.seed)
        state.wait_for_everyone()
    for name, stage in config.stages.items():
        result = output / name / "model"
        if not result.is_dir():
            _train_stage(config, name, stage, source, report)
            if state.is_main_process:
                report(f"wrote {result}: dualview ask PICTURE QUESTION --model {result}")
        source = result
    return source


def _train_stage(
    config: TrainConfig, name: str, stage: StageConfig, source: Path, report: Callable[[str], None]
) -> None:
    from accelerate import PartialState

    folder = Path(config.output) / name
    model, processor = load(source)
    images: dict[str, Any] = {}
    if getattr(processor.image_processor, "max_tiles", None) is None:
        images["do_pad"] = stage.pad_images
    data = LlavaDataset(
        processor,
        stage.form,
        max_length=stage.max_length,
        bad_rows="skip" if stage.bad_rows == "skip" else "error",
        images_kwargs=images,
        report=report if PartialState().is_main_process else lambda line: None,
    )
    files = []
    for one in stage.data:
        before = len(data)
        data.add(one.file, one.images, source=one.source)
        files.append((one.file, data.rows[before:]))
    check_rows(files, folder, write=PartialState().is_main_process)
    if stage.feature_cache is not None:
        data.cache = _filled_cache(stage.feature_cache, model, data)
    data.report = report  # every process reads rows of its own
    model = freeze(model, stage.train) if stage.lora is None else with_lora(model, stage.lora, stage.train)
    arguments = training_arguments(stage, name, folder, config.seed, PartialState().num_processes)
    trainer = DualViewTrainer(
        model,
        arguments,
        data,
        group_by_length=stage.group_by_length,
        save_total_limit=stage.save_total_limit,
        callbacks=[LossLog(folder)],
    )
    found = checkpoints(folder)
    try:
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    except RowError as error:  # from another process it comes with a traceback in its text
        raise RowError(str(error).rpartition("RowError: ")[2].strip()) from error
    finally:
        if trainer.progress is not None:
            trainer.progress.close()
    trainer.save_result(folder / "model", source)


def _filled_cache(folder: str, model: Any, data: LlavaDataset) -> FeatureCache:
    """A cache of all pictures of the data; the processes fill it together."""
    from accelerate import PartialState

    state = PartialState()
    model.to(state.device)
    cache = FeatureCache(folder, model, data.processor, data.images_kwargs)
    pictures = sorted({path for row in data.rows for path in row.images})
    share = pictures[state.process_index :: state.num_processes]
    cache.fill(share, model, shown=state.is_main_process)
    state.wait_for_everyone()
    return cache


def load(source: str | Path) -> tuple[Any, Any]:
    """Model, with weights of float32, and processor of a directory.

    Raises:
        ValueError: There is no INF-LLaVA, or no processor of one.
    """
    from dualview.models.inf_llava import InfLlavaForConditionalGeneration

    source = Path(source)
    if not (source / "config.json").is_file():
        raise ValueError(f"model={shown(str(source))}: no model there; `dualview convert` makes such a directory.")
    try:
        processor = AutoProcessor.from_pretrained(source)
    except OSError as error:
        raise ValueError(f"model={shown(str(source))}: its processor cannot be loaded: {error}") from error
    model = InfLlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    return model, processor
