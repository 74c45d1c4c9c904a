"""Re-tiling moves every bit to where the equations put it, whatever the layouts, data formats, strides and types."""

import warnings
from collections import defaultdict
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import dualview as dv
from dualview.kernels import dispatch
from dualview.kernels import retile as module
from dualview.kernels.retile import retile
from tests import reference
from tests.checks import calls_of, fresh, refuses
from tests.kernels.conftest import examples, guarded
from tests.strategies import data_formats, grids, map_shape, numbered, tiles, tiles_shape

pytest.importorskip("triton")

maps = st.sampled_from(["raster", "local", "global"])
widths = st.sampled_from([5, 1, 3, 16, 130])
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])
dtypes = st.sampled_from(dispatch.KERNEL_TYPES["retile"])


def shape_of(layout, batch, grid, tile, dim, data_format="channels_last"):
    shape = map_shape if layout == "raster" else tiles_shape
    return shape(batch, dim, grid, tile, data_format)


def by_the_equations(x: Tensor, source: str, target: str, grid: tuple[int, int], data_format: str) -> Tensor:
    """Through raster order, cell by cell."""
    full = x if source == "raster" else reference.recombine(x, grid, source, data_format)
    return full if target == "raster" else reference.crop(full, grid, target, data_format)


@given(maps, maps, grids, tiles, widths, dtypes, layouts, data_formats)
@settings(max_examples=examples(80))
def test_the_kernels_move_what_torch_moves(device, source, target, grid, tile, dim, dtype, layout, data_format):
    x = guarded(numbered(shape_of(source, (2,), grid, tile, dim, data_format), dtype).to(device), layout)
    for _ in range(2):  # a later launch takes a shorter way
        moved = retile(x, source, target, grid, data_format=data_format, backend="triton")
        assert fresh(moved, x)
        assert moved.dtype == dtype
        assert torch.equal(moved, retile(x, source, target, grid, data_format=data_format, backend="torch"))


@pytest.mark.parametrize("target", ["local", "global"])
def test_images_that_take_many_programs(device, target):
    """Of every axis: lines, pixels of one, channels."""
    x = numbered((2, 130, 4, 90), torch.int16).to(device)
    for grid in ((2, 1), (4, 45), (1, 1), (1, 2)):
        tiles = retile(x, "raster", target, grid, data_format="channels_first", backend="triton")
        assert torch.equal(tiles, by_the_equations(x, "raster", target, grid, "channels_first"))
        assert torch.equal(retile(tiles, target, "raster", grid, data_format="channels_first", backend="triton"), x)


@given(maps, maps, grids, tiles, data_formats, layouts, st.sampled_from([(), (2,), (2, 3), (0,)]))
@settings(max_examples=examples(80))
def test_torch_moves_what_the_equations_say(source, target, grid, tile, data_format, layout, batch):
    x = numbered(shape_of(source, batch, grid, tile, 3, data_format))
    x = guarded(x, layout) if batch else x
    moved = retile(x, source, target, grid, data_format=data_format, backend="torch")
    assert fresh(moved, x)
    assert torch.equal(moved, by_the_equations(x, source, target, grid, data_format))


@pytest.mark.parametrize("tile, copies", [((4, 3), 1), ((3, 3), 2), ((4, 2), 2)])
@pytest.mark.parametrize("source, target", [("local", "global"), ("global", "local")])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_tiles_of_whole_cells_move_in_one_copy(source, target, tile, copies, data_format):
    x = numbered(shape_of(source, (2,), (2, 3), tile, 4, data_format), torch.float32)
    with torch.profiler.profile() as profile:
        moved = retile(x, source, target, (2, 3), data_format=data_format, backend="torch")
    assert [event.count for event in profile.key_averages() if event.key == "aten::copy_"] == [copies]
    assert torch.equal(moved, by_the_equations(x, source, target, (2, 3), data_format))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_leading_dimensions(device, batch, backend):
    x = numbered(shape_of("local", batch, (2, 3), (3, 2), 4)).to(device)
    moved = retile(x, "local", "global", (2, 3), backend=backend)
    assert moved.shape == x.shape
    assert torch.equal(moved, by_the_equations(x, "local", "global", (2, 3), "channels_last"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_channels(device, backend):
    assert retile(torch.zeros(2, 4, 6, 0, device=device), "raster", "global", (2, 3), backend=backend).shape == (
        (2, 6, 2, 2, 0)
    )


def test_negated_views(device):
    """Which torch negates when they are read."""
    x = torch.randn(4, 6, 2, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    moved = retile(x, "raster", "global", (2, 3), backend="triton")
    assert torch.equal(moved, retile(x, "raster", "global", (2, 3), backend="torch"))


def test_nans_keep_their_bits(device):
    payload = torch.arange(0x7FC00000, 0x7FC00000 + 24, dtype=torch.int32, device=device)
    x = payload.view(torch.float32).reshape(4, 6, 1)
    moved = retile(x, "raster", "global", (2, 3), backend="triton")
    expected = retile(payload.reshape(4, 6, 1), "raster", "global", (2, 3), backend="torch")
    assert torch.equal(moved.view(torch.int32), expected)


@given(maps, maps, grids, tiles, data_formats)
@settings(max_examples=examples(20))
def test_gradients_move_back(device, source, target, grid, tile, data_format):
    x = torch.randn(shape_of(source, (2,), grid, tile, 3, data_format), device=device, requires_grad=True)
    for backend in ("torch", "triton"):
        moved = retile(x, source, target, grid, data_format=data_format, backend=backend)
        weight = torch.randn_like(moved)
        (grad,) = torch.autograd.grad((moved * weight).sum(), x)
        assert torch.equal(grad, by_the_equations(weight, target, source, grid, data_format))


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_derivatives_forward_and_twice(device, backend, data_format):
    shape = (2, 4, 3, 1) if data_format == "channels_last" else (2, 1, 4, 3)  # of which neither has one batch alone
    x = torch.randn(1, *shape, dtype=torch.float64, device=device, requires_grad=True)

    def square(x):
        return retile(x, "raster", "global", (2, 3), data_format=data_format, backend=backend) ** 2

    assert torch.autograd.gradcheck(square, x, check_forward_ad=backend == "torch", fast_mode=True)
    assert torch.autograd.gradgradcheck(square, x, fast_mode=True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.usefixtures("unguarded")
def test_opcheck(device, grad):
    x = torch.randn(2, 6, 2, 3, 5, device=device, requires_grad=grad)
    torch.library.opcheck(torch.ops.dualview.retile.default, (x, "local", "global", 2, 3))
    x = torch.randn(2, 6, 3, 2, 5, device=device, requires_grad=grad)
    torch.library.opcheck(torch.ops.dualview.retile.default, (x, "local", "raster", 2, 3, "channels_first"))
    x = torch.randn(2, 1, 4, 3, 5, device=device, requires_grad=grad)
    torch.library.opcheck(torch.ops.dualview.retile.default, (x, "raster", "global", 2, 3))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("target", ["raster", "global"])
def test_compiles_once_for_all_batches(device, target, backend):
    def move(x):
        return retile(x, "local", target, (2, 3), backend=backend) * 2

    torch._dynamo.reset()
    compiled = torch.compile(move, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 6, 2, 3, 5, device=device, requires_grad=True)
        assert torch.equal(compiled(x), move(x))
        compiled(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_the_op_is_torch(device):
    x = numbered(shape_of("local", (2,), (2, 3), (2, 3), 4)).to(device)
    for target in ("raster", "global"):
        moved = torch.ops.dualview.retile(x, "local", target, 2, 3)
        assert torch.equal(moved, retile(x, "local", target, (2, 3), backend="torch"))


class OfTriton(torch.nn.Module):
    """One call of the kernel, to be exported."""

    def forward(self, x: Tensor) -> Tensor:
        return retile(x, "local", "global", (2, 3), backend="triton")


@pytest.mark.usefixtures("unguarded")
def test_an_exported_program_runs_where_no_kernel_can(device, request):
    x = torch.randn(2, 6, 2, 3, 5, device=device)
    program = torch.export.export(OfTriton(), (x,)).module()
    assert "dualview.retile" in program.code
    request.getfixturevalue("elsewhere")
    assert torch.equal(program(x), retile(x, "local", "global", (2, 3), backend="torch"))


def test_what_is_traced_keeps_the_operator(device):
    x = torch.randn(2, 6, 2, 3, 5, device=device)
    with warnings.catch_warnings(action="ignore"):  # that sizes are looked at, and that it is deprecated
        traced = torch.jit.trace(OfTriton(), x, check_trace=False)
    for program in (make_fx(OfTriton())(x), traced):
        assert "dualview" in str(program.graph)
        y = torch.randn_like(x)
        assert torch.equal(program(y), retile(y, "local", "global", (2, 3), backend="torch"))


def test_a_recorded_call_goes_straight_to_the_kernel_and_saves_nothing(device, monkeypatch):
    """Also that of a gradient, and of a gradient's gradient."""

    def fails(*given):
        raise AssertionError

    monkeypatch.setattr(module, "_retile", fails)
    x = torch.randn(2, 6, 2, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn_like(x, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(fails, fails):
        moved = retile(x, "local", "global", (2, 3), backend="triton")
    (grad,) = torch.autograd.grad((moved * weight).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * x).sum(), weight)
    assert torch.equal(grad, by_the_equations(weight, "global", "local", (2, 3), "channels_last"))
    assert torch.equal(second, moved)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(device, use_reentrant):
    def move(x):
        return retile(x.sin(), "local", "global", (2, 3), backend="triton").cos()

    grads, given = [], torch.randn(2, 6, 2, 3, 5, device=device)
    for call in (move, partial(checkpoint, move, use_reentrant=use_reentrant)):
        x = given.clone().requires_grad_()
        call(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over an operator under vmap
def test_vmap(device):
    def move(x):
        return retile(x, "local", "global", (2, 3), backend="triton")

    x = torch.randn(3, 6, 2, 3, 5, device=device)
    assert torch.equal(torch.func.vmap(move)(x), move(x))


@pytest.fixture
def moved_by(monkeypatch):
    """What the kernel was launched for."""
    launched, ordinary = [], module._launch
    monkeypatch.setattr(module, "_launch", lambda x, move: launched.append(x.shape) or ordinary(x, move))
    return launched


def test_images_are_moved_by_the_kernel_on_request(device, moved_by):
    x = numbered((2, 3, 4, 6)).to(device)
    for backend in (None, "auto", "torch"):
        with dispatch.use_backend("triton"):  # which asks for token maps
            retile(x, "raster", "global", (2, 3), data_format="channels_first", backend=backend)
    assert not moved_by
    retile(x, "raster", "global", (2, 3), data_format="channels_first", backend="triton")
    assert moved_by == [x.shape]
    with refuses("backend='cuda'"):
        retile(x, "raster", "global", (2, 3), data_format="channels_first", backend="cuda")


class TestWhereTheKernelIsFaster:
    """What "auto" asks about a tensor on a GPU."""

    @pytest.fixture
    def is_faster(self, monkeypatch):
        monkeypatch.setattr(module, "LEAST_BYTES", 96)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return lambda x: module._is_faster(x, module.move_of(x, "raster", "global", "channels_last", "x", (2, 3)))

    def test_maps_of_many_bytes(self, device, is_faster):
        x = torch.zeros(4, 6, 1, device=device)
        assert is_faster(x)
        assert is_faster(nn.Parameter(x))
        assert not is_faster(x.half())

    def test_in_a_graph_what_has_run_before(self, device, is_faster, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        x, other = torch.zeros(2, 4, 6, 7, device=device), torch.zeros(2, 4, 6, 7, device=device)
        assert not is_faster(x)
        retile(other, "raster", "global", (2, 3), backend="triton")
        assert is_faster(x)
        assert not is_faster(x.half())
        assert not is_faster(x.mT.contiguous().mT)

    def test_not_within_a_transform_or_a_tracer(self, device, is_faster):
        x, found = torch.zeros(2, 4, 6, 7, device=device), []

        def ask(x):
            found.append(is_faster(x))
            return x.sum()

        torch.func.vmap(ask)(x[None])
        torch.func.grad(ask)(x)
        torch.func.jvp(ask, (x,), (x,))
        torch.func.functionalize(ask)(x)
        with forward_ad.dual_level():
            ask(forward_ad.make_dual(x, x))
        for mode in ("fake", "symbolic"):
            make_fx(ask, tracing_mode=mode)(x)
        make_fx(ask)(x)
        with warnings.catch_warnings(action="ignore"):
            torch.jit.trace(ask, x, check_trace=False)
        torch.compile(ask, backend="eager", fullgraph=True)(x)
        assert not any(found)
        assert len(found) >= 9


@pytest.mark.usefixtures("unguarded")
def test_a_launch_takes_the_host_a_few_calls(device):
    """Of Python, counted: those of the launcher itself are triton's."""
    from dualview.kernels import retile_triton

    x = torch.randn(1, 9, 3, 3, 8, device=device)
    move = "local", "global", dv.TileGrid(3, 3), (3, 3), "channels_last"
    loaded = retile_triton._of_shape(x.shape, x.stride(), *move)[-1]
    launched = []
    loaded[retile_triton._place(x)] = defaultdict(lambda: lambda *given: launched.append(given))
    try:
        moved = retile(x, "local", "global", (3, 3), backend="triton")
        assert launched[-1][0] is x
        assert launched[-1][1] is moved
        for recorded, most in ((False, 75), (True, 95)):
            x.requires_grad_(recorded)
            assert calls_of(partial(retile, x, "local", "global", (3, 3), backend="triton")) <= most
    finally:
        loaded.clear()


def test_says_what_does_not_fit():
    with refuses("5 tiles", "dimension 1 of (1, 5, 2, 2, 4)", "2x3", "rows*cols = 6"):
        retile(torch.zeros(1, 5, 2, 2, 4), "local", "raster", (2, 3))
    with refuses("(6, 0, 2, 4)", "no cells"):
        retile(torch.zeros(6, 0, 2, 4), "local", "raster", (2, 3))
    with refuses("5 x 6", "2 x 3 tiles"):
        retile(torch.zeros(5, 6, 4), "raster", "local", (2, 3))
    with refuses("'rows'", "raster"):
        retile(torch.zeros(4, 6, 4), "raster", "rows", (2, 3))
    with refuses("'rows'", "raster"):
        retile(torch.zeros(4, 6, 4), "rows", "raster", (2, 3))
    for data_format, expected in (("channels_last", "(..., rows*cols, h, w, D)"), ("channels_first", "C, h, w")):
        with refuses("(6, 4, 4)", expected, "leading batch"):
            retile(torch.zeros(6, 4, 4), "local", "raster", (2, 3), data_format=data_format)
    with refuses("data_format='last'"):
        retile(torch.zeros(4, 6, 4), "raster", "local", (2, 3), data_format="last")
    with refuses("complex64", "cast", error=RuntimeError):
        retile(torch.zeros(4, 6, 4, dtype=torch.complex64), "raster", "local", (2, 3), backend="triton")


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts():
    x = torch.arange(9 * 2**28, dtype=torch.uint8, device="cuda").reshape(1, 96, 96, 2**18)
    moved = retile(x, "raster", "global", (3, 3), backend="triton")
    assert torch.equal(moved[0, -1, -1, -1], x[0, -1, -1])
    assert torch.equal(moved, retile(x, "raster", "global", (3, 3), backend="torch"))


@pytest.mark.gpu
def test_more_elements_of_images_than_an_int32_counts():
    x = torch.arange(9 * 2**28, dtype=torch.uint8, device="cuda").reshape(1, 4, 12288, 49152)
    moved = retile(x, "raster", "global", (3, 3), data_format="channels_first", backend="triton")
    assert torch.equal(moved, retile(x, "raster", "global", (3, 3), data_format="channels_first", backend="torch"))


@pytest.mark.gpu
def test_auto_takes_the_kernel_for_a_large_map(moved_by):
    x = torch.randn(8, 72, 72, 1024, device="cuda")
    retile(x[:, :24, :24], "raster", "global", (3, 3))
    assert not moved_by
    moved = retile(x, "raster", "global", (3, 3))
    assert moved_by == [x.shape]
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
