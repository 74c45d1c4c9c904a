"""A run of training: the stages one after the other, each from the result of the one before, and resumable."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dualview.arguments import check_callable, check_flags, check_instance
from dualview.terminal import say
from dualview.train.base import load, make_base
from dualview.train.before import ready
from dualview.train.checkpoints import checkpoints
from dualview.train.config import StageConfig, TrainConfig
from dualview.train.dataset import LlavaDataset
from dualview.train.features import FeatureCache
from dualview.train.folder import run_folder
from dualview.train.logs import LossLog
from dualview.train.parts import freeze, with_lora
from dualview.train.rows import RowError, check_files
from dualview.train.stages import check_stage, of_one_stage, training_arguments
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
        if not _is_whole(source) and state.is_main_process:
            make_base(config.model, source, config.seed)
        state.wait_for_everyone()
    results = {name: output / name / "model" for name in config.stages}
    sources = dict(zip(config.stages, [source, *results.values()], strict=False))
    left = {name: stage for name, stage in config.stages.items() if not _is_whole(results[name])}
    if not left and state.is_main_process:
        report(f"all stages are trained already: {list(results.values())[-1]}")
    data = ready(config, left, sources[next(iter(left))], report) if left else {}
    for name, stage in left.items():
        with of_one_stage():
            _train_stage(config, name, stage, sources[name], data.pop(name))
        if state.is_main_process:
            report(f"wrote {results[name]}: dualview ask PICTURE QUESTION --model {results[name]}")
    return list(results.values())[-1]


def _is_whole(folder: Path) -> bool:
    """Whether a model has been written; it appears when it is complete.

    Raises:
        ValueError: There is something else.
    """
    if os.path.lexists(folder) and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: has no config.json, so it is not the model that the run wrote there. Move it away, and resume: "
            "it is made again."
        )
    return folder.is_dir()


def _train_stage(config: TrainConfig, name: str, stage: StageConfig, source: Path, data: LlavaDataset) -> None:
    from accelerate import PartialState

    folder = Path(config.output) / name
    model, _ = load(source)
    if stage.feature_cache is not None:
        data.cache = _filled_cache(stage.feature_cache, model, data)
    if stage.lora is None:
        model = freeze(model, stage.train)
    else:
        torch.manual_seed(config.seed)  # whatever came before: a run that is resumed draws the same matrices
        model = with_lora(model, stage.lora, stage.train)
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
