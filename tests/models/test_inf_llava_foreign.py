"""The whole model in the hands of others: adapters, quantised and offloaded weights, exported graphs, servers.

The truth is `full_computation` of the same model, which calls every layer, and the tower whole.
"""

import importlib
import tomllib
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, TorchAoConfig
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import cast_leaf_tensors, decompose_multimodal
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dualview as dv
from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration, InfLlavaModel
from tests.strategies import some
from tests.tiny import IMAGE, TINY_LLM, TINY_TOWER, photograph, prompt, tiny_config, tiny_model, tiny_processor

PRESETS = pytest.mark.parametrize("preset", ["released", "paper"])
WIDE = {"vision_config": TINY_TOWER | {"hidden_size": 1024}, "text_config": TINY_LLM | {"hidden_size": 64}}
"""Widths that quantisation takes."""


def given():
    torch.manual_seed(1)
    return {"input_ids": prompt(2), "pixel_values": torch.randn(2, 3, 56, 84)}


@torch.no_grad()
def logits_of(model):
    return model(**given()).logits


def assert_is_full(model, **tolerance):
    found = logits_of(model)
    with dv.full_computation():
        truth = logits_of(model)
    torch.testing.assert_close(found, truth, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))
    return found


def fill(parameters, std=0.1):
    torch.manual_seed(2)
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=std)


@PRESETS
def test_lora_on_every_linear_layer(preset):
    """Also of the tower, the enhancement module, and the layers of the tower that are not run without it."""
    model = tiny_model(dem={"preset": preset}, low_res="add").double()
    plain, linear = logits_of_double(model), [n for n, m in model.named_modules() if type(m) is nn.Linear]
    names = [name for name in linear if name != "lm_head"]
    tuned = get_peft_model(model, LoraConfig(target_modules=names, r=4)).eval()
    adapters = {name: p for name, p in tuned.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(names)
    fill(adapters.values())
    found = logits_of_double(tuned)
    with dv.full_computation():
        torch.testing.assert_close(found, logits_of_double(tuned))
    assert not torch.allclose(found, plain, atol=1e-3)
    out = tuned(**given_double())
    out.logits.square().sum().backward()
    trained = {name for name, p in adapters.items() if p.grad is not None and p.grad.any()}
    assert any(".dem." in name for name in trained)
    assert any(".vision_tower.encoder.layers.1." in name for name in trained)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits_of_double(merged), found)


def given_double():
    return {name: x.double() if x.is_floating_point() else x for name, x in given().items()}


@torch.no_grad()
def logits_of_double(model):
    return model(**given_double()).logits


@PRESETS
@pytest.mark.parametrize("how", ["accelerate", "on disk"])
def test_offloaded_weights(preset, how, tmp_path):
    model = tiny_model(dem={"preset": preset})
    expected = logits_of(model)
    if how == "accelerate":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path / "model")
        parts = {"vision_tower": "disk", "dem": "disk", "multi_modal_projector": "disk", "language_model": "cpu"}
        on_disk = {"lm_head": "cpu"} | {f"model.{name}": place for name, place in parts.items()}
        model = InfLlavaForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=on_disk, offload_folder=tmp_path / "offloaded"
        ).eval()
    assert any(p.is_meta for p in model.model.dem.parameters())
    torch.testing.assert_close(assert_is_full(model), expected, rtol=1e-4, atol=1e-5)
    answers = model.generate(**given(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(answers, tiny_model(dem={"preset": preset}).generate(
        **given(), max_new_tokens=3, do_sample=False, eos_token_id=None))  # fmt: skip


QUANTISED = {
    "bitsandbytes, 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, 4 bits": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao, 8 bits": lambda: TorchAoConfig(_int8()),
}


def _int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


@pytest.mark.more
@PRESETS
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights(preset, kind, tmp_path):
    model = tiny_model(dem={"preset": preset}, **WIDE)
    plain = logits_of(model)
    model.save_pretrained(tmp_path)
    quantised = InfLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=QUANTISED[kind](), dtype=torch.float32, device_map={"": "cpu"}
    )
    for part in (quantised.model.vision_tower, quantised.model.dem):
        assert all(type(m) is not nn.Linear or type(m.weight.data) is not torch.Tensor
                   for m in part.modules() if isinstance(m, nn.Linear))  # fmt: skip
    for training in (False, True):
        found = assert_is_full(quantised.train(training), rtol=1e-2, atol=1e-3)
        assert not torch.equal(found, plain)
        assert torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("preset, part", some(product(["released", "paper"], ["logits", "prefix"]), 3))
def test_the_whole_model_exports_with_a_batch_of_any_size(preset, part):
    model = tiny_model(dem={"preset": preset})

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, pixel_values):
            return self.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits

    class Prefix(Logits):
        def forward(self, input_ids, pixel_values):
            return self.model.get_image_features(pixel_values).pooler_output

    batch = torch.export.Dim("batch", min=1, max=64)
    wrapper = {"logits": Logits, "prefix": Prefix}[part]()
    program = torch.export.export(wrapper, tuple(given().values()), dynamic_shapes=({0: batch}, {0: batch}))
    for size in (1, 3):
        inputs = (prompt(size), torch.randn(size, 3, 56, 84))
        expected = wrapper(*inputs)
        expected = torch.stack(expected) if isinstance(expected, list) else expected
        torch.testing.assert_close(program.module()(*inputs), expected)


def test_exporters_find_the_enhancement_module():
    """transformers' own take a model apart by names, and would lose what stands between tower and projector."""
    model = tiny_model()
    parts = decompose_multimodal(model, given())
    assert {"image_encoder", "connector", "multi_modal_projector", "language_model", "lm_head"} <= set(parts)
    dem, inputs = parts["connector"]
    assert dem is model.model.dem
    assert {"local_tiles", "stride_tiles"} <= set(inputs)
    inputs = cast_leaf_tensors(inputs, dtype=torch.float32, device=torch.device("cpu"))  # what it is called with, too
    exported = DynamoExporter().export(dem, dict(inputs), config=DynamoConfig(dynamic=True))
    torch.testing.assert_close(program_of(exported)(**inputs), dem(**inputs))


def program_of(exported):
    """A torch.export program as a callable; newer versions of transformers wrap it."""
    return exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported


def test_what_a_server_asks_of_a_model():
    """The requirements of vLLM's transformers backend that can be checked without it; docs/inf-llava.md lists them."""
    with torch.device("meta"):  # it is built without weights, by the Auto class of base models
        assert type(AutoModel.from_config(tiny_config())) is InfLlavaModel
    model = tiny_model()
    assert model._supports_attention_backend
    assert model.is_backend_compatible()
    for part in (model.model.language_model, model.model.vision_tower):  # attention through one switch
        assert part.config._attn_implementation in {"eager", *ALL_ATTENTION_FUNCTIONS}
    assert model.get_encoder(modality="image") is model.model.vision_tower
    assert model.base_model_prefix == "model"
    assert {"model.vision_tower", "model.multi_modal_projector", "model.language_model"} <= {
        name for name, _ in model.named_modules()
    }
    features = model.model.get_image_features(torch.randn(2, 3, 56, 84), return_dict=True).pooler_output
    assert [tuple(one.shape) for one in features] == [(4, 48), (4, 48)]
    assert model.tp_plan["lm_head"]
    assert model.model.config.text_config.base_model_pp_plan


def test_a_server_s_attention_gets_what_it_hands_down(monkeypatch):
    """It calls the base model with embeddings, and keeps the cache in its own attention, layer by layer."""
    model, instances, seen = tiny_model(), {0: "first", 1: "second"}, []
    ids = prompt()
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def attention(module, query, key, value, attention_mask, attention_instances=None, **options):
        seen.append(attention_instances[module.layer_idx])
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "served", attention)
    model.model.language_model.config._attn_implementation = "served"
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        found = model.model(
            inputs_embeds=embeds,
            use_cache=False,
            position_ids=positions,
            attention_instances=instances,
            return_dict=False,
        )[0]
    assert seen == ["first", "second"]
    torch.testing.assert_close(found, expected)


def test_what_a_server_asks_of_a_processor():
    processor = tiny_processor()
    assert processor.image_token_id == IMAGE
    assert processor.image_token == "<image>"
    largest = processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000)])
    assert largest["num_image_tokens"] == [4]
    images = [photograph(), photograph(20, 30)]
    asked = {"return_mm_token_type_ids": True, "return_text_replacement_offsets": True, "return_tensors": "pt"}
    out = processor(text="<image>a<image>", images=images, **asked)
    assert (out["mm_token_type_ids"] == 1).sum() == (out["input_ids"] == IMAGE).sum() == 8
    (places,) = out["text_replacement_offsets"]
    assert [place["type"] for place in places] == ["image", "image"]
    for place in places:
        assert processor.tokenizer.encode(place["replacement"], add_special_tokens=False) == [IMAGE] * 4
    rows = processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1] for image in images])["num_image_patches"]
    for name in processor.image_processor.model_input_names:  # each image has its rows of every field
        assert name not in out or len(out[name]) == sum(rows)


def test_every_process_of_a_server_knows_the_model():
    """By an entry point, which may be called more than once."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["dualview"].partition(":")
    for _ in range(2):
        getattr(importlib.import_module(module), name)()
    assert type(AutoConfig.for_model("inf_llava")) is InfLlavaConfig


def test_an_offloaded_gate():
    """It is read once more where the low-resolution view is mixed in, after the call of its module."""
    model = tiny_model(dem={"preset": "released", "gate": True})
    nn.init.constant_(model.model.dem.gate, 0.3)
    expected = logits_of(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert model.model.dem.gate.is_meta
