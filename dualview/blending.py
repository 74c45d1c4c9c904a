"""Overlapping tiles cut from maps, and blended into maps again by a running weighted mean.

Tiles come row by row. A tile first joins its row of tiles, then the row joins the rows above it: two steps of one
dimension each, for the weight of a position in a tile is a product of one number for its row and one for its column.
Where a position is in several tiles, each step is mean <- (1 - a) * mean + a * value, where a is the weight over the
sum of the weights so far, and the mean itself where both are equal: what all tiles agree on comes out as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.arguments import check_choice, shown
from dualview.geometry import Border, DataFormat, GridLike, Size, SizeLike
from dualview.tensors import check_averaged
from dualview.tile_positions import Kept, TilePositions
from dualview.views import check_map

Window: TypeAlias = Literal["constant", "linear", "hann"]
WINDOWS = {"constant": "all weights are the same", "linear": "the distance to the nearer edge", "hann": "a Hann window"}
"""How a tile's weight runs from edge to edge."""


class Blender:
    """Joins tiles that come one by one, row by row; holds one row of tiles at most, whatever the map.

    Args:
        rows: What the rows of tiles contribute.
        cols: What the columns of tiles contribute.
        window: The weights.
        open_row: Makes the tensor (..., height, W) for the map's rows from ``first`` to ``stop``: in memory a view of
            the map, which then needs no copying.
    """

    def __init__(
        self, rows: list[Kept], cols: list[Kept], window: Window, open_row: Callable[[int, int], Tensor]
    ) -> None:
        self.rows, self.cols, self.open_row = rows, cols, open_row
        self.row_shares, self.col_shares = (shares(axis, window)[0] for axis in (rows, cols))
        self.added = 0
        self.row = self.unfinished = torch.empty(0)

    def add(self, tile: Tensor) -> tuple[int, Tensor] | None:
        """Join the next tile (..., h, w).

        Returns:
            After the last tile of a row of tiles: the first row of the map that is finished now, and the finished rows
            (..., height, W). None after all other tiles.
        """
        i, j = divmod(self.added, len(self.cols))
        row, col = self.rows[i], self.cols[j]
        if j == 0:
            self.row = self.open_row(row.first, row.stop)
        part = tile[..., row.first - row.start : row.stop - row.start, col.first - col.start : col.stop - col.start]
        shared = self.cols[j - 1].stop - col.first if j else 0
        if shared:
            mix_(self.row[..., col.first : col.first + shared], part[..., :shared], self.col_shares[j])
        self.row[..., col.first + shared : col.stop].copy_(part[..., shared:])
        self.added += 1
        return self._join(i) if j + 1 == len(self.cols) else None

    def _join(self, i: int) -> tuple[int, Tensor]:
        """Join a whole row of tiles with what is above."""
        _, first, stop, _ = self.rows[i]
        if i and (shared := self.rows[i - 1].stop - first):
            for j, (_, left, _, _) in enumerate(self.cols):  # piece by piece: what mixing needs stays small
                span = slice(left, self.cols[j + 1].first if j + 1 < len(self.cols) else None)
                mix_(self.unfinished[..., span], self.row[..., :shared, span], self.row_shares[i][:, None])
            self.row[..., :shared, :] = self.unfinished
        finished = (self.rows[i + 1].first if i + 1 < len(self.rows) else stop) - first
        self.unfinished = self.row[..., finished:, :].clone()
        return first, self.row[..., :finished, :]


SAME_BITS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Types that `torch.where` of torch 2.11 does not take."""


def mix_(mean: Tensor, x: Tensor, share: Tensor) -> None:
    """``mean`` becomes (1 - share) * mean + share * x, and stays what it is where both are equal.

    Half-precision numbers are mixed in float32, integers in float64 and rounded.
    """
    numbers = mean.is_floating_point() or mean.is_complex()
    work = mean.dtype if numbers and mean.dtype.itemsize >= 4 else torch.float32 if numbers else torch.float64
    before, after, share = mean.to(work), x.to(work), share.to(mean.device, work)
    if numbers and mean.device.type == "cpu":  # where comparing takes longer than all the rest
        difference = after - before
        if math.isfinite(abs(difference.sum().item())):
            mean.copy_(before.addcmul_(difference, share))
            return
    mixed = before * (1 - share) + after * share  # right for infinite numbers, too
    if not numbers:
        mixed = mixed.round()
        if mean.dtype in (torch.int64, torch.uint64):  # the largest ones are rounded up, out of the type's range
            mixed = mixed.clamp(max=float(torch.iinfo(mean.dtype).max // 2048 * 2048))
    bits = SAME_BITS.get(mean.dtype, mean.dtype)
    mean.view(bits).copy_(torch.where(mean == x, mean.view(bits), mixed.to(mean.dtype).view(bits)))


def shares(axis: list[Kept], window: Window) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of the tiles on one axis, in float64.

    Returns:
        Of every tile: its shares of the mean so far, at the positions that it has in common with earlier tiles; and its
        shares of the whole mean, at all positions that it contributes.
    """
    total = torch.zeros(axis[-1].stop, dtype=torch.float64)
    running, weights = [], []
    for i, (_, first, stop, end) in enumerate(axis):
        weight = _profile(end - first, window)[: stop - first]
        total[first:stop] += weight
        shared = axis[i - 1].stop - first if i else 0
        running.append(weight[:shared] / total[first : first + shared])
        weights.append(weight)
    return running, [weight / total[first:stop] for (_, first, stop, _), weight in zip(axis, weights, strict=True)]


def _profile(length: int, window: Window) -> Tensor:
    """The window over so many positions: positive at all of them."""
    if window == "constant":
        return torch.ones(length, dtype=torch.float64)
    middle = torch.arange(length, dtype=torch.float64) + 0.5
    if window == "linear":
        return torch.minimum(middle, length - middle)
    return torch.sin(torch.pi * middle / max(1, length)) ** 2


# --- In memory, with gradients ---------------------------------------------------------------------------------------


def planes(x: Tensor, data_format: DataFormat) -> Tensor:
    """A view with height and width last."""
    return x if data_format == "channels_first" else x.movedim(-1, -3)


def _shape(x: Tensor, around: tuple[int, ...], plane: Size, data_format: DataFormat) -> tuple[int, ...]:
    return (*around, x.shape[-3], *plane) if data_format == "channels_first" else (*around, *plane, x.shape[-1])


def cut(
    x: Tensor, grid: GridLike | None, tile: SizeLike | None, overlap: object, border: Border, data_format: DataFormat
) -> Tensor:
    """What [`local_crop`][dualview.local_crop] does with ``overlap``."""
    if tile is None or grid is not None:
        raise ValueError(
            f"overlap={shown(overlap)} needs tile=(h, w) and no grid, not tile={shown(tile)} and grid={shown(grid)}."
        )
    check_map(x, "raster", data_format)
    h, w = x.shape[-2:] if data_format == "channels_first" else x.shape[-3:-1]
    return _moved(x, "cut", TilePositions.of((h, w), tile, overlap, border), "constant", data_format)


def tiles_at(x: Tensor, positions: TilePositions, numbers: Sequence[int], data_format: DataFormat) -> Tensor:
    """Some of the tiles of a map."""
    whole = _shape(x, (*x.shape[:-3], len(numbers)), positions.tile, data_format)
    tiles = x.new_empty(whole) if positions.border == "shift" else x.new_zeros(whole)
    source, targets, (rows, cols) = planes(x, data_format), planes(tiles, data_format), positions.starts
    for k, number in enumerate(numbers):
        top, left = rows[number // len(cols)], cols[number % len(cols)]
        part = source[..., top : top + positions.tile[0], left : left + positions.tile[1]]
        targets[..., k, :, : part.shape[-2], : part.shape[-1]].copy_(part)
    return tiles


def _cut(x: Tensor, positions: TilePositions, window: Window, data_format: DataFormat) -> Tensor:
    return tiles_at(x, positions, range(len(positions)), data_format)


def _sum(tiles: Tensor, positions: TilePositions, window: Window, data_format: DataFormat) -> Tensor:
    whole = tiles.new_zeros(_shape(tiles, tuple(tiles.shape[:-4]), positions.size, data_format))
    sources, target = planes(tiles, data_format), planes(whole, data_format)
    for k, (top, left) in enumerate(positions.corners()):
        place = target[..., top : top + positions.tile[0], left : left + positions.tile[1]]
        place.add_(sources[..., k, :, : place.shape[-2], : place.shape[-1]])
    return whole


def blend_tiles(
    tiles: Tensor,
    size: SizeLike,
    *,
    overlap: SizeLike,
    window: Window = "constant",
    border: Border = "shift",
    data_format: DataFormat = "channels_first",
) -> Tensor:
    """Put overlapping tiles back together: the inverse of [`local_crop`][dualview.local_crop] with ``overlap``.

    Where tiles overlap, their weighted mean is taken. It runs from tile to tile, and stays what it is where the next
    tile agrees with it: tiles that nothing has changed give the map that they were cut from, exactly, in every type.

    Args:
        tiles: All tiles, in the order that ``local_crop`` gives them.
        size: Height and width of the map, at the resolution of the tiles. (Tiles at half the resolution: half of
            ``size`` and half of ``overlap``.)
        overlap: The overlap that the tiles were cut with, (height, width) or one number for both.
        window: The weights: "constant" (the same everywhere), "linear" (the distance to the nearer edge of the tile) or
            "hann" (a Hann window). The weight of a position is that of its row times that of its column; where there is
            one tile only, weights have no effect.
        border: The border that the tiles were cut with.
        data_format: Whether the channels come before or after height and width.

    Shape:
        - channels_first: (..., tiles, C, h, w) -> (..., C, H, W)
        - channels_last: (..., tiles, h, w, D) -> (..., H, W, D)

    Returns:
        A new contiguous tensor of the type of ``tiles``. Half-precision tiles are averaged in float32. Integers are
        averaged in float64 and rounded.

    Raises:
        ValueError: The number of tiles is not that of this map, or an argument is not one of the choices.
        TypeError: ``tiles`` is no tensor.

    Example:
        >>> import torch
        >>> import dualview as dv
        >>> x = torch.rand(3, 100, 150)
        >>> tiles = dv.local_crop(x, tile=(64, 64), overlap=(16, 16))
        >>> tiles.shape
        torch.Size([6, 3, 64, 64])
        >>> torch.equal(dv.blend_tiles(tiles, (100, 150), overlap=(16, 16), window="hann"), x)
        True
    """
    check_choice(window, "window", WINDOWS)
    check_map(tiles, "local", data_format, "tiles")
    check_averaged(tiles=tiles)
    h, w = tiles.shape[-2:] if data_format == "channels_first" else tiles.shape[-3:-1]
    positions = TilePositions.of(size, (h, w), overlap, border)
    if tiles.shape[-4] != len(positions):
        raise ValueError(
            f"tiles={shown(tiles)}: these are {tiles.shape[-4]} tiles (dimension {tiles.dim() - 4}); {positions}. "
            "Pass size, overlap and border that the tiles were cut with."
        )
    return _moved(tiles, "blend", positions, window, data_format)


def _blend(tiles: Tensor, positions: TilePositions, window: Window, data_format: DataFormat) -> Tensor:
    whole = tiles.new_empty(_shape(tiles, tuple(tiles.shape[:-4]), positions.size, data_format))
    sources, target = planes(tiles, data_format), planes(whole, data_format)
    blender = Blender(*positions.kept(), window, lambda first, stop: target[..., first:stop, :])
    for k in range(len(positions)):
        blender.add(sources[..., k, :, :, :])
    return whole


def _share(x: Tensor, positions: TilePositions, window: Window, data_format: DataFormat) -> Tensor:
    """The tiles of a map, times their shares of the mean at every position: the adjoint of `_blend`."""
    rows, cols = (
        torch.stack([F.pad(share, (0, length - len(share))) for share in shares(axis, window)[1]])
        for axis, length in zip(positions.kept(), positions.tile, strict=True)
    )
    together = (rows[:, None, :, None] * cols[None, :, None, :]).flatten(0, 1).to(x.device, x.dtype)
    return _cut(x, positions, window, data_format) * together.unsqueeze(1 if data_format == "channels_first" else -1)


Kind: TypeAlias = Literal["cut", "sum", "blend", "share"]
MOVES: dict[Kind, tuple[Callable[[Tensor, TilePositions, Window, DataFormat], Tensor], Kind]] = {
    "cut": (_cut, "sum"),
    "sum": (_sum, "cut"),
    "blend": (_blend, "share"),
    "share": (_share, "blend"),
}
"""What is done, and its adjoint: all of them are linear."""


def _moved(x: Tensor, kind: Kind, positions: TilePositions, window: Window, data_format: DataFormat) -> Tensor:
    size, tile, overlap, border = positions.size, positions.tile, positions.overlap, positions.border
    out: Tensor = _Linear.apply(x, kind, (size, tile, overlap, border, window, data_format))
    return out


SCHEMA = (
    "(Tensor x, str kind, int[] size, int[] tile, int[] overlap, str border, str window, str data_format) -> Tensor"
)


# One operator for torch.compile and vmap, which would otherwise go through every tile.
@torch.library.custom_op("dualview::overlapping", mutates_args=(), schema=SCHEMA)
def _overlapping(x: Tensor, kind: Kind, *given: Any) -> Tensor:
    *place, window, data_format = given
    return MOVES[kind][0](x, TilePositions.of(*place), window, data_format)


@_overlapping.register_fake
def _(x: Tensor, kind: Kind, *given: Any) -> Tensor:
    *place, _, data_format = given
    size, tile = place[:2]
    if kind in ("cut", "share"):
        return x.new_empty(_shape(x, (*x.shape[:-3], len(TilePositions.of(*place))), tile, data_format))
    return x.new_empty(_shape(x, tuple(x.shape[:-4]), size, data_format))


@_overlapping.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *given: Any) -> tuple[Tensor, int]:
    return _overlapping(x.movedim(in_dims[0] or 0, 0), *given), 0


class _Linear(torch.autograd.Function):
    """The operator for autograd: its gradient is its adjoint."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kind: Kind, given: tuple[Any, ...]) -> Tensor:
        out: Tensor = _overlapping(x, kind, *given)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.kind, ctx.given = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(gradient, MOVES[ctx.kind][1], ctx.given), None, None
