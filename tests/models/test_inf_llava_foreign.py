"""The whole model in the hands of others: adapters, quantised and offloaded weights, exported graphs, servers.

The truth is `full_computation` of the same model, which calls every layer, and the tower whole.
"""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.exporters.utils import decompose_multimodal
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dualview as dv
from dualview.models import InfLlavaForConditionalGeneration
from tests.tiny import IMAGE, TINY_LLM, TINY_TOWER, photograph, prompt, tiny_model, tiny_processor

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


@PRESETS
def test_the_whole_model_exports_with_a_batch_of_any_size(preset):
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
    for wrapper in (Logits(), Prefix()):
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


def test_what_a_server_asks_of_model_and_processor():
    """The requirements of vLLM's transformers backend that can be checked without it; docs/inf-llava.md lists them."""
    model, processor = tiny_model(), tiny_processor()
    assert model._supports_attention_backend
    assert model.is_backend_compatible()
    for part in (model.model.language_model, model.model.vision_tower):  # attention through one switch
        assert part.config._attn_implementation in {"eager", *ALL_ATTENTION_FUNCTIONS}
    model.set_attn_implementation("eager")
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.base_model_prefix == "model"
    assert {"model.vision_tower", "model.multi_modal_projector", "model.language_model"} <= {
        name for name, _ in model.named_modules()
    }
    assert processor.image_token_id == model.config.image_token_id == IMAGE
    largest = processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000)])
    assert largest["num_image_tokens"] == [model.config.image_seq_length]
    out = processor(text="<image>a", images=photograph(), return_mm_token_type_ids=True)
    assert out["mm_token_type_ids"][0].count(1) == out["input_ids"][0].count(IMAGE) == 4
    assert hasattr(model, "get_image_features")
    assert model.tp_plan["lm_head"]


def test_an_offloaded_gate():
    """It is read once more where the low-resolution view is mixed in, after the call of its module."""
    model = tiny_model(dem={"preset": "released", "gate": True})
    nn.init.constant_(model.model.dem.gate, 0.3)
    expected = logits_of(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert model.model.dem.gate.is_meta
