"""Pixels to tokens through both perspectives, against a reference with one encoder call for each tile."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

import dualview as dv
from dualview import (
    DirectReadout,
    DualPerspectiveCrop,
    DualPerspectiveEnhance,
    DualViewEncoder,
    HfEncoder,
    TileGrid,
    recombine,
)
from dualview.geometry import LiveTiles
from dualview.ops.planned.live import LayerPlan
from dualview.ops.tiling import crop
from tests import reference
from tests.checks import refuses
from tests.strategies import examples, some

DIM = 16
PATCH = (2, 3)
TILE = (4, 9)  # 2 x 3 tokens
EVERY_GRID = [(rows, cols) for rows in range(1, 6) for cols in range(1, 6)]


class Patches(nn.Module):
    """An encoder whose tokens each see one patch and their place in the tile; it remembers what it was given."""

    def __init__(self, tile: tuple[int, int] = TILE, dim: int = DIM) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.place = nn.Parameter(torch.randn(tile[0] // PATCH[0], tile[1] // PATCH[1], dim))
        self.given: list[Tensor] = []

    def forward(self, pixels: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.given.append(pixels.detach())
        return (self.conv(pixels).movedim(1, -1) + self.place).sin()


class Recording(nn.Module):
    """A DEM that remembers its arguments."""

    def __init__(self, dem: nn.Module) -> None:
        super().__init__()
        self.dem = dem
        self.calls: list[tuple[tuple[int, ...], tuple[int, int], object]] = []

    def forward(self, local: Tensor, stride: Tensor, grid: tuple[int, int], key_mask: object = None) -> Tensor:
        self.calls.append((tuple(local.shape), tuple(grid), key_mask))
        return self.dem(local, stride, grid, key_mask)


def image_for(grid: tuple[int, int], tile: tuple[int, int] = TILE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, grid[0] * tile[0], grid[1] * tile[1], dtype=dtype)


# --- The reference ----------------------------------------------------------------------------------------------------


def bicubic_weights(n_in: int, n_out: int) -> Tensor:
    """The (out, in) matrix of bicubic interpolation without antialiasing, a = -0.75, border repeated."""
    a, weights = -0.75, torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        at = (i + 0.5) * n_in / n_out - 0.5
        base = int(at // 1)
        for tap in range(base - 1, base + 3):
            d = abs(at - tap)
            if d <= 1:
                weight = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                weight = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(tap, 0), n_in - 1)] += weight
    return weights


def bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    (height, width), (h, w) = image.shape[-2:], size
    return bicubic_weights(height, h) @ image @ bicubic_weights(width, w).T


def reference_encode(
    image: Tensor,
    encoder: nn.Module,
    dem: nn.Module | None,
    tile: tuple[int, int],
    grid: tuple[int, int],
    low_res: str | None,
    low_pass: bool = False,
) -> Tensor:
    """One image, tile by tile, every view encoded on its own."""

    def encode(tiles: list[Tensor]) -> Tensor:
        return torch.stack([encoder(t[None])[0] for t in tiles])[None]

    canvas = bicubic(image, (grid[0] * tile[0], grid[1] * tile[1]))
    planes = canvas.movedim(0, -1)
    local = reference.cut(planes, grid, "local").movedim(-1, 1)
    stride = reference.cut(reference.low_pass(planes, grid) if low_pass else planes, grid, "global").movedim(-1, 1)
    low = encode([bicubic(image, tile)])[0, 0]
    if dem is None:
        return low
    enhanced = dem(encode(list(local)), encode(list(stride)), grid)[0]
    if low_res is None:
        return enhanced
    return (low + enhanced) / 2 if low_res == "mean" else low + enhanced


DEMS = {
    "none": lambda: None,
    "paper": lambda: DualPerspectiveEnhance.paper(DIM),
    "released": lambda: DualPerspectiveEnhance.released(DIM),
    "separate weights, centre": lambda: DualPerspectiveEnhance.paper(DIM, share_weights=False, readout="centre"),
    "whole map": lambda: DualPerspectiveEnhance.paper(DIM, readout="none"),
    "local map": lambda: DirectReadout("local"),
    "global map": lambda: DirectReadout("global", "bilinear"),
    "sum, whole": lambda: DirectReadout("sum", "none"),
}


@settings(max_examples=examples(25))
@given(
    st.sampled_from(list(DEMS)),
    st.sampled_from(["mean", "add", None]),
    st.lists(st.sampled_from([(2, 3), (1, 2), (3, 1), (3, 3), (1, 1), (2, 2), (4, 2)]), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1, 3, 1000]),
    st.data(),
)
def test_equals_the_reference(
    kind: str,
    low_res: str | None,
    grids: list[tuple[int, int]],
    resize: bool,
    low_pass: bool,
    max_tiles: int | None,
    data: st.DataObject,
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    encoder, dem = Patches().double(), DEMS[kind]()
    whole = getattr(dem, "readout", None) == "none"
    low_res = None if whole else low_res
    if resize or whole:
        grids = grids[:1] * len(grids)
    images = [image_for(grid) for grid in grids]
    if resize:
        sides = st.integers(3, 40)
        images = [torch.randn(3, data.draw(sides), data.draw(sides), dtype=torch.float64) for _ in grids]
    model = DualViewEncoder(
        encoder,
        dem,
        tile=TILE,
        grid=grids[0] if resize else None,
        low_res=low_res,
        resize=resize,
        low_pass=low_pass,
        max_tiles_per_pass=max_tiles,
    ).double()
    out = model(images)
    expected = [
        reference_encode(image, encoder, dem, TILE, grid, low_res, low_pass)
        for image, grid in zip(images, grids, strict=True)
    ]
    torch.testing.assert_close(out, torch.stack(expected))
    if len({image.shape for image in images}) == 1:
        torch.testing.assert_close(model(torch.stack(images)), out)


def test_equals_the_equations_from_end_to_end() -> None:
    """Nothing of dualview in the reference: its DEM is that of the equations, too."""
    for options, preset, mix in [
        (reference.PAPER, DualPerspectiveEnhance.paper, "add"),
        (reference.RELEASED, DualPerspectiveEnhance.released, "mean"),
    ]:
        encoder, dem = Patches().double(), preset(DIM).double()

        def by_hand(local: Tensor, stride: Tensor, grid: tuple[int, int], dem=dem, options=options) -> Tensor:
            return reference.enhance(options, dem.state_dict(), local[0], stride[0], grid)[None]

        for grid in [(2, 3), (3, 1)]:
            image = image_for(grid)
            out = DualViewEncoder(encoder, dem, tile=TILE, grid=grid)(image[None])
            torch.testing.assert_close(out[0], reference_encode(image, encoder, by_hand, TILE, grid, mix))


# --- What goes through the encoder, and how ---------------------------------------------------------------------------


def test_mixed_grids_keep_their_order_and_share_the_dem() -> None:
    grids = [(2, 3), (1, 1), (1, 2), (2, 3), (1, 1), (3, 2)]
    dem = Recording(DualPerspectiveEnhance.released(DIM))
    model = DualViewEncoder(Patches(), dem, tile=TILE).double()
    images = [image_for(grid) for grid in grids]
    out = model(images)
    assert [(shape[0], grid) for shape, grid, _ in dem.calls] == [(2, (2, 3)), (2, (1, 1)), (1, (1, 2)), (1, (3, 2))]
    assert out.shape == (6, 2, 3, DIM)
    for i, image in enumerate(images):
        torch.testing.assert_close(out[i], model(image[None])[0], msg=lambda m, i=i: f"image {i}: {m}")


def test_all_tiles_of_a_batch_go_together_in_passes() -> None:
    encoder = Patches()
    images = [image_for(grid, dtype=torch.float32) for grid in [(2, 3), (1, 1), (1, 2)]]  # 13 + 3 + 5 sub-images
    results = []
    for most, passes in [(8, [8, 8, 5]), (21, [21]), (1000, [21]), (1, [1] * 21), (None, [1] * 21)]:
        model = DualViewEncoder(encoder, DualPerspectiveEnhance.released(DIM), tile=TILE, max_tiles_per_pass=most)
        model.dem.load_state_dict(results[0][0].dem.state_dict() if results else model.dem.state_dict())
        encoder.given.clear()
        with dv.full_computation():
            results.append((model, model(images)))
        assert [len(part) for part in encoder.given] == passes
        torch.testing.assert_close(results[-1][1], results[0][1])
    # One image after another; of each the local tiles, the stride tiles and the low-resolution view.
    given_tiles = torch.cat(encoder.given)
    planes = images[0].movedim(0, -1)
    assert torch.equal(given_tiles[:6], reference.cut(planes, (2, 3), "local").movedim(-1, 1))
    assert torch.equal(given_tiles[6:12], reference.cut(planes, (2, 3), "global").movedim(-1, 1))
    torch.testing.assert_close(given_tiles[12].double(), bicubic(images[0].double(), TILE), atol=1e-5, rtol=0)
    assert torch.equal(given_tiles[13], images[1])


def test_default_passes_elsewhere_than_on_a_cpu_hold_128() -> None:
    with torch.device("meta"):
        model = DualViewEncoder(Patches(), DualPerspectiveEnhance.released(DIM), tile=TILE)
        with dv.full_computation():
            out = model(torch.empty(2, 3, 8 * TILE[0], 9 * TILE[1]))
    assert out.shape == (2, 2, 3, DIM)
    assert out.device.type == "meta"
    assert [len(part) for part in model.encoder.given] == [128, 128, 34]


@pytest.mark.parametrize(
    ("dem", "low_res", "views"),
    [
        (DualPerspectiveEnhance.paper(DIM), "mean", 13),
        (DualPerspectiveEnhance.paper(DIM), None, 12),
        (DirectReadout(), "add", 13),
        (None, "mean", 1),
        (None, None, 1),
    ],
)
def test_only_views_that_are_used_are_encoded(dem: nn.Module | None, low_res: str | None, views: int) -> None:
    model = DualViewEncoder(Patches(), dem, tile=TILE, low_res=low_res, max_tiles_per_pass=1000)
    model(image_for((2, 3), dtype=torch.float32)[None])
    assert [len(part) for part in model.encoder.given] == [views]


@pytest.mark.parametrize("low_res", ["mean", "add", None])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_one_by_one_is_encoded_once_for_its_three_views(low_res: str | None, preset: str) -> None:
    model = DualViewEncoder(
        Patches(), getattr(DualPerspectiveEnhance, preset)(DIM), tile=TILE, low_res=low_res, max_tiles_per_pass=1000
    ).double()
    images = torch.randn(3, 3, *TILE, dtype=torch.float64)
    out = model(images)
    assert [len(part) for part in model.encoder.given] == [3]
    local, stride, low = (model.encoder(images) for _ in range(3))
    enhanced = model.dem(local[:, None], stride[:, None], (1, 1))
    expected = {"mean": (low + enhanced) / 2, "add": low + enhanced, None: enhanced}[low_res]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("grid", EVERY_GRID)
def test_at_odd_counts_the_low_resolution_view_is_the_centre_stride_tile(grid: tuple[int, int]) -> None:
    """Bit for bit where the input has the size of the canvas; at even counts they differ."""
    tile = (6, 9)
    model = DualViewEncoder(Patches(tile), DirectReadout(), tile=tile, max_tiles_per_pass=1000)
    with dv.full_computation():
        model(image_for(grid, tile, torch.float32)[None])
    views = model.encoder.given[0]
    centre = grid[0] // 2 * grid[1] + grid[1] // 2
    stride_tile = views[grid[0] * grid[1] + centre]
    assert torch.equal(views[-1], stride_tile) == (grid[0] % 2 == 1 and grid[1] % 2 == 1)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("grid", [(3, 3), (5, 5), (3, 5)])
def test_shared_view_of_enlarged_images(times: int, grid: tuple[int, int]) -> None:
    """The released model enlarges 336-pixel images inside; the views still coincide."""
    tile = (6, 9)
    model = DualViewEncoder(
        Patches(tile), DirectReadout(), tile=tile, grid=grid, resize=True, max_tiles_per_pass=1000
    ).double()
    with dv.full_computation():
        model(image_for((times, times), tile)[None])
    views = model.encoder.given[0]
    centre = grid[0] // 2 * grid[1] + grid[1] // 2
    torch.testing.assert_close(views[-1], views[grid[0] * grid[1] + centre])


def test_interpolates_in_at_least_float32() -> None:
    model = DualViewEncoder(Patches(), None, tile=TILE, grid=(2, 3), resize=True).bfloat16()
    image = torch.randn(1, 3, 17, 23, dtype=torch.bfloat16)
    model(image)
    expected = bicubic(image[0].double(), TILE).float().bfloat16()
    agree = (model.encoder.given[0][0] == expected).float().mean()
    assert agree > 0.98, "rounded once, at the end; float32 and float64 may fall on either side of a tie"


# --- Encoders ---------------------------------------------------------------------------------------------------------


def test_any_callable_is_an_encoder() -> None:
    patches, dem = Patches(), DualPerspectiveEnhance.released(DIM)
    images = image_for((2, 3), dtype=torch.float32)[None]
    as_module = DualViewEncoder(patches, dem, tile=TILE)
    as_function = DualViewEncoder(patches.forward, dem, tile=TILE)
    assert torch.equal(as_module(images), as_function(images))
    names = {name for name, _ in as_module.named_parameters()}
    assert names == {f"encoder.{n}" for n, _ in patches.named_parameters()} | {
        f"dem.{n}" for n, _ in dem.named_parameters()
    }
    assert {name for name, _ in as_function.named_parameters()} == {f"dem.{n}" for n, _ in dem.named_parameters()}


def clip_tower() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    return CLIPVisionModel(config).eval()


def test_hf_encoder_inside() -> None:
    tower = clip_tower().double()
    dem = DualPerspectiveEnhance.released(32).double()
    image = image_for((2, 3), (28, 28))

    def last_but_one(pixels: Tensor) -> Tensor:
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states[-2][:, 1:].reshape(len(pixels), 4, 4, 32)

    with torch.no_grad():
        out = DualViewEncoder(HfEncoder(tower), dem, tile=(28, 28), grid=(2, 3))(image[None])
        expected = reference_encode(image, last_but_one, dem, (28, 28), (2, 3), "mean")
    torch.testing.assert_close(out[0], expected)


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_res", ["mean", None])
@pytest.mark.parametrize("low_pass", [False, True])
def test_gradients(low_res: str | None, low_pass: bool) -> None:
    model = DualViewEncoder(
        Patches((2, 6), 2),
        DualPerspectiveEnhance.paper(2),
        tile=(2, 6),
        low_res=low_res,
        low_pass=low_pass,
        max_tiles_per_pass=3,
    ).double()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def call(pixels: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (pixels,))

    pixels = torch.randn(1, 3, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (pixels, *parameters))


KEY_BIAS = "attentions.0.k_proj.bias"  # adds a constant to all scores of a query, which the softmax drops


def unmoved(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}


def test_every_parameter_gets_a_gradient() -> None:
    model = DualViewEncoder(Patches(), DualPerspectiveEnhance.released(DIM), tile=TILE)
    model(image_for((2, 3), dtype=torch.float32)[None]).square().sum().backward()
    assert unmoved(model) <= {f"dem.{KEY_BIAS}"}


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_zero_gate_leaves_the_host_as_it_is(preset: str) -> None:
    dem = getattr(DualPerspectiveEnhance, preset)(DIM, gate=True)
    model = DualViewEncoder(Patches(), dem, tile=TILE, low_res="add")
    host = copy.deepcopy(model.encoder)
    images = torch.stack([image_for((2, 3), dtype=torch.float32) for _ in range(2)])
    target = torch.randn(2, 2, 3, DIM)
    out = model(images)
    views = len(model.encoder.given) // 2
    low = torch.stack([part[0] for i, part in enumerate(model.encoder.given) if i % views == views - 1])
    plain = torch.cat([host(view[None]) for view in low])
    assert torch.equal(out, plain)

    (out - target).square().mean().backward()
    (plain - target).square().mean().backward()
    assert dem.gate.grad.abs().min() > 0
    assert unmoved(dem) == {name for name, _ in dem.named_parameters()} - {"gate"}
    for p, q in zip(model.encoder.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)

    torch.optim.SGD([dem.gate], lr=1.0).step()
    model.zero_grad()
    (model(images) - target).square().mean().backward()
    assert unmoved(model) <= {f"dem.{KEY_BIAS}"}


# --- Padding ----------------------------------------------------------------------------------------------------------


def seen_tokens(valid: Tensor, grid: tuple[int, int], tile: tuple[int, int], perspective: str) -> Tensor:
    """Tokens on the map with at least one valid pixel, pixel by pixel."""
    h, w = tile[0] // PATCH[0], tile[1] // PATCH[1]
    tokens = torch.zeros(grid[0] * grid[1], h, w, dtype=torch.bool)
    for (i, y, x), (big_y, big_x) in reference.cells(perspective, grid, tile):
        if valid[big_y, big_x]:
            tokens[i, y // PATCH[0], x // PATCH[1]] = True
    return reference.join(tokens, grid, perspective)


@settings(max_examples=examples(15))
@given(st.lists(st.sampled_from([(2, 3), (1, 2), (3, 1), (1, 1), (3, 3)]), min_size=1, max_size=4), st.integers(0, 99))
def test_pixel_masks_become_token_masks_of_both_perspectives(grids: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    images = [image_for(grid) for grid in grids]
    masks = [torch.rand(image.shape[1:]) < 0.15 for image in images]
    dem = Recording(DualPerspectiveEnhance.paper(DIM))
    model = DualViewEncoder(Patches(), dem, tile=TILE).double()
    out = model(images, valid=masks)
    for _, grid, key_mask in dem.calls:
        members = [i for i, other in enumerate(grids) if other == grid]
        for found, perspective in zip(key_mask, ["local", "global"], strict=True):
            expected = torch.stack([seen_tokens(masks[i], grid, TILE, perspective) for i in members])
            assert torch.equal(found, expected), perspective
    for i, image in enumerate(images):
        torch.testing.assert_close(out[i], model([image], valid=[masks[i]])[0])
        torch.testing.assert_close(out[i], model(image[None], valid=masks[i][None])[0])


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_padding_is_not_attended_to(preset: str) -> None:
    """Whatever stands in tokens of padding alone, the tokens that see real pixels stay as they are."""
    cut = DualPerspectiveCrop(TILE, remainder="pad")(torch.randn(3, 7, 11, dtype=torch.float64))
    canvas = recombine(cut.local, cut.grid, "local")
    grid = tuple(cut.grid)
    assert grid == (2, 2)
    real = {p: seen_tokens(cut.valid, grid, TILE, p) for p in ("local", "global")}
    both = real["local"] & real["global"]

    # Pixels all of whose tokens, of either perspective, are padding alone.
    dead = torch.ones_like(cut.valid)
    for perspective, seen in real.items():
        tokens = reference.cut(seen, grid, perspective)
        for (i, y, x), (big_y, big_x) in reference.cells(perspective, grid, TILE):
            dead[big_y, big_x] &= ~tokens[i, y // PATCH[0], x // PATCH[1]]
    assert dead.any()
    noisy = canvas + 5 * torch.randn_like(canvas) * dead

    dem = getattr(DualPerspectiveEnhance, preset)(DIM, readout="none")
    model = DualViewEncoder(Patches(), dem, tile=TILE, low_res=None).double()
    clean, changed = (model(image[None], valid=cut.valid[None])[0] for image in (canvas, noisy))
    torch.testing.assert_close(changed[both], clean[both])
    clean, changed = (model(image[None])[0] for image in (canvas, noisy))
    assert not torch.allclose(changed[both], clean[both], atol=1e-6), "without the mask the noise is attended to"


def test_masks_mean_nothing_where_nothing_is_attended_to() -> None:
    images = image_for((2, 3), dtype=torch.float32)[None]
    valid = torch.rand(1, *images.shape[-2:]) < 0.5
    for dem in (DirectReadout(), None):
        model = DualViewEncoder(Patches(), dem, tile=TILE)
        assert torch.equal(model(images, valid=valid), model(images))


# --- Table 3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_res", ["mean", "add", None])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_resolutions_of_table_3(n: int, low_res: str | None) -> None:
    """n = 1 to 5 tiles a side stand for 336 to 1680 pixels, alone and with the 336-pixel view."""
    encoder, dem = Patches().double(), DualPerspectiveEnhance.paper(DIM).double()
    image = image_for((n, n))
    out = DualViewEncoder(encoder, dem, tile=TILE, grid=(n, n), low_res=low_res)(image[None])
    assert out.shape == (1, 2, 3, DIM)
    torch.testing.assert_close(out[0], reference_encode(image, encoder, dem, TILE, (n, n), low_res))


def test_no_dem_is_the_plain_encoder() -> None:
    encoder = Patches()
    images = torch.randn(2, 3, *TILE)
    assert torch.equal(DualViewEncoder(encoder, None, tile=TILE, max_tiles_per_pass=2)(images), encoder(images))


# --- As a layer -------------------------------------------------------------------------------------------------------


def small_model(dem: nn.Module | None = None, **options: object) -> DualViewEncoder:
    dem = dem or DualPerspectiveEnhance.released(DIM)
    return DualViewEncoder(Patches(), dem, **{"tile": TILE, "grid": (2, 3), **options})


@pytest.mark.more
@pytest.mark.parametrize("low_res", some(["mean", None], 2))
def test_compiles_into_one_graph(low_res: str | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    tower = HfEncoder(clip_tower())
    model = DualViewEncoder(
        tower, DualPerspectiveEnhance.released(32), tile=(28, 28), low_res=low_res, max_tiles_per_pass=1000
    )
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 2, 3, 5):
        images = torch.randn(batch, 3, 56, 84)
        torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 2, "one graph for the first size, one for all other sizes"


@pytest.mark.parametrize("low_res", ["mean", None])
def test_compiles_with_default_passes(low_res: str | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = small_model(low_res=low_res)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        images = torch.randn(1, 3, 2 * TILE[0], 3 * TILE[1])
        torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 1


def test_copies_pickles_and_state_dicts() -> None:
    model, images = small_model(low_res="add"), image_for((2, 3), dtype=torch.float32)[None]
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
    other = small_model(low_res="add")
    assert not torch.allclose(other(images), expected, atol=1e-3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), expected)


def test_meta_construction_and_materialisation() -> None:
    with torch.device("meta"):
        empty = small_model()
    assert all(p.is_meta for p in empty.parameters())
    real = small_model()
    empty.to_empty(device="cpu").load_state_dict(real.state_dict())
    images = image_for((2, 3), dtype=torch.float32)[None]
    assert torch.equal(empty(images), real(images))


def test_autocast() -> None:
    model, images = small_model(), image_for((2, 3), dtype=torch.float32)[None]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    torch.testing.assert_close(out.float(), model(images), atol=0.1, rtol=0.1)
    assert not torch.equal(out.float(), model(images))


def test_bfloat16() -> None:
    model, images = small_model(), image_for((2, 3), dtype=torch.float32)[None]
    expected = model(images)
    out = model.bfloat16()(images.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


def test_empty_batch() -> None:
    assert small_model()(torch.zeros(0, 3, 2 * TILE[0], 3 * TILE[1])).shape == (0, 2, 3, DIM)


def test_repr_says_the_options() -> None:
    text = repr(small_model(low_res="add", max_tiles_per_pass=7))
    assert "tile=(4, 9), grid=(2, 3), low_res='add', resize=False, low_pass=False, max_tiles_per_pass=7" in text
    assert "tile=(4, 9), grid=None, low_res=" in repr(small_model(grid=None))


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_refuses_options_that_do_not_fit() -> None:
    with refuses("low_res='sum'", '"auto", "mean", "add" or None'):
        small_model(low_res="sum")
    with refuses("resize=True needs a grid"):
        small_model(grid=None, resize=True)
    for dem, mix in (
        (DirectReadout(readout="none"), "mean"),
        (DualPerspectiveEnhance.paper(DIM, readout="none"), "add"),
    ):
        for low_res in ("auto", mix):
            with refuses(f"low_res='{mix}' cannot be mixed with a full map", "low_res=None"):
                small_model(dem, low_res=low_res)
    with refuses("max_tiles_per_pass=0", "positive integer"):
        small_model(max_tiles_per_pass=0)
    with refuses("tile=(4, 0)"):
        small_model(tile=(4, 0))
    with refuses("rows=0"):
        small_model(grid=(0, 3))


def test_refuses_images_that_do_not_fit() -> None:
    model = small_model()
    with refuses("images of 8 x 18", "tiles of 4 x 9", "(8, 27), a grid of 2x3", "DualPerspectiveCrop", "resize=True"):
        model(torch.zeros(1, 3, 8, 18))
    with refuses("images of 9 x 27", "a whole number of tiles"):
        small_model(grid=None)(torch.zeros(1, 3, 9, 27))
    with refuses("images of 8 x 28", "a whole number of tiles"):
        small_model(grid=None)(torch.zeros(1, 3, 8, 28))
    with refuses("images of 0 x 27", "a whole number of tiles"):
        small_model(grid=None)(torch.zeros(1, 3, 0, 27))
    with refuses("(3, 8, 27)", "floating-point (B, 3, H, W)", "list of (3, H, W)"):
        model(torch.zeros(3, 8, 27))
    with refuses("pixels=", "torch.uint8", "floating-point", error=TypeError):
        model(torch.zeros(1, 3, 8, 27, dtype=torch.uint8))
    with refuses("pixels=", "same number of channels, type and device"):
        small_model(grid=None)([torch.zeros(3, 8, 27), torch.zeros(3, 8, 27, dtype=torch.float64)])
    with refuses("(1, 1, 3, 8, 27)", "list of (3, H, W)"):
        model([torch.zeros(1, 3, 8, 27)])
    with refuses("at least one"):
        model([])


def test_refuses_full_maps_of_different_sizes_in_one_batch() -> None:
    model = small_model(DirectReadout(readout="none"), low_res=None, grid=None)
    with refuses("2x3, 1x2", "one grid per call"):
        model([torch.zeros(3, 8, 27), torch.zeros(3, 4, 18)])


def test_refuses_masks_that_do_not_fit() -> None:
    model, images = small_model(), torch.zeros(2, 3, 8, 27)
    for valid in (torch.ones(2, 27, 8), torch.ones(1, 8, 27), torch.ones(8, 27), torch.ones(2, 8, 27)):
        with refuses("valid=", str(tuple(valid.shape)), "boolean", "every image", "(2, 8, 27)"):
            model(images, valid=valid > 0 if valid.shape != (2, 8, 27) else valid)
    with refuses("valid must be a torch.Tensor, not list", "torch.stack", error=TypeError):
        model(images, valid=[torch.ones(8, 27) > 0] * 2)
    with refuses("valid=", "2 tensors, one per image"):
        model(list(images), valid=[torch.ones(8, 27, dtype=torch.bool)])
    with refuses("images of (5, 7), which are interpolated to (8, 27)", "Pad images to the canvas"):
        small_model(resize=True)(torch.zeros(1, 3, 5, 7), valid=torch.ones(1, 5, 7, dtype=torch.bool))
    uneven = DualViewEncoder(lambda x: torch.zeros(len(x), 3, 3, DIM), DualPerspectiveEnhance.paper(DIM), tile=TILE)
    with refuses("a tile of (4, 9) pixels", "(3, 3) patches", "key_mask"):
        uneven(images, valid=torch.ones(2, 8, 27, dtype=torch.bool))


def test_pixels_beyond_whole_patches_do_not_count() -> None:
    """Patches of 2 on a side of 5: the last row and column are not seen by the encoder, and not by the mask."""
    model = DualViewEncoder(
        lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)).movedim(1, -1).repeat(1, 1, 1, 6)[..., :DIM],
        DualPerspectiveEnhance.paper(DIM, readout="none"),
        tile=(5, 5),
        low_res=None,
    )
    image, valid = torch.randn(1, 3, 5, 10), torch.ones(1, 5, 10, dtype=torch.bool)
    masked = valid.clone()
    masked[:, 4] = False  # the last row
    assert torch.equal(model(image, valid=masked), model(image, valid=valid))
    masked[:, :2, :2] = False  # a whole patch of the first local tile
    assert not torch.equal(model(image, valid=masked), model(image, valid=valid))


def test_refuses_what_an_encoder_should_not_return() -> None:
    images = torch.zeros(1, 3, 8, 27)
    for wrong, got in [
        (lambda x: torch.zeros(len(x), 6, DIM), "(1, 6, 16)"),
        (lambda x: (torch.zeros(len(x), 2, 3, DIM),), "tuple"),
        (lambda _: torch.zeros(5, 2, 3, DIM), "(5, 2, 3, 16)"),
    ]:
        with refuses(f"the encoder returned {got} for 1 sub-images", "(1, h', w', D)", ".unflatten(1, (h', w'))"):
            DualViewEncoder(wrong, DualPerspectiveEnhance.paper(DIM), tile=TILE)(images)


@pytest.mark.parametrize("low_res", ["mean", "add", None])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_gate_moves_from_the_host_to_the_mix(low_res: str | None, preset: str) -> None:
    """Bit-equal to the low-resolution features at gate 0, whatever the mix, and to the ungated mix at gate 1."""
    dem = getattr(DualPerspectiveEnhance, preset)(DIM, gate=True)
    model = DualViewEncoder(Patches(), dem, tile=TILE, low_res=low_res).double()
    image = image_for((3, 3))[None]
    host = DualViewEncoder(model.encoder, None, tile=TILE)(image)
    assert torch.equal(model(image), host)
    with torch.no_grad():
        dem.gate.fill_(1.0)
    plain = getattr(DualPerspectiveEnhance, preset)(DIM).double()
    plain.load_state_dict({name: x for name, x in dem.state_dict().items() if name != "gate"})
    expected = DualViewEncoder(model.encoder, plain, tile=TILE, low_res=low_res)(image)
    torch.testing.assert_close(model(image), expected)


def test_tiles_of_mixed_grids_are_images() -> None:
    images = [image_for(grid) for grid in [(2, 3), (3, 1)]]
    model = DualViewEncoder(Patches(), DualPerspectiveEnhance.released(DIM), tile=TILE).double()
    batch = DualPerspectiveCrop(TILE)(images).local
    torch.testing.assert_close(model(batch), model(images))


# --- Parts of a user's own --------------------------------------------------------------------------------------------


class CentreTile(nn.Module):
    """A dem that needs the first local and the last stride tile, and says so."""

    low_res = "add"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.given: list[object] = []

    def plan(self, grid: TileGrid, tokens: tuple[int, int]) -> SimpleNamespace:
        self.asked.append((tuple(grid), tokens))
        return SimpleNamespace(live=([0], [grid.num_tiles - 1]))

    def forward(self, local: Tensor, stride: Tensor, grid: TileGrid, *, live: LiveTiles) -> Tensor:
        self.given.append(live)
        return local[:, live.local.index(0)] - stride[:, live.stride.index(grid.num_tiles - 1)]


class Declaring(Patches):
    """An encoder that says what it does."""

    def layer_plan(self) -> LayerPlan:
        return LayerPlan(2, 3, norm=False)

    def token_map(self, tile: tuple[int, int]) -> tuple[int, int]:
        return tile[0] // PATCH[0], tile[1] // PATCH[1]


def test_a_dem_of_a_users_own_says_which_tiles_it_needs() -> None:
    dem = CentreTile()
    model = DualViewEncoder(Patches(), dem, tile=TILE)
    image = image_for((2, 3), dtype=torch.float32)
    out = model(image[None])
    assert sum(len(part) for part in model.encoder.given) == 3, "two tiles and the low-resolution view"
    assert dem.given == [((0,), (5,))]
    assert dem.asked == [((2, 3), (2, 3))], "with as many tokens as tiles, where the encoder does not say how many"
    with dv.full_computation():
        torch.testing.assert_close(model(image[None]), out)
    assert dem.given[1] == (tuple(range(6)), tuple(range(6)))
    local, stride = (crop(image[None], (2, 3), perspective)[0] for perspective in ("local", "global"))
    encode = model.encoder
    low = encode(F.interpolate(image[None], TILE, mode="bicubic"))
    torch.testing.assert_close(out, encode(local[:1]) - encode(stride[5:]) + low)


def test_an_encoder_of_a_users_own_says_what_it_runs() -> None:
    model = DualViewEncoder(Declaring(), DualPerspectiveEnhance.released(DIM), tile=TILE)
    plan = model.plan((12, 27))
    assert plan.layers == (2, 3, False)
    assert plan.enhance is model.dem.plan((3, 3), (2, 3))
    assert model.dem.plan((3, 3), (2, 3)) is model.plan((12, 27), tokens=(2, 3)).enhance


def test_a_plan_of_tiles_that_the_grid_has_not_is_refused() -> None:
    dem = CentreTile()
    dem.plan = lambda *_: SimpleNamespace(live=((0,), (6,)))
    with refuses("names tiles [6] of a grid of 2x3", "0 to 5"):
        DualViewEncoder(Patches(), dem, tile=TILE)(torch.zeros(1, 3, 8, 27))


def test_parts_are_looked_up_at_every_call() -> None:
    """Whatever is put in the place of encoder and dem is used, with its own plan."""
    model, image = small_model(), image_for((2, 3), dtype=torch.float32)[None]
    names = set(model.state_dict())
    before = model(image)
    model.encoder, model.dem = Patches(), DualPerspectiveEnhance.paper(DIM)
    expected = small_model(model.dem, low_res="mean")
    expected.encoder = model.encoder
    assert torch.equal(model(image), expected(image))
    assert not torch.allclose(model(image), before, atol=1e-3)
    assert {name.split(".")[0] for name in names} == {"encoder", "dem"}


def test_copies_that_peft_trains_are_used() -> None:
    model, image = small_model(), image_for((3, 3), dtype=torch.float32)[None]
    model.grid = None
    tuned = get_peft_model(model, LoraConfig(target_modules=["encoder.conv"], modules_to_save=["dem"]))
    for p in tuned.base_model.model.dem.modules_to_save.parameters():
        nn.init.normal_(p)
    copied = DualViewEncoder(
        tuned.base_model.model.encoder, tuned.base_model.model.dem.modules_to_save["default"], tile=TILE
    )
    assert torch.equal(tuned(image), copied(image))
    assert not torch.allclose(
        tuned(image), model.dem.original_module(*torch.randn(2, 1, 9, 2, 3, DIM), (3, 3)), atol=0.1
    )
    views = sum(len(part) for part in tuned.base_model.model.encoder.given)
    assert views == 3 * 10, "its plan is used, too: ten of nineteen sub-images, in three calls"
    tuned(image).sum().backward()
    assert all(p.grad is not None for p in tuned.base_model.model.dem.modules_to_save.parameters())


@pytest.mark.parametrize(
    ("dem", "low_res"),
    [
        (DualPerspectiveEnhance.paper(DIM), "add"),
        (DualPerspectiveEnhance.released(DIM), "mean"),
        (DirectReadout(), "mean"),
        (CentreTile(), "add"),
        (Recording(DualPerspectiveEnhance.paper(DIM)), "mean"),
        (None, "mean"),
    ],
    ids=["paper", "released", "direct", "declared", "undeclared", "none"],
)
def test_the_mix_follows_the_dem(dem: nn.Module | None, low_res: str) -> None:
    for options in ({}, {"low_res": "auto"}):
        assert DualViewEncoder(Patches(), dem, tile=TILE, **options).low_res == low_res
    assert DualViewEncoder(Patches(), dem, tile=TILE, low_res=None).low_res is None


# --- Batch statistics -------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.patches, self.norm = Patches(), nn.BatchNorm2d(DIM, **options)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.patches(pixels).movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}])
def test_batch_norms_see_all_sub_images_in_one_pass(options: dict[str, bool]) -> None:
    """In training, and without running statistics always, whatever the default of the device is."""
    encoder = Normed(**options)
    model = DualViewEncoder(encoder, DualPerspectiveEnhance.released(DIM), tile=TILE)
    model.train(not options)
    images = torch.randn(2, 3, 12, 27)
    out = model(images)
    assert [len(part) for part in encoder.patches.given] == [20]
    model.max_tiles_per_pass = 20
    assert torch.equal(model(images), out)
    model.max_tiles_per_pass = 19
    with refuses("max_tiles_per_pass=19 would split 20 sub-images", "batch norms", "eval mode"):
        model(images)


def test_batch_norms_with_running_statistics_take_any_passes() -> None:
    encoder = Normed()
    model = DualViewEncoder(encoder, DualPerspectiveEnhance.released(DIM), tile=TILE, max_tiles_per_pass=3).eval()
    model(torch.randn(1, 3, 12, 27))
    assert [len(part) for part in encoder.patches.given] == [3, 3, 3, 1]
    encoder.train()
    encoder.norm.eval()  # as where a pretrained tower is trained with its norms frozen
    model(torch.randn(1, 3, 12, 27))


@pytest.mark.parametrize("size", [(-5, 7), (0, 27), (8, 0), (8.0, 27)])
def test_plans_of_impossible_sizes_are_refused(size: tuple[int, int]) -> None:
    for model in (small_model(), small_model(grid=None)):
        with refuses(str(size[0])):
            model.plan(size)
        with refuses("tokens=", str(size[0])):
            model.plan((8, 27), tokens=size)


def test_refuses_what_cannot_be_called() -> None:
    with refuses("released", "or None", error=TypeError):
        DualViewEncoder(Patches(), "released")
    with refuses("encoder", "callable", error=TypeError):
        DualViewEncoder("clip", None)


def test_a_plan_for_another_grid_than_the_fixed_one_is_refused() -> None:
    model = DualViewEncoder(Patches(), DualPerspectiveEnhance.released(DIM), tile=TILE, grid=(2, 3))
    assert model.plan((8, 27), (2, 3)) == model.plan((8, 27))
    with refuses("grid=3x2", "fixed grid of 2x3", "omit"):
        model.plan((12, 18), (3, 2))
