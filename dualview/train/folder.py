"""The folder of a run: used by one process at a time, what it was begun with, and gone where nothing was trained."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dualview.arguments import shown
from dualview.outputs import replace_file
from dualview.train.checkpoints import checkpoints
from dualview.train.config import STAGES, TrainConfig
from dualview.train.rows import Row

T = TypeVar("T")

RECORD, ROWS, LOCK = "config.json", "data.json", ".lock"
"""What a run was begun with, and the rows that a stage was begun with; who uses the folder."""
EXACT = ("bad_rows", "workers", "save_steps", "save_total_limit", "logging_steps")
"""Fields of a stage that may change when a run is resumed, for they change no weight."""
OF_BASE = ("model", "seed")
"""What decides the model that training begins with, which a run may have made."""
ROUNDED = "rows_per_device"
"""May change, too, for memory may have run out; sums over the rows of a step are then rounded otherwise."""


@contextmanager
def run_folder(config: TrainConfig, *, resume: bool, report: Callable[[str], None]) -> Iterator[None]:
    """The folder of a run within the block, for this process alone; made, and recorded, where it is not there.

    Where the block fails and has left nothing but notes, a folder that it made is removed: the next call begins anew.

    Raises:
        ValueError: The folder is there and ``resume`` is False, another process uses it, it is no folder of a run, or
            the run was begun with another configuration.
    """
    folder, made = Path(config.output), True
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        made = False
        if not resume:
            raise ValueError(
                f"output={shown(config.output)}: exists already; resume the run in it, or name another folder."
            ) from None
    except OSError as error:
        raise ValueError(f"output={shown(config.output)}: {error.strerror}; name a folder that can be made.") from error
    with _locked(folder):
        try:
            _record(config, folder, report)
            yield
        except BaseException:
            if made and _holds_notes_alone(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _holds_notes_alone(folder: Path) -> bool:
    """Whether nothing is in the folder that would be missed: neither weights nor losses, nor anything of others."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return all(
        path.name in (RECORD, ROWS, LOCK) or path.name.startswith("events.out.tfevents") or not path.stat().st_size
        for path in files
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock that the system takes away when the process ends, however it ends; processes forked do not share it."""
    where = folder.stat()  # whatever path leads there
    if (place := (where.st_dev, where.st_ino)) in HELD:  # the system asks other processes alone
        raise ValueError(f"output={shown(str(folder))}: this process trains in it; wait until it ends.")
    HELD.add(place)
    try:
        with _locked_for_others(folder):
            yield
    finally:
        HELD.remove(place)


HELD: set[tuple[int, int]] = set()
"""Folders in which this process trains. It must not open their locks a second time: closing one would free both."""


@contextmanager
def _locked_for_others(folder: Path) -> Iterator[None]:
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output={shown(str(folder))}: {error.strerror}; name a folder of a run.") from error
    with file:
        held = _lock(file.fileno())
        if not (folder / LOCK).is_file() or not os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
            raise ValueError(f"output={shown(str(folder))}: has just been removed by another process; start again.")
        if not held:
            file.seek(0)
            raise ValueError(
                f"output={shown(str(folder))}: process {file.read().strip() or 'unknown'} trains in it; wait until it "
                "ends, stop it, or name another folder."
            )
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _lock(descriptor: int) -> bool:
    """Whether no other process has the lock; file systems without locks refuse nothing."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond what is read by others
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def _record(config: TrainConfig, folder: Path, report: Callable[[str], None]) -> None:
    record, now = folder / RECORD, json.loads(json.dumps(config.plain()))
    if record.is_file():
        before = _read(record, dict, "the configuration of a run")
        changed = [each for each in _differences(before, now) if each[0].rpartition(".")[2] not in EXACT]
        if not any(checkpoints(folder / name) or (folder / name / "model").exists() for name in STAGES):
            changed = [each for each in changed if each[0].partition(".")[0] in OF_BASE]  # nothing is trained yet
        if fixed := [each for each in changed if each[0].rpartition(".")[2] != ROUNDED]:
            name, was, value = fixed[0]
            raise ValueError(
                f"{name}={shown(value)} is not what {folder} was begun with, {shown(was)} ({len(fixed)} differences): "
                f"of a stage only {', '.join((*EXACT, ROUNDED))} may change. Resume with the same configuration, or "
                "begin another run in another folder."
            )
        for name, was, value in changed:
            report(
                f"{name}={shown(value)}, and was {shown(was)}: sums are rounded otherwise, so the weights are not bit "
                "for bit those of a run that was not stopped."
            )
    elif others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
        raise ValueError(
            f"output={shown(str(folder))}: has {shown(others[0])} and no {RECORD}, so it is no folder of a run; name "
            "another one."
        )
    replace_file(record.absolute(), memoryview(json.dumps(now, indent=1).encode()))


def _read(record: Path, kind: type[T], what: str, remedy: str = "begin another run in another folder") -> T:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{record} cannot be read ({error}): {remedy}.") from error
    if not isinstance(found, kind):
        raise ValueError(f"{record} holds {shown(found)}, which is not {what}: {remedy}.")
    return found


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def check_rows(files: Sequence[tuple[str, Sequence[Row]]], folder: Path, *, write: bool) -> None:
    """Whether the rows of a stage are those that its checkpoints were trained on; they decide the order.

    Args:
        files: Names of files, and the rows of each that are good.
        folder: Of the stage.
        write: Whether to note them, for the next time.

    Raises:
        ValueError: They are others.
    """
    now: list[Any] = [[name, len(rows), _digest(rows)] for name, rows in files]
    record = folder / ROWS
    if checkpoints(folder) and record.is_file():
        remedy = "if the files of rows are still what the run was begun with, move it away and resume"
        before = _read(record, list, what := f"a name, a number and a digest for each of {len(now)} files", remedy)
        if len(before) != len(now) or not all(map(_is_note, before)):
            raise ValueError(f"{record} holds {shown(before)}, which is not {what}: {remedy}.")
        for (_, count, digest), (name, had, was) in zip(now, before, strict=True):
            if digest != was:
                raise ValueError(
                    f"{name}: {count} good rows, whose SHA-256 begins with {digest[:12]}, and {folder} was begun with "
                    f"{had} of {was[:12]}: the rows of a run must stay as they are, for they decide the order. Put the "
                    "file and its pictures back as they were, or begin another run in another folder."
                )
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(record.absolute(), memoryview(json.dumps(now, indent=1).encode()))


def _is_note(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [str, int, str]


def _digest(rows: Sequence[Row]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([[str(path) for path in row.images], row.turns]).encode())
    return found.hexdigest()
