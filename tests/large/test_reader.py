"""Tiles read from a picture and written back: what the ops in memory make, whatever the source, its chunks and type."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import dualview as dv
from dualview.large import sources
from tests.checks import fresh, refuses
from tests.large.sources import Assigned, Chunked, values
from tests.strategies import data_formats, examples, grids
from tests.strategies import tiles as tile_sizes
from tests.test_blending import cases, windows


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for one example: Hypothesis runs many in one test."""
    with TemporaryDirectory() as name:
        yield Path(name)


def picture(size: tuple[int, int], data_format: str, channels: int, dtype: object = np.uint8) -> np.ndarray:
    return values((channels, *size) if data_format == "channels_first" else (*size, channels), dtype)


class TestLocalTiles:
    @given(cases(), data_formats, st.sampled_from([np.uint8, np.float32, ">u2", np.int64, bool]))
    @settings(max_examples=examples(20))
    def test_are_those_of_the_crop(self, case: dict, data_format: str, dtype: object) -> None:
        x = picture(case["size"], data_format, 3, dtype)
        options = {"tile": case["tile"], "overlap": case["overlap"], "border": case["border"]}
        reader = dv.TileReader(x, **options, data_format=data_format)
        expected = dv.local_crop(
            torch.from_numpy(x.astype(x.dtype.newbyteorder("="))), **options, data_format=data_format
        )
        assert len(reader) == len(expected)
        assert torch.equal(torch.stack(list(reader)), expected)
        assert torch.equal(reader[-1], expected[-1])
        assert all(fresh(tile) for tile in reader)
        assert reader.size == case["size"]
        assert [reader.position(i) for i in range(len(reader))] == reader.positions.corners()

    def test_a_picture_without_channels_gets_one(self) -> None:
        x = values((10, 14))
        tile = dv.TileReader(x, tile=(4, 5))[0]
        assert torch.equal(tile, torch.from_numpy(x)[None, :4, :5])
        last = dv.TileReader(x, tile=(4, 5), data_format="channels_last")[0]
        assert torch.equal(last, torch.from_numpy(x)[:4, :5, None])

    def test_are_read_alone(self) -> None:
        source = Chunked(values((3, 64, 96)), (3, 16, 16))
        dv.TileReader(source, tile=(16, 32))[4]
        assert source.decoded == {(0, 1, 2): 1, (0, 1, 3): 1}

    def test_no_tile_changes_its_source(self) -> None:
        x = values((3, 10, 14))
        before = x.copy()
        dv.TileReader(x, tile=5)[0].fill_(0)
        assert (x == before).all()


class TestStrideTiles:
    @given(grids, tile_sizes, data_formats, st.sampled_from([np.uint8, np.float32, ">u2"]), st.integers(1, 400))
    @settings(max_examples=examples(15))
    def test_are_those_of_the_crop(
        self, grid: tuple[int, int], tile: tuple[int, int], data_format: str, dtype: object, budget: int
    ) -> None:
        size = grid[0] * tile[0], grid[1] * tile[1]
        x = picture(size, data_format, 2, dtype)
        chunk = 3, 2
        chunks = (2, *chunk) if data_format == "channels_first" else (*chunk, 2)
        native = torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))
        expected = dv.global_stride_crop(native, grid, data_format=data_format)
        with pytest.MonkeyPatch.context() as patch, _folder() as folder:
            patch.setattr(sources, "BLOCK_BYTES", budget)
            for source in (x, Chunked(x, chunks)):
                reader = dv.TileReader(
                    source, tile=tile, perspective="global", store=folder / "tiles.npy", data_format=data_format
                )
                assert reader.grid == grid
                assert torch.equal(torch.stack(list(reader)), expected)
                assert reader.position(len(reader) - 1) == (grid[0] - 1, grid[1] - 1)
                with dv.TileWriter(folder / "back.npy", size, perspective="global", data_format=data_format) as writer:
                    for part in torch.stack(list(reader)).split(3):
                        writer.write(part)
                assert (np.load(folder / "back.npy") == x).all()
            assert sorted(path.name for path in folder.iterdir()) == ["back.npy", "tiles.npy"]

    @pytest.mark.parametrize("budget", [1, 2000, 2**25])
    def test_every_chunk_is_decoded_once(self, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "BLOCK_BYTES", budget)
        source = Chunked(values((60, 84, 3)), (16, 20, 3))
        dv.TileReader(
            source, tile=(15, 12), perspective="global", store=tmp_path / "tiles.npy", data_format="channels_last"
        )
        assert set(source.decoded.values()) == {1}
        assert len(source.decoded) == 4 * 5

    @given(cases(), data_formats)
    @settings(max_examples=examples(15))
    def test_padding_fills_up_with_zeros(self, case: dict, data_format: str) -> None:
        size, tile = case["size"], case["tile"]
        x = picture(size, data_format, 2)
        padding = [-side % t for side, t in zip(size, tile, strict=True)]
        around = (
            [(0, 0), *((0, p) for p in padding)]
            if data_format == "channels_first"
            else [*((0, p) for p in padding), (0, 0)]
        )
        whole = torch.from_numpy(np.pad(x, around))
        with _folder() as folder:
            options = {"perspective": "global", "border": "pad", "data_format": data_format}
            reader = dv.TileReader(x, tile=tile, store=folder / "tiles.npy", **options)
            expected = dv.global_stride_crop(whole, tile=tile, data_format=data_format)
            assert torch.equal(torch.stack(list(reader)), expected)
            with dv.TileWriter(folder / "back.npy", size, **options) as writer:
                for tile_ in reader:
                    writer.write(tile_)
            assert (np.load(folder / "back.npy") == x).all()


class TestWriter:
    @given(cases(), windows, data_formats, st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.int32]))
    @settings(max_examples=examples(20))
    def test_is_blend_tiles(self, case: dict, window: str, data_format: str, dtype: torch.dtype) -> None:
        options = {key: case[key] for key in ("overlap", "border")}
        x = torch.from_numpy(picture(case["size"], data_format, 2))
        tiles = (torch.rand(dv.local_crop(x, tile=case["tile"], **options, data_format=data_format).shape) * 200).to(
            dtype
        )
        expected = dv.blend_tiles(tiles, case["size"], **options, window=window, data_format=data_format)
        out = np.zeros(expected.shape, dtype=str(dtype).removeprefix("torch."))
        with dv.TileWriter(out, case["size"], **options, window=window, data_format=data_format) as writer:
            writer.write(tiles[0])
            for part in tiles[1:].split(4):
                writer.write(part)
        assert (torch.from_numpy(out) == expected).all()
        elsewhere = Assigned(np.zeros_like(out))  # as zarr: rows are written when they are finished
        with dv.TileWriter(elsewhere, case["size"], **options, window=window, data_format=data_format) as writer:
            writer.write(tiles)
        assert (torch.from_numpy(elsewhere.array) == expected).all()
        assert (elsewhere.times == 1).all(), "every row is written once"

    def test_margin_is_that_of_predict_tiled(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 2, 5, padding=2)
        x = torch.rand(3, 50, 70)
        reader = dv.TileReader(x, tile=(20, 24), overlap=8)
        with torch.no_grad(), dv.TileWriter(tmp_path / "out.npy", reader.size, overlap=8, margin=2) as writer:
            for tiles in DataLoader(reader, batch_size=4):
                writer.write(model(tiles))
        out = torch.from_numpy(np.load(tmp_path / "out.npy"))
        torch.testing.assert_close(out, model(x[None])[0].detach())
        torch.testing.assert_close(out, dv.predict_tiled(model, x, tile=(20, 24), overlap=8, margin=2))

    def test_targets(self, tmp_path: Path) -> None:
        x = torch.rand(1, 10, 14)
        flat, own = np.zeros((10, 14), np.float32), torch.zeros(1, 10, 14)
        mapped = np.memmap(tmp_path / "raw", np.float32, "w+", shape=(1, 10, 14))
        for target in (flat, own, mapped, tmp_path / "out.npy"):
            with dv.TileWriter(target, (10, 14)) as writer:
                writer.write(dv.local_crop(x, tile=(5, 7)))
        for out in (
            torch.from_numpy(flat)[None],
            own,
            torch.from_numpy(np.array(mapped)),
            torch.from_numpy(np.load(tmp_path / "out.npy")),
        ):
            assert torch.equal(out, x)

    @pytest.mark.parametrize("perspective", ["local", "global"])
    def test_a_file_is_replaced_whole_or_not_at_all(self, perspective: str, tmp_path: Path) -> None:
        path = tmp_path / "out.npy"
        np.save(path, np.arange(3))
        tiles = torch.rand(4, 1, 5, 7)
        with refuses("too many"), dv.TileWriter(path, (10, 14), perspective=perspective) as writer:
            writer.write(tiles[:3])
            writer.write(tiles[:3])
        with refuses("3 of 4 tiles were written"), dv.TileWriter(path, (10, 14), perspective=perspective) as writer:
            writer.write(tiles[:3])
        with refuses("no tiles were written"), dv.TileWriter(path, (10, 14), perspective=perspective):
            pass
        assert np.load(path).tolist() == [0, 1, 2]
        assert list(tmp_path.iterdir()) == [path]
        with dv.TileWriter(path, (10, 14), perspective=perspective) as writer:
            writer.write(tiles)
            assert np.load(path).tolist() == [0, 1, 2]
        assert np.load(path).shape == (1, 10, 14)
        assert list(tmp_path.iterdir()) == [path]
        writer.close()  # once more does nothing
        with refuses("closed"):
            writer.write(tiles)

    def test_a_source_that_fails_leaves_no_store(self, tmp_path: Path) -> None:
        class Failing(Chunked):
            def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
                raise OSError("bad sector")

        with pytest.raises(OSError, match="bad sector"):
            dv.TileReader(Failing(values((8, 8)), (4, 4)), tile=4, perspective="global", store=tmp_path / "tiles.npy")
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs a system that reserves room")
    def test_room_is_reserved_first(self, tmp_path: Path) -> None:
        """A disk that got full under a memory map would end the process by a signal, not by an error."""
        with dv.TileWriter(tmp_path / "out.npy", (512, 512)) as writer:
            writer.write(torch.zeros(1, 1, 256, 256))
            (beside,) = tmp_path.iterdir()
            assert beside.stat().st_blocks * 512 >= 512 * 512 * 4
            writer.write(torch.zeros(3, 1, 256, 256))

    @pytest.mark.skipif(sys.platform != "linux", reason="files are limited as Linux does it")
    def test_without_room_there_is_an_error_and_no_file(self, tmp_path: Path) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                dv.TileWriter(tmp_path / "out.npy", (512, 512)).write(torch.zeros(4, 1, 256, 256))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(tmp_path.iterdir())


def saved(path: Path, array: np.ndarray) -> np.ndarray:
    np.save(path, array)
    return np.load(path, mmap_mode="r")


class TestWorkers:
    @pytest.mark.parametrize("kind", ["path", "memmap", "function", "array"])
    def test_readers_can_be_sent(self, kind: str, tmp_path: Path) -> None:
        x = values((3, 40, 60))
        mapped = saved(tmp_path / "x.npy", x)
        source = {
            "path": tmp_path / "x.npy",
            "memmap": mapped,
            "function": partial(np.load, tmp_path / "x.npy", mmap_mode="r"),
            "array": x,
        }[kind]
        reader = dv.TileReader(source, tile=16, overlap=4)
        sent = pickle.dumps(reader)
        assert kind == "array" or len(sent) < 2000, "a file is sent by its name"
        assert torch.equal(torch.stack(list(pickle.loads(sent))), torch.stack(list(reader)))

    def test_a_part_of_a_memory_map_is_refused(self, tmp_path: Path) -> None:
        mapped = saved(tmp_path / "x.npy", values((3, 40, 60)))
        reader = dv.TileReader(mapped[:, 4:], tile=16)
        with refuses("without loading it", "pass the path", error=TypeError):
            pickle.dumps(reader)

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.more)])
    def test_loaders_with_workers(self, context: str, tmp_path: Path) -> None:
        x = values((3, 40, 60))
        np.save(tmp_path / "x.npy", x)
        local = dv.TileReader(tmp_path / "x.npy", tile=16, overlap=4)
        stride = dv.TileReader(tmp_path / "x.npy", tile=(20, 15), perspective="global", store=tmp_path / "tiles.npy")
        for reader in (local, stride):
            loader = DataLoader(reader, batch_size=3, num_workers=1, multiprocessing_context=context)
            assert torch.equal(torch.cat(list(loader)), torch.stack(list(reader)))

    def test_each_process_opens_its_own(self) -> None:
        """What is given as a function is opened again where the process is another one."""
        opened = []

        def source() -> np.ndarray:
            opened.append(os.getpid())
            return values((3, 40, 60))

        reader = dv.TileReader(source, tile=16)
        reader[0]
        assert opened == [os.getpid()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources.os, "getpid", lambda: -1)
            reader[0]
            reader[1]
        assert len(opened) == 2


class TestWrongArguments:
    def test_sources(self, tmp_path: Path) -> None:
        with refuses("builtins.int", "pass a path, an array", error=TypeError):
            dv.TileReader(3, tile=16)
        with refuses("(2, 3, 40, 60)", "one picture"):
            dv.TileReader(np.zeros((2, 3, 40, 60)), tile=16)
        with refuses("(0, 60)", "one picture"):
            dv.TileReader(np.zeros((0, 60)), tile=16)
        with refuses("(40, 60, 3)", "channels seem to come last", "data_format='channels_last'"):
            dv.TileReader(np.zeros((40, 60, 3)), tile=16)
        with refuses("no tensor can hold", error=TypeError):
            dv.TileReader(np.zeros((40, 60), dtype="U3"), tile=16)
        with refuses("does not exist", error=FileNotFoundError):
            dv.TileReader(tmp_path / "x.tif", tile=16)
        with refuses("chunks of (3, 20000, 20000)", "1,200,000,000 bytes", "at most 268,435,456"):
            dv.TileReader(Chunked(np.broadcast_to(np.uint8(0), (3, 20000, 20000)), (3, 20000, 20000)), tile=16)
        np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
        with refuses("objects.npy", "mapped into memory"):
            dv.TileReader(tmp_path / "objects.npy", tile=1)

    def test_tiles(self, tmp_path: Path) -> None:
        x, store = values((3, 40, 60)), tmp_path / "tiles.npy"
        with refuses("store='tiles.npy'", "local tiles are read from the source"):
            dv.TileReader(x, tile=16, store="tiles.npy")
        with refuses('store="NAME.npy"'):
            dv.TileReader(x, tile=20, perspective="global")
        with refuses("40 x 60", "stride tiles of 16 x 16", "border='pad'"):
            dv.TileReader(x, tile=16, perspective="global", store=store)
        with refuses("overlap=4", "cannot overlap"):
            dv.TileReader(x, tile=20, overlap=4, perspective="global", store=store)
        with refuses("perspective='stride'"):
            dv.TileReader(x, tile=20, perspective="stride", store=store)
        with refuses("border='mirror'"):
            dv.TileReader(x, tile=20, border="mirror", perspective="global", store=store)
        with refuses("must end in .npy"):
            dv.TileReader(x, tile=20, perspective="global", store=tmp_path / "tiles.bin")
        with refuses("make it first", error=FileNotFoundError):
            dv.TileReader(x, tile=20, perspective="global", store=tmp_path / "no" / "tiles.npy")
        reader = dv.TileReader(x, tile=20)
        for index in (6, -7):
            with pytest.raises(IndexError, match=re.escape(f"tile {index} of 6")):
                reader[index]
            with pytest.raises(IndexError, match="from 0 to 5"):
                reader.position(index)

    def test_writers(self, tmp_path: Path) -> None:
        tiles = torch.rand(4, 1, 5, 7)
        with refuses("builtins.int", "pass a name", error=TypeError):
            dv.TileWriter(3, (10, 14))
        with refuses("must end in .npy", "or in .zarr"):
            dv.TileWriter(tmp_path / "out.tif", (10, 14))
        with refuses("needs a name"):
            dv.TileWriter(np.zeros((1, 10, 14)), (10, 14), perspective="global")
        for wrong in (np.zeros((10, 15), np.float32), np.zeros((1, 10, 14), np.uint8)):
            with refuses(str(wrong.shape), str(wrong.dtype), "(1, 10, 14) or (10, 14) of float32"):
                dv.TileWriter(wrong, (10, 14)).write(tiles)
        with dv.TileWriter(out := np.zeros((1, 10, 14), np.float32), (10, 14)) as writer:
            with refuses("torch.float64"):
                writer.write(tiles.double())
            writer.write(tiles)  # what was refused says nothing of what comes next
        assert torch.equal(torch.from_numpy(out), dv.blend_tiles(tiles, (10, 14), overlap=0))
        writer = dv.TileWriter(np.zeros((10, 14), np.float32), (10, 14))
        with refuses("(5, 7)", "(T, C, h, w)"):
            writer.write(tiles[0, 0])
        writer.write(tiles[0])
        with refuses("torch.float64", "the first tile had"):
            writer.write(tiles[1].double())
        with refuses("4 tiles after 1 of 4", "too many"):
            writer.write(tiles)
        with refuses("numpy.ndarray", error=TypeError):
            writer.write(tiles.numpy())
        read_only = np.zeros((10, 14), np.float32)
        read_only.flags.writeable = False
        with refuses("read-only", "mode='r+'"):
            dv.TileWriter(read_only, (10, 14)).write(tiles)
        with refuses("torch.bfloat16", "tiles.float()", error=TypeError):
            dv.TileWriter(tmp_path / "out.npy", (10, 14)).write(tiles.bfloat16())
        with refuses("overlap=(3, 3) for margin=(2, 2)", "at least twice"):
            dv.TileWriter(tmp_path / "out.npy", (10, 14), overlap=3, margin=2).write(tiles)


LIMITED = """
import sys
from pathlib import Path
import numpy, torch, torch.utils.data, dualview as dv
import dualview.large.writer, dualview.large.stores, dualview.large.strides
from benchmarks.measure import held_to
from tests.large.sources import Computed
folder, size, more = Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4])
torch.set_num_threads(1)
source, tile, step = Computed(size), (size[0] // 16, size[1] // 8), 64
with held_to(more):
    try:
        numpy.ones(size, numpy.uint8)
    except MemoryError:
        print("the source is larger than the limit")
    for options, store in ({"overlap": (32, 64)}, {}), ({"perspective": "global"}, {"store": folder / "tiles.npy"}):
        reader = dv.TileReader(source, tile=tile, **options, **store)
        with dv.TileWriter(folder / "out.npy", size, **options) as writer:
            for each in reader:
                writer.write(each)
        out = numpy.load(folder / "out.npy", mmap_mode="r")
        same = all((out[0, y:y + step] == source[y:y + step, :]).all() for y in range(0, size[0], step))
        print(reader.perspective, "bit-equal" if same else "different")
"""


def limited(folder: Path, size: tuple[int, int], more: int) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), *map(str, (*size, more))],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux'")
class TestLargerThanMemory:
    RIGHT = ("the source is larger than the limit", "local bit-equal", "global bit-equal")

    def test_quickly(self, tmp_path: Path) -> None:
        """81 MiB within 64 MiB beyond what the imports hold."""
        assert tuple(limited(tmp_path, (9216, 9216), 64 * 2**20)) == self.RIGHT

    @pytest.mark.more
    def test_within_half_a_gibibyte(self, tmp_path: Path) -> None:
        assert tuple(limited(tmp_path, (24576, 24576), 512 * 2**20)) == self.RIGHT
