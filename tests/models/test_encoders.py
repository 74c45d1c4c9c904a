"""Vision towers as encoders: the chosen layer, as a token map, and nothing computed after it."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from accelerate import cpu_offload
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AltCLIPVisionConfig,
    AltCLIPVisionModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    ChineseCLIPVisionConfig,
    ChineseCLIPVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DPTConfig,
    DPTModel,
    Idefics3VisionConfig,
    Idefics3VisionTransformer,
    InternVLVisionConfig,
    InternVLVisionModel,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    MLCDVisionConfig,
    MLCDVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    XCLIPVisionConfig,
    XCLIPVisionModel,
    YolosConfig,
    YolosModel,
)

from dualview import DualViewEncoder, HfEncoder, OpenClipEncoder, TimmEncoder, full_computation
from dualview.models.hf_tower import check_tower
from tests.checks import recorded, refuses

LAYERS = 3
TINY = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
TOWERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, {"intermediate_size": 64}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 64}),
    "dinov2": (Dinov2Model, Dinov2Config, {}),
    "dinov2_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"num_register_tokens": 3}),
}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_registers": 4}
hf_kinds = pytest.mark.parametrize("kind", TOWERS)


def hf_tower(kind: str, attention: str = "sdpa", **overrides: object) -> nn.Module:
    model, config, extra = TOWERS[kind]
    made = config(**{**TINY, **extra, **overrides})
    made._attn_implementation = attention
    return model(made).eval()


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.encoder.layers if hasattr(model.encoder, "layers") else model.encoder.layer


def as_map(tokens: Tensor, prefix: int, size: tuple[int, int]) -> Tensor:
    return tokens[:, prefix:].reshape(tokens.shape[0], *size, -1)


def calls_of(modules: dict[str, nn.Module]) -> list[str]:
    """A list that fills with the names of the modules as they run."""
    called: list[str] = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    return called


# --- transformers -----------------------------------------------------------------------------------------------------


@hf_kinds
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_hidden_states_of_a_full_run(kind: str, attention: str) -> None:
    model, pixels = hf_tower(kind, attention), torch.randn(3, 3, 28, 28)
    full = model(pixel_values=pixels, output_hidden_states=True)
    states = full.hidden_states
    assert len(states) == LAYERS + 1
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairwise(states))
    for layer in range(-LAYERS - 1, LAYERS + 1):
        assert torch.equal(HfEncoder(model, layer)(pixels), as_map(states[layer], PREFIX[kind], (4, 4))), layer
    assert torch.equal(HfEncoder(model)(pixels), as_map(states[-2], PREFIX[kind], (4, 4)))
    last = as_map(full.last_hidden_state, PREFIX[kind], (4, 4))
    assert torch.equal(HfEncoder(model, None)(pixels), last)
    assert torch.equal(last, HfEncoder(model, -1)(pixels)) == (kind == "clip")  # the others end in a norm


@hf_kinds
@pytest.mark.parametrize("layer", [0, 1, -2, -1])
def test_runs_nothing_after_the_chosen_layer(kind: str, layer: int) -> None:
    model = hf_tower(kind)
    blocks = {str(i): block for i, block in enumerate(blocks_of(model))}
    after = {name: module for name, module in model.named_children() if name not in ("embeddings", "encoder")}
    after.pop("pre_layrnorm", None)
    assert any("norm" in name for name in after)
    with recorded(blocks | after) as called:
        HfEncoder(model, layer)(torch.randn(2, 3, 28, 28)).square().sum().backward()
    run = layer if layer >= 0 else LAYERS + 1 + layer
    assert called == [str(i) for i in range(run)]
    for i, block in enumerate(blocks_of(model)):
        assert all((p.grad is not None) == (i < run) for p in block.parameters()), i
    assert all(p.grad is None for module in after.values() for p in module.parameters())
    used = [p for name, p in model.embeddings.named_parameters() if name != "mask_token"]
    assert all(p.grad is not None for p in used)


@hf_kinds
@pytest.mark.parametrize("layer", [0, 1, -2, -1, None])
def test_plan_of_layers(kind: str, layer: int | None) -> None:
    """What it says is what is run, planned and in full; the tokens are the same."""
    model, pixels = hf_tower(kind), torch.randn(2, 3, 28, 28)
    encoder = HfEncoder(model, layer)
    norm = next(child for name, child in model.named_children() if name in ("post_layernorm", "layernorm"))
    parts = {str(i): block for i, block in enumerate(blocks_of(model))} | {"norm": norm}
    with recorded(parts) as called:
        planned = encoder(pixels)
    assert encoder.layer_plan() == (len(called) - ("norm" in called), LAYERS, "norm" in called)
    with full_computation(), recorded(parts) as called:
        torch.testing.assert_close(encoder(pixels), planned)
        assert encoder.layer_plan() == (LAYERS, LAYERS, True)
    assert called == [*map(str, range(LAYERS)), "norm"]
    assert encoder.token_map((28, 28)) == planned.shape[1:3]


def test_a_tile_below_one_patch_is_refused() -> None:
    encoder = HfEncoder(hf_tower("dinov2", patch_size=(7, 14), image_size=(28, 56)))
    with refuses("6 x 28", "patch of Dinov2Model, 7 x 14", "larger tiles"):
        encoder.token_map((6, 28))
    assert encoder.token_map((7, 14)) == (1, 1)


def test_timm_model_that_lists_no_levels() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.feature_info = []
    assert TimmEncoder(model).layer_plan() is None


def test_token_map_of_other_tiles() -> None:
    encoder = HfEncoder(hf_tower("dinov2", patch_size=(7, 14), image_size=(28, 56)))
    assert encoder.token_map((30, 45)) == encoder(torch.randn(1, 3, 30, 45)).shape[1:3] == (4, 3)


@hf_kinds
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    plain = hf_tower(kind).train()
    frugal = copy.deepcopy(plain)
    getattr(frugal, "activation_checkpointing_enable", frugal.gradient_checkpointing_enable)()  # renamed in 5.23
    pixels, grads, runs = torch.randn(2, 3, 28, 28), [], []
    for model in (plain, frugal):
        # Before the call, since the second run stops as soon as it has what the backward pass needs.
        blocks_of(model)[0].mlp.register_forward_pre_hook(lambda *_, model=model: runs.append(model))
        HfEncoder(model, -2)(pixels).sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert runs == [plain, frugal, frugal]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_registers"])
@pytest.mark.parametrize("patch", [7, (7, 14)])
@pytest.mark.parametrize("layer", [-2, None])
def test_towers_that_interpolate_their_positions_take_any_tile(
    kind: str, patch: int | tuple[int, int], layer: int | None
) -> None:
    image = 28 if patch == 7 else (28, 56)
    model, pixels = hf_tower(kind, patch_size=patch, image_size=image), torch.randn(2, 3, 28, 42)
    size = (4, 6) if patch == 7 else (4, 3)
    full = model(pixel_values=pixels, output_hidden_states=True)
    tokens = full.last_hidden_state if layer is None else full.hidden_states[layer]
    assert torch.equal(HfEncoder(model, layer)(pixels), as_map(tokens, PREFIX[kind], size))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-2, None])
def test_towers_of_one_size_refuse_others(kind: str, layer: int | None) -> None:
    encoder = HfEncoder(hf_tower(kind), layer)
    for height, width in [(28, 42), (56, 56), (14, 56)]:  # the last has as many patches as 28 x 28
        with refuses(f"{height} x {width}", "tile=(28, 28)"):
            encoder(torch.randn(1, 3, height, width))
    with refuses("21 x 28", "tile=(28, 28)"):
        DualViewEncoder(encoder, None, tile=(21, 28))(torch.randn(1, 3, 42, 28))


def test_refuses_what_is_no_vision_tower() -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    two_towers = CLIPModel(CLIPConfig(text_config=text, vision_config={**TINY, "intermediate_size": 64}))
    with refuses("CLIPModel", "`vision_model`"):
        HfEncoder(two_towers)
    assert HfEncoder(two_towers.vision_model)(torch.randn(1, 3, 28, 28)).shape == (1, 4, 4, 32)
    with refuses("CLIPTextModel is not a vision tower", "config.patch_size"):
        HfEncoder(CLIPTextModel(CLIPTextConfig(**text)))
    with refuses("ConvNextModel", "wrap any other tower in a function"):
        HfEncoder(ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)))
    with refuses("Linear is not a vision tower"):
        HfEncoder(nn.Linear(2, 2))


@hf_kinds
def test_refuses_a_layer_that_does_not_exist(kind: str) -> None:
    model = hf_tower(kind)
    for layer in (LAYERS + 1, -LAYERS - 2):
        with refuses(f"layer={layer}", f"{LAYERS} layers", f"{-LAYERS - 1} to {LAYERS}"):
            HfEncoder(model, layer)
        with refuses(f"layer={layer}", f"{-LAYERS - 1} to {LAYERS}"):
            check_tower(model, layer)


NOT_LIKE_THEM = {  # and what the message says about each
    "InternVL": (
        InternVLVisionModel,
        InternVLVisionConfig,
        {"image_size": [28, 28], "patch_size": [7, 7]},
        "its layers take",
    ),
    "BLIP-2": (Blip2VisionModel, Blip2VisionConfig, {}, "['position_embedding']"),
    "YOLOS": (YolosModel, YolosConfig, {"image_size": [28, 28]}, "['detection_tokens']"),
    "DPT": (DPTModel, DPTConfig, {}, "its embeddings return"),
    "MLCD": (MLCDVisionModel, MLCDVisionConfig, {}, "'vision_rotary_embedding'"),
    "SigLIP 2": (Siglip2VisionModel, Siglip2VisionConfig, {}, "['spatial_shapes']"),
    "Idefics3": (Idefics3VisionTransformer, Idefics3VisionConfig, {}, "['patch_attention_mask']"),
    "Swin": (SwinModel, SwinConfig, {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}, "its embeddings return"),
    "Data2Vec": (Data2VecVisionModel, Data2VecVisionConfig, {}, "its layers take"),
    "X-CLIP": (XCLIPVisionModel, XCLIPVisionConfig, {}, "['pre_layernorm']"),
}


@pytest.mark.parametrize("kind", NOT_LIKE_THEM)
def test_refuses_towers_of_another_build_at_once(kind: str) -> None:
    model, config, changes, reason = NOT_LIKE_THEM[kind]
    sizes = {"image_size": 28} if kind == "Swin" else TINY | {"intermediate_size": 64}
    with torch.device("meta"):
        tower = model(config(**{**sizes, **changes}))
    for layer in (-2, None):
        with refuses(f"{model.__name__} is not a vision tower of the expected build", reason, "wrap any other tower"):
            HfEncoder(tower, layer)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (AltCLIPVisionModel, AltCLIPVisionConfig),
        (ChineseCLIPVisionModel, ChineseCLIPVisionConfig),
        (MetaClip2VisionModel, MetaClip2VisionConfig),
        (Aimv2VisionModel, Aimv2VisionConfig),
    ],
)
def test_other_towers_of_the_known_build(model: type[nn.Module], config: type) -> None:
    tower, pixels = model(config(**TINY, intermediate_size=64)).eval(), torch.randn(2, 3, 28, 28)
    for layer in (0, -2, -1):
        state = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
        assert torch.equal(HfEncoder(tower, layer)(pixels), as_map(state, state.shape[1] - 16, (4, 4)))


@pytest.mark.parametrize("layer", [1.0, True, "-2"])
def test_refuses_layers_that_are_no_integers(layer: object) -> None:
    timm_model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    for make in (partial(HfEncoder, hf_tower("clip")), partial(TimmEncoder, timm_model), OpenClipEncoder):
        with refuses(f"layer={layer!r}", "integer", error=TypeError):
            make(*([open_clip_model()] if make is OpenClipEncoder else []), layer)


# --- towers that are called whole -------------------------------------------------------------------------------------


class Subclass(CLIPVisionModel):
    """A tower of a user's own."""


def hook(name: str, register: str = "register_forward_hook") -> Callable[[nn.Module, list[str]], None]:
    def hang(tower: nn.Module, fired: list[str]) -> None:
        getattr(tower.get_submodule(name), register)(lambda *_: fired.append(name))

    return hang


def replace_forward(tower: nn.Module, fired: list[str]) -> None:
    own = tower.forward

    def forward(*args: object, **kwargs: object) -> object:
        fired.append("forward")
        return own(*args, **kwargs)

    tower.forward = forward


def offload(tower: nn.Module, fired: list[str]) -> None:
    cpu_offload(tower, torch.device("cpu"))
    fired.append("")


def shard(tower: nn.Module, fired: list[str]) -> None:
    for block in (*tower.encoder.layers, tower):
        fully_shard(block)
    fired.append("")


def use_own_class(tower: nn.Module, fired: list[str]) -> None:
    tower.__class__ = Subclass
    fired.append("")


HUNG = {
    "tower": hook(""),
    "tower, before": hook("", "register_forward_pre_hook"),
    "encoder": hook("encoder"),
    "layer left out": hook("encoder.layers.2"),
    "part of a layer left out": hook("encoder.layers.2.mlp.fc1", "register_forward_pre_hook"),
    "norm left out": hook("post_layernorm"),
    "forward of its own": replace_forward,
    "offloaded": offload,
    "sharded": shard,
    "own class": use_own_class,
}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, as sharding needs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", HUNG)
def test_a_tower_on_which_something_hangs_is_called_whole(way: str) -> None:
    """All of it fires, the tokens are those of the short cut, and the plan says that all layers are run."""
    tower, pixels, fired = hf_tower("clip"), torch.randn(2, 3, 28, 28), []
    encoder = HfEncoder(tower, -2)
    expected = encoder(pixels)
    states = copy.deepcopy(tower)(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert encoder.layer_plan() == (LAYERS - 1, LAYERS, False)
    with recorded({"norm": tower.post_layernorm}) as called:
        HUNG[way](tower, fired)
        out = encoder(pixels)
    assert torch.equal(out, expected)
    for layer in (0, 1, -1):
        assert torch.equal(HfEncoder(tower, layer)(pixels), as_map(states[layer], 1, (4, 4)))
    assert fired
    assert called[:1] == ["norm"]
    assert encoder.layer_plan() == (LAYERS, LAYERS, True)


def test_a_tower_that_was_asked_for_its_states_is_still_cut_short() -> None:
    """transformers leaves hooks of its own on all layers, which do nothing from then on."""
    tower, pixels = hf_tower("clip"), torch.randn(2, 3, 28, 28)
    tower(pixel_values=pixels, output_hidden_states=True)
    with recorded({"last": tower.encoder.layers[2]}) as called:
        HfEncoder(tower, -2)(pixels)
    assert not called


def test_a_class_of_a_users_own_says_what_its_states_are() -> None:
    class Doubled(CLIPVisionModel):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.hidden_states = tuple(2 * state for state in out.hidden_states)
            return out

    tower, pixels = hf_tower("clip"), torch.randn(2, 3, 28, 28)
    own = Doubled(tower.config).eval()
    own.load_state_dict(tower.state_dict())
    for layer in (0, -2):
        torch.testing.assert_close(HfEncoder(own, layer)(pixels), 2 * HfEncoder(tower, layer)(pixels))


@pytest.mark.parametrize("name", ["embeddings", "pre_layrnorm", "encoder.layers.0", "encoder.layers.1.mlp.fc1"])
def test_hooks_before_the_chosen_layer_fire_and_change_nothing(name: str) -> None:
    tower, pixels, fired = hf_tower("clip"), torch.randn(2, 3, 28, 28), []
    expected = HfEncoder(tower, -2)(pixels)
    hook(name)(tower, fired)
    with recorded({"norm": tower.post_layernorm, "last": tower.encoder.layers[2]}) as called:
        assert torch.equal(HfEncoder(tower, -2)(pixels), expected)
    assert fired == [name]
    assert not called


def test_a_wrapped_tower_is_called_by_its_wrapper() -> None:
    tower, pixels = hf_tower("clip"), torch.randn(2, 3, 28, 28)
    expected = HfEncoder(tower, -2)(pixels)
    lora = get_peft_model(tower, LoraConfig(target_modules=["q_proj"]))
    encoder = HfEncoder(lora, -2)
    assert torch.equal(encoder(pixels), expected), "adapters start at zero"
    assert encoder.layer_plan() == (LAYERS, LAYERS, True)
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(p)
    state = lora(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder(pixels), as_map(state, 1, (4, 4)))
    assert not torch.allclose(encoder(pixels), expected, atol=1e-3)


def test_holds_the_tower_as_a_submodule() -> None:
    model = hf_tower("clip")
    encoder = HfEncoder(model, -3)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}
    assert "layer=-3" in repr(encoder)


# --- timm -------------------------------------------------------------------------------------------------------------

SMALL = {"depth": LAYERS, "embed_dim": 48, "num_heads": 2}
TIMM = {  # and the tokens before those of the patches
    "class token": ("vit_tiny_patch16_224", SMALL, (32, 48), 1),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"init_values": 1.0}, (28, 42), 5),
    "no prefix": ("vit_base_patch16_siglip_224", SMALL, (32, 48), 0),
}


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("layer", [0, 1, -2, -1])
@pytest.mark.parametrize("norm", [False, True])
def test_timm_transformers(kind: str, layer: int, norm: bool) -> None:
    name, options, size, prefix = TIMM[kind]
    model, pixels = timm.create_model(name, img_size=size, **options).eval(), torch.randn(2, 3, *size)
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: states.append(out)) for block in model.blocks]
    model.forward_features(pixels)
    assert len(states) == LAYERS
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairwise(states))
    for hook in hooks:
        hook.remove()
    tokens = model.norm(states[layer]) if norm else states[layer]
    called = calls_of({str(i): block for i, block in enumerate(model.blocks)} | {"norm": model.norm})
    out = TimmEncoder(model, layer, norm=norm)(pixels)
    assert torch.equal(out, as_map(tokens, prefix, (2, 3)))
    assert called == [*(str(i) for i in range(layer % LAYERS + 1)), *(["norm"] if norm else [])]


@pytest.mark.parametrize(
    ("name", "stages", "layer", "run"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"], -2, 4),
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"], 1, 2),
        ("convnext_atto", ["stages.0", "stages.1", "stages.2", "stages.3"], -2, 3),
        ("convnext_atto", ["stages.0", "stages.1", "stages.2", "stages.3"], -1, 4),
    ],
)
def test_timm_convolutional_networks(name: str, stages: list[str], layer: int, run: int) -> None:
    model, pixels = timm.create_model(name).eval(), torch.randn(2, 3, 64, 96)
    outputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(stage).register_forward_hook(lambda _, __, out, s=stage: outputs.update({s: out}))
        for stage in stages
    ]
    model.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    called = calls_of({stage: model.get_submodule(stage) for stage in stages})
    out = TimmEncoder(model, layer)(pixels)
    assert torch.equal(out, outputs[stages[run - 1]].movedim(1, -1))
    assert out.shape[1] * 3 == out.shape[2] * 2, "height before width"
    assert called == stages[:run]


@pytest.mark.parametrize("name, last", [("vit_tiny_patch16_224", "norm"), ("resnet18", "layer4")])
@pytest.mark.parametrize("layer", [1, -2, -1])
def test_timm_plan_of_layers(name: str, last: str, layer: int) -> None:
    options = SMALL | {"img_size": 64} if name.startswith("vit") else {}
    model, pixels = timm.create_model(name, **options).eval(), torch.randn(2, 3, 64, 64)
    called, encoder = calls_of({last: model.get_submodule(last)}), TimmEncoder(model, layer)
    total = LAYERS if name.startswith("vit") else 5
    planned = encoder(pixels)
    assert encoder.layer_plan() == (layer % total + 1, total, False)
    assert called == ([last] if (name, layer) == ("resnet18", -1) else [])
    called.clear()
    with full_computation():
        assert torch.equal(encoder(pixels), planned)
        assert encoder.layer_plan() == (total, total, last == "norm")
    assert called == [last]


def test_timm_encoder_holds_the_model_and_refuses_others() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    encoder = TimmEncoder(model, -1, norm=True)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}
    assert "layer=-1, norm=True" in repr(encoder)
    with refuses("Linear has no `forward_intermediates`", "function (T, 3, h, w) -> (T, h', w', D)"):
        TimmEncoder(nn.Linear(2, 2))
    for layer in (1, 7, -2):
        with refuses(f"layer={layer} does not exist", "VisionTransformer has 1 blocks or stages", "-1 to 0"):
            TimmEncoder(model, layer)


# --- open_clip --------------------------------------------------------------------------------------------------------


def open_clip_model() -> CLIP:
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    vision = CLIPVisionCfg(layers=LAYERS, width=32, head_width=16, patch_size=8, image_size=(16, 24))
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()


@pytest.mark.parametrize("layer", [0, 1, -2, -1])
@pytest.mark.parametrize("norm", [False, True])
def test_open_clip_tower(layer: int, norm: bool) -> None:
    model, pixels = open_clip_model(), torch.randn(3, 3, 16, 24)
    tower, states = model.visual, []
    hooks = [b.register_forward_hook(lambda _, __, out: states.append(out)) for b in tower.transformer.resblocks]
    model.encode_image(pixels)
    assert len(states) == LAYERS
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairwise(states))
    for hook in hooks:
        hook.remove()
    tokens = tower.ln_post(states[layer]) if norm else states[layer]
    called = calls_of({str(i): block for i, block in enumerate(tower.transformer.resblocks)} | {"norm": tower.ln_post})
    out = OpenClipEncoder(model, layer, norm=norm)(pixels)
    assert torch.equal(out, as_map(tokens, 1, (2, 3)))
    assert called == [*(str(i) for i in range(layer % LAYERS + 1)), *(["norm"] if norm else [])]
    assert torch.equal(OpenClipEncoder(tower, layer, norm=norm)(pixels), out)


def test_open_clip_with_a_timm_tower() -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 32}
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    model, pixels = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval(), torch.randn(2, 3, 32, 32)
    model.visual.set_input_size(32)
    called = calls_of({str(i): block for i, block in enumerate(model.visual.trunk.blocks)})
    out = OpenClipEncoder(model)(pixels)
    assert called == [str(i) for i in range(11)]
    assert torch.equal(out, TimmEncoder(model.visual.trunk, -2)(pixels))
    assert OpenClipEncoder(model).layer_plan() == (11, 12, False)


def test_open_clip_tower_of_unknown_layers() -> None:
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=64)
    encoder = OpenClipEncoder(CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval(), -1)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 2, 2, 256)
    assert encoder.layer_plan() is None


@pytest.mark.parametrize("layer", [0, -2])
def test_open_clip_plan_of_layers(layer: int) -> None:
    model, pixels = open_clip_model(), torch.randn(3, 3, 16, 24)
    encoder, norm = OpenClipEncoder(model, layer), OpenClipEncoder(model, layer, norm=True)
    blocks = {str(i): block for i, block in enumerate(model.visual.transformer.resblocks)}
    planned, called = encoder(pixels), calls_of(blocks | {"norm": model.visual.ln_post})
    assert encoder.layer_plan() == (layer % LAYERS + 1, LAYERS, False)
    assert norm.layer_plan() == (layer % LAYERS + 1, LAYERS, True)
    with full_computation():
        assert torch.equal(encoder(pixels), planned)
        assert encoder.layer_plan() == norm.layer_plan() == (LAYERS, LAYERS, True)
    assert called == [*blocks, "norm"]


def test_open_clip_encoder_holds_the_tower_and_refuses_others() -> None:
    model = open_clip_model()
    encoder = OpenClipEncoder(model, -1)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.visual.parameters()}
    assert "layer=-1, norm=False" in repr(encoder)
    with refuses("Linear has no `forward_intermediates`"):
        OpenClipEncoder(nn.Linear(2, 2))
    for layer in (LAYERS, -LAYERS - 1):
        with refuses(f"layer={layer} does not exist", f"-{LAYERS} to {LAYERS - 1}"):
            OpenClipEncoder(model, layer)
