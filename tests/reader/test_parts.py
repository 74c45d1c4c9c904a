"""Parts of a run: the order, the threads, and that the first failure ends all."""

import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch

from dualview.reader.parts import Part, run_parts
from tests.checks import refuses


def write(folder, name, *before):
    """Leaves a file that says with how many threads it ran."""
    assert all((folder / each).is_file() for each in before)
    (folder / name).write_text(str(torch.get_num_threads()))


def fail():
    raise ValueError("the tower has fallen")


def never_end(folder):
    (folder / "begun").touch()
    time.sleep(60)
    (folder / "ended").touch()


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_part_begins_when_what_it_needs_is_done(tmp_path):
    parts = {
        "last": Part(write, (tmp_path, "last", "a", "b"), ("a", "b")),
        "a": Part(write, (tmp_path, "a")),
        "b": Part(write, (tmp_path, "b")),
    }
    run_parts(parts)
    threads = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert threads == {"a": "1", "b": "1", "last": "2"}, "the last part is alone"


def test_the_first_failure_ends_the_run(tmp_path):
    parts = {
        "long": Part(never_end, (tmp_path,)),
        "tower": Part(fail),
        "after": Part(write, (tmp_path, "after"), ("tower",)),
    }
    with pytest.raises(ValueError, match="the tower has fallen"):
        run_parts(parts)
    assert not {"ended", "after"} & {file.name for file in Path(tmp_path).iterdir()}


def test_a_process_that_is_killed_is_named():
    with refuses("a process was killed", "'tower'", "call again", error=RuntimeError):
        run_parts({"tower": Part(be_killed)})


def test_a_part_that_can_never_begin_is_refused(tmp_path):
    parts = {"a": Part(write, (tmp_path, "a")), "b": Part(fail, (), ("c",)), "c": Part(fail, (), ("b",))}
    with refuses("b, c: ", "correct the needs"):
        run_parts(parts)
    assert (tmp_path / "a").is_file()


def test_processes_end_with_the_one_that_began_them(tmp_path):
    """However it ends: left alone they would write into the folder beside the next run."""
    code = f"""if True:
        from pathlib import Path
        from dualview.reader.parts import Part, run_parts
        from tests.reader.test_parts import never_end
        run_parts({{"long": Part(never_end, (Path({str(tmp_path)!r}),))}})
    """
    with Popen([sys.executable, "-c", code], stdout=PIPE, cwd=Path(__file__).parents[2]) as process:
        while not (tmp_path / "begun").is_file():
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
        process.communicate(timeout=40)  # its pipe is held open by every process that it began
    assert not (tmp_path / "ended").is_file()
