"""What an expert expects of every layer: one table of the modules of `dualview.ops`, and the same checks for each."""

import copy
import functools
import importlib
import inspect
import io
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dualview as dv
import dualview.ops
from dualview.ops.fusion import FUSIONS

DIM, GRID = 16, (2, 3)
Layer = tuple[Callable[..., nn.Module], Callable[[torch.dtype], tuple[Any, ...]]]


def tokens(dtype: torch.dtype) -> tuple[Any, ...]:
    """Two tensors of tokens."""
    return tuple(torch.randn(2, 4, 6, DIM).to(dtype) for _ in range(2))


def on_a_grid(dtype: torch.dtype) -> tuple[Any, ...]:
    """Tiles of both perspectives, and their grid."""
    return (*(torch.randn(2, 6, 2, 4, DIM).to(dtype) for _ in range(2)), GRID)


def dem(preset: Callable[..., nn.Module], **options: Any) -> Layer:
    return (lambda **factory: preset(DIM, **options, **factory)), on_a_grid


EVERY_OPTION = {
    "share_weights": False,
    "bias": True,
    "out_proj": True,
    "residual": True,
    "norm": True,
    "gate": True,
    "num_heads": 2,
}
LEARNT: dict[str, Layer] = {
    "TileAttention": (
        lambda **factory: dv.TileAttention(DIM, num_heads=2, bias=True, out_proj=True, norm=True, **factory),
        tokens,
    ),
    "DualPerspectiveEnhance.paper": dem(dv.DualPerspectiveEnhance.paper),
    "DualPerspectiveEnhance.released": dem(dv.DualPerspectiveEnhance.released),
    "DualPerspectiveEnhance, one direction": dem(dv.DualPerspectiveEnhance.released, enhance="local"),
    "DualPerspectiveEnhance, every option": dem(dv.DualPerspectiveEnhance, **EVERY_OPTION),
}
PLAIN: dict[str, Layer] = {
    "LocalCrop": (lambda: dv.LocalCrop(GRID), lambda dtype: (torch.randn(2, 3, 4, 6).to(dtype),)),
    "GlobalStrideCrop": (lambda: dv.GlobalStrideCrop(GRID), lambda dtype: (torch.randn(2, 3, 4, 6).to(dtype),)),
    "SubfeatureRecombine": (
        lambda: dv.SubfeatureRecombine(GRID, "global"),
        lambda dtype: (torch.randn(2, 6, 3, 4, 5).to(dtype),),
    ),
    "DualPerspectiveCrop": (
        lambda: dv.DualPerspectiveCrop((4, 5), remainder="pad", pad_value=(1, 2, 3)),
        lambda dtype: (torch.randn(2, 3, 7, 8).to(dtype),),
    ),
    "DirectReadout": (lambda: dv.DirectReadout("sum"), on_a_grid),
}
for _fusion in FUSIONS.values():
    _table = LEARNT if list(_fusion(DIM).parameters()) else PLAIN
    _table[_fusion.__name__] = (functools.partial(_fusion, DIM), tokens)
LAYERS = LEARNT | PLAIN
learnt = pytest.mark.parametrize("name", LEARNT)
every = pytest.mark.parametrize("name", LAYERS)


def run(module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    out = module(*arguments)
    return out if isinstance(out, Tensor) else torch.cat([out[0], out[1]])


def test_the_table_is_complete() -> None:
    modules = [
        importlib.import_module(f"dualview.ops.{info.name}") for info in pkgutil.iter_modules(dualview.ops.__path__)
    ]
    classes = {
        member.__name__
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, nn.Module) and member.__module__.startswith("dualview.ops")
    }
    tested = {type(make()).__name__ for make, _ in LAYERS.values()}
    assert {name for name in classes if not name.startswith("_")} == tested


class TestFactory:
    @learnt
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtype(self, name: str, dtype: torch.dtype) -> None:
        make, arguments = LAYERS[name]
        module = make(dtype=dtype)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert run(module, arguments(dtype)).dtype == dtype

    @learnt
    def test_meta(self, name: str) -> None:
        make, arguments = LAYERS[name]
        module = make(device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in make().parameters())
        # from meta to weights, both ways that people use
        real = make(dtype=torch.float64)
        given = arguments(torch.float64)
        module.load_state_dict(real.state_dict(), assign=True)
        assert torch.equal(run(module, given), run(real, given))
        module = make(device="meta").to_empty(device="cpu")
        module.reset_parameters()
        assert run(module, arguments(torch.float32)).isfinite().all()

    @learnt
    def test_meta_inputs_give_meta_outputs(self, name: str) -> None:
        make, arguments = LAYERS[name]
        given = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in arguments(torch.float32))
        out = run(make(device="meta"), given)
        assert out.is_meta
        assert out.shape == run(make(), arguments(torch.float32)).shape

    @learnt
    def test_reset_parameters_sets_all_of_them(self, name: str) -> None:
        make, _ = LAYERS[name]
        torch.manual_seed(3)
        module, again = make(), make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
        module.reset_parameters()
        for (label, new), start in zip(module.named_parameters(), again.parameters(), strict=True):
            assert new.isfinite().all(), label
            constant = bool((start == 0).all() or (start == 1).all())
            assert torch.equal(new, start) == constant, label
            if start.numel() > DIM:  # drawn as at construction, as far as the width tells
                torch.testing.assert_close(new.abs().max(), start.abs().max(), rtol=0.3, atol=0)


class TestCopies:
    @every
    def test_deepcopy_and_pickle(self, name: str) -> None:
        make, arguments = LAYERS[name]
        module, given = make(), arguments(torch.float32)
        out = run(module, given)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(run(copied, given), out)
            assert repr(copied) == repr(module)
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.add_(1)  # not shared with the original
        assert torch.equal(run(module, given), out)

    @every
    def test_state_dict(self, name: str) -> None:
        make, arguments = LAYERS[name]
        one, two, given = make(), make(), arguments(torch.float32)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.normal_()
        saved = io.BytesIO()
        torch.save(one.state_dict(), saved)
        saved.seek(0)
        assert str(two.load_state_dict(torch.load(saved, weights_only=True))) == "<All keys matched successfully>"
        assert torch.equal(run(two, given), run(one, given))
        assert len(one.state_dict()) == len(list(one.parameters()))  # no buffers

    @every
    def test_modes_and_casts(self, name: str) -> None:
        make, arguments = LAYERS[name]
        module, given = make(), arguments(torch.float32)
        assert torch.equal(run(module.train(), given), run(module.eval(), given))
        doubled = module.double()
        assert run(doubled, arguments(torch.float64)).dtype == torch.float64

    @every
    def test_inputs_are_left_alone(self, name: str) -> None:
        make, arguments = LAYERS[name]
        given = arguments(torch.float32)
        kept = copy.deepcopy(given)
        run(make(), given)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(given, kept, strict=True))


class TestAutocast:
    @learnt
    def test_bf16_forward_and_backward(self, name: str) -> None:
        make, arguments = LAYERS[name]
        module, given = make(), arguments(torch.float32)
        if isinstance(module, dv.DualPerspectiveEnhance) and module.gate is not None:
            nn.init.ones_(module.gate)
        full = run(module, given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(module, given)
        assert out.dtype in (torch.bfloat16, torch.float32)
        assert not torch.equal(out.float(), full) or name == "WeightedAdditionFusion"  # which multiplies no matrix
        torch.testing.assert_close(out.float(), full, rtol=0.05, atol=0.1)
        out.float().square().sum().backward()
        for label, parameter in module.named_parameters():
            assert parameter.grad.dtype == torch.float32, label
            assert parameter.grad.isfinite().all(), label

    @pytest.mark.parametrize("preset", ["paper", "released"])
    def test_masks_under_autocast(self, preset: str) -> None:
        module = getattr(dv.DualPerspectiveEnhance, preset)(DIM)
        local, stride, grid = on_a_grid(torch.float32)
        mask = torch.rand(2, 4, 12) < 0.5
        mask[1] = False
        full = module(local, stride, grid, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(local, stride, grid, mask)
        torch.testing.assert_close(out.float(), full, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.endswith("Fusion")])  # which keep no argument
def test_prints_its_arguments(name: str) -> None:
    module = LAYERS[name][0]()
    kept = {p: vars(module)[p] for p in inspect.signature(type(module)).parameters if vars(module).get(p) is not None}
    assert kept
    for argument, value in kept.items():
        plain = tuple(value) if isinstance(value, dv.TileGrid) else value
        assert f"{argument}={plain!r}" in module.extra_repr()
