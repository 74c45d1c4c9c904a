"""The folder of a run: one process at a time, one configuration, the same rows, and gone where nothing was trained."""

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest

from dualview.train import TrainConfig
from dualview.train import folder as folder_module
from dualview.train.folder import check_rows, run_folder
from dualview.train.rows import Row, Turn
from tests.checks import refuses

ROWS = [{"file": "rows.json"}]
ONE = Row("rows.json, row 0", (Path("0.png"),), (Turn("user", "<image>"), Turn("assistant", "a")))


def config(folder, **stage1):
    return TrainConfig.of({"model": "base", "output": str(folder / "run"), "stage1": {"data": ROWS, **stage1}})


def silent(line):
    pass


def hold(folder, held):
    with run_folder(config(folder), resume=False, report=silent):
        (folder / "run" / "stage1" / "checkpoint-1").mkdir(parents=True)
        held.set()
        signal.pause()


def test_another_process_is_named_until_it_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held), daemon=True)
    process.start()
    assert held.wait(60)
    said = rf"^output='{re.escape(str(tmp_path / 'run'))}': process {process.pid} on .* trains in it; wait"
    with pytest.raises(ValueError, match=said), run_folder(config(tmp_path), resume=True, report=silent):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with run_folder(config(tmp_path), resume=True, report=silent):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} on ")
        said = rf"^output='{re.escape(str(tmp_path / 'run'))}': this process trains in it"
        with pytest.raises(ValueError, match=said), run_folder(config(tmp_path), resume=True, report=silent):
            pass


def fail_with(folder, *files):
    """A run that fails when it has written some files."""
    with run_folder(config(folder), resume=False, report=silent):
        assert (folder / "run" / "config.json").is_file()
        for name, text in files:
            path = folder / "run" / name
            path.parent.mkdir(parents=True)
            path.write_text(text)
        raise RuntimeError


def test_a_run_that_did_not_begin_leaves_nothing(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail_with(tmp_path, ("stage1/log.jsonl", ""), ("stage1/runs/now/events.out.tfevents.1", "scalars"))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kept", ["base/x", "stage1/model/x", "stage1/checkpoint-2/x", "stage1/log.jsonl", "features/0/x"]
)
def test_what_was_made_is_kept(tmp_path, kept):
    with pytest.raises(RuntimeError):
        fail_with(tmp_path, (kept, "{}"))
    assert (tmp_path / "run" / kept).exists()
    with pytest.raises(ValueError, match="exists already"), run_folder(config(tmp_path), resume=False, report=silent):
        pass


def test_what_may_change_when_a_run_goes_on(tmp_path):
    with run_folder(config(tmp_path, rows_per_device=4), resume=False, report=silent):
        (tmp_path / "run" / "stage1" / "checkpoint-1").mkdir(parents=True)
    said, free = [], {"save_steps": 7, "save_total_limit": 9, "logging_steps": 3, "workers": 0, "bad_rows": "skip"}
    with run_folder(config(tmp_path, rows_per_device=4, **free), resume=True, report=said.append):
        assert said == []
    with run_folder(config(tmp_path, rows_per_device=2, **free), resume=True, report=said.append):
        assert said[0].startswith("stage1.rows_per_device=2, and was 4: sums are rounded otherwise")
    refused = config(tmp_path, rows_per_device=2, batch_size=8)
    message = (
        r"^stage1\.batch_size=8 is not what .* was begun with, 256 .*: of a stage only .*rows_per_device may change"
    )
    with pytest.raises(ValueError, match=message), run_folder(refused, resume=True, report=silent):
        pass
    assert json.loads((tmp_path / "run" / "config.json").read_text())["stage1"]["batch_size"] == 256


def test_what_was_not_trained_may_change(tmp_path):
    """As where the model was put together, and then a layer's name was wrong."""
    with run_folder(config(tmp_path), resume=False, report=silent):
        (tmp_path / "run" / "base").mkdir()
    with run_folder(config(tmp_path, batch_size=8), resume=True, report=silent):
        assert json.loads((tmp_path / "run" / "config.json").read_text())["stage1"]["batch_size"] == 8
    other = TrainConfig.of({"model": "other", "output": str(tmp_path / "run"), "stage1": {"data": ROWS}})
    with pytest.raises(ValueError, match=r"^model='other' is not"), run_folder(other, resume=True, report=silent):
        pass


def test_a_lock_is_not_freed_by_another_path_to_the_folder(tmp_path):
    """Where this process opened and closed it once more, the system would free it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with run_folder(config(tmp_path), resume=True, report=silent):
        held = (tmp_path / "run").stat()
        assert {(held.st_dev, held.st_ino)} == folder_module.HELD
        other = TrainConfig.of({"model": "base", "output": str(tmp_path / "link"), "stage1": {"data": ROWS}})
        with pytest.raises(ValueError, match="this process trains in it"):
            run_folder(other, resume=True, report=silent).__enter__()
        assert not in_another_process(tmp_path)
    assert in_another_process(tmp_path)


def test_a_folder_that_was_removed_before_it_was_locked(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()

    def lock(descriptor):
        (tmp_path / "run" / ".lock").unlink()
        return True

    monkeypatch.setattr(folder_module, "_lock", lock)
    with pytest.raises(ValueError, match="just been removed"), run_folder(config(tmp_path), resume=True, report=silent):
        pass


def in_another_process(folder):
    """Whether another process can begin."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=begin, args=(folder,))
    process.start()
    process.join(60)
    return process.exitcode == 0


def begin(folder):
    folder_module.HELD.clear()
    with run_folder(config(folder), resume=True, report=silent):
        pass


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "{}", '[["rows.json", 1]]', '[["rows.json", 1, 5]]', "[1, 2]", "[]", "null", '"rows"']
)
def test_a_record_of_rows_of_another_shape(tmp_path, text):
    (tmp_path / "checkpoint-1").mkdir()
    record = tmp_path / "data.json"
    record.write_text(text)
    with refuses(str(record), "move it away and resume"):
        check_rows([("rows.json", [ONE])], tmp_path, write=True)
    assert record.read_text() == text
    record.rename(tmp_path / "away")
    check_rows([("rows.json", [ONE])], tmp_path, write=True)
    assert json.loads(record.read_text())[0][:2] == ["rows.json", 1]


@pytest.mark.parametrize("text", ["", "[1]", "null", "7"])
def test_a_record_of_the_configuration_of_another_shape(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    with refuses(str(tmp_path / "run" / "config.json"), "begin another run in another folder"):
        run_folder(config(tmp_path), resume=True, report=silent).__enter__()
    assert (tmp_path / "run" / "config.json").read_text() == text


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with (
        pytest.raises(ValueError, match="no folder of a run"),
        run_folder(config(tmp_path), resume=True, report=silent),
    ):
        pass
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"), run_folder(config(tmp_path), resume=True, report=silent):
        pass
    (tmp_path / "file").touch()
    for output in ("file", "file/run"):
        wrong = TrainConfig.of({"model": "base", "output": str(tmp_path / output), "stage1": {"data": ROWS}})
        with pytest.raises(ValueError, match=r"^output=.*: Not a directory; name"):
            run_folder(wrong, resume=True, report=silent).__enter__()


@pytest.mark.parametrize("other", [(), (ONE, ONE), (ONE._replace(images=(Path("1.png"),)),), (ONE._replace(turns=()),)])
def test_other_rows_are_refused_once_a_checkpoint_is_of_them(tmp_path, other):
    check_rows([("rows.json", [ONE])], tmp_path, write=True)
    check_rows([("rows.json", other)], tmp_path, write=True)
    (tmp_path / "checkpoint-1").mkdir()
    check_rows([("rows.json", [each._replace(place="elsewhere") for each in other])], tmp_path, write=True)
    message = rf"^rows.json: 1 good rows, whose SHA-256 .* was begun with {len(other)} of .* Put the file"
    with pytest.raises(ValueError, match=message):
        check_rows([("rows.json", [ONE])], tmp_path, write=True)
