"""Parts of a run in two processes: each begins when what it needs is done, and the first failure ends the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
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
        ValueError: A part needs one that can never be done.
        RuntimeError: A process was killed from outside.
        Exception: What the first part that failed has raised; the other processes are ended.
    """
    waiting, running, done = dict(parts), dict[Future[None], str](), set[str]()
    with _pool() as pool:
        while waiting or running:
            ready = [name for name, part in waiting.items() if done.issuperset(part.needs)]
            if not ready and not running:
                raise ValueError(f"{', '.join(waiting)}: what is needed before is no other part: correct the needs.")
            threads = PROCESSES if len(ready) + len(running) == 1 else 1
            try:
                for name in ready[: PROCESSES - len(running)]:
                    part = waiting.pop(name)
                    running[pool.submit(_run, threads, part.call, part.arguments)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    done.add(running.pop(future))
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"a process was killed beside or during {' and '.join(map(repr, running.values()))}, perhaps for"
                    " want of memory: call again, and the run goes on."
                ) from error


@contextmanager
def _pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that do not outlive a failure: a pool alone would let them finish what they do."""
    others = active_children()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), _end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            for process in set(active_children()) - set(others):
                process.terminate()
            raise


def _end_with_parent() -> None:
    """Called in each process: it ends when the one that began it is killed. It would go on to write into the folder."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def _run(threads: int, call: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    call(*arguments)
