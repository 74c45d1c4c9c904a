"""Two processes with different numbers of images, none among them: see `tests.attach.two_processes`."""

import os
import subprocess
import sys

import pytest


@pytest.mark.more
@pytest.mark.parametrize(
    "family", ["llava", "paligemma", "qwen2_5_vl"] if "TEST_ALL" in os.environ else ["llava", "qwen2_5_vl"]
)
def test_nobody_waits_for_a_process_without_an_image(family, tmp_path):
    command = [sys.executable, "-m", "tests.attach.two_processes"]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), family], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    outputs = [run.communicate(timeout=600)[0].decode() for run in runs]
    for rank, (run, output) in enumerate(zip(runs, outputs, strict=True)):
        assert run.returncode == 0, output[-3000:]
        assert f"{rank} layers, all trained" in output
