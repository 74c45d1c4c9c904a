"""What a run of training is: two stages with the paper's values, any of which may be overridden; and its checks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dualview.arguments import check_choice, check_count, check_flags, check_number, check_size, shown
from dualview.train.plain import (
    check_names,
    check_share,
    check_text,
    checked_mapping,
    number_of_text,
    plain_mapping,
    plain_value,
    read_yaml,
)

PRECISIONS = ("bf16", "fp16", "fp32")
PARTS = ("dem", "projector", "language_model")
FORMS = {"plain": "an image and its caption", "chat": "conversations"}


@dataclass(frozen=True)
class DataConfig:
    """One file of rows.

    Attributes:
        file: ``.json`` or ``.jsonl`` of LLaVA's format.
        images: Folder that paths of pictures begin in; None for that of the file.
        source: Where to fetch both, named where they are missing.

    Raises:
        ValueError: A field has a value that it cannot have.
    """

    file: str
    images: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        check_text(self.file, "data.file")
        for name in ("images", "source"):
            check_text(getattr(self, name), f"data.{name}", optional=True)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank matrices in the place of the language model's own weights.

    Attributes:
        rank: Of the matrices.
        alpha: Their product is scaled by alpha / rank.
        dropout: Of what they read.
        target_modules: Regular expression of the names of the layers that get them. The vision tower has layers of the
            same names, so it begins with the language model.

    Raises:
        ValueError: A field has a value that it cannot have.
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    target_modules: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

    def __post_init__(self) -> None:
        check_count(self.rank, "lora.rank")
        check_count(self.alpha, "lora.alpha")
        check_share(self.dropout, "lora.dropout")
        try:
            valid = bool(re.compile(self.target_modules).pattern) and isinstance(self.target_modules, str)
        except (re.error, TypeError, RecursionError):
            valid = False
        if not valid:
            raise ValueError(f"lora.target_modules={shown(self.target_modules)}: must be a regular expression.")


@dataclass(frozen=True)
class BaseConfig:
    """Pretrained parts of a model that is not trained yet; names on the hub, or directories.

    Attributes:
        vision_tower: As openai/clip-vit-large-patch14-336 (paper).
        language_model: As meta-llama/Meta-Llama-3-8B-Instruct (paper), with its tokenizer.
        grid: Rows and columns of tiles.
        dem: Preset and options of the enhancement module, as in `InfLlavaConfig`.
        chat_template: File of a chat template, for tokenizers that are not Llama 3's.

    Raises:
        ValueError: A field has a value that it cannot have.
    """

    vision_tower: str
    language_model: str
    grid: tuple[int, int] = (3, 3)
    dem: Mapping[str, Any] = field(default_factory=lambda: {"preset": "released"})
    chat_template: str | None = None

    def __post_init__(self) -> None:
        check_text(self.vision_tower, "model.vision_tower")
        check_text(self.language_model, "model.language_model")
        check_text(self.chat_template, "model.chat_template", optional=True)
        object.__setattr__(self, "grid", check_size(self.grid, "model.grid", high=128))
        object.__setattr__(self, "dem", plain_mapping(self.dem, "model.dem"))


@dataclass(frozen=True)
class StageConfig:
    """One stage.

    Where the values come from: "paper" is section 5.2 of the paper; "scripts" are the shell scripts of the released
    code; "here" is a choice of this library.

    Attributes:
        data: Files of rows; their rows are mixed.
        form: "plain": captions (stage 1; scripts), "chat": conversations (stage 2; scripts).
        train: Parts that are trained. Stage 1: DEM and projector; stage 2: the language model, too (paper). The vision
            tower is frozen in both (paper).
        epochs: 1 (paper for stage 1, scripts for both).
        max_steps: Steps of the optimiser in place of epochs.
        learning_rate: 1e-3 in stage 1, 2e-5 in stage 2 (paper).
        batch_size: Rows of one step over all processes, 256 and 128 (paper); gradients are accumulated up to it.
        rows_per_device: Rows of one pass, 16 and 8 at most (scripts).
        scheduler: "cosine" (paper for stage 1, scripts for both), or another name that transformers knows.
        warmup_ratio: Part of the steps in which the rate rises, .03 (scripts).
        weight_decay: 0 (scripts).
        max_grad_norm: Longest gradient, 1 (scripts leave transformers' default); 0 for any.
        precision: "bf16" (scripts), "fp16" or "fp32" of the products; weights that are trained are float32.
        max_length: Most tokens of a row, 2048 (scripts).
        pad_images: Whether pictures are padded to a square, or their centre is cut out: cut out in stage 1, padded in
            stage 2 (scripts). Of no effect where each image has a grid of its own.
        group_by_length: Whether rows of a step are of about one length, with or without an image: in stage 2 (scripts).
        gradient_checkpointing: Whether activations are computed twice in place of being kept: true (scripts).
        lora: Low-rank matrices for the language model, in a stage that trains it; None trains all of it.
        feature_cache: Folder for features of the frozen vision tower; None computes them for every row.
        bad_rows: "error", or "skip": report and leave out (here).
        workers: Processes that read pictures, 4 (scripts).
        save_steps: Steps between checkpoints, 500 (here).
        save_total_limit: Checkpoints that are kept, 2 (here).
        logging_steps: Steps between lines of the log, 1 (scripts).
        arguments: Any other argument of transformers' TrainingArguments, by name.

    Raises:
        ValueError: A field has a value that it cannot have.
    """

    data: tuple[DataConfig, ...]
    form: str
    train: tuple[str, ...]
    learning_rate: float
    batch_size: int
    pad_images: bool
    group_by_length: bool
    rows_per_device: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    max_length: int = 2048
    gradient_checkpointing: bool = True
    lora: LoraConfig | None = None
    feature_cache: str | None = None
    bad_rows: str = "error"
    workers: int = 4
    save_steps: int = 500
    save_total_limit: int = 2
    logging_steps: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(self.form, "form", FORMS)
        if not self.train or not all(part in PARTS for part in self.train):
            raise ValueError(f"train={shown(list(self.train))}: must be some of {', '.join(PARTS)}.")
        for name in ("learning_rate", "epochs"):
            check_number(getattr(self, name), name, above=0)
        for name in ("batch_size", "max_length", "save_steps", "save_total_limit", "logging_steps"):
            check_count(getattr(self, name), name)
        for name in ("rows_per_device", "max_steps"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        check_count(self.workers, "workers", low=0)
        check_share(self.warmup_ratio, "warmup_ratio")
        for name in ("weight_decay", "max_grad_norm"):
            if check_number(getattr(self, name), name) < 0:
                raise ValueError(f"{name}={shown(getattr(self, name))}: must not be negative.")
        check_text(self.scheduler, "scheduler")
        check_text(self.feature_cache, "feature_cache", optional=True)
        check_choice(self.precision, "precision", PRECISIONS)
        check_choice(self.bad_rows, "bad_rows", ("error", "skip"))
        flags = ("pad_images", "group_by_length", "gradient_checkpointing")
        check_flags(**{name: getattr(self, name) for name in flags})
        if self.lora is not None and "language_model" not in self.train:
            raise ValueError(f"lora={shown(self.lora)}: this stage leaves the language model as it is; omit lora.")


STAGES: dict[str, dict[str, Any]] = {
    "stage1": {
        "form": "plain",
        "train": ("dem", "projector"),
        "learning_rate": 1e-3,
        "batch_size": 256,
        "pad_images": False,
        "group_by_length": False,
    },
    "stage2": {
        "form": "chat",
        "train": ("dem", "projector", "language_model"),
        "learning_rate": 2e-5,
        "batch_size": 128,
        "pad_images": True,
        "group_by_length": True,
    },
}
"""In what the stages differ; `StageConfig` says where each value comes from."""
ROWS_PER_DEVICE = {"stage1": 16, "stage2": 8}


@dataclass(frozen=True)
class TrainConfig:
    """A run of training.

    Attributes:
        model: Directory of an INF-LLaVA with its processor, as `dualview convert` makes it; or the parts that one is
            made of, in ``base`` within the folder of the run.
        output: Folder of the run, which is made: ``stage1/model`` and ``stage2/model`` are the results.
        stages: Stages by name, in order.
        seed: Of the order of rows and of whatever is random.
    """

    model: str | BaseConfig
    output: str
    stages: Mapping[str, StageConfig]
    seed: int = 0

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """A configuration of plain values, as YAML and JSON have them.

        Args:
            fields: ``model``, ``output``, ``seed``, and ``stage1``, ``stage2`` or both: fields of `StageConfig`, of
                which ``data`` alone has no default.

        Raises:
            ValueError: A field is unknown, missing, or has a value that it cannot have.

        Example:
            >>> rows = [{"file": "rows.json"}]
            >>> config = TrainConfig.of({"model": "base", "output": "run", "stage1": {"data": rows, "batch_size": 8}})
            >>> config.stages["stage1"].learning_rate, config.stages["stage1"].batch_size
            (0.001, 8)
        """
        given = checked_mapping(fields, "fields")
        check_names(given, ("model", "output", "seed", *STAGES), "")
        model = given.get("model")
        model = _made(BaseConfig, model, "model") if isinstance(model, Mapping) else model
        for name, value in (("model", model), ("output", given.get("output"))):
            if not (isinstance(value, str) and value) and not isinstance(value, BaseConfig):
                raise ValueError(f"{name}={shown(value)}: must be a folder.")
        stages = {name: _stage(name, given[name]) for name in STAGES if given.get(name) is not None}
        if not stages:
            raise ValueError(f"{', '.join(STAGES)}: none is given; write at least one, with its data.")
        seed = check_count(given.get("seed", 0), "seed", low=0, high=2**32 - 1)
        return cls(cast(str, model), given["output"], stages, seed)

    @classmethod
    def load(cls, file: str | Path) -> TrainConfig:
        """A configuration from a YAML file; paths in it are seen from the working directory.

        Args:
            file: Its path.

        Raises:
            ValueError: There is no such file, it is no YAML, or a field is wrong.
        """
        fields = read_yaml(file)
        try:
            return cls.of(fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def plain(self) -> dict[str, Any]:
        """All fields as plain values, defaults among them: what `of` takes."""
        stages = {name: plain_value(dataclasses.asdict(stage)) for name, stage in self.stages.items()}
        model = self.model if isinstance(self.model, str) else plain_value(dataclasses.asdict(self.model))
        return {"model": model, "output": self.output, "seed": self.seed, **stages}


def _stage(name: str, fields: Any) -> StageConfig:
    given = dict(checked_mapping(fields, name))
    known = {each.name: each for each in dataclasses.fields(StageConfig)}
    check_names(given, known, f"{name}.")
    for key, kind in known.items():
        if key in given and "float" in str(kind.type):
            given[key] = number_of_text(given[key])
    try:
        data = given.get("data")
        if not isinstance(data, (list, tuple)) or not data:
            raise ValueError(f"data={shown(data)}: must be a list of files, each {{file: ..., images: ...}}.")
        given["data"] = tuple(_made(DataConfig, one, "data") for one in data)
        if given.get("lora") is not None:
            given["lora"] = _made(LoraConfig, {} if given["lora"] is True else given["lora"], "lora")
        train = given.get("train", STAGES[name]["train"])
        given["train"] = tuple(train) if isinstance(train, (list, tuple)) else (train,)
        given["arguments"] = plain_mapping(given.get("arguments") or {}, "arguments")
        return StageConfig(**{**STAGES[name], **given})
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def _made(kind: Any, fields: Any, name: str) -> Any:
    if isinstance(fields, kind):
        return fields
    given = dict(checked_mapping(fields, name))
    known = {each.name: each for each in dataclasses.fields(kind)}
    check_names(given, known, f"{name}.")
    for key, each in known.items():
        if key not in given and each.default is each.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}: {shown(given)} has no {key}.")
    return kind(**{key: number_of_text(value) if known[key].type == "float" else value for key, value in given.items()})
