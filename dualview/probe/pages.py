"""Pages drawn from scenes: photographs below, glyphs, rings, covers, gratings and noise above."""

from __future__ import annotations

from functools import cache

import numpy as np

from dualview.probe.backgrounds import crop_of, photographs
from dualview.probe.glyphs import Array, Split, glyphs_of, resize
from dualview.probe.scenes import ANGLES, CELL, Scene

VERSION = 1
"""Of the pages and the questions: another one where a seed gives another page."""

RINGS = np.array([[220, 30, 30], [20, 150, 40], [40, 70, 230], [235, 200, 20]], np.float32)


def draw_page(scene: Scene, split: Split) -> Array:
    """The page of a scene, (pixels, pixels, 3) uint8, with the glyphs and photographs of a split.

    Example:
        >>> from dualview.probe.scenes import draw_scene
        >>> draw_page(draw_scene(np.random.default_rng(0), 8), "test").shape
        (336, 336, 3)
    """
    rng = np.random.default_rng(scene.seed)
    pictures, glyphs = photographs(split, scene.pixels), glyphs_of(split)
    photograph = pictures[int(rng.integers(len(pictures)))]
    dark = rng.random() < 0.4
    paper = rng.integers(0, 70, 3) if dark else rng.integers(185, 256, 3)
    share = np.float32(rng.uniform(0.1, 0.4))
    page = crop_of(photograph, scene.pixels, rng).astype(np.float32) * share
    page += paper.astype(np.float32) * (1 - share)

    for grating in scene.gratings:
        _draw_grating(page, grating.row, grating.col, grating.period, ANGLES[grating.angle], rng)
    name, height, quadrant = scene.large
    half = scene.pixels // 2
    free = max(0, (half - height) // 2 - 2)
    y, x = (half * q + half // 2 + int(rng.integers(-free, free + 1)) // 2 for q in (quadrant // 2, quadrant % 2))
    _draw_glyph(page, _pick(glyphs[name], rng), height, y, x, _ink(dark, rng), rng)
    for glyph in scene.glyphs:
        _draw_glyph(page, _pick(glyphs[glyph.name], rng), scene.size, glyph.y, glyph.x, _ink(dark, rng), rng)
        if glyph.marker is not None:
            radius = min(CELL // 2 - 1, scene.size // 2 + 6)
            _draw_disc(page, glyph.y, glyph.x, radius, RINGS[glyph.marker], inner=radius - 3)
        if glyph.hidden:
            _draw_disc(page, glyph.y, glyph.x, scene.size // 2 + 6, rng.integers(90, 166, 3).astype(np.float32))
    top, left = (int(rng.integers(256)) for _ in range(2))
    page += _noise(scene.pixels)[top : top + len(page), left : left + len(page)] * np.float32(rng.uniform(0, 8))
    return np.floor(page.clip(0, 255) + np.float32(0.5 - 1e-3)).astype(np.uint8)


@cache
def _noise(pixels: int) -> Array:
    """Noise that pages take their own part of, for drawing it takes longer than all the rest."""
    return np.random.default_rng(VERSION).standard_normal((pixels + 256, pixels + 256, 3), np.float32)


def _pick(kinds: tuple[tuple[Array, ...], ...], rng: np.random.Generator) -> Array:
    """A printed glyph or, of digits half of the time, a handwritten one."""
    images = kinds[int(rng.integers(len(kinds)))]
    return images[int(rng.integers(len(images)))]


def _ink(dark: bool, rng: np.random.Generator) -> Array:
    return (rng.integers(190, 256, 3) if dark else rng.integers(0, 70, 3)).astype(np.float32)


def _draw_glyph(page: Array, image: Array, height: int, y: int, x: int, ink: Array, rng: np.random.Generator) -> None:
    width = max(2, round(image.shape[1] / image.shape[0] * height * rng.uniform(0.85, 1.15)))
    cover = resize(image, height, width).astype(np.float32)[..., None] / 255
    top, left = y - height // 2, x - width // 2
    above, before = max(0, -top), max(0, -left)
    cover = cover[above : len(page) - top, before : len(page) - left]
    area = page[top + above : top + height, left + before : left + width]
    area += (ink - area) * cover


def _draw_disc(page: Array, y: int, x: int, radius: int, colour: Array, inner: int = 0) -> None:
    rows, cols, distance = _around(page, y, x, radius)
    inside = (distance <= radius**2) & (distance >= inner**2)
    page[rows, cols][inside] = colour


def _draw_grating(page: Array, row: int, col: int, period: int, angle: int, rng: np.random.Generator) -> None:
    patch = len(page) // 4
    y, x = row * patch + patch // 2, col * patch + patch // 2
    radius = 30
    rows, cols, distance = _around(page, y, x, radius)
    turned = np.deg2rad(angle + rng.uniform(-6, 6))
    ys, xs = np.ogrid[rows, cols]
    wave = np.cos(2 * np.pi / period * (ys * np.cos(turned) + xs * np.sin(turned)) + rng.uniform(0, 2 * np.pi))
    contrast = rng.uniform(50, 110)
    middle = rng.uniform(110, 145)
    inside = distance <= radius**2
    page[rows, cols][inside] = np.floor(middle + contrast * wave + 0.5)[inside][:, None]


def _around(page: Array, y: int, x: int, radius: int) -> tuple[slice, slice, Array]:
    """The square around a point, and the squared distance of its pixels."""
    rows, cols = (slice(max(0, p - radius), min(len(page), p + radius + 1)) for p in (y, x))
    ys, xs = np.ogrid[rows, cols]
    distance: Array = (ys - y) ** 2 + (xs - x) ** 2
    return rows, cols, distance
