"""CUDA graphs: what they capture must neither wait for the GPU nor copy from the host, and gives the same results."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dualview as dv
from dualview.kernels import crop_normalize, tables
from dualview.models import InfLlavaModel
from dualview.ops.planned import run
from tests.ops.planned.rates import machine
from tests.tiny import tiny_config

GRID, WIDTH = (2, 3), 32
PARTS = ("released", "paper", "encoder", "INF-LLaVA", "photograph")
LEARNING = PARTS[:-1]  # the pixels of a photograph need no gradient

Call = Callable[..., Tensor]


class Patches(nn.Module):
    """The least tower: a convolution. (T, 3, 8, 12) -> (T, 4, 6, 32)"""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).movedim(1, -1)


def made(part: str) -> tuple[nn.Module, Call, list[Tensor]]:
    """A module on the default device, a call of it, and what the call takes."""
    if part == "photograph":
        options: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "backend": "torch"}
        photos = torch.ones(2, 3, 8, 12, dtype=torch.uint8)
        return nn.Identity(), lambda x: torch.cat(dv.normalized_crop(x, GRID, **options), 1), [photos]
    if part == "INF-LLaVA":
        model = InfLlavaModel(tiny_config()).eval()
        return model, lambda x: torch.stack(list(model.get_image_features(x).pooler_output)), [torch.ones(1, 3, 56, 84)]
    preset = "paper" if part == "paper" else "released"
    dem = getattr(dv.DualPerspectiveEnhance, preset)(WIDTH)
    if part == "encoder":
        encoder = dv.DualViewEncoder(Patches(), dem, tile=(8, 12), grid=GRID)
        return encoder, encoder, [torch.ones(2, 3, 16, 36)]
    tiles = [torch.ones(2, 6, 4, 6, WIDTH) for _ in range(2)]
    return dem, lambda *given: dem(*given, GRID), tiles


def step(module: nn.Module, call: Call, given: list[Tensor], backward: bool) -> tuple[Tensor, ...]:
    """The output, and gradients of all parameters with ``backward``."""
    with torch.set_grad_enabled(backward):
        out = call(*given)
    if not backward:
        return (out,)
    gradients = torch.autograd.grad(out.cos().sum(), list(module.parameters()), allow_unused=True)
    return out.detach(), *(gradient for gradient in gradients if gradient is not None)


BOTH = [(part, backward) for part in PARTS for backward in (False, True) if part in LEARNING or not backward]


# --- Without a GPU ----------------------------------------------------------------------------------------------------


class OfTheHost(TorchDispatchMode):
    """Notes what makes the host wait for the GPU, and what it sends there."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        if func.__name__.startswith(self.WAITING) or (masks and func.__name__.startswith(("index.", "index_put"))):
            self.found.append(str(func))
        out = func(*args, **(kwargs or {}))
        copies = func.__name__.startswith(("_to_copy", "copy_"))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors if x.dim() or copies}) > 1:  # a number is an argument of the kernel
            self.found.append(str(func))
        return out


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are kept for fake tensors, too, as they are for others."""
    found: dict[Any, Tensor] = {}

    def table(make: Any, *args: Any, like: Tensor) -> Tensor:
        key = make, args, like.device
        if key not in found:
            found[key] = make(torch.device("cpu"), *args).to(like.device)
        return found[key]

    for module in (run, crop_normalize):
        assert module.table is tables.table
        monkeypatch.setattr(module, "table", table)


@pytest.mark.parametrize("fastest", ["never measured", "attention is free", "operations count, then launches"])
@pytest.mark.parametrize("part", PARTS)
def test_the_host_is_not_waited_for(part: str, fastest: str, kept: None) -> None:
    """Of tensors of a GPU that have no contents; the first call makes the tables."""
    with FakeTensorMode(), torch.device("cuda"), machine(fastest):
        module, call, given = made(part)
        step(module, call, given, backward=False)
        with OfTheHost() as host:
            out, *_ = step(module, call, given, backward=False)
    assert out.device.type == "cuda"
    assert host.found == []


@pytest.mark.parametrize("part", LEARNING)
def test_nor_by_gradients(part: str) -> None:
    """Of tensors of a CPU, for autograd asks for the driver of a GPU."""
    module, call, given = made(part)
    step(module, call, given, backward=True)
    with OfTheHost() as host:
        _, *gradients = step(module, call, given, backward=True)
    assert gradients
    assert host.found == []


@pytest.mark.parametrize(
    "wait, waits",
    [
        (lambda x: x.sum().item(), True),
        (lambda x: x[x > 0], True),
        (lambda x: x.cpu(), True),
        (lambda x: x.sum().cpu(), True),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="cuda"), True),
        (lambda x: x + torch.ones(3, device="cpu").to("cuda"), True),
        (lambda x: (x + 1.0).mean() * 2, False),
    ],
)
def test_the_check_sees_what_waits(wait: Callable[[Tensor], object], waits: bool) -> None:
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        with OfTheHost() as host, suppress(RuntimeError):  # of a tensor without contents no number is known
            wait(x)
    assert bool(host.found) == waits


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(part: str) -> Iterator[tuple[nn.Module, Call, list[Tensor]]]:
    torch._dynamo.reset()
    with torch.device("cuda"):
        yield made(part)
    torch._dynamo.reset()


def renew(given: list[Tensor]) -> None:
    """Other contents at the same addresses, which is where a graph reads."""
    for x in given:
        x.copy_(torch.randint(256, x.shape, device=x.device) if x.dtype == torch.uint8 else torch.randn_like(x))


@pytest.mark.gpu
@pytest.mark.parametrize("part, backward", BOTH)
def test_an_explicit_capture(part: str, backward: bool, on_gpu: Any) -> None:
    call = partial(step, *on_gpu, backward)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        renew(on_gpu[2])
        graph.replay()
        torch.testing.assert_close(captured, call(), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("part, backward", BOTH)
def test_reduce_overhead(part: str, backward: bool, on_gpu: Any, recwarn: pytest.WarningsRecorder) -> None:
    module, call, given = on_gpu
    compiled = torch.compile(call, mode="reduce-overhead")
    for _ in range(4):
        renew(given)
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in step(module, compiled, given, backward)]
        torch.testing.assert_close(found, list(step(module, call, given, backward)), rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
