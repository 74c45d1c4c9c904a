"""The small vision tower, trained from nothing to say which glyph lies in which patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.models.reader.modeling_reader import FrozenBatchNorm, ReaderVisionModel, waves
from dualview.models.view_plan import interpolate
from dualview.ops.tiling import crop, recombine
from dualview.reader.descent import Descent
from dualview.reader.drawing import Lattice, backgrounds, bends, contrasting, draw, finish, uniform
from dualview.reader.glyphs import CLASSES, Atlas, build_atlas
from dualview.reader.pages import CELLS, COVERED, EMPTY, covered, render, sample_pages

MEAN, STD = 0.5, 0.25
"""Of pixels 0..1, for every channel: what the tower is given is (pixels - MEAN) / STD."""
PATCH = 14
TILE = 112
"""Side of a tile in pixels; a page has 3 x 3 of them."""
BACKGROUND, NOT_JUDGED = len(CLASSES), -100


class Tiles(NamedTuple):
    """Tiles to train the tower on.

    Attributes:
        pixels: Normalised, (B, 3, h, w).
        labels: For every patch the class of the glyph that it should name, `BACKGROUND` or `NOT_JUDGED`, (B, h/14,
            w/14).
    """

    pixels: Tensor
    labels: Tensor


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

    return Tiles((pages - MEAN) / STD, _labels(kinds, empty, centre, height, side // PATCH).to(device))


def _labels(kinds: Tensor, empty: Tensor, centre: Tensor, height: Tensor, patches: int) -> Tensor:
    """What patches name, (B, patches, patches).

    The nearest glyph whose middle lies in the patch or up to two pixels beside it, or that covers most of the patch;
    not judged where the middle of that glyph lies outside of the tile.
    """
    places = (torch.arange(patches) + 0.5) * PATCH
    of_patch = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1).view(1, -1, 1, 2)
    middle, tall = centre.flatten(1, 2), height.flatten(1)
    away = (of_patch - middle[:, None]).abs().amax(-1)  # (B, patches, glyphs)
    near = (away <= (0.4 * tall).clamp(min=PATCH / 2 + 2)[:, None]) & ~empty.flatten(1)[:, None]
    least, nearest = torch.where(near, away, torch.inf).min(-1)
    outside = ((middle < -2) | (middle > patches * PATCH + 2)).any(-1)
    named = torch.where(outside, NOT_JUDGED, kinds.flatten(1))
    labels = torch.where(least.isinf(), BACKGROUND, named.gather(1, nearest))
    of_page: Tensor = labels.unflatten(1, (patches, patches))
    return of_page


class PagesSeen(NamedTuple):
    """Pages to train the tower on, cut as an INF-LLaVA cuts them.

    Attributes:
        tiles: Normalised local tiles, (B, 9, 3, 112, 112).
        wholes: Normalised, (2B, 3, 112, 112): thumbnails, then a global tile of each page. Each of their patches is a
            cell.
        labels: What stands in each cell, of the tiles and of the wholes: a class, `BACKGROUND` or `NOT_JUDGED`, (B, 8,
            8) and (2B, 8, 8).
    """

    tiles: Tensor
    wholes: Tensor
    labels: tuple[Tensor, Tensor]


def draw_pages(
    count: int, heights: tuple[float, float], seed: int, atlas: Atlas, photographs: Sequence[Tensor] | None = None
) -> PagesSeen:
    """Pages with glyphs of such heights, on the device of the atlas.

    Thumbnails and global tiles show the large character whole. Which of the nine global tiles is given, the seed says.
    """
    pages = sample_pages(count, heights, seed)
    pixels = (render(pages, 3 * TILE, atlas, photographs) - MEAN) / STD
    labels = torch.where(pages.kinds == EMPTY, BACKGROUND, pages.kinds)
    small = torch.where(pages.kinds == COVERED, NOT_JUDGED, labels)
    whole = torch.where(pages.kinds == COVERED, BACKGROUND, labels)
    whole = torch.where(covered(pages), pages.large[:, None, None], whole)
    wholes = torch.cat([interpolate(pixels, (TILE, TILE)), crop(pixels, (3, 3), "global")[:, seed % 9]])
    of_wholes = whole.repeat(2, 1, 1)
    return PagesSeen(crop(pixels, (3, 3), "local"), wholes, (small.to(pixels.device), of_wholes.to(pixels.device)))


def of_cells(tower: ReaderVisionModel, tiles: Tensor) -> Tensor:
    """The mean of the nine tokens of each cell of pages, (B, 9, 3, 112, 112) to (B, 8, 8, D)."""
    tokens = tower(tiles.flatten(0, 1)).last_hidden_state
    patches = TILE // PATCH
    page = recombine(tokens.view(len(tiles), 9, patches, patches, -1), (3, 3), "local", data_format="channels_last")
    cells: Tensor = page.unflatten(2, (CELLS, 3)).unflatten(1, (CELLS, 3)).mean((2, 4))
    return cells


def pretrain(
    tower: ReaderVisionModel,
    steps: int = 2000,
    *,
    seed: int = 0,
    batch: int = 20,
    learning_rate: float = 3e-3,
    device: torch.device | str = "cpu",
    photographs: Sequence[Tensor] | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> nn.Linear:
    """Train a tower, in place, to name the glyph in every patch, and to tell where in its tile a patch lies.

    Nobody can ask for a named place of a page whose tokens do not say where they are; of labels of glyphs alone a tower
    learns to forget it. Every other step is of pages, cut as an INF-LLaVA cuts them: of their local tiles the mean of
    the nine tokens of a cell has to name what stands in it, for it is this mean that an enhancement module with the
    average readout gives on.

    AdamW (betas .9 and .98, decay .02), 60 steps of warm-up, cosine; glyphs of 12 pixels or more in the first twelfth
    of the steps, then of 4 or more. Fonts are `TRAINING_FONTS`.

    Args:
        tower: A tower with drawn weights.
        steps: How many.
        seed: Of the data and of the heads; the tower's weights are drawn by the caller.
        batch: Tiles in a step.
        learning_rate: The highest.
        device: Where to compute. The tower is left there.
        photographs: Backgrounds (3, h, w) of one step of pages in ten. None: all are computed.
        watch: Called with step and loss.

    Returns:
        The head that names cells, from the mean of their tokens to logits of the classes and of `BACKGROUND`.
    """
    random = torch.Generator().manual_seed(seed)
    width, codes = tower.config.hidden_size, waves(1, 1, torch.empty(0)).shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(nn.Linear(width, n) for n in (len(CLASSES) + 1, len(CLASSES) + 1, codes))
    tower, heads, atlas = tower.to(device).train(), heads.to(device), build_atlas().to(device)
    of_patch, of_cell, of_place = heads
    descent = Descent([*tower.parameters(), *heads.parameters()], learning_rate, steps, watch=watch)
    place = waves(TILE // PATCH, TILE // PATCH, torch.empty(0, device=device)).flatten(0, 1)
    learn_statistics(tower, True)
    tower.to(memory_format=torch.channels_last)  # a step of 20 tiles on one core: 0.24 s, and 0.30 s without
    for step in range(steps):
        smallest = 12.0 if step * 12 < steps else 4.0
        if step % 2:
            number = int(torch.randint(2**31, (), generator=random))
            behind = photographs if number % 10 == 0 else None
            seen = draw_pages(max(1, batch // 10), (max(5.0, smallest), 28.0), number, atlas, behind)
            whole, cells = tower(seen.wholes).last_hidden_state, of_cells(tower, seen.tiles)
            loss = _loss(of_cell(cells), seen.labels[0]) + _loss(of_patch(whole), seen.labels[1])
            loss = loss + 2 * (of_place(whole) - place).square().mean()
        else:
            tiles = draw_tiles(batch, TILE, smallest, random, atlas)
            tokens = tower(tiles.pixels).last_hidden_state
            loss = _loss(of_patch(tokens), tiles.labels) + 2 * (of_place(tokens) - place).square().mean()
        descent.step(loss)
    learn_statistics(tower, False)
    tower.to(memory_format=torch.contiguous_format).eval()
    return cast(nn.Linear, of_cell)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of glyphs, and .3 of that of the background: tiles with few large glyphs count as much as those with many."""
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.flatten()
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
    tower: ReaderVisionModel, head: nn.Linear, height: float, *, seed: int, fonts: tuple[str, ...], pages: int = 16
) -> float:
    """Share of glyphs of a height, anywhere on pages, that `head` names rightly from the mean of a cell's tokens."""
    drawn = draw_pages(pages, (height, height), seed, build_atlas(fonts).to(head.weight.device))
    named, labels = head(of_cells(tower, drawn.tiles)).argmax(-1), drawn.labels[0]
    glyphs = (labels >= 0) & (labels < BACKGROUND)
    return float((named == labels)[glyphs].float().mean())
