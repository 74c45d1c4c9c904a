"""The fused tail of the released fusion against float64: values and gradients err at most twice as much as torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dualview as dv
from dualview.kernels.dispatch import use_backend
from dualview.kernels.fuse_norm import fuse_norm
from dualview.ops.fusion import BottleneckConcatFusion
from tests.checks import fresh, refuses
from tests.kernels.conftest import examples, guarded

pytest.importorskip("triton")

sizes = st.sampled_from([(1, 2), (2, 1), (1, 1), (2, 2)])
cells = st.sampled_from([(1, 2), (2, 1), (1, 1), (2, 2), (1, 3)])
widths = st.sampled_from([6, 16, 50, 130])  # of two, LayerNorm leaves only signs, and next to no gradient
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
NAMES = ("result", "v_loc", "v_glo", "b_loc", "b_glo", "weight", "bias")


def operands(shape, dim, dtype, device, batch=(2,)):
    """Two maps, two halves, weight and bias, each with poison around."""
    shapes = [(*batch, *shape, dim)] * 2 + [(*batch, *shape, dim // 2)] * 2 + [(dim,)] * 2
    return [guarded((torch.randn(s, device=device) + 0.3).to(dtype)) for s in shapes]


def with_gradients(tensors, cell, backend):
    """The result and the gradients of a weighted sum of it."""
    given = [x.detach().requires_grad_() for x in tensors]
    out = fuse_norm(*given, cell=cell, backend=backend)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    weights = weights.reshape(out.shape).to(torch.bfloat16).to(out.dtype)  # the same for all types
    return [out.detach(), *torch.autograd.grad(out, given, weights)]


def assert_errs_at_most_twice(found, plain, exact):
    for name, one, other, reference in zip(NAMES, found, plain, exact, strict=True):
        assert one.dtype == other.dtype, name
        errors = [(x.double() - reference).norm() / reference.norm() for x in (one, other)]
        assert errors[0] <= 2 * errors[1] + 2**-22, f"{name}: {errors[0]:.2e}, of torch {errors[1]:.2e}"


@given(sizes, cells, widths, dtypes)
@settings(max_examples=examples(40))
def test_error_is_that_of_torch(device, size, cell, dim, dtype):
    tensors = operands((size[0] * cell[0], size[1] * cell[1]), dim, dtype, device)
    found, plain = (with_gradients(tensors, cell, backend) for backend in ("triton", "torch"))
    assert found[0].shape == (2, *size, dim)
    assert fresh(found[0], *tensors)
    assert_errs_at_most_twice(found, plain, with_gradients([x.double() for x in tensors], cell, "torch"))


def test_many_cells_share_a_partial_sum(device, monkeypatch):
    from dualview.kernels import fuse_norm_triton

    monkeypatch.setattr(fuse_norm_triton, "PROGRAMS", 3)
    tensors = operands((4, 2), 10, torch.float32, device)
    exact = with_gradients([x.double() for x in tensors], (2, 1), "torch")
    found = [with_gradients(tensors, (2, 1), "triton") for _ in range(2)]
    assert_errs_at_most_twice(found[0], with_gradients(tensors, (2, 1), "torch"), exact)
    assert all(map(torch.equal, *found)), "the order of the sums varies"


@pytest.mark.parametrize("cell", [(1, 1), (2, 3)])
def test_is_the_tail_of_the_released_fusion(device, cell):
    fusion = BottleneckConcatFusion(32, device=device)
    v_loc, v_glo = torch.randn(2, 2, 4, 6, 32, device=device)
    b_loc, b_glo = fusion.local_bottleneck(v_loc), fusion.global_bottleneck(v_glo)
    for backend in ("torch", "triton"):
        fused = fuse_norm(v_loc, v_glo, b_loc, b_glo, fusion.norm.weight, fusion.norm.bias, cell=cell, backend=backend)
        torch.testing.assert_close(fused, fusion(v_loc, v_glo, cell=cell))
    for one in (v_loc, v_loc[0], v_loc[0, 0], v_loc[0, 0, 0])[: None if cell == (1, 1) else 2]:
        fused = fusion(one, one, cell=cell)
        with use_backend("triton"):
            torch.testing.assert_close(fusion(one, one, cell=cell), fused)


@pytest.mark.parametrize("grid, cell", [((2, 3), (2, 1)), ((3, 2), (1, 2)), ((4, 2), (2, 2)), ((1, 3), (1, 1))])
def test_the_enhancement_reads_out_in_the_same_pass(device, grid, cell, monkeypatch):
    """The kernel is launched once, for cells of the tokens that are read, and what it wrote is the result."""
    from dualview.kernels import fuse_norm_triton

    written, launch = [], fuse_norm_triton.forward

    def forward(tensors, r, s, *options):
        written.append(((r, s), launch(tensors, r, s, *options)))
        return written[-1][1]

    monkeypatch.setattr(fuse_norm_triton, "forward", forward)
    dem = dv.DualPerspectiveEnhance.released(32, device=device)
    tiles = torch.randn(2, 1, grid[0] * grid[1], 2, 3, 32, device=device)
    out = dem(*tiles, grid, backend="triton")
    ((launched, result),) = written
    assert launched == cell
    assert out.data_ptr() == result.data_ptr()
    torch.testing.assert_close(out, dem(*tiles, grid, backend="torch"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_any_leading_dimensions(device, batch, backend):
    tensors = [x.requires_grad_() for x in operands((4, 6), 8, torch.float32, device, batch)]
    fused = fuse_norm(*tensors, cell=(2, 3), backend=backend)
    assert fused.shape == (*batch, 2, 2, 8)
    fused.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


def test_any_strides(device):
    tensors = operands((6, 4), 8, torch.float32, device)
    turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in tensors]
    one, other = (with_gradients(x, (2, 2), "triton") for x in (tensors, turned))
    assert all(map(torch.equal, one, other))


def test_autocast_keeps_the_type_of_torch(device):
    tensors = operands((4, 6), 8, torch.float32, device)
    tensors[2:4] = (x.bfloat16() for x in tensors[2:4])  # as linear layers make them
    with torch.autocast(device, torch.bfloat16):
        found, plain = (with_gradients(tensors, (2, 2), backend) for backend in ("triton", "torch"))
    for name, one, other in zip(NAMES, found, plain, strict=True):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("cell", [(1, 1), (2, 3)])
@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_the_op_is_torch(device, cell):
    tensors = operands((4, 6), 8, torch.float32, device)
    plain = with_gradients(tensors, cell, "torch")
    for name, one, other in zip(NAMES, with_gradients(tensors, cell, "triton"), plain, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.usefixtures("unguarded")
def test_opcheck(device):
    tensors = [x.contiguous().clone() for x in operands((4, 6), 8, torch.float32, device)]
    ops, numbers = torch.ops.dualview, (2, 3, 1e-5)
    torch.library.opcheck(
        ops.fuse_norm_backward.default, (torch.randn(2, 2, 2, 8, device=device), *tensors[:5], *numbers)
    )
    given = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(ops.fuse_norm.default, (*given, *numbers, torch.float32))


def test_compiles_once_for_all_batches(device):
    def fuse(*tensors):
        return fuse_norm(*tensors, cell=(2, 1), backend="triton") * 2

    torch._dynamo.reset()
    compiled = torch.compile(fuse, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        tensors = [x.clone().requires_grad_() for x in operands((4, 3), 6, torch.float32, device, (batch,))]
        results = [call(*tensors) for call in (fuse, compiled)]
        gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in results]
        assert torch.equal(*results)
        assert all(map(torch.equal, *gradients))


def test_a_second_derivative_is_refused(device):
    v_loc, *others = operands((2, 3), 6, torch.float32, device)
    v_loc.requires_grad_()
    (grad,) = torch.autograd.grad(fuse_norm(v_loc, *others, backend="triton").square().sum(), v_loc, create_graph=True)
    with refuses("fuse_norm has no second derivative", 'backend="torch"', error=NotImplementedError):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(fuse_norm(v_loc, *others, backend="torch").square().sum(), v_loc, create_graph=True)
    grad.sum().backward()


def test_says_what_does_not_fit(device):
    tensors = operands((4, 6), 8, torch.float32, device)
    with refuses("(2, 4, 6, 8)", "(2, 4, 6, 4)", "(3, 2)", "(r, s)"):
        fuse_norm(*tensors, cell=(3, 2))
    with refuses("(2, 4, 6, 8), (2, 4, 6, 8), (2, 4, 6, 8)"):
        fuse_norm(tensors[0], *tensors[:2], *tensors[3:])
    with refuses("float64", "torch.bfloat16", error=RuntimeError):
        fuse_norm(*(x.double() for x in tensors), backend="triton")
