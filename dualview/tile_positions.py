"""Where overlapping tiles lie, and what each of them contributes. Integers only, no tensors.

On either axis tiles start every ``tile - overlap`` positions, from 0 on, until the last one reaches the end. What the
last one would have beyond the end is settled by ``border``: "shift" moves it back until it ends with the axis (it then
overlaps its neighbour by more), "pad" leaves it where it is and fills it up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dualview.arguments import MOST, check_choice, check_size, integer_of, shown
from dualview.geometry import Border, Size, SizeLike

MOST_ALONG = 2**20
"""Most tiles along an axis."""
BORDERS = {"shift": "the last tiles are moved inside", "pad": "they are filled up with zeros"}


class Kept(NamedTuple):
    """A tile on an axis: where it starts, the positions ``first`` to ``stop`` that it contributes, and their ``end``.

    The end is that of the tile less the margin: beyond ``stop`` where the tile reaches beyond the map.
    """

    start: int
    first: int
    stop: int
    end: int


@dataclass(frozen=True)
class TilePositions:
    """Rectangular tiles, row by row, that cover a map of ``size``; neighbours share at least ``overlap`` positions.

    Args:
        size: Height and width of the map.
        tile: Height and width of a tile.
        overlap: Positions that neighbours share, below one another and side by side.
        border: "shift" or "pad".

    Raises:
        ValueError: The overlap is no smaller than the tile, or under "shift" the map is smaller than one tile.

    Example:
        >>> positions = TilePositions((5, 8), tile=(5, 4), overlap=(0, 1))
        >>> positions.grid, positions.corners()
        ((1, 3), [(0, 0), (0, 3), (0, 4)])
        >>> TilePositions((5, 8), tile=(5, 4), overlap=(0, 1), border="pad").corners()
        [(0, 0), (0, 3), (0, 6)]
    """

    size: Size
    tile: Size
    overlap: Size = (0, 0)
    border: Border = "shift"

    def __post_init__(self) -> None:
        check_choice(self.border, "border", BORDERS)
        if any(overlap >= tile for overlap, tile in zip(self.overlap, self.tile, strict=True)):
            raise ValueError(
                f"overlap={self.overlap} for tile={self.tile} (height, width): the overlap must be smaller than the "
                "tile on both axes."
            )
        if self.border == "shift" and any(tile > side for tile, side in zip(self.tile, self.size, strict=True)):
            raise ValueError(
                f"size={self.size} of the map is smaller than tile={self.tile} (height, width), and border='shift' has "
                "nowhere to move a tile to: pass border='pad', or a smaller tile."
            )
        steps = (tile - shared for tile, shared in zip(self.tile, self.overlap, strict=True))
        if any(side // step > MOST_ALONG for side, step in zip(self.size, steps, strict=True)):
            raise ValueError(
                f"size={self.size}, tile={self.tile}, overlap={self.overlap}: more than {MOST_ALONG:,} tiles along one "
                "axis. Take larger tiles, or less overlap."
            )

    @classmethod
    def of(cls, size: SizeLike, tile: SizeLike, overlap: object, border: Border) -> TilePositions:
        """The same from arguments that have not been checked yet."""
        return cls(check_size(size, "size"), check_size(tile, "tile"), check_lengths(overlap, "overlap"), border)

    @property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where rows of tiles start, and where columns of tiles start."""
        rows, cols = (_starts(*axis, self.border) for axis in zip(self.size, self.tile, self.overlap, strict=True))
        return rows, cols

    @property
    def grid(self) -> Size:
        """Rows and columns of tiles."""
        rows, cols = (_count(*axis) for axis in zip(self.size, self.tile, self.overlap, strict=True))
        return rows, cols

    def __str__(self) -> str:
        """In words, for errors."""
        (h, w), (rows, cols) = self.tile, self.grid
        return (
            f"a map of size={self.size} (height, width) has {rows} x {cols} = {rows * cols} tiles of {h} x {w} with "
            f"overlap={self.overlap} and border={self.border!r}"
        )

    def __len__(self) -> int:
        """The number of tiles."""
        return self.grid[0] * self.grid[1]

    def corners(self) -> list[Size]:
        """Where the tiles start, (top, left), in order."""
        rows, cols = self.starts
        return [(top, left) for top in rows for left in cols]

    def kept(self, margin: Size = (0, 0)) -> tuple[list[Kept], list[Kept]]:
        """What rows and columns of tiles contribute when ``margin`` positions are left out at every edge of a tile.

        An edge that lies on the border of the map is no edge: nothing is left out there.

        Raises:
            ValueError: The overlap is less than twice the margin, so positions would be left without a tile.
        """
        if any(2 * out > overlap for out, overlap in zip(margin, self.overlap, strict=True)):
            raise ValueError(
                f"overlap={self.overlap} for margin={margin} (height, width): the overlap must be at least twice the "
                "margin, or some positions would be in no tile."
            )
        rows, cols = (_kept(*axis) for axis in zip(self.starts, self.size, self.tile, margin, strict=True))
        return rows, cols


def _count(length: int, tile: int, overlap: int) -> int:
    return 1 + max(0, -(-(length - tile) // (tile - overlap)))


def _starts(length: int, tile: int, overlap: int, border: Border) -> tuple[int, ...]:
    step, count = tile - overlap, _count(length, tile, overlap)
    last = length - tile if border == "shift" else step * (count - 1)
    return (*range(0, step * (count - 1), step), last)


def _kept(starts: tuple[int, ...], length: int, tile: int, margin: int) -> list[Kept]:
    firsts = [min(start + (margin if start > 0 else 0), length) for start in starts]
    ends = [start + tile - (margin if start + tile < length else 0) for start in starts]
    return [
        Kept(start, first, min(end, length), max(first, end))
        for start, first, end in zip(starts, firsts, ends, strict=True)
    ]


def check_lengths(lengths: object, name: str) -> Size:
    """A pair of integers (height, width) from 0 on, or one for both.

    Raises:
        ValueError: It is something else.
    """
    pair = tuple(lengths) if isinstance(lengths, tuple | list) else (lengths, lengths)
    sides = [side for side in map(integer_of, pair) if side is not None and 0 <= side <= MOST]
    if len(pair) != 2 or len(sides) != 2:
        raise ValueError(
            f"{name}={shown(lengths)}: must be two integers (height, width) of at least 0, or one for both."
        )
    return sides[0], sides[1]
