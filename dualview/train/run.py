"""A run of training: the stages one after the other, each from the result of the one before, and resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from dualview.arguments import check_callable, check_flags, check_instance, shown
from dualview.outputs import replace_file
from dualview.terminal import say
from dualview.train.base import make_base
from dualview.train.checkpoints import checkpoints
from dualview.train.config import StageConfig, TrainConfig
from dualview.train.dataset import LlavaDataset
from dualview.train.features import FeatureCache
from dualview.train.logs import LossLog
from dualview.train.rows import RowError, check_files
from dualview.train.stages import check_stage, freeze, training_arguments, with_lora
from dualview.train.trainer import DualViewTrainer

RECORD = "config.json"
"""What a folder of a run was begun with."""
MAY_CHANGE = ("bad_rows", "workers")
"""Fields of a stage that may change when a run is resumed, so that a bad picture does not end it for good."""


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
            or the run was begun with another configuration, ``bad_rows`` and ``workers`` aside.

    Example:
        ``train(TrainConfig.load("run.yaml"))``; the page on training has one that runs.
    """
    from accelerate import PartialState

    check_instance(config, "config", TrainConfig, "a TrainConfig; TrainConfig.load reads one")
    check_flags(resume=resume)
    check_callable(report, "report", "a function of a line")

    state = PartialState(cpu=not torch.cuda.is_available())
    output = Path(config.output)
    for name, stage in config.stages.items():  # all of them now: the first may take days
        check_stage(stage, name, state.num_processes)
        for one in stage.data:
            check_files(one.file, one.images, one.source)
    if state.is_main_process:
        _begin(config, output, resume=resume)
    state.wait_for_everyone()
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


def _begin(config: TrainConfig, output: Path, *, resume: bool) -> None:
    record = output / RECORD
    if output.exists() and not resume:
        raise ValueError(f"output={shown(str(output))}: exists already; resume the run in it, or name another folder.")
    if record.is_file():
        before, now = json.loads(record.read_text(encoding="utf-8")), json.loads(json.dumps(config.plain()))
        changed = [each for each in _differences(before, now) if each.split("=")[0].split(".")[-1] not in MAY_CHANGE]
        if changed:
            raise ValueError(
                f"{changed[0]} is not what {output} was begun with ({len(changed)} differences): resume with the same "
                "configuration, or begin another run in another folder."
            )
    output.mkdir(parents=True, exist_ok=True)
    replace_file(record.absolute(), memoryview(json.dumps(config.plain(), indent=1).encode()))


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [f"{prefix}={shown(now)}"]
    names = sorted(set(before) | set(now))
    dot = f"{prefix}." if prefix else ""
    return [each for name in names for each in _differences(before.get(name), now.get(name), dot + name)]


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
    for one in stage.data:
        data.add(one.file, one.images, source=one.source)
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
