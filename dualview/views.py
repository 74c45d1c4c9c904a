"""How maps and their tiles lie in tensors, and views of one in the order of the other: they copy nothing.

A map has the dimensions (batch, [C], H, W, [D]), its tiles have (batch, rows*cols, [C], h, w, [D]): any number of batch
dimensions, and one of channels, first or last. H and W are products of factors; tiles have the same factors in another
order. A view has every factor as a dimension of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor, nn

from dualview.arguments import check_choice, check_size, shown
from dualview.geometry import (
    DATA_FORMATS,
    LAYOUTS,
    DataFormat,
    GridLike,
    Layout,
    Perspective,
    Size,
    SizeLike,
    TileGrid,
    grid_or_tile,
    split_axis,
)
from dualview.tensors import check_floats, check_tensors

DIMENSIONS = {
    (True, "channels_first"): "(..., C, H, W)",
    (True, "channels_last"): "(..., H, W, D)",
    (False, "channels_first"): "(..., rows*cols, C, h, w)",
    (False, "channels_last"): "(..., rows*cols, h, w, D)",
}
"""The dimensions of a map (True) and of tiles (False)."""


def check_map(x: Tensor, layout: Layout, data_format: DataFormat, name: str = "x") -> None:
    """Raise an error unless ``x`` can be a map in this layout.

    Args:
        x: The map.
        layout: How it lies in memory.
        data_format: Whether the channels come before or after height and width.
        name: What the caller calls it.

    Raises:
        TypeError: ``x`` is no tensor.
        ValueError: ``data_format`` is unknown, ``x`` has too few dimensions, or it is one image whose channels come
            last where they should come first: more than 16 channels, and a width of 3 or 4.
    """
    check_tensors(**{name: x})
    expected = DIMENSIONS[layout == "raster", check_choice(data_format, "data_format", DATA_FORMATS)]
    if x.dim() < expected.count(","):
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} has too few dimensions for data_format={data_format!r}: expected "
            f"{expected} with any leading batch dimensions."
        )
    if 0 in (x.shape[-2:] if data_format == "channels_first" else x.shape[-3:-1]):
        raise ValueError(f"{name} of shape {tuple(x.shape)} has no cells: height and width must be at least 1.")
    one_image = layout == "raster" and x.dim() == 3 and data_format == "channels_first"
    if one_image and x.shape[0] > 16 and x.shape[2] in (3, 4):
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} under data_format='channels_first' has {x.shape[0]} channels and a "
            f"width of {x.shape[2]}: its channels seem to come last. Pass data_format='channels_last', or "
            "x.movedim(-1, 0); where the shape is meant, pass x[None]."
        )


def grid_for(x: Tensor, grid: GridLike | None, tile: SizeLike | None, data_format: DataFormat) -> TileGrid:
    """The grid itself, or the one that cuts a map into tiles of the size.

    Raises:
        ValueError: Both or neither are given, or ``x`` is no map of a whole number of tiles.
        TypeError: ``x`` is no tensor.
    """
    grid, tile = grid_or_tile(grid, tile)
    if grid is not None:
        return grid
    assert tile is not None, "one of the two is given"
    check_map(x, "raster", data_format)
    return TileGrid.whole(tuple(x.shape[-2:] if data_format == "channels_first" else x.shape[-3:-1]), tile)


def check_tile_pair(
    local_tiles: Tensor,
    stride_tiles: Tensor,
    grid: TileGrid,
    present: tuple[Sequence[int], Sequence[int]],
    of: nn.Module | None = None,
    width: int | None = None,
) -> Size:
    """The size (h, w) of these tiles, the present ones of the local and of the global map of one grid.

    Args:
        local_tiles: Tiles of the local map.
        stride_tiles: Tiles of the global map.
        grid: Rows and columns of tiles.
        present: Which of them are given.
        of: The module whose weights they meet, if it has some.
        width: The width that it takes.

    Raises:
        TypeError: One of them is no tensor, or not of the type or the device of the other and of the weights.
        ValueError: Their counts, sizes or widths do not fit the grid, the module or each other.
    """
    check_floats(of, local_tiles=local_tiles, stride_tiles=stride_tiles)
    shapes = tuple(local_tiles.shape), tuple(stride_tiles.shape)
    fits = all(
        len(shape) == 5 and shape[1] == len(tiles) and width in (None, shape[4])
        for shape, tiles in zip(shapes, present, strict=True)
    )
    if not fits or shapes[0][0] != shapes[1][0] or shapes[0][2:] != shapes[1][2:] or 0 in shapes[0][2:4]:
        expected = " and ".join(f"(B, {len(tiles)}, h, w, {width or 'D'})" for tiles in present)
        raise ValueError(
            f"got local_tiles {shapes[0]} and stride_tiles {shapes[1]} for a grid of {grid}: they must be {expected}, "
            "rows*cols tiles each unless `live` names those present; B, h, w and D must be the same in both, h and w "
            "at least 1, the channels last. Flattened tokens need .unflatten(2, (h, w))."
        )
    return check_size(local_tiles.shape[2:4], "token map")


def rectangle(inner: Size, outer: Size, device: torch.device) -> Tensor:
    """A mask of size ``outer``: True in the first rows and columns, as many as ``inner`` says."""
    rows, cols = (torch.arange(all_of_it, device=device) < part for part, all_of_it in zip(inner, outer, strict=True))
    return rows[:, None] & cols


def in_order(groups: Sequence[Sequence[int]], grids: Sequence[TileGrid], results: Sequence[Tensor]) -> Tensor:
    """Results of groups of images as one batch, given the indices of the images of each group and their grid.

    Raises:
        ValueError: The results are full maps of different grids.
    """
    if len({result.shape[1:] for result in results}) > 1:
        raise ValueError(
            f"full maps of different grids ({', '.join(str(g) for g in dict.fromkeys(grids))}) have different sizes "
            'and cannot be one batch: use a readout other than "none", or one grid per call.'
        )
    if len(results) == 1:
        return results[0]
    rows = dict(zip((index for group in groups for index in group), torch.cat(list(results)), strict=True))
    return torch.stack([rows[index] for index in range(len(rows))])


def per_token(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer that works token by token, given at most three dimensions: others than torch's own take no more.

    The batch stays the first of them, for adapters of each row.

    Shape:
        x: (B, ..., D) -> (B, ..., D')
    """
    out: Tensor = layer(x if x.dim() <= 3 else x.flatten(1, -2))
    return out if x.dim() <= 3 else out.unflatten(1, x.shape[1:-1])


def tile_size(x: Tensor, layout: Layout, grid: TileGrid, data_format: DataFormat, name: str = "x") -> Size:
    """The size (h, w) of the tiles of a map in this layout; arguments as for `check_map`.

    Raises:
        ValueError: ``x`` is no map of this grid, or ``data_format`` is unknown.
    """
    check_map(x, layout, data_format, name)
    h, w = x.shape[-2:] if data_format == "channels_first" else x.shape[-3:-1]
    if layout == "raster":
        return grid.tile_of(h, w, name)
    if x.shape[-4] != grid.num_tiles:
        raise ValueError(
            f"{name} has {x.shape[-4]} tiles (dimension {x.dim() - 4} of {tuple(x.shape)}) for a grid of {grid}: it "
            f"needs rows*cols = {grid.num_tiles}. Pass all tiles of each image, and the grid they were cut with."
        )
    return h, w


def check_result_size(size: SizeLike, grid: TileGrid, tile: Size) -> None:
    """Raise a ValueError unless tiles of a size make the map that was asked for."""
    (h, w), made = tile, grid.map_size(tile)
    if made != check_size(size, "size"):
        raise ValueError(
            f"recombine got tiles of {h} x {w} (height x width) for a grid of {grid}, which make a map of {made}; "
            f"size={shown(size)} was asked for. Check the grid (rows first) and that the tiles are those of this map."
        )


def batch_of(x: Tensor, layout: Layout) -> torch.Size:
    """The batch dimensions of a map in this layout."""
    return x.shape[: x.dim() - (3 if layout == "raster" else 4)]


def shape_in(
    target: Layout, x: Tensor, source: Layout, grid: TileGrid, tile: Size, data_format: DataFormat
) -> tuple[int, ...]:
    """The shape of ``x`` in another layout."""
    first = data_format == "channels_first"
    plane = grid.map_size(tile) if target == "raster" else tile
    around = batch_of(x, source) if target == "raster" else (*batch_of(x, source), grid.num_tiles)
    return (*around, x.shape[-3], *plane) if first else (*around, *plane, x.shape[-1])


def split_in(
    target: Layout, x: Tensor, source: Layout, grid: TileGrid, tile: Size, data_format: DataFormat
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How ``x`` is seen in the order of another layout: the sizes of all factors, and their order.

    Between the perspectives that is possible only where tiles hold whole cells: h divisible by rows, and w by cols.
    """
    (rows, cols), (h, w) = grid, tile
    factors: tuple[int, ...] = rows, h // rows, rows, cols, w // cols, cols
    if target == "raster" or source == "raster":
        perspective: Perspective = source if target == "raster" else target  # type: ignore[assignment]
        factors = split_axis(perspective, rows, h).factors + split_axis(perspective, cols, w).factors
    here, there = ORDERS[source, target, data_format]
    batch = batch_of(x, source)
    sizes = *factors, x.shape[-3 if data_format == "channels_first" else -1]
    return (*batch, *[sizes[factor] for factor in here]), (*range(len(batch)), *there)


def view_in(target: Layout, x: Tensor, source: Layout, grid: TileGrid, tile: Size, data_format: DataFormat) -> Tensor:
    """``x`` in the order of another layout, as a view; see `split_in`.

    Shape:
        (batch, rows, cols, [C], h, w, [D]) from a map; else every factor of h, w, H or W is a dimension
    """
    sizes, order = split_in(target, x, source, grid, tile, data_format)
    return x.view(sizes).permute(order)


def _order(layout: Layout, factors: int, data_format: DataFormat) -> list[int]:
    """The factors of a height (0, 1, ...), those of a width (the next) and the channels, in the order of a layout."""
    rows, cols, channels = list(range(factors)), list(range(factors, 2 * factors)), [2 * factors]
    tiles = []
    if layout != "raster":
        of_tiles = -split_axis(layout, tiles=1, size=1).tile_factor  # the first factor or the last
        tiles = [rows.pop(of_tiles), cols.pop(of_tiles)]
    return [*tiles, *channels, *rows, *cols] if data_format == "channels_first" else [*tiles, *rows, *cols, *channels]


def _orders(source: Layout, target: Layout, data_format: DataFormat) -> tuple[list[int], list[int]]:
    """The factors as the source has them, and the dimensions of that, counted from the last, as the target has them."""
    factors = 2 if "raster" in (source, target) else 3
    here, there = (_order(layout, factors, data_format) for layout in (source, target))
    return here, [here.index(factor) - len(here) for factor in there]


ORDERS = {
    (source, target, data_format): _orders(source, target, data_format)
    for source, target in permutations(LAYOUTS, 2)
    for data_format in DATA_FORMATS
}
"""Of every move from layout to layout: `_orders`, made once, for a call has no time for it."""
