"""A run killed by SIGKILL at any moment, and resumed, ends with the weights of an unbroken one, bit for bit."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from dualview.train import train
from dualview.train.checkpoints import STAGED, checkpoints
from tests.train.data import config, weights, write_data

MOMENTS = {
    "within a step of stage 2": ("dualview.train.trainer:DualViewTrainer.compute_loss:10", [2, 2]),
    "before the update of the weights": ("torch.optim:AdamW.step:6", [2, 2]),
    "weights written, not the optimiser": ("torch:save:4", [2, 0]),
    "half of the files written": ("torch:save:8", [2, 2]),
    "all written, not yet named": ("dualview.train.checkpoints:Path.rename:2", [1, 0]),
    "named, the old one half removed": ("dualview.train.checkpoints:shutil.rmtree:5", None),
    "while the result of stage 1 is written": ("dualview.train.trainer:DualViewTrainer.save_model:2", None),
    "while the last result is written": ("dualview.train.trainer:publish:7", None),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("killed"))
    train(config(folder), report=lambda line: None)
    return folder


@pytest.mark.more
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_as_if_nothing_had_happened(place, tmp_path, moment):
    where = MOMENTS[moment][0]
    fields = config(place).plain() | {"output": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "tests.train.killed", str(tmp_path / "run.yaml"), where]
    killed = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    for folder in (tmp_path / "run" / "stage1", tmp_path / "run" / "stage2"):
        for checkpoint in checkpoints(folder):
            names = {path.name for path in checkpoint.iterdir()}
            assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    command[2:] = ["dualview", "train", str(tmp_path / "run.yaml"), "--resume"]
    resumed = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert resumed.returncode == 0, resumed.stderr.decode()[-2000:]
    for stage in ("stage1", "stage2"):
        expected, found = weights(place / "run" / stage / "model"), weights(tmp_path / "run" / stage / "model")
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert not list((tmp_path / "run" / stage).glob(f"{STAGED}*"))
