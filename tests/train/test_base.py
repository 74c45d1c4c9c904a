"""A model of pretrained parts: they are in it as they were, and training begins with it."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from dualview.chat import Chat
from dualview.train import TrainConfig, train
from dualview.train.base import make_base
from tests.checks import refuses
from tests.tiny import TINY_LLM, TINY_TOWER, tiny_tokenizer
from tests.train.data import config, fields, write_data


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=TINY_TOWER, text_config=text, projection_dim=8))
    clip.save_pretrained(folder / "clip")
    tokenizer = tiny_tokenizer()
    llm = LlamaForCausalLM(LlamaConfig(**TINY_LLM)).to(torch.bfloat16)
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return folder, clip, llm


def base_of(folder, **changes):
    given = {"vision_tower": str(folder / "clip"), "language_model": str(folder / "llm"), "grid": [2, 3], **changes}
    given.setdefault("dem", {"preset": "released", "num_heads": 4})
    return TrainConfig.of({"model": given, "output": "run", "stage1": {"data": [{"file": "rows.json"}]}}).model


def test_the_parts_are_in_it(parts, tmp_path):
    folder, clip, llm = parts
    make_base(base_of(folder), tmp_path / "base", seed=1)
    chat = Chat(str(tmp_path / "base"), max_new_tokens=2)
    model, processor = chat.model, chat.processor
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value.to(torch.bfloat16)), name
    for name, value in llm.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name][: len(value)], value), name
    assert torch.equal(model.lm_head.weight[:64], llm.lm_head.weight)
    assert processor.image_seq_length == 4
    assert processor.image_processor.size["shortest_edge"] == 84
    assert model.config.image_token_id == processor.image_token_id
    assert isinstance(chat.ask("hello", lambda _: None), str)
    make_base(base_of(folder), tmp_path / "again", seed=1)
    again = Chat(str(tmp_path / "again")).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_other_tokenizers_need_a_template(parts, tmp_path):
    folder, _, llm = parts
    llm.save_pretrained(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    content = tokenizer.backend_tokenizer.to_str().replace("<|start_header_id|>", "<other>")
    raw = type(tokenizer.backend_tokenizer).from_str(content)
    type(tokenizer)(tokenizer_object=raw, unk_token="<unk>").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"no <\|start_header_id\|>.*model\.chat_template"):
        make_base(base_of(folder, language_model=str(tmp_path / "other")), tmp_path / "base", 0)
    with pytest.raises(ValueError, match=r"model\.chat_template=none: no such file"):
        make_base(base_of(folder, chat_template="none"), tmp_path / "base", 0)
    (tmp_path / "template").write_text("{% generation %}{{ messages }}{% endgeneration %}")
    options = {"language_model": str(tmp_path / "other"), "chat_template": str(tmp_path / "template")}
    make_base(base_of(folder, **options), tmp_path / "base", 0)
    assert "generation" in Chat(str(tmp_path / "base")).processor.chat_template


def test_parts_that_cannot_be_loaded_are_named(parts, tmp_path):
    folder, _, llm = parts
    (tmp_path / "empty").mkdir()
    for field in ("language_model", "vision_tower"):
        with refuses(f"model.{field}='{tmp_path / 'empty'}': cannot be loaded; give a directory"):
            make_base(base_of(folder, **{field: str(tmp_path / "empty")}), tmp_path / "base", 0)
    llm.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    LlamaConfig(**TINY_LLM | {"num_hidden_layers": 3}).save_pretrained(tmp_path / "other")
    with refuses("model.language_model=", "do not belong together", "layers.2"):
        make_base(base_of(folder, language_model=str(tmp_path / "other")), tmp_path / "base", 0)
    assert not (tmp_path / "base").exists()


@pytest.mark.more
def test_a_run_begins_with_it(parts, tmp_path):
    write_data(tmp_path)
    run = fields(tmp_path) | {"model": config_of_base(parts[0])}
    result = train(TrainConfig.of(run), report=lambda line: None)
    assert (tmp_path / "run" / "base" / "model.safetensors").is_file()
    assert {p.dtype for p in Chat(str(result)).model.parameters()} == {torch.bfloat16}
    assert config(tmp_path).model == str(tmp_path / "base")


def config_of_base(folder):
    base = base_of(folder)
    return {
        "vision_tower": base.vision_tower,
        "language_model": base.language_model,
        "grid": list(base.grid),
        "dem": base.dem,
    }
