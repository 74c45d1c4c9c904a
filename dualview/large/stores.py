"""New arrays on disk, in a .npy file that is mapped into memory or in a zarr store: complete, or not there."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dualview.large.sources import need


class NewStore:
    """An array that is written beside its place, and takes its name when it is complete.

    Args:
        path: Ends in .npy or .zarr.
        shape: Its shape.
        dtype: Its type.
        chunks: Of a zarr store.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, ...]) -> None:
        check_new(path)
        self.path, self.beside = path, path.with_name(f".dualview-{secrets.token_hex(8)}{path.suffix}")
        try:
            if path.suffix == ".npy":
                self.array: Any = np.lib.format.open_memmap(self.beside, "w+", dtype, shape)
                with self.beside.open("r+b") as file:  # a disk that gets full later would end the process
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, self.beside.stat().st_size)
            else:
                whole = tuple(min(chunk, side) for chunk, side in zip(chunks, shape, strict=True))
                self.array = need("zarr").create_array(store=self.beside, shape=shape, chunks=whole, dtype=dtype)
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Give it its name."""
        if isinstance(self.array, np.memmap):
            self.array.flush()
        del self.array
        if self.path.is_dir():
            raise FileExistsError(f"{self.path} has come into being meanwhile; what was written is in {self.beside}.")
        self.beside.replace(self.path)

    def discard(self) -> None:
        """Remove what has been written."""
        self.array = None
        if self.beside.is_dir():
            shutil.rmtree(self.beside, ignore_errors=True)
        with suppress(OSError):
            self.beside.unlink()


def check_new(path: Path) -> None:
    """Refuse what could not be written in the end, before anything is computed.

    Raises:
        ValueError: The name ends in neither .npy nor .zarr.
        FileNotFoundError: The folder does not exist.
        FileExistsError: There is a folder of that name, or a file that a .zarr store would replace. (A .npy file of
            that name is replaced.)
        ImportError: It ends in .zarr, and zarr is not installed.
    """
    if path.suffix not in (".npy", ".zarr"):
        raise ValueError(
            f"{path}: the name must end in .npy (an array of numpy, mapped into memory) or in .zarr (a zarr store)."
        )
    if path.suffix == ".zarr":
        need("zarr")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist: make it first.")
    if path.is_dir() or (path.suffix == ".zarr" and path.exists()):
        raise FileExistsError(f"{path} exists: remove it first, or choose another name.")
