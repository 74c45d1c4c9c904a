"""INF-LLaVA: goldens of the released encoder, and what a transformers user expects of a model and a processor."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Model,
    SiglipVisionModel,
    pipeline,
)

import dualview as dv
from dualview.models import (
    InfLlavaConfig,
    InfLlavaForConditionalGeneration,
    InfLlavaImageProcessor,
    InfLlavaModel,
    InfLlavaProcessor,
)
from dualview.models.inf_llava.modeling_inf_llava import _valid_pixels
from tests.checks import recorded, refuses
from tests.tiny import (
    IMAGE,
    TINY_LLM,
    TINY_TOWER,
    photograph,
    prompt,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


# --- the released encoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [336, 1008])
def test_reproduces_the_released_encoder(size):
    """From normalised pixels to projected tokens: 336 pixels are enlarged inside, 1008 are not."""
    path = GOLDEN / f"released_encode_{size}.safetensors"
    with safe_open(path, "pt") as file:
        tower = json.loads(file.metadata()["clip_config"])
    golden = load_file(path)
    torch.manual_seed(0)
    model = InfLlavaModel(
        InfLlavaConfig(vision_config=tower, text_config=dict(TINY_LLM), image_token_id=IMAGE)
    ).double()
    model.vision_tower.load_state_dict(
        {k.removeprefix("vision_tower."): v for k, v in golden.items() if k.startswith("vision_tower.")}
    )
    assert model.dem.load_released(golden) == ((), ())
    projector = {"linear_1": "mm_projector.0", "linear_2": "mm_projector.2"}
    model.multi_modal_projector.load_state_dict(
        {f"{new}.{leaf}": golden[f"{old}.{leaf}"] for new, old in projector.items() for leaf in ("weight", "bias")}
    )
    y = torch.arange(size, dtype=torch.float64).view(1, 1, -1, 1)
    x = torch.arange(size, dtype=torch.float64).view(1, 1, 1, -1)
    c = torch.arange(3, dtype=torch.float64).view(1, 3, 1, 1)
    pixels = torch.sin(0.013 * y * (c + 1)) * torch.cos(0.017 * x * (c + 1) - 0.2 * c) + 0.2 * torch.sin(
        0.11 * x + 0.07 * y
    )
    with torch.no_grad():
        tokens = torch.stack(model.get_image_features(pixels.float().double()).pooler_output)
    assert tokens.shape == golden["output"].shape
    assert (tokens - golden["output"]).abs().max() < 2e-6


def test_default_config_is_the_released_model():
    config = InfLlavaConfig()
    assert (config.grid, config.image_seq_length, config.low_res, config.dem) == (
        (3, 3),
        576,
        "mean",
        {"preset": "released"},
    )
    assert config.vision_feature_layer == -2
    assert config.tile == (336, 336)
    with torch.device("meta"):
        model = InfLlavaForConditionalGeneration(config)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.model.named_children()}
    assert counts["dem"] == 4_400_256
    assert counts["multi_modal_projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    # Llama-3-8B without its head has 8_030_261_248 - 128256 * 4096 parameters; the vocabulary here is 64 rows larger
    assert counts["language_model"] == 8_030_261_248 - 128256 * 4096 + 64 * 4096
    assert counts["vision_tower"] == 303_507_456


def test_default_parts_are_those_that_were_published():
    """The configurations of Llama-3-8B-Instruct and of CLIP ViT-L/14-336, value by value."""
    config = InfLlavaConfig()
    llama = {
        "vocab_size": 128320,  # 128256 published, a padding and an image token, 62 rows to a multiple of 64
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "pad_token_id": 128256,
    }
    clip = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 768,
    }
    assert isinstance(config.text_config, LlamaConfig)
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert {key: getattr(config.text_config, key) for key in llama} == llama
    assert {key: getattr(config.vision_config, key) for key in clip} == clip
    assert (config.image_token_id, config.projector_hidden_act) == (128257, "gelu")


@pytest.mark.parametrize("layer", [0, 1, -2, -1])
@pytest.mark.parametrize("low_res", ["mean", "add", None])
@pytest.mark.parametrize("preset", ["released", "paper", "direct"])
def test_image_path_agrees_with_the_dual_view_encoder(layer, low_res, preset):
    model = tiny_model(vision_feature_layer=layer, low_res=low_res, dem={"preset": preset})
    encoder = dv.DualViewEncoder(
        dv.HfEncoder(model.model.vision_tower, layer), model.model.dem, tile=(28, 28), grid=(2, 3), low_res=low_res
    )
    pixels = torch.randn(2, 3, 56, 84)
    with torch.no_grad():
        out = model.get_image_features(pixels)
        expected = encoder(pixels).flatten(1, 2)
    assert torch.equal(out.last_hidden_state, expected)
    assert torch.equal(torch.stack(out.pooler_output), model.model.multi_modal_projector(expected))


@pytest.mark.parametrize(("name", "function"), [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu)])
def test_projector_uses_the_configured_activation(name, function):
    projector = tiny_model(projector_hidden_act=name).model.multi_modal_projector
    features = torch.randn(2, 4, 32)
    expected = projector.linear_2(function(projector.linear_1(features)))
    torch.testing.assert_close(projector(features), expected)


@pytest.mark.parametrize("most", [1, 4, 100])
def test_tower_is_called_with_at_most_max_tiles_per_pass(most):
    model, pixels, sizes = tiny_model(), torch.randn(2, 3, 56, 84), []
    expected = model.get_image_features(pixels).last_hidden_state
    model.model.max_tiles_per_pass = most
    model.model.vision_tower.embeddings.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[0]))
    torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, expected)
    assert all(size == most for size in sizes[:-1])
    assert 0 < sizes[-1] <= most


def test_layers_that_do_not_exist_are_refused():
    for layer in (4, -5):
        with refuses(f"layer={layer} does not exist", "-4 to 3"):
            tiny_model(vision_feature_layer=layer)


def test_layers_after_the_chosen_one_are_not_run():
    model = tiny_model()
    tower = model.model.vision_tower
    parts = {str(i): layer for i, layer in enumerate(tower.encoder.layers)} | {"norm": tower.post_layernorm}
    with recorded(parts) as called:
        model.get_image_features(torch.randn(1, 3, 56, 84))
    assert set(called) == {"0", "1"}


def test_mixed_grids_equal_one_image_at_a_time():
    model = tiny_model()
    images = [torch.randn(3, 56, 84), torch.randn(3, 28, 28), torch.randn(3, 84, 28)]
    grids = torch.tensor([[2, 3], [1, 1], [3, 1]])
    tiles = [dv.local_crop(image, tuple(grid)) for image, grid in zip(images, grids.tolist(), strict=True)]
    with torch.no_grad():
        together = model.get_image_features(torch.cat(tiles), grids)
        assert together.last_hidden_state.shape == (3, 4, 32)
        for i, tile in enumerate(tiles):
            alone = model.get_image_features(tile, grids[i : i + 1])
            torch.testing.assert_close(together.last_hidden_state[i : i + 1], alone.last_hidden_state)
        same = model.get_image_features(images[0][None])  # the configured grid
    torch.testing.assert_close(together.pooler_output[0], same.pooler_output[0])
    for wrong in (torch.cat(tiles)[:-1], torch.cat(tiles)[..., :14]):
        with refuses("expected 10 tiles of 28 x 28"):
            model.get_image_features(wrong, grids)


def test_mixed_grids_do_not_attend_to_padding():
    """As a `DualViewEncoder` that is told which pixels are real; sizes that fill their canvas change nothing."""
    model = tiny_model()
    encoder = dv.DualViewEncoder(dv.HfEncoder(model.model.vision_tower), model.model.dem, tile=(28, 28))
    images, sizes = [torch.randn(3, 56, 84), torch.randn(3, 28, 56)], [(40, 84), (28, 29)]
    grids = [(2, 3), (1, 2)]
    tiles = torch.cat([dv.local_crop(image, grid) for image, grid in zip(images, grids, strict=True)])
    valid = [torch.zeros(image.shape[1:], dtype=torch.bool) for image in images]
    for mask, (height, width) in zip(valid, sizes, strict=True):
        mask[:height, :width] = True

    def tokens(image_sizes=None):
        image_sizes = None if image_sizes is None else torch.tensor(image_sizes)
        return model.get_image_features(tiles, torch.tensor(grids), image_sizes).last_hidden_state

    with torch.no_grad():
        torch.testing.assert_close(tokens(sizes), encoder(images, valid).flatten(1, 2))
        assert not torch.allclose(tokens(sizes), tokens(), atol=1e-4)
        assert torch.equal(tokens([(56, 84), (28, 56)]), tokens())
        ids, pixels = prompt(2), {"pixel_values": tiles, "image_grids": torch.tensor(grids)}
        logits = model(input_ids=ids, image_sizes=torch.tensor(sizes), **pixels).logits
        by_hand = model(
            input_ids=ids,
            mm_encoder_outputs={"image": model.get_image_features(**pixels, image_sizes=torch.tensor(sizes))},
        ).logits
        assert torch.equal(logits, by_hand)
    masks = _valid_pixels(images, torch.tensor(sizes))
    assert all(mask.dtype == torch.bool and torch.equal(mask, real) for mask, real in zip(masks, valid, strict=True))
    for wrong in ([(57, 84), (28, 56)], [(0, 84), (28, 56)]):
        with refuses("image_sizes", "(56, 84)", "size of the picture on its canvas"):
            tokens(wrong)
    with refuses("image_sizes=", "(1, 2)", "image_grids=", "for every image"):
        tokens([(56, 84)])
    with refuses("image_sizes", "omit it"):
        model.get_image_features(torch.randn(1, 3, 56, 84), image_sizes=torch.tensor([[56, 84]]))


def test_sizes_that_fill_their_canvas_need_no_mask():
    """So that a tower whose tile is no whole number of tokens, as SigLIP's of 384 pixels, takes them."""
    model = tiny_model(vision_config=TINY_TOWER | {"image_size": 31})
    tiles, grids = torch.randn(2, 3, 31, 31), torch.tensor([[1, 2]])
    full = model.get_image_features(tiles, grids, torch.tensor([[31, 62]])).last_hidden_state
    assert torch.equal(full, model.get_image_features(tiles, grids).last_hidden_state)


def test_noise_in_padding_reaches_no_key():
    """A query at a real token gives the same result whatever lies in cells of padding alone."""
    model = tiny_model(low_res=None, vision_feature_layer=0)  # a tower that looks at one patch at a time
    noise = torch.zeros(1, 3, 56, 84)
    noise[..., 28:, :] = 3  # the lower row of tiles
    pixels = torch.randn(1, 3, 56, 84)
    for sizes in (torch.tensor([[28, 84]]), None):
        with torch.no_grad():
            before, after = (
                model.get_image_features(dv.local_crop(x, (2, 3)).flatten(0, 1), torch.tensor([[2, 3]]), sizes)
                for x in (pixels, pixels + noise)
            )
        same = torch.isclose(before.last_hidden_state, after.last_hidden_state, atol=1e-5).all(-1)
        # One tile of 2 x 2 tokens: the upper tokens are read at the picture, the lower ones at the padding.
        assert same.tolist() == [[sizes is not None] * 2 + [False] * 2]


# --- the model, as transformers users use it --------------------------------------------------------------------------


def test_loss_is_that_of_shifted_labels_and_reaches_every_part():
    model = tiny_model()
    ids = prompt(2)
    labels = ids.masked_fill(ids == IMAGE, -100)
    out = model(input_ids=ids, pixel_values=torch.randn(2, 3, 56, 84), labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("model.vision_tower.encoder.layers.2", "model.vision_tower.post_layernorm"))
    }
    assert all(
        p.grad.abs().sum() > 0
        for name, p in model.named_parameters()
        if name.startswith("model.dem") and "k_proj.bias" not in name
    )


def test_loss_is_divided_by_the_items_of_the_whole_batch():
    """As `Trainer` asks for when it accumulates gradients."""
    model, ids = tiny_model(), torch.tensor([[1, 5, 6, 7]])
    out = model(input_ids=ids, labels=ids, num_items_in_batch=7)
    expected = F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum") / 7
    torch.testing.assert_close(out.loss, expected)


def test_text_alone_and_embeddings_in_place_of_ids():
    model = tiny_model()
    with torch.no_grad():
        ids = torch.tensor([[1, 5, 6, 7]])
        assert model(input_ids=ids).logits.shape == (1, 4, 64)
        ids, pixels = prompt(), torch.randn(1, 3, 56, 84)
        expected = model(input_ids=ids, pixel_values=pixels).logits
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds, pixel_values=pixels).logits, expected)
        features = {"image": model.get_image_features(pixels)}
        torch.testing.assert_close(model(input_ids=ids, mm_encoder_outputs=features).logits, expected)
        torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels, logits_to_keep=2).logits, expected[:, -2:])
        as_tuple = model(input_ids=ids, pixel_values=pixels, return_dict=False)
        torch.testing.assert_close(as_tuple[0], expected)


def test_outputs_are_those_of_the_language_model():
    """All that is asked of it, beside the image tokens."""
    model, pixels = tiny_model(), torch.randn(1, 3, 56, 84)
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt())
        embeds[0, 1:5] = image = model.get_image_features(pixels).pooler_output[0]
        own = model.model.language_model(inputs_embeds=embeds, **asked)
        assert len(own.attentions) == 2
        for part in (model, model.model):
            out = part(input_ids=prompt(), pixel_values=pixels, **asked)
            torch.testing.assert_close(out.attentions, own.attentions)
            torch.testing.assert_close(out.hidden_states, own.hidden_states)
            for layer, expected in zip(out.past_key_values.layers, own.past_key_values.layers, strict=True):
                torch.testing.assert_close((layer.keys, layer.values), (expected.keys, expected.values))
            torch.testing.assert_close(out.image_hidden_states, image[None])


def test_image_tokens_stand_where_the_placeholders_are():
    """Two images in one row: exchanging them changes the logits, and each fills its own placeholders."""
    model = tiny_model()
    pixels = torch.randn(2, 3, 56, 84)
    with torch.no_grad():
        out = model(input_ids=prompt(images=2), pixel_values=pixels)
        swapped = model(input_ids=prompt(images=2), pixel_values=pixels.flip(0))
        embeds = model.get_input_embeddings()(prompt(images=2))
        embeds[0, 1:5], embeds[0, 5:9] = model.get_image_features(pixels).pooler_output
        by_hand = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    assert not torch.allclose(out.logits, swapped.logits)
    torch.testing.assert_close(out.logits, by_hand)


def test_mismatch_of_tokens_and_features_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"tokens: 4, features: 8"):
        model(input_ids=prompt(), pixel_values=torch.randn(2, 3, 56, 84))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(pixel_values=torch.randn(1, 3, 56, 84))
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(input_ids=prompt(), pixel_values=torch.randn(1, 3, 56, 84), mm_encoder_outputs={"image": None})


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_generate(options):
    """Greedy generation equals an argmax loop without a cache; images are encoded once, and each stays with its row."""
    model = tiny_model()
    pixels = torch.randn(2, 3, 56, 84)
    calls = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **options}
    out = model.generate(input_ids=prompt(2), pixel_values=pixels, **options)
    handle.remove()
    assert out.shape == (2 * options.get("num_return_sequences", 1), prompt().shape[1] + 4)
    assert len(calls) == 1
    assert torch.equal(out[:, : prompt().shape[1]], prompt(len(out)))
    alone = [model.generate(input_ids=prompt(), pixel_values=image[None], **options) for image in pixels]
    assert torch.equal(out, torch.cat(alone))
    assert not torch.equal(*alone)  # the image matters
    if "num_beams" not in options:
        ids = prompt(2)
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, model(input_ids=ids, pixel_values=pixels).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(out, ids)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("sizes", [None, torch.tensor([[40, 84], [28, 29]])])
def test_generate_with_mixed_grids(beams, sizes):
    model = tiny_model()
    grids = torch.tensor([[2, 3], [1, 2]])
    tiles = torch.randn(8, 3, 28, 28)
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    both, last = ({}, {}) if sizes is None else ({"image_sizes": sizes}, {"image_sizes": sizes[1:]})
    out = model.generate(input_ids=prompt(2), pixel_values=tiles, image_grids=grids, **both, **arguments)
    second = model.generate(input_ids=prompt(), pixel_values=tiles[6:], image_grids=grids[1:], **last, **arguments)
    assert torch.equal(out[1], second[0])
    if beams == 1:
        ids = prompt(2)
        for _ in range(3):
            logits = model(input_ids=ids, pixel_values=tiles, image_grids=grids, **both).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(out, ids)


def test_save_and_load(tmp_path):
    model = tiny_model(dem={"preset": "released", "gate": True}, low_res="add")
    with torch.no_grad():
        model.model.dem.gate.normal_()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    ids, pixels = prompt(), torch.randn(1, 3, 56, 84)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    for cls in (InfLlavaForConditionalGeneration, AutoModelForImageTextToText):
        again, report = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is InfLlavaForConditionalGeneration
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again.eval()(input_ids=ids, pixel_values=pixels).logits, expected)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    assert isinstance(AutoModel.from_pretrained(tmp_path), InfLlavaModel)


@pytest.mark.parametrize("low_res", ["mean", "add", None])
def test_a_zero_gate_starts_as_the_tower_alone(low_res):
    pixels = torch.randn(1, 3, 28, 42)
    gated = tiny_model(dem={"preset": "released", "gate": True}, low_res=low_res)
    plain = tiny_model(dem={"preset": "none"})
    plain.model.vision_tower.load_state_dict(gated.model.vision_tower.state_dict())
    with torch.no_grad():
        ours, tower = (m.model.get_image_features(pixels).last_hidden_state for m in (gated, plain))
    assert torch.equal(ours, tower)


def test_parameters_missing_from_a_file_start_as_they_should(tmp_path):
    """A gate or a fusion weight that a checkpoint lacks must not be left as uninitialised memory."""
    tiny_model().save_pretrained(tmp_path)
    for dem in ({"preset": "released", "gate": True}, {"preset": "paper", "fusion": "weighted_addition"}):
        model = InfLlavaForConditionalGeneration.from_pretrained(tmp_path, config=tiny_config(dem=dem, low_res="add"))
        start = model.model.dem.gate if "gate" in dem else model.model.dem.fusion.logit
        assert torch.equal(start, torch.zeros_like(start))


def test_every_part_starts_by_its_own_rule():
    """The DEM as its options say, the tower's attention and MLP as CLIP draws them, and not all by one deviation."""
    large = TINY_TOWER | {"hidden_size": 128, "intermediate_size": 256}
    model = tiny_model(vision_config=large, dem={"preset": "released", "init": "identical", "gate": True}).model
    (attention,) = model.dem.attentions
    weights = [getattr(attention, f"{name}_proj").weight for name in ("q", "k", "v", "out")]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert abs(weights[0].std() / (6 / 256) ** 0.5 * 3**0.5 - 1) < 0.05, "Xavier, uniform"
    layer = model.vision_tower.encoder.layers[0]
    for weight, std in (
        (layer.self_attn.q_proj.weight, 128**-0.5 * 6**-0.5),
        (layer.self_attn.out_proj.weight, 128**-0.5),
        (layer.mlp.fc1.weight, 256**-0.5),
        (model.vision_tower.embeddings.class_embedding, 128**-0.5),
    ):
        assert abs(weight.std() / std - 1) < (0.05 if weight.numel() > 1000 else 0.3)
    assert abs(model.multi_modal_projector.linear_1.weight.std() / 0.02 - 1) < 0.05
    bottleneck = model.dem.fusion.local_bottleneck[0].weight
    assert abs(bottleneck.abs().max() - 128**-0.5) < 1e-3, "as torch draws a linear layer"


@pytest.mark.parametrize("init", ["identical", "xavier"])
def test_what_a_file_lacks_is_drawn_and_the_rest_is_kept(init, tmp_path):
    model = tiny_model(dem={"preset": "released", "init": init})
    with torch.no_grad():
        for p in model.model.dem.parameters():
            p.normal_(3.0)
    kept = {name: p for name, p in model.state_dict().items() if not name.endswith("dem.attentions.0.v_proj.weight")}
    model.save_pretrained(tmp_path, state_dict=dict(kept))  # which it empties
    again, report = InfLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"model.dem.attentions.0.v_proj.weight"}
    assert again.model.dem.attentions[0].v_proj.weight.abs().max() < (6 / 64) ** 0.5 + 1e-6
    for name, p in again.state_dict().items():
        assert name not in kept or torch.equal(p, kept[name]), name


def test_layers_of_the_tower_that_a_file_lacks_are_drawn_as_the_tower_draws_them(tmp_path):
    model = tiny_model(vision_config=TINY_TOWER | {"hidden_size": 128})
    lacking = "model.vision_tower.encoder.layers.0.self_attn.out_proj.weight"
    model.save_pretrained(tmp_path, state_dict={name: p for name, p in model.state_dict().items() if name != lacking})
    again, report = InfLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {lacking}
    assert abs(again.get_parameter(lacking).std() / 128**-0.5 - 1) < 0.05


def test_the_mix_is_that_of_the_dem(tmp_path):
    for dem, mix in (({"preset": "paper"}, "add"), ({"preset": "released"}, "mean"), ({"preset": "direct"}, "mean")):
        config = tiny_config(dem=dem)
        assert config.low_res == tiny_config(dem=dem, low_res="auto").low_res == mix
        config.save_pretrained(tmp_path)
        assert InfLlavaConfig.from_pretrained(tmp_path).low_res == mix
    assert tiny_config(dem={"preset": "paper"}, low_res="mean").low_res == "mean"


def test_parts_are_looked_up_at_every_call():
    """Towers and DEMs that are put in the place of others, and the copies of them that PEFT trains."""
    model, pixels = tiny_model().model, torch.randn(1, 3, 56, 84)
    other = tiny_model(dem={"preset": "paper"}, low_res="mean").model
    for p in other.vision_tower.parameters():
        torch.nn.init.normal_(p, std=0.1)
    before = model.get_image_features(pixels).last_hidden_state
    model.dem, model.vision_tower = other.dem, other.vision_tower
    expected = other.get_image_features(pixels).last_hidden_state
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, expected)
    assert not torch.allclose(before, expected, atol=1e-3)

    whole = tiny_model()
    before = whole.get_image_features(pixels).last_hidden_state
    tuned = get_peft_model(whole, LoraConfig(target_modules=["lm_head"], modules_to_save=["dem", "vision_tower"]))
    trained = [part.modules_to_save for part in (whole.model.dem, whole.model.vision_tower)]
    assert torch.equal(tuned.get_image_features(pixels).last_hidden_state, before)
    for part in trained:
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.1)
    features = tuned.get_image_features(pixels).last_hidden_state
    assert not torch.allclose(features, before, atol=1e-3)
    features.sum().backward()
    for part in trained:
        assert sum(p.grad is not None for p in part.parameters()) > 10
    originals = (whole.model.dem.original_module, whole.model.vision_tower.original_module)
    assert all(p.grad is None for part in originals for p in part.parameters())


def test_a_tower_with_hooks_is_called_whole():
    model, pixels, fired = tiny_model(), torch.randn(1, 3, 56, 84), []
    expected = model.get_image_features(pixels).last_hidden_state
    model.model.vision_tower.register_forward_hook(lambda *_: fired.append(1))
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, expected)
    assert fired


def test_any_tower_and_any_language_model():
    siglip = {**TINY_TOWER, "model_type": "siglip_vision_model"}
    qwen = {**TINY_LLM, "model_type": "qwen2"}
    model = tiny_model(
        vision_config=siglip, text_config=qwen, dem={"preset": "paper"}, low_res="add", vision_feature_layer=-1
    )
    tower, llm = model.model.vision_tower, model.model.language_model
    assert (type(tower), type(llm)) == (SiglipVisionModel, Qwen2Model)
    encoder = dv.DualViewEncoder(dv.HfEncoder(tower, -1), model.model.dem, tile=(28, 28), grid=(2, 3), low_res="add")
    pixels, embeds = torch.randn(1, 3, 56, 84), model.get_input_embeddings()(prompt()).detach()
    embeds[:, 1:5] = model.model.multi_modal_projector(encoder(pixels).flatten(1, 2)).detach()
    expected = model.lm_head(llm(inputs_embeds=embeds).last_hidden_state)
    torch.testing.assert_close(model(input_ids=prompt(), pixel_values=pixels).logits, expected)


GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
OPT = {
    "hidden_size": 48,
    "word_embed_proj_dim": 24,  # narrower than the layers, as in OPT-350m
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLMS = {
    "gpt2": GPT2,
    "opt": OPT,
    "mistral": TINY_LLM,
    "qwen3": TINY_LLM,
    "phi": TINY_LLM,  # its head has a bias
    "granite": TINY_LLM | {"logits_scaling": 8.0},
    "granitemoe": TINY_LLM | {"logits_scaling": 8.0},
    "cohere": TINY_LLM | {"logit_scale": 0.25},
    "cohere2": TINY_LLM | {"logit_scale": 0.25},
    "gemma2": TINY_LLM | {"head_dim": 12, "final_logit_softcapping": 0.3},
    "gemma3_text": TINY_LLM | {"head_dim": 12, "final_logit_softcapping": 0.3},
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", LLMS)
def test_text_alone_gives_the_logits_of_the_language_model_itself(kind, tie, tmp_path):
    model = tiny_model(text_config={"model_type": kind, **LLMS[kind]}, tie_word_embeddings=tie)
    own = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    model.model.language_model.load_state_dict(own.base_model.state_dict())
    if tie:
        own.get_output_embeddings().weight = own.get_input_embeddings().weight
    else:
        model.lm_head.weight = torch.nn.Parameter(own.get_output_embeddings().weight.detach().clone())
    assert (model.lm_head.bias is not None) == (kind == "phi")
    if kind == "phi":
        own.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(64))
        model.lm_head.bias = own.get_output_embeddings().bias
    ids, pixels = torch.tensor([[1, 5, 6, 7, 8]]), torch.randn(1, 3, 56, 84)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, own(input_ids=ids).logits)
        expected = model(input_ids=prompt(), pixel_values=pixels).logits
        model.save_pretrained(tmp_path)
        again, report = InfLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again.eval()(input_ids=prompt(), pixel_values=pixels).logits, expected)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tie
    saved = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert ("lm_head.weight" in saved) == (not tie)


def test_language_models_whose_logits_are_not_known_are_refused():
    for kind, change in (("hyperclovax", {"logits_scaling": 2.0}), ("falcon_h1", {"lm_head_multiplier": 0.5})):
        with refuses(kind, str(change), "'granite'", "without it"):
            tiny_model(text_config={"model_type": kind, **TINY_LLM, **change})
    with refuses("BertLMHeadModel is more than a linear layer"):
        tiny_model(text_config={"model_type": "bert", **TINY_LLM})


def test_tied_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.get_encoder(modality="image") is model.model.vision_tower
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model(input_ids=prompt()).logits.shape == (1, 8, 70)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids, pixels = prompt(), torch.randn(1, 3, 56, 84)
    grads = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    model = tiny_model()
    ids, pixels = prompt(), torch.randn(1, 3, 56, 84)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_and_deepcopy():
    model = tiny_model()
    pixels = torch.randn(1, 3, 56, 84)
    expected = model(input_ids=prompt(), pixel_values=pixels).logits
    low = copy.deepcopy(model).to(torch.bfloat16)
    out = low(input_ids=prompt(), pixel_values=pixels.bfloat16()).logits
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.03)
    assert torch.equal(model(input_ids=prompt(), pixel_values=pixels).logits, expected)


def test_image_path_compiles_without_graph_breaks():
    model = tiny_model()
    pixels = torch.randn(1, 3, 56, 84)

    def tokens(x):
        return torch.stack(list(model.model.get_image_features(x).pooler_output))

    torch._dynamo.reset()
    compiled = torch.compile(tokens, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels), tokens(pixels))


# --- configuration ----------------------------------------------------------------------------------------------------


def test_config_survives_json(tmp_path):
    config = tiny_config(dem={"preset": "paper", "fusion": "conv3x3"}, grid=(1, 2))
    config.save_pretrained(tmp_path)
    assert InfLlavaConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert AutoConfig.from_pretrained(tmp_path).grid == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (0, 3)}, "rows=0: must be a positive integer"),
        ({"grid": [1, 2, 3]}, "grid=.*a pair"),
        ({"image_seq_length": 576}, "has 4 tokens"),
        ({"vision_feature_select_strategy": "full"}, "prefix tokens have no place"),
        ({"dem": {"preset": "imagined"}}, "needs a preset of"),
        ({"dem": {"preset": "released", "readout": "none"}}, "token count of one tile"),
        ({"dem": {"preset": "released", "colour": "red"}}, "colour"),
        ({"dem": {"preset": "none", "fusion": "addition"}}, "has no options"),
        ({"dem": {"preset": "paper", "num_heads": 5}}, "num_heads=5"),
        ({"low_res": "median"}, "low_res"),
        ({"image_token_id": 64}, "image_token_id=64 is no token.*vocab_size of 64"),
        ({"image_token_id": -1}, "image_token_id=-1 is no token"),
        ({"vision_config": {"model_type": "clip"}}, "vision_config of model_type='clip' has.*'clip_vision_model'"),
        ({"vision_config": {"model_type": "eye"}}, "vision_config has model_type='eye'.*'clip_vision_model'"),
        ({"text_config": {"model_type": "tongue"}}, "text_config has model_type='tongue'.*'llama'"),
        ({"text_config": {"model_type": "clip"}}, "text_config of model_type='clip' has.*'llama'"),
    ],
)
def test_wrong_configs_are_refused_at_once(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("preset", ["none", "direct", "paper"])
def test_other_presets_run(preset):
    model = tiny_model(dem={"preset": preset})
    assert model(input_ids=prompt(), pixel_values=torch.randn(1, 3, 56, 84)).logits.shape == (1, 8, 64)


# --- image processor --------------------------------------------------------------------------------------------------


def test_image_processor_pads_with_the_mean_colour_and_keeps_detail():
    for height, width in ((500, 1000), (1000, 500)):
        pixels = InfLlavaImageProcessor()(photograph(height, width), return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == (3, 1008, 1008)
        lying = pixels if height < width else pixels.mT
        assert lying[:, :240].abs().max() < 0.02  # the mean colour, normalised
        assert lying[:, 260:740].abs().amax((0, 2)).min() > 1
        assert lying[:, 770:].abs().max() < 0.02


def test_image_processor_is_clips_where_nothing_is_padded():
    """Stage 1: shortest edge to 1008, centre cut out, CLIP's normalisation."""
    picture = photograph(300, 420)
    ours = InfLlavaImageProcessor(do_pad=False)(picture, return_tensors="pt")["pixel_values"]
    clip = CLIPImageProcessor(size={"shortest_edge": 1008}, crop_size=1008)(picture, return_tensors="pt")[
        "pixel_values"
    ]
    torch.testing.assert_close(ours, clip)


@pytest.mark.parametrize("size", [336, {"shortest_edge": 336}, {"height": 336, "width": 336}])
@pytest.mark.parametrize("when", ["made", "called", "loaded", "loaded by Auto"])
def test_image_processor_at_the_released_inference_size(size, when, tmp_path):
    """The square that is cut out follows the size, wherever that is given: no black frame."""
    picture = photograph(300, 420)
    expected = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336)
    InfLlavaImageProcessor().save_pretrained(tmp_path)
    processor, options = {
        "made": lambda: (InfLlavaImageProcessor(size=size), {}),
        "called": lambda: (InfLlavaImageProcessor(), {"size": size}),
        "loaded": lambda: (InfLlavaImageProcessor.from_pretrained(tmp_path, size=size), {}),
        "loaded by Auto": lambda: (AutoImageProcessor.from_pretrained(tmp_path, size=size), {}),
    }[when]()
    pixels = processor(picture, return_tensors="pt", **options)["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    black = -torch.tensor(expected.image_mean) / torch.tensor(expected.image_std)
    frame = torch.cat([pixels[0, :, :4].flatten(1), pixels[0, :, :, :4].flatten(1)], dim=1)
    assert (frame.mT - black).abs().max(1).values.min() > 0.5
    if not (isinstance(size, dict) and "height" in size):
        cut = processor(picture, return_tensors="pt", do_pad=False, **options)["pixel_values"]
        torch.testing.assert_close(cut, expected(picture, return_tensors="pt")["pixel_values"])
    assert processor(picture, return_tensors="pt", crop_size=320, **options)["pixel_values"].shape[-2:] == (320, 320)


def test_image_processor_with_a_grid_per_image():
    processor = InfLlavaImageProcessor(max_tiles=6, tile_size=28)
    picture = photograph(56, 84)
    out = processor([picture, photograph(100, 20)], return_tensors="pt")
    assert out["image_grids"].tolist() == [[2, 3], [4, 1]]
    assert out["pixel_values"].shape == (10, 3, 28, 28)
    whole = InfLlavaImageProcessor(do_pad=False, do_resize=False, do_center_crop=False)(picture, return_tensors="pt")
    restored = dv.recombine(out["pixel_values"][:6], (2, 3), "local")
    torch.testing.assert_close(restored, whole["pixel_values"][0])


@pytest.mark.parametrize(("height", "width"), [(45, 84), (84, 45), (300, 200), (20, 21), (100, 7)])
def test_image_processor_with_a_grid_is_a_picture_on_the_mean_colour(height, width):
    """Pixel by pixel: what PIL makes of it, in the top left corner of a canvas of the mean colour."""
    picture, tile = photograph(height, width), (28, 28)
    out = InfLlavaImageProcessor(max_tiles=6, tile_size=28)(picture, return_tensors="pt")
    grid = dv.choose_grid((height, width), tile, 6)
    canvas = grid.map_size(tile)
    scale = min(canvas[0] / height, canvas[1] / width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    mean, std = (np.array(getattr(InfLlavaImageProcessor, name)) for name in ("image_mean", "image_std"))
    assert out["image_grids"].tolist() == [list(grid)]
    assert out["image_sizes"].tolist() == [list(size)]
    pixels = dv.recombine(out["pixel_values"], grid, "local").movedim(0, -1).double().numpy() * std + mean
    found = pixels * 255
    expected = np.empty((*canvas, 3))
    expected[:] = [122, 116, 104]  # 255 times the mean, cut off as the released code does
    expected[: size[0], : size[1]] = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
    real = np.zeros(canvas, dtype=bool)
    real[: size[0], : size[1]] = True
    np.testing.assert_allclose(found[~real], expected[~real], atol=1e-3)
    np.testing.assert_allclose(found[real], expected[real], atol=1.01)  # both round to whole steps


def test_image_processor_round_trip(tmp_path):
    for processor in (InfLlavaImageProcessor(size=84), InfLlavaImageProcessor(max_tiles=6, tile_size=28)):
        processor.save_pretrained(tmp_path)
        again = AutoImageProcessor.from_pretrained(tmp_path)
        assert type(again) is InfLlavaImageProcessor
        first, second = (p(photograph(), return_tensors="pt")["pixel_values"] for p in (processor, again))
        assert torch.equal(first, second)


# --- processor --------------------------------------------------------------------------------------------------------


def test_processor_writes_the_image_tokens(processor):
    out = processor(
        text=["<image>ab", "c<image><image>"],
        images=[[photograph()], [photograph(), photograph(30, 20)]],
        return_tensors="pt",
        padding=True,
    )
    assert (out["input_ids"] == IMAGE).sum(1).tolist() == [4, 8]
    assert out["pixel_values"].shape == (3, 3, 84, 84)
    counted = processor._get_num_multimodal_tokens(image_sizes=[(60, 90), (30, 20)])
    assert counted["num_image_tokens"] == [4, 4]


def test_chat_template_is_llama_3_with_the_image_first(processor):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "abc"}, {"type": "image"}]},
        {"role": "assistant", "content": "de"},
        {"role": "user", "content": "f"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert text == (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nabc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nde<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nf<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    own = processor.apply_chat_template([{"role": "system", "content": "a"}, *messages])
    assert system not in own
    parts = [{"type": "text", "text": "ab"}, {"type": "image"}, {"type": "text", "text": "cd"}, {"type": "image"}]
    joined = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert joined.endswith("<|end_header_id|>\n\n<image>\n<image>\nabcd<|eot_id|>")


def test_chat_template_marks_what_the_assistant_says(processor):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": [{"type": "text", "text": "e"}]},
    ]
    out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = (torch.tensor(out[name]).flatten() for name in ("input_ids", "assistant_masks"))
    said = processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
    assert said == ["b", "c", "<|eot_id|>", "e", "<|eot_id|>"]


def test_own_chat_template_takes_the_place_of_the_released_one(processor, tmp_path):
    own = InfLlavaProcessor(processor.image_processor, processor.tokenizer, chat_template="{{ messages | length }}")
    own.save_pretrained(tmp_path)
    for each in (own, AutoProcessor.from_pretrained(tmp_path)):
        assert each.apply_chat_template([{"role": "user", "content": "a"}]) == "1"


def test_from_picture_to_answer(processor, tmp_path):
    """Save processor and model, load both with the Auto classes, chat, and run the pipeline."""
    model = tiny_model(grid=(3, 3))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is InfLlavaProcessor
    assert (processor.image_seq_length, type(processor.image_processor)) == (4, InfLlavaImageProcessor)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": photograph()}, {"type": "text", "text": "what"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE).sum() == 4
    assert (inputs["input_ids"] == 1).sum() == 1  # one beginning-of-text
    out = AutoModelForImageTextToText.from_pretrained(tmp_path).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert isinstance(processor.batch_decode(out)[0], str)
    run = pipeline("image-text-to-text", model=str(tmp_path))
    answer = run(text=messages, max_new_tokens=3, generate_kwargs={"do_sample": False})
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_tokenizer_without_the_image_token_is_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match="add_special_tokens"):
        InfLlavaProcessor(InfLlavaImageProcessor(), bare, image_token="<picture>")


def test_unknown_token_is_no_image_token(tokenizer):
    """A tokenizer that gives one id to all it does not know would put images in the place of other words."""
    words = {"<unk>": 0, "a": 1}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), unk_token="<unk>")
    with refuses("'<image>'", "['<unk>']", "add_special_tokens"):
        InfLlavaProcessor(InfLlavaImageProcessor(), bare)
    assert InfLlavaProcessor(InfLlavaImageProcessor(), bare, image_token="<unk>").image_token_id == 0


def test_processor_needs_a_tokenizer():
    with refuses("tokenizer=None", "InfLlavaImageProcessor"):
        InfLlavaProcessor(InfLlavaImageProcessor())
