"""Code in an interpreter that has torch imported and nothing else: copies of one, made for each worker."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

COPIES = """
import json, os, sys
import torch

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), stream)
        os.environ.update(request["environment"])
        sys.argv = ["-c", *request["arguments"]]
        code = 0
        try:
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        try:
            sys.stdout.flush()
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

SWITCHES = ("TRITON_INTERPRET", "DUALVIEW_BACKEND")
"""What the environment says is not passed on: only what a caller gives."""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.Popen(
        [sys.executable, "-c", COPIES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )


def run_fresh(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What the code prints and how it ends; ``torch`` is imported, but no name stands for it."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        request = {"code": textwrap.dedent(code), "arguments": arguments, "environment": environment, **files}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(files[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(code, status, out, err)
