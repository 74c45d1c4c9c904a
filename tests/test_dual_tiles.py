"""Tiles that remember their images: put back, masked and enhanced with nothing but themselves."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

import dualview as dv
from tests import reference
from tests.checks import refuses
from tests.strategies import batches, examples, numbered, perspectives
from tests.strategies import tiles as pairs

TILE = (4, 6)
sides = st.integers(1, 20)


def crop(tile: tuple[int, int] = TILE, **options: object) -> dv.DualPerspectiveCrop:
    return dv.DualPerspectiveCrop(tile, remainder="pad", **options)  # type: ignore[arg-type]


def pooled(tiles: Tensor, patch: tuple[int, int]) -> Tensor:
    """What a model with strides makes of tiles: one value for each patch of pixels."""
    return F.avg_pool2d(tiles.flatten(0, -4), patch, stride=patch).unflatten(0, tiles.shape[:-3])


class TestRecombine:
    @given(sides, sides, batches, perspectives)
    def test_needs_the_result_and_the_perspective_alone(
        self, height: int, width: int, batch: tuple[int, ...], perspective: str
    ) -> None:
        images = numbered((*batch, 2, height, width), torch.float64)
        tiles = crop()(images)
        canvas = torch.zeros(*batch, 2, *tiles.valid.shape, dtype=torch.float64)
        canvas[..., :height, :width] = images
        for call in (
            lambda: dv.recombine(tiles, perspective),
            lambda: dv.recombine(tiles, perspective=perspective),
            lambda: dv.recombine(tiles, tuple(tiles.grid), perspective),
        ):
            assert torch.equal(call(), canvas)
        assert tiles.size == (height, width)

    @given(sides, sides, pairs, st.integers(1, 3), perspectives)
    def test_takes_features_of_any_size_and_width(
        self, height: int, width: int, tokens: tuple[int, int], dim: int, perspective: str
    ) -> None:
        tiles = crop()(torch.zeros(2, 1, height, width))
        features = numbered((2, tiles.grid.num_tiles, *tokens, dim))
        seen = tiles.with_data(local=features, stride=features)
        expected = reference.recombine(features, tuple(tiles.grid), perspective, "channels_last")
        assert torch.equal(dv.recombine(seen, perspective, data_format="channels_last"), expected)

    @given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), perspectives)
    def test_of_a_list_of_images(self, sizes: list[tuple[int, int]], perspective: str) -> None:
        images = [numbered((2, *size), torch.float64) for size in sizes]
        batch = crop()(images)
        assert batch.size == tuple(sizes)
        for back, image in zip(dv.recombine(batch, perspective), images, strict=True):
            assert torch.equal(back[:, : image.shape[1], : image.shape[2]], image)
        features = torch.randn(len(batch.local.data), 3, 2, 5)
        one_by_one = zip(features.split([g.num_tiles for g in batch.grid]), batch.grid, strict=True)
        expected = [reference.recombine(x, tuple(g), perspective, "channels_last") for x, g in one_by_one]
        seen = batch.with_data(local=features, stride=features)
        for got, wanted in zip(dv.recombine(seen, perspective, data_format="channels_last"), expected, strict=True):
            assert torch.equal(got, wanted)

    def test_refuses_what_does_not_fit(self) -> None:
        one = crop()(torch.rand(3, 7, 13))
        many = crop()([torch.rand(3, 7, 13), torch.rand(3, 3, 4)])
        for tiles in (one, many):
            with refuses("perspective='stride'", '"global" (interleaved strides)'):
                dv.recombine(tiles, "stride")
            with refuses("perspective=None", '"local"'):
                dv.recombine(tiles)
        with refuses("grid=(3, 2)", "2x3", "omit the argument"):
            dv.recombine(one, (3, 2), "local")
        with refuses("[(3, 2), (1, 1)]", "['2x3', '1x1']", "omit the argument"):
            dv.recombine(many, [(3, 2), (1, 1)], "local")
        for tiles in (one, many.local.slice(0, 1)):
            with refuses("4 x 6", "2x3", "size=(12, 8)"):
                dv.recombine(tiles, "local", size=(12, 8))
        seen = one.with_data(stride=torch.rand(6, 2, 2, 5))
        with refuses("perspective='local'", "only tiles of ('global',) are held"):
            dv.recombine(seen, "local")
        with refuses("grid=None", "a plain tensor records neither"):
            dv.recombine(one.local, "local")


class TestInverse:
    @given(sides, sides, st.sampled_from([(1, 1), (2, 3), (4, 2), (2, 6)]), batches)
    def test_of_predictions_at_a_lower_resolution(
        self, height: int, width: int, patch: tuple[int, int], batch: tuple[int, ...]
    ) -> None:
        images = torch.randn(*batch, 2, height, width, dtype=torch.float64)
        tiles = crop()(images)
        below, right = (-height % patch[0], -width % patch[1])
        whole = F.pad(images, (0, right, 0, below)).reshape(-1, 2, height + below, width + right)
        if not len(whole):
            return  # which torch does not pool
        expected = F.avg_pool2d(whole, patch, stride=patch)
        got = dv.DualPerspectiveCrop.inverse(tiles.with_data(local=pooled(tiles.local, patch)))
        assert got.shape[-2:] == expected.shape[-2:] == (-(-height // patch[0]), -(-width // patch[1]))
        torch.testing.assert_close(got, expected.reshape(*batch, *expected.shape[1:]))

    @given(sides, sides, perspectives)
    def test_of_predictions_at_a_higher_resolution(self, height: int, width: int, perspective: str) -> None:
        images = torch.randn(2, height, width)
        tiles = crop()(images)
        larger = {"local": tiles.local, "stride": tiles.stride}
        larger = {name: x.repeat_interleave(2, -2).repeat_interleave(3, -1) for name, x in larger.items()}
        got = dv.DualPerspectiveCrop.inverse(tiles.with_data(**larger), perspective)
        assert got.shape == (2, 2 * height, 3 * width)
        if perspective == "local":
            assert torch.equal(got, images.repeat_interleave(2, -2).repeat_interleave(3, -1))

    @given(sides, sides, st.sampled_from([(1, 1), (2, 3), (4, 2)]))
    def test_keeps_cells_that_see_the_image_and_of_local_tiles_all(
        self, height: int, width: int, patch: tuple[int, int]
    ) -> None:
        tiles = crop()(torch.ones(1, height, width))
        share = {"local": pooled(tiles.local, patch), "stride": pooled(tiles.stride, patch)}
        seen = tiles.with_data(**share)
        for perspective in ("local", "global"):
            assert (dv.DualPerspectiveCrop.inverse(seen, perspective) > 0).all()
        kept = dv.DualPerspectiveCrop.inverse(seen, "local")
        assert (kept > 0).sum() == (share["local"] > 0).sum()

    @given(sides, sides)
    def test_of_the_other_remainders(self, height: int, width: int) -> None:
        """Nothing of their canvas is padding; the size of the image as it was given is remembered."""
        images = torch.rand(2, height, width)
        for remainder in ("crop", "resize"):
            if remainder == "crop" and (height < TILE[0] or width < TILE[1]):
                continue
            tiles = dv.DualPerspectiveCrop(TILE, remainder=remainder)(images)
            predicted = tiles.with_data(local=pooled(tiles.local, (2, 3)))
            got = dv.DualPerspectiveCrop.inverse(predicted)
            assert got.shape == (2, 2 * tiles.grid.rows, 2 * tiles.grid.cols)
            assert tiles.size == (height, width)
            assert tiles.valid.all()
            assert not tiles.image.padded

    def test_of_a_list_and_of_one_perspective(self) -> None:
        images = [torch.rand(3, 7, 13), torch.rand(3, 5, 5)]
        batch = crop()(images)
        features = torch.rand(len(batch.local.data), 2, 2, 8)
        for held in (batch.with_data(local=features), batch.local.with_data(features)):
            got = dv.DualPerspectiveCrop.inverse(held, data_format="channels_last")
            assert [tuple(x.shape) for x in got] == [(4, 5, 8), (3, 2, 8)]
        part = dv.DualPerspectiveCrop.inverse(batch.stride.slice(1, 2), "global")
        assert torch.equal(part[0], images[1])

    def test_features_of_smoothed_tiles_have_one(self) -> None:
        images = torch.rand(3, 7, 13)
        for tiles in (crop(low_pass=True)(images), crop(low_pass=True)([images])):
            with refuses("low-pass filtered", 'perspective="local"'):
                dv.DualPerspectiveCrop.inverse(tiles, "global")
            seen = tiles.with_data(stride=torch.rand(6, 2, 2, 8))
            got = dv.DualPerspectiveCrop.inverse(seen, "global", data_format="channels_last")
            assert (got if isinstance(got, Tensor) else got[0]).shape == (4, 5, 8)


class TestMasks:
    @given(sides, sides, pairs, st.integers(0, 1), st.integers(0, 2))
    @settings(max_examples=examples(40))
    def test_tokens_that_see_a_pixel(
        self, height: int, width: int, tokens: tuple[int, int], below: int, right: int
    ) -> None:
        """Against the mask of the pixels, cut and pooled; also where a tile has pixels beyond whole patches."""
        patch = (2, 3)
        tile = (tokens[0] * patch[0] + min(below, tokens[0] - 1), tokens[1] * patch[1] + min(right, tokens[1] - 1))
        tiles = crop(tile)(torch.zeros(1, height, width))
        local, stride = tiles.key_mask(tokens)
        for mask, perspective in ((local, "local"), (stride, "global")):
            pixels = reference.crop(tiles.valid[None].float(), tuple(tiles.grid), perspective, "channels_first")
            seen = F.max_pool2d(pixels, tuple(t // n for t, n in zip(tile, tokens, strict=True)))
            seen = seen[..., : tokens[0], : tokens[1]]
            assert torch.equal(mask, reference.recombine(seen, tuple(tiles.grid), perspective, "channels_first")[0] > 0)

    def test_refuses_more_tokens_than_pixels(self) -> None:
        with refuses("4 pixels", "5 patches", "key_mask yourself"):
            crop()(torch.zeros(1, 3, 3)).key_mask((5, 2))
        with refuses("10 pixels", "4 patches"):  # five patches of two pixels
            crop((10, 10))(torch.zeros(1, 3, 3)).key_mask((4, 5))


def features_of(tiles: dv.DualPerspectiveTiles, tokens: tuple[int, int] = (2, 3), dim: int = 8) -> tuple[Tensor, ...]:
    local, stride = torch.randn(2, *tiles.local.shape[:-3], *tokens, dim, dtype=torch.float64)
    return local, stride


class TestEnhancement:
    @pytest.mark.parametrize("preset", ["paper", "released"])
    @pytest.mark.parametrize("size", [(7, 13), (8, 18)])
    def test_of_a_result_is_that_of_its_tensors(self, preset: str, size: tuple[int, int]) -> None:
        dem = getattr(dv.DualPerspectiveEnhance, preset)(16, dtype=torch.float64)
        tiles = crop()(torch.zeros(2, 1, *size))
        local, stride = features_of(tiles, dim=16)
        seen = tiles.with_data(local=local, stride=stride)
        plain = dem(local, stride, tiles.grid)
        masked = dem(local, stride, tiles.grid, tiles.key_mask((2, 3)))
        for call in (lambda: dem(seen), lambda: dem(seen, grid=(2, 3)), lambda: dem(seen, backend="torch")):
            assert torch.equal(call(), masked)
        assert torch.equal(masked, plain) == (size == (8, 18))
        one = dem(tiles.with_data(local=local[1], stride=stride[1]))
        torch.testing.assert_close(one, masked[1:])

    def test_of_a_batch_is_that_of_its_images(self) -> None:
        dem = dv.DualPerspectiveEnhance.paper(8, dtype=torch.float64)
        batch = crop()([torch.zeros(1, *size) for size in ((7, 13), (3, 4), (8, 18), (4, 4))])
        local, stride = torch.randn(2, len(batch.local.data), 2, 3, 8, dtype=torch.float64)
        seen = batch.with_data(local=local, stride=stride)
        alone = []
        for place, image in enumerate(batch.images):
            parts = [part.split()[place] for part in (seen.local, seen.stride)]
            mask = dv.DualPerspectiveTiles(*parts, image).key_mask((2, 3))
            alone.append(dem(parts[0][None], parts[1][None], image.grid, mask))
        for out in (dem(seen), dem(seen.local, seen.stride), dem(seen, grid=list(batch.grid))):
            torch.testing.assert_close(out, torch.cat(alone))
        whole = dv.DualPerspectiveEnhance.paper(8, readout="none", dtype=torch.float64)
        with refuses("full maps of different grids (2x3, 1x1)", "one grid per call"):
            whole(seen)

    def test_of_batches_that_know_no_images(self) -> None:
        dem = dv.DualPerspectiveEnhance.paper(8)
        local, stride = torch.randn(2, 8, 2, 3, 8)
        packed = [dv.TileBatch(x, (0, 6, 8), ((2, 3), (1, 2)), p) for x, p in ((local, "local"), (stride, "global"))]
        expected = torch.cat(
            [dem(local[None, a:b], stride[None, a:b], g) for a, b, g in ((0, 6, (2, 3)), (6, 8, (1, 2)))]
        )
        torch.testing.assert_close(dem(*packed), expected)
        assert dv.DualPerspectiveTileBatch(*packed)[3] is dv.DualPerspectiveTileBatch(*packed).size is None

    def test_refuses_exchanged_roles_and_other_grids(self) -> None:
        dem = dv.DualPerspectiveEnhance.paper(8)
        batch = crop()([torch.zeros(1, 7, 13), torch.zeros(1, 3, 4)])
        local, stride = torch.randn(2, 7, 2, 3, 8)
        seen = batch.with_data(local=local, stride=stride)
        for call in (
            lambda: dem(seen.stride, seen.local),
            lambda: dv.DualPerspectiveTileBatch(seen.stride, seen.local),
        ):
            with refuses("'global' perspective were given as the 'local' ones", "exchange"):
                call()
        with refuses("['1x1']", "['2x3']", "the same images"):
            dem(seen.local.slice(1, 2), seen.stride.slice(0, 1))
        other = crop()([torch.zeros(1, 8, 13), torch.zeros(1, 3, 4)])  # the same grids, other padding
        with refuses("the same images"):
            dem(seen.local, other.stride.with_data(stride))
        with refuses("[(3, 2), (1, 1)]", "omit the argument"):
            dem(seen, grid=[(3, 2), (1, 1)])
        one = crop()(torch.zeros(1, 7, 13))
        with refuses("grid=(3, 2)", "2x3", "omit the argument"):
            dem(one.with_data(local=local[:6], stride=stride[:6]), grid=(3, 2))
        with refuses("perspective='global'", "only tiles of ('local',)"):
            dem(one.with_data(local=local[:6]))
        for call in (
            lambda: dem(seen, seen.stride),
            lambda: dem(seen, (2, 3)),
            lambda: dem(seen, key_mask=torch.ones(4, 9, dtype=torch.bool)),
        ):
            with refuses("without stride_tiles and key_mask", "plain tensors"):
                call()
        for call in (lambda: dem(local[None]), lambda: dem(seen.local, stride), lambda: dem(local[None], seen.stride)):
            with refuses("must be a torch.Tensor", error=TypeError):
                call()


class Patches(nn.Module):
    """Tokens of 2 x 3 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, (2, 3), stride=(2, 3))

    def forward(self, tiles: Tensor) -> Tensor:
        return self.conv(tiles).movedim(1, -1).sin()


class TestEncoder:
    def test_takes_the_result_and_knows_its_padding(self) -> None:
        model = dv.DualViewEncoder(Patches(), dv.DualPerspectiveEnhance.paper(8), tile=TILE)
        images = torch.rand(2, 3, 7, 13)
        tiles = crop(pad_value=0.5)(images)
        masks = tiles.valid.expand(2, -1, -1)
        canvas = dv.recombine(tiles, "local")
        assert torch.equal(model(tiles), model(canvas, valid=masks))
        assert not torch.equal(model(tiles), model(canvas))
        assert torch.equal(model(tiles, valid=torch.ones_like(masks)), model(canvas))
        torch.testing.assert_close(model(crop(pad_value=0.5)(images[1])), model(tiles)[1:])
        whole = crop()(torch.rand(2, 3, 8, 18))
        assert torch.equal(model(whole), model(dv.recombine(whole, "local")))

    def test_takes_the_result_of_a_list(self) -> None:
        model = dv.DualViewEncoder(Patches(), dv.DualPerspectiveEnhance.paper(8), tile=TILE)
        images = [torch.rand(3, 7, 13), torch.rand(3, 4, 6), torch.rand(3, 8, 17)]
        batch = crop()(images)
        expected = torch.cat([model(crop()(image)) for image in images])
        for tiles in (batch, batch.local, dv.DualPerspectiveTileBatch.collate([crop()(image) for image in images])):
            torch.testing.assert_close(model(tiles), expected)

    def test_refuses_tiles_of_another_size(self) -> None:
        model = dv.DualViewEncoder(Patches(), dv.DualPerspectiveEnhance.paper(8), tile=TILE)
        for images in (torch.rand(1, 3, 8, 18), [torch.rand(3, 8, 18)]):
            with refuses("['1x3']", "4 x 6", "['2x3']", "the tile of the encoder"):
                model(crop((8, 6))(images))
        with refuses("only tiles of ('global',)"):
            model(crop(perspectives=("global",))(torch.rand(1, 3, 8, 18)))


class TestPerspectives:
    def test_local_tiles_alone(self) -> None:
        images = torch.rand(3, 7, 13)
        both, alone = crop()(images), crop(perspectives=("local",))(images)
        assert torch.equal(alone.local, both.local)
        assert alone.stride is None
        assert torch.equal(alone.valid, both.valid)
        assert torch.equal(crop().inverse(alone), images)
        with refuses("perspective='global'", "only tiles of ('local',)"):
            dv.recombine(alone, "global")
        packed = crop(perspectives=("local",))([images, images])
        assert packed.stride is None
        assert packed.grid == ((2, 3), (2, 3))
        strides = crop(perspectives=["global"])(images)
        assert (strides.local, tuple(strides.grid)) == (None, (2, 3))
        assert torch.equal(strides.stride, both.stride)
        with refuses("cannot pack"):
            dv.DualPerspectiveTileBatch.collate([both, alone])

    @pytest.mark.parametrize("wrong", ["local", (), ("stride",), ("local", "local", "both")])
    def test_refuses_others(self, wrong: object) -> None:
        with refuses(f"perspectives={wrong!r}", '("local",)'):
            crop(perspectives=wrong)


def numbers(tiles: object) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tiles) if isinstance(x, Tensor)]


def tokens_of(tiles: dv.DualPerspectiveTiles) -> dv.DualPerspectiveTiles:
    """Features 2 x 2 x 8 of tiles of one channel or more, of another type and back."""
    local, stride = (x.movedim(-3, -1).repeat_interleave(8, -1)[..., ::2, ::3, :8] for x in tiles[:2])
    return tiles.with_data(local=local, stride=stride).to(torch.float64).to(torch.float32)


class Results(Dataset[dv.DualPerspectiveTiles]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> dv.DualPerspectiveTiles:
        return crop()(torch.full((3, 3 + place, 20 - 3 * place), float(place)))


ONE = crop()(torch.rand(3, 7, 13))
RECORDS = {
    "tiles": ONE,
    "local alone": ONE.with_data(local=torch.rand(6, 2, 2, 5)),
    "batch": crop()([torch.rand(3, 7, 13), torch.rand(3, 3, 4)]),
    "packed tiles": crop()([torch.rand(3, 7, 13), torch.rand(3, 3, 4)]).stride,
}


class TestRecords:
    def test_unpack_in_order(self) -> None:
        local, stride, grid, valid = ONE
        assert (local is ONE.local, stride is ONE.stride, grid) == (True, True, (2, 3))
        assert torch.equal(valid, ONE.valid)
        assert len(ONE[:2]) == 2
        assert ONE[-2] == dv.TileGrid(2, 3)

    @pytest.mark.parametrize("name", RECORDS)
    def test_to(self, name: str) -> None:
        record = RECORDS[name]
        half = record.to(torch.float16)
        assert {x.dtype for x in numbers(half)} == {torch.float16}
        assert {x.device.type for x in numbers(record.to("meta", dtype=torch.float64))} == {"meta"}
        assert {x.dtype for x in numbers(record.to("meta", dtype=torch.float64))} == {torch.float64}
        assert type(half) is type(record)
        for x, y in zip(numbers(record), numbers(half), strict=True):
            assert torch.equal(x.half(), y)

    def test_valid_moves_along(self) -> None:
        assert ONE.to("meta").valid.device.type == "meta"
        assert {mask.device.type for mask in RECORDS["batch"].to("meta").valid} == {"meta"}

    @pytest.mark.parametrize("name", RECORDS)
    def test_pin_memory(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pinned: list[Tensor] = []
        monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x) or x)
        record = RECORDS[name].pin_memory()
        assert type(record) is type(RECORDS[name])
        assert [id(x) for x in pinned] == [id(x) for x in numbers(record)]

    @pytest.mark.parametrize("name", RECORDS)
    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, name: str, copied: Callable[[object], object]) -> None:
        self.check_same(copied(RECORDS[name]), RECORDS[name])

    @pytest.mark.parametrize("name", RECORDS)
    def test_pytree(self, name: str) -> None:
        record = RECORDS[name]
        leaves, spec = pytree.tree_flatten(record)
        assert all(isinstance(leaf, Tensor) for leaf in leaves)
        again = pytree.tree_unflatten(leaves, spec)
        self.check_same(again, record)
        assert pytree.tree_structure(again) == spec
        assert pytree.tree_leaves(pytree.tree_map(lambda x: x.dim(), record)) == [x.dim() for x in leaves]
        keys = [pytree.keystr(key) for key, _ in pytree.tree_flatten_with_path(record)[0]]
        assert (
            keys
            == {
                "tiles": [".local", ".stride"],
                "local alone": [".local"],
                "batch": [".local.data", ".stride.data"],
                "packed tiles": [".data"],
            }[name]
        )

    def check_same(self, one: object, other: object) -> None:
        assert type(one) is type(other)
        assert pytree.tree_structure(one) == pytree.tree_structure(other)
        assert all(torch.equal(x, y) for x, y in zip(numbers(one), numbers(other), strict=True))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_loader_packs_them(self, workers: int) -> None:
        packed = dv.DualPerspectiveTileBatch.collate
        loader = DataLoader(Results(), batch_size=3, num_workers=workers, collate_fn=packed)
        batches = list(loader)
        images = [image for batch in batches for image in crop().inverse(batch, "global")]
        assert [tuple(image.shape) for image in images] == [(3, 3 + k, 20 - 3 * k) for k in range(6)]
        assert [image.unique().tolist() for image in images] == [[float(k)] for k in range(6)]

    def test_collate_refuses(self) -> None:
        with refuses("(2, 6, 3, 4, 6)", "one grid per image"):
            dv.DualPerspectiveTileBatch.collate([crop()(torch.rand(2, 3, 7, 13))])
        with refuses("at least one"):
            dv.DualPerspectiveTileBatch.collate([])

    def test_vmap(self) -> None:
        images, dcm = torch.rand(4, 3, 7, 13), crop()
        out = torch.func.vmap(dcm)(images)
        self.check_same(out, dcm(images))
        back = torch.func.vmap(lambda tiles: dv.recombine(tiles, "global"))(out)
        assert torch.equal(back, dv.recombine(out, "global"))

    def test_compile_takes_and_returns_them(self) -> None:
        dem = dv.DualPerspectiveEnhance.paper(8)

        def enhanced(tiles: dv.DualPerspectiveTiles) -> tuple[Tensor, dv.DualPerspectiveTiles]:
            seen = tokens_of(tiles)
            return dem(seen), seen

        tiles = crop()(torch.rand(2, 1, 7, 13))
        compiled = torch.compile(enhanced, fullgraph=True, backend="eager")
        for got, wanted in zip(compiled(tiles), enhanced(tiles), strict=True):
            torch.testing.assert_close(numbers(got), numbers(wanted))
        cut = torch.compile(crop(), fullgraph=True, backend="aot_eager")
        self.check_same(cut(torch.ones(3, 7, 13)), crop()(torch.ones(3, 7, 13)))

    def test_export_takes_and_returns_them(self) -> None:
        dem = dv.DualPerspectiveEnhance.paper(8)

        class Model(nn.Module):
            def forward(self, tiles: dv.DualPerspectiveTiles) -> tuple[Tensor, dv.DualPerspectiveTiles]:
                return dem(tokens_of(tiles)), tiles.with_data(local=2 * tiles.local)

        def cut(batch: int) -> dv.DualPerspectiveTiles:
            return crop()(torch.rand(batch, 3, 7, 13))

        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(Model(), (cut(2),), dynamic_shapes={"tiles": [{0: batch}, {0: batch}]})
        for tiles in (cut(1), cut(3)):
            tokens, doubled = program.module()(tiles)
            torch.testing.assert_close(tokens, dem(tokens_of(tiles)))
            self.check_same(doubled, tiles.with_data(local=2 * tiles.local))

    def test_print_shapes(self) -> None:
        assert repr(ONE) == (
            "DualPerspectiveTiles(local=<6 x 3 x 4 x 6, float32, cpu>, stride=<6 x 3 x 4 x 6, float32, cpu>, "
            "image=Placement(grid=TileGrid(rows=2, cols=3), tile=(4, 6), size=(7, 13), real=(7, 13)), low_pass=False)"
        )
        assert repr(RECORDS["packed tiles"]) == (
            "TileBatch(data=<7 x 3 x 4 x 6, float32, cpu>, offsets=(0, 6, 7), grids=(TileGrid(rows=2, cols=3), "
            "TileGrid(rows=1, cols=1)), perspective='global')"
        )
        assert "local=None" in repr(ONE.with_data(stride=ONE.stride))
        normalised = dv.normalized_crop(torch.rand(3, 8, 18), (2, 3), mean=[0.5] * 3, std=[0.5] * 3)
        maps = dv.DualPerspectiveEnhance.paper(8, enhance="global").enhanced_maps(*torch.rand(2, 1, 6, 2, 3, 8), (2, 3))
        assert repr(normalised).startswith("NormalizedTiles(local=<6 x 3 x 4 x 6, float32, cpu>, ")
        assert repr(maps) == "EnhancedMaps(v_loc=None, v_glo=<1 x 4 x 9 x 8, float32, cpu>)"

    def test_may_be_subclassed(self) -> None:
        class Named(dv.TileBatch):
            pass

        named = Named(torch.rand(2, 3, 4, 6), (0, 2), ((1, 2),))
        assert type(named.to(torch.float16)) is Named
        assert repr(named).startswith("Named(data=<2 x 3 x 4 x 6")

    def test_refuses_other_counts(self) -> None:
        with refuses("(5, 2, 2, 8)", "2x3", "(..., 6, h, w, D)", ".unflatten(0, (-1, 6))", ".unflatten(-2, (h, w))"):
            ONE.with_data(local=torch.rand(5, 2, 2, 8))
        with refuses("(6, 4, 8)"):
            ONE.with_data(stride=torch.rand(6, 4, 8))
        with refuses("local must be a torch.Tensor, not NoneType", error=TypeError):
            ONE.with_data()
        with refuses("stride must be a torch.Tensor, not list", error=TypeError):
            ONE.with_data(stride=[1])
        with refuses("must be a TileBatch", error=TypeError):
            dv.DualPerspectiveTileBatch(ONE.local, None)
        with refuses("at least one perspective"):
            dv.DualPerspectiveTileBatch(None, None)
        with refuses("images of grids ['2x3']", "['1x1']"):
            dv.TileBatch(torch.rand(1, 3, 4, 6), (0, 1), ((1, 1),), "local", (ONE.image,))
