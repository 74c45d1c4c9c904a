"""A run killed by SIGKILL at any moment, and resumed, ends with the weights of an unbroken one, bit for bit."""

import importlib
import json
import os
import signal
from operator import attrgetter

import pytest
import torch

from dualview.train import TrainConfig, train
from dualview.train.checkpoints import STAGED, checkpoints
from tests.fresh import run_with_libraries
from tests.train.data import config, fields, weights, write_data

MOMENTS = {
    "within a step of stage 2": "dualview.train.trainer:DualViewTrainer.compute_loss:10",
    "before the update of the weights": "torch.optim:AdamW.step:6",
    "weights written, not the optimiser": "torch:save:5",
    "half of the files written": "torch:save:8",
    "all written, not yet named": "dualview.train.checkpoints:Path.rename:2",
    "named, the old one half removed": "dualview.train.checkpoints:shutil.rmtree:5",
    "while the result of stage 1 is written": "dualview.train.trainer:DualViewTrainer.save_model:3",
    "while the last result is written": "dualview.train.trainer:publish:7",
}
"""Where a run dies: before the call of that number of a function of a module does anything."""
WHOLE = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def run_until(where: str, given: str) -> None:
    """In a process of its own: train, and die there."""
    torch.set_num_threads(1)
    module, function, call = where.split(":")
    path, _, name = function.rpartition(".")
    owner = importlib.import_module(module)
    owner = attrgetter(path)(owner) if path else owner
    inner, left = getattr(owner, name), [int(call)]

    def outer(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)

    setattr(owner, name, outer)
    train(TrainConfig.of(json.loads(given)), report=lambda line: None)


RUN_UNTIL = "import sys; from tests.train.test_killed import run_until; run_until(*sys.argv[1:])"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("killed"), dropout=0.1)
    train(config(folder), report=lambda line: None)
    return folder


@pytest.mark.more
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_as_if_nothing_had_happened(place, tmp_path, moment):
    again = fields(place) | {"output": str(tmp_path / "run")}
    killed = run_with_libraries(RUN_UNTIL, MOMENTS[moment], json.dumps(again))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for stage in ("stage1", "stage2"):
        for checkpoint in checkpoints(tmp_path / "run" / stage):
            assert {path.name for path in checkpoint.iterdir()} >= WHOLE
    train(TrainConfig.of(again), resume=True, report=lambda line: None)
    for stage in ("stage1", "stage2"):
        expected, found = weights(place / "run" / stage / "model"), weights(tmp_path / "run" / stage / "model")
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert not list((tmp_path / "run" / stage).glob(f"{STAGED}*"))
