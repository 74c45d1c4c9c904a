"""Sources that are no arrays of numpy: one that counts what is decoded, and one that is computed."""

from collections import Counter
from typing import Any

import numpy as np


def values(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """Numbers without a pattern that a shifted or transposed picture would share."""
    return np.random.default_rng(0).integers(0, 255, size=shape).astype(dtype)


class Chunked:
    """An array in chunks; every access decodes the chunks that it touches, whole, and counts them."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...]) -> None:
        self.array, self.chunks, self.decoded = array, chunks, Counter()
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        spans = []
        for axis, length in enumerate(self.shape):
            part = range(length)[key[axis]] if axis < len(key) else range(length)
            assert part.step == 1, "only whole rectangles are read"
            spans.append(range(part[0] // self.chunks[axis], part[-1] // self.chunks[axis] + 1))
        self.decoded.update(_product(spans))
        return self.array[key]


def _product(spans: list[range]) -> list[tuple[int, ...]]:
    return [tuple(index) for index in np.array(np.meshgrid(*spans, indexing="ij")).reshape(len(spans), -1).T.tolist()]


class Assigned:
    """An array that can only be assigned to, and counts how often."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.times = array, np.zeros(array.shape, int)
        self.shape, self.dtype = array.shape, array.dtype

    def __setitem__(self, key: tuple[slice, ...], value: np.ndarray) -> None:
        self.array[key] = value
        self.times[key] += 1


class Computed:
    """A picture (H, W) of bytes that is nowhere: every pixel is computed when it is read."""

    dtype = np.dtype(np.uint8)

    def __init__(self, size: tuple[int, int]) -> None:
        self.shape = size

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        rows, cols = (np.arange(*part.indices(side)) for part, side in zip(key, self.shape, strict=True))
        return (rows * 31 % 251).astype(np.uint8)[:, None] ^ (cols * 7 % 253).astype(np.uint8)
