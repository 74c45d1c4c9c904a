"""Prediction by tiles: the same as on the whole map, at borders too, where the margin is the model's radius."""

from math import ceil

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import dualview as dv
from tests.checks import refuses
from tests.strategies import examples

PADDINGS = ["zeros", "reflect", "replicate"]


def convolutions(kernels: list[tuple[int, int]], padding: str = "zeros") -> tuple[nn.Module, tuple[int, int]]:
    """A network, and its radius along height and width."""
    layers: list[nn.Module] = []
    for i, kernel in enumerate(kernels):
        sides = tuple(k // 2 for k in kernel)
        layers += [nn.Conv2d(2 if i == 0 else 3, 3, kernel, padding=sides, padding_mode=padding), nn.GELU()]
    return nn.Sequential(*layers).double(), tuple(sum(k // 2 for k in side) for side in zip(*kernels, strict=True))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


class TestEqualsTheWholeMap:
    @given(st.data())
    @settings(max_examples=examples(25))
    def test_a_model_within_its_margin(self, data: st.DataObject) -> None:
        torch.manual_seed(0)
        kernels = data.draw(st.lists(st.tuples(*[st.sampled_from([3, 1, 5])] * 2), min_size=1, max_size=3))
        model, radius = convolutions(kernels, data.draw(st.sampled_from(PADDINGS)))
        margin = tuple(r + data.draw(st.integers(0, 2)) for r in radius)
        overlap = tuple(2 * m + data.draw(st.integers(0, 5)) for m in margin)
        tile = tuple(o + data.draw(st.integers(1, 9)) for o in overlap)
        assume(min(tile) > 2)  # reflection needs as much
        size = tuple(t + data.draw(st.integers(0, 25)) for t in tile)
        options = {
            "window": data.draw(st.sampled_from(["linear", "constant", "hann"])),
            "batch_size": data.draw(st.integers(1, 5)),
        }
        batch = data.draw(st.sampled_from([(), (2,), (1, 2)]))
        x = torch.randn(*batch, 2, *size, dtype=torch.float64)
        with torch.no_grad():
            whole = model(x.reshape(-1, *x.shape[-3:])).unflatten(0, batch) if batch else model(x[None])[0]
        out = dv.predict_tiled(model, x, tile=tile, margin=margin, overlap=overlap, **options)
        close(out, whole)
        last = dv.predict_tiled(
            lambda tiles: model(tiles.movedim(-1, 1)).movedim(1, -1),
            x.movedim(-3, -1), tile=tile, margin=margin, overlap=overlap, data_format="channels_last", **options,
        )  # fmt: skip
        close(last, whole.movedim(-3, -1))

    def test_a_smaller_margin_is_seen(self) -> None:
        """What the test above would not see, it would not hold."""
        torch.manual_seed(0)
        model, radius = convolutions([(3, 5), (3, 3)])
        x = torch.randn(2, 40, 50, dtype=torch.float64)
        whole = model(x[None])[0].detach()
        for margin in ((radius[0] - 1, radius[1]), (radius[0], radius[1] - 1)):
            out = dv.predict_tiled(model, x, tile=(16, 18), margin=margin, overlap=6)
            assert (out - whole).abs().max() > 1e-3
        padded = dv.predict_tiled(model, x[:, :38], tile=(16, 18), margin=radius, overlap=6, border="pad")
        assert (padded - model(x[None, :, :38])[0]).abs().max() > 1e-3

    @given(st.data())
    @settings(max_examples=examples(20))
    def test_any_stride(self, data: st.DataObject) -> None:
        """Coarser by 2 to 4, finer by 2 and 3: where tiles start at multiples of the stride."""
        torch.manual_seed(0)
        k = data.draw(st.sampled_from([2, 3, 4]))
        down = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 2 * k - 1, stride=k, padding=k - 1)
        ).double()
        up = nn.Sequential(nn.Conv2d(2, 3 * k * k, 3, padding=1), nn.PixelShuffle(k)).double()
        mixed = nn.Sequential(nn.Conv2d(2, 4, (1, k), stride=(1, k)), nn.Upsample(scale_factor=(2, 1))).double()
        model, radius = data.draw(st.sampled_from([(down, k), (up, 1), (mixed, k - 1)]))
        margin = radius + data.draw(st.integers(0, 2))
        rounded = -(-margin // k) * k
        overlap = 2 * rounded + k * data.draw(st.integers(0, 2))
        tile = tuple(overlap + k * data.draw(st.integers(1, 4)) for _ in "hw")
        size = tuple(t + k * data.draw(st.integers(0, 6)) for t in tile)
        x = torch.randn(2, *size, dtype=torch.float64)
        out = dv.predict_tiled(model, x, tile=tile, margin=margin, overlap=overlap, window="hann", batch_size=3)
        close(out, model(x[None])[0].detach())

    @given(st.data())
    @settings(max_examples=examples(15))
    def test_padding_gives_the_padded_map(self, data: st.DataObject) -> None:
        torch.manual_seed(0)
        k = data.draw(st.sampled_from([1, 2, 3]))
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, k, stride=k)).double()
        margin = data.draw(st.integers(k, k + 2))
        overlap = 2 * (-(-margin // k) * k) + k * data.draw(st.integers(0, 1))
        tile = overlap + k * data.draw(st.integers(1, 3))
        size = tuple(data.draw(st.integers(1, 30)) for _ in "hw")
        x = torch.randn(2, *size, dtype=torch.float64)
        out = dv.predict_tiled(model, x, tile=tile, margin=margin, overlap=overlap, border="pad", batch_size=2)
        step = tile - overlap
        whole = [tile + max(0, ceil((side - tile) / step)) * step for side in size]
        padded = F.pad(x, (0, whole[1] - size[1], 0, whole[0] - size[0]))
        expected = model(padded[None])[0, :, : ceil(size[0] / k), : ceil(size[1] / k)].detach()
        close(out, expected)

    def test_a_model_that_halves_inside(self) -> None:
        """Nothing shows in its result; tile, overlap and map are multiples of what it halves by."""

        class Hourglass(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.into, self.inside, self.out = (nn.Conv2d(c, 4, 3, padding=1) for c in (2, 4, 8))

            def forward(self, x: Tensor) -> Tensor:
                full = self.into(x)
                coarse = self.inside(F.max_pool2d(full, 4))
                return self.out(torch.cat([full, F.interpolate(coarse, scale_factor=4)], dim=1))

        torch.manual_seed(0)
        model, x = Hourglass().double(), torch.randn(2, 96, 64, dtype=torch.float64)
        out = dv.predict_tiled(model, x, tile=(40, 36), margin=12, overlap=24)
        close(out, model(x[None])[0].detach())

    def test_half_precision_and_one_tile(self) -> None:
        x = torch.randn(2, 30, 40)
        out = dv.predict_tiled(lambda tiles: tiles.bfloat16(), x, tile=(8, 9), overlap=4, window="linear")
        assert torch.equal(out, x.bfloat16())
        model, radius = convolutions([(3, 3)])
        whole = dv.predict_tiled(model, x.double(), tile=(30, 40), margin=radius)
        assert torch.equal(whole, model(x.double()[None])[0])

    def test_bytes_are_given_as_they_are(self) -> None:
        photo = torch.randint(256, (60, 50, 3), dtype=torch.uint8)
        out = dv.predict_tiled(lambda tiles: tiles / 255, photo, tile=24, overlap=8, data_format="channels_last")
        assert torch.equal(out, photo / 255)


class TestHowItRuns:
    def test_batches_progress_and_no_gradients(self, capsys: pytest.CaptureFixture[str]) -> None:
        seen = []

        def model(tiles: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            seen.append(tuple(tiles.shape))
            return tiles * weight

        weight = torch.ones(1, requires_grad=True)
        x = torch.rand(2, 3, 20, 30)
        out = dv.predict_tiled(model, x, tile=(10, 12), overlap=2, batch_size=4, progress=True)
        assert not out.requires_grad
        assert torch.equal(out, x)
        assert seen == [(4, 3, 10, 12), (4, 3, 10, 12), (1, 3, 10, 12)] * 2
        assert "18/18" in capsys.readouterr().err

    def test_tiles_are_computed_elsewhere(self) -> None:
        """The result is where the map is."""
        x = torch.rand(3, 20, 30)
        seen = []

        def model(tiles: Tensor) -> Tensor:
            seen.append(tiles.device.type)
            return torch.zeros(tiles.shape)

        out = dv.predict_tiled(model, x, tile=10, device="meta")
        assert set(seen) == {"meta"}
        assert out.device == x.device

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("place", ["cpu", "cuda"])
    def test_on_a_gpu(self, place: str) -> None:
        torch.manual_seed(0)
        model, radius = convolutions([(3, 5), (5, 3)])
        x = torch.randn(2, 100, 150, dtype=torch.float64)
        whole = model(x[None])[0].detach()
        out = dv.predict_tiled(
            model.cuda(),
            x.to(place),
            tile=(40, 50),
            margin=radius,
            overlap=20,
            window="hann",
            device="cuda",
            batch_size=3,
        )
        assert out.device.type == place
        close(out.cpu(), whole)

    def test_memory_beyond_the_result_is_a_few_tiles(self) -> None:
        from benchmarks.measure import peak_bytes

        x = torch.rand(1, 1024, 1024)
        peak = peak_bytes(lambda: dv.predict_tiled(lambda t: t * 2, x, tile=128, margin=8, batch_size=2), "cpu")
        assert peak <= 1.25 * x.nbytes


class TestWrongArguments:
    def test_sizes(self) -> None:
        x = torch.rand(3, 64, 96)
        with refuses("overlap=(7, 7)", "margin=(4, 4)", "at least twice"):
            dv.predict_tiled(nn.Identity(), x, tile=32, margin=4, overlap=7)
        with refuses("overlap=(32, 32)", "smaller than the tile"):
            dv.predict_tiled(nn.Identity(), x, tile=32, margin=16)
        with refuses("size=(64, 96)", "smaller than tile=(128, 32)", "border='pad'"):
            dv.predict_tiled(nn.Identity(), x, tile=(128, 32))
        with refuses("height of 28 out of tiles of 32", "pad"):
            dv.predict_tiled(lambda tiles: tiles[..., 2:-2, 2:-2], x, tile=32)
        with refuses("one cell of 4 positions", "[0, 30, 32]", "multiples of 4"):
            dv.predict_tiled(nn.AvgPool2d(4), x, tile=32, overlap=2)
        with refuses("leaves cells along the height without a tile", "multiple of 8"):
            dv.predict_tiled(nn.AvgPool2d(8), x, tile=32, margin=3, overlap=8)
        for count in (0, 1.0, True):
            with refuses(f"batch_size={count!r}", "positive integer"):
                dv.predict_tiled(nn.Identity(), x, tile=32, batch_size=count)
        with refuses("(0, 3, 64, 96)", "no image"):
            dv.predict_tiled(nn.Identity(), x.new_empty(0, 3, 64, 96), tile=32)

    def test_models(self) -> None:
        x = torch.rand(3, 64, 96)
        with refuses("builtins.dict", "model(tiles).logits", error=TypeError):
            dv.predict_tiled(lambda tiles: {"logits": tiles}, x, tile=32)
        with refuses("torch.int64", "argmax of the whole"):
            dv.predict_tiled(lambda tiles: tiles.argmax(1, keepdim=True), x, tile=32)
        with refuses("(1, 32, 32)", "of 1 tiles"):
            dv.predict_tiled(lambda tiles: tiles[:, 0], x, tile=32)
        with refuses("(3, 3, 32, 32)", "of 2 tiles"):
            dv.predict_tiled(lambda tiles: torch.cat([tiles, tiles[:1]]), x, tile=32, batch_size=2)
        sizes = iter([32, 16, 32])
        with refuses("earlier ones", "(torch.Size([3, 32, 32]), torch.float32)"):
            dv.predict_tiled(lambda tiles: tiles[..., : next(sizes)], x, tile=32)

    def test_a_bar_without_tqdm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
        with refuses('pip install -e ".[large]"', error=ImportError):
            dv.predict_tiled(nn.Identity(), torch.rand(3, 64, 96), tile=32, progress=True)
