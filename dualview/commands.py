"""What the commands of `dualview` do; imported when one of them runs."""

from __future__ import annotations

import argparse
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualview.answers import Asked, Shown, check_report, write_report
from dualview.canvas import fit_to_grid, fit_to_tile
from dualview.chat import Chat, QuestionError, questions, say_piece
from dualview.demo import run_demo
from dualview.embedded import KNOWN, EmbeddedView, embedded_folder
from dualview.explain import explain as explained
from dualview.full_size import LOW_RES, Preset, run_full_size
from dualview.geometry import Size, TileGrid
from dualview.images import ImageError, load_image
from dualview.models.dual_view_encoder import DualViewEncoder
from dualview.models.encoders import HfEncoder
from dualview.models.parts import Encoder
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.outputs import check_file, check_output, replace_file, save_image
from dualview.terminal import hint, native_messages_dropped, say
from dualview.visualize import draw_tiles

MOST_TILES, MOST_TOKENS = 256, 1024
"""What `dualview explain` goes through, tile by tile and row by row."""


def demo(options: argparse.Namespace) -> None:
    """Run `dualview demo`."""
    image = options.image or options.named_image
    check_output(options.output)
    _check_not_input(options.output, image)
    if options.full_size:
        preset: Preset = options.preset or "released"
        grid = options.grid or TileGrid(3, 3)
        run_full_size(image, options.output, grid=grid, preset=preset, seed=options.seed, full=options.full)
        return
    for name in ("grid", "preset", "full"):
        if getattr(options, name):
            raise ValueError(f"--{name}: an option of the vision path at full size: add --full-size, or leave it out.")
    _check_not_input(options.output.with_suffix(".html"), image)
    run_demo(image, options.output, seed=options.seed)


def view(options: argparse.Namespace) -> None:
    """Run `dualview view`."""
    with native_messages_dropped():
        image = load_image(options.image)
    output = options.output or options.image.with_name(f"{options.image.stem}_tiles.png")
    check_output(output)
    _check_not_input(output, options.image)
    if options.tile is None:
        canvas, grid = fit_to_grid(image, options.grid, options.remainder), options.grid
    else:
        canvas, grid = fit_to_tile(image, options.tile, options.remainder)
    (height, width), (full_height, full_width) = image.shape[-2:], canvas.shape[-2:]
    save_image(draw_tiles(canvas, grid).picture, output)
    h, w = grid.tile_size((full_height, full_width))
    if (height, width) != (full_height, full_width):
        done = {"pad": "padded", "crop": "cropped", "resize": "resized"}[options.remainder]
        what = f"multiple of {grid}" if options.tile is None else f"whole number of tiles of {h} x {w}"
        say(f"{height} x {width} pixels (height x width) are no {what}: {done} to {full_height} x {full_width}")
    say(f"wrote {output}: {grid.num_tiles} local and {grid.num_tiles} stride tiles of {h} x {w} pixels")


def explain(options: argparse.Namespace) -> None:
    """Run `dualview explain`."""
    if options.grid.num_tiles > MOST_TILES or max(options.tokens) > MOST_TOKENS:
        raise ValueError(
            f"--grid {options.grid} of --tokens {' x '.join(map(str, options.tokens))}: a table is made for at most "
            f"{MOST_TILES} tiles of at most {MOST_TOKENS} x {MOST_TOKENS} tokens. Take fewer; costs grow in proportion."
        )
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
    say(str(explained(model, tokens=options.tokens)))


def convert(options: argparse.Namespace) -> None:
    """Run `dualview convert`."""
    from dualview.models import convert_inf_llava

    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if (part := 10 * done // max(total, 1)) > shown:
            shown = part
            say(f"{10 * part:3d} % of {total / 2**30:.1f} GiB")

    convert_inf_llava(
        options.source,
        options.target,
        vision_tower=options.vision_tower,
        language_model=options.language_model,
        tokenizer=options.tokenizer,
        progress=progress,
    )
    say(f"wrote {options.target}: dualview ask PICTURE QUESTION --model {options.target}")


def ask(options: argparse.Namespace) -> None:
    """Run `dualview ask`."""
    if not options.question.strip():
        raise ValueError(f"QUESTION is {options.question!r}: write what is asked about the picture.")
    if options.report is not None:
        check_report(options.report)
        _check_not_input(options.report, options.image)
    model = _chat(options)
    shown = None if options.report is None else model.shown()  # what cannot be reported is refused before it is asked
    views = {"with tiles": model}
    if options.compare:
        views["low resolution"] = model.at_low_resolution() if options.model else _chat(options, "low-res")
    answers = {}
    for view, conversation in views.items():
        if options.compare:
            say(f"{view}:")
        answers[view] = conversation.ask(options.question, say_piece)
        say("")
    if shown is not None:
        asked = [Asked(options.question, answers)]
        title = f"Answers of {options.model or 'the embedded model'}"
        write_report(options.report, options.image.name, [Shown(title, shown[0], *shown, asked)])
        say(f"wrote {options.report}")


def chat(options: argparse.Namespace) -> None:
    """Run `dualview chat`."""
    asked = questions()  # where nothing can be asked no model is loaded
    conversation = _chat(options)
    for question in asked:
        try:
            conversation.ask(question, say_piece)
        except QuestionError as error:  # what was said before is not lost by it
            hint(str(error))
        say("")


def train(options: argparse.Namespace) -> None:
    """Run `dualview train`."""
    from dualview.train import TrainConfig
    from dualview.train import train as trained

    trained(TrainConfig.load(options.config), resume=options.resume)


def probe(options: argparse.Namespace) -> None:
    """Run `dualview probe`."""
    from dualview.probe.document import missing
    from dualview.probe.figure import draw
    from dualview.probe.results import table
    from dualview.probe.run import FULL, SMALL, run_probe

    if options.output.suffix.lower() != ".json":
        raise ImageError(
            f"{options.output}: the extension {options.output.suffix!r} is not .json: results are one JSON file, "
            "with a figure beside it."
        )
    check_file(options.output)
    if options.towers is not None and options.towers.exists() and not options.towers.is_dir():
        raise ValueError(f"--towers {options.towers}: is no folder: give one, or a name that is free.")
    picture = options.output.with_suffix(".png")
    check_output(picture)
    _check_device(options.device)
    document = run_probe(
        FULL if options.full else SMALL,
        options.output,
        device=options.device,
        towers=options.towers,
        minutes=options.minutes,
        progress=True,
    )
    replace_file(picture.resolve(), memoryview(draw(document)))
    say(table(document))
    if left := missing(document):
        say(f"not trained in time: {len(left)} of {len(document['planned'])}")
    say(f"wrote {options.output} and {picture}")


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, RuntimeError) as error:  # the former of a torch that was built without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _chat(options: argparse.Namespace, view: EmbeddedView = "dual") -> Chat:
    """A conversation with the model that is named, or with an embedded one."""
    if options.device is not None:
        _check_device(options.device)
    conversation = Chat(
        options.model or str(embedded_folder(view)),
        options.image,
        size=options.size,
        device=options.device,
        dtype=options.dtype or (None if options.model else "float32"),
        max_new_tokens=options.max_new_tokens,
    )
    if not options.model and view == "dual":
        card = embedded_folder(view).with_name("README.md")
        hint(f"The embedded model was trained on drawn pages and on these questions alone: {' '.join(KNOWN)}")
        hint(f"How well it answers each kind: {card}")
    return conversation


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
    same = False
    with suppress(OSError):  # one of them does not exist
        same = image is not None and output.samefile(image)
    if same:
        raise ImageError(f"{output} is the input image and would be overwritten: give another output file.")
