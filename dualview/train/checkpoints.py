"""Checkpoints that are there whole or not at all, whenever the process is killed.

transformers writes a checkpoint file by file into a folder that has its final name from the start, takes the one with
the highest number when it resumes, whole or not, and removes an old one in its place. Here it writes into a folder
beside, which gets its name by one rename when everything is on the disk; an old one loses its name by one rename first.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path

STAGED = ".dualview-saving"
"""Folder that a checkpoint is written into, one for every process group, so that all of its processes know it."""
NAME = re.compile(r"checkpoint-(\d+)")
FILES = "files.json"
"""What a checkpoint consists of: sizes of files, by name."""
STATE = "trainer_state.json"
"""What transformers resumes by."""


def staging(folder: Path) -> Path:
    """Where in a folder of checkpoints the next one is written."""
    return folder / STAGED


def publish(staged: Path, final: Path) -> None:
    """Give a folder its name when what is in it is on the disk; one of that name, if there is any, is replaced.

    Args:
        staged: The folder.
        final: Its name, on the same file system.
    """
    for path in sorted(staged.rglob("*"), reverse=True):
        _sync(path)
    _sync(staged)
    drop(final)
    staged.rename(final)
    _sync(final.parent)


def note_files(folder: Path) -> None:
    """Write down what a checkpoint consists of."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def check_checkpoint(folder: Path) -> None:
    """Raise a ValueError where a file of a checkpoint is missing, or has another size than was written.

    One of a version that noted no files is taken as it is: a checkpoint has its name when it is complete.
    """
    if not (folder / FILES).exists() and (folder / STATE).is_file():
        return
    try:
        noted = json.loads((folder / FILES).read_text(encoding="utf-8")).items()
        found = {name: path.stat().st_size if (path := folder / name).is_file() else None for name, _ in noted}
        wrong = [f"{name} has {found[name]} bytes in place of {size}" for name, size in noted if found[name] != size]
    except (OSError, ValueError, AttributeError):
        wrong = [f"{FILES} does not say of which files it consists"]
    if wrong:
        raise ValueError(
            f"{folder}: is not the checkpoint that was written: {wrong[0].replace('None bytes', 'no bytes')}. Move the "
            "folder away, and resume: the run goes on from the checkpoint before, or from the beginning of the stage."
        )


def drop(folder: Path) -> None:
    """Remove a folder, whose name is gone before the first of its files is."""
    if not os.path.lexists(folder):
        return
    nameless = folder.with_name(f"{STAGED}-{secrets.token_hex(8)}")
    folder.rename(nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest last."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        drop(old)


def clear(folder: Path) -> None:
    """Remove what a process that was killed has left behind."""
    for path in folder.glob(f"{STAGED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
