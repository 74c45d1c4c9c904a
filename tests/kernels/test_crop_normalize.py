"""Normalised tiles against those of the ordinary crops in float64, from any image layout, of any live tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualview.kernels.crop_normalize import crop_normalize
from dualview.ops.normalized_crop import normalized_crop
from tests import reference
from tests.checks import fresh, refuses
from tests.kernels.conftest import examples, guarded
from tests.strategies import grids, tiles

pytest.importorskip("triton")

SCALES = [(1 / (255 * 0.27), -0.48 / 0.27), (0.5, 0.25), (2.0, -1.0)]
layouts = st.sampled_from(["channels_first", "channels_last", "transposed", "sliced"])
image_types = st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.float16])
tile_types = st.sampled_from([torch.bfloat16, torch.float32, torch.float16])


def image(shape, dtype, layout, device):
    """An image (B, 3, H, W) in memory of its own layout, with poison around."""
    if dtype == torch.uint8:
        x = torch.randint(256, shape, dtype=dtype, device=device)
    else:
        x = torch.randn(shape, device=device).to(dtype)
    if layout == "channels_last":
        return guarded(x.movedim(1, -1).contiguous()).movedim(-1, 1)
    return guarded(x, layout)


def exact(x, grid, perspective, live):
    factor, offset = torch.tensor(SCALES, dtype=torch.float64, device=x.device).T.reshape(2, 3, 1, 1)
    return reference.crop(x.double() * factor + offset, grid, perspective, "channels_first")[:, list(live)]


@st.composite
def live_tiles(draw, num_tiles):
    some = st.lists(st.integers(0, num_tiles - 1), unique=True)
    return draw(st.none() | st.tuples(some, some))


@given(st.data(), grids, tiles, image_types, tile_types, layouts)
@settings(max_examples=examples(60))
def test_error_is_that_of_torch(device, data, grid, tile, dtype, of_tiles, layout):
    x = image((2, 3, grid[0] * tile[0], grid[1] * tile[1]), dtype, layout, device)
    live = data.draw(live_tiles(grid[0] * grid[1]))
    found, plain = (
        crop_normalize(x, grid, SCALES, live=live, dtype=of_tiles, backend=backend) for backend in ("triton", "torch")
    )
    every = range(grid[0] * grid[1])
    for perspective, one, other, chosen in zip(("local", "global"), found, plain, live or (every, every), strict=True):
        expected = exact(x, grid, perspective, chosen)
        assert one.shape == other.shape == expected.shape
        assert one.dtype == other.dtype == of_tiles
        assert fresh(one, x, *plain)
        roundings = torch.finfo(torch.float32).eps * (expected.abs() + 2)  # a GPU fuses product and sum, or not
        allowed = 2 * (other.double() - expected).abs() + roundings
        assert ((one.double() - expected).abs() <= allowed).all()
        assert ((other.double() - expected).abs() <= torch.finfo(of_tiles).eps * (expected.abs() + 1)).all()


@given(grids, tiles, st.sampled_from([(), (1,), (2, 2), (0,)]))
@settings(max_examples=examples(15))
def test_is_the_normalized_crop(device, grid, tile, batch):
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    x = torch.randint(256, (*batch, 3, grid[0] * tile[0], grid[1] * tile[1]), dtype=torch.uint8, device=device)
    scales = [(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]
    for backend in ("triton", "torch"):
        found = crop_normalize(x, grid, scales, backend=backend)
        torch.testing.assert_close(found, tuple(normalized_crop(x, grid, mean=mean, std=std)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_live_tile_gives_none(device, backend):
    x = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8, device=device)
    local, stride = crop_normalize(x, (2, 3), SCALES, live=((), ()), backend=backend)
    assert local.shape == stride.shape == (2, 0, 3, 2, 2)


@pytest.mark.usefixtures("unguarded")
def test_opcheck(device):
    x = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8, device=device)
    numbers = [f for f, _ in SCALES], [o for _, o in SCALES]
    torch.library.opcheck(torch.ops.dualview.crop_normalize.default, (x, *numbers, [2, 3], [0, 4], [1], torch.float32))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles(device, backend):
    def cut(x):
        local, stride = crop_normalize(x, (2, 3), SCALES, live=((0, 4), (1,)), dtype=torch.float16, backend=backend)
        return local * 2, stride

    torch._dynamo.reset()
    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = torch.randint(256, (batch, 3, 4, 6), dtype=torch.uint8, device=device)
        assert all(map(torch.equal, compiled(x), cut(x)))


class OfTriton(torch.nn.Module):
    """One call of the kernel, to be exported."""

    def forward(self, x):
        return crop_normalize(x, (2, 3), SCALES, live=((3, 0), (1,)), backend="triton")


@pytest.mark.usefixtures("unguarded")
def test_an_exported_program_runs_where_no_kernel_can(device, request):
    x = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8, device=device)
    program = torch.export.export(OfTriton(), (x,)).module()
    assert "dualview.crop_normalize" in program.code
    request.getfixturevalue("elsewhere")
    expected = crop_normalize(x, (2, 3), SCALES, live=((3, 0), (1,)), backend="torch")
    assert all(map(torch.equal, program(x), expected))


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_the_op_is_torch(device):
    x = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8, device=device)
    found, plain = (crop_normalize(x, (2, 3), SCALES, backend=backend) for backend in ("triton", "torch"))
    assert all(map(torch.equal, found, plain))


def test_gradients_of_pixels_are_those_of_torch(device):
    x = torch.randn(3, 4, 6, device=device, requires_grad=True)
    with refuses("crop_normalize", "gradients of pixels are not implemented: detach", error=RuntimeError):
        crop_normalize(x, (2, 3), SCALES, backend="triton")
    local, stride = crop_normalize(x, (2, 3), SCALES)
    (grad,) = torch.autograd.grad(local.sum() + stride.sum(), x)
    factors = torch.tensor([f for f, _ in SCALES], device=device).view(3, 1, 1)
    torch.testing.assert_close(grad, (2 * factors).expand_as(x))
    with torch.no_grad():
        torch.testing.assert_close(crop_normalize(x, (2, 3), SCALES, backend="triton"), (local, stride))


def test_says_what_does_not_fit():
    x = torch.zeros(3, 4, 6)
    for live in (((0, 0), ()), ((), (6,)), ((-1,), ())):
        with refuses(f"live={live}", "0 to 5", "at most once"):
            crop_normalize(x, (2, 3), SCALES, live=live)
    with refuses("float64", "ask for one of torch.float32", error=RuntimeError):
        crop_normalize(x, (2, 3), SCALES, dtype=torch.float64, backend="triton")


@pytest.mark.gpu
def test_in_a_graph():
    x = torch.randint(256, (2, 672, 672, 3), dtype=torch.uint8, device="cuda").movedim(-1, 1)
    crop_normalize(x, (2, 2), SCALES, backend="triton")  # compiled, and its tables made, before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = crop_normalize(x, (2, 2), SCALES, backend="triton")
    x.copy_(255 - x)
    graph.replay()
    torch.testing.assert_close(found, crop_normalize(x, (2, 2), SCALES, backend="torch"))
