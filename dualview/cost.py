"""Operations and bytes of a call, counted without doing it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


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


def cost_of(call: Callable[..., object], *parts: Any) -> Cost:
    """The cost of a call, found by running it on tensors without contents.

    Args:
        call: What to count. Tensors that it makes hold no data; it must not depend on the values of any.
        *parts: What it is called with: modules, and tuples of modules and of other things. It gets copies, so that the
            modules themselves are neither run nor changed; parameters on the meta device come to `device_of`.

    Example:
        >>> cost_of(lambda: torch.empty(4, 8) @ torch.empty(8, 16))
        Cost(operations=1024, bytes=896)
        >>> cost_of(lambda linear: linear(torch.empty(4, 8)), nn.Linear(8, 16, bias=False))
        Cost(operations=1024, bytes=896)
    """
    return run_without_contents(call, *parts)[0]


def run_without_contents(call: Callable[..., T], *parts: Any) -> tuple[Cost, T]:
    """The cost of a call and its result; arguments as for `cost_of`. Tensors of the result hold nothing."""
    without_contents = FakeTensorMode(allow_non_fake_inputs=True)
    with without_contents:
        stand_ins = _stand_ins(parts)
    copies = copy.deepcopy(parts, stand_ins)
    for module in modules_of(copies):
        if "_hf_hook" in vars(module):  # accelerate's forward would fetch the weights
            vars(module).pop("forward", None)
    with torch.no_grad(), without_contents, _Counter() as counter:
        result = call(*copies)
    return Cost(counter.operations, counter.bytes), result


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is, or may come to be if it is nowhere yet: on the GPU, if there is one."""
    if not tensor.is_meta:
        return tensor.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def modules_of(part: Any) -> Iterator[nn.Module]:
    """All modules in a module, or in a tuple of modules and of other things."""
    if isinstance(part, nn.Module):
        yield from part.modules()
    elif isinstance(part, tuple):
        for inside in part:
            yield from modules_of(inside)


def _stand_ins(parts: tuple[Any, ...]) -> dict[int, Any]:
    """What `copy.deepcopy` takes in place of parameters, buffers and hooks, by identity.

    Hooks are not run, but still there: layers that have some are never read.
    """
    found: dict[int, Any] = {}
    for module in modules_of(parts):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device_of(tensor))
                plain = type(tensor) is nn.Parameter
                found[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if plain else empty
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            found[id(hooks)] = type(hooks)((key, _do_nothing) for key in hooks)
        if hasattr(module, "_hf_hook"):
            found[id(module._hf_hook)] = None
    return found


def _do_nothing(*_: object, **__: object) -> None:
    """In place of a hook."""


_MOVE_NOTHING = (torch.ops.aten._unsafe_view.default, torch.ops.aten.new_empty.default)
"""Operations that read no element, though their schemas do not say so: a view, and memory as it is found."""
_GATHERS = (torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor, torch.ops.aten.embedding.default)
"""Operations that read of their first argument only the elements that they gather."""


class _Counter(TorchDispatchMode):
    """Counts in the thread that enters it alone; torch's FlopCounterMode puts hooks on all modules of the process."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # loads triton, where it is installed, and sympy

        # On a CPU attention is an operation of its own, which older versions of torch do not count.
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self._formulas: dict[Any, Callable[..., int]] = {**flop_registry, on_cpu: _attention_operations}
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in self._formulas:
            # Formulas of torch 2.11 do not know products with a type of their own for the result, of a GPU alone.
            operands = [x for x in args if not isinstance(x, torch.dtype)]
            self.operations += self._formulas[func._overloadpacket](*operands, **kwargs, out_val=out)
        is_view = any(arg.alias_info is not None for arg in func._schema.arguments) and not func._schema.is_mutable
        read, written = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        if func in _GATHERS:
            read[0] = written[0]
        elif func is torch.ops.aten.copy_.default:  # what is overwritten is not read
            del read[0]
        if read and written and not is_view and func not in _MOVE_NOTHING:
            self.bytes += sum(x.numel() * x.element_size() for x in read + written)
        return out


def _attention_operations(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])
