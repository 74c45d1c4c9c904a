"""The `dualview` command."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import torch
from torch import Tensor

from dualview import __version__
from dualview.demo import LOW_RES, SMALL, Preset, run_demo
from dualview.explain import explain
from dualview.geometry import Size, TileGrid
from dualview.images import SAVED_AS, ImageError, load_image, save_image
from dualview.models.dual_view_encoder import DualViewEncoder, Encoder
from dualview.models.encoders import HfEncoder
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.fusion import FUSIONS
from dualview.ops.readout import Readout
from dualview.visualize import Rest, draw_tiles, fit_to_grid

T = TypeVar("T")

EXAMPLES = """examples:
  dualview demo                                     a photograph through the whole vision path (about a minute)
  dualview demo --small --image photo.jpg           the same with narrow models (seconds)
  dualview view photo.jpg --grid 2x3 -o tiles.png   the local and the stride tiles of a picture
  dualview explain --preset paper --grid 2x3        what a configuration computes
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (help: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (default: those of the process) and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("PIL", "numpy", "matplotlib", "tqdm", "transformers"):
            raise
        return _fail(options, f'{package} is not installed: pip install "dualview[demo]"')
    except (ImageError, ValueError) as error:
        return _fail(options, " ".join(str(error).split()))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _fail(options, "interrupted", code=130)
    return 0


def _fail(options: argparse.Namespace, message: str, code: int = 1) -> int:
    print(f"dualview {options.command}: error: {message}", file=sys.stderr)
    return code


def _demo(options: argparse.Namespace) -> None:
    _check_not_input(options.output, options.image)
    run_demo(
        options.image,
        options.output,
        grid=options.grid,
        preset=options.preset,
        seed=options.seed,
        config=SMALL if options.small else None,
        full=options.full,
    )


def _view(options: argparse.Namespace) -> None:
    _check_not_input(options.output, options.image)
    image, grid = load_image(options.image), options.grid
    canvas = fit_to_grid(image, grid, options.remainder)
    save_image(draw_tiles(canvas, grid).picture, options.output)
    if canvas.size != image.size:
        done = {"pad": "padded", "crop": "cropped", "resize": "resized"}[options.remainder]
        print(
            f"{image.height} x {image.width} pixels (height x width) are no multiple of {grid}: "
            f"{done} to {canvas.height} x {canvas.width}"
        )
    h, w = grid.tile_size((canvas.height, canvas.width))
    print(f"wrote {options.output}: {grid.num_tiles} local and {grid.num_tiles} stride tiles of {h} x {w} pixels")


def _explain(options: argparse.Namespace) -> None:
    if any(side % count for side, count in zip(options.tile, options.tokens, strict=True)):
        tile, tokens = (" x ".join(map(str, size)) for size in (options.tile, options.tokens))
        raise ValueError(f"--tile of {tile} pixels is no whole multiple of --tokens, {tokens}: change one of them.")
    low_res: Any = options.low_res or ("none" if options.readout == "none" else LOW_RES[options.preset])
    if options.readout == "none" and low_res != "none":
        raise ValueError(f"--readout none gives the full map, and --low-res {low_res} one tile's: use --low-res none.")
    overrides = {name: getattr(options, name) for name in ("readout", "fusion") if getattr(options, name)}
    dem = getattr(DualPerspectiveEnhance, options.preset)(options.dim, device="meta", **overrides)
    model = DualViewEncoder(
        _encoder(options.dim, options.tile, options.tokens),
        dem,
        tile=options.tile,
        grid=options.grid,
        low_res=None if low_res == "none" else low_res,
    )
    print(explain(model, tokens=options.tokens))


def uncounted(tiles: Tensor) -> Tensor:
    """Stands for a vision encoder whose cost `explain` leaves open because it cannot run it."""
    raise NotImplementedError


def _encoder(dim: int, tile: Size, tokens: Size) -> Encoder:
    """A vision transformer of 24 layers, where transformers has one of these sizes to count."""
    patch = {size // count for size, count in zip(tile, tokens, strict=True)}
    if find_spec("transformers") is None or len(patch) > 1 or tile[0] != tile[1] or dim % 64:
        return uncounted
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=24,
        num_attention_heads=dim // 64,
        image_size=tile[0],
        patch_size=patch.pop(),
    )
    with torch.device("meta"):
        return HfEncoder(CLIPVisionModel(config))


def _check_not_input(output: Path, image: Path | None) -> None:
    if image is not None and output.exists() and image.exists() and output.samefile(image):
        raise ImageError(f"{output} is the input image and would be overwritten: give another output file.")


def _parser() -> Parser:
    parser = Parser(
        prog="dualview",
        description="Dual-perspective vision tiling: local blocks and global strides of an image.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dualview {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument(
            "--grid",
            type=_argument(TileGrid.parse),
            default=TileGrid(3, 3),
            metavar="ROWSxCOLS",
            help="tiles along the height, then along the width (default: 3x3)",
        )
        return sub

    demo = command("demo", _demo, "run a photograph through INF-LLaVA's vision path with random weights")
    demo.add_argument("--image", type=Path, metavar="FILE", help="a picture (default: one that matplotlib ships)")
    _add_output(demo, default=Path("dualview_demo.png"))
    _add_preset(demo)
    demo.add_argument("--seed", type=_argument(_parse_seed), default=0, help="of the random weights (default: 0)")
    demo.add_argument("--full", action="store_true", help="also encode and compute what does not reach the result")
    demo.add_argument("--small", action="store_true", help="a narrow ViT of 2 layers in place of ViT-L/14-336: seconds")

    view = command("view", _view, "draw an image with its grid, its local tiles and its stride tiles")
    view.add_argument("image", type=Path, metavar="IMAGE", help="a picture; transparency is composited on white")
    _add_output(view, required=True)
    view.add_argument(
        "--remainder",
        choices=get_args(Rest),
        default="pad",
        help="what to do where the image is no multiple of the grid (default: pad, at the bottom and the right)",
    )

    table = command("explain", _explain, "print what a dual-view encoder computes for one image")
    _add_preset(table)
    table.add_argument("--dim", type=_argument(_parse_width), default=1024, help="width of the tokens (default: 1024)")
    for name, default, text in (("tile", 336, "pixels"), ("tokens", 24, "tokens")):
        table.add_argument(
            f"--{name}",
            type=_argument(_parse_size),
            default=(default, default),
            metavar="N or HxW",
            help=f"height and width of one tile in {text} (default: {default})",
        )
    table.add_argument(
        "--low-res",
        choices=("mean", "add", "none"),
        help="how the low-resolution view is mixed in (default: the preset's; none with --readout none)",
    )
    table.add_argument("--readout", choices=get_args(Readout), help="default: the preset's")
    table.add_argument("--fusion", choices=tuple(FUSIONS), help="default: the preset's")
    return parser


def _add_output(parser: argparse.ArgumentParser, **options: Any) -> None:
    note = f" (default: {options['default']})" if "default" in options else ""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help=f"picture to write: {', '.join(SAVED_AS)}{note}", **options
    )


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=get_args(Preset),
        default="released",
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


def _parse_size(text: str) -> Size:
    match = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", text.strip())
    if match is None:
        raise ValueError(f"size {text!r}: write a positive integer, or HEIGHTxWIDTH such as 336x448.")
    return int(match[1]), int(match[2] or match[1])


def _parse_width(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f"{text!r}: write a positive integer.")
    return int(text)


def _parse_seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise ValueError(f"{text!r}: write an integer from 0 to 2**63 - 1.")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
