"""The crops and their inverse: one permutation of cells, whatever the dtype, layout, batch or format."""

import copy
import pickle
from typing import Any

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.maxxvit import grid_partition, grid_partition_nchw, window_partition, window_partition_nchw
from torch import Tensor, nn
from torch.nn import functional as F

import dualview as dv
from dualview.kernels.retile import retile
from dualview.ops.tiling import crop
from tests import reference
from tests.checks import assert_compiles_once, assert_exports, calls_of, fresh, refuses
from tests.strategies import (
    ALL,
    batches,
    channels,
    data_formats,
    dtypes,
    examples,
    grids,
    laid_out,
    layouts,
    map_shape,
    numbered,
    perspectives,
    tiles_shape,
)
from tests.strategies import tiles as tile_sizes

CROPS = {"local": dv.local_crop, "global": dv.global_stride_crop}
MODULES = {"local": dv.LocalCrop, "global": dv.GlobalStrideCrop}
cases = st.tuples(batches, channels, grids, tile_sizes, data_formats)


class TestAgainstTheEquations:
    @given(cases, perspectives, dtypes, layouts)
    @settings(max_examples=examples(60))
    def test_crop(self, case: tuple, perspective: str, dtype: torch.dtype, layout: str) -> None:
        grid, data_format = case[2], case[4]
        x = laid_out(numbered(map_shape(*case), dtype), layout)
        tiles = CROPS[perspective](x, grid, data_format=data_format)
        assert tiles.shape == tiles_shape(*case)
        assert tiles.dtype == dtype
        assert fresh(tiles, x)
        assert torch.equal(tiles, reference.crop(x, grid, perspective, data_format))

    @given(cases, perspectives, dtypes, layouts)
    @settings(max_examples=examples(60))
    def test_recombine(self, case: tuple, perspective: str, dtype: torch.dtype, layout: str) -> None:
        grid, data_format = case[2], case[4]
        tiles = laid_out(numbered(tiles_shape(*case), dtype), layout)
        full = dv.recombine(tiles, grid, perspective, data_format=data_format)
        assert full.shape == map_shape(*case)
        assert full.dtype == dtype
        assert fresh(full, tiles)
        assert torch.equal(full, reference.recombine(tiles, grid, perspective, data_format))

    def test_a_picture_by_hand(self) -> None:
        x = torch.tensor([[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]])
        assert dv.local_crop(x, (1, 3)).tolist() == [[[[0, 1], [6, 7]]], [[[2, 3], [8, 9]]], [[[4, 5], [10, 11]]]]
        strides = dv.global_stride_crop(x, (2, 3)).flatten(1)
        assert strides.tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]


class TestAlgebra:
    @given(cases, perspectives)
    def test_each_cell_lands_exactly_once(self, case: tuple, perspective: str) -> None:
        x = numbered(map_shape(*case))
        tiles = CROPS[perspective](x, case[2], data_format=case[4])
        per_image = x.shape[len(case[0]) :].numel()  # no cell may move to another image
        assert torch.equal(tiles.reshape(-1, per_image).sort(-1).values, x.reshape(-1, per_image))

    @given(cases, perspectives, dtypes)
    def test_inverse_in_both_orders(self, case: tuple, perspective: str, dtype: torch.dtype) -> None:
        grid, data_format = case[2], case[4]
        x, tiles = numbered(map_shape(*case), dtype), numbered(tiles_shape(*case), dtype)
        cut = CROPS[perspective]
        back = dv.recombine(cut(x, grid, data_format=data_format), grid, perspective, data_format=data_format)
        assert torch.equal(back, x)
        again = cut(dv.recombine(tiles, grid, perspective, data_format=data_format), grid, data_format=data_format)
        assert torch.equal(again, tiles)

    @given(cases, perspectives)
    def test_commutes_with_maps_of_each_cell(self, case: tuple, perspective: str) -> None:
        """Mixing channels, one cell at a time, before or after the crop is the same: why encoders may be shared."""
        grid, data_format = case[2], case[4]
        x = numbered(map_shape(*case))
        dim = -3 if data_format == "channels_first" else -1

        def mix(values: Tensor) -> Tensor:
            return torch.cat([values.flip(dim) * 3 + 1, values * values], dim)

        def cut(values: Tensor) -> Tensor:
            return CROPS[perspective](values, grid, data_format=data_format)

        assert torch.equal(cut(mix(x)), mix(cut(x)))

    @given(cases, perspectives)
    def test_formats_differ_by_a_transpose(self, case: tuple, perspective: str) -> None:
        x = numbered(map_shape(*case[:4], "channels_first"))
        last = CROPS[perspective](x.movedim(-3, -1), case[2], data_format="channels_last")
        assert torch.equal(CROPS[perspective](x, case[2]).movedim(-3, -1), last)

    @given(cases)
    def test_perspectives_swap_with_grid_and_tile(self, case: tuple) -> None:
        """Blocks of a grid are the strides of a grid of the tile's size, with tile index and position exchanged."""
        batch, channel, grid, tile, _ = case
        x = numbered(map_shape(batch, channel, grid, tile, "channels_last"))
        blocks = dv.local_crop(x, grid, data_format="channels_last")
        strides = dv.global_stride_crop(x, tile, data_format="channels_last")
        exchanged = strides.unflatten(-4, tile).movedim((-3, -2), (-5, -4)).flatten(-5, -4)
        assert torch.equal(blocks, exchanged)

    @given(cases, perspectives, perspectives)
    def test_retile(self, case: tuple, source: str, target: str) -> None:
        case = (*case[:4], "channels_last")
        tiles = numbered(tiles_shape(*case))
        moved = retile(tiles, source, target, case[2])
        full = reference.recombine(tiles, case[2], source, "channels_last")
        assert torch.equal(moved, reference.crop(full, case[2], target, "channels_last"))


class TestByTileSize:
    @given(cases, perspectives)
    def test_is_the_crop_of_the_grid(self, case: tuple, perspective: str) -> None:
        grid, tile, data_format = case[2:]
        x = numbered(map_shape(*case))
        expected = reference.crop(x, grid, perspective, data_format)
        module = MODULES[perspective](tile=tile, data_format=data_format)
        assert torch.equal(CROPS[perspective](x, tile=tile, data_format=data_format), expected)
        for copied in (module, pickle.loads(pickle.dumps(module))):
            assert torch.equal(copied(x), expected)

    def test_one_number_is_a_square(self) -> None:
        x = numbered((3, 8, 12))
        assert torch.equal(dv.local_crop(x, tile=4), dv.local_crop(x, (2, 3)))
        assert repr(dv.LocalCrop(tile=4)) == "LocalCrop(tile=(4, 4), data_format='channels_first')"

    def test_compiles_and_exports(self) -> None:
        module = dv.GlobalStrideCrop(tile=(4, 5))
        assert_compiles_once(module, lambda batch: (numbered((batch, 2, 8, 15), torch.float32),))
        assert_exports(module, lambda batch: (numbered((batch, 2, 8, 15), torch.float32),))

    @given(st.integers(1, 14), st.integers(1, 14), tile_sizes)
    def test_a_remainder_is_refused(self, height: int, width: int, tile: tuple[int, int]) -> None:
        """Also where the grid of whole tiles would divide the map, into tiles of another size."""
        if height % tile[0] == 0 and width % tile[1] == 0:
            return
        for shape, data_format in (((1, height, width), "channels_first"), ((height, width, 1), "channels_last")):
            with refuses(f"{height} x {width}", f"{tile[0]} x {tile[1]} tiles", "DualPerspectiveCrop"):
                dv.local_crop(torch.zeros(shape), tile=tile, data_format=data_format)

    def test_refuses(self) -> None:
        x = torch.zeros(3, 8, 12)
        for wrong in ({}, {"grid": (2, 3), "tile": 4}):
            for call in (dv.LocalCrop, dv.GlobalStrideCrop, lambda **cut: dv.local_crop(x, **cut)):
                with refuses(f"tile={wrong.get('tile')}", "one of the two"):
                    call(**wrong)
        with refuses("tile=(4, 0)"):
            dv.global_stride_crop(x, tile=(4, 0))
        with refuses("(3, 0, 12)", "at least 1"):
            dv.local_crop(x[:, :0], tile=4)
        with refuses("(8, 12)", "(..., C, H, W)"):
            dv.local_crop(x[0], tile=4)


class TestAgainstOthers:
    @given(grids, tile_sizes, channels)
    def test_timm_windows_and_grids(self, grid: tuple[int, int], tile: tuple[int, int], channel: int) -> None:
        first = numbered(map_shape((2,), channel, grid, tile, "channels_first"))
        last = first.movedim(1, -1).contiguous()
        for ours, nchw, nhwc in (
            (dv.local_crop, window_partition_nchw, window_partition),
            (dv.global_stride_crop, grid_partition_nchw, grid_partition),
        ):
            assert torch.equal(ours(first, grid).flatten(0, 1), nchw(first, list(tile)))
            assert torch.equal(ours(last, grid, data_format="channels_last").flatten(0, 1), nhwc(last, list(tile)))

    @given(st.integers(1, 4), tile_sizes, channels)
    def test_pixel_unshuffle(self, n: int, tile: tuple[int, int], channel: int) -> None:
        x = numbered(map_shape((2,), channel, (n, n), tile, "channels_first"))
        expected = F.pixel_unshuffle(x, n).unflatten(1, (channel, n * n)).movedim(2, 1)
        assert torch.equal(dv.global_stride_crop(x, (n, n)), expected)
        assert torch.equal(dv.recombine(expected, (n, n), "global"), x)

    @given(grids, tile_sizes, channels)
    def test_unfold(self, grid: tuple[int, int], tile: tuple[int, int], channel: int) -> None:
        x = numbered(map_shape((2,), channel, grid, tile, "channels_first"), torch.float64)
        # A stride tile is a kernel of its size with its cells spread by the grid; there are exactly rows x cols places.
        strides = F.unfold(x, tile, dilation=grid).unflatten(1, (channel, *tile)).movedim(-1, 1)
        blocks = F.unfold(x, tile, stride=tile).unflatten(1, (channel, *tile)).movedim(-1, 1)
        assert torch.equal(dv.global_stride_crop(x, grid), strides)
        assert torch.equal(dv.local_crop(x, grid), blocks)

    @given(cases)
    def test_einops_and_slices(self, case: tuple) -> None:
        grid, tile = case[2:4]
        x = numbered(map_shape((2,), *case[1:4], "channels_first"))
        sizes = {"i": grid[0], "j": grid[1]}
        blocks, strides = dv.local_crop(x, grid), dv.global_stride_crop(x, grid)
        assert torch.equal(blocks, einops.rearrange(x, "b c (i h) (j w) -> b (i j) c h w", **sizes))
        assert torch.equal(strides, einops.rearrange(x, "b c (h i) (w j) -> b (i j) c h w", **sizes))
        assert torch.equal(dv.recombine(x[:, None], (1, 1), "global"), x)
        for i in range(grid[0]):
            for j in range(grid[1]):
                tile_rows, tile_cols = slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1])
                assert torch.equal(blocks[:, i * grid[1] + j], x[:, :, tile_rows, tile_cols])
                assert torch.equal(strides[:, i * grid[1] + j], x[:, :, i :: grid[0], j :: grid[1]])

    @pytest.mark.parametrize("perspective", ["local", "global"])
    @pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
    def test_coordinate_images(self, perspective: str, data_format: str) -> None:
        def ours(x: Tensor) -> Tensor:
            return CROPS[perspective](x, (2, 3), data_format=data_format)

        options = {"perspective": perspective, "data_format": data_format}
        dv.testing.assert_tile_order(ours, (2, 3), (4, 5), **options)
        for wrong in ([1, 0, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]):
            with refuses(f"tiles are not in {perspective} order", error=AssertionError):
                dv.testing.assert_tile_order(lambda x, wrong=wrong: ours(x)[:, wrong], (2, 3), (4, 5), **options)


class TestMemory:
    @pytest.mark.parametrize("perspective", ["local", "global"])
    @pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
    @pytest.mark.parametrize("grid", [(2, 3), (1, 3), (2, 1), (1, 1), (4, 6)])
    def test_results_are_contiguous_copies(self, perspective: str, data_format: str, grid: tuple[int, int]) -> None:
        shape = (2, 3, 4, 6) if data_format == "channels_first" else (2, 4, 6, 3)
        x = numbered(shape, torch.float32)
        tiles = CROPS[perspective](x, grid, data_format=data_format)
        full = dv.recombine(tiles, grid, perspective, data_format=data_format)
        assert fresh(tiles, x)
        assert fresh(full, tiles, x)
        kept = tiles.clone()
        x.fill_(-1)
        full.fill_(-2)
        assert torch.equal(tiles, kept)

    def test_channels_last_images_become_contiguous_tiles(self) -> None:
        x = torch.zeros(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
        for grid in ((2, 3), (1, 1)):
            assert dv.local_crop(x, grid).is_contiguous()
            assert dv.global_stride_crop(x, grid).is_contiguous()


class TestHostTime:
    """At batch 1 a GPU waits for the host. View, permute, copy and view are four calls, and these take a few more."""

    @pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
    @pytest.mark.parametrize("grid", [(2, 3), dv.TileGrid(2, 3)])
    def test_few_functions_are_called(self, data_format: str, grid: Any) -> None:
        x = torch.zeros(map_shape((1,), 2, (2, 3), (4, 6), data_format))
        tiles = torch.zeros(tiles_shape((1,), 2, (2, 3), (4, 6), data_format))
        for call in (
            lambda: dv.local_crop(x, grid, data_format=data_format),
            lambda: dv.global_stride_crop(x, grid, data_format=data_format),
            lambda: dv.recombine(tiles, grid, "global", data_format=data_format),
            lambda: retile(tiles, "local", "global", grid, data_format=data_format),
        ):
            assert calls_of(call) <= 22

    def test_what_was_right_once_is_no_excuse(self) -> None:
        """Numbers that are equal, and of another type, are looked at again."""
        x = torch.zeros(3, 4, 6)
        dv.local_crop(x, (2, 3))
        for wrong in ((2, 3.0), (2.0, 3)):
            with refuses("positive integer"):
                dv.local_crop(x, wrong)
        dv.local_crop(x[:, :1], (1, 1))
        with refuses("positive integer"):
            dv.local_crop(x[:, :1], (True, 1))
        with refuses("dense", error=TypeError):
            dv.local_crop(x.to_sparse(), (2, 3))


class TestGradients:
    @given(cases, perspectives)
    def test_of_the_crop_is_the_recombination_and_back(self, case: tuple, perspective: str) -> None:
        grid, data_format = case[2], case[4]
        x = numbered(map_shape(*case), torch.float64).requires_grad_()
        tiles = numbered(tiles_shape(*case), torch.float64).requires_grad_()
        CROPS[perspective](x, grid, data_format=data_format).backward(tiles.detach())
        assert torch.equal(x.grad, dv.recombine(tiles.detach(), grid, perspective, data_format=data_format))
        dv.recombine(tiles, grid, perspective, data_format=data_format).backward(x.detach())
        assert torch.equal(tiles.grad, CROPS[perspective](x.detach(), grid, data_format=data_format))

    @pytest.mark.parametrize("perspective", ["local", "global"])
    @pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
    def test_gradcheck(self, perspective: str, data_format: str) -> None:
        case = ((2,), 2, (2, 3), (1, 2), data_format)
        x = torch.randn(map_shape(*case), dtype=torch.float64, requires_grad=True)
        tiles = torch.randn(tiles_shape(*case), dtype=torch.float64, requires_grad=True)

        def cut(values: Tensor) -> Tensor:
            return CROPS[perspective](values, (2, 3), data_format=data_format)

        def join(values: Tensor) -> Tensor:
            return dv.recombine(values, (2, 3), perspective, data_format=data_format)

        assert torch.autograd.gradcheck(cut, x, check_forward_ad=True)
        assert torch.autograd.gradcheck(join, tiles, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(cut, x)


class TestTransforms:
    @given(cases, perspectives, st.sampled_from([0, 1, -1]))
    @settings(max_examples=examples(15))
    def test_vmap(self, case: tuple, perspective: str, dim: int) -> None:
        grid, data_format = case[2], case[4]
        for shape, fn in (
            (map_shape(*case), lambda x: CROPS[perspective](x, grid, data_format=data_format)),
            (tiles_shape(*case), lambda x: dv.recombine(x, grid, perspective, data_format=data_format)),
        ):
            x = numbered((3, *shape)).movedim(0, dim)
            expected = torch.stack([fn(one) for one in x.unbind(dim)])
            assert torch.equal(torch.func.vmap(fn, in_dims=dim)(x), expected)

    @pytest.mark.parametrize(
        "perspective, data_format",
        [
            ("local", "channels_last"),
            ("global", "channels_first"),
            *[("local", "channels_first"), ("global", "channels_last")] * ALL,
        ],
    )
    def test_compile_and_export(self, perspective: str, data_format: str) -> None:
        module = MODULES[perspective]((2, 3), data_format=data_format)
        inverse = dv.SubfeatureRecombine((2, 3), perspective, data_format=data_format)

        def images(batch: int) -> tuple[Tensor]:
            return (numbered(map_shape((batch,), 2, (2, 3), (4, 5), data_format), torch.float32),)

        def tiles(batch: int) -> tuple[Tensor]:
            return (numbered(tiles_shape((batch,), 2, (2, 3), (4, 5), data_format), torch.float32),)

        assert_compiles_once(module, images)
        assert_compiles_once(inverse, tiles)
        assert_exports(module, images)
        assert_exports(inverse, tiles)


class TestModules:
    @given(cases, perspectives)
    @settings(max_examples=examples(15))
    def test_are_their_functions(self, case: tuple, perspective: str) -> None:
        grid, data_format = case[2], case[4]
        x = numbered(map_shape(*case))
        module = MODULES[perspective](grid, data_format=data_format)
        inverse = dv.SubfeatureRecombine(grid, perspective, data_format=data_format)
        tiles = CROPS[perspective](x, grid, data_format=data_format)
        for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(copied(x), tiles)
        for copied in (inverse, copy.deepcopy(inverse), pickle.loads(pickle.dumps(inverse))):
            assert torch.equal(copied(tiles), x)
        assert torch.equal(crop(x, grid, perspective, data_format=data_format), tiles)

    def test_default_format_is_channels_first(self) -> None:
        x = numbered((1, 2, 4, 6))
        assert torch.equal(dv.LocalCrop((2, 3))(x), dv.local_crop(x, (2, 3), data_format="channels_first"))
        tiles = dv.GlobalStrideCrop((2, 3))(x)
        assert torch.equal(dv.SubfeatureRecombine((2, 3), "global")(tiles), x)
        assert torch.equal(dv.recombine(tiles, (2, 3), "global"), x)

    def test_print_their_arguments(self) -> None:
        assert repr(dv.LocalCrop((2, 3))) == "LocalCrop(grid=(2, 3), data_format='channels_first')"
        stride = dv.GlobalStrideCrop(dv.TileGrid(3, 2), data_format="channels_last")
        assert repr(stride) == "GlobalStrideCrop(grid=(3, 2), data_format='channels_last')"
        join = dv.SubfeatureRecombine((2, 3), "global")
        assert repr(join) == "SubfeatureRecombine(grid=(2, 3), perspective='global', data_format='channels_first')"
        assert not list(nn.Sequential(stride, join).parameters())


class TestRefusals:
    @pytest.mark.parametrize("perspective", ["local", "global"])
    def test_indivisible(self, perspective: str) -> None:
        for shape, data_format in (((2, 3, 5, 6), "channels_first"), ((2, 5, 6, 3), "channels_last")):
            with refuses("5 x 6", "2 x 3", "rows=2", "positive multiple", "Pad, crop or resize"):
                CROPS[perspective](torch.zeros(shape), (2, 3), data_format=data_format)
        with refuses("4 x 7", "cols=3"):
            CROPS[perspective](torch.zeros(3, 4, 7), (2, 3))
        with refuses("(3, 0, 6)", "at least 1"):
            CROPS[perspective](torch.zeros(3, 0, 6), (2, 3))

    @pytest.mark.parametrize("bad", [5, (2, 0), (2, 3.0), (1, 2, 3), "2x3"])
    def test_grid(self, bad: object) -> None:
        for call in (
            lambda: dv.local_crop(torch.zeros(3, 4, 6), bad),
            lambda: dv.LocalCrop(bad),
            lambda: dv.recombine(torch.zeros(6, 3, 2, 2), bad, "local"),
            lambda: dv.SubfeatureRecombine(bad, "local"),
        ):
            with refuses("positive integer"):
                call()

    def test_rank(self) -> None:
        with refuses("(4, 6)", "channels_first", "(..., C, H, W)"):
            dv.local_crop(torch.zeros(4, 6), (2, 3))
        with refuses("(4, 6)", "channels_last", "(..., H, W, D)"):
            dv.global_stride_crop(torch.zeros(4, 6), (2, 3), data_format="channels_last")
        with refuses("(3, 4, 6)", "(..., rows*cols, C, h, w)"):
            dv.recombine(torch.zeros(3, 4, 6), (2, 3), "local")
        with refuses("(3, 4, 6)", "(..., rows*cols, h, w, D)"):
            dv.recombine(torch.zeros(3, 4, 6), (2, 3), "local", data_format="channels_last")

    def test_data_format(self) -> None:
        for call in (
            lambda: dv.local_crop(torch.zeros(3, 4, 6), (2, 3), data_format="NCHW"),
            lambda: dv.recombine(torch.zeros(6, 3, 2, 2), (2, 3), "local", data_format="NCHW"),
        ):
            with refuses("data_format='NCHW'", '"channels_first" or "channels_last"'):
                call()

    def test_perspective(self) -> None:
        for call in (
            lambda: crop(torch.zeros(3, 4, 6), (2, 3), "stride"),
            lambda: dv.recombine(torch.zeros(6, 3, 2, 2), (2, 3), "stride"),
            lambda: dv.SubfeatureRecombine((2, 3), "stride"),
        ):
            with refuses("perspective='stride'", '"local"', '"global"'):
                call()

    def test_count(self) -> None:
        with refuses("5 tiles", "(2, 5, 3, 4, 4)", "2x3", "rows*cols = 6", "Pass all tiles"):
            dv.recombine(torch.zeros(2, 5, 3, 4, 4), (2, 3), "local")
        with refuses("5 tiles", "2x3"):
            dv.SubfeatureRecombine((2, 3), "global", data_format="channels_last")(torch.zeros(2, 5, 4, 4, 3))

    def test_size(self) -> None:
        tiles = torch.zeros(2, 6, 3, 4, 5)
        assert dv.recombine(tiles, (2, 3), "local", size=(8, 15)).shape == (2, 3, 8, 15)
        assert dv.recombine(tiles.movedim(2, -1), (2, 3), "local", size=(8, 15), data_format="channels_last").shape == (
            (2, 8, 15, 3)
        )
        with refuses("4 x 5", "2x3", "(8, 15)", "size=(15, 8)", "Check the grid (rows first)"):
            dv.recombine(tiles, (2, 3), "local", size=(15, 8))
        with refuses("4 x 5", "3x2", "(12, 10)", "size=(8, 15)"):
            dv.recombine(tiles, (3, 2), "local", size=(8, 15))
        with refuses("tiles", "(6, 3, 0, 5)", "at least 1"):
            dv.recombine(torch.zeros(6, 3, 0, 5), (2, 3), "local")

    def test_a_plain_tensor_without_grid_or_perspective(self) -> None:
        tiles = torch.zeros(6, 3, 4, 4)
        with refuses("grid=None", "perspective='local'", "both must be given"):
            dv.recombine(tiles, perspective="local")
        with refuses("grid=(2, 3)", "perspective=None", "both must be given"):
            dv.recombine(tiles, (2, 3))
