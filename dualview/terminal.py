"""Words for a terminal: nothing in a file's name or in a message takes control of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


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
    print(printable(text, sys.stdout), flush=True)


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
