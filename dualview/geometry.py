"""Tile geometry: which position of a map lies in which tile, and which are read out. Integers only, no tensors.

Everything in this package rests on two bijections between a position ``Y`` on an axis and a pair
(tile index ``i``, offset ``u`` inside the tile), for ``tiles`` tiles of ``size`` positions each:

* local perspective, contiguous blocks (Eq. 13 of arXiv 2407.16198): ``Y = i * size + u``
* global perspective, interleaved strides (Eq. 16-17): ``Y = u * tiles + i``

[`split_axis`][dualview.geometry.split_axis] is the one place where they are written down; the crops, their
inverses, the re-tiling inside the enhancement module and the pictures all ask it.
Heights come before widths everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from dualview.arguments import TEXTS, check_choice, check_count, check_instance, check_size, integer_of, shown

Perspective: TypeAlias = Literal["local", "global"]
Layout: TypeAlias = Literal["raster", "local", "global"]
"""How a map lies in memory: row by row, or tile by tile of a perspective."""
PERSPECTIVES = {"local": "contiguous blocks", "global": "interleaved strides"}
"""The perspectives, and what their tiles are."""
DataFormat: TypeAlias = Literal["channels_first", "channels_last"]
Border: TypeAlias = Literal["shift", "pad"]
"""What becomes of tiles that would reach beyond a map: they are moved inside, or filled up."""
DATA_FORMATS, LAYOUTS = get_args(DataFormat), get_args(Layout)
Readout: TypeAlias = Literal["average", "bilinear", "centre", "none"]
"""How a cell of rows x cols neighbouring tokens becomes one token."""
READOUTS = get_args(Readout)
Size: TypeAlias = tuple[int, int]
"""A pair (height, width)."""

SizeLike: TypeAlias = int | Sequence[int]
"""A pair (height, width), or one number for a square."""

MOST_TILES = 16_384
"""Most tiles of a grid, 128 x 128: what follows from a grid is found tile by tile."""

MOST_SINGLE_CELLS = 1_024
"""Most tiles that may be single cells of their map."""

MOST_TOKENS = 262_144
"""Longest side of a map of tokens that is planned."""


@dataclass(frozen=True)
class TileGrid:
    """A grid of ``rows`` x ``cols`` tiles, numbered row by row from the top left.

    Wherever a grid is asked for, a plain ``(rows, cols)`` pair is accepted too.

    Args:
        rows: Number of tiles along the height (n_H in the paper), at least 1.
        cols: Number of tiles along the width (n_W in the paper), at least 1.

    Raises:
        ValueError: A count is not a positive integer, or there are more than 16,384 tiles.

    Example:
        >>> grid = TileGrid(rows=2, cols=3)
        >>> grid.num_tiles, grid.map_size((24, 24))
        (6, (48, 72))
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for name, count in (("rows", self.rows), ("cols", self.cols)):
            checked = check_count(count, name, why="Tiles along the height come first, then tiles along the width.")
            if type(count) is not int:  # NumPy's integers
                object.__setattr__(self, name, checked)
        if self.num_tiles > MOST_TILES:
            raise ValueError(
                f"TileGrid(rows={self.rows}, cols={self.cols}) has {self.num_tiles:,} tiles; at most {MOST_TILES:,} "
                "are taken. If this is the size of a tile in pixels, pass it as `tile`; otherwise cut the image into "
                "parts first."
            )

    def __iter__(self) -> Iterator[int]:
        return iter((self.rows, self.cols))

    def __eq__(self, other: object) -> bool:
        """Whether this is the same grid, or the pair of its rows and columns."""
        return isinstance(other, TileGrid | tuple) and (self.rows, self.cols) == tuple(other)

    def __hash__(self) -> int:
        return hash((self.rows, self.cols))

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    @property
    def num_tiles(self) -> int:
        """Number of tiles of one perspective, rows * cols."""
        return self.rows * self.cols

    def map_size(self, tile: SizeLike) -> Size:
        """Size (H, W) of the map that this grid makes of tiles of size ``tile`` = (h, w).

        Raises:
            ValueError: ``tile`` is no size.
        """
        h, w = check_size(tile, "tile")
        return self.rows * h, self.cols * w

    def tile_size(self, size: SizeLike) -> Size:
        """Size (h, w) of one tile of a map of ``size`` = (H, W).

        Raises:
            ValueError: ``size`` is not a positive multiple of (rows, cols), or the tiles would be single cells, more
                than 1,024 of them: a tile size was given as the grid.
        """
        return self.tile_of(*check_size(size, "size"), "size")

    def tile_of(self, height: int, width: int, name: str) -> Size:
        """The same for a map of a height and a width, called ``name`` in errors."""
        if height < 1 or width < 1 or height % self.rows or width % self.cols:
            raise ValueError(
                f"{name}: a map of {height} x {width} (height x width) cannot be cut by a grid of {self.rows} x "
                f"{self.cols} tiles: the height must be a positive multiple of rows={self.rows} and the width of "
                f"cols={self.cols}. Pad, crop or resize it first (DualPerspectiveCrop does, by its `remainder`), or "
                'pass data_format="channels_last" where the channels come last.'
            )
        if (height, width) == (self.rows, self.cols) and self.num_tiles > MOST_SINGLE_CELLS:
            raise ValueError(
                f"{name}: a grid of {self.rows} x {self.cols} cuts a map of {height} x {width} (height x width) into "
                f"single cells, and more than {MOST_SINGLE_CELLS:,} are refused: was a tile size meant? "
                "TileGrid.for_image(size, tile) gives the grid."
            )
        return height // self.rows, width // self.cols

    @classmethod
    def of(cls, grid: GridLike, name: str = "grid") -> TileGrid:
        """The grid itself, or one made from a (rows, cols) pair.

        Args:
            grid: The grid or the pair.
            name: What errors call it.

        Raises:
            ValueError: ``grid`` is neither.
        """
        if isinstance(grid, TileGrid):
            return grid
        if isinstance(grid, (tuple, list)) and len(grid) == 2:
            try:
                return cls(*grid)
            except ValueError as error:
                raise ValueError(f"{name}={shown(grid)}: {error}") from None
        raise ValueError(
            f"{name}={shown(grid)}: must be TileGrid(rows=..., cols=...) or a pair (rows, cols) of positive integers."
        )

    @classmethod
    def parse(cls, text: str) -> TileGrid:
        """Read ``"ROWSxCOLS"``, the form that the command line takes and ``str`` gives.

        Raises:
            ValueError: ``text`` has another form, or the grid too many tiles.

        Example:
            >>> TileGrid.parse("2x3")
            TileGrid(rows=2, cols=3)
        """
        match = re.fullmatch(r"([1-9]\d{0,17})[xX]([1-9]\d{0,17})", text.strip() if isinstance(text, str) else "")
        if match is None:
            raise ValueError(
                f"text={shown(text)}: write ROWSxCOLS with two positive integers, rows first, such as 2x3."
            )
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def for_image(cls, size: SizeLike, tile: SizeLike) -> TileGrid:
        """The grid of whole tiles that an image holds, n = floor(size / tile) per axis (Eq. 9-10).

        Args:
            size: Image size (H, W) in pixels.
            tile: Tile size (h, w) in pixels, or one number for a square.

        Raises:
            ValueError: The image is smaller than one tile, or holds more than 16,384.

        Example:
            >>> TileGrid.for_image((1008, 700), tile=(336, 336))
            TileGrid(rows=3, cols=2)
        """
        (height, width), (h, w) = check_size(size, "image size"), check_size(tile, "tile")
        if height < h or width < w:
            raise ValueError(
                f"image size=({height}, {width}): an image of {height} x {width} (height x width) is smaller than one "
                f"tile of {h} x {w}. Enlarge or pad the image, or choose a smaller tile: at least one must fit."
            )
        return cls(height // h, width // w)

    @classmethod
    def whole(cls, size: SizeLike, tile: SizeLike) -> TileGrid:
        """The grid of an image that is a whole number of tiles.

        Args:
            size: Image size (H, W) in pixels.
            tile: Tile size (h, w) in pixels, or one number for a square.

        Raises:
            ValueError: The image is no whole number of tiles, or holds more than 16,384.

        Example:
            >>> TileGrid.whole((672, 1008), tile=336)
            TileGrid(rows=2, cols=3)
        """
        (height, width), (h, w) = check_size(size, "image size"), check_size(tile, "tile")
        if height % h or width % w:
            raise ValueError(
                f"image size=({height}, {width}): an image of {height} x {width} (height x width) is no whole number "
                f"of {h} x {w} tiles. "
                'DualPerspectiveCrop makes it one, by remainder="pad", "crop" or "resize".'
            )
        return cls(height // h, width // w)


GridLike: TypeAlias = TileGrid | tuple[int, int] | Sequence[int]


def grid_or_tile(grid: GridLike | None, tile: SizeLike | None) -> tuple[TileGrid | None, Size | None]:
    """The one of the two that says how a map is cut: how many tiles, or how large they are.

    Raises:
        ValueError: Both or neither are given, or the one that is given is wrong.
    """
    if (grid is None) == (tile is None):
        raise ValueError(
            f"grid={shown(grid)}, tile={shown(tile)}: give one of the two, grid=(rows, cols) for the number of tiles "
            "or tile=(h, w) for the size of one."
        )
    return None if grid is None else TileGrid.of(grid), None if tile is None else check_size(tile, "tile")


class LiveTiles(NamedTuple):
    """Which tiles of either perspective are present, by index, in order."""

    local: tuple[int, ...]
    stride: tuple[int, ...]


class Placement(NamedTuple):
    """Where an image lies on the canvas of its tiles: from the top left on, with padding at the bottom and the right.

    Attributes:
        grid: Rows and columns of tiles.
        tile: Size (h, w) of a tile in pixels.
        size: Size (H, W) of the image as it was given.
        real: Size of the part of the canvas that the image fills, after it was cropped or resized; the rest is padding.

    Example:
        >>> photo = Placement(TileGrid(2, 3), tile=(336, 336), size=(600, 900), real=(600, 900))
        >>> photo.real_at((24, 24)), photo.seen("global", (24, 24))
        ((43, 65), (44, 66))
    """

    grid: TileGrid
    tile: Size
    size: Size
    real: Size

    @property
    def padded(self) -> bool:
        """Whether there is padding."""
        return self.real != self.grid.map_size(self.tile)

    def real_at(self, tile: Size) -> Size:
        """Size of the part that the image fills of a map whose tiles have ``tile`` = (h', w') cells.

        This is the same share of the map as it is of the canvas, with a cell that is partly image counted in:
        predictions at a quarter of the size cover ceil(H / 4) x ceil(W / 4).
        """
        height, width = (-(-r * cells // size) for r, cells, size in zip(self.real, tile, self.tile, strict=True))
        return height, width

    def seen(self, perspective: Perspective, tokens: Size) -> Size:
        """Size of the part of a token map whose tokens see at least one pixel of the image.

        A token of a local tile sees a patch of the canvas, one of a stride tile pixels that lie ``rows`` and ``cols``
        apart: at the border more of these see a bit of the image.

        Args:
            perspective: Of the tiles that were encoded.
            tokens: Token map (h', w') of one tile. Pixels beyond whole patches are not seen.

        Raises:
            ValueError: A tile does not split into that many whole patches: it has fewer pixels than tokens, or so many
                pixels beyond whole patches that another would fit.
        """
        tokens = check_size(tokens, "tokens")
        height, width = (
            _first_unseen(perspective, *axis) for axis in zip(self.grid, self.tile, tokens, self.real, strict=True)
        )
        return height, width


def _first_unseen(perspective: Perspective, tiles: int, size: int, cells: int, real: int) -> int:
    """The number of cells on an axis that see one of its first ``real`` pixels, which are the first cells."""
    patch = size // cells
    if size // max(patch, 1) != cells:
        raise ValueError(
            f"tokens: a tile of {size} pixels does not split into {cells} patches, so a mask of pixels has no exact "
            "mask of tokens: give the key_mask yourself."
        )
    pixels = (position(perspective, i, u * patch, tiles, size) for i in range(tiles) for u in range(cells))
    return sum(pixel < real for pixel in pixels)


def check_grids(grids: object, name: str) -> tuple[TileGrid, ...]:
    """A sequence of grids, one per image.

    Raises:
        ValueError: It is none, or one of them is no grid.
    """
    if isinstance(grids, TEXTS) or not isinstance(grids, Sequence):
        raise ValueError(f"{name}={shown(grids)}: must be a list of grids (rows, cols), one per image.")
    return tuple(TileGrid.of(grid, f"{name}[{i}]") for i, grid in enumerate(grids))


def check_placements(images: object, grids: tuple[TileGrid, ...], name: str) -> tuple[Placement, ...]:
    """A sequence of placements, one per image, on these grids.

    Raises:
        TypeError: It is none, or one of them is no placement.
        ValueError: Their grids are others.
    """
    given: Any = check_instance(images, name, (tuple, list), "a list of Placements, one per image, or None")
    for i, image in enumerate(given):
        check_instance(image, f"{name}[{i}]", Placement, "a Placement, as DualPerspectiveCrop gives it")
    if tuple(image.grid for image in given) != grids:
        raise ValueError(
            f"TileBatch {name} of grids {[str(image.grid) for image in given]} do not fit its grids "
            f"{[str(grid) for grid in grids]}."
        )
    return tuple(given)


def check_live(live: object, grid: TileGrid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which local and which stride tiles of a grid are present, by index: all where ``live`` is None.

    Raises:
        ValueError: ``live`` is no pair of tile indices, each of the grid and once.
    """
    every = tuple(range(grid.num_tiles))
    if live is None:
        return every, every
    given: Any = live
    try:
        found: Any = _indices(grid.num_tiles, tuple(given[0]), tuple(given[1])) if len(given) == 2 else None
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
        found = None
    if found is None:
        raise ValueError(
            f"live={shown(live)}: must be two sequences, of local and of stride tiles of a grid of {grid}, each by its "
            f"index from 0 to {grid.num_tiles - 1} and at most once, as dem.plan(grid, (h, w)).live."
        )
    return found[0], found[1]


def _indices(tiles: int, *given: tuple[object, ...]) -> Any:
    """Both as integers, None where one is no index of a tile or stands there twice."""
    pair = tuple(tuple(map(integer_of, indices)) for indices in given)
    right = all(set(indices) <= set(range(tiles)) and len(set(indices)) == len(indices) for indices in pair)
    return pair if right else None


def check_needed(
    present: tuple[tuple[int, ...], tuple[int, ...]], local: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """Raise a ValueError unless every tile that is needed is present."""
    if not (set(local).issubset(present[0]) and set(stride).issubset(present[1])):
        missing = [sorted(set(needed) - set(given)) for needed, given in zip((local, stride), present, strict=True)]
        raise ValueError(
            f"live={shown(present)}: missing are local tiles {missing[0]} and stride tiles {missing[1]}, which are "
            "needed. Pass those of dem.plan(grid, (h, w)).live."
        )


# All that torch.compiler.assume_constant_result does, which loads the whole compiler: torch 2.11 cannot trace these.
_indices._dynamo_marked_constant = True  # type: ignore[attr-defined]
check_needed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_tokens(tokens: SizeLike, grid: TileGrid) -> Size:
    """The token map (h, w) of one tile, if it can be planned for a grid.

    Raises:
        ValueError: It is no size, or the map of all tiles has a side of more than 262,144 tokens.
    """
    size = check_size(tokens, "tokens")
    if max(grid.map_size(size)) > MOST_TOKENS:
        raise ValueError(
            f"tokens={size} for each tile of a grid of {grid}: a plan goes through the map row by row and column by "
            f"column, and takes at most {MOST_TOKENS:,} of either. Was a size in pixels meant?"
        )
    return size


def check_perspective(perspective: Perspective) -> Perspective:
    """``perspective`` if it is "local" or "global".

    Raises:
        ValueError: It is something else.
    """
    return check_choice(perspective, "perspective", PERSPECTIVES)


def check_perspectives(perspectives: object) -> tuple[Perspective, ...]:
    """One perspective or both, in a tuple.

    Raises:
        ValueError: It is something else.
    """
    given: Any = perspectives if isinstance(perspectives, tuple | list) else ()
    if not given or any(not isinstance(each, str) or each not in PERSPECTIVES for each in given):
        raise ValueError(
            f'perspectives={shown(perspectives)}: must be ("local", "global"), or one of the two such as ("local",).'
        )
    return tuple(given)


class AxisSplit(NamedTuple):
    """How an axis of tiles * size positions unflattens: the two factors, and which of them counts tiles."""

    factors: tuple[int, int]
    tile_factor: int


def split_axis(perspective: Perspective, tiles: int, size: int) -> AxisSplit:
    """State the two bijections: position = tile * size + offset (local), or offset * tiles + tile (global).

    Args:
        perspective: "local" or "global".
        tiles: Number of tiles along the axis.
        size: Number of positions of one tile along the axis.

    Example:
        >>> split_axis("local", tiles=3, size=24)
        AxisSplit(factors=(3, 24), tile_factor=0)
        >>> split_axis("global", tiles=3, size=24)
        AxisSplit(factors=(24, 3), tile_factor=1)
    """
    if perspective == "local":
        return AxisSplit((tiles, size), 0)
    return AxisSplit((size, tiles), 1)


def position(perspective: Perspective, tile: int, offset: int, tiles: int, size: int) -> int:
    """Position on the axis of ``offset`` inside ``tile``: the inverse of cutting the axis into tiles.

    Example:
        >>> position("local", tile=1, offset=2, tiles=3, size=24)
        26
        >>> position("global", tile=1, offset=2, tiles=3, size=24)
        7
    """
    (_, inner), tile_factor = split_axis(perspective, tiles, size)
    outer_index, inner_index = (tile, offset) if tile_factor == 0 else (offset, tile)
    return outer_index * inner + inner_index


def tile_slice(perspective: Perspective, tile: int, tiles: int, size: int) -> slice:
    """The positions of one tile on the axis.

    Example:
        >>> tile_slice("local", tile=1, tiles=3, size=24), tile_slice("global", tile=1, tiles=3, size=24)
        (slice(24, 48, 1), slice(1, 71, 3))
    """
    first, last = (position(perspective, tile, offset, tiles, size) for offset in (0, size - 1))
    return slice(first, last + 1, max(1, (last - first) // max(1, size - 1)))


def readout_support(readout: Readout, n: int) -> range:
    """Which of the n tokens of a cell, along one axis, a readout averages.

    Bilinear interpolation from n h to h positions without antialiasing samples n u + (n - 1) / 2: the centre token for
    odd n, halfway between the two central ones for even n.

    Example:
        >>> [list(readout_support(name, 4)) for name in ("average", "bilinear", "centre")]
        [[0, 1, 2, 3], [1, 2], [2]]
    """
    if readout == "bilinear":
        return range((n - 1) // 2, n // 2 + 1)
    if readout == "centre":
        return range(n // 2, n // 2 + 1)
    return range(n)


def choose_grid(size: SizeLike, tile: SizeLike, max_tiles: int) -> TileGrid:
    """The grid that keeps most of an image's detail within a budget of tiles, given its aspect ratio.

    Each candidate grid with at most ``max_tiles`` tiles is judged by fitting the image into it with its aspect ratio
    kept. The rule, in order:

    1. most source pixels kept (an image is never credited for being enlarged), compared in exact rational arithmetic;
    2. among equals, fewest tiles. (Two grids of as many tiles that keep as much cannot both be best: the smaller grid
       that fits in both keeps as much, too.)

    Args:
        size: Image size (H, W) in pixels.
        tile: Tile size (h, w) in pixels, or one number for a square.
        max_tiles: Most tiles that one perspective may have, from 1 to 16,384.

    Raises:
        ValueError: A size is not positive, or ``max_tiles`` is not from 1 to 16,384.

    Example:
        >>> choose_grid((1008, 672), tile=(336, 336), max_tiles=9)
        TileGrid(rows=3, cols=2)
    """
    (height, width), (h, w) = check_size(size, "image size"), check_size(tile, "tile")
    max_tiles = check_count(max_tiles, "max_tiles", high=MOST_TILES)

    def cost(grid: TileGrid) -> tuple[Fraction, int]:
        canvas_height, canvas_width = grid.map_size((h, w))
        scale = min(Fraction(canvas_height, height), Fraction(canvas_width, width), Fraction(1))
        return -scale, grid.num_tiles

    def best_of(rows: int) -> TileGrid:
        """Of the grids with these rows: as many columns as the scale that the rows allow can fill, if so many fit."""
        filled = -(-width * min(rows * h, height) // (height * w))
        return TileGrid(rows, min(filled, max_tiles // rows))

    # Rows beyond what the image fills at full size keep no more.
    return min((best_of(rows) for rows in range(1, min(max_tiles, -(-height // h)) + 1)), key=cost)
