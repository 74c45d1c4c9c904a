"""The embedded model, trained from nothing: tower, stage 0, stages 1 and 2, on pages that are drawn on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dualview.models.inf_llava import InfLlavaForConditionalGeneration
from dualview.models.reader import ReaderVisionConfig, ReaderVisionModel
from dualview.outputs import new_folder
from dualview.reader.align import SeenPages, align, pictures
from dualview.reader.building import build_model
from dualview.reader.corpus import write_corpus
from dualview.reader.glyphs import HELD_OUT_FONTS, build_atlas
from dualview.reader.pretrain import PATCH, pretrain, reading_accuracy
from dualview.reader.warm_up import HEIGHTS, ToldPages, warm_up
from dualview.terminal import say
from dualview.train import FeatureCache, TrainConfig, train

TILE = 112
"""Of the vision tower; a page has 3 x 3 of them."""
SHARD = 500
"""Pages in a folder."""


@dataclass(frozen=True)
class Recipe:
    """How much is trained.

    Attributes:
        tower_steps: Steps of the tower.
        tower_batch: Tiles in each.
        warm_steps: Steps of stage 0, of 8 pages that are told.
        pages: Pages of 336 pixels, for stages 1 and 2.
        aligning: How often each is seen at the end of stage 0.
        chats: Conversations about each, of which stages 1 and 2 take theirs.
        stage1_steps: Steps of stage 1, of 16 conversations.
        stage2_steps: Steps of stage 2, likewise.
        warm_rate: Highest learning rate of stage 0.
        stage1_rate: Of stage 1.
        stage2_rate: Of stage 2.
        seed: Of everything.
    """

    tower_steps: int = 2000
    tower_batch: int = 40
    warm_steps: int = 4000
    pages: int = 2000
    aligning: int = 12
    chats: int = 4
    stage1_steps: int = 50
    stage2_steps: int = 300
    warm_rate: float = 2e-3
    stage1_rate: float = 1e-3
    stage2_rate: float = 1e-3
    seed: int = 0


def train_embedded(
    output: Path,
    recipe: Recipe | None = None,
    *,
    device: str | None = None,
    workers: int = 2,
    arms: tuple[str, ...] = ("dual", "low-res"),
    report: Callable[[str], None] = say,
) -> Path:
    """Train the embedded model, and the low-resolution model that it is compared with, by one call.

    What is there already in the folder is not trained again.

    Args:
        output: Folder of the run. ``dual`` and ``low-res`` in it are the results.
        recipe: How much is trained. None: the defaults of `Recipe`.
        device: Where to compute; None for a GPU where there is one.
        workers: Processes that read pictures.
        arms: Which of the two models to train.
        report: Called with a line for every part that is done.

    Returns:
        The folder.
    """
    recipe = Recipe() if recipe is None else recipe
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    output.mkdir(parents=True, exist_ok=True)
    minutes = Minutes(output / "minutes.json", report)
    tower = train_tower(output / "tower", recipe, device, minutes)
    warm = train_language(output / "warm", recipe, device, workers, minutes)
    with minutes.of("pages"):
        for shard in range(-(-recipe.pages // SHARD)):
            draw_shard(output, shard, recipe, device)
    for arm in arms:
        train_arm(output, arm, tower, warm, recipe, workers, minutes)
    return output


def draw_shard(output: Path, shard: int, recipe: Recipe, device: str) -> None:
    """Draw the pages of one folder, where it is not there yet."""
    folder, count = output / f"pages-{shard:03}", min(SHARD, recipe.pages - shard * SHARD)
    if not folder.is_dir():
        atlas, seed = build_atlas().to(device), recipe.seed * 1000 + shard
        write_corpus(folder, count, 3 * TILE, HEIGHTS, seed=seed, atlas=atlas, chats=recipe.chats)


def train_tower(folder: Path, recipe: Recipe, device: str, minutes: Minutes) -> ReaderVisionModel:
    """The tower of a folder, trained where it is not there yet."""
    if not folder.is_dir():
        torch.manual_seed(recipe.seed)
        tower = ReaderVisionModel(ReaderVisionConfig())
        with minutes.of("tower") as watch:
            head = pretrain(
                tower, recipe.tower_steps, seed=recipe.seed, batch=recipe.tower_batch, device=device, watch=watch
            )
        for height in (6, 8, 14, 28):
            share = reading_accuracy(tower, head, height, seed=recipe.seed, fonts=HELD_OUT_FONTS)
            minutes.report(f"tower: {share:.0%} of glyphs of {height} pixels in fonts never trained on")
        with new_folder(folder) as made:
            tower.cpu().save_pretrained(made)
    loaded: ReaderVisionModel = ReaderVisionModel.from_pretrained(folder)
    return loaded


def train_language(folder: Path, recipe: Recipe, device: str, workers: int, minutes: Minutes) -> dict[str, Any]:
    """Weights of the language model after stage 0, by their names in an INF-LLaVA; trained where they are not there."""
    if not folder.is_dir():
        torch.manual_seed(recipe.seed)
        model, processor = build_model(None, TILE)
        pages = ToldPages(processor.tokenizer, recipe.warm_steps, recipe.seed)
        with minutes.of("stage 0") as watch:
            warm_up(model, pages, learning_rate=recipe.warm_rate, workers=workers, device=device, watch=watch)
        with new_folder(folder) as made:
            model.cpu().save_pretrained(made)
    state = InfLlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    return {name: value for name, value in state.items() if "language_model" in name or "lm_head" in name}


def train_arm(
    output: Path,
    arm: str,
    tower: ReaderVisionModel,
    warm: dict[str, Any],
    recipe: Recipe,
    workers: int,
    minutes: Minutes,
) -> None:
    """Stages 1 and 2 of one model."""
    base, run = output / f"{arm}-base", output / f"{arm}-run"
    if not base.is_dir():
        torch.manual_seed(recipe.seed)
        model, processor = build_model(tower, TILE, dual=arm == "dual")
        model.load_state_dict(warm, strict=False)
        folders = sorted(output.glob("pages-[0-9]*"))
        with minutes.of(f"{arm}: features and the end of stage 0") as watch:
            cache = FeatureCache(output / "features", model, processor, {"do_pad": True})
            cache.fill([file for folder in folders for file in pictures(folder)], model, shown=True)
            seen = SeenPages(folders, cache, TILE // PATCH)
            align(model, processor.tokenizer, seen, epochs=recipe.aligning, seed=recipe.seed, watch=watch)
        _save(model, processor, base)
    common = {"precision": "fp32", "gradient_checkpointing": False, "workers": workers, "logging_steps": 20}
    common |= {"feature_cache": str(output / "features")}
    common |= {"save_steps": 400, "save_total_limit": 1, "group_by_length": False, "pad_images": True}
    parts = ["dem", "projector", "language_model"] if arm == "dual" else ["projector", "language_model"]
    stages = {
        "stage1": _stage(output, recipe.stage1_rate, recipe.stage1_steps, train=parts[:-1], **common),
        "stage2": _stage(output, recipe.stage2_rate, recipe.stage2_steps, train=parts, **common),
    }
    with minutes.of(f"{arm}: stages 1 and 2"):
        config = {"model": str(base), "output": str(run), "seed": recipe.seed, **stages}
        result = train(TrainConfig.of(config), resume=run.is_dir())
    if not (output / arm).is_dir():
        trained = InfLlavaForConditionalGeneration.from_pretrained(result, dtype=torch.float16)
        _save(trained, build_model(None, TILE)[1], output / arm)
        (output / arm / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")


def _stage(output: Path, rate: float, steps: int, **fields: Any) -> dict[str, Any]:
    data = [{"file": str(folder / "chats.json")} for folder in sorted(output.glob("pages-[0-9]*"))]
    values = {"form": "chat", "learning_rate": rate, "max_steps": steps, "batch_size": 16, "rows_per_device": 16}
    return {"data": data, **values, **fields}


def _save(model: Any, processor: Any, folder: Path) -> None:
    with new_folder(folder) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)


class Minutes:
    """How long the parts took, kept in a file; and their progress, shown."""

    def __init__(self, file: Path, report: Callable[[str], None]) -> None:
        self.file, self.report = file, report

    @contextmanager
    def of(self, name: str) -> Iterator[Callable[[int, float], None]]:
        """A part; what it gives may be called with step and loss."""
        start = time.monotonic()

        def watch(step: int, loss: float) -> None:
            if step % 50 == 0:
                self.report(f"{name}: step {step}, loss {loss:.3f}, {(time.monotonic() - start) / 60:.1f} min")

        yield watch
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        known[name] = round((time.monotonic() - start) / 60, 2)
        self.file.write_text(json.dumps(known, indent=1), encoding="utf-8")
        self.report(f"{name}: {known[name]} min")
