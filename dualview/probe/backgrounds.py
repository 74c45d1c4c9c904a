"""Photographs behind the glyphs: those that matplotlib, scikit-learn and scikit-image ship, split into two halves."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from dualview.probe.glyphs import Array, Split, resize, shipped

PHOTOGRAPHS: dict[Split, dict[str, str]] = {
    "train": {
        "sklearn/china.jpg": "CC BY 2.0, danielbuechele",
        "skimage/astronaut.png": "public domain, NASA",
        "skimage/brick.png": "CC0, CC0Textures",
        "skimage/camera.png": "CC0, Lav Varshney",
        "skimage/chelsea.png": "CC0, Stefan van der Walt",
        "skimage/grass.png": "CC0, linolafett",
    },
    "test": {
        "sklearn/flower.jpg": "CC BY 2.0, vultilion",
        "matplotlib/grace_hopper.jpg": "public domain, US Navy",
        "skimage/coffee.png": "CC0, Rachel Michetti",
        "skimage/gravel.png": "CC0, CC0Textures",
        "skimage/hubble_deep_field.jpg": "public domain, NASA",
        "skimage/rocket.jpg": "public domain, SpaceX",
        "skimage/retina.jpg": "CC0, Haeggstroem",
    },
}
"""Files and their licences."""

_FOLDERS = {"sklearn": "datasets/images", "skimage": "data", "matplotlib": "mpl-data/sample_data"}


@cache
def photographs(split: Split, pixels: int) -> tuple[Array, ...]:
    """The photographs of a split, (H, W, 3) uint8, small ones enlarged so that a square of so many pixels fits."""
    pictures = [_load(name) for name in PHOTOGRAPHS[split]]
    larger = [max(1.0, pixels / min(picture.shape[:2])) for picture in pictures]
    return tuple(
        picture if by == 1 else resize(picture, *(math.ceil(side * by) for side in picture.shape[:2]))
        for picture, by in zip(pictures, larger, strict=True)
    )


def crop_of(photograph: Array, pixels: int, rng: np.random.Generator) -> Array:
    """A square of a photograph at a random place, mirrored at random."""
    top, left = (int(rng.integers(0, side - pixels + 1)) for side in photograph.shape[:2])
    crop = photograph[top : top + pixels, left : left + pixels]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _load(name: str) -> Array:
    from PIL import Image

    package, file = name.split("/")
    with Image.open(shipped(package, f"{_FOLDERS[package]}/{file}")) as image:
        return np.asarray(image.convert("RGB"))
