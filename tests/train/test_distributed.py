"""Two processes on a CPU end where one process does, also where the batch of one has no image."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from dualview.train import TrainConfig, train
from tests.fresh import run_two
from tests.train.data import fields, weights, write_data

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}


def plan(folder, output, arguments=None):
    """A row for every pass, in no order of kinds: with and without an image side by side."""
    run = fields(folder, output)
    for name in ("stage1", "stage2"):
        run[name] |= {"rows_per_device": 1, "group_by_length": False}
        run[name] |= {"arguments": arguments or {}}
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("processes"))
    train(TrainConfig.of(plan(folder, "one")), report=lambda line: None)
    return folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]


def by_torchrun(*arguments):
    """As users start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.train.two_processes", *arguments]
    return [subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)]


def by_copies(*arguments):
    """In less time."""
    return run_two("import sys; from tests.train.two_processes import main; main(*sys.argv[1:])", *arguments)


@pytest.mark.more
@pytest.mark.parametrize("how, start", [("ddp", by_torchrun), ("fsdp", by_copies)])
def test_two_processes_are_one(place, how, start):
    (place / f"{how}.yaml").write_text(yaml.safe_dump(plan(place, how, FSDP if how == "fsdp" else None)))
    for process in start(str(place / f"{how}.yaml"), how):
        assert process.returncode == 0, process.stderr[-3000:]
    for stage in ("stage1", "stage2"):
        torch.testing.assert_close(losses(place / how / stage), losses(place / "one" / stage), rtol=1e-4, atol=0)
        expected, found = weights(place / "one" / stage / "model"), weights(place / how / stage / "model")
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=5e-5)

    before = weights(place / how / "stage2" / "model")
    shutil.rmtree(place / how / "stage2" / "model")
    shutil.rmtree(place / how / "stage2" / "checkpoint-6")
    for process in by_copies(str(place / f"{how}.yaml"), how):  # resumed
        assert process.returncode == 0, process.stderr[-3000:]
    after = weights(place / how / "stage2" / "model")
    assert all(torch.equal(after[name], value) for name, value in before.items())
