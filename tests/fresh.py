"""Code in a process of its own: a copy of an interpreter that has imported something and run nothing."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

COPIES = """
import importlib, json, os, signal, sys

for name in sys.argv[1:]:
    importlib.import_module(name)


def begun(request):
    child = os.fork()
    if child:
        return child
    signal.alarm(300)  # ends a process that waits for another one in vain
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


for line in sys.stdin:
    children = [begun(request) for request in json.loads(line)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""

SWITCHES = ("TRITON_INTERPRET", "DUALVIEW_BACKEND")
"""What the environment says is not passed on: only what a caller gives."""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SWITCHES}
"""That of before the first test, so that no test's changes reach the copies of another one."""

LIBRARIES = ("peft", "dualview.models", "dualview.train.trainer", "torch.distributed.fsdp", "tests.tiny")
"""Slow to import: once for all copies that a worker of pytest asks for."""


@functools.cache
def _server(*imported: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", COPIES, *imported],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[1],
    )


def run_fresh(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What the code prints and how it ends; ``torch`` is imported, but no name stands for it."""
    return _run(("torch",), code, arguments, [environment])[0]


def run_with_libraries(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The same where more is imported, and nothing was computed: torch takes no gradients in a copy of what has."""
    return _run(LIBRARIES, code, arguments, [environment])[0]


def run_two(code: str, *arguments: str) -> "list[subprocess.CompletedProcess[str]]":
    """Two processes at a time, each with its rank and the address of the first in its environment, as of torchrun."""
    with socket.socket() as held:  # until both have ended: its port is given to nobody else, but the first may listen
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1]), "WORLD_SIZE": "2"}
        return _run(LIBRARIES, code, arguments, [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"])


def _run(
    imported: tuple[str, ...], code: str, arguments: tuple[str, ...], environments: list[dict[str, str]]
) -> "list[subprocess.CompletedProcess[str]]":
    """The code in a process for each environment, all at the same time."""
    server = _server(*imported)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            {"code": textwrap.dedent(code), "arguments": arguments, "environment": environment}
            | {name: str(Path(folder, f"{name}{i}")) for name in ("stdout", "stderr")}
            for i, environment in enumerate(environments)
        ]
        server.stdin.write(json.dumps(requests) + "\n")
        server.stdin.flush()
        return [
            subprocess.CompletedProcess(
                code, status, *(Path(request[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
            )
            for status, request in zip(json.loads(server.stdout.readline()), requests, strict=True)
        ]
