"""What every test shares: how Hypothesis searches, and how many threads torch takes."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def set_environment(values: dict[str, str]) -> None:
    for name in environment().keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


OF_THE_PROCESS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (environment, set_environment),
    (Path.cwd, os.chdir),
    (lambda: logging.root.manager.disable, logging.disable),
    (lambda: logging.getLogger("transformers").level, logging.getLogger("transformers").setLevel),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
]
"""What all tests of a process share, and libraries change: how to read it, and how to set it."""


@contextmanager
def alone() -> Iterator[None]:
    """Nothing within depends on what was before it: random numbers are the same, and what it changes is put back."""
    torch.manual_seed(0)
    before = [read() for read, _ in OF_THE_PROCESS]
    yield
    for (read, put), value in zip(OF_THE_PROCESS, before, strict=True):
        if read() != value:
            put(value)


@pytest.fixture(autouse=True, scope="module")
def _module_alone() -> Iterator[None]:
    """Before the other fixtures of a module: they would go on where the last test of another module ended."""
    with alone():
        yield


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with alone():
        yield
