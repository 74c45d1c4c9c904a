"""Tiles of images with different grids, packed into one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dualview.arguments import check_choice, check_index, check_indices, shown
from dualview.geometry import (
    PERSPECTIVES,
    GridLike,
    Perspective,
    Placement,
    TileGrid,
    check_grids,
    check_perspective,
    check_placements,
)
from dualview.records import Record
from dualview.tensors import check_list, check_tensors
from dualview.views import rectangle


@dataclass(frozen=True, eq=False, repr=False)
class TileBatch(Record, tensors=("data",)):
    """Tiles of a mixed-grid batch: all tiles of image 0, then all of image 1, and so on.

    Args:
        data: The packed tiles; the first dimension counts tiles.
        offsets: Where the tiles of each image start, plus the end: one more entry than images, from 0.
        grids: One grid per image.
        perspective: "local" or "global" where it is known, so that a wrong inverse can be refused.
        images: Where each image lies on the canvas of its tiles, where that is known, so that padding can be removed.

    Shape:
        - data: (total_tiles, C, h, w) or (total_tiles, h, w, D)

    Raises:
        ValueError: Offsets, grids, images and the number of tiles do not agree.
        TypeError: ``data`` is no tensor, or ``images`` are no placements.

    Example:
        >>> batch = TileBatch.collate([torch.zeros(6, 3, 4, 4), torch.ones(2, 3, 4, 4)], [(2, 3), (1, 2)])
        >>> batch.offsets, [tuple(t.shape) for t in batch.split()]
        ((0, 6, 8), [(6, 3, 4, 4), (2, 3, 4, 4)])
    """

    data: Tensor
    offsets: tuple[int, ...]
    grids: tuple[TileGrid, ...]
    perspective: Perspective | None = None
    images: tuple[Placement, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", check_indices(self.offsets, "offsets"))
        object.__setattr__(self, "grids", check_grids(self.grids, "grids"))
        check_choice(self.perspective, "perspective", (*PERSPECTIVES, None))
        check_tensors(data=self.data)
        expected = (0, *accumulate(grid.num_tiles for grid in self.grids))
        if self.offsets != expected:
            raise ValueError(
                f"TileBatch offsets {self.offsets} do not fit grids {[str(g) for g in self.grids]}: they must be "
                f"{expected}, the running sum of rows*cols. TileBatch.collate works them out."
            )
        if self.data.dim() < 1 or self.data.shape[0] != expected[-1]:
            raise ValueError(
                f"TileBatch data of shape {tuple(self.data.shape)} does not fit grids {[str(g) for g in self.grids]}: "
                f"the first dimension must be {expected[-1]} tiles."
            )
        if self.images is not None:
            object.__setattr__(self, "images", check_placements(self.images, self.grids, "images"))

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def valid(self) -> tuple[Tensor, ...] | None:
        """A mask (rows*h, cols*w) of the pixels of each image, False where they are padding; None if not known."""
        if self.images is None:
            return None
        return tuple(rectangle(i.real, i.grid.map_size(i.tile), self.data.device) for i in self.images)

    @classmethod
    def collate(
        cls,
        tiles: Sequence[Tensor],
        grids: Sequence[GridLike],
        perspective: Perspective | None = None,
        images: Sequence[Placement] | None = None,
    ) -> TileBatch:
        """Pack one tensor of tiles per image, each (rows*cols, ...), with equal trailing sizes.

        Raises:
            ValueError: The counts, tile sizes or the number of grids do not agree.
            TypeError: An element of ``tiles`` is no tensor.
        """
        grid_tuple = check_grids(grids, "grids")
        tiles = check_list(tiles, "tiles")
        counts = [t.shape[0] if t.dim() else 0 for t in tiles]
        if (
            counts != [grid.num_tiles for grid in grid_tuple]
            or len({(t.shape[1:], t.dtype, t.device) for t in tiles}) != 1
        ):
            raise ValueError(
                f"cannot pack tiles={shown(tiles)} of shapes {[tuple(t.shape) for t in tiles]} for grids "
                f"{[str(g) for g in grid_tuple]}: give at least one image, one grid per image, rows*cols tiles each, "
                "and the same tile size, type and device throughout."
            )
        offsets = 0, *accumulate(counts)
        return cls(torch.cat(list(tiles)), offsets, grid_tuple, perspective, images)  # type: ignore[arg-type]  # checked

    def split(self) -> list[Tensor]:
        """The tiles of each image, views of shape (rows*cols, ...)."""
        return list(self.data.split([grid.num_tiles for grid in self.grids]))

    def slice(self, start: int, stop: int) -> TileBatch:
        """Images ``start`` to ``stop`` (as a Python slice) as a batch of their own; ``data`` is a view."""
        start, stop, _ = slice(check_index(start, "start"), check_index(stop, "stop")).indices(len(self))
        stop = max(start, stop)
        first, last = self.offsets[start], self.offsets[stop]
        offsets = tuple(offset - first for offset in self.offsets[start : stop + 1])
        images = None if self.images is None else self.images[start:stop]
        return TileBatch(self.data[first:last], offsets, self.grids[start:stop], self.perspective, images)

    def with_data(self, data: Tensor) -> TileBatch:
        """The same images and grids with other contents, such as the features of the tiles."""
        return TileBatch(data, self.offsets, self.grids, self.perspective, self.images)

    def checked_grids(self, grids: object, name: str = "grids") -> tuple[TileGrid, ...]:
        """The grids of the batch; a ValueError if ``grids`` is given and differs from them."""
        if grids is not None and check_grids(grids, name) != self.grids:
            raise ValueError(
                f"{name}={shown(grids)} differ from those of the TileBatch, {[str(g) for g in self.grids]}: omit the "
                "argument."
            )
        return self.grids

    def checked_perspective(self, perspective: str | None) -> Perspective:
        """The perspective to undo; a ValueError if it is unknown or differs from the recorded one."""
        check_choice(perspective, "perspective", (*PERSPECTIVES, None))
        if perspective is None and self.perspective is None:
            raise ValueError('this TileBatch does not record its perspective: pass perspective="local" or "global".')
        if perspective is not None and self.perspective not in (None, perspective):
            raise ValueError(
                f"perspective={perspective!r} was asked for, but these tiles are of the {self.perspective!r} "
                "perspective: undoing the other one would scramble the map. Omit the argument, or pass the right tiles."
            )
        return check_perspective(perspective or self.perspective)  # type: ignore[arg-type]  # one of them is known
