"""The model as lmms-eval calls it, with its two classes in a few lines; `make eval` runs lmms-eval itself."""

import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import dualview as dv
from dualview.chat import Chat, to_inputs
from dualview.models import convert_inf_llava
from tests.attach.hosts import built
from tests.attach.test_processors import processor_of
from tests.checks import refuses
from tests.released import write_released
from tests.tiny import photograph


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_released(folder / "released")
    convert_inf_llava(folder / "released", folder / "model")
    return folder / "model"


@pytest.fixture
def lmms_model(monkeypatch):
    class Lmms:
        def __init__(self):
            self.task_dict = {}

    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")}
    modules["lmms_eval.api.model"].lmms = Lmms
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dualview.lmms_model", raising=False)
    yield importlib.import_module("dualview.lmms_model")
    sys.modules.pop("dualview.lmms_model", None)


def request(text, second, doc=0):
    return SimpleNamespace(args=(text, second, lambda doc: doc["pictures"], doc, "task", "test"))


def model_of(lmms_model, place):
    model = lmms_model.DualViewLmms(str(place), batch_size="1", max_new_tokens=8)
    model.task_dict = {"task": {"test": [{"pictures": [photograph()], "target": "ab"}, {"pictures": []}]}}
    return model


def test_the_entry_point_is_declared_and_loads_nothing(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["dualview"].partition(":")
    manifests = getattr(importlib.import_module(module), name)
    assert "lmms_eval" not in sys.modules
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = lambda name, simple_class_path: (name, simple_class_path)
    for name in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    assert manifests() == ("dualview", "dualview.lmms_model.DualViewLmms")


def test_answers_are_those_of_the_chat(lmms_model, place):
    model = model_of(lmms_model, place)
    chat = Chat(str(place), max_new_tokens=8)
    chat.image = photograph()
    whole = chat.ask("what", lambda _: None).strip()
    greedy = {"until": ["\n\n\n\n"], "temperature": 0, "max_new_tokens": 8}
    assert model.generate_until([request("<image>\nwhat", greedy)]) == [whole]
    assert model.generate_until([request("what", {})]) == [whole]
    end = whole[len(whole) // 2]
    assert model.generate_until([request("what", {"until": end})]) == [whole.split(end)[0]]
    text = Chat(str(place), max_new_tokens=8).ask("hello", lambda _: None).strip()
    assert model.generate_until([request("what", {}), request("hello", {}, doc=1)]) == [whole, text]


def test_likelihoods_are_those_of_the_model(lmms_model, place):
    model = model_of(lmms_model, place)
    ((worth, greedy),) = model.loglikelihood([request("what", lambda doc: doc["target"])])
    chat = model.chat
    content = [{"type": "image", "image": photograph()}, {"type": "text", "text": "what"}]
    inputs = to_inputs(chat, [{"role": "user", "content": content}])
    ids, expected = chat.processor.tokenizer.encode("ab", add_special_tokens=False), 0.0
    for token in ids:  # one after the other
        with torch.no_grad():
            logits = chat.model(**inputs).logits[0, -1]
        expected += logits.log_softmax(-1)[token].item()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert worth == pytest.approx(expected, abs=1e-4)
    assert not greedy
    best = chat.model(**to_inputs(chat, [{"role": "user", "content": content}])).logits[0, -1].argmax()
    word = chat.processor.tokenizer.decode([best])
    if chat.processor.tokenizer.encode(word, add_special_tokens=False) == [best.item()]:
        assert model.loglikelihood([request("what", word)])[0][1]


def test_what_it_does_not_do(lmms_model, place):
    with refuses("batch_size=4", "must be 1"):
        lmms_model.DualViewLmms(str(place), batch_size=4)
    with refuses("single round", error=NotImplementedError):
        model_of(lmms_model, place).generate_until_multi_round([])


def test_options_of_a_task_decide_over_the_model_s_own(lmms_model, place, monkeypatch):
    model = model_of(lmms_model, place)
    seen, generate = [], model.chat.model.generate
    monkeypatch.setattr(model.chat.model, "generate", lambda **options: seen.append(options) or generate(**options))
    for options in ({"temperature": 0.7}, {"temperature": 0.7, "do_sample": False}, {"temperature": 0}):
        model.generate_until([request("hello", options | {"max_new_tokens": 3}, doc=1)])
    assert [(one["do_sample"], one["max_new_tokens"]) for one in seen] == [(True, 3), (False, 3), (False, 3)]


TEMPLATE = """{% for message in messages %}{% for part in message.content %}\
{% if part.type == "image" %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"""


@pytest.mark.parametrize("source", ["upsample", "hires"])
def test_another_model_with_an_attached_module(lmms_model, tmp_path, source):
    host, processor = built("llava"), processor_of("llava")
    processor.chat_template = TEMPLATE
    host.save_pretrained(tmp_path / "host")
    processor.save_pretrained(tmp_path / "host")
    dv.attach(host, source=source, dem={"preset": "paper"})
    dv.attached(host).gate.data.fill_(0.5)
    dv.save_adapter(host, tmp_path / "adapter")

    def made(**options):
        model = lmms_model.DualViewLmms(str(tmp_path / "host"), max_new_tokens=4, **options)
        model.task_dict = {"task": {"test": [{"pictures": [photograph()]}]}}
        return model

    alone, model = made(), made(adapter=str(tmp_path / "adapter"))
    larger = processor if source == "upsample" else dv.adapt_processor(processor)
    inputs = larger(images=[photograph()], text=["<image> see"], return_tensors="pt")
    ids = host.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert model.generate_until([request("see", {})]) == [processor.decode(ids[0, inputs["input_ids"].shape[1] :])]
    words = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[3]])], 1)}
    words["attention_mask"] = torch.ones_like(words["input_ids"])
    with torch.no_grad():
        expected = host(**words).logits[0, -2].log_softmax(-1)[3].item()
    ((worth, _),), ((before, _),) = (one.loglikelihood([request("see", lambda _: "see")]) for one in (model, alone))
    assert worth == pytest.approx(expected, abs=1e-5)
    assert abs(worth - before) > 1e-4
    with refuses("size=336", "adapter"):
        made(adapter=str(tmp_path / "adapter"), size=336)
    with refuses("dualview_adapter.json", error=FileNotFoundError):
        made(adapter=str(tmp_path))
