"""What one direction of the enhancement works on: the tokens that ask, those that answer, and which of these count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dualview.geometry import Perspective, Size, TileGrid
from dualview.ops.gather import TileMap, select, take_tiles, token_places
from dualview.ops.low_pass import low_pass
from dualview.ops.plan import AxisCut, DirectionPlan
from dualview.ops.tiling import crop, recombine

KeyMask = Tensor | tuple[Tensor, Tensor] | None
"""True for cells that may be attended to; of one map or, as a pair, of the local and the global map."""


class Operands(NamedTuple):
    """Queries and keys of one direction.

    Attributes:
        query: Tiles of queries, (B, T, Q, D).
        key: Tiles of keys, (B, T, K, D), or with ``key_at`` all tokens of their map, (B, tokens, D).
        key_at: Places (T, K) of each tile's keys among the tokens: keys that are used as they are, but cut in another
            way than their map, stay where they are.
        mask: True where a key may be attended to, (B or 1, T, K).
    """

    query: Tensor
    key: Tensor
    key_at: Tensor | None
    mask: Tensor | None


def operands(
    d: DirectionPlan,
    maps: dict[Perspective, list[TileMap]],
    key_mask: KeyMask,
    grid: TileGrid,
    tokens: Size,
    *,
    smooth: bool,
) -> Operands:
    """Gather what a direction works on from the maps of each role; ``smooth``: low-pass filter keys cut by strides."""
    key_role: Perspective = "local" if d.query == "global" else "global"
    key_maps, key_at = maps[key_role], None
    query = _take_sum(maps[d.query], d.query_rows, d.query_cols, d.cut, grid)
    if smooth and d.cut == "global":
        key_maps = [_smooth(tile_map, grid) for tile_map in key_maps]
    if d.absorb and len(key_maps) == 1 and key_maps[0].perspective != d.cut:
        key = key_maps[0].tiles.flatten(1, 3)
        key_at = token_places(key_maps[0], d.key_rows, d.key_cols, grid)
    else:
        key = _take_sum(key_maps, d.key_rows, d.key_cols, d.cut, grid)
    if key_mask is None:
        return Operands(query, key, key_at, None)
    pair = key_mask if isinstance(key_mask, tuple) else (key_mask, key_mask)
    of_maps = [
        _cut_mask(pair[0 if tile_map.perspective == "local" else 1], query.shape[0], grid, tokens, d.cut)
        for tile_map in maps[key_role]
    ]
    mask = of_maps[0] if len(of_maps) == 1 else of_maps[0] | of_maps[1]
    live = [i * grid.cols + j for i in d.key_rows.tiles for j in d.key_cols.tiles]
    return Operands(query, key, key_at, select(mask, 1, live))


def _take_sum(maps: list[TileMap], rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    taken = [take_tiles(tile_map, rows, cols, cut, grid) for tile_map in maps]
    return taken[0] if len(taken) == 1 else taken[0] + taken[1]


def _smooth(tile_map: TileMap, grid: TileGrid) -> TileMap:
    """The whole map, low-pass filtered, as stride tiles."""
    whole = recombine(tile_map.tiles, grid, tile_map.perspective, data_format="channels_last")
    smooth = crop(low_pass(whole, grid, data_format="channels_last"), grid, "global", data_format="channels_last")
    return TileMap(smooth, "global", {tile: tile for tile in range(grid.num_tiles)})


def _cut_mask(mask: Tensor, batch: int, grid: TileGrid, tokens: Size, cut: Perspective) -> Tensor:
    """A raster mask as (B or 1, rows*cols, h*w) booleans in the order of the tiles' tokens."""
    size = grid.map_size(tokens)
    if mask.dtype != torch.bool or tuple(mask.shape) not in (size, (batch, *size)):
        raise ValueError(
            f"key_mask of shape {tuple(mask.shape)} and type {mask.dtype}: must be boolean, True for real cells, of "
            f"shape {(batch, *size)} or {size}, the token map of the whole grid."
        )
    return crop(mask.reshape(-1, *size, 1), grid, cut, data_format="channels_last").flatten(2)
