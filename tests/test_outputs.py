"""A file is written whole, or what was there stays."""

import os

import numpy as np
import pytest
from PIL import Image

import dualview as dv
from dualview import outputs
from dualview.images import ImageError
from dualview.outputs import SAVED_AS, save_image
from tests.fresh import run_fresh
from tests.pictures import noise

PICTURE = Image.fromarray(noise(64, 64))


@pytest.mark.parametrize("suffix", SAVED_AS)
def test_save(tmp_path, suffix):
    image = Image.new("RGB", (20, 10), (200, 30, 90))
    path = tmp_path / f"out{suffix.upper()}"
    save_image(image, path)
    with Image.open(path) as written:
        assert written.format == SAVED_AS[suffix]
    assert dv.load_image(path).shape == (3, 10, 20)
    assert np.abs(dv.load_image(path).numpy().astype(int) - np.array([200, 30, 90])[:, None, None]).max() <= 4
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name, word",
    [
        ("x.xyz", "'.xyz' is none of .png"),
        ("x", "'' is none of .png"),
        ("none/x.png", "does not exist"),
        (f"{'x' * 300}.png", "cannot be written: File name too long"),
        (f"{'x' * 300}/x.png", "cannot be written: File name too long|does not exist"),
    ],
    ids=lambda value: value[:9],
)
def test_save_refuses(tmp_path, name, word):
    with pytest.raises(ImageError, match=word):
        save_image(PICTURE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_something_else_of_that_name(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ImageError, match="cannot be written: something other than a file"):
        save_image(PICTURE, tmp_path / "x.png")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may do all
    with pytest.raises(ImageError, match=f"no permission to write to the folder {tmp_path}"):
        save_image(PICTURE, tmp_path / "x.png")


@pytest.mark.parametrize("step", ["fsync", "replace", "encode"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_what_was_there_stays(tmp_path, monkeypatch, step, error):
    path = tmp_path / "x.png"
    save_image(Image.new("RGB", (4, 4)), path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise error

    target = {"fsync": (os, "fsync"), "replace": (outputs.Path, "replace"), "encode": (Image.Image, "save")}[step]
    monkeypatch.setattr(*target, fail)
    with pytest.raises((ImageError, KeyboardInterrupt)) as caught:
        save_image(PICTURE, path)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} cannot be written: No space left on device."
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["x.png"]


def test_a_file_that_may_not_grow(tmp_path):
    """As `ulimit -f` has it: a partial file is no file."""
    code = """
        import resource, sys
        from PIL import Image
        from dualview.images import ImageError
        from dualview.outputs import save_image
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_image(Image.effect_noise((200, 200), 90).convert("RGB"), sys.argv[1])
        except ImageError as error:
            print(error)
    """
    path = tmp_path / "x.jpg"
    path.write_bytes(b"before")
    run = run_fresh(code, str(path))
    assert run.stdout == f"{path} cannot be written: File too large.\n"
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["x.jpg"]


def test_permissions_and_links_stay(tmp_path):
    path, link = tmp_path / "x.png", tmp_path / "link.png"
    save_image(PICTURE, path)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    link.symlink_to(path)
    save_image(Image.new("RGB", (4, 4)), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert dv.load_image(path).shape == (3, 4, 4)


def test_interrupted_between_the_write_and_the_end(tmp_path):
    """A real signal while the file is being synchronised."""
    code = """
        import os, sys, signal
        from PIL import Image
        from dualview.outputs import save_image
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start what is in its background without
        sync = os.fsync
        def slow(fd):
            sync(fd)
            os.kill(os.getpid(), signal.SIGINT)
        os.fsync = slow
        save_image(Image.new("RGB", (9, 9)), sys.argv[1])
    """
    path = tmp_path / "x.png"
    path.write_bytes(b"before")
    assert run_fresh(code, str(path)).stderr.endswith("KeyboardInterrupt\n")
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["x.png"]
