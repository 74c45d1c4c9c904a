"""Large pictures: overlap and blending beside kornia, MONAI and torch, prediction by tiles, pictures on disk."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterable
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualview as dv
from benchmarks import peers, work
from benchmarks.cases import OURS, TOLERANCE, Case, Comparison, Size
from benchmarks.measure import Place

BATCH, ONE_BY_ONE, WINDOWS = "all tiles as one tensor", "tile by tile", "a model that changes nothing"


def large(size: Size) -> Iterable[Case]:
    """All cases of the suite."""
    side = 64 if size == "tiny" else 4096
    tilings = {"tiny": ((16, 4),), "full": ((512, 64), (512, 256), (256, 64), (1024, 256))}.get(size, ((512, 64),))
    kinds = {BATCH: _all_at_once, ONE_BY_ONE: _one_by_one, WINDOWS: _windows}
    for (tile, overlap), (kind, build) in product(tilings, kinds.items()):
        params = {"side": side, "tile": tile, "overlap": overlap}
        name = f"overlap and blend, {kind}: {side} x {side}, tiles of {tile}, overlap {overlap}"
        yield Case("large", name, params, partial(build, **params))
    params = {"side": side // 4, "tile": max(16, tilings[0][0] // 2)}
    yield Case("large", f"three convolutions on {side // 4} x {side // 4}", params, partial(_convolutions, **params))
    yield Case("large", f"stride tiles of a zarr store, {side} x {side}", {"side": side}, partial(_gathered, side))
    if size in ("tiny", "full"):
        side = 128 if size == "tiny" else 46_336
        for perspective in ("local", "global"):
            whole = f"the whole picture in memory, {perspective}"
            name = f"{side**2 / 2**30:.3g} GiB of bytes, {perspective} tiles, there and back"
            params = {"n": 32, "side": side, "perspective": perspective}
            build = partial(_there_and_back, side, side // 32, perspective, whole)
            yield Case("large", name, params, build, alone=(OURS, whole))


def _compared(sides: dict[str, Any], x: Tensor, tiles: int, place: Place) -> Comparison:
    """Every pixel is read and written once, and once more as a part of a tile."""
    moved = work.Work(moved=2 * (x.numel() + tiles) * x.element_size())
    targets = {} if place.device == "cuda" else dict.fromkeys((name for name in sides if name != OURS), 1.0)
    return Comparison(sides, moved, TOLERANCE[place.dtype], targets=targets)


def _pixels_of_tiles(side: int, tile: int, overlap: int) -> int:
    return (((side - tile) // (tile - overlap) + 1) * tile) ** 2


def _all_at_once(place: Place, side: int, tile: int, overlap: int) -> Comparison:
    x, step, size = place.randn(1, 1, side, side), tile - overlap, (side, side)

    def kornia() -> Tensor:
        contrib = peers.need("kornia.contrib")
        tiles = contrib.extract_tensor_patches(x, (tile, tile), (step, step))
        return contrib.combine_tensor_patches(tiles, size, (tile, tile), (step, step))

    def monai() -> Tensor:
        inferers = peers.need("monai.inferers")
        patches, places = zip(*inferers.SlidingWindowSplitter(tile, overlap=overlap)(x), strict=True)
        merger = inferers.AvgMerger(tuple(x.shape), value_dtype=x.dtype, device=x.device)
        for patch, at in zip(torch.cat(patches).split(1), places, strict=True):
            merger.aggregate(patch, at)
        return merger.finalize()

    def fold() -> Tensor:
        tiles = F.unfold(x, tile, stride=step)
        sums = F.fold(tiles, size, tile, stride=step)
        return sums / F.fold(torch.ones_like(tiles), size, tile, stride=step)

    sides = {
        OURS: lambda: dv.blend_tiles(dv.local_crop(x, tile=tile, overlap=overlap), size, overlap=overlap),
        "kornia, extract and combine": kornia,
        "MONAI, splitter and merger, patches as one tensor": monai,
        "F.unfold / F.fold": fold,
    }
    return _compared(sides, x, _pixels_of_tiles(side, tile, overlap), place)


def _one_by_one(place: Place, side: int, tile: int, overlap: int) -> Comparison:
    x = place.randn(1, 1, side, side)

    def ours() -> Tensor:
        out = torch.empty_like(x)
        reader = dv.TileReader(x[0], tile=tile, overlap=overlap)
        with dv.TileWriter(out[0], reader.size, overlap=overlap) as writer:
            for part in reader:
                writer.write(part)
        return out

    def monai() -> Tensor:
        inferers = peers.need("monai.inferers")
        merger = inferers.AvgMerger(tuple(x.shape), value_dtype=x.dtype)
        for patch, at in inferers.SlidingWindowSplitter(tile, overlap=overlap)(x):
            merger.aggregate(patch, at)
        return merger.finalize()

    sides = {OURS: ours, "MONAI, splitter and merger": monai}
    return _compared(sides, x, _pixels_of_tiles(side, tile, overlap), place)


def _windows(place: Place, side: int, tile: int, overlap: int) -> Comparison:
    x = place.randn(1, 1, side, side)

    def nothing(tiles: Tensor) -> Tensor:
        return tiles

    def monai() -> Tensor:
        inferers = peers.need("monai.inferers")
        return inferers.sliding_window_inference(x, tile, 4, nothing, overlap=overlap / tile)

    sides = {
        OURS: lambda: dv.predict_tiled(nothing, x, tile=tile, overlap=overlap, batch_size=4),
        "MONAI, sliding_window_inference": monai,
    }
    return _compared(sides, x, _pixels_of_tiles(side, tile, overlap), place)


def _convolutions(place: Place, side: int, tile: int) -> Comparison:
    """The same values as on the whole map, at borders too; the margin is work that the whole map does not have."""
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 8), (8, 8), (8, 1))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).to(place.device, place.dtype)
    x = place.randn(1, 1, side, side)
    sides = {
        OURS: lambda: dv.predict_tiled(model, x, tile=tile, margin=3),
        "the model on the whole map": torch.no_grad()(lambda: model(x)),
    }
    return Comparison(sides, None, TOLERANCE[place.dtype])


@lru_cache
def _folder() -> Path:
    """A folder that goes with the process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _gathered(side: int, place: Place) -> Comparison:
    zarr, np = peers.need("zarr"), peers.need("numpy")
    shape, grid, tile = (side, side), (4, 4), (side // 4, side // 4)
    array = zarr.create_array(store=_folder() / f"{side}.zarr", shape=shape, dtype="uint8", chunks=tile, overwrite=True)
    array[:] = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)

    def ours() -> Tensor:
        store = _folder() / "tiles.npy"
        dv.TileReader(array, tile=tile, perspective="global", store=store)
        return torch.from_numpy(np.load(store)[:, 0])

    def one_by_one() -> Tensor:
        store = np.lib.format.open_memmap(_folder() / "peer.npy", "w+", "uint8", (16, *tile))
        for i, j in product(range(grid[0]), range(grid[1])):
            store[i * grid[1] + j] = array[i :: grid[0], j :: grid[1]]
        store.flush()
        return torch.from_numpy(np.load(_folder() / "peer.npy"))

    return Comparison({OURS: ours, "zarr, tile by tile": one_by_one}, None, 0)


def _there_and_back(side: int, tile: int, perspective: Any, whole: str, place: Place) -> Comparison:
    from tests.large.sources import Computed

    np, source, size = peers.need("numpy"), Computed((side, side)), (side, side)
    options: dict[str, Any] = {"overlap": tile // 8} if perspective == "local" else {"perspective": "global"}

    def equal(out: Any) -> None:
        for top in range(0, side, tile):
            if not (out[0, top : top + tile] == source[top : top + tile, 0:side]).all():
                raise ValueError(f"rows from {top} on differ")

    def ours() -> None:
        folder = _folder()
        store = {} if perspective == "local" else {"store": folder / "tiles.npy"}
        reader = dv.TileReader(source, tile=tile, **options, **store)
        with dv.TileWriter(folder / "out.npy", size, **options) as writer:
            for part in reader:
                writer.write(part)
        equal(np.load(folder / "out.npy", mmap_mode="r"))

    def in_memory() -> None:
        x = torch.from_numpy(source[0:side, 0:side])[None]
        if perspective == "local":
            out = dv.blend_tiles(dv.local_crop(x, tile=tile, **options), size, **options)
        else:
            grid = (side // tile, side // tile)
            out = dv.recombine(dv.global_stride_crop(x, grid), grid, "global")
        equal(out.numpy())

    return Comparison({OURS: ours, whole: in_memory}, None, 0, frozenset({whole}))
