"""The command: what it prints, writes and returns, and one clear line for every kind of bad input."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

import dualview as dv
from dualview import cli, commands, demo, full_size
from dualview.canvas import Rest, fit_to_grid
from dualview.full_size import LOW_RES, Preset
from dualview.geometry import Readout
from dualview.images import load_image
from dualview.ops.fusion import FUSIONS
from dualview.visualize import draw_tiles
from tests.pictures import png_header, saved


def needing(package):
    """As it is raised where a name of ours needs a package."""
    error = ImportError("some name needs a package")
    error.__cause__ = ModuleNotFoundError(f"No module named {package!r}", name=package)
    return error


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 66, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def failure(capsys, *argv):
    """The one line on stderr of a command that must fail, and its exit code."""
    try:
        code = cli.main([str(argument) for argument in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code != 0
    assert err.count("\n") == 1, err
    assert err.startswith("dualview")
    assert ": error: " in err
    assert "wrote" not in out.lower()
    return err, code


def cli_fails_silently(capsys, *argv):
    """The one line on stderr, where nothing may come before it."""
    assert cli.main([str(argument) for argument in argv]) != 0
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.mark.parametrize("remainder", ["pad", "crop", "resize"])
def test_view_writes_the_picture(photo, tmp_path, capsys, remainder):
    out = tmp_path / "tiles.png"
    assert cli.main(["view", str(photo), "--grid", "3x4", "--remainder", remainder, "-o", str(out)]) == 0
    canvas = fit_to_grid(load_image(photo), (3, 4), remainder)
    assert torch.equal(load_image(out), load_image(draw_tiles(canvas, (3, 4)).picture))
    printed = capsys.readouterr().out
    done = {"pad": "padded to 42 x 68", "crop": "cropped to 39 x 64", "resize": "resized to 39 x 68"}[remainder]
    assert done in printed
    assert f"wrote {out}: 12 local and 12 stride tiles" in printed


def test_view_pads_by_default_and_keeps_quiet_where_nothing_is_done(photo, tmp_path, capsys):
    cli.main(["view", str(photo), "--grid", "3x4", "-o", str(tmp_path / "a.png")])
    assert "padded" in capsys.readouterr().out
    cli.main(["view", str(photo), "--grid", "4x6", "-o", str(tmp_path / "a.png")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.png'}: 24 local and 24 stride tiles of 10 x 11 pixels\n"


def test_view_writes_beside_the_picture(photo, capsys, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli.main(["view", str(photo)]) == 0
    assert f"wrote {photo.with_name('photo_tiles.png')}" in capsys.readouterr().out
    assert torch.equal(
        load_image(tmp_path / "photo_tiles.png"), load_image(draw_tiles(fit_to_grid(photo, (3, 3)), (3, 3)).picture)
    )
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "tile, remainder, grid, done",
    [
        ("20", "pad", (2, 4), "padded to 40 x 80"),
        ("20", "crop", (2, 3), "cropped to 40 x 60"),
        ("20", "resize", (2, 3), "resized to 40 x 60"),
        ("20x33", "pad", (2, 2), ""),
        ("15x33", "pad", (3, 2), "padded to 45 x 66"),
    ],
)
def test_view_by_tile_size(photo, tmp_path, capsys, tile, remainder, grid, done):
    out = tmp_path / "o.png"
    assert cli.main(["view", str(photo), "--tile", tile, "--remainder", remainder, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert done in printed
    assert printed.count("\n") == (2 if done else 1)
    assert f"wrote {out}: {grid[0] * grid[1]} local" in printed
    assert torch.equal(
        load_image(out),
        load_image(
            draw_tiles(
                commands.fit_to_tile(photo, tuple(map(int, (tile.split("x") * 2)[:2])), remainder)[0], grid
            ).picture
        ),
    )


def test_a_grid_and_a_tile_size_at_once(photo, capsys):
    assert "not allowed with" in failure(capsys, "view", photo, "--tile", "20", "--grid", "2x3")[0]


def test_view_of_a_jpeg_into_a_jpeg(tmp_path):
    Image.new("CMYK", (30, 20)).save(tmp_path / "in.jpg")
    assert cli.main(["view", str(tmp_path / "in.jpg"), "-o", str(tmp_path / "out.jpeg")]) == 0
    with Image.open(tmp_path / "out.jpeg") as written:
        assert written.format == "JPEG"


def bad_files(folder):
    """Files that are no picture, by what is wrong with them."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "cut.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(png_header(30_000, 30_000))
    Image.new("F", (4, 4)).save(folder / "float.tif")
    return {
        "none.png": "no such file",
        ".": "not a file",
        "cut.png": "cannot be read",
        "text.jpg": "not a picture",
        "empty.png": "0 bytes",
        "bomb.png": "decompression bombs",
        "float.tif": "floating-point",
    }


@pytest.mark.parametrize("command", ["view", "demo", "demo --full-size"])
def test_bad_images(tmp_path, capsys, command):
    out = tmp_path / "out.png"
    for name, word in bad_files(tmp_path).items():
        err, code = failure(capsys, *command.split(), tmp_path / name, "-o", out)
        assert code == 1
        assert err.startswith(f"dualview {command.split()[0]}: error: ")
        assert word in err
        assert not out.exists()


@pytest.mark.parametrize(
    "name, word",
    [
        ("out.xyz", "'.xyz' is none of"),
        ("out", "is none of"),
        ("none/out.png", "does not exist"),
        ("x" * 300 + ".png", "File name too long"),
    ],
    ids=lambda value: value[:9],
)
def test_bad_outputs(photo, tmp_path, capsys, monkeypatch, name, word):
    """Before anything is drawn or computed."""
    for module, name_of_it in ((commands, "draw_tiles"), (full_size, "draw_tiles"), (demo, "render")):
        monkeypatch.setattr(module, name_of_it, lambda *_: pytest.fail("drawn"))
    for source in (["view", photo], ["demo", "--image", photo], ["demo", "--full-size", photo]):
        err, code = failure(capsys, *source, "-o", tmp_path / name)
        assert code == 1
        assert word in err


def test_output_that_cannot_be_written(photo, tmp_path, capsys):
    (tmp_path / "out.png").mkdir()
    assert "cannot be written" in failure(capsys, "view", photo, "-o", tmp_path / "out.png")[0]


@pytest.mark.parametrize("command", [["view"], ["demo"], ["demo", "--full-size"], ["demo", "--image"]])
def test_the_input_is_not_overwritten(photo, tmp_path, capsys, command):
    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for output in (photo, tmp_path / "link.png"):
        assert "would be overwritten" in failure(capsys, *command, photo, "-o", output)[0]
    assert photo.read_bytes() == before


def test_the_report_of_the_demo_does_not_overwrite_the_input(photo, tmp_path, capsys):
    picture = photo.rename(tmp_path / "photo.html")
    assert "would be overwritten" in failure(capsys, "demo", picture, "-o", tmp_path / "photo.png")[0]


@pytest.mark.parametrize("grid", ["3", "0x2", "2x-1", "3*3", "two", "", "1.5x2"])
@pytest.mark.parametrize("command", ["view", "demo", "explain"])
def test_wrong_grid(photo, capsys, command, grid):
    source = [photo] if command == "view" else []
    err, code = failure(capsys, command, *source, f"--grid={grid}")
    assert code == 2
    assert "write ROWSxCOLS" in err
    assert repr(grid) in err


def test_grid_larger_than_the_image(photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert "grid of 41x1 (rows x cols) is larger" in failure(capsys, "view", photo, "--grid", "41x1", "-o", out)[0]
    for argv in (["view", photo, "--grid", "40x3"], ["demo", "--full-size", "--grid", "60x60", photo]):
        assert cli_fails_silently(capsys, *argv, "-o", out).endswith("at most 32 rows and 32 cols.\n")


def test_line_of_pixels(tmp_path, capsys):
    Image.new("RGB", (300, 1)).save(tmp_path / "line.png")
    out = tmp_path / "out.png"
    assert "larger than the image of 1 x 300" in failure(capsys, "view", tmp_path / "line.png", "-o", out)[0]
    assert cli.main(["view", str(tmp_path / "line.png"), "--grid", "1x3", "-o", str(out)]) == 0


@pytest.mark.parametrize("command", ["view", "demo", "explain"])
def test_a_grid_without_end(photo, capsys, command):
    source = [photo] if command == "view" else []
    for grid in ("3000x3000", "1000000x1000000"):
        err, code = failure(capsys, command, *source, "--grid", grid)
        assert code == 2
        assert "at most 16,384" in err


def printed_by(capsys, *argv):
    assert cli.main(["explain", *argv]) == 0
    return capsys.readouterr().out.rstrip("\n")


def test_explain_prints_what_explain_says(capsys):
    """A vision transformer of 24 layers at the released sizes; any width, tile and token map."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        image_size=336,
    )  # fmt: skip
    with torch.device("meta"):
        tower = dv.HfEncoder(CLIPVisionModel(config))
    released = dv.DualViewEncoder(tower, dv.DualPerspectiveEnhance.released(1024), grid=(3, 3))
    assert printed_by(capsys) == str(dv.explain(released))

    dem = dv.DualPerspectiveEnhance.paper(96, readout="none", fusion="max_pool")
    paper = dv.DualViewEncoder(commands.uncounted, dem, tile=(28, 42), grid=(2, 5), low_res=None)
    options = "--preset paper --dim 96 --readout none --fusion max_pool --grid 2x5 --tile 28x42 --tokens 4x6"
    for low_res in ("", " --low-res none"):
        assert printed_by(capsys, *(options + low_res).split()) == str(dv.explain(paper, tokens=(4, 6)))


@pytest.mark.parametrize(
    "options", ["--dim 96", "--tile 336x168", "--tokens 24x12", "--tile 336x168 --tokens 24x12", ""], ids=str
)
def test_explain_leaves_the_cost_of_other_encoders_open(capsys, monkeypatch, options):
    if not options:
        monkeypatch.setattr(commands, "find_spec", lambda name: None)  # as if transformers were not installed
    rows = [" ".join(line.split()) for line in printed_by(capsys, *options.split()).splitlines()]
    start = rows.index("encoder computed 10 sub-images")
    assert rows[start + 1] == "in full 19 sub-images"
    assert not any(row.startswith("layers") for row in rows)


def test_explain_mixes_as_the_preset_does(capsys):
    assert "mixed by mean" in printed_by(capsys)
    assert "mixed by add" in printed_by(capsys, "--preset", "paper")
    assert "mixed by add" in printed_by(capsys, "--low-res", "add")


@pytest.mark.parametrize(
    "options, word, code",
    [
        ("--dim 0", "positive integer", 2),
        ("--dim 1000", "multiple of 16", 1),
        ("--readout none --low-res mean", "use --low-res none", 1),
        ("--tile 10 --tokens 24", "--tile of 10 x 10 pixels is no whole multiple of --tokens, 24 x 24", 1),
        ("--tile 28x30 --tokens 4", "--tile of 28 x 30", 1),
        ("--tile 336x", "HEIGHTxWIDTH", 2),
        ("--tokens 0", "HEIGHTxWIDTH", 2),
        ("--preset mine", "invalid choice", 2),
        ("--grid 16x17", "--grid 16x17 of --tokens 24 x 24: a table is made for at most 256 tiles", 1),
        ("--tokens 1x1025 --tile 14x14350", "at most 1024 x 1024 tokens", 1),
        ("--tile 1234567890", "HEIGHTxWIDTH", 2),
        ("--dim 1234567890", "positive integer", 2),
    ],
)
def test_explain_of_impossible_configurations(capsys, options, word, code):
    err, got = failure(capsys, "explain", *options.split())
    assert word in err
    assert got == code


def test_demo_passes_its_options_on(photo, tmp_path, monkeypatch):
    calls = []
    for name in ("run_demo", "run_full_size"):
        monkeypatch.setattr(commands, name, lambda *args, of=name, **kwargs: calls.append((of, args, kwargs)))
    monkeypatch.chdir(tmp_path)
    out, default = tmp_path / "o.png", cli.Path("dualview_demo.png")
    options = f"--full-size -o {out} --grid 2x4 --preset paper --seed 7 --full"
    for argv in ("", f"{photo} --seed 7", f"--image {photo} --seed 7", "--full-size", f"{photo} {options}"):
        assert cli.main(["demo", *argv.split()]) == 0
    usual = {"grid": dv.TileGrid(3, 3), "preset": "released", "seed": 0, "full": False}
    chosen = {"grid": dv.TileGrid(2, 4), "preset": "paper", "seed": 7, "full": True}
    assert calls == [
        ("run_demo", (None, default), {"seed": 0}),
        *[("run_demo", (photo, default), {"seed": 7})] * 2,
        ("run_full_size", (None, default), usual),
        ("run_full_size", (photo, out), chosen),
    ]


@pytest.mark.parametrize("option", ["--grid 3x3", "--preset released", "--full"])
def test_options_of_the_full_size_alone(photo, capsys, option):
    err, code = failure(capsys, "demo", photo, *option.split())
    assert code == 1
    assert f"{option.split()[0]}: an option of the vision path at full size: add --full-size" in err


@pytest.mark.parametrize("seed", ["-1", "x", str(2**63)])
def test_wrong_seed(capsys, seed):
    assert "--seed" in failure(capsys, "demo", f"--seed={seed}")[0]


@pytest.mark.parametrize(
    "package, command", [("PIL", "view"), ("transformers", "demo --full-size"), ("matplotlib", "demo")]
)
def test_missing_extra(photo, tmp_path, capsys, monkeypatch, package, command):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    source = [] if command == "demo" else [photo]
    err, code = failure(capsys, *command.split(), *source, "-o", tmp_path / "out.png")
    assert code == 1
    assert f'{package} is not installed: run pip install -e ".[demo]" in your clone' in err


def test_other_missing_modules_are_not_hidden(photo, monkeypatch):
    def broken(*_, **__):
        raise ModuleNotFoundError("no module", name="dualview.forgotten")

    monkeypatch.setattr(commands, "run_demo", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "dualview demo: error: interrupted\n"


def test_version_and_help(capsys):
    for argv in (["--version"], ["--help"], ["demo", "--help"], ["view", "--help"], ["explain", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dualview {dv.__version__}\n")
    assert "dualview view photo.jpg --grid 2x3" in out


@pytest.mark.parametrize("argv", [[], ["frob"], ["view"], ["demo", "--what"], ["demo", "a.jpg", "--image", "b.jpg"]])
def test_wrong_usage(capsys, argv):
    err, code = failure(capsys, *argv)
    assert code == 2
    assert "--help" in err


@pytest.mark.parametrize(
    "argv",
    [
        *(["view", ""], ["view", "{}", "-o", " "], ["demo", ""], ["demo", "--image", ""], ["ask", "", "what"]),
        *(["ask", "{}", "what", "--model", ""], ["ask", "{}", "what", "--report", ""], ["chat", "--device", ""]),
        *(["train", ""], ["probe", "-o", ""], ["convert", "", "new"]),
    ],
)
def test_variables_of_the_shell_that_were_not_set(photo, capsys, argv):
    """The working directory is no picture, and no model is not the embedded one."""
    err, code = failure(capsys, *[str(photo) if part == "{}" else part for part in argv])
    assert code == 2
    assert "is empty: write a name or a path" in err


def test_a_question_without_quotes(photo, capsys):
    assert "arguments: is it: put the question in quotes" in failure(capsys, "ask", photo, "What", "is", "it")[0]
    assert "arguments: --sise 9 (help" in failure(capsys, "ask", photo, "What is it", "--sise", "9")[0]


def test_the_help_is_that_of_the_command(capsys):
    for command in ("demo", "view", "explain"):
        source = ["x.png"] if command == "view" else []
        err = failure(capsys, command, *source, "--what\x1b[31m")[0]
        assert err == (
            f"dualview {command}: error: unrecognized arguments: --what\\x1b[31m (help: dualview {command} --help)\n"
        )


def test_what_help_offers_is_what_there_is():
    assert get_args(Preset) == cli.PRESETS == tuple(LOW_RES)
    assert get_args(Readout) == cli.READOUTS
    assert tuple(FUSIONS) == cli.FUSIONS
    assert set(LOW_RES.values()) | {"none"} == set(cli.LOW_RES)
    assert get_args(Rest) == ("pad", "crop", "resize")


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError(), "out of memory: take a smaller picture"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (BrokenPipeError(32, "Broken pipe"), "standard output was closed before"),
        (OSError(28, "No space left on device"), "standard output cannot be written: No space left on device"),
        (OSError("We couldn't connect to a hub"), "We couldn't connect to a hub"),
        (ValueError("some\n  \x1b[31m rule"), "some \\x1b[31m rule"),
        (needing("transformers"), "transformers is not installed: run pip install"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_may_happen_to_anybody_is_one_line(monkeypatch, capsys, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(commands, "run_demo", fail)
    err, code = failure(capsys, "demo")
    assert code == 1
    assert err.startswith(f"dualview demo: error: {line}")


def test_faults_of_the_program_are_not_hidden(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(commands, "run_demo", fail)
    with pytest.raises(RuntimeError):
        cli.main(["demo"])


class TestAsAProcess:
    """What only a process of its own shows. At a width of 96 no encoder is counted, and no transformers loaded."""

    def run(self, *argv, before="", **env):
        shell = f"{before} exec {shlex.quote(sys.executable)} -m dualview {argv[0]}"
        return subprocess.run(
            ["bash", "-c", shell, "dualview", *map(str, argv[1:])],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | env,
        )

    def fails(self, done, line, code=1):
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert line in done.stderr

    def test_a_missing_file(self, tmp_path):
        done = self.run('view "$1"', tmp_path / "none.png")
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr == f"dualview view: error: {tmp_path / 'none.png'}: no such file.\n"

    def test_names_do_not_reach_the_terminal(self, photo, tmp_path):
        out = tmp_path / "\x1b[31m\u202e.png"
        done = self.run('view "$1" -o "$2"', photo, out)
        assert done.returncode == 0
        assert out.exists()
        assert f"wrote {tmp_path}/\\x1b[31m\\u202e.png: 9 local" in done.stdout
        self.fails(self.run('view "$1"', "\x1b[31m\n.png"), "\\x1b[31m .png: no such file")

    def test_names_that_the_terminal_cannot_show(self, photo, tmp_path):
        done = self.run('view "$1" -o "$2"', photo, tmp_path / "é.png", PYTHONIOENCODING="ascii")
        assert done.returncode == 0
        assert "\\xe9.png" in done.stdout

    def test_a_switch_of_the_environment(self):
        self.fails(self.run("explain", DUALVIEW_BACKEND="xyz"), "DUALVIEW_BACKEND='xyz': must be")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
    @pytest.mark.parametrize("command", ["explain --dim 96", "--help", "--version", "view --help"])
    def test_a_full_device(self, command):
        self.fails(self.run(f"{command} >/dev/full"), "standard output cannot be written: No space left on device")

    def test_no_output_at_all(self):
        self.fails(self.run("explain --dim 96 >&-"), "standard output cannot be written: Bad file descriptor")
        assert self.run("explain --dim 96 >&- 2>&-").returncode == 1

    def test_a_closed_pipe(self):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {shlex.quote(sys.executable)} -m dualview explain --dim 96 | true"],
            capture_output=True,
            text=True,
            check=False,
        )
        self.fails(done, "standard output was closed before everything was written")

    def test_memory_that_ends(self, photo):
        self.fails(self.run('view "$1"', photo, before="ulimit -v 500000;"), "out of memory")

    def test_a_file_that_may_not_grow(self, photo, tmp_path):
        out = tmp_path / "o.jpg"
        out.write_bytes(b"before")
        done = self.run('view "$1" -o "$2"', photo, out, before="ulimit -f 8;")
        self.fails(done, f"{out} cannot be written: File too large")
        assert out.read_bytes() == b"before"

    @pytest.mark.parametrize("command", ["explain", "demo"])
    def test_an_interruption_while_libraries_are_loaded(self, command, tmp_path):
        """The signal comes while torch is imported: at the first of its files that is opened."""
        code = (
            "import builtins, os, signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "def hook(event, args):\n"
            "    if event == 'import' and args[0] == 'torch.nn':\n"
            "        os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.addaudithook(hook)\n"
            "from dualview.__main__ import main\n"
            f"sys.argv = ['dualview', {command!r}]\n"
            "sys.exit(main())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode in (130, -signal.SIGINT)  # Python itself may pass the signal on at its end
        assert done.stderr == f"dualview {command}: error: interrupted\n"
        assert done.stdout == ""

    def test_an_interruption_while_the_command_is_loaded(self, tmp_path):
        code = (
            "import sys\n"
            "def hook(event, args):\n"
            "    if event == 'import' and args[0] == 'dualview.cli':\n"
            "        raise KeyboardInterrupt\n"
            "sys.addaudithook(hook)\n"
            "from dualview.__main__ import main\n"
            "sys.exit(main())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 130
        assert done.stderr == "dualview: error: interrupted\n"

    def test_warnings_of_libraries_are_not_printed(self, tmp_path):
        """libtiff's on standard error, Pillow's as a warning and in its log."""
        path = tmp_path / "odd.tif"
        content = bytearray(saved(Image.new("RGB", (64, 64)), "TIFF", compression="tiff_lzw"))
        start = int.from_bytes(content[4:8], "little")
        content[start + 2 : start + 4] = (65000).to_bytes(2, "little")  # a field that nobody knows
        path.write_bytes(content)
        direct = subprocess.run(
            [sys.executable, "-c", "import sys; from PIL import Image; Image.open(sys.argv[1]).load()", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert direct.stderr
        done = self.run('view "$1"', path)
        assert done.stderr.count("\n") <= 1
        assert "Warning" not in done.stderr
        assert "TIFF" not in done.stderr.replace("PPM", "").split("format")[0]


def test_help_loads_nothing_heavy():
    """So it comes at once."""
    code = (
        "import sys; before = set(sys.modules); from dualview.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    print('ends with', end.code)\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before}"
        " & {'torch', 'PIL', 'numpy', 'matplotlib', 'tqdm', 'transformers', 'timm', 'open_clip', 'triton'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("ends with 0\nset()\n")
