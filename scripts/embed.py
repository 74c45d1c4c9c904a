"""Put trained models into the package: weights in float16, what was measured, and the card and page that say it.

    python scripts/embed.py FOLDER

FOLDER is that of a run of `make reader`: `dual`, `low-res` and `results.json` are taken from it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from safetensors import safe_open

from dualview.embedded import KNOWN, EmbeddedView, weak_tasks
from dualview.models.inf_llava import InfLlavaForConditionalGeneration, InfLlavaProcessor
from dualview.reader.evaluate import BARS, draw_questions
from dualview.reader.glyphs import HELD_OUT_FONTS, TRAINING_FONTS

PLACE = Path(__file__).parents[1] / "dualview" / "embedded"
PAGE = Path(__file__).parents[1] / "docs" / "embedded.md"
"""Has a table of the results, too, in percent."""
KINDS = {
    "place, 8 px digits": "digit of 8 pixels at a named place",
    "marker, 8 px digits": "digit of 8 pixels right of a shape",
    "compare, 8 px": "larger of two digits of 8 pixels, in two groups of cells",
    "place, 28 px digits": "digit of 28 pixels at a named place",
    "large": "large character, 67 to 101 pixels, or none",
    "where": "where is a shape",
    "spell": "three characters of 8 to 28 pixels",
    "presence": "is it there",
}
"""What the page calls those of `BARS`."""
MOST = 12_000_000
"""Bytes that both models may take together."""

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# Two small models that come with dualview

`dual` is an INF-LLaVA of {dual} parameters: it cuts a picture of 336 x 336 pixels into 3 x 3 tiles from both
perspectives, and its enhancement module brings them together in 64 image tokens. `low-res`, of {low_res} parameters, is
the same without the enhancement module: it sees the picture at 112 x 112 pixels. Other pictures are scaled. The module
is that of the released preset with two other options: the average readout, and the fusion `linear_concat`.

```python
import dualview as dv

model, processor = dv.load_embedded()           # or dv.load_embedded("low-res")
```

`dualview demo` shows both at work, `dualview ask PICTURE QUESTION` asks the first.

## What they answer

Questions about pages of 8 x 8 cells, named as in a spreadsheet, in these words: {known} On a page stand digits, the
letters ACEFHKLNPRTX, six shapes and sometimes one large character. They know nothing else: other pictures and questions
get an answer, too, which means nothing.

## How they were trained

From nothing, by {call}, on pages and questions that are drawn from seeds (`dualview.reader`); nothing is fetched.
Backgrounds are computed{behind}. The parts took these minutes, two at a time: {minutes}.

{note}

## How often they are right

Asked through `generate` about pages whose seeds and font files no training saw; other files of the same families, and
the same six shapes, it did. In brackets the interval of 95 %. Heights of glyphs are in pixels of the page of 336 x 336;
where none is named they are 8 to 28.

| questions | asked | with tiles | low resolution | difference | one answer to all |
| --- | --- | --- | --- | --- | --- |
{rows}

The last column is the share of the most frequent right answer: who always gives that one is as often right, so a model
that is no better there has learnt nothing of the pages. {weak}

## Licences

The weights are of this project, under its Apache License 2.0. Glyphs were drawn with fonts that matplotlib ships; none
is contained here. Trained on: {trained}. Kept for tests: {held_out}. DejaVu: Bitstream Vera's licence, its changes in
the public domain; STIX: the STIX Font License; cm: the BaKoMa Fonts Licence. All three stand in matplotlib. Photographs
in training: {photographs}. That of `dualview demo`, Grace Hopper by the US Navy, is none of them and in the public
domain; matplotlib ships it, too.
"""


def card(folder: Path) -> str:
    """The card of the models in a folder, by their weights and by what was measured."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    wall, photographs = results["wall_minutes"], results["photographs"]
    return CARD.format(
        call="the parts of `make reader`" if wall is None else f"one call of `make reader`, in {wall:.1f} minutes",
        behind=f"; of {results['recipe']['photographs']:.0%} of the pages they are photographs" if photographs else "",
        photographs="; ".join(f"{name} ({licence})" for name, licence in photographs.items()) or "none",
        dual=millions(folder / "dual"),
        low_res=millions(folder / "low-res"),
        known=" ".join(f"*{question}*" for question in KNOWN),
        note=results.get("note", ""),
        weak=weak_kinds(results["tasks"]),
        minutes=", ".join(f"{name} {minutes:.1f}" for name, minutes in results["minutes"].items()),
        rows="\n".join(row(name, task) for name, task in results["tasks"].items()),
        trained=", ".join(TRAINING_FONTS),
        held_out=", ".join(HELD_OUT_FONTS),
    )


def row(name: str, task: dict[str, Any]) -> str:
    """A line of the table."""
    parts = [task[part] for part in (*get_args(EmbeddedView), "gap")]
    cells = [f"{part['accuracy']:.3f} [{part['interval'][0]:.3f}, {part['interval'][1]:.3f}]" for part in parts]
    return f"| {name} | {task['questions']} | {' | '.join(cells)} | {task['constant']:.3f} |"


def page(text: str, tasks: dict[str, Any]) -> str:
    """A page with the shares of right answers in its table, and all else as it is."""
    for name, kind in KINDS.items():
        parts = [tasks[name][part] for part in (*get_args(EmbeddedView), "gap")]
        numbers = [[100 * share for share in (part["accuracy"], *part["interval"])] for part in parts]
        cells = " | ".join(f"{share:.1f} ({low:.1f} to {high:.1f})" for share, low, high in numbers)
        text, found = re.subn(rf"^\| {re.escape(kind)} \|.*$", f"| {kind} | {cells} |", text, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} rows for {kind!r}: there must be one.")
    return text


def weak_kinds(tasks: dict[str, Any]) -> str:
    """Which kinds of questions `dual` has not learnt: its interval does not lie above one answer to all."""
    weak = weak_tasks(tasks)
    return f"Of `dual` this holds for: {'; '.join(weak)}." if weak else "This holds for no kind of `dual`."


def constant(name: str, count: int) -> float:
    """The share of the most frequent right answer among the questions of a kind that were asked."""
    task, heights, digits = BARS[name]
    answers = Counter(question.answer for question in draw_questions(task, count, 56, heights, digits=digits)[1])
    return answers.most_common(1)[0][1] / count


def millions(folder: Path) -> str:
    """How many parameters the weights of a folder have."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 - no dict
    return f"{count / 1e6:.2f} million"


def embed(source: Path, place: Path = PLACE, document: Path = PAGE) -> None:
    """Put the models of a folder, their results and their card in the place of those that are there.

    What was measured is put into the table of a page, too.

    Raises:
        ValueError: They are larger than what the package may carry, or not everything was measured, or the page lacks a
            row. Nothing is changed.
    """
    with TemporaryDirectory(dir=place.parent) as held:
        made = Path(held)
        for view in get_args(EmbeddedView):
            model = InfLlavaForConditionalGeneration.from_pretrained(source / view, dtype=torch.float16)
            model.save_pretrained(made / view)
            InfLlavaProcessor.from_pretrained(source / view).save_pretrained(made / view)
            (made / view / "model.safetensors").chmod(0o644)
        size = sum(file.stat().st_size for file in made.rglob("*"))
        if size > MOST:
            raise ValueError(f"{source}: {size:,} bytes in float16, and the package may carry {MOST:,}: take less.")
        results = json.loads((source / "results.json").read_text(encoding="utf-8"))
        if missing := BARS.keys() - results["tasks"].keys():
            raise ValueError(f"{source}/results.json lacks {sorted(missing)}: let `make reader` run to its end.")
        for name, task in results["tasks"].items():
            task["constant"] = round(constant(name, task["questions"]), 4)
        (made / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (made / "README.md").write_text(card(made), encoding="utf-8")
        written = page(document.read_text(encoding="utf-8"), results["tasks"])
        for part in sorted(made.iterdir()):
            shutil.rmtree(place / part.name, ignore_errors=True)
            part.rename(place / part.name)
    document.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    embed(Path(sys.argv[1]))
