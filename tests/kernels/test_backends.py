"""The public calls on either backend: the same results, and the same gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dualview as dv
from dualview.geometry import LiveTiles
from dualview.kernels import dispatch

pytest.importorskip("triton")

GRID = (2, 3)
PRESETS = {
    "paper": dv.DualPerspectiveEnhance.paper,
    "paper, two heads": partial(dv.DualPerspectiveEnhance.paper, num_heads=2),
    "released": dv.DualPerspectiveEnhance.released,
    "released, everything read": partial(dv.DualPerspectiveEnhance.released, readout="none"),
    "both roles played by the sum": partial(dv.DualPerspectiveEnhance.released, source="sum"),
}


def randomised(module: nn.Module) -> nn.Module:
    """With weights, biases and norms that all matter."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def tiles(device: str, tokens: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, 6, *tokens, 32, device=device, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "preset, tokens",
    [(preset, (2, 2)) for preset in PRESETS] + [("paper", (2, 3))],  # the last with whole cells in every block
    ids=str,
)
def test_enhancement(preset: str, tokens: tuple[int, int], masked: bool, device: str) -> None:
    dem = randomised(PRESETS[preset](32)).to(device)
    local, stride = tiles(device, tokens)
    mask = torch.rand(2, 2 * tokens[0], 3 * tokens[1], device=device) < 0.6 if masked else None
    if mask is not None:
        mask[0, : tokens[0], : tokens[1]] = False  # a block without any key
    wanted = [local, stride, *dem.parameters()]
    found = []
    for backend in ("torch", "triton"):
        out = dem(local, stride, GRID, mask, backend=backend)
        found.append((out, torch.autograd.grad(out.cos().sum(), wanted, allow_unused=True)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("perspective", ["local", "global"])
def test_crops(perspective: str, device: str) -> None:
    crop = {"local": dv.local_crop, "global": dv.global_stride_crop}[perspective]
    x = torch.randn(2, 4, 9, 5, device=device)
    cut = crop(x, GRID, data_format="channels_last", backend="triton")
    assert torch.equal(cut, crop(x, GRID, data_format="channels_last", backend="torch"))
    assert torch.equal(dv.recombine(cut, GRID, perspective, data_format="channels_last", backend="triton"), x)
    images = x.movedim(-1, 1).contiguous()
    assert torch.equal(crop(images, GRID, backend="triton"), cut.movedim(-1, 2))


@pytest.mark.parametrize("live", [None, LiveTiles((0, 5), (3,)), LiveTiles((), (0, 1, 2, 3, 4, 5))])
def test_normalized_crop(live: LiveTiles | None, device: str) -> None:
    photo = torch.randint(256, (2, 4, 9, 3), dtype=torch.uint8, device=device)
    options = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "live": live, "data_format": "channels_last"}
    ours, plain = (dv.normalized_crop(photo, GRID, **options, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    pixels = photo.float().requires_grad_()
    with pytest.raises(RuntimeError, match="gradients of pixels are not implemented"):
        dv.normalized_crop(pixels, GRID, **options, backend="triton")


def test_what_cannot_run_says_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_installed", False)
    dem = dv.DualPerspectiveEnhance.paper(32).to(device)
    with pytest.raises(RuntimeError, match=r"the kernel retile cannot run. triton is not installed"):
        dem(*tiles(device, (2, 2)), GRID, backend="triton")


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_compiled_as_one_graph(preset: str, device: str) -> None:
    dem = randomised(PRESETS[preset](32)).to(device)
    given = tiles(device, (2, 2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: dem(*x, GRID, backend="triton"), fullgraph=True, backend="aot_eager")
    pairs = ((out := f(*given), torch.autograd.grad(out.sin().sum(), given)) for f in (
        compiled, lambda *x: dem(*x, GRID, backend="torch")
    ))  # fmt: skip
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("unguarded")
def test_exported(device: str) -> None:
    class OnAGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dem = randomised(PRESETS["paper"](32)).to(device)

        def forward(self, local: Tensor, stride: Tensor) -> Tensor:
            return self.dem(local, stride, GRID, backend="triton")

    module, given = OnAGrid(), tiles(device, (2, 2))
    program = torch.export.export(module, given)
    assert any("dualview.retile" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*given), module.dem(*given, GRID), rtol=1e-4, atol=2e-5)


# --- What a CUDA graph, and a GPU that waits for the host, ask of the enhancement module ------------------------------


class MadeOfNumbers(TorchDispatchMode):
    """Counts tensors that are made of Python's numbers, which a GPU would have to be sent."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("elsewhere")  # what a kernel does itself is not seen, and under the interpreter slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_second_call_sends_no_tables(preset: str, backend: str, device: str) -> None:
    dem = randomised(PRESETS[preset](32)).to(device)
    local, stride = tiles(device, (2, 3))
    mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    made = []
    for _ in range(2):
        with MadeOfNumbers() as numbers:
            out = dem(local, stride, GRID, mask, backend=backend)
            torch.autograd.grad(out.sum(), (local, stride, *dem.parameters()), allow_unused=True)
        made.append(numbers.count)
    assert made[1] == 0


def step(dem: nn.Module, given: tuple[Tensor, ...], backend: str, *, backward: bool) -> tuple[Tensor, ...]:
    """The result, and the gradients of everything."""
    with torch.set_grad_enabled(backward):
        out = dem(*given, GRID, backend=backend)
    wanted = (*given, *dem.parameters()) if backward else ()
    grads = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True) if backward else ()
    return (out, *(grad for grad in grads if grad is not None))


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_in_a_graph_on_another_stream(preset: str, backend: str, backward: bool, device: str) -> None:
    dem, given = randomised(PRESETS[preset](32)).to(device), tiles(device, (4, 6))
    call = partial(step, dem, given, backend, backward=backward)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = call()  # compiled, the blocks chosen and the tables made, before it is captured
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
        with torch.no_grad():
            for x in given:
                x.normal_()
        graph.replay()
        expected = call()
    stream.synchronize()
    assert not torch.equal(expected[0], before[0])
    torch.testing.assert_close(captured, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_on_the_second_device(preset: str, backend: str) -> None:
    dem, given = randomised(PRESETS[preset](32)).to("cuda:0"), tiles("cuda:0", (4, 6))
    expected = step(dem, given, backend, backward=True)
    moved = tuple(x.detach().to("cuda:1").requires_grad_() for x in given)
    found = step(dem.to("cuda:1"), moved, backend, backward=True)  # while the first is the current one
    assert {x.device.index for x in found} == {1}
    torch.testing.assert_close([x.to("cuda:0") for x in found], list(expected), rtol=1e-4, atol=2e-5)
