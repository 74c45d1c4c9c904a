"""The embedded model, trained from nothing: tower, stage 0, stages 1 and 2, on pages that are drawn on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dualview.arguments import check_count
from dualview.models.inf_llava import InfLlavaForConditionalGeneration
from dualview.models.reader import ReaderVisionConfig, ReaderVisionModel
from dualview.outputs import new_folder
from dualview.reader.align import SeenPages, align, front_accuracy, pictures
from dualview.reader.building import build_model
from dualview.reader.corpus import write_corpus
from dualview.reader.evaluate import HELD_OUT_SEED, compared, measured
from dualview.reader.glyphs import HELD_OUT_FONTS, build_atlas
from dualview.reader.pretrain import TILE, pretrain, reading_accuracy
from dualview.reader.warm_up import HEIGHTS, ToldPages, warm_up
from dualview.terminal import say
from dualview.train import FeatureCache, TrainConfig, train

ARMS = ("dual", "low-res")
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
        aligning: How often each is seen in the regression after stage 0.
        chats: Conversations about each, of which stages 1 and 2 take theirs.
        stage1_steps: Steps of stage 1, of 16 conversations.
        stage2_steps: Steps of stage 2, likewise.
        warm_rate: Highest learning rate of stage 0.
        stage1_rate: Of stage 1.
        stage2_rate: Of stage 2.
        questions: Asked of each kind in the end.
        seed: Of everything, below a million.

    Raises:
        ValueError: The seed is none of these.
    """

    tower_steps: int = 3000
    tower_batch: int = 20
    warm_steps: int = 3200
    pages: int = 2000
    aligning: int = 12
    chats: int = 4
    stage1_steps: int = 50
    stage2_steps: int = 300
    warm_rate: float = 2e-3
    stage1_rate: float = 1e-3
    stage2_rate: float = 1e-3
    questions: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.seed, "seed", low=0, high=999_999)


def train_embedded(output: Path, recipe: Recipe | None = None, *, device: str | None = None) -> Path:
    """Train the embedded model, and the low-resolution model that it is compared with, by one call.

    Two processes work at a time: the tower beside pages and stage 0, then the two models beside each other. On a CPU
    each has one thread. What is there already in the folder is not made again.

    Args:
        output: Folder of the run. ``dual``, ``low-res`` and ``results.json`` in it are the results.
        recipe: How much is trained. None: the defaults of `Recipe`.
        device: Where to compute; None for a GPU where there is one.

    Returns:
        The folder.
    """
    recipe = Recipe() if recipe is None else recipe
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        tower = pool.submit(train_tower, output, recipe, device)
        pool.submit(train_language, output, recipe, device).result()
        tower.result()
        for arm in [pool.submit(train_arm, output, recipe, device, arm) for arm in ARMS]:
            arm.result()
    found = {arm: json.loads((output / f"{arm}-answers.json").read_text(encoding="utf-8")) for arm in ARMS}
    minutes = {file.stem: float(file.read_text()) for file in sorted((output / "minutes").iterdir())}
    results = {"recipe": asdict(recipe), "minutes": minutes, "tasks": compared(found["dual"], found["low-res"])}
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return output


def folder_of(output: Path, shard: int) -> Path:
    """A folder of pages."""
    return output / f"pages-{shard:03}"


def page_folders(output: Path) -> list[Path]:
    """Those that are there, in order."""
    return sorted(output.glob("pages-[0-9]*"))


def train_tower(output: Path, recipe: Recipe, device: str) -> ReaderVisionModel:
    """The tower of a run, trained where it is not there yet."""
    folder = output / "tower"
    if not folder.is_dir():
        torch.manual_seed(recipe.seed)
        tower = ReaderVisionModel(ReaderVisionConfig())
        with minutes_of(output, "tower") as watch:
            head = pretrain(
                tower, recipe.tower_steps, seed=recipe.seed, batch=recipe.tower_batch, device=device, watch=watch
            )
        for height in (6, 8, 10, 14, 28):
            share = reading_accuracy(tower, head, height, seed=HELD_OUT_SEED, fonts=HELD_OUT_FONTS)
            say(f"tower: {share:.1%} of glyphs of {height} pixels in fonts never trained on")
        with new_folder(folder) as made:
            tower.cpu().save_pretrained(made)
    loaded: ReaderVisionModel = ReaderVisionModel.from_pretrained(folder)
    return loaded


def train_language(output: Path, recipe: Recipe, device: str) -> None:
    """The pages, and the language model after stage 0, made where they are not there yet."""
    shards = [shard for shard in range(-(-recipe.pages // SHARD)) if not folder_of(output, shard).is_dir()]
    if shards:
        with minutes_of(output, "pages"):
            for shard in shards:
                count, seed = min(SHARD, recipe.pages - shard * SHARD), recipe.seed * 1000 + shard
                atlas, chats = build_atlas().to(device), recipe.chats
                write_corpus(folder_of(output, shard), count, 3 * TILE, HEIGHTS, seed=seed, atlas=atlas, chats=chats)
    folder = output / "warm"
    if folder.is_dir():
        return
    torch.manual_seed(recipe.seed)
    model, processor = build_model(None, TILE)
    pages = ToldPages(processor.tokenizer, recipe.warm_steps, recipe.seed)
    with minutes_of(output, "stage 0") as watch:
        warm_up(model, pages, learning_rate=recipe.warm_rate, device=device, watch=watch)
    with new_folder(folder) as made:
        model.cpu().save_pretrained(made)


def of_language_model(folder: Path) -> dict[str, Any]:
    """Weights of the language model of a saved model, by their names."""
    state = InfLlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    return {name: value for name, value in state.items() if "language_model" in name or "lm_head" in name}


def train_arm(output: Path, recipe: Recipe, device: str, arm: str) -> None:
    """The end of stage 0, stages 1 and 2 of one model, and its answers."""
    base, run, made = output / f"{arm}-base", output / f"{arm}-run", output / arm
    processor = build_model(None, TILE)[1]
    if not base.is_dir():
        torch.manual_seed(recipe.seed)
        model, _ = build_model(train_tower(output, recipe, device), TILE, dual=arm == "dual")
        model.load_state_dict(of_language_model(output / "warm"), strict=False)
        cache, folders = FeatureCache(output / "features", model, processor, {"do_pad": True}), page_folders(output)
        with minutes_of(output, f"{arm}, features"):
            cache.fill([file for folder in folders for file in pictures(folder)], model.to(device), shown=True)
        with minutes_of(output, f"{arm}, the end of stage 0") as watch:
            seen = SeenPages(folders, cache)
            align(
                model, processor.tokenizer, seen, epochs=recipe.aligning, seed=recipe.seed, device=device, watch=watch
            )
        for height in (8, 28):
            shares = front_accuracy(model, processor.tokenizer, height, seed=HELD_OUT_SEED, fonts=HELD_OUT_FONTS)
            say(f"{arm}: image tokens say {shares[0]:.1%} of glyphs of {height} pixels, {shares[1]:.1%} of their cells")
        _save(model.cpu(), processor, base)
    common = {"precision": "fp32", "gradient_checkpointing": False, "workers": 0, "logging_steps": 20}
    common |= {"feature_cache": str(output / "features")}
    common |= {"save_steps": 400, "save_total_limit": 1, "group_by_length": False, "pad_images": True}
    parts = ["dem", "projector", "language_model"] if arm == "dual" else ["projector", "language_model"]
    stages = {
        "stage1": _stage(output, recipe.stage1_rate, recipe.stage1_steps, train=parts[:-1], **common),
        "stage2": _stage(output, recipe.stage2_rate, recipe.stage2_steps, train=parts, **common),
    }
    if not made.is_dir():
        with minutes_of(output, f"{arm}, stages 1 and 2"):
            config = {"model": str(base), "output": str(run), "seed": recipe.seed, **stages}
            result = train(TrainConfig.of(config), resume=run.is_dir())
        trained = InfLlavaForConditionalGeneration.from_pretrained(result, dtype=torch.float16)
        _save(trained, processor, made)
    answers = output / f"{arm}-answers.json"
    if not answers.is_file():
        model = InfLlavaForConditionalGeneration.from_pretrained(made, dtype=torch.float32).eval()
        with minutes_of(output, f"{arm}, questions"):
            found = measured(model.to(device), processor, recipe.questions)
        answers.write_text(json.dumps(found), encoding="utf-8")


def _stage(output: Path, rate: float, steps: int, **fields: Any) -> dict[str, Any]:
    data = [{"file": str(folder / "chats.json")} for folder in page_folders(output)]
    values = {"form": "chat", "learning_rate": rate, "max_steps": steps, "batch_size": 16, "rows_per_device": 16}
    return {"data": data, **values, **fields}


def _save(model: Any, processor: Any, folder: Path) -> None:
    with new_folder(folder) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)


@contextmanager
def minutes_of(output: Path, name: str) -> Iterator[Callable[[int, float], None]]:
    """A part of a run: how long it took is kept in a file. What it gives may be called with step and loss, to show."""
    start = time.monotonic()

    def minutes() -> float:
        return round((time.monotonic() - start) / 60, 2)

    def watch(step: int, loss: float) -> None:
        if step % 50 == 0:
            say(f"{name}: step {step}, loss {loss:.3f}, {minutes():.1f} min")

    yield watch
    (output / "minutes").mkdir(exist_ok=True)
    (output / "minutes" / f"{name}.txt").write_text(str(minutes()), encoding="utf-8")
    say(f"{name}: {minutes()} min")
