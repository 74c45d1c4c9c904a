"""Pictures in TIFF files and zarr stores: tiled, in strips, compressed or not, and their stores."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
import zarr
from torch.utils.data import DataLoader

import dualview as dv
from dualview.large import sources
from tests.checks import refuses
from tests.large.sources import values

SHAPE = (112, 176, 3)  # sides are multiples of 16, as the tiles of TIFF files are

TIFFS = {
    "tiles": {"tile": (32, 16), "compression": "zlib"},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one strip": {"compression": "zlib"},
    "plain": {},
    "plain tiles": {"tile": (32, 16)},
    "big-endian": {"byteorder": ">"},
    "big": {"bigtiff": True, "tile": (16, 16)},
}


def both(reader: dv.TileReader, expected: torch.Tensor) -> None:
    assert torch.equal(torch.stack(list(reader)), expected)


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
class TestTiff:
    def test_is_what_was_saved(self, kind: str, dtype: str, tmp_path: Path) -> None:
        x = values(SHAPE, dtype)
        tifffile.imwrite(tmp_path / "x.tif", x, photometric="rgb", **TIFFS[kind])
        whole = torch.from_numpy(x)
        reader = dv.TileReader(tmp_path / "x.tif", tile=(50, 40), overlap=(6, 3))
        assert reader.data_format == "channels_last"
        both(reader, dv.local_crop(whole, tile=(50, 40), overlap=(6, 3), data_format="channels_last"))
        both(pickle.loads(pickle.dumps(reader)), torch.stack(list(reader)))
        stride = dv.TileReader(
            str(tmp_path / "x.tif"), tile=(28, 44), perspective="global", store=tmp_path / "tiles.npy"
        )
        both(stride, dv.global_stride_crop(whole, tile=(28, 44), data_format="channels_last"))


def test_planes_of_a_tiff_come_first(tmp_path: Path) -> None:
    x = values((3, 64, 96))
    tifffile.imwrite(
        tmp_path / "x.tif", x, photometric="rgb", planarconfig="separate", tile=(16, 32), compression="zlib"
    )
    reader = dv.TileReader(tmp_path / "x.tif", tile=32)
    assert reader.data_format == "channels_first"
    both(reader, dv.local_crop(torch.from_numpy(x), tile=32))


def test_grey_tiffs_pyramids_and_stacks(tmp_path: Path) -> None:
    grey = values((64, 96), np.uint16)
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(grey, subifds=1, tile=(16, 16), compression="zlib")
        file.write(grey[::2, ::2], subfiletype=1, tile=(16, 16), compression="zlib")
    both(dv.TileReader(tmp_path / "x.tif", tile=32), dv.local_crop(torch.from_numpy(grey)[None], tile=32))
    smaller = dv.TileReader(partial(level, tmp_path / "x.tif", 1), tile=16)
    both(smaller, dv.local_crop(torch.from_numpy(grey[::2, ::2].copy())[None], tile=16))
    tifffile.imwrite(tmp_path / "stack.tif", values((2, 64, 96, 3)), photometric="rgb", compression="zlib")
    with refuses("stack.tif", "(2, 64, 96, 3)", "function"):
        dv.TileReader(tmp_path / "stack.tif", tile=32)


def level(path: Path, number: int) -> Any:
    return zarr.open_array(tifffile.imread(path, aszarr=True, level=number), mode="r")


def test_tiff_workers_do_not_share_a_place_in_the_file(tmp_path: Path) -> None:
    """Forked after the file was read from: many small compressed tiles, read by all at the same time."""
    x = values((512, 512))
    tifffile.imwrite(tmp_path / "x.tif", x, tile=(16, 16), compression="zlib")
    reader = dv.TileReader(tmp_path / "x.tif", tile=64)
    assert reader[0].shape == (1, 64, 64)
    loader = DataLoader(reader, batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), dv.local_crop(torch.from_numpy(x)[None], tile=64))


@pytest.mark.parametrize("kind", ["tiles", "strips"])
def test_every_segment_of_a_tiff_is_decoded_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = values((96, 160), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", x, **TIFFS[kind])
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        segments = len(file.pages[0].dataoffsets)
    decoded = []
    real = tifffile.TiffPage.decode.func  # the function that every segment goes through

    def counting(page: Any) -> Any:
        decode = real(page)

        def counted(data: Any, index: int, *given: Any, **options: Any) -> Any:
            decoded.append(index)
            return decode(data, index, *given, **options)

        return counted

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(counting))
    monkeypatch.setattr(sources, "BLOCK_BYTES", 3000)
    reader = dv.TileReader(tmp_path / "x.tif", tile=(32, 40), perspective="global", store=tmp_path / "tiles.npy")
    assert sorted(decoded) == list(range(segments))
    both(reader, dv.global_stride_crop(torch.from_numpy(x)[None], tile=(32, 40)))


@pytest.mark.parametrize("perspective", ["local", "global"])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_zarr_there_and_back(perspective: str, data_format: str, tmp_path: Path) -> None:
    first = data_format == "channels_first"
    x = values((3, 112, 176) if first else (112, 176, 3), np.float32)
    array = zarr.create_array(
        store=tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(3, 30, 50) if first else (30, 50, 3)
    )
    array[:] = x
    options = {"overlap": 8} if perspective == "local" else {"perspective": "global"}
    store = {} if perspective == "local" else {"store": tmp_path / "tiles.zarr"}
    for source in (tmp_path / "x.zarr", array):
        reader = dv.TileReader(source, tile=(28, 44), **options, **store, data_format=data_format)
        crop = partial(dv.local_crop, overlap=8) if perspective == "local" else dv.global_stride_crop
        both(pickle.loads(pickle.dumps(reader)), crop(torch.from_numpy(x), tile=(28, 44), data_format=data_format))
        store = {} if perspective == "local" else {"store": tmp_path / "again.zarr"}
    with dv.TileWriter(tmp_path / "out.zarr", reader.size, **options, data_format=data_format) as writer:
        for tiles in DataLoader(reader, batch_size=3):
            writer.write(tiles)
    assert (zarr.open_array(tmp_path / "out.zarr", mode="r")[:] == x).all()
    with refuses("out.zarr exists", "remove it first", error=FileExistsError):
        dv.TileWriter(tmp_path / "out.zarr", reader.size, **options)
    (tmp_path / "file.zarr").touch()
    with refuses("file.zarr exists", error=FileExistsError):
        dv.TileWriter(tmp_path / "file.zarr", reader.size, **options)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or "tiles.npy" in path.name]


def test_hdf5_through_a_function(tmp_path: Path) -> None:
    x = values((64, 96, 3))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("picture", data=x, chunks=(16, 24, 3))
    reader = dv.TileReader(partial(dataset, tmp_path / "x.h5"), tile=32, data_format="channels_last")
    loader = DataLoader(reader, batch_size=2, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(
        torch.cat(list(loader)), dv.local_crop(torch.from_numpy(x), tile=32, data_format="channels_last")
    )


def dataset(path: Path) -> Any:
    return h5py.File(path, "r")["picture"]


def test_what_is_no_tiff(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(b"not a picture")
    with refuses("x.tif is no TIFF file", "dualview.load_image"):
        dv.TileReader(tmp_path / "x.tif", tile=16)


@pytest.mark.parametrize("name", ["tifffile", "zarr"])
def test_what_to_install(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "x.tif", values((64, 96)), compression="zlib")
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with refuses(f"{name} is not installed", 'pip install -e ".[large]"', error=ImportError):
        dv.TileReader(tmp_path / "x.tif", tile=16)
    if name == "zarr":
        with refuses("zarr is not installed", error=ImportError):
            dv.TileWriter(tmp_path / "out.zarr", (64, 96))
