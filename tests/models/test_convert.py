"""Released checkpoints to model directories and back: on the published list of tensors, with narrow widths."""

import json
import weakref
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

import dualview as dv
from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration, InfLlavaModel, convert_inf_llava
from dualview.models.inf_llava import shards
from dualview.models.inf_llava.shards import CheckpointError
from tests.checks import refuses
from tests.released import TINY, TOWER, Sizes, released_config, released_shapes, released_tokenizer, write_released
from tests.tiny import photograph, tiny_config

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT = [{"role": "user", "content": [{"type": "image", "image": photograph()}, {"type": "text", "text": "what?"}]}]
ASK = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
ROWS = 320  # the vocabulary with its image token, filled up to a multiple of 64


def left_over(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".dualview")]


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    tensors = write_released(folder / "released")
    convert_inf_llava(folder / "released", folder / "ours")
    return folder, tensors


def test_the_tensors_are_the_published_ones():
    shapes = released_shapes(Sizes())
    assert len(shapes) == 706
    assert sum(prod(shape) for shape in shapes.values()) == 8_359_156_864
    assert sum(prod(shape) for name, shape in shapes.items() if ".spatial_embed." in name) == 4_400_256


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("binary", [False, True])
def test_there_and_back(files, binary, tmp_path):
    """Every tensor comes back as it was, and what the configuration and the tokenizer say does."""
    tensors = write_released(tmp_path / "released", files=files, binary=binary)
    convert_inf_llava(tmp_path / "released", tmp_path / "ours", most_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    convert_inf_llava(tmp_path / "ours", tmp_path / "again")
    again = tensors_in(tmp_path / "again")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: config[name] for name in released_config()} == released_config()
    text = "<|begin_of_text|><image>\na b"
    tokenizers = [type(released_tokenizer()).from_pretrained(tmp_path / name) for name in ("released", "again")]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert len(tokenizers[0]) == len(tokenizers[1])
    convert_inf_llava(tmp_path / "again", tmp_path / "once more")
    assert not left_over(tmp_path)


def test_the_directory_loads_whole_and_answers_as_the_parts_do(converted):
    """Logits: the language model's own class on the released tensors, with the features put in place by hand."""
    folder, tensors = converted
    model, report = AutoModelForImageTextToText.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(folder / "ours")
    inputs = processor.apply_chat_template(CHAT, **ASK)
    assert inputs["pixel_values"].shape == (1, 3, 84, 84)  # three tiles a side
    image = inputs["input_ids"] == TINY.rows
    assert image.sum() == model.config.image_seq_length == 4

    own = {"llama": {}, "tower": {}, "dem": {}, "projector": {}}
    for name, tensor in tensors.items():
        for part, start in (("tower", TOWER), ("dem", "model.spatial_embed."), ("projector", "model.mm_projector.")):
            if name.startswith(start):
                own[part][name.removeprefix(start)] = tensor
                break
        else:
            own["llama"][name] = tensor
    fields = {k: v for k, v in released_config().items() if k not in ("model_type", "architectures")}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    llama.load_state_dict(own["llama"])
    tower = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1,
                         image_size=28, patch_size=14)
    ).eval()  # fmt: skip
    tower.load_state_dict(own["tower"])
    dem = dv.DualPerspectiveEnhance.released(64)
    dem.load_released(own["dem"])
    first, second = torch.nn.Linear(64, 48), torch.nn.Linear(48, 48)
    first.load_state_dict({leaf: own["projector"][f"0.{leaf}"] for leaf in ("weight", "bias")})
    second.load_state_dict({leaf: own["projector"][f"2.{leaf}"] for leaf in ("weight", "bias")})
    encoder = dv.DualViewEncoder(dv.HfEncoder(tower, -2), dem, tile=(28, 28), grid=(3, 3), low_res="mean")
    with torch.no_grad():
        embeds = llama.get_input_embeddings()(inputs["input_ids"].masked_fill(image, 0))
        features = encoder(inputs["pixel_values"]).flatten(1, 2)
        embeds[image] = second(torch.nn.functional.gelu(first(features))).flatten(0, 1)
        expected = llama(inputs_embeds=embeds).logits
        logits = model.eval()(**inputs).logits
    assert logits.shape[-1] == ROWS
    torch.testing.assert_close(logits[..., : TINY.rows], expected, rtol=1e-4, atol=1e-4)
    answer = model.generate(**inputs, max_new_tokens=6)
    assert (answer[:, inputs["input_ids"].shape[1] :] < TINY.rows).all(), "rows that were never trained are not said"


def test_the_directory_has_all_that_a_chat_needs(converted):
    folder, _ = converted
    processor = AutoProcessor.from_pretrained(folder / "ours")
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nA chat between")
    assert text.endswith("<image>\nwhat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    tokenizer = processor.tokenizer
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<pad>", "left")
    assert tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id == TINY.rows
    both = processor.apply_chat_template([CHAT, CHAT], **ASK, processor_kwargs={"padding": True})
    assert (both["input_ids"] == TINY.rows - 6).sum(1).tolist() == [1, 1], "one begin-of-text each"
    config = AutoModelForImageTextToText.from_pretrained(folder / "ours").generation_config
    assert set(config.eos_token_id) == {TINY.rows - 5, TINY.rows - 2}
    assert config.suppress_tokens == list(range(TINY.rows, ROWS))
    assert config.pad_token_id == TINY.rows - 1
    assert not config.do_sample
    assert "Built with Meta Llama 3" in (folder / "ours" / "NOTICE").read_text()
    run = pipeline("image-text-to-text", model=str(folder / "ours"))
    assert run(text=CHAT, max_new_tokens=3)[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("size", [336, 1008])
def test_converted_weights_give_the_recorded_numbers_of_the_released_code(size, tmp_path):
    golden = load_file(GOLDEN / f"released_encode_{size}.safetensors")
    with safe_open(GOLDEN / f"released_encode_{size}.safetensors", "pt") as file:
        tower = CLIPVisionConfig(**json.loads(file.metadata()["clip_config"]))
    tower.save_pretrained(tmp_path / "tower")
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in released_config().items() if k != "model_type"}))
    tensors = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    for name, tensor in golden.items():
        if name.startswith("vision_tower."):
            tensors[TOWER + name.removeprefix("vision_tower.")] = tensor.float()
        elif name != "output":
            tensors[f"model.{name.removeprefix('model.')}"] = tensor.float()
    write_released(tmp_path / "released", tensors)
    convert_inf_llava(tmp_path / "released", tmp_path / "ours", vision_tower=tmp_path / "tower")
    model = InfLlavaModel.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    y = torch.arange(size, dtype=torch.float64).view(1, 1, -1, 1)
    x = torch.arange(size, dtype=torch.float64).view(1, 1, 1, -1)
    c = torch.arange(3, dtype=torch.float64).view(1, 3, 1, 1)
    pixels = torch.sin(0.013 * y * (c + 1)) * torch.cos(0.017 * x * (c + 1) - 0.2 * c)
    pixels = pixels + 0.2 * torch.sin(0.11 * x + 0.07 * y)
    with torch.no_grad():
        tokens = torch.stack(model.get_image_features(pixels.float().double()).pooler_output)
    assert (tokens - golden["output"]).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_is_kept(dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in write_released(tmp_path / "x").items()}
    write_released(tmp_path / "released", tensors, torch_dtype=str(dtype).removeprefix("torch."))
    convert_inf_llava(tmp_path / "released", tmp_path / "ours")
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "ours").values()} == {dtype}
    assert InfLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == dtype


def test_a_tower_of_its_own_directory(tmp_path):
    """Where the frozen tower was not saved; CLIP's whole checkpoint holds it beside the text model."""
    tensors = write_released(tmp_path / "whole")
    tower = {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(TOWER)}
    write_released(tmp_path / "released", rest)
    with refuses("holds no vision tower", "--vision-tower", "openai/clip-vit-large-patch14-336", error=CheckpointError):
        convert_inf_llava(tmp_path / "released", tmp_path / "ours")
    for i, prefix in enumerate(("", "vision_model.")):
        (at := tmp_path / f"clip{i}").mkdir()
        save_file({prefix + k: v for k, v in tower.items()} | {"text_model.x": torch.ones(1)}, at / "model.safetensors")
        convert_inf_llava(tmp_path / "released", tmp_path / f"ours{i}", vision_tower=at)
        ours = tensors_in(tmp_path / f"ours{i}")
        assert all(torch.equal(ours[f"model.vision_tower.{name}"], tensor) for name, tensor in tower.items())


def test_the_first_training_stage(tmp_path):
    tensors = write_released(tmp_path / "whole")
    (tmp_path / "stage").mkdir()
    stage, llm, tower = tmp_path / "stage" / "mm_projector.bin", tmp_path / "llm", tmp_path / "tower"
    parts = {k: v for k, v in tensors.items() if ".mm_projector." in k or ".spatial_embed." in k}
    torch.save(parts, stage)
    write_released(
        llm,
        {k: v[:-1] if v.shape[0] == TINY.rows else v for k, v in tensors.items()
         if k.startswith(("lm_head", "model.layers", "model.norm", "model.embed"))},
        model_type="llama", vocab_size=TINY.rows - 1,
    )  # fmt: skip
    released_tokenizer(pad=False).save_pretrained(llm)
    tower.mkdir()
    save_file(
        {k.removeprefix(TOWER): v for k, v in tensors.items() if k.startswith(TOWER)}, tower / "model.safetensors"
    )
    with refuses("holds no language model", "--language-model", error=CheckpointError):
        convert_inf_llava(stage, tmp_path / "ours")
    convert_inf_llava(stage, tmp_path / "ours", language_model=llm, vision_tower=tower)
    ours = tensors_in(tmp_path / "ours")
    head = ours.pop("lm_head.weight")
    assert torch.equal(head[: TINY.rows - 1], tensors["lm_head.weight"][:-1])
    assert not head[TINY.rows - 1 :].any()
    assert torch.equal(
        ours["model.dem.attentions.0.q_proj.weight"], tensors["model.spatial_embed.attention.linears.0.weight"]
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.tokenizer.pad_token_id, processor.image_token_id) == (TINY.rows - 1, TINY.rows)


def test_no_more_than_one_file_is_held(tmp_path):
    """When a file is written, the tensors of the one before are gone."""
    alive = weakref.WeakSet()

    def tensors():
        for i in range(12):
            tensor = torch.full((256,), float(i))
            alive.add(tensor)
            yield f"t{i:02d}", tensor
            del tensor
            assert len(alive) <= 4

    shards.write_shards(tmp_path, tensors(), most_bytes=3 * 1024)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    read = dict(shards.tensors_of(shards.entries_of(tmp_path)))
    assert {name: tensor[0].item() for name, tensor in read.items()} == {f"t{i:02d}": i for i in range(12)}


def test_files_before_torch_1_6(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (entry,) = shards.entries_of(tmp_path / "old.bin").values()
    assert entry[1:] == ("a", (3,), 12)


def changed(tensors, **changes):
    return {name: changes.get(name, tensor) for name, tensor in tensors.items()}


REFUSED = {
    "a LLaVA without the module": (
        lambda t: {k: v for k, v in t.items() if "spatial_embed" not in k}, {}, "no model.spatial_embed"),
    "LLaVA-1.6": (lambda t: t | {"model.image_newline": torch.ones(48)}, {}, "LLaVA-1.6"),
    "LLaVA of transformers": (dict, {"model_type": "llava"}, "model_type is 'llava', not 'llava_llama'"),
    "LLaVA-Mistral": (dict, {"model_type": "llava_mistral"}, "'llava_mistral'"),
    "another projector": (dict, {"mm_projector_type": "linear"}, "'mm_projector_type': 'linear'"),
    "the class token, too": (dict, {"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
    "quantised": (dict, {"quantization_config": {}}, "quantised"),
    "missing and unexpected": (
        lambda t: {k if k != "model.norm.weight" else "x.y": v for k, v in t.items() if "ln_fuse.bias" not in k},
        {}, "Missing: ['model.norm.weight', 'model.spatial_embed.ln_fuse.bias']. Unexpected: ['x.y']"),
    "a wrong shape": (
        lambda t: t | {"model.mm_projector.2.bias": torch.ones(7)}, {},
        "model.mm_projector.2.bias: (7,) in the file, (48,) by its configuration"),
    "another language model": (dict, {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
    "more words than the tokenizer and the weights": (dict, {"hidden_size": 96}, "Wrong shape"),
    "no number": (lambda t: t | {"lm_head.weight": t["lm_head.weight"] / 0}, {}, "no finite numbers"),
    "whole numbers": (lambda t: t | {"lm_head.weight": t["lm_head.weight"].char()}, {}, "torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_checkpoints_are_refused_with_the_reason(case, tmp_path):
    change, fields, message = REFUSED[case]
    tensors = write_released(tmp_path / "x")
    write_released(tmp_path / "released", change(tensors), files=2, **fields)
    with refuses(message, error=CheckpointError):
        convert_inf_llava(tmp_path / "released", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert not left_over(tmp_path)


def damage_cut(folder, file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_swapped(folder, file):
    one, two = sorted(folder.glob("*-of-*"))[:2]
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def damage_doubled(folder, file):
    one, two = sorted(folder.glob("*-of-*"))[:2]
    two.write_bytes(one.read_bytes())


def damage_code(folder, file):
    torch.save({"a": print}, file)


DAMAGES = {
    "cut off": (damage_cut, "cannot be read as weights", "Download it again"),
    "empty": (lambda folder, file: file.write_bytes(b""), "cannot be read as weights", "Download"),
    "a page of the web": (lambda folder, file: file.write_bytes(b"<html>" * 99), "cannot be read as weights", "Down"),
    "exchanged": (damage_swapped, "says that tensors are where they are not", "Download the files again"),
    "twice the same": (damage_doubled, "hold", "another file has, too"),
    "missing": (lambda folder, file: file.unlink(), "is missing", "download it again"),
    "index": (lambda folder, file: next(folder.glob("*.index.json")).write_text("{"), "cannot be read", "index.json"),
    "another folder": (
        lambda folder, file: next(folder.glob("*.index.json")).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "a file of another directory", "not read"),
    "no configuration": (lambda folder, file: (folder / "config.json").unlink(), "has no config.json", "whole model"),
    "no tokenizer": (lambda folder, file: (folder / "tokenizer.json").unlink(), "no tokenizer.json", "--tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("damage", [*DAMAGES, "code"])
def test_damaged_files_are_refused_and_nothing_is_left(damage, binary, tmp_path):
    apply, *messages = (
        (damage_code, "cannot be read as weights", "never loaded") if damage == "code" else DAMAGES[damage]
    )
    write_released(tmp_path / "released", files=2, binary=binary)
    apply(tmp_path / "released", sorted((tmp_path / "released").glob("*-of-*"))[-1])
    with refuses(*messages, error=CheckpointError):
        convert_inf_llava(tmp_path / "released", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert not left_over(tmp_path)


def test_what_is_there_is_not_replaced(converted):
    folder, _ = converted
    before = sorted(path.name for path in (folder / "ours").iterdir())
    with refuses("exists already", "another name", error=FileExistsError):
        convert_inf_llava(folder / "released", folder / "ours")
    assert sorted(path.name for path in (folder / "ours").iterdir()) == before
    with refuses("no such file", error=CheckpointError):
        convert_inf_llava(folder / "none", folder / "new")
    tiny_config(dem={"preset": "paper"}).save_pretrained(folder / "paper")
    save_file({"a": torch.ones(1)}, folder / "paper" / "model.safetensors")
    with refuses("'paper'", "the released module", error=CheckpointError):
        convert_inf_llava(folder / "paper", folder / "new")


@pytest.mark.parametrize("most", [0.3, 1.0])
def test_an_interruption_leaves_nothing(most, converted, tmp_path):
    folder, _ = converted

    def stop(done, total):
        if done >= most * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_inf_llava(folder / "released", tmp_path / "ours", progress=stop, most_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_an_unconverted_checkpoint_is_not_taken_for_a_random_model(converted):
    folder, _ = converted
    for cls in (InfLlavaConfig, InfLlavaModel, InfLlavaForConditionalGeneration):
        with refuses("'llava_llama'", "dualview convert SRC DST"):
            cls.from_pretrained(folder / "released")
    config = InfLlavaConfig.from_pretrained(folder / "ours")
    for cls in (InfLlavaModel, InfLlavaForConditionalGeneration):
        with refuses("'llava_llama'", "dualview convert SRC DST"):
            cls.from_pretrained(folder / "released", config=config)
    (folder / "foreign").mkdir()
    save_file({"model.layers.0.x": torch.ones(1)}, folder / "foreign" / "model.safetensors", metadata={"format": "pt"})
    with refuses("holds model.layers.0.x and 0 more", "random", "dualview convert SRC DST"):
        InfLlavaModel.from_pretrained(folder / "foreign", config=config)
    with refuses("model_type='clip'", "class of its own model"):
        InfLlavaConfig.from_dict({"model_type": "clip"})


@pytest.mark.parametrize("damage", ["cut off", "empty", "a page of the web", "missing", "exchanged"])
def test_a_damaged_directory_is_not_loaded_in_half(damage, tmp_path):
    write_released(tmp_path / "released")
    convert_inf_llava(tmp_path / "released", tmp_path / "ours", most_bytes=200_000)
    first, second = sorted((tmp_path / "ours").glob("*.safetensors"))[:2]
    if damage == "exchanged":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    else:
        DAMAGES[damage][0](tmp_path / "ours", second)
    with pytest.raises((ValueError, OSError)) as caught:
        InfLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert str(tmp_path / "ours") in str(caught.value) or second.name in str(caught.value)


def test_rotations_as_transformers_5_writes_them(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    write_released(tmp_path / "released", rope_theta=None, rope_scaling=None, rope_parameters=rope)
    convert_inf_llava(tmp_path / "released", tmp_path / "ours")
    assert InfLlavaConfig.from_pretrained(tmp_path / "ours").text_config.rope_parameters == rope


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    """Its ids would name other words."""
    write_released(tmp_path / "released")
    released_tokenizer().save_pretrained(tmp_path / "words")
    few = type(released_tokenizer())(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    few.save_pretrained(tmp_path / "few")
    with refuses("the tokenizer has", "model.embed_tokens.weight", "another model's", "--tokenizer"):
        convert_inf_llava(tmp_path / "released", tmp_path / "ours", tokenizer=tmp_path / "few")
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    (tmp_path / "released" / "config.json").write_text(json.dumps(config | {"bos_token_id": 1}))
    with refuses("begins texts with token", "config.json says 1", "another model's"):
        convert_inf_llava(tmp_path / "released", tmp_path / "ours", tokenizer=tmp_path / "words")
    assert not (tmp_path / "ours").exists()
    (tmp_path / "released" / "config.json").write_text(json.dumps(config))
    with refuses("no such folder", error=FileNotFoundError):
        convert_inf_llava(tmp_path / "released", tmp_path / "nowhere" / "ours")
