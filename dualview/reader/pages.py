"""Pages of eight by eight cells, with characters, shapes and sometimes one large character, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.reader.drawing import Lattice, backgrounds, bends, contrasting, draw, finish, uniform
from dualview.reader.glyphs import CHARACTERS, CLASSES, DIGITS, Atlas

CELLS = 8
"""Rows and columns of cells."""
EMPTY, COVERED = -1, -2
"""What a cell holds beside a class: nothing, or a part of the large character."""
LARGE = (0.2, 0.3)
"""Height of the large character as a part of the page's side."""


@dataclass
class Pages:
    """What stands on pages, of whatever size they are drawn.

    Attributes:
        kinds: Class in each cell, `EMPTY` or `COVERED`, (B, 8, 8).
        heights: Of the capitals there in pixels, (B, 8, 8).
        shifts: Where in its cell a glyph lies, y and x, as parts of the room that there is, -1 to 1, (B, 8, 8, 2).
        large: Class of the large character, `EMPTY` for none, (B,).
        large_height: As a part of the page's side, (B,).
        large_centre: Likewise, y and x, (B, 2).
        seed: Of everything else.
    """

    kinds: Tensor
    heights: Tensor
    shifts: Tensor
    large: Tensor
    large_height: Tensor
    large_centre: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.kinds)


def sample_pages(count: int, heights: tuple[float, float], seed: int, sparse: float = 0.0) -> Pages:
    """Decide what stands on pages.

    Of the cells about a third are empty. Each shape is there once or not at all; half of the pages have a large
    character, about a corner of the tiles of a 3 x 3 grid.

    Args:
        count: How many pages.
        heights: Least and greatest height of a glyph in pixels; between them all ratios are alike.
        seed: The same seed gives the same pages.
        sparse: Share of pages on which there is one code alone, of one to three characters, and perhaps the large
            character. The others are those that there are without it.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (count, CELLS, CELLS)
    digits = torch.rand(shape, generator=random) < 0.6
    kinds = torch.where(
        digits,
        torch.randint(len(DIGITS), shape, generator=random),
        torch.randint(len(DIGITS), len(CHARACTERS), shape, generator=random),
    )
    kinds[torch.rand(shape, generator=random) < 0.3] = EMPTY
    places = torch.rand(count, CELLS * CELLS, generator=random).argsort(1)
    present = torch.rand(count, len(CLASSES) - len(CHARACTERS), generator=random) < 0.65
    for shape_number in range(present.shape[1]):
        page = torch.arange(count)[present[:, shape_number]]
        place = places[page, shape_number]
        kinds[page, place // CELLS, place % CELLS] = len(CHARACTERS) + shape_number

    large = torch.randint(len(CHARACTERS), (count,), generator=random)
    large[torch.rand(count, generator=random) < 0.5] = EMPTY
    large_height = uniform((count,), *LARGE, random)
    corner = torch.randint(1, 3, (count, 2), generator=random) / 3
    large_centre = corner + uniform((count, 2), -0.06, 0.06, random)
    middles = (torch.arange(CELLS) + 0.5) / CELLS
    reach = large_height[:, None, None] * 0.62 + 0.5 / CELLS
    near = [(middles - large_centre[:, axis, None]).abs()[:, None] < reach for axis in (0, 1)]
    kinds[near[0].movedim(1, 2) & near[1] & (large != EMPTY)[:, None, None]] = COVERED
    height = torch.exp(uniform(shape, math.log(heights[0]), math.log(heights[1]), random))
    shifts = uniform((*shape, 2), -1, 1, random)
    if sparse:
        kinds = torch.where(torch.rand((count, 1, 1), generator=random) < sparse, _codes(kinds, random), kinds)
    return Pages(kinds, height, shifts, large, large_height, large_centre, seed)


def _codes(kinds: Tensor, random: torch.Generator) -> Tensor:
    """One to three characters side by side in place of what stands on pages, (B, 8, 8), but for what is covered."""
    whole = (len(kinds), 1, 1)
    length, row = torch.randint(1, 4, whole, generator=random), torch.randint(CELLS, whole, generator=random)
    first = (torch.rand(whole, generator=random) * (CELLS + 1 - length)).long()
    number = torch.arange(CELLS)
    written = (number[:, None] == row) & (number >= first) & (number < first + length)
    code = torch.randint(len(CHARACTERS), tuple(kinds.shape), generator=random)
    return torch.where(kinds == COVERED, COVERED, torch.where(written, code, EMPTY))


def covered(pages: Pages) -> Tensor:
    """Cells whose middle lies within the large character, (B, 8, 8)."""
    middles = (torch.arange(CELLS) + 0.5) / CELLS
    near = [(middles - pages.large_centre[:, axis, None]).abs() < pages.large_height[:, None] / 2 for axis in (0, 1)]
    return near[0][:, :, None] & near[1][:, None] & (pages.large != EMPTY)[:, None, None]


def render(pages: Pages, side: int, atlas: Atlas, photographs: Sequence[Tensor] | Tensor | None = None) -> Tensor:
    """Draw pages of a size, (B, 3, side, side) in 0..1 of values that bytes have, on the device of the atlas.

    Args:
        pages: What stands on them.
        side: In pixels, a multiple of 8. Heights of small glyphs are in pixels, whatever it is.
        atlas: The fonts.
        photographs: Backgrounds (3, h, w), of one of which each page gets a part, in place of computed ones.
    """
    device, random = atlas.texels.device, torch.Generator().manual_seed(pages.seed + 1)
    count, cell = len(pages), side / CELLS
    shape = tuple(pages.kinds.shape)
    if photographs is None:
        canvas, paper, busy = backgrounds(count, (side, side), random, device)
    else:
        canvas, paper, busy = _photographic(count, side, photographs, random)
    plates = uniform((*shape, 3), 0, 1, random)
    plated = (busy[:, None, None] | (torch.rand(shape, generator=random) < 0.1))[..., None]
    behind = torch.where(plated, plates, paper[:, None, None].expand_as(plates))
    index = torch.arange(CELLS) + 0.5
    middle = torch.stack(torch.meshgrid(index, index, indexing="ij"), -1) * cell
    room = ((cell - 1.5 * pages.heights) / 2).clamp(min=0)[..., None]
    fonts = torch.randint(atlas.fonts, shape, generator=random)
    small = Lattice(
        glyphs=torch.where(pages.kinds < 0, EMPTY, pages.kinds * atlas.fonts + fonts)[..., None],
        centre=middle + pages.shifts * room,
        height=pages.heights,
        bend=bends(shape, random),
        ink=contrasting(behind, 0.3, random),
        plate=torch.where(plated, plates, torch.nan),
        origin=torch.zeros(count, 2),
        cell=(cell, cell),
    )
    fonts = torch.randint(atlas.fonts, (count,), generator=random)
    whole = (count, 1, 1)
    plates = uniform((*whole, 3), 0, 1, random)
    plated = busy[:, None, None, None]
    behind = torch.where(plated, plates, paper[:, None, None])
    large = Lattice(
        glyphs=torch.where(pages.large < 0, EMPTY, pages.large * atlas.fonts + fonts).view(*whole, 1),
        centre=(pages.large_centre * side).view(*whole, 2),
        height=(pages.large_height * side).view(whole),
        bend=bends(whole, random),
        ink=contrasting(behind, 0.3, random),
        plate=torch.where(plated, plates, torch.nan),
        origin=torch.zeros(count, 2),
        cell=(side, side),
    )
    canvas = draw(draw(canvas.to(device), large.to(device), atlas), small.to(device), atlas)
    return finish(canvas, random)


def _photographic(
    count: int, side: int, photographs: Sequence[Tensor] | Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Square parts of photographs, scaled to the page; their mean colours; all are busy."""
    parts = []
    for _ in range(count):
        photograph = photographs[int(torch.randint(len(photographs), (), generator=random))]
        shorter = min(photograph.shape[-2:])
        cut = int(torch.randint(shorter // 2, shorter + 1, (), generator=random))
        top, left = (int(torch.randint(n - cut + 1, (), generator=random)) for n in photograph.shape[-2:])
        part = photograph[None, :, top : top + cut, left : left + cut]
        parts.append(F.interpolate(part, (side, side), mode="bilinear", antialias=True))
    pages = torch.cat(parts)
    return pages, pages.mean((2, 3)), torch.ones(count, dtype=torch.bool)
