"""Bring the tokens that a plan names together as tiles, and put what was made of them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from dualview.geometry import Perspective, Size, TileGrid, check_size, split_axis
from dualview.ops.plan import AxisCut, DirectionPlan, EnhancePlan
from dualview.ops.tables import listed, table
from dualview.ops.tiling import recombine, retile


class TileMap(NamedTuple):
    """A token map as tiles of one perspective, of which some may be absent.

    Attributes:
        tiles: (B, present tiles, h, w, D).
        perspective: How the map is cut.
        places: Where each present tile stands among ``tiles``, by its index in the grid.
    """

    tiles: Tensor
    perspective: Perspective
    places: Mapping[int, int]


def take_tiles(source: TileMap, rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    """The tokens at ``rows`` x ``cols`` as tiles of perspective ``cut``.

    Shape:
        (B, present tiles, h, w, D) -> (B, tiles, tokens per tile, D)
    """
    wanted = [i * grid.cols + j for i in rows.tiles for j in cols.tiles]
    if rows.whole and cols.whole:
        if source.perspective == cut:
            places = [source.places[tile] for tile in wanted]
            return select(source.tiles, 1, places).flatten(2, 3)
        if len(source.places) == len(wanted) == grid.num_tiles:
            whole: Tensor = retile(source.tiles, source.perspective, cut, grid)
            return whole.flatten(2, 3)
    at = token_places(source, rows, cols, grid)
    taken: Tensor = source.tiles.flatten(1, 3).index_select(1, at.flatten()).unflatten(1, at.shape)
    return taken


def token_places(source: TileMap, rows: AxisCut, cols: AxisCut, grid: TileGrid) -> Tensor:
    """Where the tokens that `take_tiles` takes stand among all tokens of the map: (tiles, tokens per tile)."""
    size = check_size(source.tiles.shape[2:4], "token map")
    places = tuple(source.places.items())
    return table(_token_places, source.perspective, places, rows, cols, grid, size, like=source.tiles)


def _token_places(
    device: torch.device,
    perspective: Perspective,
    places: tuple[tuple[int, int], ...],
    rows: AxisCut,
    cols: AxisCut,
    grid: TileGrid,
    size: Size,
) -> Tensor:
    place, (h, w) = dict(places), size
    tile_rows, offset_rows = _locate(perspective, rows, grid.rows, h)
    tile_cols, offset_cols = _locate(perspective, cols, grid.cols, w)
    first = torch.tensor([[place[i * grid.cols + j] for j in tile_cols] for i in tile_rows], device=device)
    u, v = torch.tensor(offset_rows, device=device)[:, None], torch.tensor(offset_cols, device=device)[None, :]
    plane = (first * h + u) * w + v
    split: Tensor = plane.unflatten(1, (len(cols.tiles), cols.per_tile)).unflatten(0, (len(rows.tiles), rows.per_tile))
    return split.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def put_back(tiles: Tensor, rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    """What `take_tiles` took, with new contents, as the map of the live rows and columns.

    Shape:
        (B, tiles, tokens per tile, D) -> (B, live rows, live columns, D)
    """
    split = tiles.unflatten(2, (rows.per_tile, cols.per_tile))
    if rows.whole and cols.whole and tiles.shape[1] == grid.num_tiles:
        return recombine(split, grid, cut, data_format="channels_last")
    plane = split.unflatten(1, (len(rows.tiles), len(cols.tiles))).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return select(select(plane, 1, rows.slots), 2, cols.slots)


@dataclass(frozen=True)
class Pooling:
    """Average pooling of the cells of one direction, taken as early as its cut allows.

    Attributes:
        direction: The direction; its ``pool`` says where the average is taken.
        grid: Rows and columns of tiles.
        size: The pooled map (h, w).
    """

    direction: DirectionPlan
    grid: TileGrid
    size: Size

    @property
    def inside(self) -> bool:
        """Whether attention weights are pooled, and not only what they collect."""
        return self.direction.pool != "map"

    @property
    def _cells(self) -> tuple[int, int, int, int]:
        """How the queries of one tile split: (cell rows, rows of a cell, cell columns, columns of a cell)."""
        rows, cols = self.direction.query_rows, self.direction.query_cols
        h, w = self.size[0] // self.grid.rows, self.size[1] // self.grid.cols
        return h, rows.per_tile // h, w, cols.per_tile // w

    def rows(self, weights: Tensor) -> Tensor:
        """Attention weights averaged over the rows of each cell. (B, T, G, R, K) -> (B, T, G, pooled R, K)"""
        split: Tensor = weights.unflatten(-2, self._cells)
        return split.mean(-2).mean(-3).flatten(-3, -2)  # one axis after the other: ten times as fast as both at once

    def spread(self, of_rows: Tensor) -> Tensor:
        """The transpose of `rows`. (B, T, G, pooled R, K) -> (B, T, G, R, K)"""
        h, r, w, s = self._cells
        split = of_rows.unflatten(-2, (h, 1, w, 1)) / (r * s)
        spread: Tensor = split.expand(*split.shape[:-5], h, r, w, s, -1).flatten(-5, -2)
        return spread

    def members(self, queries: Tensor) -> Tensor:
        """Queries by what they are averaged with. (T, Q) -> (pooled T, members, pooled Q)"""
        if self.direction.pool == "tiles":
            return queries.unsqueeze(0)
        split: Tensor = queries.unflatten(1, self._cells).permute(0, 2, 4, 1, 3)
        return split.flatten(3, 4).flatten(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """Pooled tokens. (B, T, Q, C) -> (B, pooled T, pooled Q, C)"""
        if self.direction.pool == "tiles":
            return x.mean(1, keepdim=True)
        if self.direction.pool == "cells":
            cells: Tensor = x.unflatten(2, self._cells)
            return cells.mean((3, 5)).flatten(2, 3)
        d = self.direction
        plane = put_back(x, d.query_rows, d.query_cols, d.cut, self.grid)
        return mean_of_cells(plane, self.size).flatten(1, 2).unsqueeze(1)

    def arrange(self, x: Tensor) -> Tensor:
        """Pooled tokens as a map. (B, pooled T, pooled Q, C) -> (B, h, w, C)"""
        if self.direction.pool == "cells":
            h, _, w, _ = self._cells
            return recombine(x.unflatten(2, (h, w)), self.grid, "local", data_format="channels_last")
        pooled: Tensor = x.squeeze(1).unflatten(1, self.size)
        return pooled


def mean_of_cells(plane: Tensor, size: Size) -> Tensor:
    """The mean of the tokens read of each cell. (..., h * k, w * l, D) -> (..., h, w, D)"""
    (h, w), (height, width) = size, plane.shape[-3:-1]
    if (height, width) == (h, w):
        return plane
    mean: Tensor = reduce(plane, "... (h r) (w c) d -> ... h w d", "mean", h=h, w=w)
    return mean


def surroundings(plane: Tensor, plan: EnhancePlan, radius: int) -> Tensor:
    """Each token that is read with those around it, side by side, zeros beyond the border.

    Shape:
        (B, fused rows, fused columns, D) -> (B, k * read rows, k * read columns, D) for k = 2 * radius + 1
    """
    plane = F.pad(plane, (0, 0, 0, 1, 0, 1))  # one more row and column, of zeros
    for dim, read, fused in zip((1, 2), plan.read, plan.fused, strict=True):
        place = {p: i for i, p in enumerate(fused)}
        around = [place.get(p + step, len(fused)) for p in read for step in range(-radius, radius + 1)]
        plane = select(plane, dim, around)
    return plane


def on_full_map(plane: Tensor, plan: EnhancePlan, size: Size) -> Tensor:
    """The live tokens on a map of zeros. (B, fused rows, fused columns, D) -> (B, H, W, D)"""
    if plane.shape[1:3] == size:
        return plane
    rows, cols = (table(listed, positions, like=plane) for positions in plan.fused)
    full = plane.new_zeros(plane.shape[0], *size, plane.shape[-1])
    full[:, rows[:, None], cols] = plane
    return full


def take_read(plane: Tensor, plan: EnhancePlan) -> Tensor:
    """The tokens that are read. (B, H, W, D) -> (B, read rows, read columns, D)"""
    return select(select(plane, 1, plan.read[0]), 2, plan.read[1])


def _locate(perspective: Perspective, cut: AxisCut, tiles: int, size: int) -> tuple[list[int], list[int]]:
    """Tile and offset of every gathered position, as the map is cut now."""
    (_, inner), tile_factor = split_axis(perspective, tiles, size)
    outer_inner = [divmod(position, inner) for position in cut.positions]
    pairs = outer_inner if tile_factor == 0 else [(inner_, outer) for outer, inner_ in outer_inner]
    return [tile for tile, _ in pairs], [offset for _, offset in pairs]


def select(x: Tensor, dim: int, places: list[int] | tuple[int, ...]) -> Tensor:
    """Entries of one dimension; a view, or ``x`` itself, where they are consecutive."""
    first = places[0] if places else 0
    if list(places) == list(range(first, first + len(places))):
        return x if len(places) == x.shape[dim] else x.narrow(dim, first, len(places))
    return x.index_select(dim, table(listed, tuple(places), like=x))
