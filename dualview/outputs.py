"""Write pictures and directories: whole, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from dualview.images import ImageError

if TYPE_CHECKING:
    from PIL import Image

SAVED_AS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""The extensions that are written, and the formats that they stand for."""


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse what could not be written in the end, before anything is computed.

    Raises:
        ImageError: The extension is unknown, the folder does not exist or may not be written to, or something else
            than a file has that name.
    """
    path = Path(path)
    if path.suffix.lower() not in SAVED_AS:
        raise ImageError(f"{path}: the extension {path.suffix!r} is none of {', '.join(SAVED_AS)}: use one of them.")
    check_file(path)


def check_file(path: str | os.PathLike[str]) -> None:
    """The same for a file of any kind.

    Raises:
        ImageError: As for `check_output`, the extension aside.
    """
    path = Path(path)
    with _writing(path):
        if not path.parent.is_dir():
            raise ImageError(f"{path}: the folder {path.parent} does not exist: make it first.")
        if not os.access(path.parent, os.W_OK):
            raise ImageError(f"{path} cannot be written: no permission to write to the folder {path.parent}.")
        try:
            path.stat()
        except FileNotFoundError:
            return
        if not path.is_file():
            raise ImageError(f"{path} cannot be written: something other than a file has that name.")


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture; the extension says the format. A file of that name is replaced as a whole, or stays as it is.

    Raises:
        ImageError: [`check_output`][dualview.outputs.check_output] refuses the path, or the file cannot be written.
    """
    path = Path(path)
    check_output(path)
    encoded = BytesIO()
    with _writing(path):
        image.save(encoded, SAVED_AS[path.suffix.lower()], quality=92, optimize=True)  # each takes what it knows
        replace_file(path.resolve(), encoded.getbuffer())


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block ends, and is removed if the block fails.

    Raises:
        FileExistsError: There is something of that name already.
        OSError: The folder cannot be made.
    """
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "exists already, and is not replaced: give another name", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder, in which a new one could be made", str(path.parent))
    beside = path.with_name(f".dualview-{secrets.token_hex(8)}")
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone already, unless something went wrong


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}.") from error


def replace_file(path: Path, content: memoryview) -> None:
    """Put a file of this content in the place of what is there, if anything is, in one step."""
    beside = path.with_name(f".dualview-{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            beside.chmod(path.stat().st_mode & 0o777)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()  # gone already, unless something went wrong
