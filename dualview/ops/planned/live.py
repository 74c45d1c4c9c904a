"""What of the dual-view computation reaches the output: one derivation, from the readout back to the tiles.

Every readout, crop and fusion works on rows and columns independently, so a set of live tokens is always a set of rows
times a set of columns, and the plan is worked out per axis, in integers:

1. the readout reads some positions of every cell of rows x cols tokens (`readout_support`);
2. a fusion that looks r tokens around widens that set by r (its ``radius``);
3. a query needs itself and, as keys and values, the tile in which it lies as both maps are cut in its direction;
4. an encoder tile is live if a needed token lies in it;
5. of the encoder, neither the layers after the one that is read nor the final norm are needed.

No preset and no device is named here. All of it is exact for finite inputs: what is dropped is multiplied by zero, or
by nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

from dualview.geometry import LiveTiles, Perspective, Readout, Size, TileGrid, position, readout_support

Pairing: TypeAlias = Literal["paper", "released"]
Enhance: TypeAlias = Literal["both", "global", "local"]
Source: TypeAlias = Literal["dual", "local", "global", "sum"]

CROP_OF_QUERY: dict[Pairing, dict[Perspective, Perspective]] = {
    "paper": {"global": "global", "local": "local"},
    "released": {"global": "local", "local": "global"},
}
"""How both maps are cut when the map of a perspective asks: Eq. 18-25, and the released code (the other way round)."""
KEYS_OF_QUERY: dict[Perspective, Perspective] = {"local": "global", "global": "local"}
"""The map that answers when the map of a perspective asks."""

MAPS_OF_ROLE: dict[Source, dict[Perspective, tuple[Perspective, ...]]] = {
    "dual": {"local": ("local",), "global": ("global",)},
    "local": {"local": ("local",), "global": ("local",)},
    "global": {"local": ("global",), "global": ("global",)},
    "sum": {"local": ("local", "global"), "global": ("local", "global")},
}
"""Which recombined maps play the role of a perspective; their tokens are added where there are two."""

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
    planner.cache_clear = remembered.cache_clear  # type: ignore[attr-defined]
    return planner


@dataclass(frozen=True)
class AxisCut:
    """The live positions of one axis, sorted into the tiles of one perspective.

    Attributes:
        tiles: The tiles that hold a live position.
        positions: The positions gathered for them, tile by tile, each tile filled up to ``per_tile`` by repetition.
        per_tile: Positions gathered per tile.
        index: Which of ``positions`` each live position is, in the order of the axis.
        whole: Whether nothing was filled up and every tile holds all of its positions.
    """

    tiles: tuple[int, ...]
    positions: tuple[int, ...]
    per_tile: int
    index: tuple[int, ...]
    whole: bool

    @classmethod
    def of(cls, perspective: Perspective, live: Iterable[int], tiles: int, size: int) -> AxisCut:
        """Sort live positions into ``tiles`` tiles of ``size`` positions."""
        wanted = set(live)
        everything = {t: [position(perspective, t, u, tiles, size) for u in range(size)] for t in range(tiles)}
        held = {t: found for t, inside in everything.items() if (found := [p for p in inside if p in wanted])}
        per_tile = max(map(len, held.values()))
        gathered = [p for found in held.values() for p in found + found[:1] * (per_tile - len(found))]
        first = {p: i for i, p in reversed(list(enumerate(gathered)))}
        return cls(
            tuple(held),
            tuple(gathered),
            per_tile,
            tuple(first[p] for p in sorted(wanted)),
            len(wanted) == len(held) * size,
        )

    def widened(self, tiles: int, size: int, perspective: Perspective) -> AxisCut:
        """The same tiles with all of their positions: the keys of the queries."""
        live = (position(perspective, tile, u, tiles, size) for tile in self.tiles for u in range(size))
        return AxisCut.of(perspective, live, tiles, size)


@dataclass(frozen=True)
class DirectionPlan:
    """The live tokens of one direction of enhancement.

    Attributes:
        query: The perspective whose map asks.
        cut: How both maps are cut.
        query_rows: Live query rows by tiles of the cut.
        query_cols: Live query columns.
        key_rows: Rows of the keys: the whole tiles that hold queries.
        key_cols: Columns of the keys.
        num_tiles: Tiles that hold a live query.
        queries: Queries computed per tile.
        keys: Keys per tile.
    """

    query: Perspective
    cut: Perspective
    query_rows: AxisCut
    query_cols: AxisCut
    key_rows: AxisCut
    key_cols: AxisCut
    num_tiles: int
    queries: int
    keys: int


@dataclass(frozen=True)
class EnhancePlan:
    """What of a DEM reaches the output, for one grid and one size of token map.

    Attributes:
        tokens: Token map (h, w) of one tile.
        directions: The directions that are computed, local queries first.
        read: Rows and columns of the fused map that the readout reads.
        fused: Rows and columns that the fusion reads: those, widened by its radius.
        cell: Rows and columns of tokens that the readout averages to one; (1, 1) where it averages nothing.
        looks_around: Whether the fusion reads more than the readout does.
        whole_cells: Whether every local tile holds whole cells of rows x cols tokens.
        live: The encoded tiles that are needed.
    """

    tokens: Size
    directions: tuple[DirectionPlan, ...]
    read: tuple[tuple[int, ...], tuple[int, ...]]
    fused: tuple[tuple[int, ...], tuple[int, ...]]
    cell: tuple[int, int]
    looks_around: bool
    whole_cells: bool
    live: LiveTiles


EnhanceSpec: TypeAlias = tuple[tuple[int, int], Size, Readout, Pairing, Enhance, Source, int | None]
"""The arguments of `plan_enhance`: plain values in a plain tuple, which a compiler takes as constants."""


@constant
def plan_enhance(
    pair: tuple[int, int],
    tokens: Size,
    readout: Readout,
    pairing: Pairing,
    enhance: Enhance,
    source: Source,
    radius: int | None,
) -> EnhancePlan:
    """Push the readout back through fusion, attention and crops.

    Args:
        pair: Rows and columns of tiles.
        tokens: Token map (h, w) of one tile.
        readout: Which tokens of each cell are read; "none" plans to compute everything.
        pairing: How both maps are cut, by the perspective that asks.
        enhance: Which directions there are.
        source: Which maps play the two roles.
        radius: How many tokens around a token the fusion looks; None if that is not known.
    """
    grid = TileGrid(*pair)
    read = _both(partial(_read_positions, readout), grid, tokens)
    fused = _both(partial(_widened, radius), read, grid.map_size(tokens))
    directions = []
    needed: dict[Perspective, set[int]] = {"local": set(), "global": set()}
    for query, key in KEYS_OF_QUERY.items():
        if enhance not in ("both", query):
            continue
        cut = CROP_OF_QUERY[pairing][query]
        queries = _both(partial(AxisCut.of, cut), fused, grid, tokens)
        keys = _both(partial(AxisCut.widened, perspective=cut), queries, grid, tokens)
        counts = len(queries[0].tiles) * len(queries[1].tiles), *(r.per_tile * c.per_tile for r, c in (queries, keys))
        directions.append(DirectionPlan(query, cut, *queries, *keys, *counts))
        for perspective in MAPS_OF_ROLE[source][query]:
            needed[perspective] |= _tiles_of(perspective, fused, grid, tokens)
        for perspective in MAPS_OF_ROLE[source][key]:
            needed[perspective] |= _tiles_of(perspective, (keys[0].positions, keys[1].positions), grid, tokens)
    cell = (1, 1) if readout == "none" else _both(lambda n: len(readout_support(readout, n)), grid)
    whole_cells = all(size % n == 0 for size, n in zip(tokens, grid, strict=True))
    live = LiveTiles(*(tuple(sorted(tiles)) for tiles in needed.values()))
    return EnhancePlan(tokens, tuple(directions), read, fused, cell, fused != read, whole_cells, live)


@dataclass(frozen=True)
class DirectPlan:
    """What a readout without enhancement needs.

    Attributes:
        live: The encoded tiles that are needed.
        cuts: Of each map that is read: its perspective, and the rows and columns that are read.
    """

    live: LiveTiles
    cuts: tuple[tuple[Perspective, AxisCut, AxisCut], ...]


@constant
def plan_direct(pair: tuple[int, int], tokens: Size, *, readout: Readout, source: Source) -> DirectPlan:
    """The plan of a readout of recombined features, without enhancement; arguments as for `plan_enhance`."""
    grid = TileGrid(*pair)
    read = _both(partial(_read_positions, readout), grid, tokens)
    cuts = tuple((p, *_both(partial(AxisCut.of, p), read, grid, tokens)) for p in MAPS_OF_ROLE[source]["local"])
    tiles = {p: tuple(i * grid.cols + j for i in rows.tiles for j in cols.tiles) for p, rows, cols in cuts}
    return DirectPlan(LiveTiles(tiles.get("local", ()), tiles.get("global", ())), cuts)


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
        needed: Layers before what is read.
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


def _widened(radius: int | None, positions: tuple[int, ...], length: int) -> tuple[int, ...]:
    if radius is None:
        return tuple(range(length))
    around = {p + step for p in positions for step in range(-radius, radius + 1)}
    return tuple(sorted(p for p in around if 0 <= p < length))


def _tiles_of(
    perspective: Perspective, positions: tuple[tuple[int, ...], tuple[int, ...]], grid: TileGrid, tokens: Size
) -> set[int]:
    rows, cols = _both(partial(AxisCut.of, perspective), positions, grid, tokens)
    return {i * grid.cols + j for i in rows.tiles for j in cols.tiles}
