"""Arrays that are read in parts, wherever they are: in files, in memory, or computed when they are asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualview.arguments import check_choice, shown
from dualview.geometry import DATA_FORMATS, DataFormat, Size
from dualview.tensors import array_of

try:
    import numpy as np
except ImportError as missing:
    raise ImportError('numpy is not installed: run pip install -e ".[large]" in your clone.') from missing

BLOCK_BYTES = 2**24
"""What is read at once when a whole source is gone through, where its chunks allow it."""
MOST_CHUNK_BYTES = 2**28
"""Largest chunk that is read: a file that is one chunk would have to be loaded as a whole for every tile."""


def need(name: str) -> Any:
    """An optional library, or an ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{name} is not installed: run pip install -e ".[large]" in your clone.') from error


class Handle:
    """An array, opened when it is needed: anew in each process, if it is given by a path or a function.

    Two processes that share one open file, as forked ones do, would each move the other's place in it.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self._opened: tuple[int, Any, DataFormat | None] | None = None

    @property
    def array(self) -> Any:
        """The array itself."""
        return self._open()[1]

    @property
    def found(self) -> DataFormat | None:
        """Where a file says that its channels are."""
        return self._open()[2]

    def _open(self) -> tuple[int, Any, DataFormat | None]:
        if self._opened is None or (self._opened[0] != os.getpid() and _opens_anew(self.given)):
            self._opened = (os.getpid(), *_opened(self.given))
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: of files their names, never their contents."""
        given = _name_of(self.given) if isinstance(self.given, np.memmap) else self.given
        return {"given": given, "_opened": None}


class Source:
    """A picture that is read in rectangles.

    Args:
        given: A path, an array, or a function that opens one.
        data_format: Where the channels are; None for what a TIFF file says, or "channels_first".
    """

    def __init__(self, given: Any, data_format: DataFormat | None) -> None:
        self.handle = Handle(given)
        array = self.handle.array
        shape = tuple(int(side) for side in array.shape)
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(
                f"source={shown(given)} has the shape {shape}: it must be one picture, (H, W), (C, H, W) or (H, W, C). "
                "Of a stack, pass one picture, or a function that opens it."
            )
        self.data_format = check_choice(
            (self.handle.found or "channels_first") if data_format is None else data_format, "data_format", DATA_FORMATS
        )
        if len(shape) == 3 and self.data_format == "channels_first" and shape[0] > 16 and shape[2] in (3, 4):
            raise ValueError(
                f"a source of shape {shape} under data_format='channels_first' has {shape[0]} channels and a width of "
                f"{shape[2]}: its channels seem to come last. Pass data_format='channels_last'."
            )
        self.flat, self.first = len(shape) == 2, len(shape) == 3 and self.data_format == "channels_first"
        self.size: Size = shape[1:] if self.first else shape[:2]  # type: ignore[assignment]
        self.channels = 1 if self.flat else shape[0 if self.first else 2]
        self.dtype = _checked_type(array)
        self._chunk()  # or an error

    def read(self, rows: slice, cols: slice) -> np.ndarray[Any, Any]:
        """A rectangle, with its channels first or last; it may share memory with the source."""
        part = np.asarray(self.handle.array[(slice(None), rows, cols) if self.first else (rows, cols)])
        return part if not self.flat else part[None] if self.data_format == "channels_first" else part[..., None]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rectangles that cover the source, whole chunks in each, so that every chunk is decoded once."""
        return blocks(self.size, self._chunk(), self.channels * self.dtype.itemsize)

    def _chunk(self) -> Size | None:
        chunks, shape = getattr(self.handle.array, "chunks", None), tuple(self.handle.array.shape)
        if chunks is None:
            return None
        held = int(np.prod(chunks)) * self.dtype.itemsize
        if held > MOST_CHUNK_BYTES:
            raise ValueError(
                f"the source of shape {shape} is stored in chunks of {tuple(chunks)}, {held:,} bytes, which can only "
                f"be read as a whole; at most {MOST_CHUNK_BYTES:,} are taken. Store it in smaller ones: TIFF in tiles."
            )
        return tuple(chunks[1:] if self.first else chunks[:2])


def blocks(size: Size, chunk: Size | None, bytes_each: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of whole chunks, as many as `BLOCK_BYTES` hold; whole rows where there are no chunks."""
    (height, width), (ch, cw) = size, chunk or (1, size[1])
    across = min(-(-width // cw), max(1, BLOCK_BYTES // (ch * cw * bytes_each))) * cw
    down = ch if across < width else max(1, BLOCK_BYTES // (ch * across * bytes_each)) * ch
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield slice(top, min(top + down, height)), slice(left, min(left + across, width))


def tensor_of(part: np.ndarray[Any, Any]) -> Tensor:
    """A contiguous copy in this machine's byte order."""
    return torch.from_numpy(np.array(part, dtype=part.dtype.newbyteorder("="), order="C"))


def _opens_anew(given: Any) -> bool:
    """Whether it is a path or a function."""
    return isinstance(given, str | os.PathLike) or (callable(given) and not hasattr(given, "shape"))


def _opened(given: Any) -> tuple[Any, DataFormat | None]:
    """The array, and where a file says that its channels are."""
    if isinstance(given, str | os.PathLike):
        return _of_file(Path(given))
    array = given() if _opens_anew(given) else given
    if isinstance(array, Tensor):
        array = array_of(array, "source")
    if not (isinstance(getattr(array, "shape", None), tuple) and hasattr(array, "__getitem__")):
        raise TypeError(
            f"source={shown(given)}: the source is a {type(array).__module__}.{type(array).__qualname__}: "
            "pass a path, an array with a shape and slices, or a function that opens one."
        )
    return array, None


def _of_file(path: Path) -> tuple[Any, DataFormat | None]:
    if not os.path.exists(path):  # noqa: PTH110 - Path raises where a name is too long
        raise FileNotFoundError(f"source={shown(str(path))} does not exist.")
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        except ValueError as error:
            raise ValueError(f"{path} holds no array that can be mapped into memory: {error}") from error
    if path.is_dir() or path.suffix == ".zarr":
        return need("zarr").open_array(path, mode="r"), None
    tifffile = need("tifffile")
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            axes, shape, plain = series.axes, series.shape, series.dataoffset is not None
    except tifffile.TiffFileError as error:
        raise ValueError(
            f"{path} is no TIFF file ({error}), and its name ends in neither .npy nor .zarr. Pictures that fit into "
            "memory are read by dualview.load_image."
        ) from error
    if len(shape) > 3 or not (axes.endswith("YX") or axes[-3:-1] == "YX"):
        raise ValueError(f"{path} holds an array {shape} with the axes {axes}: pass a function that opens one picture.")
    found: DataFormat = "channels_first" if axes.endswith("YX") else "channels_last"
    if plain:  # not compressed, and in one piece
        return tifffile.memmap(path, mode="r"), found
    return need("zarr").open_array(tifffile.imread(path, aszarr=True, series=0, level=0), mode="r"), found


def _checked_type(array: Any) -> np.dtype[Any]:
    """Its type, if tensors can have it."""
    dtype = np.dtype(array.dtype) if hasattr(array, "dtype") else np.asarray(array[:1, :1]).dtype
    try:
        torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
    except TypeError as error:
        raise TypeError(f"the source holds {dtype}, which no tensor can hold.") from error
    return dtype


def _name_of(array: np.memmap[Any, Any]) -> Any:
    """How to map the same file again."""
    from functools import partial
    from mmap import mmap

    if array.filename is None or not isinstance(array.base, mmap):
        raise TypeError(
            "a part of a memory-mapped file cannot be sent to another process without loading it: pass the path, or a "
            "function that opens it, as the source."
        )
    order = "C" if array.flags.c_contiguous else "F"
    return partial(np.memmap, array.filename, array.dtype, "r", array.offset, array.shape, order)
