"""How many operations a forward pass launches on a GPU, and what they move: counted without one, on fake tensors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dualview as dv
from dualview.kernels import dispatch
from dualview.kernels.tables import index_tensor
from dualview.ops.planned import products, run
from tests.ops.planned.rates import machine

FREE = (
    *("view", "_unsafe_view", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "t"),
    *("detach", "alias", "split", "split_with_sizes", "unbind", "empty", "new_empty", "promote_types"),
)
"""Operations that launch nothing: views, and memory without contents."""


class Launches(TorchDispatchMode):
    """The operations that launch a kernel, with the shapes that they read and write, and megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read, written = ([x for x in tree_leaves(x) if isinstance(x, Tensor)] for x in (args, found))
        if func.namespace == "aten" and name not in FREE:
            moved = sum(x.numel() * x.element_size() for x in (*read, *written))
            shapes = [", ".join(str(tuple(x.shape)) for x in some) for some in (read, written)]
            self.seen.append(f"{name} {shapes[0]} -> {shapes[1]}, {moved / 1e6:.1f} MB")
            self.bytes[name] = self.bytes.get(name, 0) + moved
        return found


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: None, scale: float) -> Tensor:
    """What torch takes on a GPU for these operands, and without one does not."""
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


@pytest.fixture
def _on_an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (dispatch, products):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    # Tables of indices are made once, before.
    monkeypatch.setattr(
        run,
        "table",
        lambda make, *args, like: torch.empty(table_size(make, args), dtype=torch.long, device=like.device),
    )
    products.choose_products.cache_clear()
    yield
    products.choose_products.cache_clear()


def table_size(make: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    if make is index_tensor:
        return (len(args[0]),)
    rows, cols = args[2:4]
    return len(rows.tiles) * len(cols.tiles), rows.per_tile * cols.per_tile


def launches(preset: str, *, batch: int = 1, grad: bool = False, **options: Any) -> Launches:
    """Those of a forward pass at 3 x 3 tiles of 24 x 24 tokens of width 1024 in bfloat16."""
    with FakeTensorMode():
        dem = getattr(dv.DualPerspectiveEnhance, preset)(1024, device="cuda", dtype=torch.bfloat16, **options)
        tiles = torch.empty(2, batch, 9, 24, 24, 1024, device="cuda", dtype=torch.bfloat16)
        with torch.set_grad_enabled(grad), Launches() as counted:
            dem(tiles[0], tiles[1], (3, 3))
    return counted


@pytest.mark.usefixtures("_on_an_h100")
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    "preset, grad, most", [("released", False, 20), ("released", True, 20), ("paper", False, 16), ("paper", True, 20)]
)
def test_a_forward_pass_launches_few_operations(preset: str, grad: bool, most: int, batch: int) -> None:
    seen = launches(preset, batch=batch, grad=grad).seen
    assert len(seen) <= most, "\n".join(seen)


@pytest.mark.usefixtures("_on_an_h100")
@pytest.mark.parametrize("preset, most", [("released", 0.19), ("paper", 0.72)])
def test_few_bytes_are_copied(preset: str, most: float) -> None:
    """Of 16 images, 170 MB a map: the paper's module brings both maps into the other order, and moves little else."""
    moved = launches(preset, batch=16).bytes
    assert sum(moved.get(name, 0) for name in ("clone", "stack", "index_select")) <= most * 1e9


@pytest.mark.parametrize("part", ["local_bottleneck", "global_bottleneck.0", "norm"])
def test_a_fusion_that_was_touched_is_called(part: str) -> None:
    """Though the directions before it are computed together."""
    dem, tiles = dv.DualPerspectiveEnhance.released(32).double(), torch.randn(2, 1, 9, 6, 6, 32, dtype=torch.float64)
    layer = dem.fusion.get_submodule(part)
    layer.register_forward_hook(lambda layer, given, out: 2 * out)
    with machine("launches count"):
        assert dem.products((3, 3), (6, 6), tiles).together
        planned = dem(*tiles, (3, 3))
    with dv.full_computation():
        torch.testing.assert_close(planned, dem(*tiles, (3, 3)))


@pytest.mark.parametrize("parts", [["local_bottleneck"], ["local_bottleneck", "global_bottleneck"]])
def test_a_gelu_of_another_kind_is_called(parts: list[str]) -> None:
    dem, tiles = dv.DualPerspectiveEnhance.released(32).double(), torch.randn(2, 1, 9, 6, 6, 32, dtype=torch.float64)
    for part in parts:
        dem.fusion.get_submodule(part)[1].approximate = "tanh"  # type: ignore[index]
    with torch.no_grad(), machine("launches count"):
        planned = dem(*tiles, (3, 3))
        with dv.full_computation():
            torch.testing.assert_close(planned, dem(*tiles, (3, 3)))


@pytest.mark.parametrize(
    "preset, layer",
    [
        ("released", torch.nn.GELU),
        ("released", dv.BottleneckConcatFusion),
        ("released", dv.TileAttention),
        ("paper", dv.LinearConcatFusion),
    ],
)
def test_a_layer_whose_class_was_given_another_forward_is_called(
    preset: str, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dem = getattr(dv.DualPerspectiveEnhance, preset)(32, dtype=torch.float64)
    tiles, ordinary = torch.randn(2, 1, 9, 6, 6, 32, dtype=torch.float64), layer.forward
    monkeypatch.setattr(layer, "forward", lambda *given: ordinary(*given).sin())
    with torch.no_grad(), machine("launches count" if preset == "released" else "attention is free"):
        planned = dem(*tiles, (3, 3))
        with dv.full_computation():
            torch.testing.assert_close(planned, dem(*tiles, (3, 3)))


def test_a_cpu_is_never_asked_together() -> None:
    """Launches cost it nothing, and a copy does."""
    assert not dv.DualPerspectiveEnhance.released(64).products((3, 3), (24, 24), torch.empty(0)).together
