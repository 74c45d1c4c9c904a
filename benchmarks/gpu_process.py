"""A result file, and the process that fills it: what was measured survives a crash, a hang and the end of the time."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SILENT = 120.0
"""Seconds without a new row after which a process is ended: nothing that is measured takes so long."""

RUNNING = "the process ended, or was ended, while this ran"
"""What stands in place of a figure until there is one."""


@dataclass
class ResultFile:
    """A document that grows; the file is whole at any time, for each version replaces the one before.

    Attributes:
        path: The file.
        document: What stands in it: rows, and among the other fields "sections", the state of each one, None before it
            is begun.
    """

    path: Path
    document: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begun(cls, path: Path) -> ResultFile:
        """What an earlier process left."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    def write(self) -> None:
        """Write all of it, or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        new.replace(self.path)

    def section(self, name: str, run: Callable[[], None], described: Callable[[Exception], str]) -> None:
        """Run a section that has not been run yet; what fails is written down, and the next one follows.

        A process that ended in the middle goes on behind the row at which it ended; if it had come to no row, it would
        end there again, and the section is given up.
        """
        state, here = self.document["sections"].get(name), f"begun at row {len(self.document['rows'])}"
        if state == here:
            self.document["sections"][name] = "failed: the process ended while this was prepared"
        if state == here or (state and not state.startswith("begun")):
            return
        self.document["sections"][name] = here
        self.write()
        try:
            run()
        except Exception as error:  # whatever a library raises
            self.document["sections"][name] = f"failed: {described(error)}"
            print(f"{name}: failed: {described(error)}", flush=True)
        else:
            self.document["sections"][name] = "done"
        self.write()


def keep_running(target: Callable[..., None], path: Path, end: float, *, silent: float = SILENT) -> bool:
    """Run ``target(path, again)`` in a process of its own, and again where the last one ended, until it is through.

    A fault of a GPU ends all work of its process, and only of that.

    Args:
        target: Writes to ``path`` what it has done; ``again`` is False at first.
        path: The file.
        end: `time.monotonic` after which the process is ended.
        silent: Seconds without a change of the file after which it is ended, too.

    Returns:
        Whether anything was written.
    """
    spawn, first = multiprocessing.get_context("spawn"), _written(path)
    while time.monotonic() < end:
        before = _written(path)
        process = spawn.Process(target=target, args=(path, before != first))
        process.start()
        heard = time.time()
        while process.is_alive() and time.monotonic() < end and time.time() - heard < silent:
            process.join(0.2)
            heard = max(heard, _written(path))
        if process.is_alive():
            print("ended: " + ("the time is over" if time.monotonic() >= end else "no row for long"), flush=True)
            process.kill()
            process.join()
        elif process.exitcode == 0:
            break
        if _written(path) == before:  # it cannot even begin
            break
        print(f"the process ended with {process.exitcode}", flush=True)
    return _written(path) != first


def _written(path: Path) -> float:
    """When, in seconds of `time.time`; 0 if never."""
    return path.stat().st_mtime_ns / 1e9 if path.exists() else 0.0
