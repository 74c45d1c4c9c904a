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
from torch import Tensor

from dualview.arguments import check_count
from dualview.models.inf_llava import InfLlavaForConditionalGeneration, InfLlavaProcessor
from dualview.models.reader import ReaderVisionConfig, ReaderVisionModel
from dualview.outputs import new_folder, replace_file
from dualview.probe.backgrounds import PHOTOGRAPHS, photographs
from dualview.probe.glyphs import Split
from dualview.reader.align import SeenPages, align, front_accuracy, pictures
from dualview.reader.building import build_model
from dualview.reader.corpus import write_corpus
from dualview.reader.evaluate import HELD_OUT_SEED, compared, measured
from dualview.reader.glyphs import HELD_OUT_FONTS, build_atlas
from dualview.reader.parts import Part, run_parts
from dualview.reader.pretrain import TILE, pretrain, reading_accuracy
from dualview.reader.warm_up import HEIGHTS, ToldPages, start_as_matcher, warm_up
from dualview.terminal import say
from dualview.train import FeatureCache, TrainConfig, train

ARMS = ("dual", "low-res")
SHARD = 250
"""Pages in a folder."""


@dataclass(frozen=True)
class Recipe:
    """How much is trained.

    Attributes:
        tower_steps: Steps of the tower.
        tower_batch: Tiles in each.
        warm_steps: Steps of stage 0, of 8 pages that are told.
        large_steps: Steps after these, of which every other one asks for the large character alone. One question of
            twenty does not teach it in every run: one with this seed answered .38, and all after 150 such steps.
        pages: Pages of 336 pixels, for stages 1 and 2.
        aligning: How often each is seen in the regression after stage 0.
        chats: Conversations about each, of which stages 1 and 2 take theirs.
        sparse: Share of pages with a code alone.
        photographs: Share of pages on a photograph.
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

    tower_steps: int = 3600
    tower_batch: int = 20
    warm_steps: int = 3200
    large_steps: int = 300
    pages: int = 2400
    aligning: int = 10
    chats: int = 4
    sparse: float = 0.1
    photographs: float = 0.2
    stage1_steps: int = 50
    stage2_steps: int = 450
    warm_rate: float = 2e-3
    stage1_rate: float = 1e-3
    stage2_rate: float = 1e-3
    questions: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.seed, "seed", low=0, high=999_999)


def train_embedded(output: Path, recipe: Recipe | None = None, *, device: str | None = None) -> Path:
    """Train the embedded model, and the low-resolution model that it is compared with, by one call.

    Two processes work at a time, on a CPU with one thread each. A run of the same recipe that was stopped goes on: what
    is there already in its folder is not made again.

    Args:
        output: Folder of the run. ``dual``, ``low-res`` and ``results.json`` in it are the results.
        recipe: How much is trained. None: the defaults of `Recipe`.
        device: Where to compute; None for a GPU where there is one.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds something other than a run of this recipe.
        Exception: What the first part that failed has raised; the other is ended.
    """
    start, recipe = time.monotonic(), Recipe() if recipe is None else recipe
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    resumed = begun(output, recipe)
    run_parts(parts_of(output, recipe, device))
    wall = None if resumed else round((time.monotonic() - start) / 60, 2)
    found = {arm: json.loads((output / f"{arm}-answers.json").read_text(encoding="utf-8")) for arm in ARMS}
    results = {
        "recipe": asdict(recipe),
        "photographs": PHOTOGRAPHS[BEHIND] if recipe.photographs else {},
        "wall_minutes": wall,
        "minutes": _minutes(output),
        "tasks": compared(found["dual"], found["low-res"]),
    }
    _write(output / "results.json", json.dumps(results, indent=1))
    say(f"the whole: {'some parts were there already' if wall is None else f'{wall} min'}")
    return output


def begun(output: Path, recipe: Recipe) -> bool:
    """Whether a run of this recipe has begun in the folder. Otherwise the folder is made, and the recipe written there.

    Raises:
        ValueError: The folder holds something else. Its parts would be taken for those of this recipe.
    """
    output.mkdir(parents=True, exist_ok=True)
    record, wanted = output / "recipe.json", asdict(recipe)
    if not any(output.iterdir()):
        _write(record, json.dumps(wanted, indent=1))
        return False
    if not record.is_file():
        raise ValueError(f"{output} is not empty and has no recipe.json of a run that was begun: give another folder.")
    found = json.loads(record.read_text(encoding="utf-8"))
    if found != wanted:
        other = ", ".join(f"{k}={found.get(k)!r}, not {v!r}" for k, v in wanted.items() if found.get(k) != v)
        raise ValueError(f"{output} is a run of another recipe ({other or 'with more fields'}): give another folder.")
    return True


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a run that goes on takes what is there for done."""
    replace_file(path, memoryview(text.encode()))


def parts_of(output: Path, recipe: Recipe, device: str) -> dict[str, Part]:
    """The parts of a run, those first on which the most has to wait."""
    run = (output, recipe, device)
    features = {
        f"features {shard}": Part(fill_features, (*run, shard), ("tower", "pages")) for shard in shards_of(recipe)
    }
    parts = {
        "tower": Part(train_tower, run),
        "stage 0": Part(train_language, run),
        "pages": Part(write_pages, run),
        **features,
    }
    for arm in ARMS:
        needs: tuple[str, ...] = ("stage 0", *features)
        for call in (train_front, train_stages, ask_questions):
            name = f"{arm}, {call.__name__}"
            parts[name] = Part(call, (*run, arm), needs)
            needs = (name,)
    return parts


def shards_of(recipe: Recipe) -> range:
    """Numbers of the folders of pages."""
    return range(-(-recipe.pages // SHARD))


def folder_of(output: Path, shard: int) -> Path:
    """A folder of pages."""
    return output / f"pages-{shard:03}"


def train_tower(output: Path, recipe: Recipe, device: str) -> None:
    """The tower, trained where it is not there yet."""
    folder = output / "tower"
    if folder.is_dir():
        return
    torch.manual_seed(recipe.seed)
    tower = ReaderVisionModel(ReaderVisionConfig())
    with minutes_of(output, "tower") as watch:
        head = pretrain(
            tower,
            recipe.tower_steps,
            seed=recipe.seed,
            batch=recipe.tower_batch,
            device=device,
            photographs=behind(recipe),
            watch=watch,
        )
    for height in (6, 8, 10, 14, 28):
        share = reading_accuracy(tower, head, height, seed=HELD_OUT_SEED, fonts=HELD_OUT_FONTS)
        say(f"tower: {share:.1%} of glyphs of {height} pixels in fonts never trained on")
    with new_folder(folder) as made:
        tower.cpu().save_pretrained(made)


BEHIND: Split = "train"
"""The photographs that stand behind pages: the half that the probe trains on."""


def behind(recipe: Recipe) -> list[Tensor] | None:
    """Photographs to draw pages on, (3, h, w) each; None where there should be none."""
    if not recipe.photographs:
        return None
    return [torch.tensor(photo).movedim(-1, 0) / 255 for photo in photographs(BEHIND, 3 * TILE)]


def write_pages(output: Path, recipe: Recipe, device: str) -> None:
    """The pages, those folders of them that are not there yet."""
    missing = [shard for shard in shards_of(recipe) if not folder_of(output, shard).is_dir()]
    if not missing:
        return
    atlas, pictures_behind = build_atlas().to(device), behind(recipe)
    with minutes_of(output, "pages"):
        for shard in missing:
            write_corpus(
                folder_of(output, shard),
                min(SHARD, recipe.pages - shard * SHARD),
                3 * TILE,
                HEIGHTS,
                seed=recipe.seed * 1000 + shard,
                atlas=atlas,
                chats=recipe.chats,
                sparse=recipe.sparse,
                photographs=pictures_behind,
                photographic=recipe.photographs,
            )


def train_language(output: Path, recipe: Recipe, device: str) -> None:
    """The language model after stage 0, made where it is not there yet."""
    folder = output / "warm"
    if folder.is_dir():
        return
    torch.manual_seed(recipe.seed)
    model, processor = build_model(None, TILE)
    start_as_matcher(model)
    mixed = ToldPages(processor.tokenizer, recipe.warm_steps, recipe.seed)
    large = ToldPages(processor.tokenizer, recipe.large_steps, recipe.seed, recipe.warm_steps, alone="large")
    with minutes_of(output, "stage 0") as watch:
        for pages, rate in ((mixed, recipe.warm_rate), (large, recipe.warm_rate / 2)):
            warm_up(model, pages, learning_rate=rate, device=device, watch=watch)
    with new_folder(folder) as made:
        model.cpu().save_pretrained(made)


def fill_features(output: Path, recipe: Recipe, device: str, shard: int) -> None:
    """What the tower makes of a folder of pages, for both models, where it is not there yet."""
    for arm in ARMS:
        model, processor = _with_tower(output, arm)
        cache = _cache(output, model, processor)
        missing = [picture for picture in pictures(folder_of(output, shard)) if cache.read([picture]) is None]
        if missing:
            with minutes_of(output, f"{arm}, features", shard):
                cache.fill(missing, model.to(device))


def _with_tower(output: Path, arm: str) -> tuple[Any, Any]:
    tower = ReaderVisionModel.from_pretrained(output / "tower")
    return build_model(tower, TILE, dual=arm == "dual")


def _cache(output: Path, model: Any, processor: Any) -> FeatureCache:
    return FeatureCache(output / "features", model, processor, {"do_pad": True})


def train_front(output: Path, recipe: Recipe, device: str, arm: str) -> None:
    """The end of stage 0 of one model."""
    base = output / f"{arm}-base"
    if base.is_dir():
        return
    torch.manual_seed(recipe.seed)
    model, processor = _with_tower(output, arm)
    take_language_model(model, output / "warm")
    seen = SeenPages([folder_of(output, shard) for shard in shards_of(recipe)], _cache(output, model, processor))
    with minutes_of(output, f"{arm}, the end of stage 0") as watch:
        align(model, processor.tokenizer, seen, epochs=recipe.aligning, seed=recipe.seed, device=device, watch=watch)
    for height in (8, 28):
        shares = front_accuracy(model, processor.tokenizer, height, seed=HELD_OUT_SEED, fonts=HELD_OUT_FONTS)
        say(f"{arm}: image tokens say {shares[0]:.1%} of glyphs of {height} pixels, {shares[1]:.1%} of their cells")
    _save(model.cpu(), processor, base)


def take_language_model(model: Any, folder: Path) -> None:
    """Give a model the language model of a saved one, all of it and nothing else.

    Raises:
        RuntimeError: The two have weights of other names or shapes.
    """
    saved = InfLlavaForConditionalGeneration.from_pretrained(folder)
    model.model.language_model.load_state_dict(saved.model.language_model.state_dict())
    model.lm_head.load_state_dict(saved.lm_head.state_dict())


def train_stages(output: Path, recipe: Recipe, device: str, arm: str) -> None:
    """Stages 1 and 2 of one model."""
    base, run, made = output / f"{arm}-base", output / f"{arm}-run", output / arm
    if made.is_dir():
        return
    common = {"precision": "fp32", "gradient_checkpointing": False, "workers": 0, "logging_steps": 20}
    common |= {"feature_cache": str(output / "features")}
    common |= {"save_steps": 400, "save_total_limit": 1, "group_by_length": False, "pad_images": True}
    parts = ["dem", "projector", "language_model"] if arm == "dual" else ["projector", "language_model"]
    folders = [folder_of(output, shard) for shard in shards_of(recipe)]
    stages = {
        "stage1": _stage(folders, recipe.stage1_rate, recipe.stage1_steps, train=parts[:-1], **common),
        "stage2": _stage(folders, recipe.stage2_rate, recipe.stage2_steps, train=parts, **common),
    }
    with minutes_of(output, f"{arm}, stages 1 and 2"):
        config = {"model": str(base), "output": str(run), "seed": recipe.seed, **stages}
        result = train(TrainConfig.of(config), resume=run.is_dir())
    trained = InfLlavaForConditionalGeneration.from_pretrained(result, dtype=torch.float16)
    _save(trained, InfLlavaProcessor.from_pretrained(base), made)


def ask_questions(output: Path, recipe: Recipe, device: str, arm: str) -> None:
    """What one model answers."""
    answers = output / f"{arm}-answers.json"
    if answers.is_file():
        return
    model = InfLlavaForConditionalGeneration.from_pretrained(output / arm, dtype=torch.float32).eval()
    processor = InfLlavaProcessor.from_pretrained(output / arm)
    with minutes_of(output, f"{arm}, questions"):
        found = measured(model.to(device), processor, recipe.questions)
    _write(answers, json.dumps(found))


def _stage(folders: list[Path], rate: float, steps: int, **fields: Any) -> dict[str, Any]:
    data = [{"file": str(folder / "chats.json")} for folder in folders]
    values = {"form": "chat", "learning_rate": rate, "max_steps": steps, "batch_size": 16, "rows_per_device": 16}
    return {"data": data, **values, **fields}


def _save(model: Any, processor: Any, folder: Path) -> None:
    with new_folder(folder) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)


@contextmanager
def minutes_of(output: Path, name: str, shard: int | None = None) -> Iterator[Callable[[int, float], None]]:
    """A part of a run: how long it took is kept in a file. What it gives may be called with step and loss, to show."""
    start = time.monotonic()

    def minutes() -> float:
        return round((time.monotonic() - start) / 60, 2)

    def watch(step: int, loss: float) -> None:
        if step % 50 == 0:
            say(f"{name}: step {step}, loss {loss:.3f}, {minutes():.1f} min")

    yield watch
    file = output / "minutes" / (name if shard is None else f"{name}{OF_SHARD}{shard}")
    file.parent.mkdir(exist_ok=True)
    _write(file, str(minutes()))
    say(f"{name}: {minutes()} min")


OF_SHARD = ", shard "


def _minutes(output: Path) -> dict[str, float]:
    """Minutes of every part; of one that was done shard by shard, their sum."""
    found: dict[str, float] = {}
    for file in sorted((output / "minutes").iterdir()):
        name = file.name.split(OF_SHARD)[0]
        found[name] = round(found.get(name, 0) + float(file.read_text(encoding="utf-8")), 2)
    return found
