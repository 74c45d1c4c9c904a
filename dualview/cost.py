"""Operations and bytes of a call, counted without doing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Cost(NamedTuple):
    """What a call costs.

    Attributes:
        operations: Floating-point operations of matrix products, convolutions and attention; a multiply-addition
            is two.
        bytes: Read and written by every operation, views excepted, as if nothing stayed in a cache.
    """

    operations: int
    bytes: int

    def times(self, count: int) -> Cost:
        """The cost of ``count`` such calls."""
        return Cost(self.operations * count, self.bytes * count)


_MOVE_NOTHING = (torch.ops.aten._unsafe_view.default, torch.ops.aten.new_empty.default)
"""Operations that read no element, though their schemas do not say so: a view, and memory as it is found."""
_GATHERS = (torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor, torch.ops.aten.embedding.default)
"""Operations that read of their first argument only what they take."""


class _ByteCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(arg.alias_info is not None for arg in func._schema.arguments) and not func._schema.is_mutable
        read, written = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        if func in _GATHERS:
            read[0] = written[0]
        elif func is torch.ops.aten.copy_.default:  # what is overwritten is not read
            del read[0]
        if read and written and not is_view and func not in _MOVE_NOTHING:
            self.total += sum(x.numel() * x.element_size() for x in read + written)
        return out


def _attention_operations(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


class _Calling(nn.Module):
    """A call in the form that `functional_call` takes, with the module whose parameters it replaces."""

    def __init__(self, module: nn.Module, call: Callable[[], object]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self) -> object:
        return self.call()


def cost_of(call: Callable[[], object], module: nn.Module | None = None) -> Cost:
    """The cost of a call, found by running it on tensors without contents, as on a CPU.

    Args:
        call: What to count. Tensors that it makes hold no data; it must not depend on the values of any.
        module: A module that ``call`` uses; its parameters are replaced meanwhile, so that it may be on any device.

    Example:
        >>> cost_of(lambda: torch.empty(4, 8) @ torch.empty(8, 16))
        Cost(operations=1024, bytes=896)
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads triton, where it is installed, and sympy

    # On a CPU attention is an operation of its own, which older versions of torch do not count.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations}
    counter, bytes_ = FlopCounterMode(display=False, custom_mapping=on_cpu), _ByteCounter()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), bytes_, counter:
        if module is None:
            call()
        else:
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            stand_in = {f"module.{name}": torch.empty(x.shape, dtype=x.dtype) for name, x in state.items()}
            torch.func.functional_call(_Calling(module, call), stand_in, ())
    return Cost(counter.get_total_flops(), bytes_.total)
