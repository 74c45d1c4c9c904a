"""Values that hold within a `with` block: which backend runs, and whether everything is computed.

In eager code a switch belongs to a context: threads and asyncio tasks do not see each other's. `torch.compile` cannot
guard a context variable in every version that is supported. While it traces, a switch has one value for the process,
that of the block entered last and not yet left, and a graph is compiled anew where that value has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._guards import TracingContext

T = TypeVar("T")


class _Block:
    """A `with` block. A generator that holds one may be closed in another context than it was entered in."""

    left_elsewhere = False


class Switch(Generic[T]):
    """A value with a default, changed within `holding`.

    Args:
        name: Name of the context variable.
        default: The value outside of all blocks.

    Example:
        >>> switch = Switch("example", "off")
        >>> with switch.holding("on"):
        ...     switch.value()
        'on'
    """

    def __init__(self, name: str, default: T) -> None:
        self._default = default
        self._of_context: ContextVar[tuple[tuple[_Block, T], ...]] = ContextVar(name, default=())
        self._of_all: dict[_Block, T] = {}
        self._lock = Lock()
        self._of_process = default  # a plain attribute, for torch.compile to guard
        self._of_traces: WeakKeyDictionary[TracingContext, list[T]] = WeakKeyDictionary()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._in_child)

    def value(self) -> T:
        """The value here and now."""
        if torch.compiler.is_dynamo_compiling():
            traced = self._of_trace()
            return traced[-1] if traced else self._of_process
        for block, value in reversed(self._of_context.get()):
            if not block.left_elsewhere:
                return value
        return self._default

    @contextmanager
    def holding(self, value: T, *, traced: bool = True) -> Iterator[None]:
        """Within the block the switch has this value; blocks may be left in any order.

        Args:
            value: The value.
            traced: Whether what `torch.compile` traces meanwhile, in any thread, has the value, too.
        """
        if torch.compiler.is_dynamo_compiling():
            self._enter(value)
            try:
                yield
            finally:
                self._leave()
            return
        block = _Block()
        try:
            self._of_context.set((*self._of_context.get(), (block, value)))
            if traced:
                with self._lock:
                    self._of_all[block] = value
                    self._of_process = value
            yield
        finally:
            entered = self._of_context.get()
            block.left_elsewhere = all(other is not block for other, _ in entered)
            self._of_context.set(tuple(entry for entry in entered if entry[0] is not block))
            with self._lock:
                self._of_all.pop(block, None)
                self._of_process = next(reversed(self._of_all.values()), self._default)

    # Blocks inside of what is traced. These run while it is traced, not in the graph, which has no side effects.

    def _enter(self, value: T) -> None:
        self._of_traces.setdefault(TracingContext.get(), []).append(value)

    def _leave(self) -> None:
        self._of_traces[TracingContext.get()].pop()

    def _of_trace(self) -> tuple[T, ...]:
        return tuple(self._of_traces.get(TracingContext.get(), ()))

    for _constant in (_enter, _leave, _of_trace):
        _constant._dynamo_marked_constant = True  # type: ignore[union-attr]

    def _in_child(self) -> None:
        """After a fork only the thread that forked goes on; another one may have held the lock."""
        self._lock = Lock()
        self._of_all = dict(self._of_context.get())
        self._of_process = next(reversed(self._of_all.values()), self._default)


FULL = Switch("dualview_full_computation", default=False)
"""Whether everything is computed."""


def full_computation() -> AbstractContextManager[None]:
    """Within the context nothing is skipped: every tile is encoded, every query computed, as the equations are written.

    For debugging and for benchmarks; outputs and gradients differ from the planned ones by rounding only. The context
    holds for the thread or task that enters it; a graph that `torch.compile` traces meanwhile has it, too. Of
    `torch.utils.checkpoint`, which computes anew in a thread of its own on a GPU, enter it in the ``context_fn``, too.

    Example:
        >>> with full_computation():
        ...     planning()
        False
    """
    return FULL.holding(True)


def planning() -> bool:
    """Whether only what the readout reads is computed; False inside `full_computation`."""
    return not FULL.value()
