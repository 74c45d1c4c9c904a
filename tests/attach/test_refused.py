"""What is refused, and leaves the host as it was."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DataParallel
from transformers import BertConfig, BertModel

import dualview as dv
from dualview.models.adapter.hosts import REFUSED
from tests.attach.hosts import built
from tests.attach.matrix import Trial, logits, trial_of
from tests.checks import refuses


def state(model: nn.Module) -> list[object]:
    """Everything that attaching could leave behind: modules, hooks, attributes."""
    return [
        (name, type(m), sorted(vars(m)), *(len(hooks) for key, hooks in vars(m).items() if key.endswith("_hooks")))
        for name, m in model.named_modules()
    ]


def unharmed(trial: Trial) -> bool:
    names = set(vars(trial.bare.get_encoder(modality="image")))
    return torch.equal(logits(trial.bare, trial.inputs), trial.before) and not any("dualview" in n for n in names)


def test_wrong_arguments():
    trial = trial_of("llava")
    for arguments, *parts in (
        ({"grid": (2,)}, "grid"),
        ({"source": "large"}, "large", "upsample", "hires"),
        ({"layers": [-1]}, "[-1]", "[-2]"),
        ({"layers": []}, "[]", "[-2]"),
        ({"layers": [-2, -2]}, "[-2, -2]", "once"),
        ({"max_tiles_per_pass": 0}, "0", "positive integer"),
        ({"dem": {"preset": "other"}}, "other", "released", "paper"),
        ({"dem": {"preset": []}}, "[]", "released", "paper"),
        ({"dem": {"gate": "yes"}}, "gate", "yes", "True"),
        ({"dem": {"device": "meta"}}, "meta"),
        ({"grid": (-2, 2)}, "-2"),
        ({"dem": {"preset": "paper", "readout": "none"}}, "none"),
        ({"dem": {"heads": 3}}, "heads"),
        ({"dem": dv.DualPerspectiveEnhance.paper(16)}, "16", "32"),
        ({"dem": [nn.Identity(), nn.Identity()]}, "2 modules", "1 layers"),
    ):
        with refuses(*parts):
            dv.attach(trial.bare, **arguments)
        assert unharmed(trial)
    with refuses("must be options, a module", error=TypeError):
        dv.attach(trial.bare, dem=[dv.DualPerspectiveEnhance])
    assert unharmed(trial)


def test_hosts_that_are_refused():
    with refuses("'bert'", "has not been tested", "qwen2_5_vl"):
        dv.attach(BertModel(BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)))
    with refuses("Linear", "DualViewEncoder", error=TypeError):
        dv.attach(nn.Linear(2, 2))
    host = built("llava")
    before = state(host)
    for family, reason in REFUSED.items():
        host.config.model_type = family
        with refuses(family, reason):
            dv.attach(host)
    assert state(host) == before


def test_attaching_twice_and_detaching_nothing():
    trial = trial_of("llava")
    with refuses("nothing is attached", "Llava"):
        dv.detach(trial.bare)
    model = trial.model(True)
    before = logits(model, trial.inputs)
    with refuses("already", "detach"):
        dv.attach(model)
    assert torch.equal(logits(model, trial.inputs), before)
    assert torch.equal(logits(dv.attach(dv.detach(model)), trial.inputs), trial.before)


def test_pictures_that_do_not_suit_the_grid():
    trial = trial_of("qwen2_vl")
    model = trial.model(True, source="native")
    with refuses("16 x 24", "16 x 16", "adapt_processor", "upsample"):
        logits(model, trial.inputs)
    for family, source, *parts in (
        ("llava", "native", "one size", "hires"),
        ("mistral3", "hires", "pads", "upsample", "native"),
        ("gemma4", "hires", "fixed number", "native"),
    ):
        with refuses(source, family, *parts):
            dv.attach(built(family), source=source)
    for dem in ({"readout": "average"}, dv.DualPerspectiveEnhance.paper(32)):
        with refuses("readout", "native"):
            dv.attach(trial.bare, source="native", dem=dem)
    assert unharmed(trial)


def test_gates_of_some_modules_alone_are_refused() -> None:
    own = [dv.DualPerspectiveEnhance.released(32, gate=gate) for gate in (True, False)]
    trial = trial_of("vipllava")
    with refuses("some have none"):
        dv.attach(trial.bare, layers=[-1, 1], dem=own)
    assert unharmed(trial)


class Own(nn.Module):
    """A module of a user's own, with a gate or without."""

    def __init__(self, gate: bool = False, low_res: str = "mean") -> None:
        super().__init__()
        self.low_res = low_res
        self.mix = nn.Linear(32, 32)
        if gate:
            self.gate = nn.Parameter(torch.zeros(32))

    def forward(self, local_tiles, stride_tiles, grid):
        return self.mix(local_tiles.mean(1) + stride_tiles.mean(1))


class OfBase(Own):
    def forward(self, local_tiles, stride_tiles, grid, key_mask=None, base=0):
        return self.gate * (super().forward(local_tiles, stride_tiles, grid) - base)


class OutOfPython(Own):
    """As what is compiled by other means: `inspect` knows no signature of it."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = torch.add


class OfPlan(Own):
    def plan(self, grid, tokens):
        raise AssertionError("attach needs no plan")


def test_modules_that_cannot_be_called_as_they_would_be():
    trial = trial_of("llava")
    for dem, *parts in (
        (Own(gate=True), "Own", "(local_tiles, stride_tiles, grid)", "key_mask, base", "gate"),
        (OfPlan(), "grid, live)", "'live'"),
        (nn.Linear(32, 32), "Linear", "(local_tiles, stride_tiles, grid)"),
        (nn.ModuleDict(), "ModuleDict", "no forward"),
    ):
        with refuses(*parts):
            dv.attach(trial.bare, dem=dem)
        assert unharmed(trial)
    dv.attach(copy.deepcopy(trial.bare), dem=OutOfPython())
    for dem in (Own(), Own(gate=True, low_res="add"), OfBase(gate=True)):
        logits(dv.attach(copy.deepcopy(trial.bare), dem=dem), trial.inputs)


def test_modules_for_several_layers():
    trial = trial_of("vipllava")
    model = dv.attach(copy.deepcopy(trial.bare), layers=[-1, 1], dem=nn.ModuleList([Own(), Own()]))
    assert len(dv.attached(model).dems) == 2
    with refuses("low_res", "the same"):
        dv.attach(trial.bare, layers=[-1, 1], dem=[Own(), Own(low_res="add")])
    assert unharmed(trial)


def compiled_inside(model: nn.Module) -> nn.Module:
    model.get_encoder(modality="image").compile(backend="eager")
    return model


def without(method: str) -> Callable[[nn.Module], nn.Module]:
    def changed(model: nn.Module) -> nn.Module:
        setattr(model, method, lambda **_: None)
        return model

    return changed


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), ("Peft", "inside")),
        (DataParallel, ("DataParallel", "inside")),
        (lambda model: torch.compile(model, backend="eager"), ("OptimizedModule", "inside")),
        (compiled_inside, ("vision_tower", "compiled", "loaded")),
        (lambda model: model.to("meta"), ("meta", "load")),
        (without("get_encoder"), ("get_encoder", "Llava", "None", "AutoModelForImageTextToText")),
        (without("get_decoder"), ("get_decoder", "Llava", "None", "AutoModelForImageTextToText")),
    ],
    ids=["PEFT", "DataParallel", "torch.compile", "a part compiled", "meta", "no tower", "no language model"],
)
def test_hosts_that_are_not_as_they_were_loaded(change, parts):
    model = change(copy.deepcopy(trial_of("llava").bare))
    before, weights = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    with refuses(*parts):
        dv.attach(model)
    assert state(model) == before
    assert all(value.is_meta or torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_host_that_trains_and_checkpoints_is_taken():
    trial = trial_of("llava")
    model = copy.deepcopy(trial.bare).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = state(model)
    dv.attach(model)
    assert dv.attached(model).training
    assert torch.equal(model(**trial.inputs).logits, trial.before)
    assert state(dv.detach(model)) == before


def test_a_host_with_int8_weights_is_taken():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    trial = trial_of("llava")
    model = copy.deepcopy(trial.bare)
    quantize_(model, Int8WeightOnlyConfig())
    before, plain = state(model), logits(model, trial.inputs)
    assert not torch.equal(plain, trial.before)
    dv.attach(model)
    assert torch.equal(logits(model, trial.inputs), plain)
    assert {parameter.dtype for parameter in dv.attached(model).parameters()} == {torch.float32}
    dv.detach(model)
    assert state(model) == before
    assert torch.equal(logits(model, trial.inputs), plain)


def test_lora_that_was_put_into_the_host_before():
    trial = trial_of("llava")
    tuned = get_peft_model(
        copy.deepcopy(trial.bare), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    before, plain = state(tuned), logits(tuned, trial.inputs)
    dv.attach(tuned.get_base_model())
    assert torch.equal(logits(tuned, trial.inputs), plain)
    dv.detach(tuned)
    assert state(tuned) == before
