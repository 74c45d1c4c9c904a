"""The tiles of a map as a view of it, and the map as a view of its tiles: splitting and permuting copy nothing.

Dimensions are (batch, [channels first], height, width, [channels last]), with any number of each kind. ``batch`` counts
those of the batch, ``plane`` is where the height stands.
"""

from __future__ import annotations

from torch import Tensor

from dualview.geometry import Perspective, TileGrid, split_axis


def tile_view(x: Tensor, grid: TileGrid, perspective: Perspective, batch: int, plane: int) -> Tensor:
    """(batch, [C], H, W, [D]) -> (batch, rows, cols, [C], h, w, [D])"""
    h, w = grid.tile_size((x.shape[plane], x.shape[plane + 1]))
    split = x.unflatten(plane + 1, split_axis(perspective, grid.cols, w).factors)
    split = split.unflatten(plane, split_axis(perspective, grid.rows, h).factors)
    tiles: Tensor = split.permute(_tile_order(split.dim(), perspective, batch, plane))
    return tiles


def map_view(tiles: Tensor, perspective: Perspective, batch: int, plane: int) -> Tensor:
    """(batch, rows, cols, [C], h, w, [D]) -> (batch, [C], both factors of H, both of W, [D]), for `merged` to close up.

    ``plane`` is that of the map.
    """
    order = _tile_order(tiles.dim(), perspective, batch, plane)
    return tiles.permute([order.index(dim) for dim in range(len(order))])


def merged(split: Tensor, plane: int) -> Tensor:
    """A contiguous tensor with height and width in two factors each as a map: (..., H, W, [D])."""
    whole: Tensor = split.flatten(plane + 2, plane + 3).flatten(plane, plane + 1)
    return whole


def _tile_order(dims: int, perspective: Perspective, batch: int, plane: int) -> list[int]:
    """The permutation of (batch, [C], height factors, width factors, [D]) to (batch, rows, cols, [C], h, w, [D])."""
    tile = split_axis(perspective, tiles=1, size=1).tile_factor
    row, col, h, w = plane + tile, plane + 2 + tile, plane + 1 - tile, plane + 3 - tile
    return [*range(batch), row, col, *range(batch, plane), h, w, *range(plane + 4, dims)]
