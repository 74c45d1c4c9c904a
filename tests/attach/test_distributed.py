"""Two processes with different numbers of images, none among them: see `tests.attach.two_processes`."""

import os

import pytest

from tests.fresh import run_two


@pytest.mark.more
@pytest.mark.parametrize(
    "family", ["llava", "paligemma", "qwen2_5_vl"] if "TEST_ALL" in os.environ else ["llava", "qwen2_5_vl"]
)
def test_nobody_waits_for_a_process_without_an_image(family):
    code = "import sys; from tests.attach.two_processes import main; main(*sys.argv[1:])"
    for rank, process in enumerate(run_two(code, family)):
        assert process.returncode == 0, process.stderr[-3000:]
        assert f"{rank} layers, all trained" in process.stdout
