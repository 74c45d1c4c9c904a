"""Words for a terminal: one line for what goes wrong, and nothing in a file's name or a message takes control."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

EXTRA = {
    **dict.fromkeys(("PIL", "numpy", "matplotlib", "tqdm", "transformers"), "demo"),
    **dict.fromkeys(("accelerate", "peft", "yaml"), "train"),
    **dict.fromkeys(("skimage", "sklearn"), "probe"),
}
"""Packages that may be missing, and the extra that brings them."""
NO_MEMORY = re.compile(r"(can't|cannot|unable to|failed to) (allocate|map)|out of memory", re.IGNORECASE)


def printable(text: str, stream: TextIO | None = None) -> str:
    r"""The text with everything but printable characters, spaces and ends of lines written as escapes.

    Escape sequences, controls of writing direction and bytes that are no text are not printable; nor is what the
    encoding of the stream does not have.

    Example:
        >>> print(printable("a\x1b[31mb"))
        a\x1b[31mb
    """
    visible = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """Print lines at once, on standard output."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # print would say nothing
    print(printable(text, sys.stdout), flush=True)


def hint(text: str) -> None:
    """Print a line that is no part of the result, on standard error."""
    if sys.stderr is not None:
        print(printable(text, sys.stderr), file=sys.stderr, flush=True)


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each, aligned on the left.

    Example:
        >>> print(in_columns([["a", "bc"], ["def", "g"]]))
        a    bc
        def  g
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@contextmanager
def native_messages_dropped() -> Iterator[None]:
    """Within the context, nothing that libraries written in C print on standard error is seen: libtiff's warnings."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def libraries_silent() -> Iterator[None]:
    """Whatever matters to the user is an error, and that is said in our words."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def explained(error: BaseException) -> str | None:
    """The line for what may happen to anybody; None for a fault of the program."""
    if isinstance(error, ImportError) and isinstance(error.__cause__, ModuleNotFoundError):
        error = error.__cause__
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError, OSError)) and NO_MEMORY.search(text)
    ):
        return "out of memory: take a smaller picture, a smaller grid, or free some memory first"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            return None
        return f'{package} is not installed: run pip install -e ".[{EXTRA[package]}]" in your clone'
    if isinstance(error, BrokenPipeError):
        return "standard output was closed before everything was written"
    if isinstance(error, OSError) and error.errno is None:  # said by a library, as of a hub that is not reached
        return text
    if isinstance(error, OSError):  # files that cannot be read or written are an ImageError
        return f"{error.filename or 'standard output cannot be written'}: {error.strerror or text}"
    return text if isinstance(error, ValueError) else None
