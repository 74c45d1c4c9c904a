"""What of the dual-view computation reaches the output: one derivation, from the readout back to the tiles.

Every readout, crop and fusion here works on rows and columns independently, so a set of live tokens is always a set of
rows times a set of columns, and the plan is worked out per axis, in integers:

1. the readout reads some positions of every cell of rows x cols tokens (`readout_support`);
2. a fusion that looks r tokens around widens that set by r (its ``radius``);
3. a query needs itself and, as keys and values, the tile it lies in as the maps are cut in its direction;
4. an encoder tile is live if a needed token lies in it;
5. of the encoder, the layers after the one that is read are not needed, nor the final norm.

Nothing here knows the name of a preset. All of it is exact for finite inputs: what is dropped is multiplied by zero, or
by nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

from dualview.geometry import Perspective, Size, TileGrid, position
from dualview.ops.readout import Readout, readout_support

Pairing: TypeAlias = Literal["paper", "released"]
Enhance: TypeAlias = Literal["both", "global", "local"]
Source: TypeAlias = Literal["dual", "local", "global", "sum"]
Surround: TypeAlias = Literal["none", "windows", "map"]
Pool: TypeAlias = Literal["tiles", "cells", "map"] | None

CROP_OF_QUERY: dict[Pairing, dict[Perspective, Perspective]] = {
    "paper": {"global": "global", "local": "local"},
    "released": {"global": "local", "local": "global"},
}
"""How both maps are cut when the map of a perspective asks: Eq. 18-25, and the released code (the other way round)."""

SPEED_OF_ABSORBED = {"cpu": 1.0}
"""Multiply-additions a second of attention with absorbed projections over those with projected keys, by device, as the
suite `absorb` of the benchmarks measures them; 1 where nothing has been measured."""

P = ParamSpec("P")
R = TypeVar("R")


def constant(plan: Callable[P, R]) -> Callable[P, R]:
    """Remember the results of a planner, and let `torch.compile` take them as constants and not trace it."""
    remembered = lru_cache(maxsize=256)(plan)

    @wraps(plan)
    def planner(*args: P.args, **kwargs: P.kwargs) -> R:
        return remembered(*args, **kwargs)  # type: ignore[arg-type]  # all arguments are hashable

    # This is all that torch.compiler.assume_constant_result does, but importing it loads the whole compiler.
    planner._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return planner


_planning = True


@contextmanager
def full_computation() -> Iterator[None]:
    """Within the context nothing is skipped: every tile is encoded, every query computed, as the equations are written.

    For debugging and for benchmarks; outputs and gradients differ from the planned ones by rounding only.

    Example:
        >>> with full_computation():
        ...     planning()
        False
    """
    global _planning  # noqa: PLW0603 - a switch for everything that runs meanwhile
    before, _planning = _planning, False
    try:
        yield
    finally:
        _planning = before


def planning() -> bool:
    """Whether only what the readout reads is computed; False inside `full_computation`."""
    return _planning


@dataclass(frozen=True)
class AxisCut:
    """The live positions of one axis, sorted into the tiles of one perspective.

    Attributes:
        tiles: The tiles that hold a live position.
        positions: The positions gathered for them, tile by tile, each tile filled up to ``per_tile`` by repetition.
        per_tile: Positions gathered per tile.
        slots: Where each live position stands among ``positions``, in the order of the axis.
        whole: Whether nothing was filled up and every tile holds all of its positions.
    """

    tiles: tuple[int, ...]
    positions: tuple[int, ...]
    per_tile: int
    slots: tuple[int, ...]
    whole: bool

    @classmethod
    def of(cls, perspective: Perspective, live: Iterable[int], tiles: int, size: int) -> AxisCut:
        """Sort live positions into ``tiles`` tiles of ``size`` positions."""
        wanted = set(live)
        everything = {t: [position(perspective, t, u, tiles, size) for u in range(size)] for t in range(tiles)}
        held = {t: found for t, places in everything.items() if (found := [p for p in places if p in wanted])}
        per_tile = max(map(len, held.values()))
        gathered = [p for found in held.values() for p in found + found[:1] * (per_tile - len(found))]
        slot = {p: i for i, p in reversed(list(enumerate(gathered)))}
        return cls(
            tuple(held),
            tuple(gathered),
            per_tile,
            tuple(slot[p] for p in sorted(wanted)),
            len(wanted) == len(held) * size,
        )

    def widened(self, perspective: Perspective, tiles: int, size: int) -> AxisCut:
        """The same tiles with all of their positions: the keys of the queries."""
        live = (position(perspective, tile, u, tiles, size) for tile in self.tiles for u in range(size))
        return AxisCut.of(perspective, live, tiles, size)


@dataclass(frozen=True)
class DirectionPlan:
    """One direction of enhancement: which queries ask which tiles, and how it is computed.

    Attributes:
        query: The perspective whose map asks.
        cut: How both maps are cut.
        query_rows: Live query rows by tiles of the cut.
        query_cols: Live query columns.
        key_rows: Rows of the keys: the whole tiles that hold queries.
        key_cols: Columns of the keys.
        absorb: Whether projecting queries into key space costs less than projecting keys and values.
        fold: Whether, absorbed with one head, W_q W_k^T costs less as one matrix.
        pool: Where average pooling is taken inside: over "tiles" (cut by strides, a cell's tokens lie at one place of
            all tiles), over "cells" of each tile's attention rows (cut by blocks of whole cells), on the "map" before
            the values are projected (cells lie across blocks), or nowhere.
    """

    query: Perspective
    cut: Perspective
    query_rows: AxisCut
    query_cols: AxisCut
    key_rows: AxisCut
    key_cols: AxisCut
    absorb: bool
    fold: bool
    pool: Pool

    @property
    def num_tiles(self) -> int:
        """Tiles that hold a live query."""
        return len(self.query_rows.tiles) * len(self.query_cols.tiles)

    @property
    def queries(self) -> int:
        """Queries computed per tile."""
        return self.query_rows.per_tile * self.query_cols.per_tile

    @property
    def keys(self) -> int:
        """Keys per tile."""
        return self.key_rows.per_tile * self.key_cols.per_tile


@dataclass(frozen=True)
class EnhancePlan:
    """What a DEM has to compute for one grid and one size of token map.

    Attributes:
        directions: The directions that are computed, local queries first.
        read: Rows and columns of the fused map that the readout reads.
        fused: Rows and columns that the fusion reads: those, widened by its radius.
        live: The encoded tiles that are needed.
        commutes: Whether average pooling is taken before everything that follows the softmax.
        surround: How a fusion sees what surrounds the tokens that are read: "none" where it need not, "windows" side by
            side, which pays where few tokens are read, or a whole "map".
    """

    directions: tuple[DirectionPlan, ...]
    read: tuple[tuple[int, ...], tuple[int, ...]]
    fused: tuple[tuple[int, ...], tuple[int, ...]]
    live: LiveTiles
    commutes: bool
    surround: Surround


def maps_of_role(source: Source, role: Perspective) -> tuple[Perspective, ...]:
    """Which recombined maps play a role; their tokens are added where there are two."""
    if source == "dual":
        return (role,)
    return ("local", "global") if source == "sum" else (source,)


class LiveTiles(NamedTuple):
    """Which tiles of either perspective are present, by index, in order."""

    local: tuple[int, ...]
    stride: tuple[int, ...]


@constant
def plan_enhance(
    pair: tuple[int, int],
    tokens: Size,
    *,
    readout: Readout,
    pairing: Pairing,
    enhance: Enhance,
    source: Source,
    low_pass: bool,
    radius: int | None,
    linear: bool,
    dim: int,
    num_heads: int,
    speed: float,
    full: bool,
) -> EnhancePlan:
    """Push the readout back through fusion, attention and crops.

    Args:
        pair: Rows and columns of tiles (a plain pair: a compiler takes it as a constant).
        tokens: Token map (h, w) of one tile.
        readout: Which tokens of each cell are read.
        pairing: How both maps are cut, by the perspective that asks.
        enhance: Which directions there are.
        source: Which maps play the two roles.
        low_pass: Whether keys are smoothed before a cut by strides.
        radius: How many tokens around a token the fusion looks; None if that is not known.
        linear: Whether everything between the softmax and the readout is linear.
        dim: Width of the tokens, to count operations.
        num_heads: Heads, to count operations.
        speed: An entry of `SPEED_OF_ABSORBED`.
        full: Plan to compute everything, and as the equations are written.
    """
    grid = TileGrid(*pair)
    size = grid.map_size(tokens)
    read = _both(lambda n, h: _read_positions("none" if full else readout, n, h), grid, tokens)
    fused = _both(lambda positions, length: _widened(positions, radius, length), read, size)
    windows_pay = radius and len(read[0]) * len(read[1]) * (2 * radius + 1) ** 2 <= size[0] * size[1]
    averaged = readout != "none" and len(read[0]) * len(read[1]) > tokens[0] * tokens[1]
    commutes = averaged and linear and radius == 0 and not full

    directions = []
    needed: dict[Perspective, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {"local": [], "global": []}
    queried: tuple[Perspective, ...] = ("local", "global")
    for query in queried:
        if enhance not in ("both", query):
            continue
        cut = CROP_OF_QUERY[pairing][query]
        queries = _both(partial(AxisCut.of, cut), fused, grid, tokens)
        keys = _both(lambda axis, n, h, cut=cut: axis.widened(cut, n, h), queries, grid, tokens)
        pool = _pool(cut, grid, tokens) if commutes else None
        absorb = not full and _absorbing_pays(queries, keys, pool, tokens, dim, num_heads, speed)
        d = DirectionPlan(query, cut, *queries, *keys, absorb=absorb, fold=False, pool=pool)
        directions.append(replace(d, fold=absorb and num_heads == 1 and d.num_tiles * d.queries > dim))
        everything = tuple(range(size[0])), tuple(range(size[1]))
        smoothed = low_pass and cut == "global"  # the filter reaches into every stride tile
        key_positions = everything if smoothed else (keys[0].positions, keys[1].positions)
        key: Perspective = "global" if query == "local" else "local"
        for perspective in maps_of_role(source, query):
            needed[perspective].append(fused)
        for perspective in maps_of_role(source, key):
            needed[perspective].append(key_positions)
    return EnhancePlan(
        tuple(directions),
        read,
        fused,
        LiveTiles(*(_tiles_of(perspective, held, grid, tokens) for perspective, held in needed.items())),
        commutes,
        "none" if fused == read else "windows" if windows_pay else "map",
    )


@dataclass(frozen=True)
class DirectPlan:
    """What a readout without enhancement needs.

    Attributes:
        live: The encoded tiles that are needed.
        cuts: The rows and columns that are read of each map that takes part, by its tiles.
    """

    live: LiveTiles
    cuts: tuple[tuple[Perspective, AxisCut, AxisCut], ...]


@constant
def plan_direct(pair: tuple[int, int], tokens: Size, *, readout: Readout, source: Source, full: bool) -> DirectPlan:
    """The plan of a readout of recombined features, without enhancement; arguments as for `plan_enhance`."""
    grid = TileGrid(*pair)
    read = _both(lambda n, h: _read_positions("none" if full else readout, n, h), grid, tokens)
    cuts = []
    for perspective in maps_of_role(source, "local"):
        cuts.append((perspective, *_both(partial(AxisCut.of, perspective), read, grid, tokens)))
    tiles = {p: tuple(i * grid.cols + j for i in rows.tiles for j in cols.tiles) for p, rows, cols in cuts}
    return DirectPlan(LiveTiles(tiles.get("local", ()), tiles.get("global", ())), tuple(cuts))


class LayerPlan(NamedTuple):
    """Which layers of an encoder are run.

    Attributes:
        run: Layers that are run, from the first.
        total: Layers that there are.
        norm: Whether the final norm is run.
    """

    run: int
    total: int
    norm: bool


def plan_layers(needed: int, total: int, *, norm: bool, full: bool, has_norm: bool = True) -> LayerPlan:
    """The layers before what is read, or all.

    Args:
        needed: Layers that what is read comes after.
        total: Layers that there are.
        norm: Whether what is read is normed.
        full: Run everything.
        has_norm: Whether there is a final norm.
    """
    return LayerPlan(total if full else needed, total, norm or (full and has_norm))


def _both(of_axis: Callable[..., R], *pairs: Iterable[Any]) -> tuple[R, R]:
    """The same for rows and for columns."""
    rows, cols = (of_axis(*axis) for axis in zip(*pairs, strict=True))
    return rows, cols


def _read_positions(readout: Readout, n: int, size: int) -> tuple[int, ...]:
    return tuple(cell * n + offset for cell in range(size) for offset in readout_support(readout, n))


def _widened(positions: tuple[int, ...], radius: int | None, length: int) -> tuple[int, ...]:
    if radius is None:
        return tuple(range(length))
    around = {p + step for p in positions for step in range(-radius, radius + 1)}
    return tuple(sorted(p for p in around if 0 <= p < length))


def _pool(cut: Perspective, grid: TileGrid, tokens: Size) -> Pool:
    if cut == "global":
        return "tiles"
    return "cells" if tokens[0] % grid.rows == 0 and tokens[1] % grid.cols == 0 else "map"


def _tiles_of(
    perspective: Perspective,
    needed: list[tuple[tuple[int, ...], tuple[int, ...]]],
    grid: TileGrid,
    tokens: Size,
) -> tuple[int, ...]:
    live = set()
    for positions in needed:
        rows, cols = _both(partial(AxisCut.of, perspective), positions, grid, tokens)
        live |= {i * grid.cols + j for i in rows.tiles for j in cols.tiles}
    return tuple(sorted(live))


def _absorbing_pays(
    queries: tuple[AxisCut, AxisCut],
    keys: tuple[AxisCut, AxisCut],
    pool: Pool,
    tokens: Size,
    dim: int,
    num_heads: int,
    speed: float,
) -> bool:
    """Compare multiply-additions of projecting keys and values with those of projecting what depends on the query.

    Scores are (q W_q) (x W_k)^T = (q W_q W_k^T) x^T, and P (x W_v) = (P x) W_v: exact either way. Absorbed, every head
    meets the whole width of the keys, but the keys need no projection, and pooling comes before W_v.
    """
    tiles = len(queries[0].tiles) * len(queries[1].tiles)
    q = tiles * queries[0].per_tile * queries[1].per_tile
    k = tiles * keys[0].per_tile * keys[1].per_tile
    per_tile = keys[0].per_tile * keys[1].per_tile
    out = tokens[0] * tokens[1] if pool else q
    weighted = out if pool == "cells" else q  # rows of attention that meet the values
    projected = 2 * k * dim**2 + (q + weighted) * per_tile * dim
    absorbed = (q + out) * dim**2 + (q + weighted) * per_tile * dim * num_heads
    return absorbed < projected * speed
