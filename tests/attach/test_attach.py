"""Attaching and detaching: against a reference that encodes each view on its own, and what is refused."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn import functional as F

import dualview as dv
from tests import reference
from tests.attach.hosts import built, inputs_for, often
from tests.attach.matrix import gradients, logits, open_gates, ours, trial_of
from tests.checks import refuses

GRID = (2, 3)


def calls_of(module: nn.Module, run: object) -> list[tuple[tuple, dict, object]]:
    """Arguments and results of a module while something runs; hosts change the results afterwards."""
    seen = []
    handle = module.register_forward_hook(lambda m, a, k, o: seen.append((a, k, copy.deepcopy(o))), with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    return seen


def views_of(image: Tensor, grid: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Local and stride tiles of (C, H, W), each of that size."""
    size = (image.shape[1] * grid[0], image.shape[2] * grid[1])
    return tiles_of(F.interpolate(image[None], size, mode="bicubic", align_corners=False)[0], grid)


def tiles_of(image: Tensor, grid: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Local and stride tiles of (C, H, W)."""
    planes = image.movedim(0, -1)
    return tuple([tile.movedim(-1, 0) for tile in reference.cut(planes, grid, kind)] for kind in ("local", "global"))


def enhanced(
    module: nn.Module, low: Tensor, local: list[Tensor], stride: list[Tensor], grid: tuple[int, int]
) -> Tensor:
    """Of one image, by the equations: half of the way from the features to the DEM's, as far as the gate is open."""
    with dv.full_computation(), torch.no_grad():
        out = module.dems[0](torch.stack(local)[None], torch.stack(stride)[None], grid)[0]
        return (1 - module.gate) * low + module.gate * (low + out) / 2


# --- Square towers ----------------------------------------------------------------------------------------------------


def as_map(tokens: Tensor, side: int) -> Tensor:
    return tokens.movedim(0, -1) if tokens.dim() == 3 else tokens[-side * side :].unflatten(0, (side, side))


@pytest.mark.parametrize(
    ("family", "inner", "field", "index", "side"),
    [
        ("llava", "", "hidden_states", -2, 4),
        pytest.param("internvl", "", "last_hidden_state", None, 4, marks=pytest.mark.more),
        ("llama4", "", "last_hidden_state", None, 2),
        pytest.param("gemma3n", "", "last_hidden_state", None, 2, marks=pytest.mark.more),
        pytest.param("ovis2", "transformer", "last_hidden_state", None, 4, marks=pytest.mark.more),
    ],
)
def test_square_towers_against_one_call_for_each_view(family, inner, field, index, side):
    trial = trial_of(family)
    model = trial.model(True, grid=GRID)
    tower, plain = (m.get_encoder(modality="image").get_submodule(inner) for m in (model, trial.bare))
    ((args, kwargs, before),) = calls_of(plain, lambda: logits(trial.bare, trial.inputs))
    ((_, _, found),) = calls_of(tower, lambda: logits(model, trial.inputs))
    rest = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "patch_attention_mask")}
    pixels = args[0] if args else kwargs["pixel_values"]

    def read(output: object) -> Tensor:
        value = getattr(output, field)
        return value if index is None else value[index]

    def encode(image: Tensor) -> Tensor:
        with torch.no_grad():
            return read(plain(image[None], **rest))[0]

    for image, tokens in zip(pixels, read(found), strict=True):
        low = encode(image)
        local, stride = ([as_map(encode(view), side) for view in views] for views in views_of(image, GRID))
        expected = enhanced(tower.dualview, as_map(low, side), local, stride, GRID)
        torch.testing.assert_close(as_map(tokens, side), expected, rtol=1e-4, atol=1e-5)
    if read(found).dim() == 3:
        assert torch.equal(read(found)[:, : -side * side], read(before)[:, : -side * side])  # class token and registers


@pytest.mark.parametrize("layers", [[-1], [1, -2], [-1, -2, 1]])
def test_each_layer_has_a_module_of_its_own(layers):
    trial = trial_of("vipllava")  # reads hidden states -1, -2 and 1
    model = trial.model(True, layers=layers)
    ((_, _, before),) = calls_of(trial.bare.get_encoder(modality="image"), lambda: logits(trial.bare, trial.inputs))
    ((_, _, after),) = calls_of(model.get_encoder(modality="image"), lambda: logits(model, trial.inputs))
    changed = {i for i in (-1, -2, 1) if not torch.equal(before.hidden_states[i], after.hidden_states[i])}
    assert changed == set(layers)
    assert len(model.get_encoder(modality="image").dualview.dems) == len(layers)
    found = gradients(model, trial.inputs)
    assert all(found[name].abs().sum() > 0 for name in ours(model))


def test_the_deepest_layer_is_the_default():
    assert dv.attach(built("vipllava")).get_encoder(modality="image")._dualview_attachment.layers == (-1,)
    assert dv.attach(built("qwen3_vl")).get_encoder(modality="image")._dualview_attachment.layers == (-1,)


def test_a_call_that_reads_another_layer():
    """Newer transformers collect that layer alone, which is an error; older ones collect all, and it is the host's."""
    trial = trial_of("llava")
    pixels = trial.inputs["pixel_values"]

    def features(model: nn.Module) -> list[Tensor]:
        return model.model.get_image_features(pixels, vision_feature_layer=-1).pooler_output

    ((_, _, collected),) = calls_of(trial.bare.get_encoder(modality="image"), lambda: features(trial.bare))
    if collected.hidden_states[-2] is None:
        with refuses("hidden_states[-2]", "vision_feature_layer"):
            features(trial.model(True))
    else:
        found, plain = features(trial.model(True)), features(trial.bare)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


# --- Packed towers ----------------------------------------------------------------------------------------------------


def flat_arguments(image: Tensor) -> dict[str, Tensor]:
    """(C*T, H, W) with patches of 4 pixels, in blocks of 2 x 2 patches."""
    rows, cols = image.shape[1] // 4, image.shape[2] // 4
    patches = [
        image[:, (r + i) * 4 : (r + i + 1) * 4, (c + j) * 4 : (c + j + 1) * 4].flatten()
        for r in range(0, rows, 2)
        for c in range(0, cols, 2)
        for i in range(2)
        for j in range(2)
    ]
    return {"hidden_states": torch.stack(patches), "grid_thw": torch.tensor([[1, rows, cols]])}


def row_patches(image: Tensor) -> Tensor:
    rows, cols = image.shape[1] // 4, image.shape[2] // 4
    cut = [image[:, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] for r in range(rows) for c in range(cols)]
    return torch.stack([patch.movedim(0, -1).flatten() for patch in cut])[None]


def naflex_arguments(image: Tensor) -> dict[str, Tensor]:
    patches, shape = row_patches(image), [[image.shape[1] // 4, image.shape[2] // 4]]
    mask = torch.ones(patches.shape[:2], dtype=torch.int32)
    return {"pixel_values": patches, "spatial_shapes": torch.tensor(shape), "pixel_attention_mask": mask}


def gemma4_arguments(image: Tensor) -> dict[str, Tensor]:
    rows, cols = image.shape[1] // 4, image.shape[2] // 4
    positions = torch.tensor([[[c, r] for r in range(rows) for c in range(cols)]])
    return {"pixel_values": row_patches(image), "pixel_position_ids": positions}


def pixtral_arguments(image: Tensor) -> dict[str, object]:
    return {"pixel_values": image[None], "image_sizes": [image.shape[1:]], "output_hidden_states": True}


def image_of(family: str, arguments: dict[str, Tensor], index: int) -> Tensor:
    """One of the two images, 16 x 24 and 24 x 16, put together pixel by pixel."""
    height, width = [(16, 24), (24, 16)][index]
    pixels = arguments["pixel_values"]
    if family in ("mistral3", "llava_pixtral"):
        return pixels[index, :, :height, :width]
    image = torch.empty(6 if pixels.dim() == 2 else 3, height, width)
    for r in range(height // 4):
        for c in range(width // 4):
            if pixels.dim() == 2:
                blocks = (r // 2) * (width // 8) + c // 2
                patch = pixels[24 * index + 4 * blocks + 2 * (r % 2) + c % 2].reshape(6, 4, 4)
            else:
                patch = pixels[index, r * (width // 4) + c].reshape(4, 4, 3).movedim(-1, 0)
            image[:, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] = patch
    return image


FLAT = (flat_arguments, lambda out: out.pooler_output, 8)
PACKED_FAMILIES = {
    "qwen2_vl": FLAT,
    "qwen2_5_vl": FLAT,
    "qwen3_vl": FLAT,
    "glm4v": FLAT,
    "mistral3": (pixtral_arguments, lambda out: out.hidden_states[-1][0], 4),
    "llava_pixtral": (pixtral_arguments, lambda out: out.hidden_states[-1][0], 4),
    "lfm2_vl": (naflex_arguments, lambda out: out.last_hidden_state.flatten(0, 1), 4),
    "gemma4": (gemma4_arguments, lambda out: out.last_hidden_state, 8),
}


OF_EACH_KIND = ("qwen2_5_vl", "mistral3", "lfm2_vl", "gemma4")


@pytest.mark.parametrize("family", often(PACKED_FAMILIES, *OF_EACH_KIND))
def test_packed_towers_against_one_call_for_each_view(family):
    arguments, read, stride = PACKED_FAMILIES[family]
    trial = trial_of(family)
    model = trial.model(True, grid=GRID)
    tower, plain = (m.get_encoder(modality="image") for m in (model, trial.bare))
    ((_, _, found),) = calls_of(tower, lambda: logits(model, trial.inputs))
    tokens = found.last_hidden_state if family == "lfm2_vl" else read(found)

    def encode(view: Tensor) -> Tensor:
        with torch.no_grad():
            return read(plain(**arguments(view))).unflatten(0, (view.shape[1] // stride, view.shape[2] // stride))

    for index in range(2):
        image = image_of(family, trial.inputs, index)
        local, strided = ([encode(view) for view in views] for views in views_of(image, GRID))
        expected = enhanced(tower.dualview, encode(image), local, strided, GRID).flatten(0, 1)
        count = len(expected)
        own = tokens[index, :count] if family == "lfm2_vl" else tokens[index * count : (index + 1) * count]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


NATIVE = {"mistral3": (2, 2), "llava_pixtral": (2, 2), "lfm2_vl": (2, 2)}
"""Grids that the pictures of 16 x 24 and 24 x 16 pixels suit: a token of the others is 8 pixels."""


@pytest.mark.parametrize("family", often(PACKED_FAMILIES, "qwen2_5_vl", "mistral3"))
def test_tiles_of_the_picture_itself_against_one_call_for_each_view(family):
    arguments, read, stride = PACKED_FAMILIES[family]
    trial, grid = trial_of(family), NATIVE.get(family, (2, 1))
    model = trial.model(True, grid=grid, source="native")
    tower, plain = (m.get_encoder(modality="image") for m in (model, trial.bare))
    pictures = [torch.randn(6 if stride == 8 and family != "gemma4" else 3, 16, side) for side in (16, 16, 24)]
    if family == "gemma4":
        pictures = [picture.sigmoid() for picture in pictures]

    def encode(view: Tensor, by: nn.Module = plain) -> Tensor:
        with torch.no_grad():
            return read(by(**arguments(view))).unflatten(0, (view.shape[1] // stride, view.shape[2] // stride))

    for picture in pictures:
        local, strided = ([encode(view) for view in views] for views in tiles_of(picture, grid))
        expected = enhanced(tower.dualview, encode(picture), local, strided, grid)
        torch.testing.assert_close(encode(picture, tower), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", often(["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"], "qwen3_vl"))
def test_packed_pictures_with_larger_ones_behind_each(family):
    trial = trial_of(family)
    model = trial.model(True, grid=GRID, source="hires")
    tower, plain = (m.get_encoder(modality="image") for m in (model, trial.bare))
    sizes = (16, 24), (24, 16), (16, 24)
    small = [torch.randn(6, *size) for size in sizes]
    large = [torch.randn(6, size[0] * GRID[0], size[1] * GRID[1]) for size in sizes]
    rows = [flat_arguments(one) for both in zip(small, large, strict=True) for one in both]
    given = {
        "hidden_states": torch.cat([one["hidden_states"] for one in rows]),
        "grid_thw": torch.cat([one["grid_thw"] for one in rows[::2]]),
    }

    def encode(view: Tensor) -> Tensor:
        with torch.no_grad():
            return plain(**flat_arguments(view)).pooler_output.unflatten(0, (view.shape[1] // 8, view.shape[2] // 8))

    with torch.no_grad():
        found = tower(**given).pooler_output.split([6, 6, 6])
    for low, high, tokens in zip(small, large, found, strict=True):
        local, strided = ([encode(view) for view in views] for views in tiles_of(high, GRID))
        expected = enhanced(tower.dualview, encode(low), local, strided, GRID).flatten(0, 1)
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    with refuses("24 patches", "7 times", "adapt_processor"), torch.no_grad():
        tower(**flat_arguments(small[0]))


@pytest.mark.parametrize("family", ["llava", "mistral3", "qwen2_vl"])
def test_no_view_is_encoded_that_nobody_needs(family):
    trial = trial_of(family)
    model = trial.model(True, max_tiles_per_pass=1)
    tower, seen = model.get_encoder(modality="image"), []
    block = next(m for name, m in tower.named_modules() if name.endswith(("layers.0", "blocks.0")))
    block.register_forward_hook(lambda *_: seen.append(1))
    logits(model, trial.inputs)
    assert len(seen) == 1 + 2 * 8  # two pictures, four local and four stride tiles each


def test_frames_of_a_video_are_enhanced_as_pictures_are():
    trial = trial_of("qwen2_5_vl")
    tower = trial.model(True).get_encoder(modality="image")
    frames = torch.randn(3 * 24, 3 * 2 * 4 * 4)
    with torch.no_grad():
        video = tower(frames, grid_thw=torch.tensor([[3, 4, 6]])).pooler_output
        pictures = tower(frames, grid_thw=torch.tensor([[1, 4, 6]] * 3)).pooler_output
    torch.testing.assert_close(video, pictures)


def test_deepstack_levels_by_option():
    trial = trial_of("qwen3_vl")  # levels 0 and 1, and the output
    model = trial.model(True, layers=[0, 1, -1])
    features, plain = (m.model.get_image_features(**trial.images) for m in (model, trial.bare))
    for level, before in zip(features.deepstack_features, plain.deepstack_features, strict=True):
        assert not torch.allclose(level[0], before[0])
    found = gradients(model, trial.inputs)
    assert len(model.get_encoder(modality="image").dualview.dems) == 3
    assert all(found[name].abs().sum() > 0 for name in ours(model))


# --- Passes, types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "mistral3"])
def test_passes_change_nothing(family):
    trial = trial_of(family)
    results = [logits(trial.model(True, max_tiles_per_pass=n), trial.inputs) for n in (None, 1, 5, 64)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_bfloat16_at_step_0_is_bit_equal(family):
    trial = trial_of(family)
    host = copy.deepcopy(trial.bare).bfloat16()
    before = logits(host, trial.inputs)
    assert torch.equal(logits(dv.attach(host), trial.inputs), before)
    assert {p.dtype for p in ours(host).values()} == {torch.bfloat16}


def test_a_module_in_float32_in_a_host_of_bfloat16():
    trial = trial_of("llava")
    host = copy.deepcopy(trial.bare).bfloat16()
    dv.attach(host, dem={"preset": "paper", "gate": True, "dtype": torch.float32})
    open_gates(host)
    assert {p.dtype for p in ours(host).values()} == {torch.float32}
    assert logits(host, trial.inputs).dtype == torch.bfloat16


def test_presets_and_modules_of_ones_own():
    trial = trial_of("llava")
    own = dv.DualPerspectiveEnhance.released(32), dv.DualPerspectiveEnhance.released(32, gate=True)
    for dem in ({"preset": "paper"}, *own):
        model = trial.model(True, gates=False, dem=dem)
        assert torch.equal(logits(model, trial.inputs), trial.before)
        assert [name.endswith("gate") for name in ours(model)].count(True) == 1
        open_gates(model)
        assert not torch.allclose(logits(model, trial.inputs), trial.before)
    without = trial.model(True, dem={"preset": "paper", "gate": False})
    assert not any(name.endswith("gate") for name in ours(without))
    assert not torch.allclose(logits(without, trial.inputs), trial.before)


def test_released_weights_go_into_a_host_of_their_width():
    host = built("llava")
    dem = dv.attach(host).get_encoder(modality="image").dualview.dems[0]
    weights = dv.DualPerspectiveEnhance.released(32).released_state_dict()
    dem.load_released(weights)
    assert torch.equal(dem.attentions[0].q_proj.weight, weights["attention.linears.0.weight"])


@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize("family", often(["llava", "qwen2_5_vl"], "llava"))
def test_offloaded_by_accelerate(family, first):
    trial = trial_of(family)
    expected = logits(trial.model(True), trial.inputs)
    model = copy.deepcopy(trial.bare)
    torch.manual_seed(1)
    for step in ("attach", "offload") if first == "attach" else ("offload", "attach"):
        if step == "attach":
            open_gates(dv.attach(model))
        else:
            cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(logits(model, trial.inputs), expected)
    assert torch.equal(logits(dv.detach(model), trial.inputs), trial.before)


# --- Several images --------------------------------------------------------------------------------------------------


def test_batches_of_several_images():
    for family in ("internvl", "qwen3_vl"):
        trial = trial_of(family)
        inputs = inputs_for(trial.bare, family, images=2)
        assert torch.equal(logits(dv.attach(copy.deepcopy(trial.bare)), inputs), logits(trial.bare, inputs))
