"""Process a slide that the process could not hold: read it by tiles, write the result by tiles.

What you learn: `TileReader` reads each tile alone, from a TIFF file or anything with a shape and slices; `TileWriter`
blends the results and writes them to disk as they come. The slide is generated, pixel by pixel, when it is read; no
file of it exists. On Linux the process may get only a part of the slide's size while it works.

    python examples/slide_larger_than_memory.py
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import dualview as dv

SIDE, TILE, LIMIT = 12_288, 1_024, 96 * 2**20


class Slide:
    """Cells on a pale ground, (H, W) of bytes."""

    shape, dtype = (SIDE, SIDE), np.dtype(np.uint8)

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """Compute the pixels of a rectangle."""
        rows, cols = (np.arange(*part.indices(SIDE)) % 64 - 32 for part in key)
        return (230 - 150 * (rows[:, None] ** 2 + cols**2 < 20**2)).astype(np.uint8)


@contextlib.contextmanager
def limited(more: int) -> Iterator[None]:
    """Let the process get only so many more bytes; does nothing where there is no /proc."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    held = int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmData:")[2].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def halved(tile: torch.Tensor) -> torch.Tensor:
    """A model that makes a map of half the size: here the mean of 2 x 2 pixels."""
    return F.avg_pool2d(tile[None].float(), 2)[0].byte()


def main() -> None:
    """Read, process, write, and look at what was written."""
    torch.set_num_threads(1)
    reader = dv.TileReader(Slide(), tile=TILE, overlap=64)
    print(f"slide:  {SIDE} x {SIDE} pixels, {SIDE**2 / 2**20:.0f} MiB; {len(reader)} tiles of {TILE} x {TILE}")
    with limited(LIMIT):
        with dv.TileWriter("slide_halved.npy", (SIDE // 2, SIDE // 2), overlap=32, window="linear") as writer:
            for tile in reader:
                writer.write(halved(tile))
        print(f"limit:  {LIMIT / 2**20:.0f} MiB beyond what the imports hold")
        result = np.load("slide_halved.npy", mmap_mode="r")
        corner = halved(torch.from_numpy(Slide()[0:512, 0:512])[None])
        print(f"result: {result.shape} in slide_halved.npy; the first 256 x 256 pixels are right: ", end="")
        print(bool((torch.from_numpy(result[:, :256, :256].copy()) == corner).all()))


if __name__ == "__main__":
    main()
