"""The plan of a whole dual-view encoder: what of it is computed for an image.

Which sub-images are encoded (those that are needed, and each distinct one once), by which layers, and what is enhanced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.geometry import Size, TileGrid, tile_slice
from dualview.ops.direct_readout import DirectReadout
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.low_pass import low_pass as smooth
from dualview.ops.plan import DirectPlan, EnhancePlan, LayerPlan, LiveTiles, constant, planning


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
        local: Places among ``views`` of the live local tiles.
        stride: Places of the live stride tiles.
        low: Place of the low-resolution view, None if it is not needed.
        layers: Which layers of the encoder are run; None if it does not say.
        enhance: What the dem computes, by the very plan that it goes by; None if there is none, if it has no plan, or
            if how many tokens a tile gives is not known before it is encoded.
    """

    views: tuple[View, ...]
    live: LiveTiles
    local: tuple[int, ...]
    stride: tuple[int, ...]
    low: int | None
    layers: LayerPlan | None = None
    enhance: EnhancePlan | DirectPlan | None = None


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
    """
    grid = TileGrid(*pair)
    exact = all(n == 1 or (n % 2 == 1 and side % size == 0) for n, side, size in zip(grid, image, tile, strict=True))
    smoothed = low_pass and grid.num_tiles > 1

    def samples(view: View) -> object:
        if full:
            return view
        if view.kind != "low":
            slices = view_slices(view, grid, tile)
            return tuple((s.start, s.step) for s in slices), smoothed and view.kind == "global"
        return (tuple(((n - 1) // 2, n) for n in grid), False) if exact else view

    places: dict[object, int] = {}
    views: list[View] = []

    def place(view: View) -> int:
        key = samples(view)
        if key not in places:
            places[key] = len(views)
            views.append(view)
        return places[key]

    local = tuple(place(View("local", index)) for index in local_tiles)
    stride = tuple(place(View("global", index)) for index in stride_tiles)
    low_place = place(View("low", 0)) if low else None
    return ViewPlan(tuple(views), LiveTiles(local_tiles, stride_tiles), local, stride, low_place)


def plan_encoder(
    encoder: object,
    dem: nn.Module | None,
    grid: TileGrid,
    tile: Size,
    image: Size,
    *,
    low: bool,
    low_pass: bool,
    tokens: Size | None = None,
) -> ViewPlan:
    """What is computed for an image of a size, asked of each stage from the last to the first.

    Args:
        encoder: May declare ``layer_plan()``, the layers that it runs, and ``token_map(tile)``, the tokens it gives.
        dem: A module with a plan, any other, or None.
        grid: Rows and columns of tiles.
        tile: Tile size (h, w) in pixels.
        image: Size (H, W) of the image in pixels.
        low: Whether the low-resolution view is needed.
        low_pass: Whether the canvas is smoothed before the stride crop.
        tokens: Token map of one tile, for ``enhance``, where the encoder does not say it.
    """
    everything = tuple(range(grid.num_tiles))
    smallest = (grid.rows, grid.cols)  # from so many tokens a tile on, the live tiles are the same
    enhance: EnhancePlan | DirectPlan | None = None
    if dem is None:
        live = LiveTiles((), ())
    elif isinstance(dem, (DualPerspectiveEnhance, DirectReadout)) and planning():
        live = dem.plan(grid, smallest).live
    else:
        live = LiveTiles(everything, everything)
    if isinstance(dem, (DualPerspectiveEnhance, DirectReadout)):
        token_map = getattr(encoder, "token_map", None)
        known = tokens or (None if token_map is None else token_map(tile))
        enhance = None if known is None else dem.plan(grid, known)
    plan = plan_views(
        (grid.rows, grid.cols), tile, image, live.local, live.stride, low=low, low_pass=low_pass, full=not planning()
    )
    layers = getattr(encoder, "layer_plan", None)
    # torch.compile traces this, but not dataclasses.replace.
    return ViewPlan(
        plan.views, plan.live, plan.local, plan.stride, plan.low, None if layers is None else layers(), enhance
    )


def cut_views(images: Tensor, grid: TileGrid, plan: ViewPlan, tile: Size, low_pass: bool) -> Tensor:
    """The sub-images to encode, (B, V, 3, h, w)."""
    canvas = smoothed = None
    found = []
    for view in plan.views:
        if view.kind == "low":
            found.append(interpolate(images, tile))
            continue
        canvas = interpolate(images, grid.map_size(tile)) if canvas is None else canvas
        source = canvas
        if view.kind == "global" and low_pass:
            source = smoothed = smooth(canvas, grid) if smoothed is None else smoothed
        rows, cols = view_slices(view, grid, tile)
        found.append(source[..., rows, cols])
    return torch.stack(found, dim=1)


def interpolate(images: Tensor, size: Size) -> Tensor:
    """Bicubic without antialiasing, in at least float32, as the released model does. (B, 3, H, W) -> (B, 3, *size)"""
    if tuple(images.shape[-2:]) == size:
        return images
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(precise, size, mode="bicubic", align_corners=False, antialias=False).to(images.dtype)
