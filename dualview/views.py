"""How maps and their tiles lie in tensors, and views of one in the order of the other: they copy nothing.

A map has the dimensions (batch, [C], H, W, [D]), its tiles have (batch, rows*cols, [C], h, w, [D]): any number of batch
dimensions, and one of channels, first or last. H and W are products of factors; tiles have the same factors in another
order. A view has every factor as a dimension of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from os import PathLike
from typing import get_args

import torch
from torch import Tensor

from dualview.geometry import (
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

DIMENSIONS = {
    (True, "channels_first"): "(..., C, H, W)",
    (True, "channels_last"): "(..., H, W, D)",
    (False, "channels_first"): "(..., rows*cols, C, h, w)",
    (False, "channels_last"): "(..., rows*cols, h, w, D)",
}
"""The dimensions of a map (True) and of tiles (False)."""


def check_data_format(data_format: str) -> DataFormat:
    """``data_format`` if it is one of the two, else a ValueError."""
    if data_format not in get_args(DataFormat):
        raise ValueError(f'data_format={data_format!r}: must be "channels_first" or "channels_last".')
    return data_format  # type: ignore[return-value]  # narrowed by the check above


def check_tensors(**named: object) -> None:
    """Raise a TypeError that says how to convert it for the first argument that is no tensor."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {_conversion(x)}.")


def check_list(tensors: Sequence[object], name: str) -> None:
    """Raise a TypeError unless this is a list, or another sequence, of tensors."""
    if isinstance(tensors, str) or not isinstance(tensors, Sequence):
        check_tensors(**{name: tensors})
    check_tensors(**{f"{name}[{i}]": x for i, x in enumerate(tensors)})


def _conversion(x: object) -> str:
    """The type of ``x``, and the call that makes a tensor of it."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    remedy = "torch.as_tensor(x)"
    if kind.startswith("PIL."):
        remedy = "dualview.load_image(x)"
    elif kind.startswith("numpy."):
        remedy = "torch.from_numpy(x), or dualview.load_image(x) for a picture of height x width x channels"
    elif isinstance(x, str | PathLike):
        remedy = "dualview.load_image(x)"
    elif kind.startswith("dualview."):
        remedy = "take its tensors, x.data or x.local and x.stride"
    elif isinstance(x, list | tuple) and x and isinstance(x[0], Tensor):
        remedy = "torch.stack(x)"
    return f"{kind}. To convert it: {remedy}"


def check_map(x: Tensor, layout: Layout, data_format: str) -> None:
    """Raise an error unless ``x`` can be a map in this layout.

    Raises:
        TypeError: ``x`` is no tensor.
        ValueError: ``data_format`` is unknown, ``x`` has too few dimensions, or it is one image whose channels come
            last where they should come first: more than 16 channels, and a width of 3 or 4.
    """
    check_tensors(x=x)
    expected = DIMENSIONS[layout == "raster", check_data_format(data_format)]
    if x.dim() < expected.count(","):
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} has too few dimensions for data_format={data_format!r}: expected "
            f"{expected} with any leading batch dimensions."
        )
    one_image = layout == "raster" and x.dim() == 3 and data_format == "channels_first"
    if one_image and x.shape[0] > 16 and x.shape[2] in (3, 4):
        raise ValueError(
            f"an image of shape {tuple(x.shape)} under data_format='channels_first' has {x.shape[0]} channels and a "
            f"width of {x.shape[2]}: its channels seem to come last. Pass data_format='channels_last', or "
            "x.movedim(-1, 0); where the shape is meant, pass x[None]."
        )


def grid_for(x: Tensor, grid: GridLike | None, tile: SizeLike | None, data_format: str) -> TileGrid:
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
    width: int | None = None,
) -> None:
    """Raise an error unless these are the present tiles of the local and of the global map of one grid.

    Raises:
        TypeError: One of them is no tensor.
        ValueError: Their counts, sizes or widths do not fit the grid, the module or each other.
    """
    check_tensors(local_tiles=local_tiles, stride_tiles=stride_tiles)
    shapes = tuple(local_tiles.shape), tuple(stride_tiles.shape)
    fits = all(
        len(shape) == 5 and shape[1] == len(tiles) and width in (None, shape[4])
        for shape, tiles in zip(shapes, present, strict=True)
    )
    if not fits or shapes[0][0] != shapes[1][0] or shapes[0][2:] != shapes[1][2:]:
        expected = " and ".join(f"(B, {len(tiles)}, h, w, {width or 'D'})" for tiles in present)
        raise ValueError(
            f"got local_tiles {shapes[0]} and stride_tiles {shapes[1]} for a grid of {grid}: they must be {expected}, "
            "rows*cols tiles each unless `live` names those present; B, h, w and D must be the same in both. Flattened "
            "tokens need .unflatten(2, (h, w))."
        )


def rectangle(inner: Size, outer: Size, device: torch.device) -> Tensor:
    """A mask of size ``outer``: True in the first rows and columns, as many as ``inner`` says."""
    rows, cols = (torch.arange(all_of_it, device=device) < part for part, all_of_it in zip(inner, outer, strict=True))
    return rows[:, None] & cols


def in_order(groups: Sequence[Sequence[int]], grids: Sequence[TileGrid], results: Sequence[Tensor]) -> Tensor:
    """Results of groups of images as one batch, given the places of the images of each group and their grid.

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
    rows = dict(zip((place for group in groups for place in group), torch.cat(list(results)), strict=True))
    return torch.stack([rows[place] for place in range(len(rows))])


def tile_size(x: Tensor, layout: Layout, grid: TileGrid, data_format: DataFormat) -> Size:
    """The size (h, w) of the tiles of a map in this layout.

    Raises:
        ValueError: ``x`` is no map of this grid, or ``data_format`` is unknown.
    """
    check_map(x, layout, data_format)
    h, w = x.shape[-2:] if data_format == "channels_first" else x.shape[-3:-1]
    if layout == "raster":
        return grid.tile_size((h, w))
    if x.shape[-4] != grid.num_tiles:
        raise ValueError(
            f"got {x.shape[-4]} tiles (dimension {x.dim() - 4} of {tuple(x.shape)}) for a grid of {grid}: it needs "
            f"rows*cols = {grid.num_tiles}. Pass all tiles of each image, and the grid they were cut with."
        )
    if h < 1 or w < 1:
        raise ValueError(f"got tiles of {h} x {w} (height x width): a tile must hold at least one cell.")
    return h, w


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


def view_in(target: Layout, x: Tensor, source: Layout, grid: TileGrid, tile: Size, data_format: DataFormat) -> Tensor:
    """``x`` in the order of another layout, as a view.

    Between the perspectives there is one only where tiles hold whole cells: h divisible by rows, and w by cols.

    Shape:
        (batch, rows, cols, [C], h, w, [D]) from a map; else every factor of h, w, H or W is a dimension
    """
    (rows, cols), (h, w) = grid, tile
    factors: tuple[int, ...] = rows, h // rows, rows, cols, w // cols, cols
    if target == "raster" or source == "raster":
        perspective: Perspective = source if target == "raster" else target  # type: ignore[assignment]
        factors = split_axis(perspective, rows, h).factors + split_axis(perspective, cols, w).factors
    here, there = ORDERS[source, target, data_format]
    batch = batch_of(x, source)
    sizes = *factors, x.shape[-3 if data_format == "channels_first" else -1]
    split = x.view(*batch, *[sizes[factor] for factor in here])
    return split.permute(*range(len(batch)), *there)


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
    for source, target in permutations(get_args(Layout), 2)
    for data_format in get_args(DataFormat)
}
"""Of every move from layout to layout: `_orders`, made once, for a call has no time for it."""
