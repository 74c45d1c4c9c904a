"""The command: what it prints, writes and returns, and one clear line for every kind of bad input."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

import dualview as dv
from dualview import cli
from dualview.images import load_image
from dualview.visualize import draw_tiles, fit_to_grid
from tests.test_images import png_header


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
    assert np.array_equal(np.array(load_image(out)), np.array(draw_tiles(canvas, (3, 4)).picture))
    printed = capsys.readouterr().out
    done = {"pad": "padded to 42 x 68", "crop": "cropped to 39 x 64", "resize": "resized to 39 x 68"}[remainder]
    assert done in printed
    assert f"wrote {out}: 12 local and 12 stride tiles" in printed


def test_view_pads_by_default_and_keeps_quiet_where_nothing_is_done(photo, tmp_path, capsys):
    cli.main(["view", str(photo), "--grid", "3x4", "-o", str(tmp_path / "a.png")])
    assert "padded" in capsys.readouterr().out
    cli.main(["view", str(photo), "--grid", "4x6", "-o", str(tmp_path / "a.png")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.png'}: 24 local and 24 stride tiles of 10 x 11 pixels\n"


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


@pytest.mark.parametrize("command", ["view", "demo"])
def test_bad_images(tmp_path, capsys, command):
    out = tmp_path / "out.png"
    for name, word in bad_files(tmp_path).items():
        source = [tmp_path / name] if command == "view" else ["--small", "--image", tmp_path / name]
        err, code = failure(capsys, command, *source, "-o", out)
        assert code == 1
        assert err.startswith(f"dualview {command}: error: ")
        assert word in err
        assert not out.exists()


@pytest.mark.parametrize(
    "name, word", [("out.xyz", "'.xyz' is none of"), ("out", "is none of"), ("none/out.png", "does not exist")]
)
def test_bad_outputs(photo, tmp_path, capsys, name, word):
    for source in (["view", photo], ["demo", "--small", "--image", photo]):
        err, code = failure(capsys, *source, "-o", tmp_path / name)
        assert code == 1
        assert word in err


def test_output_that_cannot_be_written(photo, tmp_path, capsys):
    (tmp_path / "out.png").mkdir()
    assert "cannot be written" in failure(capsys, "view", photo, "-o", tmp_path / "out.png")[0]


@pytest.mark.parametrize("command", [["view"], ["demo", "--small", "--image"]])
def test_the_input_is_not_overwritten(photo, tmp_path, capsys, command):
    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for output in (photo, tmp_path / "link.png"):
        assert "would be overwritten" in failure(capsys, *command, photo, "-o", output)[0]
    assert photo.read_bytes() == before


@pytest.mark.parametrize("grid", ["3", "0x2", "2x-1", "3*3", "two", "", "1.5x2"])
@pytest.mark.parametrize("command", ["view", "demo", "explain"])
def test_wrong_grid(photo, capsys, command, grid):
    source = [photo, "-o", "out.png"] if command == "view" else []
    err, code = failure(capsys, command, *source, f"--grid={grid}")
    assert code == 2
    assert "write ROWSxCOLS" in err
    assert repr(grid) in err


def test_grid_larger_than_the_image(photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert "grid of 41x1 (rows x cols) is larger" in failure(capsys, "view", photo, "--grid", "41x1", "-o", out)[0]
    for argv in (["view", photo, "--grid", "40x3"], ["demo", "--small", "--grid", "60x60", "--image", photo]):
        assert cli_fails_silently(capsys, *argv, "-o", out).endswith("at most 32 rows and 32 cols.\n")


def test_line_of_pixels(tmp_path, capsys):
    Image.new("RGB", (300, 1)).save(tmp_path / "line.png")
    out = tmp_path / "out.png"
    assert "larger than the image of 1 x 300" in failure(capsys, "view", tmp_path / "line.png", "-o", out)[0]
    assert cli.main(["view", str(tmp_path / "line.png"), "--grid", "1x3", "-o", str(out)]) == 0


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
    paper = dv.DualViewEncoder(cli.uncounted, dem, tile=(28, 42), grid=(2, 5), low_res=None)
    options = "--preset paper --dim 96 --readout none --fusion max_pool --grid 2x5 --tile 28x42 --tokens 4x6"
    for low_res in ("", " --low-res none"):
        assert printed_by(capsys, *(options + low_res).split()) == str(dv.explain(paper, tokens=(4, 6)))


@pytest.mark.parametrize(
    "options", ["--dim 96", "--tile 336x168", "--tokens 24x12", "--tile 336x168 --tokens 24x12", ""], ids=str
)
def test_explain_leaves_the_cost_of_other_encoders_open(capsys, monkeypatch, options):
    if not options:
        monkeypatch.setattr(cli, "find_spec", lambda name: None)  # as if transformers were not installed
    rows = [" ".join(line.split()) for line in printed_by(capsys, *options.split()).splitlines()]
    assert "encoder 10 sub-images 19 sub-images" in rows
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
    ],
)
def test_explain_of_impossible_configurations(capsys, options, word, code):
    err, got = failure(capsys, "explain", *options.split())
    assert word in err
    assert got == code


def test_demo_passes_its_options_on(photo, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "run_demo", lambda *args, **kwargs: calls.append((args, kwargs)))
    out = tmp_path / "o.png"
    options = f"--image {photo} -o {out} --grid 2x4 --preset paper --seed 7 --small --full"
    assert cli.main(["demo", *options.split()]) == 0
    assert cli.main(["demo"]) == 0
    grid = dv.TileGrid(2, 4)
    assert calls[0][0] == (photo, out)
    assert calls[0][1] == {"grid": grid, "preset": "paper", "seed": 7, "config": cli.SMALL, "full": True}
    assert calls[1][0] == (None, cli.Path("dualview_demo.png"))
    default = {"grid": dv.TileGrid(3, 3), "preset": "released", "seed": 0, "config": None, "full": False}
    assert calls[1][1] == default


@pytest.mark.parametrize("seed", ["-1", "x", str(2**63)])
def test_wrong_seed(capsys, seed):
    assert "--seed" in failure(capsys, "demo", f"--seed={seed}")[0]


def test_small_demo(photo, tmp_path, capsys):
    out = tmp_path / "demo.png"
    assert cli.main(["demo", "--small", "--grid", "1x2", "--image", str(photo), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "5 x 24 x 24 x 128" in printed  # the token counts of the real model
    assert "RANDOM" in printed
    assert load_image(out).width > 1000


@pytest.mark.parametrize("package, command", [("PIL", "view"), ("transformers", "demo"), ("matplotlib", "demo")])
def test_missing_extra(photo, tmp_path, capsys, monkeypatch, package, command):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    source = [photo] if command == "view" else ["--small", *(["--image", photo] if package != "matplotlib" else [])]
    err, code = failure(capsys, command, *source, "-o", tmp_path / "out.png")
    assert code == 1
    assert f'{package} is not installed: pip install "dualview[demo]"' in err


def test_other_missing_modules_are_not_hidden(photo, monkeypatch):
    def broken(*_, **__):
        raise ModuleNotFoundError("no module", name="dualview.forgotten")

    monkeypatch.setattr(cli, "run_demo", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\ndualview demo: error: interrupted\n"


def test_version_and_help(capsys):
    for argv in (["--version"], ["--help"], ["demo", "--help"], ["view", "--help"], ["explain", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dualview {dv.__version__}\n")
    assert "dualview view photo.jpg --grid 2x3 -o tiles.png" in out


@pytest.mark.parametrize("argv", [[], ["frob"], ["view"], ["view", "x.png"], ["demo", "--what"]])
def test_wrong_usage(capsys, argv):
    err, code = failure(capsys, *argv)
    assert code == 2
    assert "--help" in err


def test_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dualview.cli", "view", str(tmp_path / "none.png"), "-o", str(tmp_path / "o.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"dualview view: error: {tmp_path / 'none.png'}: no such file.\n"


def test_the_command_loads_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import dualview.cli; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before}"
        " & {'PIL', 'numpy', 'matplotlib', 'tqdm', 'transformers', 'timm', 'open_clip', 'triton'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
