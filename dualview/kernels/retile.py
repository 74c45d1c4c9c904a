"""Move maps between raster order, local tiles and stride tiles: the crops, their inverse, and re-tiling.

Bytes of one copy: every element is read once and written once, 2 * B * H * W * D * itemsize. A map of 72 x 72 tokens,
D = 1024, bfloat16: 21.2 MB, so 7.1 us at the 2.98 TB/s that an H100 copies.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dualview.arguments import check_choice
from dualview.geometry import LAYOUTS, DataFormat, GridLike, Layout, Size, TileGrid
from dualview.kernels import dispatch
from dualview.views import batch_of, shape_in, split_in, tile_size

LEAST_BYTES = 2**27
"""Maps from which on the kernel takes less time than torch in eager code; `dispatch.MEASURED` has the figures."""


class Move(NamedTuple):
    """How a map of one shape gets into another layout.

    Attributes:
        source: Its layout.
        target: The layout of the result.
        grid: Rows and columns of tiles.
        tile: Their size.
        data_format: Whether the channels come before or after height and width.
        one_batch: Shape of the map with one batch dimension.
        shape: Of the result.
        sizes: The map, seen with each factor as a dimension; empty where it takes two copies.
        order: These dimensions in the order of the result.
    """

    source: Layout
    target: Layout
    grid: TileGrid
    tile: Size
    data_format: DataFormat
    one_batch: tuple[int, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]


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
            are moved by torch, unless this argument is "triton".
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
    move = move_of(x, source, target, data_format, name, grid)
    return _by_kernel(x, move) if takes_kernel(x, move, backend) else _by_torch(x, move)


def takes_kernel(x: Tensor, move: Move, backend: dispatch.Backend | None = None) -> bool:
    """Whether the kernel makes a move; arguments and errors as for `retile`."""
    images = move.data_format == "channels_first"
    asked = backend if backend is not None else "torch" if images else dispatch.BACKEND.value()[0]
    slower = asked == "auto" and not (x.is_cuda and not images and _is_faster(x, move))
    return asked != "torch" and not slower and dispatch.choose("retile", x, backend=backend).name == "triton"


def move_of(x: Tensor, source: Layout, target: Layout, data_format: DataFormat, name: str, grid: GridLike) -> Move:
    """The move, of arguments that have been checked: those of an ordinary tensor once for every shape."""
    pair: Any = (grid.rows, grid.cols) if type(grid) is TileGrid else grid
    known = type(pair) is tuple and type(x) is Tensor and x.layout is torch.strided and not x.is_nested
    if known and not torch.compiler.is_dynamo_compiling() and torch._C._get_tracing_state() is None:
        try:
            return _known_move(x.shape, source, target, data_format, name, *pair)
        except TypeError:  # no pair of integers, or sizes that are symbols
            pass
    return _new_move(x, source, target, data_format, name, grid)


def _new_move(x: Tensor, source: Layout, target: Layout, data_format: DataFormat, name: str, grid: GridLike) -> Move:
    source, target = check_choice(source, "source", LAYOUTS), check_choice(target, "target", LAYOUTS)
    grid = TileGrid.of(grid)
    tile = tile_size(x, source, grid, data_format, name)
    batch, sizes, order = batch_of(x, source), tuple(x.shape), tuple(range(x.dim()))
    if source != target:
        whole = tile[0] % grid.rows == tile[1] % grid.cols == 0
        one = whole or "raster" in (source, target)
        sizes, order = split_in(target, x, source, grid, tile, data_format) if one else ((), ())
    shape = shape_in(target, x, source, grid, tile, data_format)
    one_batch = (prod(batch), *x.shape[len(batch) :])  # torch.Size.numel would make a batch of any size a number
    return Move(source, target, grid, tile, data_format, one_batch, shape, sizes, order)


@lru_cache(maxsize=1024, typed=True)
def _known_move(
    shape: torch.Size, source: Layout, target: Layout, data_format: DataFormat, name: str, rows: int, cols: int
) -> Move:
    """The same for a shape: a later call of it waits for no checks."""
    return _new_move(torch.empty(shape, device="meta"), source, target, data_format, name, (rows, cols))


def _by_torch(x: Tensor, move: Move) -> Tensor:
    """One copy; from perspective to perspective two, through raster order, where tiles hold no whole cells."""
    if not move.sizes:
        x = _by_torch(x, move_of(x, move.source, "raster", move.data_format, "x", move.grid))
        move = move_of(x, "raster", move.target, move.data_format, "x", move.grid)
    return x.view(move.sizes).permute(move.order).clone(memory_format=torch.contiguous_format).view(move.shape)


# --- The kernel -------------------------------------------------------------------------------------------------------


def _is_faster(x: Tensor, move: Move) -> bool:
    """Whether the kernel takes less time than torch: on large maps, and in a CUDA graph, which has no host time.

    No program can be loaded while a graph is captured, so that one must have run before.
    """
    if not _is_ordinary(x) or not dispatch.runs_on(x):
        return False
    if not torch.cuda.is_current_stream_capturing():
        return x.nbytes >= LEAST_BYTES
    from dualview.kernels.retile_triton import has_run

    return has_run(x.reshape(move.one_batch), *move[:5])


def _is_ordinary(x: Tensor) -> bool:
    """Whether nobody but autograd looks at what is done with ``x``: no transform, tracer, mode or class of its own."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_neg()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def _by_kernel(x: Tensor, move: Move) -> Tensor:
    """The kernel; straight away where it can be: an operator of torch's library costs the host thrice the launch."""
    ordinary = _is_ordinary(x)
    if ordinary and not (x.requires_grad and torch.is_grad_enabled()):
        return _launch(x, move)
    by = _Recorded.apply if ordinary else _retile
    moved: Tensor = by(x, move.source, move.target, move.grid.rows, move.grid.cols, move.data_format)
    return moved


def _launch(x: Tensor, move: Move) -> Tensor:
    """The kernel, or torch where none can run, as in a program that was exported elsewhere."""
    if not dispatch.runs_on(x):
        return _by_torch(x, move)
    import dualview.kernels.retile_triton as device_code  # as a module: that is found in a third of the time

    one_batch = x if x.dim() == len(move.one_batch) else x.reshape(move.one_batch)
    return device_code.launch(one_batch, move.shape, *move[:5])


def _moved(
    x: Tensor, source: Layout, target: Layout, rows: int, cols: int, data_format: DataFormat = "channels_last"
) -> Tensor:
    return _launch(x, move_of(x, source, target, data_format, "x", (rows, cols)))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None = None) -> None:
    _, ctx.source, ctx.target, *ctx.others = inputs


class _Recorded(torch.autograd.Function):
    """The kernel with a gradient, where nobody but autograd looks."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _remember(ctx, inputs)
        return _moved(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, cols, data_format = ctx.others
        move = move_of(grad, ctx.target, ctx.source, data_format, "grad", (rows, cols))
        return _by_kernel(grad, move), None, None, None, None, None


_retile = torch.library.custom_op(
    "dualview::retile",
    _moved,
    mutates_args=(),
    schema="(Tensor x, str source, str target, int rows, int cols, str data_format='channels_last') -> Tensor",
)
"""The same as an operator of torch's library: what is traced keeps it."""
_retile.register_autograd(_Recorded.backward, setup_context=_remember)


@_retile.register_fake
def _(
    x: Tensor, source: Layout, target: Layout, rows: int, cols: int, data_format: DataFormat = "channels_last"
) -> Tensor:
    return x.new_empty(move_of(x, source, target, data_format, "x", (rows, cols)).shape)
