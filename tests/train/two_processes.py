"""A run of training, one of several processes: torchrun ... -m tests.train.two_processes CONFIG HOW.

accelerate does not shard on CPUs: it would go on with DDP and say nothing. For "fsdp" it is told that these are GPUs.
"""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from dualview.train import DualViewTrainer, TrainConfig, train


def shard_on_cpus() -> None:
    made, whole = PartialState.__init__, DualViewTrainer.compute_loss

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def sharded(self, model, *args, **kwargs):
        assert type(model).__name__.startswith("FSDP"), type(model)
        return whole(self, model, *args, **kwargs)

    PartialState.__init__ = init
    DualViewTrainer.compute_loss = sharded


def main(config: str, how: str) -> None:
    torch.set_num_threads(1)
    if how == "fsdp":
        shard_on_cpus()
    train(TrainConfig.load(config), resume=True)
    assert PartialState().num_processes == 2, "each trained for itself"


if __name__ == "__main__":
    main(*sys.argv[1:])
