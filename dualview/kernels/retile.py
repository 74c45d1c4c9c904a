"""Move maps between raster order, local tiles and stride tiles: the crops, their inverse, and re-tiling.

Bytes of one copy: every element is read once and written once, 2 * B * H * W * D * itemsize. A map of 72 x 72 tokens,
D = 1024, bfloat16: 21.2 MB, so 7.1 us at the 2.98 TB/s that an H100 copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualview.arguments import check_choice
from dualview.geometry import LAYOUTS, DataFormat, GridLike, Layout, Size, TileGrid
from dualview.kernels import dispatch
from dualview.views import batch_of, shape_in, tile_size, view_in

TOKENS = "it moves tokens, and these channels come first: pass data_format='channels_last'"
"""Why the kernel cannot run on images. A call that asks for it is refused; `use_backend` means token maps only."""


def retile(
    x: Tensor,
    source: Layout,
    target: Layout,
    grid: GridLike,
    *,
    data_format: DataFormat = "channels_last",
    backend: dispatch.Backend | None = None,
    name: str = "x",
) -> Tensor:
    """A map in another layout; always a new contiguous tensor.

    Args:
        x: The map, of any strides.
        source: Its layout: "raster" order, or the tiles of the "local" or the "global" perspective.
        target: The layout of the result.
        grid: Rows and columns of tiles.
        data_format: Whether the channels come before or after height and width.
        backend: "auto", "torch" or "triton"; None for what `use_backend` or the environment says. Channels-first maps
            are moved by torch, whatever they say.
        name: What the caller calls the map.

    Shape:
        - channels_last: (..., rows*h, cols*w, D) in raster order, (..., rows*cols, h, w, D) as tiles
        - channels_first: (..., C, rows*h, cols*w) in raster order, (..., rows*cols, C, h, w) as tiles

    Raises:
        ValueError: The map does not fit the grid, or an argument is not one of the choices.
        TypeError: ``x`` is no tensor.
        RuntimeError: ``backend`` is "triton", and the kernel cannot run.

    Example:
        >>> tiles = torch.zeros(2, 6, 4, 5, 8)
        >>> retile(tiles, "local", "raster", (2, 3)).shape
        torch.Size([2, 8, 15, 8])
    """
    source, target = check_choice(source, "source", LAYOUTS), check_choice(target, "target", LAYOUTS)
    grid = TileGrid.of(grid)
    tile = tile_size(x, source, grid, data_format, name)
    first = data_format == "channels_first"
    refused = (TOKENS,) if first else ()
    if (first and backend is None) or dispatch.choose("retile", x, backend=backend, refused=refused).name == "torch":
        return _by_torch(x, source, target, grid, tile, data_format)
    batch = batch_of(x, source)
    moved: Tensor = _retile(x.reshape(batch.numel(), *x.shape[len(batch) :]), source, target, grid.rows, grid.cols)
    return moved.reshape(*batch, *moved.shape[1:])


def _by_torch(
    x: Tensor, source: Layout, target: Layout, grid: TileGrid, tile: Size, data_format: DataFormat = "channels_last"
) -> Tensor:
    """One copy; from perspective to perspective two, through raster order, where tiles hold no whole cells."""
    of_perspectives = source != target and "raster" not in (source, target)
    if of_perspectives and (tile[0] % grid.rows or tile[1] % grid.cols):
        x, source = _by_torch(x, source, "raster", grid, tile, data_format), "raster"
    view = x if source == target else view_in(target, x, source, grid, tile, data_format)
    copy = view.clone(memory_format=torch.contiguous_format)
    return copy.view(shape_in(target, x, source, grid, tile, data_format))


SCHEMA = "(Tensor x, str source, str target, int rows, int cols) -> Tensor"


@torch.library.custom_op("dualview::retile", mutates_args=(), schema=SCHEMA)
def _retile(x: Tensor, source: Layout, target: Layout, rows: int, cols: int) -> Tensor:
    """The kernel, for a map with one batch dimension and the channels last."""
    grid = TileGrid(rows, cols)
    tile = tile_size(x, source, grid, "channels_last")
    if not dispatch.runs_on(x):
        return _by_torch(x, source, target, grid, tile)
    from dualview.kernels.retile_triton import move

    return move(x, source, target, grid, tile)


@_retile.register_fake
def _(x: Tensor, source: Layout, target: Layout, rows: int, cols: int) -> Tensor:
    grid = TileGrid(rows, cols)
    tile = tile_size(x, source, grid, "channels_last")
    return x.new_empty(shape_in(target, x, source, grid, tile, "channels_last"))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.source, ctx.target, ctx.rows, ctx.cols = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _retile(grad, ctx.target, ctx.source, ctx.rows, ctx.cols), None, None, None, None


_retile.register_autograd(_backward, setup_context=_remember)
