"""One of two processes that train together.

The processes get different numbers of images, none among them. A process that waits for the other in vain is ended by
the time limit of its process group.
"""

import copy
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dualview as dv
from tests.attach.hosts import inputs_for
from tests.attach.matrix import Trial, open_gates, ours
from tests.checks import refuses

TEXT = {"input_ids": torch.tensor([[1, 5, 6, 7]])}


def sharded(model: nn.Module, how: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    tower = model.get_encoder(modality="image")
    if how.startswith("layers"):
        blocks = [m for m in model.modules() if type(m).__name__.endswith(("EncoderLayer", "Block", "DecoderLayer"))]
        assert len(blocks) > 3
        for block in blocks:
            fully_shard(block, mesh=mesh)
    if how == "module":
        fully_shard(tower.dualview, mesh=mesh)
    if how == "tower":
        fully_shard(tower, mesh=mesh)
    if how == "encoder":
        fully_shard(tower.encoder, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model.zero_grad()
    model(**inputs).logits.float().square().mean().backward()


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def main(family: str) -> None:
    torch.set_num_threads(1)
    trial = Trial(family)
    host = dv.attach(copy.deepcopy(trial.bare), max_tiles_per_pass=64)
    open_gates(host)
    host.train()
    text = dict(TEXT)
    if "mm_token_type_ids" in trial.inputs:
        text["mm_token_type_ids"] = torch.zeros_like(text["input_ids"])
    several = inputs_for(trial.bare, family, images=2)
    batches = [(trial.inputs, text), (text, several), (text, text), (several, trial.inputs)]

    expected = []
    for batch in batches:
        found = []
        for inputs in batch:
            step(host, inputs)
            found.append({name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None})
        names = set(found[0]) & set(ours(host))
        expected.append({name: (found[0][name] + found[1][name]) / 2 for name in names})
    assert all(len(one) == len(ours(host)) for one in expected)

    init_process_group("gloo", timeout=timedelta(seconds=100))
    rank = get_rank()
    ways = ["ddp", "whole", "module", "layers", "layers, all trained", "tower"]
    if family == "llava":  # transformers collects hidden states by the class of a tower, which sharding changes
        ways[-1] = "encoder"
        alone = copy.deepcopy(trial.bare)
        fully_shard(alone.get_encoder(modality="image"), mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(TypeError, match="subscriptable"):  # with nothing attached
            alone(**trial.inputs)
    for how in ways:
        torch.manual_seed(0)
        model = copy.deepcopy(trial.bare)
        dv.attach(model)
        model.load_state_dict(host.state_dict())
        model.train()
        for name, parameter in model.named_parameters():  # the module and the projector are trained, or everything
            parameter.requires_grad_("all" in how or "dualview" in name or "projector" in name or "merger" in name)
        wrapped = DistributedDataParallel(model) if how == "ddp" else sharded(model, how)
        for batch, wanted in zip(batches, expected, strict=True):
            step(wrapped, batch[rank])
            for name, parameter in ours(model).items():
                torch.testing.assert_close(whole(parameter.grad), wanted[name], rtol=1e-3, atol=1e-6)
        print(rank, how, flush=True)
    for wrapped in (DistributedDataParallel(copy.deepcopy(trial.bare)), sharded(copy.deepcopy(trial.bare), "whole")):
        with refuses("attach to the model"):
            dv.attach(wrapped)
    done = torch.ones(1)
    all_reduce(done)
    destroy_process_group()
