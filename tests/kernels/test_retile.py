"""Re-tiling moves every bit to where the plain torch version puts it, whatever the layouts, strides and types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualview.kernels import dispatch
from dualview.kernels.retile import retile
from dualview.ops.tiling import crop, recombine
from tests.checks import fresh, refuses
from tests.kernels.conftest import examples, guarded
from tests.strategies import grids, numbered, tiles

pytest.importorskip("triton")

maps = st.sampled_from(["raster", "local", "global"])
widths = st.sampled_from([5, 1, 3, 16, 130])
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])
dtypes = st.sampled_from(dispatch.KERNELS["retile"])


def map_shape(layout, batch, grid, tile, dim):
    if layout == "raster":
        return (*batch, grid[0] * tile[0], grid[1] * tile[1], dim)
    return (*batch, grid[0] * grid[1], *tile, dim)


@given(maps, maps, grids, tiles, widths, dtypes, layouts)
@settings(max_examples=examples(80))
def test_moves_what_torch_moves(device, source, target, grid, tile, dim, dtype, layout):
    x = guarded(numbered(map_shape(source, (2,), grid, tile, dim), dtype).to(device), layout)
    moved = retile(x, source, target, grid, backend="triton")
    assert fresh(moved, x)
    assert moved.dtype == dtype
    assert torch.equal(moved, retile(x, source, target, grid, backend="torch"))


@given(grids, tiles, maps)
@settings(max_examples=examples(30))
def test_the_plain_version_is_crop_and_recombine(grid, tile, target):
    x = numbered(map_shape("raster", (2, 3), grid, tile, 3))
    cut = x if target == "raster" else crop(x, grid, target, data_format="channels_last")
    moved = retile(x, "raster", target, grid, backend="torch")
    assert fresh(moved, x)
    assert torch.equal(moved, cut)
    back = retile(cut, target, "raster", grid, backend="torch")
    assert torch.equal(back, x if target == "raster" else recombine(cut, grid, target, data_format="channels_last"))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_leading_dimensions(device, batch, backend):
    x = numbered(map_shape("local", batch, (2, 3), (3, 2), 4)).to(device)
    moved = retile(x, "local", "global", (2, 3), backend=backend)
    assert moved.shape == x.shape
    assert torch.equal(moved, crop(recombine(x, (2, 3), "local", data_format="channels_last"), (2, 3), "global",
                                   data_format="channels_last"))  # fmt: skip


def test_nans_keep_their_bits(device):
    payload = torch.arange(0x7FC00000, 0x7FC00000 + 24, dtype=torch.int32, device=device)
    x = payload.view(torch.float32).reshape(4, 6, 1)
    moved = retile(x, "raster", "global", (2, 3), backend="triton")
    expected = retile(payload.reshape(4, 6, 1), "raster", "global", (2, 3), backend="torch")
    assert torch.equal(moved.view(torch.int32), expected)


@given(maps, maps, grids, tiles)
@settings(max_examples=examples(10))
def test_gradients_move_back(device, source, target, grid, tile):
    x = torch.randn(map_shape(source, (2,), grid, tile, 3), device=device, requires_grad=True)
    moved = retile(x, source, target, grid, backend="triton")
    weight = torch.randn_like(moved)
    (grad,) = torch.autograd.grad((moved * weight).sum(), x)
    assert torch.equal(grad, retile(weight, target, source, grid, backend="torch"))


def test_gradgradcheck(device):
    x = torch.randn(4, 3, 1, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: retile(x, "raster", "global", (2, 3), backend="triton") ** 2, x, fast_mode=True
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.usefixtures("unguarded")
def test_opcheck(device, grad):
    x = torch.randn(2, 6, 2, 3, 5, device=device, requires_grad=grad)
    torch.library.opcheck(torch.ops.dualview.retile.default, (x, "local", "global", 2, 3))


def test_compiles_once_for_all_batches(device):
    def move(x):
        return retile(x, "local", "raster", (2, 3), backend="triton") * 2

    torch._dynamo.reset()
    compiled = torch.compile(move, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 6, 2, 3, 5, device=device, requires_grad=True)
        assert torch.equal(compiled(x), move(x))
        compiled(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_the_op_is_torch(device):
    x = numbered(map_shape("local", (2,), (2, 3), (2, 3), 4)).to(device)
    for target in ("raster", "global"):
        moved = retile(x, "local", target, (2, 3), backend="triton")
        assert torch.equal(moved, retile(x, "local", target, (2, 3), backend="torch"))


def test_says_what_does_not_fit():
    with refuses("(1, 5, 2, 2, 4)", "'local'", "2x3", "(..., 6, h, w, D)"):
        retile(torch.zeros(1, 5, 2, 2, 4), "local", "raster", (2, 3))
    with refuses("5 x 6", "2 x 3 tiles"):
        retile(torch.zeros(5, 6, 4), "raster", "local", (2, 3))
    with refuses("'rows'", "raster"):
        retile(torch.zeros(4, 6, 4), "raster", "rows", (2, 3))
    with refuses("complex64", "cast", error=RuntimeError):
        retile(torch.zeros(4, 6, 4, dtype=torch.complex64), "raster", "local", (2, 3), backend="triton")


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts():
    x = torch.arange(9 * 2**28, dtype=torch.uint8, device="cuda").reshape(1, 96, 96, 2**18)
    moved = retile(x, "raster", "global", (3, 3), backend="triton")
    assert torch.equal(moved[0, -1, -1, -1], x[0, -1, -1])
    assert torch.equal(moved, retile(x, "raster", "global", (3, 3), backend="torch"))


@pytest.mark.gpu
def test_in_a_graph_on_another_stream():
    x = torch.randn(2, 9, 24, 24, 128, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        retile(x, "local", "global", (3, 3), backend="triton")  # compiled before it is captured
        with torch.cuda.graph(graph, stream=stream):
            moved = retile(x, "local", "global", (3, 3), backend="triton")
        x.normal_()
        graph.replay()
    stream.synchronize()
    assert torch.equal(moved, retile(x, "local", "global", (3, 3), backend="torch"))
