"""The cropping module: what becomes of images that are no whole number of tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import dualview as dv
from tests import reference
from tests.checks import assert_compiles_once, fresh, refuses
from tests.strategies import batches, channels, dtypes, examples, grids, map_shape, numbered
from tests.strategies import tiles as tile_sizes

POLICIES = ["error", "pad", "crop", "resize"]
sides = st.integers(1, 14)


def check_tiles(out: dv.DualPerspectiveTiles, canvas: Tensor, grid: tuple[int, int]) -> None:
    """Both perspectives of ``canvas``, by the reference."""
    assert tuple(out.grid) == grid
    assert torch.equal(out.local, reference.crop(canvas, grid, "local", "channels_first"))
    assert torch.equal(out.stride, reference.crop(canvas, grid, "global", "channels_first"))
    assert out.valid.dtype == torch.bool
    assert out.valid.shape == canvas.shape[-2:]


class TestPolicies:
    @given(batches, channels, grids, tile_sizes, dtypes, st.sampled_from(POLICIES))
    @settings(max_examples=examples(40))
    def test_whole_multiples_are_cut_as_they_are(
        self,
        batch: tuple[int, ...],
        channel: int,
        grid: tuple[int, int],
        tile: tuple[int, int],
        dtype: torch.dtype,
        remainder: str,
    ) -> None:
        images = numbered(map_shape(batch, channel, grid, tile, "channels_first"), dtype)
        dcm = dv.DualPerspectiveCrop(tile, remainder=remainder)
        out = dcm(images)
        check_tiles(out, images, grid)
        assert out.valid.all()
        assert out.local.dtype == out.stride.dtype == dtype
        assert fresh(out.local, images, out.stride)
        assert fresh(out.stride, images)
        for perspective in ("local", "global"):
            assert torch.equal(dcm.inverse(out, perspective), images)
            assert fresh(dcm.inverse(out, perspective), images, out.local, out.stride)

    @given(sides, sides, tile_sizes, batches, dtypes, st.integers(0, 200))
    @settings(max_examples=examples(40))
    def test_pad(
        self, height: int, width: int, tile: tuple[int, int], batch: tuple[int, ...], dtype: torch.dtype, value: int
    ) -> None:
        value = value % 2 if dtype == torch.bool else value
        images = numbered((*batch, 2, height, width), dtype)
        dcm = dv.DualPerspectiveCrop(tile, remainder="pad", pad_value=value)
        out = dcm(images)
        grid = ((height + tile[0] - 1) // tile[0], (width + tile[1] - 1) // tile[1])
        canvas = torch.full((*batch, 2, grid[0] * tile[0], grid[1] * tile[1]), value).to(dtype)
        canvas[..., :height, :width] = images
        check_tiles(out, canvas, grid)
        real = torch.zeros(canvas.shape[-2:])
        real[:height, :width] = 1
        assert torch.equal(out.valid, real == 1)
        for perspective in ("local", "global"):
            back = dcm.inverse(out, perspective)
            assert torch.equal(back, images)
            assert fresh(back, images, out.local, out.stride)

    @given(sides, sides, tile_sizes, batches)
    def test_crop(self, height: int, width: int, tile: tuple[int, int], batch: tuple[int, ...]) -> None:
        images = numbered((*batch, 2, height, width))
        dcm = dv.DualPerspectiveCrop(tile, remainder="crop")
        grid = (height // tile[0], width // tile[1])
        if 0 in grid:
            with refuses(f"{height} x {width}", f"{tile[0]} x {tile[1]}", "smaller than one tile", "Enlarge or pad"):
                dcm(images)
            return
        out = dcm(images)
        kept = images[..., : grid[0] * tile[0], : grid[1] * tile[1]]
        check_tiles(out, kept, grid)
        assert out.valid.all()
        assert torch.equal(dcm.inverse(out), kept)
        assert torch.equal(dcm.inverse(out, "global"), kept)

    @given(sides, sides, tile_sizes, batches)
    def test_resize(self, height: int, width: int, tile: tuple[int, int], batch: tuple[int, ...]) -> None:
        images = torch.randn(*batch, 2, height, width, dtype=torch.float64)
        out = dv.DualPerspectiveCrop(tile, remainder="resize")(images)
        # the nearest whole number of tiles per axis, halves upwards, at least one
        grid = tuple(max(1, int(side / unit + 0.5)) for side, unit in ((height, tile[0]), (width, tile[1])))
        size = (grid[0] * tile[0], grid[1] * tile[1])
        flat = images.reshape(-1, 2, height, width)
        upright = size[1] > 1  # torch mixes up the rows of one column: go by way of its transpose
        flat, wanted = (flat, size) if upright else (flat.mT.contiguous(), size[::-1])
        canvas = F.interpolate(flat, wanted, mode="bicubic", antialias=True, align_corners=False) if len(flat) else flat
        canvas = canvas if upright else canvas.mT
        check_tiles(out, canvas.reshape(*batch, 2, *size), grid)
        assert out.valid.all()

    def test_resize_of_one_column(self) -> None:
        """Torch alone mixes up its rows; where all columns are alike, every width shows the same."""
        column = torch.rand(2, 3, 11, 1)
        narrow, wide = (dv.DualPerspectiveCrop((4, width), remainder="resize") for width in (1, 5))
        resized = wide.inverse(wide(column.expand(-1, -1, -1, 5)))
        torch.testing.assert_close(narrow.inverse(narrow(column)), resized[..., :1])

    def test_resize_keeps_dtypes_in_range(self) -> None:
        harsh = torch.randint(0, 2, (3, 7, 9), dtype=torch.uint8) * 255
        out = dv.DualPerspectiveCrop((4, 4), remainder="resize")(harsh)
        exact = F.interpolate(harsh[None].double(), (8, 8), mode="bicubic", antialias=True)[0]
        assert out.local.dtype == torch.uint8
        assert exact.max() > 255.5  # it overshoots at both ends, so wrapping around would show
        assert exact.min() < -0.5
        canvas = dv.recombine(out.local, out.grid, "local")
        assert (canvas.double() - exact.clamp(0, 255)).abs().max() <= 0.5001
        half = dv.DualPerspectiveCrop((4, 4), remainder="resize")(harsh.to(torch.bfloat16))
        assert half.local.dtype == torch.bfloat16

    @given(sides, sides, tile_sizes)
    def test_error(self, height: int, width: int, tile: tuple[int, int]) -> None:
        if height % tile[0] == 0 and width % tile[1] == 0:
            return
        with refuses(f"{height} x {width}", f"{tile[0]} x {tile[1]} tiles", '"pad", "crop" or "resize"'):
            dv.DualPerspectiveCrop(tile)(torch.zeros(3, height, width))

    def test_stride_tiles_have_the_encoders_size(self) -> None:
        """Eq. 16 would make them floor(1100 / 3) = 366 wide; "crop" keeps them at 336."""
        out = dv.DualPerspectiveCrop((336, 336), remainder="crop")(torch.zeros(1, 340, 1100))
        assert out.stride.shape == out.local.shape == (3, 1, 336, 336)


class TestPadValue:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
    def test_per_channel(self, dtype: torch.dtype) -> None:
        images = torch.ones(2, 3, 5, 7).to(dtype)
        out = dv.DualPerspectiveCrop((4, 4), remainder="pad", pad_value=(10, 20, 30))(images)
        canvas = dv.recombine(out.local, out.grid, "local")
        assert canvas.dtype == dtype
        for channel, value in enumerate((10, 20, 30)):
            assert (canvas[:, channel, :5, :7] == 1).all()
            assert (canvas[:, channel][:, ~out.valid] == value).all()

    def test_default_is_zero(self) -> None:
        out = dv.DualPerspectiveCrop((4, 4), remainder="pad")(torch.ones(1, 3, 3))
        assert out.local.sum() == 9

    def test_nothing_is_written_to_the_input(self) -> None:
        images = numbered((1, 5, 7))
        kept = images.clone()
        dv.DualPerspectiveCrop((4, 4), remainder="pad")(images).local.fill_(-1)
        assert torch.equal(images, kept)


class TestLists:
    @given(
        st.lists(st.tuples(sides, sides), min_size=1, max_size=4),
        tile_sizes,
        st.sampled_from(["pad", "resize"]),
        st.sampled_from([torch.float64, torch.uint8]),
    )
    def test_equal_the_images_one_by_one(
        self, sizes: list[tuple[int, int]], tile: tuple[int, int], remainder: str, dtype: torch.dtype
    ) -> None:
        images = [(numbered((3, *size), torch.float64) % 200).to(dtype) for size in sizes]
        dcm = dv.DualPerspectiveCrop(tile, remainder=remainder)
        out = dcm(images)
        alone = [dcm(image) for image in images]
        assert out.grid == tuple(one.grid for one in alone) == out.local.grids == out.stride.grids
        assert (out.local.perspective, out.stride.perspective) == ("local", "global")
        for k, one in enumerate(alone):
            assert torch.equal(out.local.split()[k], one.local)
            assert torch.equal(out.stride.split()[k], one.stride)
            assert torch.equal(out.valid[k], one.valid)
        for perspective, packed in (("local", out.local), ("global", out.stride)):
            for canvas, image, one in zip(dv.recombine(packed), images, alone, strict=True):
                if remainder == "pad":
                    assert torch.equal(canvas[:, : image.shape[1], : image.shape[2]], image)
                    assert torch.equal(dcm.inverse(one, perspective), image)
                else:
                    assert torch.equal(dcm.inverse(one, perspective), canvas)

    def test_tuples_count_as_lists(self) -> None:
        images = (torch.zeros(3, 4, 8), torch.zeros(3, 8, 4))
        out = dv.DualPerspectiveCrop((4, 4))(images)
        assert out.grid == (dv.TileGrid(1, 2), dv.TileGrid(2, 1))
        assert out.local.data.shape == (4, 3, 4, 4)

    def test_refuses(self) -> None:
        dcm = dv.DualPerspectiveCrop((4, 4), remainder="pad")
        with refuses("at least one", "[]"):
            dcm([])
        with refuses("(C, H, W)", "(3, 4, 4)", "(1, 3, 4, 4)"):
            dcm([torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4)])
        with refuses("(3, 4, 4)", "(1, 4, 4)", "same number of channels"):  # one colour image, one grey
            dcm([torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)])


class TestLowPass:
    def test_smooths_the_stride_tiles_alone(self) -> None:
        images = torch.randn(2, 3, 8, 15)
        out = dv.DualPerspectiveCrop((4, 5), low_pass=True)(images)
        assert torch.equal(out.local, dv.local_crop(images, (2, 3)))
        assert torch.equal(out.stride, dv.global_stride_crop(dv.low_pass(images, (2, 3)), (2, 3)))
        assert not torch.equal(out.stride, dv.global_stride_crop(images, (2, 3)))

    def test_its_stride_tiles_have_no_inverse(self) -> None:
        dcm = dv.DualPerspectiveCrop((4, 5), low_pass=True)
        images = torch.randn(2, 3, 8, 15)
        out = dcm(images)
        assert torch.equal(dcm.inverse(out), images)
        with refuses("low-pass filtered", 'perspective="local"'):
            dcm.inverse(out, "global")
        packed = dcm(list(images))
        assert packed.stride.perspective is None  # recombine cannot undo it by itself
        assert packed.local.perspective == "local"

    def test_needs_floats(self) -> None:
        with refuses("torch.uint8", "floating-point", error=TypeError):
            dv.DualPerspectiveCrop((4, 4), low_pass=True)(torch.zeros(3, 8, 8, dtype=torch.uint8))


class TestModule:
    def test_prints_its_arguments(self) -> None:
        assert (
            repr(dv.DualPerspectiveCrop((4, 6), remainder="pad", pad_value=0.5))
            == "DualPerspectiveCrop(tile=(4, 6), remainder='pad', pad_value=0.5, low_pass=False, "
            "perspectives=('local', 'global'))"
        )
        assert dv.DualPerspectiveCrop().tile == (336, 336)
        assert dv.DualPerspectiveCrop().remainder == "error"

    @pytest.mark.parametrize("remainder", POLICIES)
    def test_compiles(self, remainder: str) -> None:
        dcm = dv.DualPerspectiveCrop((4, 5), remainder=remainder)
        size = (8, 15) if remainder == "error" else (9, 17)

        def cut(images: Tensor) -> Tensor:
            out = dcm(images)
            return torch.cat([out.local, out.stride], 1)

        # torch itself cannot compile the backward of the antialiased resize for a dynamic batch: integers need none
        dtype = torch.uint8 if remainder == "resize" else torch.float32
        assert_compiles_once(cut, lambda batch: (numbered((batch, 3, *size), dtype),))

    @pytest.mark.parametrize("remainder", POLICIES)
    def test_gradients_reach_every_kept_pixel(self, remainder: str) -> None:
        size = (4, 6) if remainder == "error" else (5, 7)
        images = torch.randn(1, 1, *size, dtype=torch.float64, requires_grad=True)
        dcm = dv.DualPerspectiveCrop((2, 3), remainder=remainder)
        assert torch.autograd.gradcheck(lambda x: tuple(dcm(x)[:2]), images)
        if remainder in ("error", "pad"):
            sum(part.sum() for part in dcm(images)[:2]).backward()
            assert (images.grad == 2).all()  # once by each perspective

    def test_vmap(self) -> None:
        dcm = dv.DualPerspectiveCrop((2, 3), remainder="pad", pad_value=7)
        images = numbered((4, 3, 5, 7))
        out = dcm(images)
        local, stride = torch.func.vmap(lambda x: tuple(dcm(x)[:2]))(images)
        assert torch.equal(local, out.local)
        assert torch.equal(stride, out.stride)


class TestRefusals:
    def test_construction(self) -> None:
        with refuses("remainder='wrap'", "error", "pad", "crop", "resize"):
            dv.DualPerspectiveCrop((4, 4), remainder="wrap")
        for tile in (4.0, (4,), (4, 0), (4, 4.5)):
            with refuses(f"tile={tile!r}"):
                dv.DualPerspectiveCrop(tile)

    @pytest.mark.parametrize("remainder", POLICIES)
    def test_images(self, remainder: str) -> None:
        dcm = dv.DualPerspectiveCrop((4, 4), remainder=remainder)
        with refuses("(8, 8)", "(..., C, H, W)"):
            dcm(torch.zeros(8, 8))
        for height, width in ((0, 8), (8, 0)):
            with refuses("images", f"(3, {height}, {width})", "at least 1"):
                dcm(torch.zeros(3, height, width))

    @pytest.mark.parametrize("value", [(1, 2), (1, 2, 3, 4), (1,), ()])
    def test_pad_value_of_other_images(self, value: tuple[float, ...]) -> None:
        with refuses(f"pad_value={value}", "(3, 5, 7)", "one number, or one for each of the 3 channels"):
            dv.DualPerspectiveCrop((4, 4), remainder="pad", pad_value=value)(torch.zeros(3, 5, 7))

    def test_inverse_of_other_tiles(self) -> None:
        dcm = dv.DualPerspectiveCrop((4, 5))
        out = dcm(torch.zeros(3, 8, 15))
        with refuses("perspective='stride'"):
            dcm.inverse(out, "stride")
        with refuses("perspective=None"):
            dcm.inverse(out, None)
        alone = dv.TileBatch.collate([out.local], [out.grid], "local")
        with refuses("does not know its images", "DualPerspectiveCrop"):
            dcm.inverse(alone)


def test_inverse_of_a_list() -> None:
    crop = dv.DualPerspectiveCrop((4, 5), remainder="pad")
    images = [torch.randn(3, 7, 9), torch.randn(3, 4, 11)]
    for perspective in ("local", "global"):
        for image, back in zip(images, crop.inverse(crop(images), perspective), strict=True):
            assert torch.equal(image, back)
