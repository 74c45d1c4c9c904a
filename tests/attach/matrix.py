"""The support matrix: what is tried with a family, cell by cell, and the page of the documentation made of it.

`python -m tests.attach.matrix [FAMILY ...]` tries rows, all of them by default, and writes them into the page, with the
version of transformers; to rows that were the same with other versions this one is added. A cell is tried with the
attached module; where that fails, without: what the host alone cannot do, either, is no fault of the attachment, and
the page says so.
"""

import copy
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dualview.models import attach, detach, load_adapter, save_adapter
from dualview.models.adapter.hosts import HOSTS, SOURCES, Source
from tests.attach.hosts import IMAGE, PACKED, SQUARE, built, inputs_for

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"
Inputs = dict[str, Tensor]
AT_ONCE = {"max_tiles_per_pass": 64}  # by default a CPU gets one view after the other
DECODING = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def ours(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of what is attached."""
    return {name: p for name, p in model.named_parameters() if "dualview" in name}


def open_gates(model: nn.Module) -> None:
    for name, parameter in ours(model).items():
        if name.endswith("gate"):
            parameter.data.fill_(0.5)


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Trial:
    """One family: the model as it was and with the module attached, and inputs."""

    def __init__(self, family: str) -> None:
        self.family, self.bare = family, built(family)
        self.inputs = inputs_for(self.bare, family)
        not_images = ("input_ids", "mm_token_type_ids")
        self.images = {name: value for name, value in self.inputs.items() if name not in not_images}
        self.prompts = {**self.inputs, "attention_mask": torch.ones_like(self.inputs["input_ids"])}
        self.before = logits(self.bare, self.inputs)

    def model(self, with_module: bool, *, gates: bool = True, **options: Any) -> nn.Module:
        model = copy.deepcopy(self.bare)
        if with_module:
            torch.manual_seed(1)
            attach(model, **{**AT_ONCE, **options})
            if gates:
                open_gates(model)
        return model


trial_of = cache(Trial)
"""The same one for all tests of a file: they take copies of the model."""


# --- The cells: each raises where something is wrong ------------------------------------------------------------------


def identity(trial: Trial, with_module: bool) -> None:
    """Shapes, token counts and values at step 0, with the module and without."""
    if not with_module:
        return
    model = trial.model(True, gates=False)
    features, plain = (m.base_model.get_image_features(**trial.images) for m in (model, trial.bare))
    assert shapes(features) == shapes(plain)
    assert torch.equal(logits(model, trial.inputs), trial.before)
    open_gates(model)
    assert logits(model, trial.inputs).shape == trial.before.shape
    assert not torch.allclose(logits(model, trial.inputs), trial.before, rtol=1e-4, atol=1e-6)


def shapes(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {name: shapes(one) for name, one in value.items()}
    return [shapes(one) for one in value] if isinstance(value, (list, tuple)) else value


def trained(trial: Trial, with_module: bool) -> None:
    """At step 0 the gate has a gradient and nothing else of the module; from step 1 on everything has."""
    model = trial.model(with_module, gates=False)
    found = gradients(model, trial.inputs)
    reached = {name for name, gradient in found.items() if "dualview" in name and gradient.abs().sum() > 0}
    assert reached == {name for name in ours(model) if name.endswith("gate")}
    open_gates(model)
    found = gradients(model, trial.inputs)
    assert all(found[name].isfinite().all() and found[name].abs().sum() > 0 for name in ours(model))


def greedy(trial: Trial, with_module: bool) -> None:
    """Greedy decoding, with a cache as without."""
    model = trial.model(with_module)
    cached, again = (model.generate(**trial.prompts, **DECODING, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)


def beams(trial: Trial, with_module: bool) -> None:
    """Beam search with several sequences."""
    found = trial.model(with_module).generate(**trial.prompts, **DECODING, num_beams=2, num_return_sequences=2)
    assert len(found) == 2 * len(trial.inputs["input_ids"])


def copied(trial: Trial, with_module: bool) -> None:
    """A deep copy is a model of its own, with a module of its own."""
    model = trial.model(with_module)
    before = logits(model, trial.inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (ours(twin) if with_module else dict(twin.named_parameters())).values():
            parameter.add_(0.5)
    assert torch.equal(logits(model, trial.inputs), before)
    assert not torch.equal(logits(twin, trial.inputs), before)
    if with_module:
        detach(twin)
        assert torch.equal(logits(twin, trial.inputs), trial.before)
        assert torch.equal(logits(model, trial.inputs), before)


def saved(trial: Trial, with_module: bool) -> None:
    """The module by save_adapter; the host by save_pretrained, which from_pretrained reads without the module."""
    model = trial.model(with_module)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
        assert torch.equal(logits(again, trial.inputs), trial.before)
        if with_module:
            save_adapter(model, folder)
            load_adapter(again, folder, **AT_ONCE)
            assert torch.equal(logits(again, trial.inputs), logits(model, trial.inputs))


def tuned(trial: Trial, with_module: bool) -> None:
    """PEFT: LoRA on the language model and on the DEM; the module as one of modules_to_save; saved and loaded."""
    layers = r".*(language_model|text_model|decoder)\b.*\.(q_proj|v_proj)"
    dem = r"|.*dualview.*\.(q_proj|k_proj|v_proj)" if with_module else ""
    lora = LoraConfig(r=2, target_modules=layers + dem, init_lora_weights=False)
    model = get_peft_model(trial.model(with_module), lora)
    found = gradients(model, trial.inputs)
    inside = [name for name in found if "lora" in name and "dualview" in name]
    assert len(inside) == (6 if with_module else 0)
    assert all(found[name].abs().sum() > 0 for name in inside)
    assert any("lora" in name and "dualview" not in name for name in found)

    keep = ["dualview"] if with_module else None
    lora = LoraConfig(target_modules=layers, modules_to_save=keep)
    model = get_peft_model(trial.model(with_module, gates=False), lora)
    open_gates(model)
    found = gradients(model, trial.inputs)
    trainable = [name for name, p in ours(model).items() if p.requires_grad]
    assert all(found[name].abs().sum() > 0 for name in trainable)
    assert bool(trainable) == with_module
    after = logits(model, trial.inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(trial.model(with_module, gates=False), folder)
        assert torch.equal(logits(again, trial.inputs), after)


def checkpointed(trial: Trial, with_module: bool) -> None:
    """Gradient checkpointing gives the gradients that there are without."""
    model = trial.model(with_module)
    plain = gradients(model, trial.inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # which checkpoints; nothing in these models drops anything out
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.modules.batchnorm._BatchNorm)):
            module.eval()
    found = gradients(model, trial.inputs)
    assert set(found) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * gradient.abs().max().item())


def text_alone(trial: Trial, with_module: bool) -> None:
    """A training step without an image: the same loss, and a gradient of zeros for each parameter of the module."""
    first, plain = trial.model(with_module), trial.model(False)
    model = copy.deepcopy(first)  # whose hooks must not lead to the first one
    words = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    if "mm_token_type_ids" in trial.inputs:
        words["mm_token_type_ids"] = torch.zeros_like(words["input_ids"])
    found = []
    for one in (model, plain):
        for module in (m for m in one.modules() if not list(m.children())):
            module.training = False  # nothing drops out
        one.training = one.base_model.training = True
        found.append(gradients(one, words))
    assert all((found[0][name] == 0).all() for name in ours(model))
    assert all(parameter.grad is None for parameter in first.parameters())
    for name, gradient in found[1].items():
        assert torch.equal(found[0][name], gradient)
    assert not [name for name in vars(model.base_model) if name.startswith("_dualview_")]


def compiled(trial: Trial, with_module: bool) -> str:
    """`torch.compile` of the whole model, or of the features of images alone; graph breaks are allowed."""
    model = trial.model(with_module)
    torch._dynamo.reset()

    def features(**given: Tensor) -> list[Tensor]:
        with torch.no_grad():
            output = model.base_model.get_image_features(**given)
        return flat(output)

    if trial.family in WHOLE:
        made = logits(torch.compile(model, backend="eager"), trial.inputs)
        torch.testing.assert_close(made, logits(model, trial.inputs), rtol=1e-4, atol=1e-5)
        return "whole model"
    made = torch.compile(features, backend="eager")(**trial.images)
    for found, plain in zip(made, features(**trial.images), strict=True):
        torch.testing.assert_close(found, plain)
    return "features"


WHOLE = ("llava", "mistral3", "qwen2_5_vl")
"""Families of which the whole model is compiled, which takes a minute for each."""


def flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in values for tensor in flat(one)]


def detached(trial: Trial, with_module: bool) -> None:
    """Without the module, the model is what it was: names, hooks, attributes and values."""
    if not with_module:
        return
    model = trial.model(True)
    logits(model, trial.inputs)
    detach(model)
    assert torch.equal(logits(model, trial.inputs), trial.before)
    assert list(model.state_dict()) == list(trial.bare.state_dict())
    for module, plain in zip(model.modules(), trial.bare.modules(), strict=True):
        assert set(vars(module)) == set(vars(plain))
        assert len(module._forward_hooks) == len(plain._forward_hooks)
        assert not module._forward_pre_hooks


CELLS: dict[str, Callable[[Trial, bool], str | None]] = {
    "step 0": identity,
    "gradients": trained,
    "generate": greedy,
    "beams": beams,
    "deepcopy": copied,
    "save/load": saved,
    "PEFT": tuned,
    "checkpointing": checkpointed,
    "text alone": text_alone,
    "compile": compiled,
    "detach": detached,
}


# --- The page ---------------------------------------------------------------------------------------------------------


def tried(trial: Trial, cell: str) -> str:
    """What a cell says: "yes" or how far, or "as host" where the host alone fails, too; an error where it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return CELLS[cell](trial, True) or "yes"
        except Exception as error:
            try:
                CELLS[cell](trial, False)
            except Exception:
                return "as host"
            raise AssertionError(f"{trial.family}, {cell}: {error}") from error


RUN = "transformers"
"""The column of the versions that a row was run with."""
VERSION = ".".join(transformers.__version__.split(".")[:2])
BEGIN, END = "<!-- written by python -m tests.attach.matrix -->\n", "<!-- to here -->"


def table(rows: dict[str, dict[str, str]]) -> str:
    head = ["family", "kind of tower", "sources", *CELLS, RUN]
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{family}`", *described(family), *cells.values()] for family, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def described(family: str) -> tuple[str, str]:
    model_type = "mistral3" if family == "llava_pixtral" else family
    layout = HOSTS[model_type].layout
    refused = {*SOURCES[layout], *(() if family in ENLARGED or layout == "flat" else ("hires",))}
    return KINDS[layout], ", ".join(source for source in get_args(Source) if source not in refused)


KINDS = {
    "square": "square images",
    "flat": "packed, merged blocks",
    "pixtral": "packed (Pixtral)",
    "naflex": "packed (NaFlex)",
    "gemma4": "packed, pooled",
}
ENLARGED = ("gemma3", "internvl", "llava", "llava_next", "llava_onevision", "paligemma")


def on_page() -> dict[str, dict[str, str]]:
    """What the page says, by family and column."""
    _, written, _ = re.split(f"{BEGIN}|{END}", PAGE.read_text(encoding="utf-8"))
    lines = [[one.strip() for one in line.strip("|\n ").split("|")] for line in written.splitlines()[2:]]
    return {line[0].strip("`"): dict(zip([*CELLS, RUN], line[3:], strict=True)) for line in lines}


def main() -> None:
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for family in sys.argv[1:] or (*SQUARE, *PACKED):
        trial = trial_of(family)
        row, rows = {cell: tried(trial, cell) for cell in CELLS}, on_page()
        before = rows.get(family, {})
        versions = before[RUN].split(", ") if row.items() <= before.items() else []
        row[RUN] = ", ".join(sorted({VERSION, *versions}))
        write(rows | {family: row})
        print(family, row, flush=True)


def write(rows: dict[str, dict[str, str]]) -> None:
    before, _, after = re.split(f"({BEGIN}.*{END})", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    PAGE.write_text(f"{before}{BEGIN}{table(rows)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
