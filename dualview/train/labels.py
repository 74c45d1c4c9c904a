"""Text of a row to token ids and labels: the caption is learnt, or the assistant's answers, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from dualview.arguments import check_instance
from dualview.train.rows import IMAGE, Row, RowError, Turn

IGNORED = -100
"""The label of a token that is not learnt."""
CAPTION_END = "\n"
"""What ends a caption in stage 1, as in the released training code (conversation version "plain")."""

Span = tuple[int, int]


class Tokens(NamedTuple):
    """A row as the language model sees it.

    Attributes:
        ids: Token ids; every image is there with all of its tokens.
        labels: As long: the id where it is learnt, -100 elsewhere.
    """

    ids: list[int]
    labels: list[int]


def check_processor(processor: Any, form: str) -> None:
    """Raise a ValueError where labels cannot be made with a processor.

    Args:
        processor: An `InfLlavaProcessor`, with any tokenizer and chat template.
        form: "plain" or "chat".

    Raises:
        TypeError: The processor is another.
        ValueError: The tokenizer says not where its tokens stand, or the template not which part is an answer.
    """
    from dualview.models.inf_llava import InfLlavaProcessor

    tokenizer = check_instance(processor, "processor", InfLlavaProcessor, "an InfLlavaProcessor").tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text: use a fast tokenizer."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no pad token: set tokenizer.pad_token, and save it.")
    template = processor.chat_template
    if form == "chat" and (not isinstance(template, str) or "endgeneration" not in template):
        raise ValueError(
            "the processor's chat template does not mark answers, so it is not known what to learn: write "
            "{% generation %} before and {% endgeneration %} after the text of an assistant's turn and its end token."
        )


def tokens_of(row: Row, processor: Any, form: str, max_length: int | None = None) -> Tokens:
    """Token ids and labels of a row.

    Args:
        row: The row.
        processor: Its tokenizer, chat template, image token and number of tokens per image are used.
        form: "plain": image and caption, the caption is learnt. "chat": the processor's chat template, the answers are
            learnt with what the template puts between its generation markers, the end of the turn among it.
        max_length: Tokens beyond are cut off.

    Raises:
        RowError: Cutting would go through an image, or leave nothing to learn; or the text has the image token.
    """
    text, answers = _plain(row, processor) if form == "plain" else _chat(row, processor)
    text, answers = _expanded(text, answers, processor)
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    labels = _labels(ids, encoded["offset_mapping"], answers)
    if max_length is not None and len(ids) > max_length:
        if processor.image_token_id in ids[max_length:]:
            raise RowError(
                f"{row.place}: {len(ids)} tokens, and max_length={max_length} cuts through an image, which has "
                f"{processor.image_seq_length}: raise max_length."
            )
        ids, labels = ids[:max_length], labels[:max_length]
    if ids.count(processor.image_token_id) != len(row.images) * processor.image_seq_length:
        raise RowError(f"{row.place}: the text has the token {processor.image_token!r} where there is no image.")
    if all(label == IGNORED for label in labels[1:]):  # the first is predicted by nothing
        raise RowError(f"{row.place}: nothing is left to learn in {len(ids)} tokens.")
    return Tokens(ids, labels)


def _plain(row: Row, processor: Any) -> tuple[str, list[Span]]:
    start = f"{processor.tokenizer.bos_token or ''}{processor.image_token}"
    text = start + row.turns[-1].text + CAPTION_END
    return text, [(len(start), len(text))]


def _chat(row: Row, processor: Any) -> tuple[str, list[Span]]:
    rendered, spans = render_jinja_template(
        conversations=[[message_of(turn) for turn in row.turns]],
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    return rendered[0], [(start, end) for start, end in spans[0]]


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates take it: images and texts are parts, in the order in which they were written."""
    if turn.role != "user":
        return {"role": turn.role, "content": [{"type": "text", "text": turn.text}]}
    pieces = turn.text.strip().split(IMAGE)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        text = piece.removeprefix("\n") if number else piece  # the end of the line that the image stood in
        parts += [{"type": "text", "text": text}] if text else []
    return {"role": turn.role, "content": parts}


def _expanded(text: str, answers: Sequence[Span], processor: Any) -> tuple[str, list[Span]]:
    """The text with all tokens of every image, and where the answers stand in it."""
    token, more = processor.image_token, len(processor.image_token) * (processor.image_seq_length - 1)
    starts = [found.start() for found in re.finditer(re.escape(token), text)]
    moved = [tuple(end + more * sum(start < end for start in starts) for end in span) for span in answers]
    return text.replace(token, token * processor.image_seq_length), [(span[0], span[1]) for span in moved]


def _labels(ids: Sequence[int], places: Sequence[Span], answers: Sequence[Span]) -> list[int]:
    """The ids of the tokens of which a part lies in an answer."""
    labels, number = [], 0
    for token, (start, end) in zip(ids, places, strict=True):
        while number < len(answers) and answers[number][1] <= start:
            number += 1
        learnt = number < len(answers) and start < end and end > answers[number][0]
        labels.append(token if learnt else IGNORED)
    return labels
