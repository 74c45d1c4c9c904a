"""Run the examples of the README and the documentation: Python blocks, and shell blocks that call `dualview`.

Docstrings are run by pytest's own --doctest-modules. The blocks of one page share their names and a temporary folder,
which holds a picture, photo.jpg; under pytest-xdist they need `--dist loadfile`.
"""

import contextlib
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

os.environ["COLUMNS"] = "80"  # what is printed must not depend on the terminal that the tests run in

collect_ignore = ["dualview/lmms_model.py"]  # it has no examples, and imports lmms-eval, which `make eval` installs

ELSEWHERE = ("cd", "git", "make", "pip", ".venv/bin/pip")
"""Commands that .ci/run tries in an environment of its own, or that only fetch the sources."""


def enter_folder(namespace: dict[str, Any]) -> None:
    from matplotlib.cbook import get_sample_data

    leave = contextlib.ExitStack()
    folder = leave.enter_context(tempfile.TemporaryDirectory())
    shutil.copy(get_sample_data("grace_hopper.jpg", asfileobj=False), Path(folder, "photo.jpg"))
    leave.enter_context(contextlib.chdir(folder))
    namespace["_leave_folder"] = leave.close


def leave_folder(namespace: dict[str, Any]) -> None:
    namespace["_leave_folder"]()


def run_shell(example: Example) -> str | None:
    """Run the lines of a block; the message says which one failed."""
    from dualview.cli import main

    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or ("cd",)
        if program not in ("dualview", *ELSEWHERE):
            return f"{line!r}: no test knows how to run {program!r}"
        if program == "dualview" and (code := main(arguments)) != 0:
            return f"{line!r} exited with {code}"
    return None


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", run_shell)],
    pattern="*.md",
    setup=enter_folder,
    teardown=leave_folder,
).pytest()
