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

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias, get_args

Perspective: TypeAlias = Literal["local", "global"]
Layout: TypeAlias = Literal["raster", "local", "global"]
"""How a map lies in memory: row by row, or tile by tile of a perspective."""
DataFormat: TypeAlias = Literal["channels_first", "channels_last"]
Readout: TypeAlias = Literal["average", "bilinear", "centre", "none"]
"""How a cell of rows x cols neighbouring tokens becomes one token."""
Size: TypeAlias = tuple[int, int]
"""A pair (height, width)."""

SizeLike: TypeAlias = int | Sequence[int]
"""A pair (height, width), or one number for a square."""

MOST_TILES = 16_384
"""Most tiles of a grid, 128 x 128: what follows from a grid is found tile by tile."""

MOST_SINGLE_CELLS = 1_024
"""Most tiles that may be single cells of their map."""


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
            if isinstance(count, bool) or not hasattr(count, "__index__") or count < 1:
                raise ValueError(
                    f"TileGrid(rows={self.rows!r}, cols={self.cols!r}): {name} must be a positive integer. "
                    "Give the number of tiles along the height first, then along the width."
                )
            if type(count) is not int:  # NumPy's integers
                object.__setattr__(self, name, operator.index(count))
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

    def map_size(self, tile: Size) -> Size:
        """Size (H, W) of the map that this grid makes of tiles of size ``tile`` = (h, w)."""
        return self.rows * tile[0], self.cols * tile[1]

    def tile_size(self, size: Size) -> Size:
        """Size (h, w) of one tile of a map of ``size`` = (H, W).

        Raises:
            ValueError: ``size`` is not a positive multiple of (rows, cols), or the tiles would be single cells, more
                than 1,024 of them: a tile size was given as the grid.
        """
        height, width = size
        if height < 1 or width < 1 or height % self.rows or width % self.cols:
            raise ValueError(
                f"a map of {height} x {width} (height x width) cannot be cut into {self.rows} x {self.cols} tiles: "
                f"the height must be a positive multiple of rows={self.rows} and the width of cols={self.cols}. "
                "Pad, crop or resize it first (DualPerspectiveCrop does, by its `remainder` argument)."
            )
        if (height, width) == (self.rows, self.cols) and self.num_tiles > MOST_SINGLE_CELLS:
            raise ValueError(
                f"a grid of {self.rows} x {self.cols} cuts a map of {height} x {width} (height x width) into single "
                f"cells, and more than {MOST_SINGLE_CELLS:,} are refused: was a tile size meant? "
                "TileGrid.for_image(size, tile) gives the grid."
            )
        return height // self.rows, width // self.cols

    @classmethod
    def of(cls, grid: GridLike) -> TileGrid:
        """The grid itself, or one made from a (rows, cols) pair.

        Raises:
            ValueError: ``grid`` is neither.
        """
        if isinstance(grid, TileGrid):
            return grid
        if isinstance(grid, (tuple, list)) and len(grid) == 2:
            return cls(*grid)
        raise ValueError(
            f"grid={grid!r} is not a grid: pass TileGrid(rows=..., cols=...) or a pair (rows, cols) of positive "
            "integers."
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
        match = re.fullmatch(r"([1-9]\d{0,17})[xX]([1-9]\d{0,17})", text.strip())
        if match is None:
            raise ValueError(f"grid {text!r}: write ROWSxCOLS with two positive integers, rows first, such as 2x3.")
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
                f"an image of {height} x {width} (height x width) is smaller than one tile of {h} x {w}: "
                "at least one whole tile must fit. Enlarge or pad the image, or choose a smaller tile."
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
                f"an image of {height} x {width} (height x width) is no whole number of {h} x {w} tiles. "
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
            f"grid={grid!r}, tile={tile!r}: give one of the two, grid=(rows, cols) for the number of tiles or "
            "tile=(h, w) for the size of one."
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
            ValueError: A tile has fewer pixels than tokens.
        """
        height, width = (
            _first_unseen(perspective, *axis) for axis in zip(self.grid, self.tile, tokens, self.real, strict=True)
        )
        return height, width


def _first_unseen(perspective: Perspective, tiles: int, size: int, cells: int, real: int) -> int:
    """The number of cells on an axis that see one of its first ``real`` pixels, which are the first cells."""
    patch = size // cells
    if size // max(patch, 1) != cells:
        raise ValueError(
            f"a tile of {size} pixels does not split into {cells} patches, so a mask of pixels has no exact mask of "
            "tokens: give the key_mask yourself."
        )
    pixels = (position(perspective, i, u * patch, tiles, size) for i in range(tiles) for u in range(cells))
    return sum(pixel < real for pixel in pixels)


def check_size(size: SizeLike, name: str) -> Size:
    """``size`` as a pair of positive integers (height, width), or a ValueError that says what was given.

    One integer stands for a square. Whatever counts as an integer does (NumPy's integers too); under ``torch.export``
    and ``torch.compile`` the values may be symbolic.
    """
    try:
        pair = tuple(size) if isinstance(size, Iterable) else (size, size)
        if any(isinstance(side, bool) for side in pair):
            raise TypeError
        height, width = (operator.index(side) for side in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={size!r}: give two positive integers (height, width), or one for a square.") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name}={size!r}: height and width must both be at least 1.")
    return height, width


def check_perspective(perspective: str) -> Perspective:
    """``perspective`` if it is "local" or "global".

    Raises:
        ValueError: It is something else.
    """
    if perspective not in get_args(Perspective):
        raise ValueError(
            f'perspective={perspective!r}: must be "local" (contiguous blocks) or "global" (interleaved strides).'
        )
    return perspective  # type: ignore[return-value]  # narrowed by the check above


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
    if isinstance(max_tiles, bool) or not hasattr(max_tiles, "__index__") or not 1 <= max_tiles <= MOST_TILES:
        raise ValueError(
            f"max_tiles={max_tiles!r}: give a positive integer, at least one tile is needed and at most {MOST_TILES:,} "
            "are taken."
        )

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
