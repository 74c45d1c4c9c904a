"""The enhancement module: its equations, the released weights, and every option between them."""

import itertools
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import dualview as dv
from dualview.ops.fusion import FUSIONS
from tests import reference
from tests.checks import assert_compiles_once, assert_exports, refuses
from tests.strategies import examples, laid_out

GOLDEN = Path(__file__).parents[1] / "golden"
PRESETS = {"paper": dv.DualPerspectiveEnhance.paper, "released": dv.DualPerspectiveEnhance.released}
OPTIONS = {"paper": reference.PAPER, "released": reference.RELEASED}
DIM = 16
Pair = tuple[int, int]


def randomised(dem: nn.Module, scale: float = 0.3) -> Any:
    """Every parameter drawn anew, so that no bias, norm, logit or gate is at its neutral start."""
    with torch.no_grad():
        for parameter in dem.parameters():
            parameter.normal_(std=scale)
    return dem


def tiles(batch: int, grid: Pair, tile: Pair, dim: int = DIM) -> tuple[Tensor, Tensor]:
    local, stride = torch.randn(2, batch, grid[0] * grid[1], *tile, dim, dtype=torch.float64)
    return local, stride


def loop(
    dem: nn.Module,
    options: Mapping[str, Any],
    local: Tensor,
    stride: Tensor,
    grid: Pair,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The reference, image by image, with the weights of ``dem``."""
    weights = {name: p.detach() for name, p in dem.named_parameters()}
    out = []
    for k in range(len(local)):
        own = tuple(None if m is None else m if m.dim() == 2 else m[k] for m in masks)
        out.append(reference.enhance(options, weights, local[k], stride[k], grid, own))
    return torch.stack(out)


def configurations() -> st.SearchStrategy[dict[str, Any]]:
    """Any options of the constructor that fit each other, except fusion, enhance and readout."""
    switches = ("share_weights", "bias", "out_proj", "residual", "norm", "gate")
    return st.fixed_dictionaries(
        {name: st.booleans() for name in switches}
        | {
            "num_heads": st.sampled_from([1, 2, 8]),
            "pairing": st.sampled_from(["paper", "released"]),
            "source": st.sampled_from(["dual", "local", "global", "sum"]),
        }
    )


shapes = st.sampled_from(
    [
        ((2, 3), (2, 1)),
        ((3, 2), (1, 2)),
        ((2, 2), (2, 3)),
        ((3, 3), (2, 1)),
        ((1, 4), (3, 2)),
        ((4, 1), (1, 2)),
        ((1, 1), (2, 3)),
    ]
)


class TestAgainstTheEquations:
    @pytest.mark.parametrize(
        "end", [*({"fusion": name} for name in FUSIONS), {"enhance": "global"}, {"enhance": "local"}]
    )
    @pytest.mark.parametrize("readout", ["average", "bilinear", "centre", "none"])
    @given(
        options=configurations(),
        shape=shapes,
        mask_kind=st.sampled_from([None, "batch", "shared", "pair"]),
        seed=st.integers(0, 999),
    )
    @settings(max_examples=examples(4))
    def test_any_configuration(
        self,
        end: dict[str, Any],
        readout: str,
        options: dict[str, Any],
        shape: tuple[Pair, Pair],
        mask_kind: str | None,
        seed: int,
    ) -> None:
        options = options | end | {"readout": readout}
        torch.manual_seed(seed)
        grid, tile = shape
        dem = randomised(dv.DualPerspectiveEnhance(DIM, dtype=torch.float64, **options))
        local, stride = tiles(2, grid, tile)
        first, second = torch.rand(2, 2, grid[0] * tile[0], grid[1] * tile[1]) < 0.6
        key_mask, masks = {
            None: (None, (None, None)),
            "batch": (first, (first, first)),
            "shared": (first[0], (first[0], first[0])),
            "pair": ((first, second[1]), (first, second[1])),
        }[mask_kind]
        out = dem(local, stride, grid, key_mask)
        size = tile if options["readout"] != "none" else (grid[0] * tile[0], grid[1] * tile[1])
        assert out.shape == (2, *size, DIM)
        expected = loop(dem, reference.PAPER | options, local, stride, grid, masks)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("grid", [(2, 3), (3, 2), (3, 3), (1, 4)])
    def test_presets(self, preset: str, grid: Pair) -> None:
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        local, stride = tiles(2, grid, (3, 4))
        expected = loop(dem, OPTIONS[preset], local, stride, grid)
        torch.testing.assert_close(dem(local, stride, grid), expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(dem(local, stride, dv.TileGrid(*grid)), dem(local, stride, grid))

    @pytest.mark.parametrize("pairing", ["paper", "released"])
    @pytest.mark.parametrize("enhance", ["both", "global", "local"])
    def test_maps(self, pairing: str, enhance: str) -> None:
        options = {"pairing": pairing, "enhance": enhance}
        dem = randomised(dv.DualPerspectiveEnhance(DIM, dtype=torch.float64, **options))
        local, stride = tiles(1, (2, 3), (2, 4))
        maps = dem.enhanced_maps(local, stride, (2, 3))
        weights = dict(dem.named_parameters())
        v_loc, v_glo = reference.enhanced_maps(reference.PAPER | options, weights, local[0], stride[0], (2, 3))
        for ours, theirs, other in ((maps.v_loc, v_loc, "global"), (maps.v_glo, v_glo, "local")):
            assert (ours is None) == (enhance == other)
            if ours is not None:
                torch.testing.assert_close(ours[0], theirs, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("pairing, other", [("paper", "released"), ("released", "paper")])
    @given(shape=shapes, seed=st.integers(0, 99))
    @settings(max_examples=10)
    def test_one_pairing_is_the_other_with_the_maps_exchanged(
        self, pairing: str, other: str, shape: tuple[Pair, Pair], seed: int
    ) -> None:
        """With shared weights, V_glo of one pairing on (F_loc, F_glo) is V_loc of the other on (F_glo, F_loc)."""
        torch.manual_seed(seed)
        grid, tile = shape
        local, stride = tiles(2, grid, tile)
        f_loc = dv.recombine(local, grid, "local", data_format="channels_last")
        f_glo = dv.recombine(stride, grid, "global", data_format="channels_last")
        one = randomised(PRESETS["released"](DIM, pairing=pairing, dtype=torch.float64))
        two = PRESETS["released"](DIM, pairing=other, dtype=torch.float64)
        two.load_state_dict(one.state_dict())
        plain = one.enhanced_maps(local, stride, grid)
        exchanged = two.enhanced_maps(
            dv.local_crop(f_glo, grid, data_format="channels_last"),
            dv.global_stride_crop(f_loc, grid, data_format="channels_last"),
            grid,
        )
        assert torch.equal(plain.v_glo, exchanged.v_loc)
        assert torch.equal(plain.v_loc, exchanged.v_glo)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_gradcheck(self, preset: str) -> None:
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        local, stride = (x.requires_grad_() for x in tiles(1, (1, 2), (2, 1)))
        assert torch.autograd.gradcheck(lambda a, b: dem(a, b, (1, 2)), (local, stride))
        names, values = zip(*dem.named_parameters(), strict=True)

        def with_weights(*weights: Tensor) -> Tensor:
            given = dict(zip(names, weights, strict=True))
            return torch.func.functional_call(dem, given, (local.detach(), stride.detach(), (1, 2)))

        assert torch.autograd.gradcheck(with_weights, values, fast_mode=True)

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
    def test_memory_layouts(self, preset: str, layout: str) -> None:
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        local, stride = (laid_out(x, layout) for x in tiles(2, (2, 3), (2, 4)))
        assert not local.is_contiguous()
        out = dem(local, stride, (2, 3))
        torch.testing.assert_close(out, dem(local.contiguous(), stride.contiguous(), (2, 3)), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_images_of_a_batch_do_not_mix(self, preset: str) -> None:
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        local, stride = tiles(3, (2, 3), (2, 2))
        out = dem(local, stride, (2, 3))
        for k in range(3):
            torch.testing.assert_close(dem(local[k : k + 1], stride[k : k + 1], (2, 3)), out[k : k + 1])
        assert dem(local[:0], stride[:0], (2, 3)).shape == (0, 2, 2, DIM)
        assert dem(local[:0], stride[:0], (2, 3), torch.ones(4, 6, dtype=torch.bool)).shape == (0, 2, 2, DIM)


class TestGolden:
    """Outputs of the released code in float64."""

    @pytest.mark.parametrize("n", [2, 3])
    def test_reproduces_the_released_module(self, n: int) -> None:
        golden = {name: t.double() for name, t in load_file(GOLDEN / f"released_dem_n{n}.safetensors").items()}
        dem = dv.DualPerspectiveEnhance.released(32, dtype=torch.float64)
        weights = {name.removeprefix("weights."): t for name, t in golden.items() if name.startswith("weights.")}
        assert weights.keys() == dem.released_state_dict().keys()
        dem.load_released(weights)
        local, stride = (golden[name].unflatten(2, (24, 24)) for name in ("local_tiles", "global_tiles"))
        out = dem(local, stride, (n, n)).flatten(1, 2)
        assert (out - golden["output"]).abs().max() < 2e-6
        # at n = 2 every tile lives, so any other order of tiles or of their tokens would show
        for order in itertools.permutations(range(n * n)) if n == 2 else ():
            for wrong in (dem(local, stride[:, order], (n, n)), dem(local[:, order], stride, (n, n))):
                off = (wrong.flatten(1, 2) - golden["output"]).abs().max()
                assert (off < 2e-6) == (list(order) == sorted(order))


class TestPresets:
    def test_released_parameters(self) -> None:
        dem = dv.DualPerspectiveEnhance.released(device="meta")
        parameters = list(dem.parameters())
        assert dem.dim == 1024
        assert len(parameters) == 20
        assert sum(p.numel() for p in parameters) == 4_400_256
        assert {name.removesuffix(".weight").removesuffix(".bias") for name in dem.released_state_dict()} == {
            *(f"attention.linears.{k}" for k in range(4)),
            "attention.ln",
            "ffn_crop.0",
            "ffn_crop.2",
            "ffn_stride.0",
            "ffn_stride.2",
            "ln_fuse",
        }

    @pytest.mark.parametrize("dim", [4, 16, 30])
    def test_paper_weights(self, dim: int) -> None:
        dem = dv.DualPerspectiveEnhance.paper(dim)
        assert sum(p.numel() for p in dem.parameters()) == 4 * dim * dim
        assert all(name.endswith("weight") for name, _ in dem.named_parameters())

    @pytest.mark.parametrize("preset", PRESETS)
    def test_overrides(self, preset: str) -> None:
        dem = PRESETS[preset](DIM, readout="none", num_heads=2, fusion="addition", share_weights=False, gate=True)
        assert dem.readout == "none"
        assert [a.num_heads for a in dem.attentions] == [2, 2]
        assert isinstance(dem.fusion, dv.AdditionFusion)
        assert dem.gate is not None
        assert dem.pairing == preset

    def test_defaults_are_the_papers(self) -> None:
        plain = ("bias", "out_proj", "norm", "gate")
        stated = reference.PAPER | dict.fromkeys(plain, False) | {"init": "xavier"}
        expected = repr(dv.DualPerspectiveEnhance(DIM, **stated))
        assert repr(dv.DualPerspectiveEnhance(DIM)) == repr(dv.DualPerspectiveEnhance.paper(DIM)) == expected

    @pytest.mark.parametrize("enhance", ["global", "local"])
    def test_released_with_one_direction(self, enhance: str) -> None:
        """Table 4: the one map goes through one linear layer."""
        dem = dv.DualPerspectiveEnhance.released(DIM, enhance=enhance)
        assert isinstance(dem.fusion, nn.Linear)
        assert (dem.fusion.in_features, dem.fusion.out_features, dem.fusion.bias) == (DIM, DIM, None)
        assert len(dem.attentions) == 1
        assert len(dv.DualPerspectiveEnhance.paper(DIM, enhance=enhance, share_weights=False).attentions) == 1

    def test_separate_weights_start_apart(self) -> None:
        dem = dv.DualPerspectiveEnhance.paper(DIM, share_weights=False)
        first, second = dem.attentions
        assert not torch.equal(first.q_proj.weight, second.q_proj.weight)
        assert len(dv.DualPerspectiveEnhance.paper(DIM).attentions) == 1

    def test_identical_start(self) -> None:
        attention = dv.DualPerspectiveEnhance.released(DIM, init="identical").attentions[0]
        assert torch.equal(attention.q_proj.weight, attention.out_proj.weight)
        attention = dv.DualPerspectiveEnhance.released(DIM).attentions[0]
        assert not torch.equal(attention.q_proj.weight, attention.k_proj.weight)

    def test_own_fusion_module(self) -> None:
        class First(nn.Module):
            def forward(self, v_loc: Tensor, v_glo: Tensor) -> Tensor:
                return v_loc

        dem = dv.DualPerspectiveEnhance.paper(DIM, fusion=First(), readout="none", dtype=torch.float64)
        local, stride = tiles(1, (2, 3), (2, 2))
        v_loc = dem.enhanced_maps(local, stride, (2, 3)).v_loc
        torch.testing.assert_close(dem(local, stride, (2, 3)), v_loc, rtol=1e-12, atol=1e-12)


class TestWhatLives:
    """Which tiles the output depends on."""

    def test_released_at_n_3_reads_one_stride_tile(self) -> None:
        dem = randomised(dv.DualPerspectiveEnhance.released(DIM, dtype=torch.float64))
        local, stride = tiles(1, (3, 3), (3, 2))
        out = dem(local, stride, (3, 3))
        dead = torch.tensor([8, 0, 1, 2, 4, 3, 5, 6, 7])  # the centre stays
        assert torch.equal(dem(local, stride[:, dead], (3, 3)), out)
        for other in (0, 1, 2, 3, 5, 6, 7, 8):
            moved = torch.arange(9)
            moved[4], moved[other] = other, 4
            assert not torch.allclose(dem(local, stride[:, moved], (3, 3)), out)

    @pytest.mark.parametrize(
        "preset, grid", [("released", (2, 2)), ("released", (2, 3)), ("paper", (2, 3)), ("paper", (3, 3))]
    )
    def test_swapping_live_tiles_changes_the_output(self, preset: str, grid: Pair) -> None:
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        local, stride = tiles(1, grid, (3, 4))  # at least as large as the grid, so that each block has a live cell
        out = dem(local, stride, grid)
        count = grid[0] * grid[1]
        live = {("released", (2, 3)): {1, 4}}.get((preset, grid), set(range(count)))  # the middle column
        for a, b in itertools.combinations(range(count), 2):
            order = torch.arange(count)
            order[a], order[b] = b, a
            assert not torch.allclose(dem(local[:, order], stride, grid), out)
            assert torch.equal(dem(local, stride[:, order], grid), out) == ({a, b}.isdisjoint(live))

    @pytest.mark.parametrize(
        "n, live",
        [(2, {(0, 0), (0, 1), (1, 0), (1, 1)}), (3, {(1, 1)}), (4, {(1, 1), (1, 2), (2, 1), (2, 2)}), (5, {(2, 2)})],
    )
    def test_gradients_of_the_released_preset(self, n: int, live: set[Pair]) -> None:
        dem = randomised(dv.DualPerspectiveEnhance.released(DIM, dtype=torch.float64))
        local, stride = (x.requires_grad_() for x in tiles(1, (n, n), (n, n + 1)))
        out = dem(local, stride, (n, n))
        (out * torch.randn_like(out)).sum().backward()
        moved = stride.grad[0].abs().flatten(1).sum(1) > 0
        assert {divmod(int(i), n) for i in moved.nonzero()} == live
        assert (local.grad[0].abs().flatten(1).sum(1) > 0).all()

    def test_a_convolution_revives_all(self) -> None:
        dem = randomised(dv.DualPerspectiveEnhance.released(DIM, fusion="conv3x3", dtype=torch.float64))
        local, stride = (x.requires_grad_() for x in tiles(1, (3, 3), (2, 3)))
        dem(local, stride, (3, 3)).sum().backward()
        assert (stride.grad[0].abs().flatten(1).sum(1) > 0).all()

    @pytest.mark.parametrize("source", ["local", "global"])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_one_source_in_both_roles_ignores_the_other(self, preset: str, source: str) -> None:
        dem = randomised(PRESETS[preset](DIM, source=source, dtype=torch.float64))
        local, stride = tiles(1, (2, 3), (2, 2))
        noise = torch.randn_like(local)
        out = dem(local, stride, (2, 3))
        with_other_local, with_other_stride = dem(noise, stride, (2, 3)), dem(local, noise, (2, 3))
        assert torch.equal(with_other_local, out) == (source == "global")
        assert torch.equal(with_other_stride, out) == (source == "local")


class TestKeyMask:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_masked_cells_are_not_read_as_keys(self, preset: str) -> None:
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        grid, tile = (2, 3), (2, 2)
        local, stride = tiles(1, grid, tile)
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[3:], mask[:, 4:] = False, False  # padded at the bottom and the right
        before = dem.enhanced_maps(local, stride, grid, mask)
        full = dv.recombine(local, grid, "local", data_format="channels_last")
        full[:, ~mask] = 1e4
        after = dem.enhanced_maps(dv.local_crop(full, grid, data_format="channels_last"), stride, grid, mask)
        assert torch.equal(after.v_glo, before.v_glo)  # the local map as keys
        assert torch.equal(after.v_loc[:, mask], before.v_loc[:, mask])  # as queries, token by token
        assert not torch.equal(dem.enhanced_maps(local, stride, grid).v_glo, before.v_glo)

    @pytest.mark.parametrize("source", ["local", "global", "sum"])
    def test_masks_belong_to_maps_not_to_roles(self, source: str) -> None:
        """With one map in both roles its own mask holds in both directions, and the other's in none."""
        dem = randomised(dv.DualPerspectiveEnhance.paper(DIM, source=source, dtype=torch.float64))
        local, stride = tiles(1, (2, 3), (2, 2))
        masked, free = torch.zeros(4, 6, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool)
        plain = dem.enhanced_maps(local, stride, (2, 3))
        for pair, own in (((masked, free), "local"), ((free, masked), "global")):
            for got, unmasked in zip(dem.enhanced_maps(local, stride, (2, 3), pair), plain, strict=True):
                if source == own:
                    assert (got == 0).all()
                else:
                    torch.testing.assert_close(got, unmasked)

    def test_a_pair_of_masks_is_local_keys_then_global_keys(self) -> None:
        dem = randomised(dv.DualPerspectiveEnhance.paper(DIM, dtype=torch.float64))
        local, stride = tiles(1, (2, 3), (2, 2))
        free, masked = torch.ones(4, 6, dtype=torch.bool), torch.rand(4, 6) < 0.5
        plain = dem.enhanced_maps(local, stride, (2, 3))
        first = dem.enhanced_maps(local, stride, (2, 3), (masked, free))
        second = dem.enhanced_maps(local, stride, (2, 3), (free, masked))
        torch.testing.assert_close(first.v_loc, plain.v_loc)
        assert not torch.allclose(first.v_glo, plain.v_glo)
        torch.testing.assert_close(second.v_glo, plain.v_glo)
        assert not torch.allclose(second.v_loc, plain.v_loc)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_fully_masked_rows(self, preset: str) -> None:
        """Zeros from the attention, and no NaN, forward and backward."""
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        grid = (2, 3)
        local, stride = (x.requires_grad_() for x in tiles(2, grid, (2, 2)))
        mask = torch.ones(2, 4, 6, dtype=torch.bool)
        mask[0, :2, :2] = False  # one local block of one image
        mask[1] = False  # one image altogether
        maps = dem.enhanced_maps(local, stride, grid, mask)
        if preset == "paper":
            assert (maps.v_loc[0, :2, :2] == 0).all()  # blocks: that block has no key
            assert (maps.v_loc[0, 2:] != 0).all()
            assert (maps.v_loc[1] == 0).all()
            assert (maps.v_glo[1] == 0).all()
            assert (maps.v_glo[0] != 0).all()  # strides: every tile still has keys
        out = dem(local, stride, grid, mask)
        (out * torch.randn_like(out)).sum().backward()
        for x in (out, local.grad, stride.grad, *(p.grad for p in dem.parameters())):
            assert x.isfinite().all()

    def test_all_true_is_no_mask(self) -> None:
        dem = randomised(dv.DualPerspectiveEnhance.released(DIM, dtype=torch.float64))
        local, stride = tiles(2, (2, 3), (2, 2))
        mask = torch.ones(2, 4, 6, dtype=torch.bool)
        torch.testing.assert_close(dem(local, stride, (2, 3), mask), dem(local, stride, (2, 3)))

    @pytest.mark.parametrize(
        "mask",
        [
            torch.ones(4, 6),
            torch.ones(6, 4) > 0,
            torch.ones(2, 4, 6) > 0,
            torch.ones(6, 2, 2) > 0,
            torch.ones(1, 4, 6).long(),
        ],
    )
    def test_refuses(self, mask: Tensor) -> None:
        local, stride = tiles(1, (2, 3), (2, 2))
        dem = dv.DualPerspectiveEnhance.paper(DIM, dtype=torch.float64)
        with refuses(str(tuple(mask.shape)), str(mask.dtype), "boolean", "True for real tokens", "(1, 4, 6) or (4, 6)"):
            dem(local, stride, (2, 3), mask)


def test_the_error_for_wrong_tiles_is_the_same_whatever_is_computed() -> None:
    local, stride = tiles(1, (2, 3), (2, 2))
    dem = dv.DualPerspectiveEnhance.paper(DIM, dtype=torch.float64)
    given = f"got local_tiles {tuple(local[:, 1:].shape)} and stride_tiles {tuple(stride.shape)}"
    for switch in (nullcontext(), dv.full_computation()):
        with switch, refuses(given, "grid of 2x3"):
            dem(local[:, 1:], stride, (2, 3))


class TestGate:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_identity_at_step_0_and_learning_after(self, preset: str) -> None:
        dem = PRESETS[preset](DIM, gate=True, dtype=torch.float64)
        local, stride = tiles(2, (2, 3), (2, 2))
        host, weight = torch.randn(2, 2, 2, 2, DIM, dtype=torch.float64)
        optimizer = torch.optim.SGD(dem.parameters(), lr=1.0)

        def step() -> Tensor:
            optimizer.zero_grad()
            out = dem(local, stride, (2, 3))
            ((host + out) * weight).sum().backward()
            optimizer.step()
            return out

        assert (step() == 0).all()
        for name, parameter in dem.named_parameters():
            assert (parameter.grad != 0).any() == (name == "gate"), name
        assert (dem.gate.grad != 0).all()
        assert (step() != 0).all()
        for name, parameter in dem.named_parameters():
            # the bias of the keys adds a constant to each row of scores and drops out of the softmax
            assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 1e-9, name

    def test_scales_channels(self) -> None:
        dem = dv.DualPerspectiveEnhance.paper(DIM, gate=True, dtype=torch.float64)
        plain = dv.DualPerspectiveEnhance.paper(DIM, dtype=torch.float64)
        plain.load_state_dict({name: t for name, t in dem.state_dict().items() if name != "gate"})
        local, stride = tiles(1, (2, 3), (2, 2))
        with torch.no_grad():
            dem.gate.copy_(torch.arange(DIM))
        torch.testing.assert_close(dem(local, stride, (2, 3)), plain(local, stride, (2, 3)) * torch.arange(DIM))
        dem.reset_parameters()
        assert (dem.gate == 0).all()

    @pytest.mark.parametrize("gate", [True, False])
    def test_leads_away_from_a_base(self, gate: bool) -> None:
        dem = dv.DualPerspectiveEnhance.released(16, gate=gate, dtype=torch.float64)
        local, stride = (t[..., :16] for t in tiles(2, (2, 3), (2, 2), dim=16))
        base = torch.randn(2, 2, 2, 16, dtype=torch.float64)
        if gate:
            nn.init.ones_(dem.gate)
        enhanced = dem(local, stride, (2, 3))
        if gate:
            nn.init.constant_(dem.gate, 0.3)
        scale = 0.3 if gate else 1.0
        torch.testing.assert_close(dem(local, stride, (2, 3), None, base), scale * (enhanced - base))
        with pytest.raises(ValueError, match="base of shape"):
            dem(local, stride, (2, 3), None, base[:1])


class TestLoadReleased:
    def weights(self, dim: int = DIM) -> dict[str, Tensor]:
        source = randomised(dv.DualPerspectiveEnhance.released(dim))
        return {name: t.detach().clone() for name, t in source.released_state_dict().items()}

    def unchanged(self, dem: nn.Module, call: Any, *message: str) -> None:
        kept = {name: t.clone() for name, t in dem.state_dict().items()}
        with refuses("nothing was loaded", *message):
            call()
        assert all(torch.equal(t, kept[name]) for name, t in dem.state_dict().items())

    @pytest.mark.parametrize("prefix", ["model.spatial_embed.", "spatial_embed.", ""])
    @pytest.mark.parametrize("whole", [False, True])
    def test_names(self, prefix: str, whole: bool) -> None:
        weights = self.weights()
        given = {f"{prefix}{name}": t for name, t in weights.items()}
        if whole and prefix:  # the rest of a checkpoint is passed over
            given |= {"model.layers.0.mlp.up_proj.weight": torch.zeros(2), "lm_head.weight": torch.zeros(3)}
            given |= {"model.mm_projector.0.weight": torch.zeros(4, 4)}
        dem = dv.DualPerspectiveEnhance.released(DIM)
        assert dem.load_released(given) == dv.LoadReport((), ())
        assert all(torch.equal(t, weights[name]) for name, t in dem.released_state_dict().items())

    def test_every_tensor_goes_to_its_place(self) -> None:
        weights = self.weights()
        dem = dv.DualPerspectiveEnhance.released(DIM)
        dem.load_released(weights)
        attention, fusion = dem.attentions[0], dem.fusion
        for k, layer in enumerate((attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)):
            assert torch.equal(layer.weight, weights[f"attention.linears.{k}.weight"])
            assert torch.equal(layer.bias, weights[f"attention.linears.{k}.bias"])
        assert torch.equal(attention.norm.weight, weights["attention.ln.weight"])
        assert torch.equal(fusion.local_bottleneck[0].weight, weights["ffn_crop.0.weight"])  # on V_loc
        assert torch.equal(fusion.local_bottleneck[2].bias, weights["ffn_crop.2.bias"])
        assert torch.equal(fusion.global_bottleneck[0].bias, weights["ffn_stride.0.bias"])  # on V_glo
        assert torch.equal(fusion.global_bottleneck[2].weight, weights["ffn_stride.2.weight"])
        assert torch.equal(fusion.norm.bias, weights["ln_fuse.bias"])

    def test_casts_and_copies(self) -> None:
        weights = {name: t.half() for name, t in self.weights().items()}
        dem = dv.DualPerspectiveEnhance.released(DIM, dtype=torch.float64)
        dem.load_released(weights)
        q = dem.attentions[0].q_proj.weight
        assert q.dtype == torch.float64
        assert torch.equal(q, weights["attention.linears.0.weight"].double())
        same = self.weights()
        dem = dv.DualPerspectiveEnhance.released(DIM)
        dem.load_released(same)
        same["attention.linears.0.weight"].zero_()
        assert (dem.attentions[0].q_proj.weight != 0).any()

    def test_missing(self) -> None:
        weights = self.weights()
        del weights["ln_fuse.bias"], weights["ffn_crop.0.weight"]
        dem = dv.DualPerspectiveEnhance.released(DIM)
        names = "['ffn_crop.0.weight', 'ln_fuse.bias']"
        self.unchanged(dem, lambda: dem.load_released(weights), f"Missing: {names}", "Unexpected: []", "strict=False")
        kept = dem.fusion.norm.bias.clone()
        report = dem.load_released(weights, strict=False)
        assert report == dv.LoadReport(("ffn_crop.0.weight", "ln_fuse.bias"), ())
        assert torch.equal(dem.fusion.norm.bias, kept)
        assert torch.equal(dem.fusion.norm.weight, weights["ln_fuse.weight"])

    def test_unexpected(self) -> None:
        weights = {f"model.spatial_embed.{name}": t for name, t in self.weights().items()}
        weights["model.spatial_embed.attention.linears.4.weight"] = torch.zeros(1)
        dem = dv.DualPerspectiveEnhance.released(DIM)
        self.unchanged(
            dem, lambda: dem.load_released(weights), "Missing: []", "Unexpected: ['attention.linears.4.weight']"
        )
        report = dem.load_released(weights, strict=False)
        assert report == dv.LoadReport((), ("attention.linears.4.weight",))

    @pytest.mark.parametrize("strict", [True, False])
    def test_wrong_shape(self, strict: bool) -> None:
        dem = dv.DualPerspectiveEnhance.released(DIM)
        self.unchanged(
            dem,
            lambda: dem.load_released(self.weights(32), strict=strict),
            "attention.linears.0.weight: (32, 32) in the checkpoint, (16, 16) here",
            "the checkpoint's dim (1024 on the hub)",
        )

    def test_a_checkpoint_of_something_else(self) -> None:
        dem = dv.DualPerspectiveEnhance.released(DIM)
        other = {"model.layers.0.weight": torch.zeros(2)}
        self.unchanged(dem, lambda: dem.load_released(other), "Unexpected: ['model.layers.0.weight']", "ln_fuse.bias")
        self.unchanged(dem, lambda: dem.load_released({}), "Missing: ['attention.linears.0.bias'")

    @pytest.mark.parametrize("options", [{"share_weights": False}, {"fusion": "linear_concat"}])
    def test_a_module_of_another_kind(self, options: dict[str, Any]) -> None:
        dem = dv.DualPerspectiveEnhance.released(DIM, **options)
        with refuses("has no name in a released checkpoint", "DualPerspectiveEnhance.released(dim)"):
            dem.load_released(self.weights())

    def test_a_gate_is_not_part_of_a_checkpoint(self) -> None:
        dem = dv.DualPerspectiveEnhance.released(DIM, gate=True)
        assert dem.load_released(self.weights()) == dv.LoadReport((), ())
        assert (dem.gate == 0).all()

    def test_a_module_without_memory(self) -> None:
        dem = dv.DualPerspectiveEnhance.released(DIM, device="meta")
        with refuses("meta device", "to_empty"):
            dem.load_released(self.weights())

    def test_round_trip(self) -> None:
        one, two = (randomised(dv.DualPerspectiveEnhance.released(DIM, dtype=torch.float64)) for _ in range(2))
        local, stride = tiles(1, (2, 3), (2, 2))
        assert not torch.equal(one(local, stride, (2, 3)), two(local, stride, (2, 3)))
        two.load_released(one.released_state_dict())
        assert torch.equal(one(local, stride, (2, 3)), two(local, stride, (2, 3)))


class TestPrecision:
    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("masked", [False, True])
    def test_half_precision_is_at_most_twice_as_wrong_as_plain_torch(
        self, preset: str, dtype: torch.dtype, masked: bool
    ) -> None:
        grid = (2, 3)
        torch.manual_seed(1)
        low = PRESETS[preset](32, dtype=dtype)
        exact = PRESETS[preset](32, dtype=torch.float64)
        exact.load_state_dict(low.state_dict())  # the same, rounded weights
        local, stride = (x.to(dtype) for x in tiles(2, grid, (4, 5), 32))
        mask = torch.rand(8, 15) < 0.7 if masked else None
        want = exact(local.double(), stride.double(), grid, mask).detach()
        plain = loop(low, OPTIONS[preset], local, stride, grid, (mask, mask))
        with torch.no_grad():
            ours = low(local, stride, grid, mask)
        assert ours.dtype == plain.dtype == dtype
        for norm in (lambda error: error.square().mean().sqrt(), lambda error: error.max()):
            ours_error, plain_error = (float(norm((x.double() - want).abs())) for x in (ours, plain))
            assert 0 < ours_error <= 2 * plain_error


class TestTransforms:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_compile_and_export(self, preset: str) -> None:
        dem = randomised(PRESETS[preset](DIM))

        class OnAGrid(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dem = dem

            def forward(self, local_tiles: Tensor, stride_tiles: Tensor) -> Tensor:
                return self.dem(local_tiles, stride_tiles, (2, 3))

        def inputs(batch: int) -> tuple[Tensor, Tensor]:
            return tuple(x.float() for x in tiles(batch, (2, 3), (2, 2)))

        assert_compiles_once(OnAGrid(), inputs)
        assert_exports(OnAGrid(), inputs)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_compile_with_a_mask(self, preset: str) -> None:
        dem = randomised(PRESETS[preset](DIM, gate=True))

        def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
            local, stride = (x.float() for x in tiles(batch, (2, 3), (2, 2)))
            return local, stride, torch.rand(batch, 4, 6) < 0.5

        assert_compiles_once(lambda local, stride, mask: dem(local, stride, (2, 3), mask), inputs)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over its attention under vmap
    @pytest.mark.parametrize("preset", PRESETS)
    def test_vmap(self, preset: str) -> None:
        dem = randomised(PRESETS[preset](DIM, dtype=torch.float64))
        local, stride = tiles(6, (2, 3), (2, 2))
        out = torch.func.vmap(lambda a, b: dem(a, b, (2, 3)))(local.unflatten(0, (3, 2)), stride.unflatten(0, (3, 2)))
        torch.testing.assert_close(out.flatten(0, 1), dem(local, stride, (2, 3)))


class TestDirectReadout:
    """Table 6, first reading: no enhancement at all."""

    @given(
        shapes,
        st.sampled_from(["local", "global", "sum"]),
        st.sampled_from(["average", "bilinear", "centre", "none"]),
        st.integers(0, 99),
    )
    @settings(max_examples=examples(15))
    def test_equals_the_loops(self, shape: tuple[Pair, Pair], source: str, readout: str, seed: int) -> None:
        torch.manual_seed(seed)
        grid, tile = shape
        local, stride = tiles(2, grid, tile)
        module = dv.DirectReadout(source, readout)
        assert not list(module.parameters())
        out = module(local, stride, grid)
        for k in range(2):
            full = {
                "local": reference.join(local[k], grid, "local"),
                "global": reference.join(stride[k], grid, "global"),
            }
            full["sum"] = full["local"] + full["global"]
            torch.testing.assert_close(out[k], reference.read_out(full[source], grid, readout))

    def test_stands_in_for_a_dem(self) -> None:
        local, stride = tiles(2, (2, 3), (4, 5))
        direct, dem = dv.DirectReadout(), dv.DualPerspectiveEnhance.paper(DIM, dtype=torch.float64)
        assert (direct.source, direct.readout) == ("sum", "average")
        mask = torch.ones(8, 15, dtype=torch.bool)
        assert direct(local, stride, (2, 3), mask).shape == dem(local, stride, (2, 3), mask).shape
        assert torch.equal(direct(local, stride, (2, 3), key_mask=mask), direct(local, stride, (2, 3)))
        assert_compiles_once(lambda a, b: direct(a, b, (2, 3)), lambda batch: tiles(batch, (2, 3), (2, 2)))

    def test_refuses(self) -> None:
        with refuses("source='dual'", '"local", "global" or "sum"'):
            dv.DirectReadout("dual")
        with refuses("readout='mean'"):
            dv.DirectReadout(readout="mean")
        with refuses("(1, 5, 2, 2, 4)", "(B, 6, h, w, D)", "2x3"):
            dv.DirectReadout()(torch.zeros(1, 5, 2, 2, 4), torch.zeros(1, 5, 2, 2, 4), (2, 3))


class TestRefusals:
    @pytest.mark.parametrize(
        "option, value, choices",
        [
            ("pairing", "other", ("paper", "released")),
            ("enhance", "none", ("both", "global", "local")),
            ("source", "stride", ("dual", "local", "global", "sum")),
            ("readout", "max", ("average", "bilinear", "centre", "none")),
            ("fusion", "concat", tuple(FUSIONS)),
            ("init", "zeros", ("xavier", "identical")),
        ],
    )
    def test_choices(self, option: str, value: str, choices: tuple[str, ...]) -> None:
        with refuses(f"{option}={value!r}", "must be", *choices):
            dv.DualPerspectiveEnhance(DIM, **{option: value})

    def test_widths(self) -> None:
        with refuses("num_heads=3", "positive divisor of the width 16"):
            dv.DualPerspectiveEnhance(DIM, num_heads=3)
        with refuses("dim=24", "positive multiple of 16"):
            dv.DualPerspectiveEnhance.released(24)
        with refuses("dim=5", "positive multiple of 2"):
            dv.DualPerspectiveEnhance.paper(5)

    @pytest.mark.parametrize("enhance", ["global", "local"])
    def test_a_fusion_of_one_map(self, enhance: str) -> None:
        for make in PRESETS.values():
            with refuses("fusion='addition'", f"enhance={enhance!r}", "Omit fusion", 'enhance="both"'):
                make(DIM, enhance=enhance, fusion="addition")

    @pytest.mark.parametrize(
        "local, stride",
        [
            ((1, 6, 4, 5, 16), (1, 6, 5, 4, 16)),
            ((1, 5, 4, 5, 16), (1, 5, 4, 5, 16)),
            ((1, 6, 4, 5, 8), (1, 6, 4, 5, 8)),
            ((1, 6, 20, 16), (1, 6, 20, 16)),
            ((2, 6, 4, 5, 16), (1, 6, 4, 5, 16)),
        ],
    )
    def test_tiles(self, local: tuple[int, ...], stride: tuple[int, ...]) -> None:
        with refuses(str(local), str(stride), "grid of 2x3", "(B, 6, h, w, 16)", ".unflatten(2, (h, w))"):
            dv.DualPerspectiveEnhance.paper(DIM)(torch.zeros(local), torch.zeros(stride), (2, 3))

    @pytest.mark.parametrize("live", [((0, 1), (0,)), ((0, 1, 2, 3, 4, 4), (1, 4)), [[0], [1]]], ids=str)
    def test_live_tiles(self, live: Any) -> None:
        dem = dv.DualPerspectiveEnhance.released(DIM)
        with refuses("live=", "dem.plan(grid, (h, w)).live"):
            dem(*(torch.zeros(1, len(tiles), 4, 5, DIM) for tiles in live), (2, 3), live=live)

    def test_token_maps_of_a_readout(self) -> None:
        with refuses("(1, 6, 4, 6, 8)", "(1, 6, 6, 4, 8)", "must be the same"):
            dv.DirectReadout()(torch.zeros(1, 6, 4, 6, 8), torch.zeros(1, 6, 6, 4, 8), (2, 3))

    def test_prints_its_options(self) -> None:
        text = dv.DualPerspectiveEnhance.released(DIM, gate=True).extra_repr()
        assert re.sub(r"\s+", " ", text) == (
            "dim=16, pairing='released', enhance='both', source='dual', readout='bilinear', gate=True"
        )
