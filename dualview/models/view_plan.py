"""The plan of a whole dual-view encoder: what of it is computed for an image.

Which sub-images are encoded (those that are needed, and each distinct one once), by which layers, and what is enhanced.
A dem and an encoder take part by what they declare (`dualview.models.parts`), whatever their class. What declares
nothing is computed in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.arguments import check_size
from dualview.geometry import LiveTiles, Size, TileGrid, tile_slice
from dualview.models.parts import LowRes, ViewOptions, all_tiles
from dualview.ops.low_pass import low_pass as smooth
from dualview.ops.planned.live import LayerPlan, constant


class View(NamedTuple):
    """A sub-image to encode: a tile of a perspective by its index, or the low-resolution view ("low", 0)."""

    kind: Literal["local", "global", "low"]
    tile: int


@dataclass(frozen=True)
class ViewPlan:
    """What is computed for one image, from pixels to the tokens that are read.

    Attributes:
        views: The distinct sub-images that are encoded.
        live: Which tiles they provide.
        local: Index in ``views`` of each live local tile.
        stride: Index of each live stride tile.
        low: Index of the low-resolution view, None if it is not needed.
        layers: Which layers of the encoder are run; None if it does not say.
        enhance: What the dem computes, by its own plan; None if there is none, if it has no plan, or if how many tokens
            a tile gives is not known before it is encoded.
    """

    views: tuple[View, ...]
    live: LiveTiles
    local: tuple[int, ...]
    stride: tuple[int, ...]
    low: int | None
    layers: LayerPlan | None = None
    enhance: Any = None


def view_slices(view: View, grid: TileGrid, tile: Size) -> tuple[slice, slice]:
    """The rows and columns of the canvas that a tile holds."""
    assert view.kind != "low", "the low-resolution view is interpolated"
    i, j = divmod(view.tile, grid.cols)
    return tile_slice(view.kind, i, grid.rows, tile[0]), tile_slice(view.kind, j, grid.cols, tile[1])


@constant
def plan_views(
    pair: tuple[int, int],
    tile: Size,
    image: Size,
    local_tiles: tuple[int, ...],
    stride_tiles: tuple[int, ...],
    *,
    low: bool,
    low_pass: bool,
    full: bool,
) -> ViewPlan:
    """Find sub-images that are one and the same, so that each is encoded once.

    Along an axis every view samples the canvas at start + step * u: a local tile i at i h + u, a stride tile i at
    i + n u, the low-resolution view (bicubic without antialiasing) at (n - 1) / 2 + n u. Views that sample alike are
    one. For the low-resolution view that needs positions which floating point represents: odd n, and an image that is a
    whole multiple of the tile (or n = 1).

    Args:
        pair: Rows and columns of tiles (a plain pair: a compiler takes it as a constant).
        tile: Tile size (h, w) in pixels.
        image: Size (H, W) of the image that both the canvas and the low-resolution view are interpolated from.
        local_tiles: The local tiles that are needed.
        stride_tiles: The stride tiles that are needed.
        low: Whether the low-resolution view is needed.
        low_pass: Whether the canvas is smoothed before the stride crop.
        full: Encode every view, as the equations are written.

    Raises:
        ValueError: A tile is none of the grid's.
    """
    grid = TileGrid(*pair)
    if unknown := sorted({index for index in local_tiles + stride_tiles if not 0 <= index < grid.num_tiles}):
        raise ValueError(
            f"the plan of the dem names tiles {unknown} of a grid of {grid}: they must be 0 to {grid.num_tiles - 1}."
        )
    exact = all(n == 1 or (n % 2 == 1 and side % size == 0) for n, side, size in zip(grid, image, tile, strict=True))
    smoothed = low_pass and grid.num_tiles > 1

    def samples(view: View) -> object:
        if full:
            return view
        if view.kind != "low":
            slices = view_slices(view, grid, tile)
            return tuple((s.start, s.step) for s in slices), smoothed and view.kind == "global"
        return (tuple(((n - 1) // 2, n) for n in grid), False) if exact else view

    index: dict[object, int] = {}
    views: list[View] = []

    def index_of(view: View) -> int:
        key = samples(view)
        if key not in index:
            index[key] = len(views)
            views.append(view)
        return index[key]

    local = tuple(index_of(View("local", tile)) for tile in local_tiles)
    stride = tuple(index_of(View("global", tile)) for tile in stride_tiles)
    low_index = index_of(View("low", 0)) if low else None
    return ViewPlan(tuple(views), LiveTiles(local_tiles, stride_tiles), local, stride, low_index)


def gate_of(dem: object) -> Tensor | None:
    """The per-channel gate of a dem that has one: a tensor by the name ``gate``."""
    gate = getattr(dem, "gate", None)
    return gate if isinstance(gate, Tensor) else None


def method_of(stage: object, name: str) -> Any:
    """A method that a stage declares (`dualview.models.parts`), None if it does not."""
    method = getattr(stage, name, None)
    return method if callable(method) else None


def plan_encoder(
    encoder: object,
    dem: nn.Module | None,
    options: ViewOptions,
    grid: TileGrid,
    image: Size,
    *,
    full: bool,
    tokens: Size | None = None,
) -> ViewPlan:
    """What is computed for an image of a size, asked of each stage from the last to the first.

    Args:
        encoder: May be a `DeclaresLayers` and a `DeclaresTokens`.
        dem: May be a `DeclaresTiles`, or None.
        options: Tile size, mix and filter.
        grid: Rows and columns of tiles.
        image: Size (H, W) of the image in pixels.
        full: Whether everything is computed, as the equations are written.
        tokens: Token map of one tile, for ``enhance``, where the encoder does not say it.

    Raises:
        ValueError: A size is not positive, or the dem names tiles that the grid has not.
    """
    image, plan_of_dem, enhance = check_size(image, "image size"), method_of(dem, "plan"), None
    if dem is None:
        live = LiveTiles((), ())
    elif full or plan_of_dem is None:
        live = all_tiles(grid)
    else:
        needed = plan_of_dem(grid, (grid.rows, grid.cols)).live
        live = LiveTiles(tuple(needed[0]), tuple(needed[1]))  # torch.compile (2.11) indexes it, but does not unpack it
    if plan_of_dem is not None:
        token_map = method_of(encoder, "token_map")
        known = tokens if tokens is not None or token_map is None else token_map(options.tile)
        enhance = None if known is None else plan_of_dem(grid, check_size(known, "tokens"))
    low = uses_low_view(dem, options.low_res)
    plan = plan_views((grid.rows, grid.cols), options.tile, image, *live, low=low, low_pass=options.low_pass, full=full)
    layers = method_of(encoder, "layer_plan")
    # torch.compile traces this, but not dataclasses.replace.
    return ViewPlan(
        plan.views, plan.live, plan.local, plan.stride, plan.low, None if layers is None else layers(), enhance
    )


def uses_low_view(dem: nn.Module | None, low_res: LowRes) -> bool:
    """Whether the features of the low-resolution view take part."""
    return low_res is not None or dem is None or gate_of(dem) is not None


def cut_views(images: Tensor, grid: TileGrid, plan: ViewPlan, options: ViewOptions) -> Tensor:
    """The sub-images to encode, (B, V, 3, h, w)."""
    canvas = smoothed = None
    found = []
    for view in plan.views:
        if view.kind == "low":
            found.append(interpolate(images, options.tile))
            continue
        canvas = interpolate(images, grid.map_size(options.tile)) if canvas is None else canvas
        source = canvas
        if view.kind == "global" and options.low_pass:
            source = smoothed = smooth(canvas, grid) if smoothed is None else smoothed
        rows, cols = view_slices(view, grid, options.tile)
        found.append(source[..., rows, cols])
    return torch.stack(found, dim=1)


def interpolate(images: Tensor, size: Size) -> Tensor:
    """Bicubic without antialiasing, in at least float32, as the released model does. (B, 3, H, W) -> (B, 3, *size)"""
    if tuple(images.shape[-2:]) == size:
        return images
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(precise, size, mode="bicubic", align_corners=False, antialias=False).to(images.dtype)
