"""Parts of a run: the order, the threads, and that the first failure ends all."""

import time
from pathlib import Path

import pytest
import torch

from dualview.reader.parts import Part, run_parts


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
