"""The end of stage 0: enhancement module and projector learn to say what stage 0 has told, by regression.

What the language model was told stands for each image token, so what the projector should give is known, and 64 errors
of a page say more than the few words that a question asks for. Stage 1 begins from there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dualview.reader.corpus import BATCH, pages_of
from dualview.reader.descent import Descent
from dualview.reader.glyphs import CLASSES, build_atlas
from dualview.reader.pages import render, sample_pages
from dualview.reader.pretrain import MEAN, STD, TILE
from dualview.reader.warm_up import symbols_of, vocabulary
from dualview.train import FeatureCache


class SeenPages(Dataset[dict[str, Tensor]]):
    """Pages of folders that `write_corpus` wrote, eight at a time: features of their sub-images, and their symbols.

    Args:
        folders: The folders.
        cache: Features, filled.
    """

    def __init__(self, folders: list[Path], cache: FeatureCache) -> None:
        self.cache = cache
        self.groups = [
            (files[start : start + BATCH], symbols_of(pages_of(folder, start)))
            for folder in folders
            for files in [pictures(folder)]
            for start in range(0, len(files), BATCH)
        ]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        files, symbols = self.groups[index]
        found = self.cache.read(files)
        assert found is not None, "the cache is filled before"
        return {**found, "symbols": symbols}


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, in order."""
    return sorted(folder.glob("*.jpg"))


def align(
    model: Any,
    tokenizer: Any,
    pages: SeenPages,
    *,
    epochs: int,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Train enhancement module and projector of an INF-LLaVA, in place, to give what its language model was told.

    Args:
        model: An `InfLlavaForConditionalGeneration` after `warm_up`.
        tokenizer: Its tokenizer.
        pages: What it sees.
        epochs: How often it sees each.
        learning_rate: The highest; AdamW, 30 steps of warm-up, cosine.
        seed: Of the order of pages.
        device: Where to compute. The model is left there.
        watch: Called with step and loss; the loss.
    """
    model = model.to(device)
    front = [part for part in (model.model.dem, model.model.multi_modal_projector) if part is not None]
    parameters = [p for part in front for p in part.parameters()]
    descent = Descent(parameters, learning_rate, epochs * len(pages), warm_up=30, decay=0.01, watch=watch)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        names, said = vocabulary(model.get_input_embeddings(), tokenizer)
    for _ in range(epochs):
        for batch in DataLoader(pages, batch_size=None, shuffle=True, generator=random):
            symbols, features, canvases = (
                batch[name].to(device) for name in ("symbols", "view_features", "image_canvases")
            )
            given = model.get_image_features(view_features=features, image_canvases=canvases).pooler_output
            loss = _loss(torch.stack(list(given)), symbols.flatten(1), names, said)
            descent.step(loss)


@torch.no_grad()
def front_accuracy(
    model: Any, tokenizer: Any, height: float, *, seed: int, fonts: tuple[str, ...], pages: int = 16
) -> tuple[float, float]:
    """What image tokens say of glyphs of a height, anywhere on pages, without asking the language model.

    Returns:
        The share whose token lies nearest to the word for what stands there, of all symbols, and the share whose token
        lies nearest to the name of its cell, of all names.
    """
    drawn = sample_pages(pages, (height, height), seed)
    pixels = ((render(drawn, 3 * TILE, build_atlas(fonts)) - MEAN) / STD).to(model.device)
    given = torch.stack(list(model.get_image_features(pixels).pooler_output))
    names, said = vocabulary(model.get_input_embeddings(), tokenizer)
    symbols = symbols_of(drawn).flatten(1).to(given.device)
    glyphs = (symbols > 0) & (symbols <= len(CLASSES))
    of_symbol, of_name = (torch.cdist(rest, to) for rest, to in ((given - names, said), (given - said[symbols], names)))
    places = torch.arange(len(names), device=given.device)
    right = ((of_symbol.argmin(-1) == symbols)[glyphs], (of_name.argmin(-1) == places)[glyphs])
    return float(right[0].float().mean()), float(right[1].float().mean())


def _loss(given: Tensor, symbols: Tensor, names: Tensor, said: Tensor) -> Tensor:
    """How far (B, n, D) is from what was told, and how easily it is taken for another symbol or for another cell.

    The second and third part are cross-entropies of choosing by distance: near is not enough, nearest is what counts.
    """
    wanted = names + said[symbols]
    error = (given - wanted).square().mean() / wanted.var()
    scale = 10 / (given.shape[-1] * wanted.var())
    places = torch.arange(len(names), device=given.device).expand(len(given), -1)
    parts = ((given - names, said, symbols), (given - said[symbols], names, places))
    return error + sum(
        nn.functional.cross_entropy((scale * _nearness(rest, to)).flatten(0, 1), of.flatten()) for rest, to, of in parts
    )


def _nearness(points: Tensor, to: Tensor) -> Tensor:
    """Minus the squared distance of points (B, n, D) to others (m, D), but for a number of each point: (B, n, m)."""
    return 2 * points @ to.T - to.square().sum(-1)
