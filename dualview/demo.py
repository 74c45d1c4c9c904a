"""The embedded model at work: questions about a page and about a photograph, both drawn as no training saw them."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from dualview import embedded
from dualview.answers import LONGEST, Asked, Shown, check_report, draw_answers, table, write_report
from dualview.canvas import resize
from dualview.embedded import EmbeddedView, learnt, load_embedded, measured
from dualview.full_size import bundled_photograph
from dualview.images import ImageSource, load_image, to_image
from dualview.outputs import check_output, save_image
from dualview.reader.evaluate import HELD_OUT_SEED, answers_of
from dualview.reader.glyphs import CHARACTERS, HELD_OUT_FONTS, build_atlas
from dualview.reader.pages import CELLS, EMPTY, Pages, render, sample_pages
from dualview.reader.questions import MAKERS, Question, ask, place
from dualview.terminal import in_columns, native_messages_dropped, say

SIDE, HEIGHT, CODE_HEIGHT = 1008, 24, 48
"""Of a picture, of a page's small glyphs, and of a photograph's code, in pixels. The models are shown a third of it."""
VIEWS: dict[str, EmbeddedView] = {"with tiles": "dual", "low resolution": "low-res"}
"""What the two models are called."""


class Scene(NamedTuple):
    """What is asked about.

    Attributes:
        title: One line.
        picture: (3, 1008, 1008), uint8
        questions: What the models are asked.
    """

    title: str
    picture: Tensor
    questions: list[Question]


def run_demo(
    image: ImageSource | None = None, output: str | os.PathLike[str] = "dualview_demo.png", *, seed: int = 0
) -> list[Shown]:
    """Ask the embedded model and the low-resolution model, print what they say, and write it as picture and as report.

    Args:
        image: The photograph, whatever [`load_image`][dualview.load_image] takes; None for one that matplotlib ships.
        output: Where the drawing goes; the report goes beside it, and ends in .html.
        seed: Of page, code and questions.

    Raises:
        ImageError: The image cannot be read, or a file cannot be written.
    """
    report = Path(output).with_suffix(".html")
    check_output(output)
    check_report(report)
    photograph = draw_photograph(image, seed)  # before anything else: perhaps it cannot be read
    scenes = [draw_page(seed), photograph]
    asked = [(scene.picture, question.text) for scene in scenes for question in scene.questions]
    given, counts = {}, {}
    for name, view in VIEWS.items():
        model, processor = load_embedded(view)
        counts[name] = sum(weight.numel() for weight in model.parameters())
        pictures = torch.stack([picture for picture, _ in asked])
        given[name] = iter(answers_of(model, processor, pictures, [text for _, text in asked]))
    side = int(processor.image_processor.size["shortest_edge"])
    shown = [
        Shown(
            scene.title,
            with_names(scene.picture),
            resize(scene.picture, (side, side)),
            model.config.grid,
            [
                Asked(q.text, {name: next(answers) for name, answers in given.items()}, q.answer)
                for q in scene.questions
            ],
        )
        for scene in scenes
    ]
    _describe(counts, shown)
    save_image(draw_answers(shown), output)
    write_report(report, "What the embedded model answers", shown)
    say(f"Wrote {output} and {report}: pictures, answers, tiles.")
    say('Next: `dualview demo --seed 1`; `dualview ask YOUR_IMAGE "What is in B5?" --compare low-res`;')
    say("`dualview demo --full-size` for a photograph through the vision path at the paper's sizes.")
    return shown


def draw_page(seed: int) -> Scene:
    """A page of glyphs 24 pixels high, of which the tower sees 8, with two questions of each kind that is learnt."""
    pages = sample_pages(1, (HEIGHT, HEIGHT), HELD_OUT_SEED + seed)
    questions = ask(pages, 0, Random(pages.seed))
    asked = [question for task in learnt() for question in [q for q in questions if q.task == task][:2]]
    return Scene(f"A page of {SIDE} x {SIDE} pixels, drawn from seed {seed}", _rendered(pages), asked)


def draw_photograph(image: ImageSource | None, seed: int) -> Scene:
    """A square part of a photograph, with a code of three characters pasted into cells of one row."""
    with native_messages_dropped():
        photograph = load_image(bundled_photograph() if image is None else image)
    side = min(photograph.shape[1:])
    top, left = ((length - side) // 2 for length in photograph.shape[1:])
    square = resize(photograph[:, top : top + side, left : left + side], (SIDE, SIDE))
    pages = sample_pages(1, (CODE_HEIGHT, CODE_HEIGHT), HELD_OUT_SEED + seed)
    pages.kinds.fill_(EMPTY)
    pages.large.fill_(EMPTY)
    random = Random(seed)
    row, col = random.randrange(CELLS), random.randrange(CELLS - 2)
    code = random.choices(range(len(CHARACTERS)), k=3)
    pages.kinds[0, row, col : col + 3] = torch.tensor(code)
    cells, spelt = tuple((row, col + i) for i in range(3)), "".join(CHARACTERS[kind] for kind in code)
    names = [place(cell) for cell in cells]
    questions = [
        *(Question("place", f"What is in {name}?", x, (c,)) for name, x, c in zip(names, spelt, cells, strict=True)),
        Question("spell", f"What do {names[0]}, {names[1]} and {names[2]} spell?", spelt, cells),
    ]
    whose = "Grace Hopper, a photograph that matplotlib ships" if image is None else "Your photograph"
    return Scene(f"{whose}, with a code pasted from {names[0]} on", _rendered(pages, square[None] / 255), questions)


def _rendered(pages: Pages, photographs: Tensor | None = None) -> Tensor:
    picture = render(pages, SIDE, build_atlas(HELD_OUT_FONTS), photographs)[0]
    return (picture * 255).round().to(torch.uint8)


def with_names(picture: Tensor) -> Tensor:
    """The picture with the names of its columns above and those of its rows on the left."""
    from PIL import Image, ImageDraw, ImageFont

    room, cell = 40, SIDE / CELLS
    whole = Image.new("RGB", (SIDE + room, SIDE + room), "white")
    whole.paste(to_image(picture), (room, room))
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(24)
    for number in range(CELLS):
        name = place((number, number))
        middle = room + cell * (number + 0.5)
        pen.text((middle, room / 2), name[0], "black", font, anchor="mm")
        pen.text((room / 2, middle), name[1], "black", font, anchor="mm")
    return load_image(whole)


def _describe(counts: dict[str, int], shown: list[Shown]) -> None:
    sizes = ", ".join(f"{name} ({count / 1e6:.1f} million parameters)" for name, count in counts.items())
    say(f"Two models that come with the package, trained from nothing on drawn pages: {sizes}.")
    say("Pages, questions and fonts below are none that they were trained on, nor is the photograph that comes with")
    say("matplotlib; what is wrong is called wrong.")
    say(f"Of the kinds of questions, {len(learnt())} of {len(MAKERS)} are asked: those that the first has learnt.")
    for one in shown:
        say(f"\n{one.title}")
        right = [sum(q.answers[view] == q.truth for q in one.asked) for view in counts]
        say(in_columns([*table(one.asked, LONGEST), ["right", "", *(f"{n} of {len(one.asked)}" for n in right)]]))
    say("\nShares of right answers that were measured of the kinds asked:")
    for kind, task in measured()["tasks"].items():
        if kind.split(",")[0] in learnt():
            shares = ", ".join(f"{task[view]['accuracy']:.3f} {name}" for name, view in VIEWS.items())
            say(f"{kind}: {shares}, of {task['questions']} questions")
    say(f"All that was measured: {Path(embedded.__file__).with_name('README.md')}\n")
