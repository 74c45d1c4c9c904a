"""What the tests of `benchmarks.gpu_process` run in processes of its own; without torch, so that they start soon."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_process import ResultFile


def ends_in_the_middle(path: Path, again: bool) -> None:
    """One section fails, the second row of the next one ends the process, and a third section cannot even begin."""
    file = _begun(path, again)
    file.section("fails", _fails, str)
    file.section("measures", lambda: _measure(file, {"one": int, "two": lambda: os._exit(7), "three": int}), str)
    file.section("cannot begin", lambda: os._exit(8), str)
    file.section("last", lambda: _measure(file, {"four": int}), str)


def hangs(path: Path, again: bool) -> None:
    """The second row never ends."""
    file = _begun(path, again)
    file.section("measures", lambda: _measure(file, {"one": int, "two": signal.pause, "three": int}), str)


def cannot_begin(path: Path, again: bool) -> None:
    """It ends before anything is written."""
    os._exit(9)


def _begun(path: Path, again: bool) -> ResultFile:
    return ResultFile.begun(path) if again else ResultFile(path, {"sections": {}, "rows": []})


def _fails() -> None:
    raise ValueError("no such thing")


def _measure(file: ResultFile, calls: dict[str, Callable[[], object]]) -> None:
    """As `benchmarks.gpu_rows.Rows` does: a row is written before it has a figure, and is not begun again."""
    rows = file.document["rows"]
    for name, call in calls.items():
        if name not in [row["name"] for row in rows]:
            rows.append({"name": name, "done": False})
            file.write()
            call()
            rows[-1]["done"] = True
            file.write()
