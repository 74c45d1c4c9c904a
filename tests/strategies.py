"""What Hypothesis draws from. The simplest example of every strategy has unequal height and width."""

import os
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

ALL = "TEST_ALL" in os.environ
"""Whether this is `make test-all`: with every case, also where a few show as much of what is likely to break."""


def examples(count: int) -> int:
    """So many examples on every push, ten times as many in `make test-all`."""
    return count * (10 if ALL else 1)


def some(cases: Iterable[Any], every: int) -> list[Any]:
    """One of so many cases, all in `make test-all`.

    Where they are a product, ``every`` should share no factor with its inner lengths: every value is then among them.
    """
    return list(cases)[:: 1 if ALL else every]


def _pairs(most: int) -> list[tuple[int, int]]:
    """All (height, width) up to ``most``: non-square without ones, then lines, then squares."""
    pairs = product(range(1, most + 1), repeat=2)
    return sorted(pairs, key=lambda pair: (pair[0] == pair[1], 1 in pair, pair[0] * pair[1]))


grids = st.sampled_from(_pairs(4))
tiles = st.sampled_from(_pairs(4))
perspectives = st.sampled_from(["local", "global"])
data_formats = st.sampled_from(["channels_first", "channels_last"])
batches = st.sampled_from([(2,), (), (1,), (3, 1), (2, 3, 2), (0,), (2, 0)])
channels = st.integers(1, 3)
dtypes = st.sampled_from(
    [
        torch.float32,
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
    ]
)
layouts = st.sampled_from(["contiguous", "channels_last", "transposed", "sliced", "expanded", "lazy"])


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor whose elements all differ where the dtype can tell them apart; scattered values where it cannot."""
    count = torch.Size(shape).numel()
    order = torch.arange(count)
    if dtype == torch.bool:
        return (order * 40503 % 65521 % 2 == 1).reshape(shape)
    if dtype == torch.uint8:
        order = order * 40503 % 251
    if dtype.is_complex:
        return torch.complex(order.float(), order.float() + 0.5).reshape(shape)
    return order.to(dtype).reshape(shape)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` in another memory format. Values stay, except that "expanded" repeats the first along every batch."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "sliced":
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 1))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.numel():
        return x[:1].expand_as(x)
    if layout == "lazy" and x.is_complex():
        return x.conj()  # a view with the conjugate bit set
    return x


def map_shape(
    batch: tuple[int, ...], channel: int, grid: tuple[int, int], tile: tuple[int, int], data_format: str
) -> tuple[int, ...]:
    """Shape of a map that ``grid`` cuts into tiles of size ``tile``."""
    size = (grid[0] * tile[0], grid[1] * tile[1])
    return (*batch, channel, *size) if data_format == "channels_first" else (*batch, *size, channel)


def tiles_shape(
    batch: tuple[int, ...], channel: int, grid: tuple[int, int], tile: tuple[int, int], data_format: str
) -> tuple[int, ...]:
    """Shape of the tiles of that map."""
    count = grid[0] * grid[1]
    return (*batch, count, channel, *tile) if data_format == "channels_first" else (*batch, count, *tile, channel)
