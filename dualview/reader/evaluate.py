"""How often the embedded model answers rightly, through ``generate``, on pages that no training saw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count as counted
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dualview.reader.glyphs import DIGITS, HELD_OUT_FONTS, Atlas, build_atlas
from dualview.reader.pages import Pages, render, sample_pages
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
    atlas = build_atlas(HELD_OUT_FONTS).to(device)
    drawn = list(islice(_asked(task, heights, digits, seed), count))
    pictures = [_picture(pages, side, atlas, photographs) for pages, _ in drawn]
    return torch.stack(pictures), [question for _, question in drawn]


def _asked(task: str, heights: tuple[float, float], digits: bool, seed: int = 0) -> Iterator[tuple[Pages, Question]]:
    """Pages, each one alone, with a question about it."""
    found = 0
    for number in counted():
        pages = sample_pages(1, heights, HELD_OUT_SEED + 7919 * seed + number)
        asked = ask(pages, 0, Random(pages.seed), {task: 1}, 12)
        asked = [q for q in asked if not digits or q.answer in DIGITS]
        if task == "large" and found % 2 == 0:  # every other page has one
            asked = [q for q in asked if q.answer != "none"]
        if asked:
            found += 1
            yield pages, asked[0]


def _picture(pages: Pages, side: int, atlas: Atlas, photographs: Tensor | None = None) -> Tensor:
    return (render(pages, side, atlas, photographs)[0] * 255).round().to(torch.uint8).cpu()


def answers_of(model: Any, processor: Any, pictures: Tensor, questions: list[str], batch: int = 16) -> list[str]:
    """What a model answers to one question about each picture, greedily.

    Args:
        model: An INF-LLaVA.
        processor: Its processor.
        pictures: (n, 3, H, W), uint8
        questions: n questions.
        batch: How many are answered at once.
    """
    return [
        answer
        for part in _parts(len(questions), batch)
        for answer in _said(model, processor, _seen(model, processor, pictures[part]), questions[part])
    ]


def _parts(count: int, batch: int) -> list[slice]:
    return [slice(start, start + batch) for start in range(0, count, batch)]


@torch.inference_mode()
def _seen(model: Any, processor: Any, pictures: Tensor) -> Tensor:
    """What the language model reads of pictures, (n, image tokens, D)."""
    pixels = processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    return torch.stack(list(model.get_image_features(pixels.to(model.device, model.dtype)).pooler_output))


@torch.inference_mode()
def _said(model: Any, processor: Any, seen: Tensor, questions: Sequence[str]) -> list[str]:
    """What is answered to one question about each of what `_seen` gives."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": content(text)}] for text in questions]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    texts = [text.replace(processor.image_token, processor.image_token * processor.image_seq_length) for text in texts]
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    images = {"image": BaseModelOutputWithPooling(pooler_output=seen)}
    ids = model.generate(**inputs, mm_encoder_outputs=images, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


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


def measured(model: Any, processor: Any, questions: int, batch: int = 16) -> dict[str, list[bool]]:
    """Which of so many questions of each kind in `BARS` a model answers rightly.

    Kinds with glyphs of the same heights ask about the same pages, and each page is encoded once.
    """
    side = int(processor.image_processor.size["shortest_edge"])
    atlas = build_atlas(HELD_OUT_FONTS).to(model.device)
    found: dict[str, list[bool]] = {name: [] for name in BARS}
    for heights in dict.fromkeys(heights for _, heights, _ in BARS.values()):
        asked = [
            (name, pages, question)
            for name, (task, of_task, digits) in BARS.items()
            for pages, question in islice(_asked(task, heights, digits), questions if of_task == heights else 0)
        ]
        drawn = list({pages.seed: pages for _, pages, _ in asked}.values())
        seen: dict[int, Tensor] = {}
        for part in _parts(len(drawn), batch):
            pictures = torch.stack([_picture(pages, side, atlas) for pages in drawn[part]])
            tokens = _seen(model, processor, pictures)
            seen |= {pages.seed: of_page for pages, of_page in zip(drawn[part], tokens, strict=True)}
        for part in _parts(len(asked), batch):
            tokens = torch.stack([seen[pages.seed] for _, pages, _ in asked[part]])
            given = _said(model, processor, tokens, [question.text for _, _, question in asked[part]])
            for answer, (name, _, question) in zip(given, asked[part], strict=True):
                found[name].append(answer == question.answer)
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
