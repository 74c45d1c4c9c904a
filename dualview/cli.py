"""The `dualview` command: what it takes, and one line for everything that goes wrong.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from dualview import __version__
from dualview.canvas import Rest
from dualview.embedded import KNOWN
from dualview.geometry import Size, TileGrid
from dualview.outputs import SAVED_AS
from dualview.terminal import explained, libraries_silent, printable

T = TypeVar("T")

# What torch knows, and help must not wait for; tests/test_cli.py compares.
PRESETS = ("released", "paper")
LOW_RES = ("mean", "add", "none")
DTYPES = ("float32", "bfloat16", "float16")
READOUTS = ("average", "bilinear", "centre", "none")
FUSIONS = (
    "linear_concat",
    "bottleneck_concat",
    "addition",
    "weighted_addition",
    "multiplication",
    "max_pool",
    "conv3x3",
)

EXAMPLES = """examples:
  dualview demo                             what the embedded model reads on a page and on a photograph (seconds)
  dualview demo --full-size                 a photograph through the vision path at the paper's sizes (about a minute)
  dualview view photo.jpg --grid 2x3        the local and the stride tiles of a picture, in photo_tiles.png
  dualview explain --preset paper           what a configuration computes
  dualview convert INF-LLaVA inf-llava      released weights to a directory for transformers
  dualview ask photo.jpg "What is this?" --model inf-llava
  dualview ask page.png "What is in B5?" --compare low-res     the embedded model, and the one beside it
  dualview probe                            does the second perspective help? A reduced table, in under 20 minutes
  dualview train CONFIG.yaml                the two stages of training, from LLaVA's JSON format to such a directory
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage, and not nothing where help cannot be printed."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and file is not None:
            file.write(message)

    def error(self, message: str) -> NoReturn:
        self.exit(
            2, printable(f"{self.prog}: error: {' '.join(message.split())} (help: {self.prog} --help)\n", sys.stderr)
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (default: those of the process) and return its exit code."""
    prog, stopped = "dualview", None
    try:
        try:
            options, unknown = _parser().parse_known_args(argv)
            prog = options.parser.prog
            if unknown:
                words = options.command == "ask" and not any(each.startswith("-") for each in unknown)
                quotes = ": put the question in quotes" if words else ""
                options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{quotes}")
            with libraries_silent():
                _run(options)
        except SystemExit as stop:  # help is printed, or an argument is wrong
            stopped = stop
        if sys.stdout is not None:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        message = explained(error)
        if message is None:
            raise
        return _fail(prog, message, 130 if isinstance(error, KeyboardInterrupt) else 1)
    if stopped is not None:
        raise stopped
    return 0


def _run(options: argparse.Namespace) -> None:
    from dualview import commands

    getattr(commands, options.command)(options)


def _fail(prog: str, message: str, code: int) -> int:
    with suppress(OSError, ValueError, AttributeError):  # what is left in the buffer must not fail once more at the end
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    with suppress(OSError, AttributeError):
        print(printable(f"{prog}: error: {message}", sys.stderr), file=sys.stderr, flush=True)
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="dualview",
        description="Dual-perspective vision tiling: local blocks and global strides of an image.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dualview {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(parser=sub)
        return sub

    demo = command("demo", "ask the embedded model about a drawn page and about a photograph with a code")
    picture = demo.add_mutually_exclusive_group()
    picture.add_argument(
        "image",
        type=_path,
        nargs="?",
        metavar="IMAGE",
        help="the photograph (default: one of matplotlib's)",
    )
    picture.add_argument("--image", dest="named_image", type=_path, metavar="IMAGE", help="the same")
    _add_output(demo, "dualview_demo.png", Path("dualview_demo.png"))
    demo.add_argument(
        "--seed", type=_argument(_parse_seed), default=0, help="of page, code and questions, or of weights (default: 0)"
    )
    demo.add_argument(
        "--full-size",
        action="store_true",
        help="in place of that, take the photograph through INF-LLaVA's vision path at the paper's sizes, with random "
        "weights, and measure every stage",
    )
    full_size = demo.add_argument_group("with --full-size")
    _add_grid(full_size, given=False)
    _add_preset(full_size, given=False)
    full_size.add_argument("--full", action="store_true", help="also encode and compute what does not reach the result")

    view = command("view", "draw an image with its grid, its local tiles and its stride tiles")
    view.add_argument("image", type=_path, metavar="IMAGE", help="a picture; transparency is composited on white")
    _add_output(view, "IMAGE_tiles.png, beside the picture", None)
    cut = view.add_mutually_exclusive_group()
    _add_grid(cut)
    _add_size(cut, "--tile", None, "of one tile in pixels, in place of a grid")
    view.add_argument(
        "--remainder",
        choices=get_args(Rest),
        default="pad",
        help="what to do where the image is no whole number of tiles (default: pad, at the bottom and the right)",
    )

    table = command("explain", "print what a dual-view encoder computes for one image")
    _add_grid(table)
    _add_preset(table)
    table.add_argument("--dim", type=_argument(_parse_width), default=1024, help="width of the tokens (default: 1024)")
    _add_size(table, "--tile", 336, "of one tile in pixels")
    _add_size(table, "--tokens", 24, "of one tile in tokens")
    table.add_argument(
        "--low-res",
        choices=LOW_RES,
        help="how the low-resolution view is mixed in (default: the preset's; none with --readout none)",
    )
    table.add_argument("--readout", choices=READOUTS, help="default: the preset's")
    table.add_argument("--fusion", choices=FUSIONS, help="default: the preset's")

    change = command("convert", "make a model directory of released INF-LLaVA weights, or the other way round")
    change.add_argument("source", type=_path, metavar="SRC", help="directory of the weights, or mm_projector.bin")
    change.add_argument("target", type=_path, metavar="DST", help="new directory; it appears when it is complete")
    for name, text in (
        ("--vision-tower", "the vision tower, where SRC lacks it"),
        ("--language-model", "the language model, for mm_projector.bin"),
        ("--tokenizer", "the tokenizer, where it is not in SRC"),
    ):
        change.add_argument(name, type=_path, metavar="DIR", help=f"directory of {text}")

    ask = command("ask", "answer a question about a picture")
    ask.add_argument("image", type=_path, metavar="IMAGE", help="a picture; transparency is composited on white")
    ask.add_argument("question", metavar="QUESTION", help="what to answer")
    ask.add_argument(
        "--compare",
        choices=("low-res",),
        help="answer a second time, from what is left of the picture at the size of one tile; without --model by a "
        "model trained for that",
    )
    ask.add_argument(
        "--report", type=_path, metavar="FILE.html", help="also write picture, tiles and answers as one file"
    )
    _add_model(ask)
    chat = command("chat", "answer one question after the other, a line each")
    chat.add_argument("image", type=_path, nargs="?", metavar="IMAGE", help="a picture that they are about")
    _add_model(chat)

    probe = command("probe", "measure on drawn pages whether the second perspective helps")
    probe.add_argument(
        "-o",
        "--output",
        type=_path,
        default=Path("probe.json"),
        metavar="OUT.json",
        help="results to write, with a figure beside them (default: probe.json)",
    )
    probe.add_argument("--full", action="store_true", help="all arms and three seeds: for a large GPU")
    probe.add_argument("--device", default="cpu", metavar="NAME", help="where to compute (default: cpu)")
    probe.add_argument("--towers", type=_path, metavar="DIR", help="folder where trained encoders are kept, and found")
    probe.add_argument(
        "--minutes", type=_argument(_parse_width), metavar="N", help="after which no arm goes on; the rest is left out"
    )

    trained = command("train", "train an INF-LLaVA in two stages")
    trained.add_argument(
        "config", type=_path, metavar="CONFIG", help="YAML file: model, output, and data of the stages"
    )
    trained.add_argument(
        "--resume", action="store_true", help="go on with the run in the output folder, from its last checkpoint"
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=_name,
        metavar="DIR",
        help="directory that `dualview convert` made, or a name on the hub (default: the small model that comes with "
        f"the package. It was trained on drawn pages of 8 x 8 cells and on these questions alone: {' '.join(KNOWN)})",
    )
    parser.add_argument(
        "--size",
        type=_argument(_parse_width),
        metavar="N",
        help="pixels a side that pictures are scaled to (default: the model's; 336: as the released inference code)",
    )
    parser.add_argument(
        "--device", type=_name, metavar="NAME", help="where to compute (default: a GPU where there is one)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: that of the files)")
    parser.add_argument(
        "--max-new-tokens", type=_argument(_parse_width), default=512, metavar="N", help="of an answer (default: 512)"
    )


def _add_grid(parser: argparse._ActionsContainer, *, given: bool = True) -> None:
    parser.add_argument(
        "--grid",
        type=_argument(TileGrid.parse),
        default=TileGrid(3, 3) if given else None,
        metavar="ROWSxCOLS",
        help="tiles along the height, then along the width (default: 3x3)",
    )


def _add_size(parser: argparse._ActionsContainer, name: str, default: int | None, text: str) -> None:
    parser.add_argument(
        name,
        type=_argument(_parse_size),
        default=None if default is None else (default, default),
        metavar="N or HxW",
        help=f"height and width {text}" + ("" if default is None else f" (default: {default})"),
    )


def _add_output(parser: argparse.ArgumentParser, text: str, default: Path | None) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=_path,
        default=default,
        metavar="OUT",
        help=f"picture to write: {', '.join(SAVED_AS)} (default: {text})",
    )


def _add_preset(parser: argparse._ActionsContainer, *, given: bool = True) -> None:
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="released" if given else None,
        help="the enhancement module of the released weights, or of the paper's equations (default: released)",
    )


def _argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser of one argument whose own message reaches the user."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: is empty: write a name or a path.")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))


def _parse_size(text: str) -> Size:
    match = re.fullmatch(r"([1-9]\d{0,8})(?:[xX]([1-9]\d{0,8}))?", text.strip())
    if match is None:
        raise ValueError(f"size {text!r}: write a positive integer of up to 9 digits, or HEIGHTxWIDTH, as 336x448.")
    return int(match[1]), int(match[2] or match[1])


def _parse_width(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise ValueError(f"{text!r}: write a positive integer of at most 9 digits.")
    return int(text)


def _parse_seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,19}", text) or int(text) >= 2**63:
        raise ValueError(f"{text!r}: write an integer from 0 to 2**63 - 1.")
    return int(text)
