"""What every test shares: how Hypothesis searches, and how many threads torch takes."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from tests.strategies import examples

if not torch.cuda.is_available():  # tests/kernels needs triton's interpreter, asked for before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "default", deadline=None, derandomize="CI" in os.environ, max_examples=examples(25), print_blob=True
)
settings.load_profile("default")

# The tensors of the tests are small: more threads only wait for each other, all the more beside pytest-xdist's workers.
torch.set_num_threads(1)


def of_the_process() -> dict[str, object]:
    """What all tests of a process share."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "hooks": dict(nn.modules.module._global_forward_hooks),
        "a module's call": nn.Module.__call__,
        "silenced logs": logging.root.manager.disable,
        "interruptions": signal.getsignal(signal.SIGINT),
        "folder": Path.cwd(),
        **{f"${name}": value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    }


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """A test begins with the same random numbers, and leaves the process as it found it."""
    torch.manual_seed(0)
    before = of_the_process()
    yield
    after = of_the_process()
    assert after == before
