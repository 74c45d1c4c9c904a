"""Assertions that many tests need."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn


@contextmanager
def refuses(*parts: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block must raise ``error`` with a message that holds every part: the values, the rule, the remedy."""
    with pytest.raises(error) as caught:
        yield
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[list[str]]:
    """A list that fills with the names of the modules as they run; nothing is hung on them, as a hook would be."""
    names, called, call = {id(module): name for name, module in modules.items()}, [], nn.Module.__call__

    def recording(module: nn.Module, *args: object, **kwargs: object) -> object:
        called.extend([names[id(module)]] if id(module) in names else [])
        return call(module, *args, **kwargs)

    nn.Module.__call__ = recording
    try:
        yield called
    finally:
        nn.Module.__call__ = call


def fresh(out: Tensor, *inputs: Tensor) -> bool:
    """Whether ``out`` is contiguous and shares no memory with the inputs."""
    storages = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
    return out.is_contiguous() and (not out.numel() or out.untyped_storage().data_ptr() not in storages)


def calls_of(function: Callable[[], object]) -> int:
    """How many functions a call of this enters, Python's and built-in ones, once it has been called before."""
    function()
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events) - 1  # the last ends the count


def assert_compiles_once(
    fn: Callable[..., object], inputs: Callable[[int], tuple[Tensor, ...]], batches: tuple[int, ...] = (2, 3, 5)
) -> None:
    """One full graph serves every batch size, with the results and gradients of the plain call.

    Args:
        fn: What is compiled; its first result counts if it returns several.
        inputs: Makes the arguments for a batch size; their first dimension is the batch.
        batches: The sizes that are tried, one after the other.
    """
    from torch._dynamo.testing import CompileCounterWithBackend  # here, for processes that import the rest alone

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    for batch in batches:
        values, results = inputs(batch), []
        for call in (fn, compiled):
            given = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in values)
            for x in given:
                torch._dynamo.mark_dynamic(x, 0)
            out = call(*given)
            out = out if isinstance(out, Tensor) else out[0]
            if out.requires_grad:
                (out * torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)).sum().backward()
            results.append((out.detach(), [x.grad for x in given if x.requires_grad]))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for batches of {batches}"


def assert_exports(module: torch.nn.Module, inputs: Callable[[int], tuple[Tensor, ...]]) -> None:
    """The module exports with a dynamic batch, and the program gives the module's results at other batch sizes."""
    given = inputs(2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, given, dynamic_shapes=tuple({0: batch} for _ in given))
    for size in (1, 2, 5):
        given = inputs(size)
        torch.testing.assert_close(program.module()(*given), module(*given))
