"""A picture that does not fit into memory, written tile by tile."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualview.arguments import check_choice, check_path, check_size, shown
from dualview.blending import WINDOWS, Blender, Window, planes
from dualview.geometry import DATA_FORMATS, Border, DataFormat, Perspective, Size, SizeLike, check_perspective
from dualview.large.reader import stride_grid
from dualview.tensors import array_of, check_tensors
from dualview.tile_positions import BORDERS, TilePositions, check_lengths

if TYPE_CHECKING:
    from dualview.large.stores import NewStore


class TileWriter:
    """Writes tiles, in the order of a [`TileReader`][dualview.TileReader], as one picture: its inverse.

    Tiles are given one by one, or some at a time. Where local tiles overlap they are blended as by
    [`blend_tiles`][dualview.blend_tiles]. In memory are the rows that two rows of tiles share, for zarr and h5py a
    whole row of tiles. Stride tiles go to a file beside the target, and from there into the picture, in one pass over
    it, when all are there.

    It is a context manager: the file takes its name at the end of the block. If the block raises, or tiles are missing,
    what has been written is removed, and a file that was there before stays as it was.

    Args:
        target: A name that ends in .npy (an array of numpy, which ``numpy.load(name, mmap_mode="r")`` maps into memory)
            or .zarr; or an array of the picture's shape that can be assigned to (numpy, a memory map, zarr, h5py),
            which is written to directly.
        size: Height and width of the picture, at the resolution of the tiles.
        overlap: How much neighbouring local tiles share.
        margin: What to leave out at the edges of tiles before the blending, as for
            [`predict_tiled`][dualview.predict_tiled]; the overlap is at least twice as much.
        window: The weights: "constant", "linear" or "hann".
        border: The border that the tiles were cut with.
        perspective: "local" or "global". Stride tiles need a name as the target.
        data_format: Where the channels of tiles and picture are.

    Shape:
        - tiles: (C, h, w) or (T, C, h, w); (h, w, C) or (T, h, w, C) under "channels_last"
        - picture: (C, H, W), or (H, W, C); the type is that of the first tile

    Raises:
        ValueError: An argument is not one of the choices, tiles do not fit each other or the target, or there are too
            many or too few.
        TypeError: The target is none of these, tiles are no tensors, or of a type that numpy does not have.
        FileNotFoundError: The target's folder does not exist.
        FileExistsError: The target exists, and is a folder or is to be a .zarr store. (A .npy file is replaced.)
        ImportError: zarr is needed, and not installed.

    Example:
        >>> import numpy as np
        >>> import dualview as dv
        >>> picture = np.random.default_rng(0).random((3, 300, 500), dtype=np.float32)
        >>> reader = dv.TileReader(picture, tile=128, overlap=16)
        >>> out = np.empty_like(picture)
        >>> with dv.TileWriter(out, reader.size, overlap=16, window="hann") as writer:
        ...     for tile in reader:
        ...         writer.write(tile)
        >>> bool((out == picture).all())
        True
    """

    def __init__(
        self,
        target: Any,
        size: SizeLike,
        *,
        overlap: SizeLike = 0,
        margin: SizeLike = 0,
        window: Window = "constant",
        border: Border = "shift",
        perspective: Perspective = "local",
        data_format: DataFormat = "channels_first",
    ) -> None:
        from dualview.large.stores import check_new

        self.size = check_size(size, "size")
        self.overlap, self.margin = check_lengths(overlap, "overlap"), check_lengths(margin, "margin")
        self.window, self.border = check_choice(window, "window", WINDOWS), check_choice(border, "border", BORDERS)
        self.perspective, self.data_format = (
            check_perspective(perspective),
            check_choice(data_format, "data_format", DATA_FORMATS),
        )
        self.target = Path(check_path(target, "target")) if isinstance(target, str | os.PathLike) else target
        if isinstance(self.target, Path):
            check_new(self.target)
        elif isinstance(target, Tensor):
            self.target = array_of(target, "target")
        elif not (hasattr(target, "shape") and hasattr(target, "__setitem__")):
            raise TypeError(
                f"the target is a {type(target).__module__}.{type(target).__qualname__}: pass a name that ends in "
                ".npy or .zarr, or an array that can be assigned to."
            )
        if perspective == "global" and not isinstance(self.target, Path):
            raise ValueError('perspective="global" needs a name that ends in .npy or .zarr as the target.')
        self.written = self.total = 0
        self.closed = False
        self._stores: list[NewStore] = []

    def write(self, tiles: Tensor) -> None:
        """Write the next tile, or the next ones.

        Args:
            tiles: One tile, or several along a first dimension.

        Raises:
            ValueError: They are of another size or type than the first one, or more than there are.
            TypeError: They are no tensor.
        """
        check_tensors(tiles=tiles)
        if self.closed:
            raise ValueError("the writer is closed: nothing more can be written.")
        if tiles.is_meta:
            raise ValueError(f"tiles={shown(tiles)}: tensors on the device meta hold no values to write.")
        if tiles.dim() not in (3, 4):
            raise ValueError(
                f"tiles={shown(tiles)}: must be (C, h, w) or (T, C, h, w), with the channels "
                "last under data_format='channels_last'."
            )
        if 0 in tiles.shape[-3:]:
            raise ValueError(f"tiles={shown(tiles)}: they must hold at least one pixel.")
        batch = (tiles if tiles.dim() == 4 else tiles[None]).detach().cpu()
        if not self.total:
            try:
                self._start(batch)
            except ValueError as error:
                self.total = 0  # what was refused is not the first tile
                raise ValueError(f"tiles={shown(tiles)} do not fit: {error}") from error
        if (batch.shape[1:], batch.dtype) != self.kind:
            raise ValueError(f"tiles={shown(tiles)}: the first tile had shape and type {self.kind}, and all must.")
        if self.written + len(batch) > self.total:
            raise ValueError(
                f"tiles={shown(tiles)}: {len(batch)} tiles after {self.written} of {self.total} are too many."
            )
        for tile in batch:
            self._write(tile)
            self.written += 1

    def _start(self, batch: Tensor) -> None:
        """The first tile says how large all are, how many channels they have, and of which type."""
        self.kind = batch.shape[1:], batch.dtype
        height, width = planes(batch, self.data_format).shape[-2:]
        channels = planes(batch, self.data_format).shape[1]
        try:
            dtype = torch.empty(0, dtype=batch.dtype).numpy().dtype
        except TypeError as error:
            raise TypeError(f"tiles={shown(batch)}: numpy has no such type. Write tiles.float().") from error
        self.tile: Size = (height, width)
        if self.perspective == "global":
            self.grid = stride_grid(self.size, self.tile, self.overlap, self.border)
            self.total = self.grid.num_tiles
        else:
            positions = TilePositions.of(self.size, self.tile, self.overlap, self.border)
            rows, cols = positions.kept(self.margin)
            self.total = len(positions)
        self._open(channels, dtype)
        if self.perspective == "local":
            self.whole = self._mapped()
            self.blender = Blender(rows, cols, self.window, self._row)

    def _open(self, channels: int, dtype: Any) -> None:
        """Make the array, or look at the one that is given."""
        from dualview.large.stores import NewStore

        first = self.data_format == "channels_first"

        def shaped(plane: Size) -> tuple[int, ...]:
            return (channels, *plane) if first else (*plane, channels)

        if isinstance(self.target, Path):
            chunk = shaped((self.tile[0] - self.overlap[0], self.tile[1]))  # as the rows are finished
            self._stores.append(NewStore(self.target, shaped(self.size), dtype, chunk))
            self.array = self._stores[0].array
            if self.perspective == "global":
                beside = self.target.with_name(f"{self.target.stem}.tiles.npy")
                self._stores.append(NewStore(beside, (self.total, *shaped(self.tile)), dtype, ()))
            return
        self.array, shape = self.target, tuple(self.target.shape)
        allowed = [shaped(self.size), *([self.size] if channels == 1 else [])]
        if shape not in allowed or getattr(self.array, "dtype", dtype) != dtype:
            raise ValueError(
                f"the target has the shape {shape} and type {getattr(self.array, 'dtype', dtype)}; these tiles make "
                f"{' or '.join(map(str, allowed))} of {dtype}."
            )

    def _mapped(self) -> Tensor | None:
        """The picture (C, H, W), where it can be written to in place; None of zarr and the like."""
        import numpy as np

        if not isinstance(self.array, np.ndarray) or min(self.array.strides) < 0:
            return None
        if not self.array.flags.writeable:
            raise ValueError("the target is read-only: open it for writing (a memory map by mode='r+').")
        whole = torch.from_numpy(self.array)
        return whole[None] if whole.dim() == 2 else planes(whole, self.data_format)

    def _row(self, first: int, stop: int) -> Tensor:
        """For the rows from ``first`` to ``stop``, which one row of tiles makes."""
        shape, dtype = self.kind
        channels = shape[0 if self.data_format == "channels_first" else -1]
        if self.whole is None:
            return torch.empty((channels, stop - first, self.size[1]), dtype=dtype)
        return self.whole[:, first:stop]

    def _write(self, tile: Tensor) -> None:
        if self.perspective == "global":
            self._stores[1].array[self.written] = tile.numpy()
            return
        finished = self.blender.add(planes(tile, self.data_format))
        if finished is None or self.whole is not None:
            return
        top, rows = finished
        part, span = rows.numpy(), slice(top, top + rows.shape[-2])
        if span.start == span.stop:
            return
        if len(self.array.shape) == 2:
            self.array[span] = part[0]
        elif self.data_format == "channels_first":
            self.array[:, span] = part
        else:
            self.array[span] = rows.movedim(0, -1).numpy()

    def close(self) -> None:
        """Finish the picture; what a ``with`` block does at its end.

        Raises:
            ValueError: Tiles are missing. What has been written to a file is removed.
        """
        from dualview.large.strides import scatter

        if self.closed:
            return
        try:
            if self.written < self.total or not self.total:
                count = f"{self.written} of {self.total}" if self.total else "no"
                raise ValueError(f"{count} tiles were written: the picture is not complete.")
            if self.perspective == "global":
                scatter(self._stores[1].array, self.grid, self.array, self.size, self.tile, self.data_format)
            if self._stores:
                self._stores.pop(0).finish()
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what has been written to a file; nothing more can be written."""
        self.closed = True
        for store in self._stores:
            store.discard()

    def __enter__(self) -> TileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()
