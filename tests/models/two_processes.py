"""One of two processes that share a model by its plans.

Rank, number of processes and their address are in the environment, as torchrun sets them.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import barrier, destroy_process_group, get_rank, init_process_group
from transformers.distributed import DistributedConfig

from dualview.models import InfLlavaForConditionalGeneration
from tests.tiny import prompt, tiny_model

DEMS = {
    "released": {"preset": "released"},
    "paper": {"preset": "paper"},
    "gated": {"preset": "released", "gate": True},
    "gated, added": {"preset": "paper", "gate": True},
}


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids = prompt()
    return [{"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 84), "labels": ids} for _ in range(2)]


def built(dem: dict[str, object]) -> nn.Module:
    model = tiny_model(dem=dem)
    if (gate := getattr(model.model.dem, "gate", None)) is not None:
        nn.init.constant_(gate, 0.3)
    return model


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_tensors(folder: Path, expected: nn.Module) -> None:
    """Tensor parallelism: every process sees the same batch, and has its part of the language model."""
    model = InfLlavaForConditionalGeneration.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto")
    )
    parts = {name for name, p in model.named_parameters() if hasattr(p, "placements") and not whole_here(p)}
    assert any("language_model.layers.1.mlp" in name for name in parts), parts
    assert "lm_head.weight" in parts
    assert not [name for name in parts if ".dem." in name]
    for inputs in batches():
        with torch.no_grad():
            torch.testing.assert_close(whole(model(**inputs).logits), expected(**inputs).logits, rtol=1e-4, atol=1e-5)
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        assert torch.equal(model.generate(**asked, **options), expected.generate(**asked, **options))


def whole_here(parameter: Tensor) -> bool:
    return all(placement.is_replicate() for placement in parameter.placements)


def by_modules(folder: Path, expected: nn.Module) -> None:
    """FSDP2: every process has a batch of its own, and a part of every parameter."""
    model = InfLlavaForConditionalGeneration.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    sharded = {name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP")}
    named = {"model.dem", "model.multi_modal_projector", "model.vision_tower.encoder.layers.0", "lm_head", ""}
    assert named <= sharded, sharded
    assert {f"model.language_model.layers.{i}" for i in range(2)} <= sharded, sharded
    one_by_one = [gradients(expected, inputs) for inputs in batches()]
    truth = {name: (grad + one_by_one[1][1][name]) / 2 for name, grad in one_by_one[0][1].items()}
    for training in (False, True):
        logits, found = gradients(model.train(training), batches()[get_rank()])
        torch.testing.assert_close(whole(logits), one_by_one[get_rank()][0], rtol=1e-4, atol=1e-5)
        assert found.keys() == truth.keys()
        for name, grad in found.items():
            torch.testing.assert_close(whole(grad), truth[name], rtol=1e-3, atol=1e-6, msg=name)


def main(how: str, folder: str) -> None:
    torch.set_num_threads(1)
    init_process_group("gloo")
    for name, dem in DEMS.items():
        expected = built(dem)
        if get_rank() == 0:
            expected.save_pretrained(Path(folder, name))
        barrier()
        {"tp": by_tensors, "fsdp": by_modules}[how](Path(folder, name), expected)
        print(get_rank(), how, name, flush=True)
    destroy_process_group()
