"""Pages drawn on any device, all pixels at once: a background, and strings of glyphs on a lattice of cells."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.geometry import Size
from dualview.reader.glyphs import BOX, LEVELS, TALL, Atlas

ADVANCE = 0.95
"""From one glyph of a string to the next, in heights."""


@dataclass
class Lattice:
    """Strings of up to K glyphs in the cells of pages, (B, R, C, ...).

    Attributes:
        glyphs: Pictures of the atlas, (B, R, C, K); -1 where the string has ended.
        centre: Of the string in pixels, y and x, (B, R, C, 2).
        height: Of a capital in pixels, (B, R, C).
        bend: Rotation in radians, shear, and width over height, (B, R, C, 3).
        ink: Colour, (B, R, C, 3).
        plate: Colour behind the string, (B, R, C, 3); NaN for none.
        origin: Where the first cell starts, y and x, (B, 2).
        cell: Height and width of a cell in pixels.
    """

    glyphs: Tensor
    centre: Tensor
    height: Tensor
    bend: Tensor
    ink: Tensor
    plate: Tensor
    origin: Tensor
    cell: tuple[float, float]

    def to(self, device: torch.device | str) -> Lattice:
        """The same on another device."""
        held: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **held)


def draw(pages: Tensor, lattice: Lattice, atlas: Atlas) -> Tensor:
    """Draw a lattice of strings onto pages (B, 3, H, W) of values 0..1; every glyph stays within its cell."""
    batch, _, height, width = pages.shape
    rows, cols, longest = lattice.glyphs.shape[1:]
    y = torch.arange(height, device=pages.device) + 0.5
    x = torch.arange(width, device=pages.device) + 0.5
    row = ((y - lattice.origin[:, :1]) / lattice.cell[0]).floor().clamp(0, rows - 1).long()
    col = ((x - lattice.origin[:, 1:]) / lattice.cell[1]).floor().clamp(0, cols - 1).long()
    cell = row[:, :, None] * cols + col[:, None] + torch.arange(batch, device=pages.device)[:, None, None] * rows * cols

    angle, shear, aspect = lattice.bend.unbind(-1)
    level = (BOX / (lattice.height * (BOX / TALL))).log2().floor().clamp(0, LEVELS - 1)
    count = (lattice.glyphs >= 0).sum(-1).float()
    numbers = (*lattice.centre.unbind(-1), lattice.height, angle.cos(), angle.sin(), shear, aspect, level, count)
    cy, cx, tall, cos, sin, shear, aspect, level, count = (number.flatten()[cell] for number in numbers)
    dy, dx = (y[:, None] - cy) / tall, (x - cx) / (tall * aspect)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    u = u + shear * v + (count - 1) / 2 * ADVANCE
    place = (u / ADVANCE).round().clamp(min=0).minimum((count - 1).clamp(min=0))
    picture = lattice.glyphs.flatten()[cell * longest + place.long()]
    ink = _sample(atlas, picture, level.long(), u - place * ADVANCE, v)

    inks, plates = (
        torch.stack([channel.flatten()[cell] for channel in colour.unbind(-1)], 1)
        for colour in (lattice.ink, lattice.plate)
    )
    inside = (v.abs() < 0.75) & (u > -0.75) & (u < (count - 1) * ADVANCE + 0.75) & (count > 0)
    pages = torch.where(inside[:, None] & ~plates.isnan(), plates, pages)
    return torch.lerp(pages, inks, ink[:, None])


def _sample(atlas: Atlas, picture: Tensor, level: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Ink of pictures at places (u, v) in heights from the middle, interpolated linearly; none outside the box."""
    starts = torch.tensor(atlas.starts, device=picture.device)[level]
    side = BOX >> level
    s, t = ((c * (TALL / BOX) + 0.5) * side - 0.5 for c in (u, v))
    s0, t0 = s.floor(), t.floor()
    fs, ft = s - s0, t - t0
    most = side - 1
    inside = (s > -1) & (s < side) & (t > -1) & (t < side) & (picture >= 0) & (u.abs() < ADVANCE / 2 + 0.15)
    base = starts + picture.clamp(min=0) * side * side
    s0, t0 = s0.long(), t0.long()
    cs, ns = (torch.minimum(c.clamp(min=0), most) for c in (s0, s0 + 1))
    ct, nt = (torch.minimum(c.clamp(min=0), most) for c in (t0, t0 + 1))
    texels = atlas.texels
    above = torch.lerp(texels[base + ct * side + cs], texels[base + ct * side + ns], fs)
    below = torch.lerp(texels[base + nt * side + cs], texels[base + nt * side + ns], fs)
    return torch.where(inside, torch.lerp(above, below, ft), 0.0)


def uniform(shape: tuple[int, ...], low: float, high: float, random: torch.Generator) -> Tensor:
    """Random numbers between two bounds, drawn on the CPU, so that they are the same for every device."""
    return torch.rand(shape, generator=random) * (high - low) + low


def textures(count: int, size: Size, random: torch.Generator, device: torch.device | str) -> Tensor:
    """Clouds of colour with detail of three sizes, (count, 3, H, W) about 0, from -1 to 1."""
    total = torch.zeros(count, 3, *size, device=device)
    for cells in (3, 10, 36):
        noise = uniform((count, 3, cells, cells), -1, 1, random).to(device)
        weight = uniform((count, 1, 1, 1), 0, 1, random).to(device)
        total += weight * F.interpolate(noise, size, mode="bilinear")
    return total / 2


def contrasting(papers: Tensor, least: float, random: torch.Generator) -> Tensor:
    """Colours whose brightness differs from that of papers (..., 3) by ``least`` or more."""
    bright = papers.mean(-1)
    room = torch.stack([(bright - least).clamp(min=0), (1 - least - bright).clamp(min=0)], -1)  # below, above
    darker = torch.rand(bright.shape, generator=random) * room.sum(-1).clamp(min=1e-6) < room[..., 0]
    amount = torch.rand(bright.shape, generator=random)
    level = torch.where(darker, amount * room[..., 0], 1 - amount * room[..., 1])
    tint = uniform(tuple(papers.shape), -0.15, 0.15, random)
    return (level[..., None] + tint - tint.mean(-1, keepdim=True)).clamp(0, 1)


def bends(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Rotation by 8 degrees at most, shear, and width over height, (..., 3)."""
    turn = uniform((*shape, 1), -math.radians(8), math.radians(8), random)
    return torch.cat([turn, uniform((*shape, 1), -0.15, 0.15, random), uniform((*shape, 1), 0.85, 1.15, random)], -1)


def backgrounds(
    count: int, size: Size, random: torch.Generator, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of one colour and a little texture, or (3 of 10) of much of it: pages, their colours, which are busy."""
    paper = uniform((count, 3), 0, 1, random)
    busy = torch.rand(count, generator=random) < 0.3
    amplitude = torch.where(busy, uniform((count,), 0.2, 0.6, random), uniform((count,), 0, 0.08, random))
    clouds = textures(count, size, random, device) * amplitude.to(device)[:, None, None, None]
    return (paper.to(device)[:, :, None, None] + clouds).clamp(0, 1), paper, busy


def finish(pages: Tensor, random: torch.Generator) -> Tensor:
    """Noise of the camera, and values that bytes can have."""
    noise = torch.Generator(pages.device).manual_seed(int(torch.randint(2**31, (), generator=random)))
    amount = uniform((len(pages), 1, 1, 1), 0, 0.08, random).to(pages.device)
    noisy = pages + amount * torch.randn(pages.shape, generator=noise, device=pages.device)
    return (noisy.clamp(0, 1) * 255).round() / 255
