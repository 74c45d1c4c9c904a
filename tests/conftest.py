"""What every test shares: how Hypothesis searches, and how many threads torch takes."""

import os

import pytest
import torch
from hypothesis import settings

from tests.strategies import examples

if not torch.cuda.is_available():  # tests/kernels needs triton's interpreter, asked for before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "default", deadline=None, derandomize="CI" in os.environ, max_examples=examples(25), print_blob=True
)
settings.load_profile("default")

# The tensors of the tests are small: more threads only wait for each other, all the more beside pytest-xdist's workers.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
