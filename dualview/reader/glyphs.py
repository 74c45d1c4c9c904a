"""Pictures of characters and shapes, in many fonts and at several resolutions."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DIGITS = "0123456789"
LETTERS = "ACEFHKLNPRTX"
CHARACTERS = DIGITS + LETTERS
SHAPES = ("circle", "cross", "diamond", "square", "star", "triangle")
CLASSES = (*CHARACTERS, *SHAPES)
"""What can stand on a page; a class is an index into this."""

TRAINING_FONTS = (
    *(f"DejaVuSans{kind}" for kind in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{kind}" for kind in ("", "-Oblique")),
    *(f"DejaVuSerif{kind}" for kind in ("", "-Bold", "-BoldItalic")),
    *(f"STIXGeneral{kind}" for kind in ("", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmtt10"),
)
HELD_OUT_FONTS = ("DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")
"""Fonts that no training sees. matplotlib ships all of these: DejaVu, STIX and Computer Modern, free to use."""

BOX = 64
"""Texels a side of a glyph's picture."""
TALL = 44
"""Texels from the foot to the head of a capital in it."""
LEVELS = 4
"""Resolutions that are kept: 64, 32, 16 and 8 texels a side."""


class Atlas(NamedTuple):
    """Pictures of every class in every font, at each resolution; 1 is ink.

    Attributes:
        texels: All pictures, one after the other, of all levels.
        starts: Where each level starts in ``texels``.
        fonts: How many fonts there are: class k in font f is picture ``k * fonts + f``.
    """

    texels: Tensor
    starts: tuple[int, ...]
    fonts: int

    def to(self, device: torch.device | str) -> Atlas:
        """The same on another device."""
        return self._replace(texels=self.texels.to(device))


@cache
def build_atlas(fonts: tuple[str, ...] = TRAINING_FONTS) -> Atlas:
    """Draw every class in fonts that matplotlib ships.

    Args:
        fonts: Names of font files, without ``.ttf``.
    """
    pictures = torch.stack([_picture(kind, font) for kind in CLASSES for font in fonts])
    levels = [F.avg_pool2d(pictures[:, None], 2**level)[:, 0] if level else pictures for level in range(LEVELS)]
    starts = [sum(x.numel() for x in levels[:level]) for level in range(LEVELS)]
    return Atlas(torch.cat([x.flatten() for x in levels]), tuple(starts), len(fonts))


def _picture(kind: str, font: str) -> Tensor:
    """One glyph in the middle of its box, (64, 64)."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    scale = 2  # drawn larger and averaged: smooth edges
    image = Image.new("L", (BOX * scale, BOX * scale))
    draw, middle = ImageDraw.Draw(image), BOX * scale / 2
    if kind in SHAPES:
        draw.polygon([(middle + x * TALL * scale, middle + y * TALL * scale) for x, y in outline(kind)], fill=255)
    else:
        path, reference = _font_file(font), 100
        left, top, right, bottom = ImageFont.truetype(path, reference).getbbox("0")
        face = ImageFont.truetype(path, round(reference * TALL * scale / (bottom - top)))
        left, top, right, bottom = face.getbbox(kind)
        draw.text((middle - (left + right) / 2, middle - (top + bottom) / 2), kind, fill=255, font=face)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return F.avg_pool2d(pixels[None, None], scale)[0, 0]


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners (x, y) of a shape that is 1 high and lies about 0."""
    if shape == "square":
        return [(-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)]
    if shape == "cross":
        a, b = 0.5, 0.14
        return [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    corners, inner = {"circle": (48, 1.0), "diamond": (4, 1.0), "star": (10, 0.42), "triangle": (3, 1.0)}[shape]
    angles = [2 * math.pi * k / corners for k in range(corners)]
    radii = [0.5 * (inner if k % 2 and shape == "star" else 1.0) for k in range(corners)]
    wide = 0.72 if shape == "diamond" else 1.0
    return [(wide * r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _font_file(font: str) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"))
