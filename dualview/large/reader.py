"""Tiles of a picture that does not fit into memory, one after the other or in any order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from dualview.arguments import check_choice, check_flags, check_path, check_size, integer_of, shown
from dualview.blending import planes
from dualview.geometry import Border, DataFormat, Perspective, Size, SizeLike, TileGrid, check_perspective
from dualview.large.progress import counted
from dualview.tile_positions import BORDERS, TilePositions, check_lengths

if TYPE_CHECKING:
    from dualview.large.sources import Handle, Source


class TileReader(Dataset[Tensor]):
    """The tiles of a picture as a map-style dataset: for a loop, or for `torch.utils.data.DataLoader`.

    A local tile is read by itself when it is asked for. Stride tiles have pixels everywhere: they are gathered into
    ``store`` when the reader is made, in one pass over the source that decodes every chunk once.

    Args:
        source: A TIFF file, a .npy file or a zarr store, by its path; anything with ``shape`` and slices (an array of
            numpy, a memory map, zarr, h5py); or a function that opens one. What is given as a path or a function is
            opened anew in each worker of a DataLoader, which h5py and open TIFF files need.
        tile: The size (h, w) of a tile, or one number for a square.
        overlap: How much neighbouring local tiles share, (height, width) or one number for both.
        border: "shift" or "pad", as for [`local_crop`][dualview.local_crop]. Stride tiles cannot be moved: the picture
            is a whole number of tiles, or "pad" fills it up with zeros at the bottom and the right.
        perspective: "local" or "global".
        store: Where stride tiles go: a name that ends in .npy (mapped into memory) or .zarr. A .npy file of that name
            is replaced when all is gathered.
        data_format: Where the channels of the source are: "channels_first" for (C, H, W), "channels_last" for
            (H, W, C). None for what a TIFF file says, and "channels_first" of all others. A picture (H, W) gets a
            dimension of one channel.
        progress: Show a bar on standard error while stride tiles are gathered.

    Attributes:
        size: Height and width of the picture.
        tile: Height and width of a tile.
        grid: Rows and columns of tiles.
        data_format: Where the channels are.

    Raises:
        ValueError: The source is no single picture, or is stored in chunks of more than 256 MiB; or tile, overlap,
            border and store do not fit it or each other.
        TypeError: The source is none of what can be read, or of a type that tensors cannot hold.
        FileNotFoundError: There is no such file, or no such folder for the store.
        FileExistsError: There is a folder of the store's name.
        ImportError: tifffile or zarr is needed, and not installed.

    Example:
        >>> import numpy as np
        >>> import dualview as dv
        >>> picture = np.random.default_rng(0).integers(256, size=(300, 500, 3), dtype=np.uint8)
        >>> reader = dv.TileReader(picture, tile=(128, 256), overlap=(16, 16), data_format="channels_last")
        >>> len(reader), reader.grid, reader[4].shape, reader.position(4)
        (9, (3, 3), torch.Size([128, 256, 3]), (112, 240))
        >>> bool((reader[4].numpy() == picture[112:240, 240:496]).all())
        True
    """

    def __init__(
        self,
        source: Any,
        *,
        tile: SizeLike,
        overlap: SizeLike = 0,
        border: Border = "shift",
        perspective: Perspective = "local",
        store: str | os.PathLike[str] | None = None,
        data_format: DataFormat | None = None,
        progress: bool = False,
    ) -> None:
        from dualview.large.sources import Source

        check_perspective(perspective)
        check_flags(progress=progress)
        opened = Source(source, data_format)
        self.size, self.data_format, self.perspective = opened.size, opened.data_format, perspective
        if perspective == "local":
            if store is not None:
                raise ValueError(
                    f"store={shown(str(store))} is for stride tiles: local tiles are read from the source."
                )
            self.positions = TilePositions.of(self.size, tile, overlap, border)
            self.tile, self.grid, self.source = self.positions.tile, self.positions.grid, opened
        else:
            store = None if store is None else check_path(store, "store")
            self.tile = check_size(tile, "tile")
            grid = stride_grid(self.size, self.tile, overlap, border)
            self.grid, self.stored = (grid.rows, grid.cols), _gathered(opened, grid, self.tile, store, progress)

    def __len__(self) -> int:
        """The number of tiles."""
        return self.grid[0] * self.grid[1]

    def __getitem__(self, index: int) -> Tensor:
        """Tile number ``index``, row by row, as a new tensor (C, h, w) or (h, w, C) of the source's type."""
        from dualview.large.sources import tensor_of

        index = self._checked(index)
        if self.perspective == "global":
            return tensor_of(self.stored.array[index])
        (top, left), (h, w) = self._corner(index), self.tile
        bottom, right = min(top + h, self.size[0]), min(left + w, self.size[1])
        tile = tensor_of(self.source.read(slice(top, bottom), slice(left, right)))
        if (bottom - top, right - left) == self.tile:
            return tile
        padded = F.pad(planes(tile, self.data_format), (0, left + w - right, 0, top + h - bottom))
        return padded if self.data_format == "channels_first" else padded.movedim(-3, -1).contiguous()

    def position(self, index: int) -> Size:
        """Where the first pixel of a tile lies in the picture: (row, column).

        Raises:
            IndexError: There is no such tile.
        """
        index = self._checked(index)
        return self._corner(index) if self.perspective == "local" else divmod(index, self.grid[1])

    def _corner(self, index: int) -> Size:
        rows, cols = self.positions.starts
        return rows[index // len(cols)], cols[index % len(cols)]

    def _checked(self, index: int) -> int:
        if (number := integer_of(index)) is None:
            raise TypeError(f"index={shown(index)}: must be an integer, the number of a tile.")
        if not -len(self) <= number < len(self):
            raise IndexError(f"index={number}: tile {number} of {len(self)}: numbers run from 0 to {len(self) - 1}.")
        return number % len(self)


def stride_grid(size: Size, tile: Size, overlap: object, border: str) -> TileGrid:
    """The grid of stride tiles of a picture.

    Raises:
        ValueError: Stride tiles are asked to overlap, or the picture is no whole number of tiles under "shift".
    """
    if check_lengths(overlap, "overlap") != (0, 0):
        raise ValueError(
            f"overlap={shown(overlap)}: stride tiles lie between each other and cannot overlap; pass overlap=0."
        )
    check_choice(border, "border", BORDERS)
    if border == "shift" and (size[0] % tile[0] or size[1] % tile[1]):
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} (height x width) is no whole number of stride tiles of {tile[0]} x "
            f"{tile[1]}, and they cannot be moved inside: pass border='pad' to fill it up with zeros."
        )
    return TileGrid(-(-size[0] // tile[0]), -(-size[1] // tile[1]))


def _gathered(
    source: Source, grid: TileGrid, tile: Size, store: str | os.PathLike[str] | None, progress: bool
) -> Handle:
    """The store that holds the stride tiles, opened for reading."""
    from dualview.large.sources import Handle
    from dualview.large.stores import NewStore
    from dualview.large.strides import gather

    if store is None:
        raise ValueError(
            'perspective="global" needs store="NAME.npy" or "NAME.zarr": a place on disk for the stride tiles.'
        )
    first = source.data_format == "channels_first"
    shape = (grid.num_tiles, *((source.channels, *tile) if first else (*tile, source.channels)))
    block, _ = next(source.blocks())  # the first one starts at 0, and none is larger
    rows = max(1, block.stop // grid.rows)  # that one block fills
    chunks = (1, source.channels, rows, tile[1]) if first else (1, rows, tile[1], source.channels)
    new = NewStore(Path(store), shape, source.dtype.newbyteorder("="), chunks)
    try:
        with counted(source.size[0] * source.size[1], "gathering", "pixel", shown=progress) as done:
            gather(source, grid, tile, new.array, done)
        new.finish()
    except BaseException:
        new.discard()
        raise
    return Handle(Path(store))
