"""The plans for tensor parallelism and FSDP2, carried out by two processes: see `tests.models.two_processes`."""

import os
import socket
import subprocess
import sys

import pytest


@pytest.mark.more
@pytest.mark.parametrize("how", ["tp", "fsdp"])
def test_two_processes_share_a_model(how, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.models.two_processes", how, str(tmp_path)]
    environments = [os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    runs = [
        subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for own in environments
    ]
    for rank, run in zip("01", runs, strict=True):
        output = run.communicate(timeout=300)[0].decode()
        assert run.returncode == 0, output[-3000:]
        assert output.count(f"{rank} {how}") == 4, output[-3000:]
