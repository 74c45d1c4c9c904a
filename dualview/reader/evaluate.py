"""How often the embedded model answers rightly, through ``generate``, on pages that no training saw."""

from __future__ import annotations

import math
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualview.reader.glyphs import DIGITS, HELD_OUT_FONTS, build_atlas
from dualview.reader.pages import render, sample_pages
from dualview.reader.questions import Question, ask

HELD_OUT_SEED = 10**16
"""Seeds of pages for tests start here; those of training are below, whatever the seed of a recipe.

torch's generator takes the lowest 32 bits of a seed. In them the default recipe's seeds of training are below, too;
those of others may meet them, and the pages are others still: for a test one is drawn at a time, for training several.
"""


class Score(NamedTuple):
    """Answers to questions of one kind.

    Attributes:
        right: For each question, whether the whole answer was right.
    """

    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of 95 % for it."""
        n, p, z = len(self.right), self.accuracy, 1.96
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - reach, middle + reach


def draw_questions(
    task: str,
    count: int,
    side: int,
    heights: tuple[float, float],
    *,
    seed: int = 0,
    digits: bool = False,
    photographs: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, list[Question]]:
    """Pages that no training saw, with one question each.

    Args:
        task: A name of `dualview.reader.questions.TASKS`.
        count: How many.
        side: Of a page in pixels.
        heights: Least and greatest height of its glyphs.
        seed: The same seed gives the same pages and questions.
        digits: Ask only for what a digit answers.
        photographs: Backgrounds, in place of computed ones.
        device: Where to draw.

    Shape:
        pages: (count, 3, side, side), uint8
    """
    found: list[Question] = []
    pictures: list[Tensor] = []
    number, atlas = 0, build_atlas(HELD_OUT_FONTS).to(device)
    while len(found) < count:
        pages = sample_pages(1, heights, HELD_OUT_SEED + 7919 * seed + number)
        number += 1
        asked = ask(pages, 0, Random(pages.seed), {task: 1}, 12)
        asked = [q for q in asked if not digits or q.answer in DIGITS]
        if task == "large" and len(found) % 2 == 0:  # every other page has one
            asked = [q for q in asked if q.answer != "none"]
        if asked:
            found.append(asked[0])
            pictures.append((render(pages, side, atlas, photographs)[0] * 255).round().to(torch.uint8).cpu())
    return torch.stack(pictures), found


@torch.inference_mode()
def answers_of(model: Any, processor: Any, pictures: Tensor, questions: list[str], batch: int = 16) -> list[str]:
    """What a model answers to one question about each picture, greedily.

    Args:
        model: An INF-LLaVA.
        processor: Its processor.
        pictures: (n, 3, H, W), uint8
        questions: n questions.
        batch: How many are answered at once.
    """
    tokenizer, found = processor.tokenizer, []
    tokenizer.padding_side = "left"
    for start in range(0, len(questions), batch):
        part = slice(start, start + batch)
        texts = [
            processor.apply_chat_template([{"role": "user", "content": content(text)}], add_generation_prompt=True)
            for text in questions[part]
        ]
        inputs = processor(images=list(pictures[part]), text=texts, padding=True, return_tensors="pt").to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return found


def content(question: str) -> list[dict[str, str]]:
    """A question about one picture, as chat templates take it."""
    return [{"type": "image"}, {"type": "text", "text": question}]


def score(model: Any, processor: Any, task: str, count: int, heights: tuple[float, float], **options: Any) -> Score:
    """Right answers of a model to questions that `draw_questions` draws, on pages of the size that it takes.

    Args:
        model: An INF-LLaVA.
        processor: Its processor.
        task: As for `draw_questions`.
        count: Likewise.
        heights: Likewise.
        **options: Likewise.
    """
    side = int(processor.image_processor.size["shortest_edge"])
    pictures, questions = draw_questions(task, count, side, heights, **options)
    given = answers_of(model, processor, pictures, [question.text for question in questions])
    return Score(tuple(a == q.answer for a, q in zip(given, questions, strict=True)))


BARS = {
    "place, 8 px digits": ("place", (8.0, 8.0), True),
    "marker, 8 px digits": ("marker", (8.0, 8.0), True),
    "compare, 8 px": ("compare", (8.0, 8.0), False),
    "place, 28 px digits": ("place", (28.0, 28.0), True),
    "large": ("large", (8.0, 28.0), False),
    "where": ("where", (8.0, 28.0), False),
    "spell": ("spell", (8.0, 28.0), False),
    "presence": ("presence", (8.0, 28.0), False),
}
"""What is reported: the task, the heights, and whether only digits are asked for."""


def measured(model: Any, processor: Any, count: int) -> dict[str, list[bool]]:
    """Which of so many questions of each kind in `BARS` a model answers rightly."""
    found = {}
    for name, (task, heights, digits) in BARS.items():
        found[name] = list(score(model, processor, task, count, heights, digits=digits).right)
    return found


def compared(dual: dict[str, list[bool]], low_res: dict[str, list[bool]]) -> dict[str, Any]:
    """Accuracies of two models that were asked the same, with their intervals of 95 %, and the gap between them.

    The interval of the gap is that of a mean of differences, question by question.
    """
    tasks = {}
    for name, of_dual in dual.items():
        task: dict[str, Any] = {"questions": len(of_dual)}
        for arm, right in (("dual", of_dual), ("low-res", low_res[name])):
            of_arm = Score(tuple(right))
            task[arm] = {"accuracy": round(of_arm.accuracy, 4), "interval": [round(x, 4) for x in of_arm.interval]}
        gaps = torch.tensor(of_dual).double() - torch.tensor(low_res[name]).double()
        gap, reach = float(gaps.mean()), 1.96 * float(gaps.std() / math.sqrt(len(gaps)))
        task["gap"] = {"accuracy": round(gap, 4), "interval": [round(gap - reach, 4), round(gap + reach, 4)]}
        tasks[name] = task
    return tasks
