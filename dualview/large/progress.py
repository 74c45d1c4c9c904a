"""How far something has come, for whoever waits for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counted(total: int, what: str, unit: str, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of units that are done; a bar on standard error shows their sum.

    Raises:
        ImportError: The bar is asked for, and tqdm is not installed.
    """
    if not shown:
        yield lambda done: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'progress=True needs tqdm, which is not installed: run pip install -e ".[large]" in your clone.'
        ) from error
    with tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=total > 10**6, file=sys.stderr) as bar:
        yield bar.update
