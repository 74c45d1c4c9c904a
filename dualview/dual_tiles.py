"""Tiles of both perspectives that remember the images that they were cut from: what the dual-perspective crop makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from dualview.arguments import TEXTS, check_flags, check_instance, shown
from dualview.geometry import GridLike, Perspective, Placement, Size, TileGrid, check_perspective
from dualview.ops.tile_batch import TileBatch
from dualview.records import Record
from dualview.tensors import check_tensors
from dualview.views import check_tile_pair, rectangle

Group: TypeAlias = tuple[Sequence[int], tuple[Tensor, Tensor, TileGrid, tuple[Tensor, Tensor] | None]]
"""Images of one grid: their indices in the batch where there are others; local tiles, stride tiles, grid and masks."""


NAMES: dict[Perspective, str] = {"local": "local", "global": "stride"}
"""What the tiles of a perspective are called here."""


class DualTiles(Record, tensors=("local", "stride")):
    """What both records have: the tiles of either perspective, and the four parts in order."""

    local: Any
    stride: Any
    grid: Any
    valid: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.local, self.stride, self.grid, self.valid))

    def __getitem__(self, part: Any) -> Any:
        return tuple(self)[part]

    @property
    def _held(self) -> dict[Perspective, Any]:
        """The perspectives whose tiles are held, and these."""
        both: dict[Perspective, Any] = {"local": self.local, "global": self.stride}
        return {perspective: tiles for perspective, tiles in both.items() if tiles is not None}

    @property
    def _first(self) -> Any:
        """The tiles of one perspective: what both have in common is asked of these."""
        return next(iter(self._held.values()))

    def of(self, perspective: Any) -> Any:
        """The tiles of a perspective.

        Raises:
            ValueError: There is no such perspective, or its tiles are not held.
        """
        if check_perspective(perspective) not in self._held:
            raise ValueError(
                f"perspective={perspective!r}: only tiles of {tuple(self._held)} are held. DualPerspectiveCrop cuts "
                "both perspectives unless told otherwise; with_data keeps what it is given."
            )
        return self._held[perspective]


@dataclass(frozen=True, eq=False, repr=False)
class DualPerspectiveTiles(DualTiles):
    """What [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] makes of images of one size, or what became of it.

    It unpacks as ``local, stride, grid, valid``.

    Attributes:
        local: Contiguous blocks, (..., rows*cols, C, h, w), or their features; None if they are not held.
        stride: Interleaved strides, likewise.
        image: Where each image lies on the canvas of its tiles: the grid, the size of a tile in pixels, the size of the
            image as it was given and on the canvas.
        low_pass: Whether ``stride`` holds smoothed pixels, which are not those of the image.

    Raises:
        ValueError: The tiles are not as many as the grid has.
        TypeError: ``local`` or ``stride`` is no tensor.

    Example:
        >>> from dualview import DualPerspectiveCrop, recombine
        >>> tiles = DualPerspectiveCrop(tile=(4, 4), remainder="pad")(torch.ones(3, 7, 9))
        >>> tiles.grid, tiles.image.size, tuple(tiles.valid.shape)
        (TileGrid(rows=2, cols=3), (7, 9), (8, 12))
        >>> features = tiles.with_data(local=torch.rand(6, 2, 2, 64))
        >>> recombine(features, "local", data_format="channels_last").shape
        torch.Size([4, 6, 64])
    """

    local: Tensor | None
    stride: Tensor | None
    image: Placement
    low_pass: bool = False

    def __post_init__(self) -> None:
        check_flags(low_pass=self.low_pass)
        check_instance(self.image, "image", Placement, "a Placement, as DualPerspectiveCrop gives it")
        named = {NAMES[perspective]: x for perspective, x in self._held.items()}
        check_tensors(**named or {"local": None})
        count = self.grid.num_tiles
        for name, tiles in named.items():
            if tiles.dim() < 4 or tiles.shape[-4] != count:
                raise ValueError(
                    f"{name} tiles of shape {tuple(tiles.shape)} for a grid of {self.grid}: they must be "
                    f"(..., {count}, C, h, w) or (..., {count}, h, w, D). What an encoder made of a whole batch needs "
                    f".unflatten(0, (-1, {count})), and flattened tokens .unflatten(-2, (h, w))."
                )

    @property
    def grid(self) -> TileGrid:
        """Rows and columns of tiles."""
        return self.image.grid

    @property
    def size(self) -> Size:
        """Size (H, W) of the image as it was given."""
        return self.image.size

    @property
    def valid(self) -> Tensor:
        """A mask (rows*h, cols*w) of the canvas, False where pixels were padded."""
        return rectangle(self.image.real, self.grid.map_size(self.image.tile), self._first.device)

    def with_data(self, *, local: Tensor | None = None, stride: Tensor | None = None) -> DualPerspectiveTiles:
        """The same images with other contents, of any size and width, such as the features of the tiles.

        What is not given is not held any more: pixels and features do not mix.

        Shape:
            - local, stride: (..., rows*cols, C, h, w) or (..., rows*cols, h, w, D)

        Raises:
            ValueError: The tiles are not as many as the grid has.
            TypeError: Neither is given, or one is no tensor.
        """
        return DualPerspectiveTiles(local, stride, self.image)

    def key_mask(self, tokens: Size) -> tuple[Tensor, Tensor]:
        """Which tokens see a pixel of the image: of the local and of the global map, (rows*h', cols*w') each.

        Args:
            tokens: Token map (h', w') of one tile.

        Raises:
            ValueError: A tile does not split into that many whole patches.
        """
        local, of_global = _key_masks([self.image], tokens, self._first.device)
        return local[0], of_global[0]

    def checked_grid(self, grid: GridLike | None) -> TileGrid:
        """The grid; a ValueError if one is given and differs from it."""
        if grid is not None and TileGrid.of(grid) != self.grid:
            raise ValueError(f"grid={shown(grid)} differs from that of the tiles, {self.grid}: omit the argument.")
        return self.grid

    def _groups(self) -> list[Group]:
        """The images as one group; one image without a batch dimension is a batch of one."""
        local, stride = (tiles[None] if tiles.dim() == 4 else tiles for tiles in (self.of("local"), self.of("global")))
        return [_group((), local, stride, self.grid, [self.image])]


@dataclass(frozen=True, eq=False, repr=False)
class DualPerspectiveTileBatch(DualTiles):
    """What [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] makes of a list of images, or what became of it.

    It unpacks as ``local, stride, grid, valid``, the last two with one entry per image.

    Attributes:
        local: Contiguous blocks, packed; None if they are not held.
        stride: Interleaved strides, packed; likewise.
        low_pass: Whether ``stride`` holds smoothed pixels, which are not those of the images.

    Raises:
        ValueError: The perspectives are exchanged, or the two are not of the same images.
        TypeError: ``local`` or ``stride`` is no `TileBatch`.

    Example:
        >>> from dualview import DualPerspectiveCrop
        >>> crop = DualPerspectiveCrop(tile=(4, 4), remainder="pad")
        >>> batch = DualPerspectiveTileBatch.collate([crop(torch.ones(3, 7, 9)), crop(torch.ones(3, 4, 5))])
        >>> batch.grid, batch.local.data.shape
        ((TileGrid(rows=2, cols=3), TileGrid(rows=1, cols=2)), torch.Size([8, 3, 4, 4]))
    """

    local: TileBatch | None
    stride: TileBatch | None
    low_pass: bool = False

    def __post_init__(self) -> None:
        check_flags(low_pass=self.low_pass)
        for perspective, tiles in self._held.items():
            check_instance(tiles, NAMES[perspective], TileBatch, "a TileBatch, or None")
            if tiles.perspective not in (None, perspective):
                raise ValueError(
                    f"tiles of the {tiles.perspective!r} perspective were given as the {perspective!r} ones: exchange "
                    "local and stride tiles."
                )
        if len({(tiles.grids, tiles.images) for tiles in self._held.values()}) != 1:
            raise ValueError(
                f"tiles of grids {[[str(g) for g in tiles.grids] for tiles in self._held.values()]}: give tiles of the "
                "same images, of at least one perspective."
            )

    @property
    def grid(self) -> tuple[TileGrid, ...]:
        """One grid per image."""
        return tuple(self._first.grids)

    @property
    def images(self) -> tuple[Placement, ...] | None:
        """Where each image lies on the canvas of its tiles; None if that is not known."""
        images: tuple[Placement, ...] | None = self._first.images
        return images

    @property
    def size(self) -> tuple[Size, ...] | None:
        """Size (H, W) of each image as it was given; None if that is not known."""
        return None if self.images is None else tuple(image.size for image in self.images)

    @property
    def valid(self) -> tuple[Tensor, ...] | None:
        """One (rows*h, cols*w) mask per image, False where pixels were padded; None if that is not known."""
        masks: tuple[Tensor, ...] | None = self._first.valid
        return masks

    @classmethod
    def collate(cls, tiles: Sequence[DualPerspectiveTiles]) -> DualPerspectiveTileBatch:
        """Pack the tiles of single images: the ``collate_fn`` of a `DataLoader`.

        Raises:
            ValueError: There are none, they are of whole batches, their sizes differ, or some lack a perspective.
            TypeError: ``tiles`` is no list of `DualPerspectiveTiles`.
        """
        if isinstance(tiles, TEXTS) or not isinstance(tiles, Sequence):
            raise TypeError(f"tiles={shown(tiles)}: must be a list of DualPerspectiveTiles.")
        for i, one in enumerate(tiles):
            check_instance(one, f"tiles[{i}]", DualPerspectiveTiles, "DualPerspectiveTiles of one image")
        images = [one.image for one in tiles]
        grids = [image.grid for image in images]

        def packed(parts: list[Tensor | None], perspective: Perspective | None) -> TileBatch | None:
            held = [part for part in parts if part is not None]
            return TileBatch.collate(held, grids, perspective, images) if held else None

        smoothed = any(one.low_pass for one in tiles)
        stride = packed([one.stride for one in tiles], None if smoothed else "global")
        return cls(packed([one.local for one in tiles], "local"), stride, smoothed)

    def with_data(self, *, local: Tensor | None = None, stride: Tensor | None = None) -> DualPerspectiveTileBatch:
        """The same images with other contents, as of [`DualPerspectiveTiles`][dualview.DualPerspectiveTiles].

        Shape:
            - local, stride: (total_tiles, C, h, w) or (total_tiles, h, w, D)
        """

        def packed(data: Tensor | None, perspective: Perspective) -> TileBatch | None:
            one = self._first
            check_tensors(**{} if data is None else {NAMES[perspective]: data})
            return None if data is None else TileBatch(data, one.offsets, one.grids, perspective, one.images)

        return DualPerspectiveTileBatch(packed(local, "local"), packed(stride, "global"))

    def checked_grid(self, grid: Sequence[GridLike] | None) -> tuple[TileGrid, ...]:
        """The grids; a ValueError if some are given and differ from them."""
        grids: tuple[TileGrid, ...] = self._first.checked_grids(grid, "grid")
        return grids

    def _groups(self) -> list[Group]:
        """The images of each grid as one group."""
        tiles, images = (self.of("local").split(), self.of("global").split()), self.images
        groups = []
        for grid in dict.fromkeys(self.grid):
            members = [place for place, other in enumerate(self.grid) if other == grid]
            local, stride = (torch.stack([one[place] for place in members]) for one in tiles)
            groups.append(_group(members, local, stride, grid, [images[place] for place in members] if images else []))
        return groups


def _group(members: Sequence[int], local: Tensor, stride: Tensor, grid: TileGrid, images: Sequence[Placement]) -> Group:
    """Of one image, the masks are those of any batch: no number of images is a constant for a compiler."""
    check_tile_pair(local, stride, grid, (range(grid.num_tiles),) * 2)
    masks = None
    if any(image.padded for image in images):
        of_local, of_global = _key_masks(images, (local.shape[2], local.shape[3]), local.device)
        masks = (of_local[0], of_global[0]) if len(images) == 1 else (of_local, of_global)
    return members, (local, stride, grid, masks)


def _key_masks(images: Sequence[Placement], tokens: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens that see a pixel, of the local and of the global maps of images of one grid."""
    local, of_global = (
        torch.stack([rectangle(image.seen(p, tokens), image.grid.map_size(tokens), device) for image in images])
        for p in get_args(Perspective)
    )
    return local, of_global


def groups_of(tiles: object, stride_tiles: object, grid: Any, key_mask: object) -> list[Group]:
    """What the enhancement module is given in place of plain tensors: tiles of both perspectives, or two batches.

    Raises:
        TypeError: It is neither.
        ValueError: The perspectives are exchanged or not both there, the grid differs, or a mask is given.
    """
    if isinstance(tiles, TileBatch) and isinstance(stride_tiles, TileBatch):
        tiles, stride_tiles = DualPerspectiveTileBatch(tiles, stride_tiles), None
    if not isinstance(tiles, DualPerspectiveTiles | DualPerspectiveTileBatch):
        check_tensors(local_tiles=tiles, stride_tiles=stride_tiles)
    elif stride_tiles is None and key_mask is None:
        tiles.checked_grid(grid)
        return tiles._groups()
    raise ValueError(
        "local_tiles remember their images: give them without stride_tiles and key_mask, or as two TileBatches, or "
        "give plain tensors."
    )
