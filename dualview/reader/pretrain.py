"""The small vision tower, trained from nothing to say which glyph lies in which patch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.models.reader.modeling_reader import FrozenBatchNorm, ReaderVisionModel, waves
from dualview.reader.descent import Descent
from dualview.reader.drawing import Lattice, backgrounds, bends, contrasting, draw, finish, uniform
from dualview.reader.glyphs import CLASSES, Atlas, build_atlas

MEAN, STD = 0.5, 0.25
"""Of pixels 0..1, for every channel: what the tower is given is (pixels - MEAN) / STD."""
PATCH = 14
BACKGROUND, NOT_JUDGED = len(CLASSES), -100


class Tiles(NamedTuple):
    """Tiles to train the tower on.

    Attributes:
        pixels: Normalised, (B, 3, h, w).
        labels: For every patch the class of the glyph whose middle lies in it, `BACKGROUND` or `NOT_JUDGED`, (B, h/14,
            w/14).
        heights: Of that glyph in pixels, 0 for none, (B, h/14, w/14).
    """

    pixels: Tensor
    labels: Tensor
    heights: Tensor


def draw_tiles(
    count: int,
    side: int,
    smallest: float,
    random: torch.Generator,
    atlas: Atlas,
    cells: int | None = None,
) -> Tiles:
    """Tiles with one glyph in most cells of a lattice, on the device of the atlas.

    Args:
        count: How many tiles.
        side: Of a tile in pixels, a multiple of 14.
        smallest: Least height of a glyph in pixels; the greatest is that of the cells.
        random: Source of all random numbers.
        atlas: Glyphs to draw.
        cells: Lattice cells a side of 112 pixels. None: drawn, from 1 to 8.
    """
    device = atlas.texels.device
    if cells is None:
        most = max(1, min(8, int(112 / (1.35 * smallest))))
        weights = torch.tensor([0.4, 0.6, 0.8, 1, 1, 1.2, 1.4, 1.6])[:most]
        cells = int(torch.multinomial(weights, 1, generator=random)) + 1
    cell = 112 / cells
    n = math.ceil(side / cell) + 1
    shape = (count, n, n)
    origin = -uniform((count, 2), 0, cell, random)
    top = 0.8 * cell
    low = max(smallest, 0.35 * cell)
    height = torch.exp(uniform(shape, math.log(low), math.log(max(top, low * 1.02)), random))
    spare = ((cell - 1.15 * height) / 2).clamp(min=0)[..., None]
    index = torch.arange(n) + 0.5
    middle = torch.stack(torch.meshgrid(index, index, indexing="ij"), -1) * cell + origin[:, None, None]
    centre = middle + uniform((*shape, 2), -1, 1, random) * spare
    kinds = torch.randint(len(CLASSES), shape, generator=random)
    fonts = torch.randint(atlas.fonts, shape, generator=random)
    empty = torch.rand(shape, generator=random) < 0.15
    glyphs = torch.where(empty, -1, kinds * atlas.fonts + fonts)

    pages, paper, busy = backgrounds(count, (side, side), random, device)
    plates = uniform((*shape, 3), 0, 1, random)
    plated = (busy[:, None, None] | (torch.rand(shape, generator=random) < 0.1))[..., None]
    behind = torch.where(plated, plates, paper[:, None, None].expand_as(plates))
    ink = contrasting(behind, 0.3, random)
    plate = torch.where(plated, plates, torch.nan)
    lattice = Lattice(glyphs[..., None], centre, height, bends(shape, random), ink, plate, origin, (cell, cell))
    pages = finish(draw(pages, lattice.to(device), atlas), random)

    labels, heights = _labels(kinds, empty, centre, height, side // PATCH)
    return Tiles((pages - MEAN) / STD, labels.to(device), heights.to(device))


def _labels(kinds: Tensor, empty: Tensor, centre: Tensor, height: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Labels and heights of patches, (B, patches, patches) each; a middle within 2 pixels of a border is not judged."""
    batch = kinds.shape[0]
    labels = torch.full((batch, patches, patches), BACKGROUND)
    heights = torch.zeros(batch, patches, patches)
    b = torch.arange(batch)[:, None, None].expand_as(kinds)
    own = (centre / PATCH).floor().long()
    for shift in ((-2.0, -2.0), (-2.0, 2.0), (2.0, -2.0), (2.0, 2.0), None):
        patch = own if shift is None else ((centre + torch.tensor(shift)) / PATCH).floor().long()
        crossing = (((centre - 2) / PATCH).floor() != ((centre + 2) / PATCH).floor()).any(-1)
        inside = ((patch >= 0) & (patch < patches)).all(-1) & ~empty & (crossing if shift else ~crossing)
        where = (b[inside], patch[inside][:, 0], patch[inside][:, 1])
        labels[where] = NOT_JUDGED if shift else kinds[inside]
        heights[where] = 0.0 if shift else height[inside]
    return labels, heights


def pretrain(
    tower: ReaderVisionModel,
    steps: int = 2000,
    *,
    seed: int = 0,
    batch: int = 16,
    side: int = 112,
    learning_rate: float = 3e-3,
    device: torch.device | str = "cpu",
    watch: Callable[[int, float], None] | None = None,
) -> nn.Linear:
    """Train a tower, in place, to name the glyph in every patch, and to tell where in its tile a patch lies.

    Nobody can ask for a named place of a page whose tokens do not say where they are; of labels of glyphs alone a tower
    learns to forget it.

    AdamW (betas .9 and .98, decay .02), 60 steps of warm-up, cosine; glyphs of 12 pixels or more in the first twelfth
    of the steps, then of 4 or more. Fonts are `TRAINING_FONTS`, backgrounds are computed.

    Args:
        tower: A tower with drawn weights.
        steps: How many.
        seed: Of the data and of the head; the tower's weights are drawn by the caller.
        batch: Tiles in a step.
        side: Of a tile in pixels; every eighth step has tiles of twice this side, a quarter as many.
        learning_rate: The highest.
        device: Where to compute. The tower is left there.
        watch: Called with step and loss.

    Returns:
        The head, from ``last_hidden_state`` to logits of the classes and of `BACKGROUND`.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head, places = (nn.Linear(tower.config.hidden_size, width) for width in (len(CLASSES) + 1, 16))
    tower, head, atlas = tower.to(device).train(), head.to(device), build_atlas().to(device)
    places = places.to(device)
    parameters = [*tower.parameters(), *head.parameters(), *places.parameters()]
    descent = Descent(parameters, learning_rate, steps, watch=watch)
    learn_statistics(tower, True)
    for step in range(steps):
        large = step % 8 == 7
        tiles = draw_tiles(
            batch // 4 if large else batch, side * 2 if large else side, 12 if step * 12 < steps else 4, random, atlas
        )
        tokens = tower(tiles.pixels).last_hidden_state
        place = waves(tiles.labels.shape[1], tiles.labels.shape[2], tokens).flatten(0, 1)
        loss = _loss(head(tokens).flatten(0, 1).float(), tiles.labels.flatten())
        loss = loss + 2 * (places(tokens) - place).square().mean()
        descent.step(loss)
    learn_statistics(tower, False)
    tower.eval()
    return head


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of glyphs, and .3 of that of the background: tiles with few large glyphs count as much as those with many."""
    errors = F.cross_entropy(logits, labels, reduction="none")
    glyphs, background = (labels >= 0) & (labels < BACKGROUND), labels == BACKGROUND
    of_glyphs = (errors * glyphs).sum() / glyphs.sum().clamp(min=1)
    return of_glyphs + 0.3 * (errors * background).sum() / background.sum().clamp(min=1)


def learn_statistics(tower: nn.Module, on: bool) -> None:
    """Whether batch norms take statistics from the batch, and keep them, or use those kept."""
    for module in tower.modules():
        if isinstance(module, FrozenBatchNorm):
            module.learning = on


@torch.no_grad()
def reading_accuracy(
    tower: ReaderVisionModel, head: nn.Linear, height: float, *, seed: int, fonts: tuple[str, ...], tiles: int = 64
) -> float:
    """Share of glyphs of a height, at any place in a patch but its border, that are named rightly."""
    atlas = build_atlas(fonts).to(head.weight.device)
    random = torch.Generator().manual_seed(seed)
    drawn = draw_tiles(tiles, 112, height, random, atlas, max(1, min(8, int(112 / (1.35 * height)))))
    named = head(tower(drawn.pixels).last_hidden_state).argmax(-1).view_as(drawn.labels)
    near = (drawn.heights - height).abs() < 0.15 * height
    return float((named == drawn.labels)[near].float().mean())
