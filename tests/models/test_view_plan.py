"""Which sub-images are encoded, and that the others would not have mattered."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import dualview as dv
from dualview.models.view_plan import View, plan_views
from tests.checks import recorded
from tests.strategies import examples

TILE, DIM = (8, 12), 16
GRIDS = [(1, 1), (1, 3), (3, 1), (2, 3), (3, 3), (3, 2), (4, 4), (5, 3)]


class Count(nn.Module):
    """Patches of 4 x 4 pixels as tokens, nonlinear, and the number of sub-images seen."""

    def __init__(self):
        super().__init__()
        self.patches, self.seen = nn.Conv2d(3, DIM, 4, stride=4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[0]
        return self.patches(x).tanh().movedim(1, -1)


def count(n, *, batch=1, full=False, preset="released", low_res="mean", **options):
    encoder = Count()
    dem = getattr(dv.DualPerspectiveEnhance, preset)(DIM, **options)
    model = dv.DualViewEncoder(encoder, dem, tile=TILE, low_res=low_res)
    images = torch.randn(batch, 3, n * TILE[0], n * TILE[1])
    if full:
        with dv.full_computation():
            model(images)
    else:
        model(images)
    return encoder.seen


@pytest.mark.parametrize("n, planned, full", [(1, 1, 3), (2, 9, 9), (3, 10, 19), (4, 21, 33), (5, 26, 51)])
def test_sub_images_of_the_released_preset(n, planned, full):
    assert (count(n), count(n, full=True)) == (planned, full)
    assert count(n, batch=3) == 3 * planned


def test_sub_images_of_other_configurations():
    assert count(3, fusion="conv3x3") == 9 + 9  # the low-resolution view is one of the nine stride tiles
    assert count(5, fusion="conv3x3") == 25 + 9
    assert count(3, preset="paper") == 9 + 9
    assert count(2, preset="paper") == 4 + 4 + 1
    assert count(3, preset="paper", low_res=None) == 9 + 9
    assert count(3, low_res=None) == 9 + 1
    assert count(3, enhance="local") == 9 + 1  # local queries at the centres lie in every block
    assert count(3, source="local") == 9 + 1  # no stride tile, so the low-resolution view stands alone
    assert count(3, source="global") == 9


@pytest.mark.parametrize("full", [False, True])
def test_one_plan_holds_what_every_stage_does(full):
    """Views, layers and what is enhanced: the very plan that the module goes by."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2, image_size=28, patch_size=7
    )
    encoder = dv.HfEncoder(CLIPVisionModel(config), layer=-3)
    model = dv.DualViewEncoder(encoder, dv.DualPerspectiveEnhance.released(32), tile=(28, 28))
    asked = []
    model.dem.plan = lambda *args: asked.append(type(model.dem).plan(model.dem, *args)) or asked[-1]
    with dv.full_computation() if full else contextlib.nullcontext():
        plan = model.plan((84, 84))
        model(torch.randn(1, 3, 84, 84))
        assert plan.enhance is asked[-1]
        assert plan.enhance is not model.plan((84, 84), tokens=(5, 6)).enhance is model.dem.plan((3, 3), (5, 6))
    assert plan.layers == ((5, 5, True) if full else (3, 5, False))
    assert len(plan.views) == (19 if full else 10)
    assert len(plan.enhance.directions[0].query_rows.positions) == (12 if full else 4)


def test_plan_of_stages_that_declare_nothing():
    model = dv.DualViewEncoder(Count(), dv.DirectReadout("global", "centre"), tile=TILE)
    plan = model.plan((3 * TILE[0], 5 * TILE[1]))
    assert plan.layers is None
    assert plan.enhance is None
    size = (3 * TILE[0], 5 * TILE[1])
    assert model.plan(size, tokens=(2, 3)).enhance is model.dem.plan((3, 5), (2, 3))
    assert plan.live == ((), (7,))
    assert dv.DualViewEncoder(Count(), None, tile=TILE).plan(TILE).enhance is None


@settings(max_examples=examples(30))
@given(
    st.sampled_from(["paper", "released"]),
    st.sampled_from([None, "conv3x3", "multiplication", "weighted_addition"]),
    st.sampled_from(["average", "bilinear", "centre"]),
    st.lists(st.sampled_from(GRIDS), min_size=1, max_size=4),
    st.sampled_from(["mean", "add", None]),
    st.booleans(),
    st.integers(0, 99),
)
def test_planned_equals_full_for_batches_of_mixed_grids(preset, fusion, readout, grids, low_res, low_pass, seed):
    torch.manual_seed(seed)
    dem = getattr(dv.DualPerspectiveEnhance, preset)(DIM, readout=readout, **({"fusion": fusion} if fusion else {}))
    model = dv.DualViewEncoder(Count(), dem, tile=TILE, low_res=low_res, low_pass=low_pass).double()
    images = [torch.randn(3, r * TILE[0], c * TILE[1], dtype=torch.float64).requires_grad_() for r, c in grids]
    outcomes = []
    for full in (True, False):
        if full:
            with dv.full_computation():
                out = model(images)
        else:
            out = model(images)
        torch.manual_seed(1)
        parameters = [*images, *model.parameters()]
        weights = torch.randn(out.shape, dtype=out.dtype)  # and not like ``out``, in the order of its memory
        outcomes.append([out, *torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)])
    for full, planned in zip(*outcomes, strict=True):
        if full is None or planned is None:
            assert full is None or full.abs().max() == 0
        else:
            torch.testing.assert_close(planned, full, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("grid", [(3, 3), (5, 3), (2, 3), (4, 4)])
def test_noise_where_only_dead_tiles_look_leaves_the_output_bit_equal(grid):
    """A pixel is in one local and one stride tile; with a readout of the recombined stride map, most are dead."""
    model = dv.DualViewEncoder(Count(), dv.DirectReadout("global", "bilinear"), tile=TILE, low_res=None)
    images = torch.randn(1, 3, grid[0] * TILE[0], grid[1] * TILE[1])
    out = model(images)
    live = model.dem.plan(grid, (2, 3)).live.stride
    noisy = images.clone()
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        if i * grid[1] + j not in live:
            noisy[..., i :: grid[0], j :: grid[1]] = 1e6 * torch.randn(())
    assert torch.equal(model(noisy), out)


@pytest.mark.parametrize("times", [1, 2, 3, 5])
@pytest.mark.parametrize("grid", [(3, 3), (5, 5), (3, 5), (7, 7), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shared_view_is_the_low_resolution_view(grid, times, dtype):
    """Claimed by the plan for images of a whole multiple of the tile: held against the two interpolations."""
    tile = (14, 21)
    image = (times * tile[0], times * tile[1])
    centre = grid[0] // 2 * grid[1] + grid[1] // 2
    plan = plan_views(grid, tile, image, (), (centre,), low=True, low_pass=False, full=False)
    assert plan.low == plan.stride[0]
    pixels = torch.rand(1, 3, *image, dtype=dtype)

    def bicubic(size):
        return nn.functional.interpolate(pixels, size, mode="bicubic", align_corners=False)

    canvas = (
        bicubic((grid[0] * tile[0], grid[1] * tile[1])) if image != (grid[0] * tile[0], grid[1] * tile[1]) else pixels
    )
    low = bicubic(tile) if image != tile else pixels
    tolerance = 0.0 if image == (grid[0] * tile[0], grid[1] * tile[1]) else 1e-5 if dtype == torch.float32 else 1e-12
    stride_tile = canvas[..., grid[0] // 2 :: grid[0], grid[1] // 2 :: grid[1]]
    assert (stride_tile - low).abs().max() <= tolerance


@pytest.mark.parametrize(
    "grid, image", [((2, 3), (28, 63)), ((3, 2), (42, 42)), ((4, 4), (56, 84)), ((3, 3), (40, 63)), ((3, 3), (50, 50))]
)
def test_other_low_resolution_views_are_encoded(grid, image):
    """Even counts fall between pixels; other sizes between the positions that floating point represents."""
    everything = tuple(range(grid[0] * grid[1]))
    plan = plan_views(grid, (14, 21), image, everything, everything, low=True, low_pass=False, full=False)
    assert plan.views[plan.low] == View("low", 0)


def test_a_smoothed_stride_tile_is_not_the_low_resolution_view():
    plan = plan_views((3, 3), (14, 21), (42, 63), (), (4,), low=True, low_pass=True, full=False)
    assert plan.low != plan.stride[0]


def test_no_layer_after_the_chosen_one_runs():
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    model = dv.DualViewEncoder(dv.HfEncoder(tower, -2), dv.DualPerspectiveEnhance.released(32), tile=(28, 28))
    with recorded({str(i): layer for i, layer in enumerate(tower.encoder.layers)}) as called:
        model(torch.randn(1, 3, 84, 84))
    assert [called.count(str(i)) for i in range(4)] == [10, 10, 10, 0]
