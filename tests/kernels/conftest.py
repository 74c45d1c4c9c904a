"""Kernels run on the GPU, or under triton's interpreter where there is none; what they allocate is poisoned."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dualview.kernels import dispatch
from tests.strategies import examples, laid_out  # noqa: F401 - the tests here take both from here

if not torch.cuda.is_available():
    assert "triton" not in sys.modules or dispatch.interpreting(), (
        "triton was imported before it could be told to interpret: set TRITON_INTERPRET=1 before"
    )
    os.environ["TRITON_INTERPRET"] = "1"

ORDINARY_EMPTY = dispatch.empty

GUARD = 64
"""Elements on either side of a guarded tensor."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: makes sense on a GPU only")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _interpreter_rounds():
    """Let the interpreter round float32 to bfloat16 as a GPU does, to nearest even: it cuts the lower bits off."""
    if not dispatch.interpreting() or find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def cast(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return ordinary_cast(self, x, dtype)
        rounded = torch.from_numpy(x.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)

    ordinary_cast, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, cast
    yield
    InterpreterBuilder.cast_impl = ordinary_cast


def poison(dtype: torch.dtype) -> float | int | bool:
    """A value that no test expects: NaN where there is one."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def intact(guard: Tensor) -> bool:
    """Whether nothing was written into a guard."""
    return bool(guard.isnan().all()) if guard.is_floating_point() else bool((guard == poison(guard.dtype)).all())


def guarded(x: Tensor, layout: str = "") -> Tensor:
    """``x`` in a memory layout, in the middle of poisoned memory: a kernel that reads beside or between it shows."""
    if layout == "expanded":
        return laid_out(guarded(x), layout)
    x = laid_out(x, layout)
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    around = torch.full((span + 2 * GUARD,), poison(x.dtype), dtype=x.dtype, device=x.device)
    return around.as_strided(x.shape, x.stride(), GUARD).copy_(x) if x.numel() else x


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What kernels allocate is poisoned, and guarded on both sides; afterwards the guards must be intact."""
    allocated: list[Tensor] = []

    def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        size = torch.Size(shape).numel()
        dtype = dtype or like.dtype
        around = torch.full((size + 2 * GUARD,), poison(dtype), dtype=dtype, device=like.device)
        allocated.append(around)
        return around[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(dispatch, "empty", empty)
    yield
    for around in allocated:
        assert intact(around[:GUARD]), "the kernel wrote before its output"
        assert intact(around[-GUARD:]), "the kernel wrote after its output"


@pytest.fixture
def elsewhere(monkeypatch):
    """The ops are called where no kernel can be launched, as by a program that was exported on a GPU."""
    monkeypatch.setattr(dispatch, "runs_on", lambda x: False)
    monkeypatch.setattr(dispatch, "_refusals", lambda kernel, x: ())


@pytest.fixture
def unguarded(monkeypatch):
    """Ordinary allocation, for `torch.library.opcheck`, which compares storage offsets."""
    monkeypatch.setattr(dispatch, "empty", ORDINARY_EMPTY)
