"""Tests do not depend on those before them: see the fixtures of tests/conftest.py."""

import logging
import os
from pathlib import Path

import pytest
import torch

from tests.conftest import OF_THE_PROCESS, alone


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return torch.rand(3)


def test_a_fixture_of_a_module_draws_the_same_numbers(drawn: torch.Tensor) -> None:
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_what_is_changed_for_the_whole_process_is_put_back(tmp_path: Path) -> None:
    before = [read() for read, _ in OF_THE_PROCESS]
    with alone():
        os.environ["HOME"] = "changed"
        os.environ["NEW"] = "1"
        del os.environ["PATH"]
        os.chdir(tmp_path)
        logging.disable()
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        changed = [read() for read, _ in OF_THE_PROCESS]
    assert all(x != y for x, y in zip(before, changed, strict=True))
    assert [read() for read, _ in OF_THE_PROCESS] == before
