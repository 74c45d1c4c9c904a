"""Parts of a run in two processes: each begins when what it needs is done, and the first failure ends the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, NamedTuple

import torch

PROCESSES = 2


class Part(NamedTuple):
    """A part of a run.

    Attributes:
        call: What it does. It is sent to another process, and what it gives is not sent back.
        arguments: Of the call.
        needs: Names of the parts that have to be done before.
    """

    call: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


def run_parts(parts: dict[str, Part]) -> None:
    """Run parts, those named first before others that could run as well.

    Each has one thread; one beside which nothing can run has two.

    Args:
        parts: By their names. Each can begin once those before it are done.

    Raises:
        Exception: What the first part that failed has raised; the other processes are ended.
    """
    waiting, running, done = dict(parts), dict[Future[None], str](), set[str]()
    with _pool() as pool:
        while waiting or running:
            ready = [name for name, part in waiting.items() if done.issuperset(part.needs)]
            threads = PROCESSES if len(ready) + len(running) == 1 else 1
            for name in ready[: PROCESSES - len(running)]:
                part = waiting.pop(name)
                running[pool.submit(_run, threads, part.call, part.arguments)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                done.add(running.pop(future))


@contextmanager
def _pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that do not outlive a failure: a pool alone would let them finish what they do."""
    others = active_children()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            for process in set(active_children()) - set(others):
                process.terminate()
            raise


def _run(threads: int, call: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    call(*arguments)
