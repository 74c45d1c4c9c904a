"""Tables of indices are made once; and whatever a first call is in the middle of, later calls can use its tables."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dualview as dv
from dualview.cost import cost_of
from dualview.kernels import tables
from dualview.kernels.tables import index_tensor, table

GRID, TOKENS, DIM = (2, 3), (2, 3), 16
PRESETS = {
    "paper": partial(dv.DualPerspectiveEnhance.paper, readout="bilinear"),
    "released": dv.DualPerspectiveEnhance.released,
}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over attention under vmap


@pytest.fixture(autouse=True)
def _none_kept() -> Iterator[None]:
    tables._kept.clear()
    yield
    tables._kept.clear()  # which may be of a device that was pretended


class OnAGrid(nn.Module):
    """A DEM with its grid and a mask, as a compiler and an exporter want it."""

    def __init__(self, preset: str) -> None:
        super().__init__()
        self.dem = PRESETS[preset](DIM)

    def forward(self, local_tiles: Tensor, stride_tiles: Tensor) -> Tensor:
        mask = torch.ones(4, 9, dtype=torch.bool, device=local_tiles.device)
        return self.dem(local_tiles, stride_tiles, GRID, mask)


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, 6, *TOKENS, DIM, device=device) for _ in range(2))


def with_gradients(module: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    given = tuple(x.clone().requires_grad_() for x in given)
    out = module(*given)
    return out.detach(), *torch.autograd.grad(out.sin().sum(), given)


def fake(preset: str) -> None:
    with FakeTensorMode():  # which takes no other tensors
        with_gradients(OnAGrid(preset), inputs())


def counted(module: nn.Module) -> None:
    cost_of(lambda it: it(*inputs()), module)


def inference(module: nn.Module) -> None:
    with torch.inference_mode():
        module(*inputs())


def another_default_device(module: nn.Module) -> None:
    given = inputs()
    with torch.device("meta"):
        module(*given)


def vmap(module: nn.Module) -> None:
    torch.func.vmap(module, in_dims=2, out_dims=2)(*(torch.stack([x, x], 2) for x in inputs()))


def gradient_transform(module: nn.Module) -> None:
    torch.func.grad(lambda *x: module(*x).sum())(*inputs())


FIRST_CALLS: dict[str, Callable[[str], object]] = {
    "inference mode": lambda preset: inference(OnAGrid(preset)),
    "fake tensors": fake,
    "fake tensors in place of weights": lambda preset: counted(OnAGrid(preset)),
    "the meta device": lambda preset: OnAGrid(preset).to("meta")(*inputs("meta")),
    "another default device": lambda preset: another_default_device(OnAGrid(preset)),
    "vmap": lambda preset: vmap(OnAGrid(preset)),
    "a gradient transform": lambda preset: gradient_transform(OnAGrid(preset)),
    "a compiler": lambda preset: torch.compile(OnAGrid(preset), fullgraph=True, backend="aot_eager")(*inputs()),
    "an exporter": lambda preset: torch.export.export(OnAGrid(preset), inputs()),
    "a strict exporter": lambda preset: torch.export.export(OnAGrid(preset), inputs(), strict=True),
}


@pytest.mark.parametrize("call", FIRST_CALLS)
@pytest.mark.parametrize("preset", PRESETS)
def test_whichever_call_comes_first(preset: str, call: str) -> None:
    torch._dynamo.reset()
    module, given = OnAGrid(preset), inputs()
    expected = with_gradients(module, given)
    FIRST_CALLS[call](preset)  # after an ordinary call
    tables._kept.clear()
    FIRST_CALLS[call](preset)  # before one
    for x, same in zip(with_gradients(module, given), expected, strict=True):
        assert torch.equal(x, same)
    assert tables._kept


def test_is_made_once_for_a_device() -> None:
    made: list[torch.device] = []

    def count_to(device: torch.device, n: int) -> Tensor:
        made.append(device)
        return torch.arange(n, device=device)

    first = table(count_to, 3, like=torch.zeros(1))
    assert first.tolist() == [0, 1, 2]
    assert table(count_to, 3, like=torch.zeros(2, requires_grad=True)) is first
    assert table(count_to, 3, like=nn.Parameter(torch.zeros(1))) is first
    assert len(made) == 1
    assert table(count_to, 4, like=torch.zeros(1)).tolist() == [0, 1, 2, 3]
    assert table(count_to, 3, like=torch.zeros(1, device="meta")).is_meta
    assert table(count_to, 3, like=torch.zeros(1)) is first


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, lambda: torch.device("meta"), nullcontext])
def test_what_is_kept_is_an_ordinary_tensor(mode: Callable[[], Any]) -> None:
    like = torch.zeros(1)
    with mode():
        found = table(index_tensor, (2, 0), like=like)
    assert type(found) is Tensor
    assert not found.is_inference()
    assert (found.device.type, found.dtype, found.tolist()) == ("cpu", torch.int64, [2, 0])
    with FakeTensorMode():
        assert isinstance(table(index_tensor, (2, 0), like=torch.zeros(1)), FakeTensor)


def test_modules_hold_no_tables() -> None:
    module = OnAGrid("released")
    before = len(pickle.dumps(module))
    module(*inputs())
    assert len(pickle.dumps(module)) == before
    assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()
