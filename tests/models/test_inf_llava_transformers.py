"""INF-LLaVA where transformers, and what builds on it, look for things."""

import copy
from typing import get_args

import pytest
import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, pipeline

import dualview as dv
from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration, InfLlavaModel
from dualview.models.inf_llava.input_checks import CACHE
from dualview.models.view_plan import interpolate
from tests.checks import refuses
from tests.tiny import IMAGE, TINY_TOWER, photograph, prompt, tiny_config, tiny_model, tiny_processor

SIGLIP = TINY_TOWER | {"model_type": "siglip_vision_model"}


@pytest.mark.parametrize("tower", [TINY_TOWER, SIGLIP])
@pytest.mark.parametrize("how", ["asked", "configured"])
def test_the_states_of_the_tower_come_on_request(tower, how):
    """Of the low-resolution view: one row for each image, as many as images."""
    model = tiny_model(vision_config=dict(tower))
    model.set_attn_implementation("eager")
    pixels, asked = torch.randn(2, 3, 90, 70), {"output_hidden_states": True, "output_attentions": True}
    expected = model.get_image_features(pixels)
    assert expected.hidden_states is None
    assert expected.attentions is None
    own = model.model.vision_tower(interpolate(pixels, (28, 28)), **asked)
    if how == "configured":
        for name, value in asked.items():
            setattr(model.config.vision_config, name, value)
        asked = {}
    out = model.get_image_features(pixels, **asked)
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(out.hidden_states, own.hidden_states)
    torch.testing.assert_close(out.attentions, own.attentions)
    assert (len(out.hidden_states), len(out.attentions)) == (4, 3)
    assert isinstance(model.get_image_features(pixels, return_dict=False, **asked), tuple)


def test_the_states_of_the_tower_with_a_grid_for_each_image():
    model = tiny_model()
    images, grids = [torch.randn(3, 56, 84), torch.randn(3, 28, 56)], [(2, 3), (1, 2)]
    tiles = torch.cat([dv.local_crop(image, grid) for image, grid in zip(images, grids, strict=True)])
    out = model.get_image_features(tiles, torch.tensor(grids), output_hidden_states=True)
    low = torch.cat([interpolate(image[None], (28, 28)) for image in images])
    own = model.model.vision_tower(low, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states, own.hidden_states)


def test_a_layer_may_be_named_in_the_call():
    model, pixels = tiny_model(), torch.randn(1, 3, 56, 84)
    for layer in (0, 1, -1, -2):
        other = tiny_model(vision_feature_layer=layer)
        other.load_state_dict(model.state_dict())
        expected = other.get_image_features(pixels).last_hidden_state
        assert torch.equal(model.get_image_features(pixels, vision_feature_layer=layer).last_hidden_state, expected)
        logits = other(input_ids=prompt(), pixel_values=pixels).logits
        assert torch.equal(model(input_ids=prompt(), pixel_values=pixels, vision_feature_layer=layer).logits, logits)
        arguments = {"input_ids": prompt(), "pixel_values": pixels, "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(**arguments, vision_feature_layer=layer), other.generate(**arguments))
    with refuses("layer=4 does not exist"):
        model.get_image_features(pixels, vision_feature_layer=4)
    with refuses("vision_feature_layer=[-1, -2]", "built for -2", "as many layers"):
        model.get_image_features(pixels, vision_feature_layer=[-1, -2])


@pytest.mark.parametrize("tower", [TINY_TOWER, SIGLIP])
@pytest.mark.parametrize("layers", [[-2], [-1, 1]])
def test_the_channels_of_several_layers(layers, tower, tmp_path):
    model, pixels = tiny_model(vision_config=dict(tower), vision_feature_layer=layers), torch.randn(2, 3, 56, 84)
    assert model.model.multi_modal_projector.linear_1.in_features == model.model.dem.dim == 32 * len(layers)

    def encoder(x):
        return torch.cat([dv.HfEncoder(model.model.vision_tower, layer)(x) for layer in layers], dim=-1)

    expected = dv.DualViewEncoder(encoder, model.model.dem, tile=(28, 28), grid=(2, 3))(pixels).flatten(1, 2)
    torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, expected)
    assert "3 of 3" in str(dv.explain(model))
    model.save_pretrained(tmp_path)
    again = InfLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.vision_feature_layer == layers
    torch.testing.assert_close(again.get_image_features(pixels).last_hidden_state, expected)
    with refuses("layer=9 does not exist"):
        tiny_model(vision_config=dict(tower), vision_feature_layer=[0, 9])
    with pytest.raises(Exception, match="at least one layer"):
        tiny_config(vision_feature_layer=[])


def test_embeddings_are_tied_where_the_language_model_ties_them(tmp_path):
    text = tiny_config().text_config.to_dict() | {"tie_word_embeddings": True}
    for given, tied in ((None, True), (True, True), (False, False)):
        model = tiny_model(text_config=dict(text), tie_word_embeddings=given)
        assert model.config.tie_word_embeddings is tied
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        model.config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is tied
    assert tiny_config().tie_word_embeddings is False


def test_plans_name_what_there_is():
    """Of tensor parallelism and of FSDP: modules of the model, and the head and the enhancement module among them."""
    model = tiny_model()
    names = {name for name, _ in model.named_modules()}
    for plan, own in (
        (model.tp_plan, {"lm_head"}),
        (model._fsdp_plan, {"lm_head"}),
        (model.config.base_model_fsdp_plan, {"dem", "multi_modal_projector", "vision_tower.encoder.layers.*"}),
    ):
        assert own <= set(plan)
        assert {name.replace("*", "0") for name in own} <= names | {name.removeprefix("model.") for name in names}
    assert not [name for name in model.tp_plan if "dem" in name], "the enhancement module is not sharded by tensors"
    assert "InfLlavaEnhance" in model._no_split_modules


def test_options_of_transformers_are_declared():
    """By the annotation some of its tests, and vLLM, find out whether attentions may be asked for."""
    for cls in (InfLlavaModel, InfLlavaForConditionalGeneration):
        for method in (cls.forward, cls.get_image_features):
            (options,) = get_args(method.__annotations__["kwargs"])
            assert {"output_attentions", "output_hidden_states"} <= set(options.__annotations__)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dem", [{"preset": "released"}, {"preset": "paper"}, {"preset": "released", "gate": True}])
def test_checkpointing_computes_the_enhancement_module_again(dem, reentrant):
    """It runs a second time in the backward pass, and the gradients are those of a run that keeps everything."""
    pixels, ids, runs, grads = torch.randn(2, 3, 56, 84), prompt(2), [], []
    for checkpointing in (False, True):
        model = tiny_model(dem=dem).train()
        if "gate" in dem:
            nn.init.constant_(model.model.dem.gate, 0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        # The fusion is a part that is called in every run of the module; nothing hangs on the module itself.
        model.model.dem.fusion.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        runs.append(len(calls))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert runs == [1, 2]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_every_auto_class_and_pipeline(tmp_path):
    tiny_model(grid=(3, 3)).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is InfLlavaForConditionalGeneration
    chat = [{"role": "user", "content": [{"type": "image", "image": photograph()}, {"type": "text", "text": "what"}]}]
    for task in ("image-text-to-text", "any-to-any"):
        run = pipeline(task, model=str(tmp_path))
        answer = run(text=chat, max_new_tokens=3, generate_kwargs={"do_sample": False})
        assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_images_of_a_prompt_are_its_own():
    """Nested images that do not match their prompts would reach other prompts' places."""
    processor = tiny_processor()
    red, green, blue = (photograph(20 + i, 30) for i in range(3))
    out = processor(text=["<image>a", "<image><image>b"], images=[[red], [green, blue]], padding=True)
    assert [row.count(IMAGE) for row in out["input_ids"]] == [4, 8]
    flat = processor(text=["<image>a", "<image><image>b"], images=[red, green, blue], padding=True, return_tensors="pt")
    assert torch.equal(flat["pixel_values"], torch.stack(out["pixel_values"]))
    for images in ([[red], [green, blue]], [[red, green, blue], []], [[red, green], blue, [red]]):
        with refuses("images by prompts: [", "[2, 1] '<image>'", "as [[first], [second, third]]"):
            processor(text=["<image><image>a", "<image>b"], images=images)
    for images in (red, [red], [red, green, blue]):
        with refuses("images, but the prompts have [2]", "the same as the number of images"):
            processor(text="<image><image>a", images=images)
    with refuses("0 images, but the prompts have [1, 0]"):
        processor(text=["<image>a", "b"])
    assert processor(text=["a", "b"])["input_ids"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("grids", [False, True])
def test_prompts_of_several_images_keep_them_when_they_are_repeated(beams, grids):
    """What the search says that its answers are worth is what the model says of them, image by image in order."""
    model = tiny_model()
    for name, p in model.named_parameters():  # so that the images, and their order, decide
        if p.dim() == 2 and ("language_model" in name or "projector" in name):
            torch.nn.init.normal_(p, std=0.3)
    pixels = 2 * (torch.randn(4, 3, 28, 28) if grids else torch.randn(4, 3, 56, 84))
    images = {"pixel_values": pixels} | ({"image_grids": torch.ones(4, 2, dtype=torch.long)} if grids else {})
    search = {"num_beams": 3} if beams > 1 else {"do_sample": True, "top_k": 1}
    ids, new = prompt(2, images=2), 5
    out = model.generate(
        input_ids=ids, **images, **search, num_return_sequences=2, max_new_tokens=new, eos_token_id=None,
        suppress_tokens=[IMAGE],
        length_penalty=0.0, output_scores=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, row in enumerate(out.sequences):
        own = {name: value[2 * (i // 2) :][:2] for name, value in images.items()}
        logits = model(input_ids=row[None], **own).logits[0, -new - 1 : -1]
        if beams == 1:
            torch.testing.assert_close(torch.stack(out.logits)[:, i], logits, rtol=1e-3, atol=1e-3)
            continue
        worth = logits.log_softmax(-1).gather(1, row[-new:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[i], worth, rtol=1e-3, atol=1e-3)


def test_what_the_model_was_not_trained_for_is_refused():
    processor = tiny_processor()
    chat = [{"role": "user", "content": "what"}]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    with refuses("tools", "not trained", error=TemplateError):
        processor.apply_chat_template(chat, tools=[tool])
    with refuses("type video", "image and text", error=TemplateError):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])
    assert "what" in processor.apply_chat_template(chat, tools=None)


def test_counts_for_a_server_are_those_of_the_call():
    """vLLM lays out memory by what `_get_num_multimodal_tokens` says, also for pictures of any size."""
    sizes = [(60, 90), (30, 20), (200, 50)]
    for options in ({}, {"max_tiles": 6}, {"max_tiles": 4}):
        processor = tiny_processor(**options)
        text = "".join("<image>" for _ in sizes)
        out = processor(text=[text], images=[photograph(*size) for size in sizes], return_tensors="pt")
        counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
        assert sum(counts["num_image_patches"]) == len(out["pixel_values"])
        assert sum(counts["num_image_tokens"]) == (out["input_ids"] == IMAGE).sum()
        assert set(out) == set(processor.model_input_names)
        if options:
            assert counts["num_image_patches"] == out["image_grids"].prod(1).tolist()
            given = processor._get_num_multimodal_tokens(image_sizes=sizes, max_tiles=None)
            assert given["num_image_patches"] == [1, 1, 1]


def test_defaults_of_the_configuration_are_kept():
    config = InfLlavaConfig()
    assert (config.vision_feature_layer, config.vision_width, config.tie_word_embeddings) == (-2, 1024, False)


def test_features_computed_before_are_those_of_images():
    model, ids = tiny_model(), prompt()
    features = model.get_image_features(torch.randn(1, 3, 56, 84))
    assert model(input_ids=ids, mm_encoder_outputs={"image": features}).logits.shape == (1, 8, 64)
    for wrong in ({"images": features}, {"image": features.last_hidden_state}, {"image": features, "video": features}):
        with refuses("mm_encoder_outputs has [", '{"image": model.get_image_features(...)}'):
            model(input_ids=ids, mm_encoder_outputs=wrong)


def kept_views(model):
    """Pictures, and what takes their place."""
    pixels = torch.randn(1, 3, 56, 84)
    return pixels, {"view_features": model.get_view_features(pixels), "image_canvases": torch.tensor([[56, 84]])}


def test_features_of_views_come_alone():
    """What they cannot give is not made of something else."""
    model = tiny_model()
    pixels, views = kept_views(model)
    expected = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(model.get_image_features(**views).last_hidden_state, expected)
    for name, value in {"pixel_values": pixels, "vision_feature_layer": -1, "output_hidden_states": True}.items():
        with refuses("view_features", name):
            model.get_image_features(**views, **{name: value})


def test_features_of_views_are_not_lost_in_generation():
    model = tiny_model()
    pixels, views = kept_views(model)
    given = {"input_ids": prompt(1), "max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    with refuses("view_features", "mm_encoder_outputs"):
        model.generate(**given, **views)
    again = model.generate(**given, mm_encoder_outputs={"image": model.get_image_features(**views)})
    torch.testing.assert_close(again.logits, model.generate(**given, pixel_values=pixels).logits)


def test_features_of_views_keep_their_type_before_quantised_weights():
    model = tiny_model()
    pixels, views = kept_views(model)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        layer.forward = copy.deepcopy(layer).forward
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.uint8), requires_grad=False)
    found = model.get_image_features(**views).last_hidden_state
    torch.testing.assert_close(found, model.get_image_features(pixels).last_hidden_state)


def test_a_batch_of_text_alone_stays_finite_in_half_precision():
    model = tiny_model().half().train()
    bias = model.model.multi_modal_projector.linear_2.bias
    bias.data.fill_(1000.0)
    model(input_ids=torch.tensor([[1, 5, 6]]), labels=torch.tensor([[1, 5, 6]])).loss.backward()
    assert (bias.grad == 0).all()


def test_no_training_on_places_without_an_image():
    model, ids, text = tiny_model(), prompt(), torch.tensor([[1, 5, 6]])
    assert model(input_ids=text, labels=text).loss.isfinite()
    with refuses("4 tokens with id 63", "there is no image", "Give pixel_values"):
        model(input_ids=ids, labels=ids)


def test_both_names_of_the_cache():
    """transformers 5.24 has a new one; outputs have that of the version that is installed."""
    model, ids = tiny_model(), torch.tensor([[1, 5, 6, 7]])
    expected = model(input_ids=ids).logits[:, -1:]
    for name in ("past_key_values", "cache"):
        first = model(input_ids=ids[:, :3], use_cache=True)
        held = getattr(first, CACHE)
        assert held.get_seq_length() == 3
        torch.testing.assert_close(model(input_ids=ids[:, 3:], **{name: held}).logits, expected)
