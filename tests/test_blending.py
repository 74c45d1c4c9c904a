"""Overlapping tiles and their inverse: positions, weights, exactness, gradients, and what others make of the same."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import dualview as dv
from dualview.blending import Blender, shares
from dualview.tile_positions import TilePositions
from tests.checks import assert_compiles_once, assert_exports, fresh, refuses
from tests.strategies import ALL, batches, channels, data_formats, dtypes, examples, laid_out, layouts, numbered

windows = st.sampled_from(["linear", "hann", "constant"])
borders = st.sampled_from(["shift", "pad"])


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int]:
    """A length, a tile that fits, an overlap: also tiles that cover a position three times and more."""
    tile = draw(st.integers(1, 7))
    return draw(st.integers(tile, 17)), tile, draw(st.integers(0, tile - 1))


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Size, tile, overlap and border of a map."""
    rows, cols = draw(axes()), draw(axes())
    size, tile, overlap = zip(rows, cols, strict=True)
    return {"size": size, "tile": tile, "overlap": overlap, "border": draw(borders)}


def starts_by_hand(length: int, tile: int, overlap: int, border: str) -> list[int]:
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - overlap)
    if border == "shift":
        starts[-1] = min(starts[-1], length - tile)
    return starts


def corners(case: dict) -> list[tuple[int, int]]:
    axes = zip(case["size"], case["tile"], case["overlap"], strict=True)
    return list(product(*(starts_by_hand(*axis, case["border"]) for axis in axes)))


def weight_by_hand(window: str, offset: int, length: int) -> float:
    """Of one position in a tile."""
    return {
        "constant": 1.0,
        "linear": min(offset + 1, length - offset) - 0.5,
        "hann": (1 - math.cos(2 * math.pi * (offset + 0.5) / length)) / 2,
    }[window]


def blend_by_hand(tiles: np.ndarray, case: dict, window: str) -> np.ndarray:
    """(N, C, h, w) -> (C, H, W) in float64, cell by cell: the sum of weight * value over the sum of weights."""
    (height, width), (h, w) = case["size"], case["tile"]
    out = np.zeros((tiles.shape[1], height, width))
    for y, x in product(range(height), range(width)):
        sums, total = 0.0, 0.0
        for tile, (top, left) in zip(tiles, corners(case), strict=True):
            if top <= y < top + h and left <= x < left + w:
                weight = weight_by_hand(window, y - top, h) * weight_by_hand(window, x - left, w)
                sums, total = sums + weight * tile[:, y - top, x - left], total + weight
        out[:, y, x] = sums / total
    return out


def map_of(case: dict, batch: tuple[int, ...], channel: int, data_format: str, dtype: torch.dtype) -> Tensor:
    plane = case["size"]
    shape = (*batch, channel, *plane) if data_format == "channels_first" else (*batch, *plane, channel)
    return numbered(shape, dtype)


def crop(x: Tensor, case: dict, data_format: str = "channels_first") -> Tensor:
    options = {key: case[key] for key in ("tile", "overlap", "border")}
    return dv.local_crop(x, **options, data_format=data_format)


def blend(tiles: Tensor, case: dict, window: str, data_format: str = "channels_first") -> Tensor:
    options = {key: case[key] for key in ("size", "overlap", "border")}
    return dv.blend_tiles(tiles, **options, window=window, data_format=data_format)


class TestPositions:
    @given(cases())
    def test_are_those_of_a_loop(self, case: dict) -> None:
        assert TilePositions(**case).corners() == corners(case)

    @given(axes(), borders)
    def test_cover_the_axis_and_share_what_was_asked_for(self, axis: tuple[int, int, int], border: str) -> None:
        length, tile, overlap = axis
        positions = TilePositions((length, 1), (tile, 1), (overlap, 0), border)
        starts = positions.starts[0]
        assert starts[0] == 0
        assert all(before < after <= before + tile - overlap for before, after in pairwise(starts))
        if border == "shift":
            assert starts[-1] + tile == length
        else:
            assert starts[-1] + tile >= length
            assert starts == tuple(k * (tile - overlap) for k in range(len(starts)))
            assert len(starts) == 1 or starts[-2] + tile < length  # none more than needed

    @given(axes(), borders, st.integers(0, 3))
    def test_what_is_kept_covers_the_axis_and_keeps_off_the_edges(
        self, axis: tuple[int, int, int], border: str, margin: int
    ) -> None:
        length, tile, overlap = axis
        assume(2 * margin <= overlap)
        kept = TilePositions((length, 1), (tile, 1), (overlap, 0), border).kept((margin, 0))[0]
        covered = [position for _, first, stop, _ in kept for position in range(first, stop)]
        assert set(covered) == set(range(length))
        for start, first, stop, end in kept:
            assert first in (0, stop) or first - start >= margin
            assert stop in (first, length) or start + tile - stop >= margin
            assert start <= first <= stop <= length
            assert stop == min(end, length)

    def test_a_map_smaller_than_a_tile_can_be_padded(self) -> None:
        x = numbered((1, 2, 3))
        tiles = dv.local_crop(x, tile=(4, 3), overlap=(1, 0), border="pad")
        assert tiles.tolist() == [[[[0, 1, 2], [3, 4, 5], [0, 0, 0], [0, 0, 0]]]]
        with refuses("size=(2, 3)", "tile=(4, 3)", "border='pad'"):
            dv.local_crop(x, tile=(4, 3), overlap=(1, 0))


class TestCrop:
    @given(cases(), batches, channels, data_formats, dtypes, layouts)
    @settings(max_examples=examples(40))
    def test_tiles_are_slices(
        self, case: dict, batch: tuple[int, ...], channel: int, data_format: str, dtype: torch.dtype, layout: str
    ) -> None:
        x = laid_out(map_of(case, batch, channel, data_format, dtype), layout)
        tiles = crop(x, case, data_format)
        assert tiles.dtype == dtype
        assert fresh(tiles, x)
        (height, width), (h, w) = case["size"], case["tile"]
        first = data_format == "channels_first"
        planes, of_tiles = (x, tiles) if first else (x.movedim(-1, -3), tiles.movedim(-1, -3))
        assert of_tiles.shape == (*batch, len(corners(case)), channel, h, w)
        for k, (top, left) in enumerate(corners(case)):
            tile = of_tiles[..., k, :, :, :]
            part = planes[..., top : top + h, left : left + w]
            assert torch.equal(tile[..., : height - top, : width - left], part)
            assert not tile[..., height - top :, :].any()
            assert not tile[..., width - left :].any()

    @given(cases())
    def test_without_overlap_whole_tiles_are_those_of_the_grid(self, case: dict) -> None:
        size = tuple(side // tile * tile for side, tile in zip(case["size"], case["tile"], strict=True))
        x = numbered((2, 3, *size))
        grid = dv.TileGrid.for_image(size, case["tile"])
        assert torch.equal(
            dv.local_crop(x, tile=case["tile"], overlap=0, border=case["border"]), dv.local_crop(x, grid)
        )


class TestBlend:
    @given(cases(), windows, batches, channels, data_formats, dtypes, layouts)
    @settings(max_examples=examples(50))
    def test_untouched_tiles_give_the_map_exactly(
        self,
        case: dict,
        window: str,
        batch: tuple[int, ...],
        channel: int,
        data_format: str,
        dtype: torch.dtype,
        layout: str,
    ) -> None:
        x = map_of(case, batch, channel, data_format, dtype)
        assume(layout not in ("expanded", "lazy"))  # which change the values
        tiles = laid_out(crop(x, case, data_format), layout)
        back = blend(tiles, case, window, data_format)
        assert torch.equal(back, x)
        assert back.dtype == dtype
        assert fresh(back, tiles)

    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
    )
    @pytest.mark.parametrize("window", ["constant", "linear", "hann"])
    def test_every_float_survives(self, dtype: torch.dtype, window: str) -> None:
        """Huge, tiny and infinite numbers, alone and beside each other."""
        real = dtype.to_real()
        limits = torch.finfo(real)
        values = [
            limits.max,
            limits.min,
            limits.tiny,
            limits.smallest_normal / 4,
            math.inf,
            -math.inf,
            1 / 3,
            0.0,
            1e-3,
        ]
        x = torch.tensor(values, dtype=real)[torch.randint(len(values), (3, 23, 31))].to(dtype)
        x[0] = torch.randn(23, 31, dtype=torch.float64).to(dtype)
        case = {"size": (23, 31), "tile": (8, 9), "overlap": (6, 5), "border": "shift"}
        assert torch.equal(blend(crop(x, case), case, window), x)

    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
            *(torch.uint16, torch.uint32, torch.uint64),
        ],
    )
    @pytest.mark.parametrize("window", ["constant", "linear", "hann"])
    def test_every_integer_survives(self, dtype: torch.dtype, window: str) -> None:
        low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        values = np.array([low, high, high // 3, low // 2 + 1, high - 1], dtype=str(dtype).removeprefix("torch."))
        x = torch.from_numpy(values[np.random.default_rng(0).integers(5, size=(1, 23, 31))])
        case = {"size": (23, 31), "tile": (8, 9), "overlap": (6, 5), "border": "pad"}
        assert torch.equal(blend(crop(x, case), case, window), x)

    @given(cases(), windows)
    @settings(max_examples=examples(20))
    def test_is_the_weighted_mean_of_a_loop(self, case: dict, window: str) -> None:
        torch.manual_seed(0)
        tiles = torch.randn(len(corners(case)), 2, *case["tile"], dtype=torch.float64)
        expected = torch.from_numpy(blend_by_hand(tiles.numpy(), case, window))
        torch.testing.assert_close(blend(tiles, case, window), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(blend(tiles.float(), case, window), expected.float())
        coarse = blend(tiles.bfloat16(), case, window)
        torch.testing.assert_close(coarse, expected.bfloat16(), rtol=2e-2, atol=3e-2)
        whole = (tiles * 100).round()
        means = torch.from_numpy(blend_by_hand(whole.numpy(), case, window))
        # On an axis a position is in so many tiles, or one more where the last is moved; each but the first rounds.
        steps = sum(-(-t // (t - o)) for t, o in zip(case["tile"], case["overlap"], strict=True))
        assert (blend(whole.long(), case, window) - means).abs().max() <= 0.5 * steps + 1e-9

    def test_infinities_that_meet_numbers(self) -> None:
        tiles = torch.tensor([[0.0, 1.0, math.inf], [-math.inf, 5.0, 6.0]]).reshape(2, 1, 1, 3)
        out = dv.blend_tiles(tiles, (1, 4), overlap=(0, 2), window="linear").flatten()
        assert out[0] == 0
        assert out[3] == 6
        assert out[1] == -math.inf
        assert out[2] == math.inf
        tiles[0, 0, 0, 2] = math.nan
        assert dv.blend_tiles(tiles, (1, 4), overlap=(0, 2)).isnan().sum() == 1

    def test_large_numbers_do_not_overflow(self) -> None:
        for dtype in (torch.float32, torch.float16):
            most = torch.finfo(dtype).max
            tiles = torch.tensor([[most, most], [-most, 1.0]], dtype=dtype).reshape(2, 1, 1, 2)
            out = dv.blend_tiles(tiles, (1, 3), overlap=(0, 1)).flatten()
            assert out.tolist() == [most, 0.0, 1.0]
        for dtype in (torch.int64, torch.uint64, torch.int32, torch.uint8):
            most = torch.iinfo(dtype).max
            tiles = torch.tensor([[0, most], [most - 1, 1]], dtype=dtype).reshape(2, 1, 1, 2)
            mixed = dv.blend_tiles(tiles, (1, 3), overlap=(0, 1)).flatten().tolist()[1]
            assert most - 2048 * (most > 2**53) - 1 <= mixed <= most

    def test_weights_run_across_the_overlap(self) -> None:
        """From one tile to the next: linearly, in a Hann window's half, or in one step."""
        expected = {
            "linear": [(k + 0.5) / 4 for k in range(4)],
            "hann": [math.sin(math.pi * (k + 0.5) / 8) ** 2 for k in range(4)],
            "constant": [0.5] * 4,
        }
        tiles = torch.stack([torch.zeros(1, 1, 8), torch.ones(1, 1, 8)]).double()
        for window, values in expected.items():
            out = dv.blend_tiles(tiles, (1, 12), overlap=(0, 4), window=window).flatten()
            torch.testing.assert_close(out[4:8], torch.tensor(values).double())
            assert out[:4].tolist() == [0.0] * 4
            assert out[8:].tolist() == [1.0] * 4

    @given(cases(), windows)
    @settings(max_examples=examples(15))
    def test_shares_add_up_to_one(self, case: dict, window: str) -> None:
        for axis, length in zip(TilePositions(**case).kept(), case["size"], strict=True):
            total = torch.zeros(length, dtype=torch.float64)
            for (_, first, stop, _), share in zip(axis, shares(axis, window)[1], strict=True):
                assert (share > 0).all()
                total[first:stop] += share
            torch.testing.assert_close(total, torch.ones(length, dtype=torch.float64))

    @given(cases(), windows)
    @settings(max_examples=examples(15))
    def test_tiles_that_come_one_by_one_need_one_row_of_tiles(self, case: dict, window: str) -> None:
        """Rows are finished as soon as no tile that is still to come reaches them."""
        positions = TilePositions(**case)
        tiles = torch.randn(len(positions), 2, *case["tile"])
        largest = []

        def open_row(first: int, stop: int) -> Tensor:
            largest.append(stop - first)
            return torch.full((2, stop - first, case["size"][1]), math.nan)

        blender, rows = Blender(*positions.kept(), window, open_row), []
        for k, tile in enumerate(tiles):
            finished = blender.add(tile)
            assert (finished is not None) == ((k + 1) % positions.grid[1] == 0)
            if finished is not None:
                assert finished[0] == sum(part.shape[-2] for part in rows)
                rows.append(finished[1])
        assert torch.equal(torch.cat(rows, dim=-2), blend(tiles, case, window))
        assert max(largest) <= case["tile"][0]

    def test_wrong_arguments(self) -> None:
        tiles = torch.zeros(6, 3, 8, 8)
        with refuses("these are 6 tiles", "2 x 2 = 4 tiles of 8 x 8", "overlap=(2, 2)", "'shift'"):
            dv.blend_tiles(tiles, (14, 14), overlap=2)
        with refuses("overlap=(8, 0)", "smaller than the tile"):
            dv.blend_tiles(tiles, (14, 14), overlap=(8, 0))
        with refuses("overlap=(-1, 0)", "at least 0"):
            dv.blend_tiles(tiles, (14, 14), overlap=(-1, 0))
        with refuses("window='gauss'", '"constant" ('):
            dv.blend_tiles(tiles, (14, 14), overlap=2, window="gauss")
        with refuses("border='mirror'", '"shift"', '"pad"'):
            dv.blend_tiles(tiles, (14, 14), overlap=2, border="mirror")
        with refuses("too few dimensions"):
            dv.blend_tiles(tiles[0], (14, 14), overlap=2)
        with refuses("numpy.ndarray", error=TypeError):
            dv.blend_tiles(tiles.numpy(), (14, 14), overlap=2)
        with refuses("overlap=2 needs tile=(h, w)"):
            dv.local_crop(torch.zeros(3, 14, 14), (2, 2), overlap=2)
        with refuses("overlap=2.5"):
            dv.local_crop(torch.zeros(3, 14, 14), tile=8, overlap=2.5)
        with refuses("margin=(2, 0)", "at least twice"):
            TilePositions((14, 14), (8, 8), (3, 3)).kept((2, 0))


class TestGradients:
    @given(cases(), windows, data_formats)
    @settings(max_examples=examples(15))
    def test_are_the_adjoint(self, case: dict, window: str, data_format: str) -> None:
        """<A x, y> = <x, A' y>, for cropping and for blending."""
        x = map_of(case, (2,), 2, data_format, torch.float64)
        x = torch.randn_like(x).requires_grad_()
        tiles = crop(x, case, data_format)
        y, z = torch.randn_like(tiles).requires_grad_(), torch.randn_like(x)
        (back,) = torch.autograd.grad(tiles, x, y.detach())
        torch.testing.assert_close((tiles * y).sum(), (x * back).sum())
        whole = blend(y, case, window, data_format)
        (spread,) = torch.autograd.grad(whole, y, z)
        torch.testing.assert_close((whole * z).sum(), (y * spread).sum())

    @pytest.mark.parametrize(("window", "border"), [("hann", "shift"), ("linear", "pad")])
    def test_gradcheck(self, window: str, border: str) -> None:
        case = {"size": (4, 5), "tile": (3, 3), "overlap": (2, 1), "border": border}
        x = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
        tiles = crop(x, case).detach().requires_grad_()  # untouched: all agree, and every one has its share
        assert torch.autograd.gradcheck(lambda x: crop(x, case), x)
        assert torch.autograd.gradcheck(lambda tiles: blend(tiles, case, window), tiles)
        assert torch.autograd.gradgradcheck(lambda tiles: blend(tiles, case, window), tiles)
        assert torch.autograd.gradgradcheck(lambda x: crop(x, case), x)


class TestTransforms:
    @given(cases(), windows, st.sampled_from([0, 1, -1]))
    @settings(max_examples=10)
    def test_vmap(self, case: dict, window: str, dim: int) -> None:
        x = torch.randn(3, 2, *case["size"]).movedim(0, dim)
        tiles = torch.randn(3, len(corners(case)), 2, *case["tile"]).movedim(0, dim)
        for fn, given_ in ((lambda x: crop(x, case), x), (lambda t: blend(t, case, window), tiles)):
            expected = torch.stack([fn(one) for one in given_.unbind(dim)])
            assert torch.equal(torch.func.vmap(fn, in_dims=dim)(given_), expected)

            def loss(x: Tensor, fn=fn) -> Tensor:
                return fn(x).square().sum()

            each = torch.stack([torch.func.grad(loss)(one) for one in given_.unbind(dim)])
            torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), in_dims=dim)(given_), each)

    @pytest.mark.parametrize("data_format", ["channels_first", "channels_last"][: 1 + ALL])
    def test_compile_and_export(self, data_format: str) -> None:
        case = {"size": (9, 14), "tile": (4, 5), "overlap": (2, 1), "border": "shift"}

        class Crop(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return crop(x, case, data_format)

        class Blend(torch.nn.Module):
            def forward(self, tiles: Tensor) -> Tensor:
                return blend(tiles, case, "hann", data_format)

        def maps(batch: int) -> tuple[Tensor]:
            return (map_of(case, (batch,), 2, data_format, torch.float32),)

        def tiles(batch: int) -> tuple[Tensor]:
            return (torch.randn_like(crop(*maps(batch), case, data_format)),)

        for module, inputs in ((Crop(), maps), (Blend(), tiles)):
            assert_compiles_once(module, inputs)
            assert_exports(module, inputs)


class TestAgainstOthers:
    @given(cases(), channels)
    def test_unfold_and_fold(self, case: dict, channel: int) -> None:
        size, tile, overlap = (tuple(case[key]) for key in ("size", "tile", "overlap"))
        step = tuple(t - o for t, o in zip(tile, overlap, strict=True))
        size = tuple((side - t) // s * s + t for side, t, s in zip(size, tile, step, strict=True))
        case = case | {"size": size}
        x = torch.randn(2, channel, *size, dtype=torch.float64)
        unfolded = F.unfold(x, tile, stride=step)
        tiles = crop(x, case)
        assert torch.equal(tiles, unfolded.unflatten(1, (channel, *tile)).movedim(-1, 1))
        sums = F.fold(unfolded, size, tile, stride=step)
        counts = F.fold(F.unfold(torch.ones_like(x), tile, stride=step), size, tile, stride=step)
        changed = tiles * 2 + 1
        torch.testing.assert_close(blend(changed, case, "constant"), (sums / counts) * 2 + 1)

    @given(cases(), channels)
    def test_kornia(self, case: dict, channel: int) -> None:
        """Which takes sizes that the windows fill; below version 0.9 it divides by the count + 1e-8."""
        from kornia.contrib import combine_tensor_patches, extract_tensor_patches

        size, tile, overlap = (tuple(case[key]) for key in ("size", "tile", "overlap"))
        step = tuple(t - o for t, o in zip(tile, overlap, strict=True))
        size = tuple((side - t) // s * s + t for side, t, s in zip(size, tile, step, strict=True))
        case = case | {"size": size}
        x = torch.randn(2, channel, *size)
        tiles = crop(x, case)
        assert torch.equal(tiles, extract_tensor_patches(x, tile, step))
        changed = torch.randn_like(tiles)
        theirs = combine_tensor_patches(changed, size, tile, step)
        torch.testing.assert_close(blend(changed, case, "constant"), theirs)

    @given(cases(), channels)
    def test_monai(self, case: dict, channel: int) -> None:
        """Its splitter pads at the end, and its merger takes the mean."""
        inferers = pytest.importorskip("monai.inferers")
        case = case | {"border": "pad"}
        x = torch.randn(2, channel, *case["size"])
        splitter = inferers.SlidingWindowSplitter(case["tile"], overlap=case["overlap"])
        patches, places = zip(*splitter(x), strict=True)
        assert list(places) == corners(case)
        tiles = crop(x, case)
        assert torch.equal(tiles, torch.stack(patches, dim=1))
        changed = torch.randn_like(tiles)
        merger = inferers.AvgMerger((2, channel, *splitter.get_padded_shape(x)))
        for patch, place in zip(changed.unbind(1), places, strict=True):
            merger.aggregate(patch, place)
        theirs = merger.finalize()[..., : case["size"][0], : case["size"][1]]
        torch.testing.assert_close(blend(changed, case, "constant"), theirs)


def test_memory_is_one_map_and_one_row_of_tiles() -> None:
    from benchmarks.measure import peak_bytes

    x = torch.randn(1, 1024, 1024)
    tiles = dv.local_crop(x, tile=256, overlap=64)
    assert peak_bytes(lambda: dv.local_crop(x, tile=256, overlap=64), "cpu") <= tiles.nbytes * 1.01
    assert peak_bytes(lambda: dv.blend_tiles(tiles, (1024, 1024), overlap=64, window="hann"), "cpu") <= x.nbytes * 1.5
