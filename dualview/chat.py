"""Questions about a picture, answered word by word by a model of a directory or of the hub."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dualview.answers import reduced
from dualview.arguments import MOST, shown
from dualview.canvas import fit_canvas
from dualview.geometry import TileGrid
from dualview.images import load_image
from dualview.terminal import printable

Messages: TypeAlias = list[dict[str, Any]]


class QuestionError(ValueError):
    """A question that cannot be put to the model; the conversation is as it was."""


class Chat:
    """A conversation with a model, about one picture or none.

    Args:
        model: Directory of a model (as `convert_inf_llava` makes it), or its name on the hub.
        image: A picture, shown with the first question.
        size: Pixels a side that the picture is scaled to; None for the model's own.
        device: Where to compute; None for a GPU where there is one.
        dtype: Type of the weights; None for that of the files.
        max_new_tokens: Longest answer.

    Raises:
        ImageError: The picture cannot be read.
        ValueError: There is no such model, or none that takes pictures and chats, or its weights are not those of its
            configuration.
    """

    def __init__(
        self,
        model: str,
        image: Path | None = None,
        *,
        size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from dualview.models.inf_llava import InfLlavaConfig, InfLlavaForConditionalGeneration
        from dualview.models.inf_llava.shards import check_loaded

        try:
            kind = InfLlavaConfig.get_config_dict(model)[0].get("model_type")
        except OSError as error:
            raise ValueError(
                f"model {model}: cannot be loaded; give a directory or a name on the hub: {error}"
            ) from error
        if kind == "llava_llama":  # released weights that are not converted; the Auto classes know no such model
            InfLlavaConfig.check_model_type({"model_type": kind})
        self.image = None if image is None else load_image(image)  # before minutes are spent on the weights
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.options = {} if size is None else {"size": {"shortest_edge": size}}
        self.max_new_tokens = max_new_tokens
        self.processor = AutoProcessor.from_pretrained(model)
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype or "auto", output_loading_info=True
        )
        check_loaded(model, report, whole=isinstance(loaded, InfLlavaForConditionalGeneration))
        self.model = loaded.to(self.device).eval()
        self.messages: Messages = []

    def shown(self) -> tuple[Tensor, TileGrid]:
        """The picture on the canvas that the model cuts into tiles, (3, H, W), and its grid.

        Raises:
            ValueError: The model is no INF-LLaVA, or there is no picture.
        """
        config = self.model.config
        if self.image is None or config.model_type != "inf_llava":
            raise ValueError(
                f"{'no' if self.image is None else 'a'} picture, and a model of model_type={config.model_type!r}: "
                "tiles are known of a picture that an INF-LLaVA is shown."
            )
        grid, tile = TileGrid.of(config.grid), config.vision_config.image_size
        return fit_canvas(self.image, grid.map_size((tile, tile))), grid

    def at_low_resolution(self) -> Chat:
        """A new conversation with the same model about what is left of the picture at the size of one tile.

        Raises:
            ValueError: The model is no INF-LLaVA, or there is no picture.
        """
        other = copy.copy(self)
        other.image, other.messages = reduced(*self.shown()), []
        return other

    def ask(self, question: str, say: Callable[[str], None]) -> str:
        """Answer a question; ``say`` gets the answer piece by piece.

        Args:
            question: What is asked.
            say: Called with every piece of text as soon as it is known.

        Raises:
            QuestionError: The question holds a token that has a meaning of its own to the model, or what is no text; or
                the conversation has become too long for the model.
        """
        from transformers import TextStreamer

        self._check(question)
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.image is not None and not self.messages:
            content.insert(0, {"type": "image", "image": self.image})
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = to_inputs(self, messages)
        room = self._most - inputs["input_ids"].shape[1]
        if room < 1:
            raise QuestionError(
                f"question {shown(question)}: {self._most - room:,} tokens with what was said before, and the model "
                f"takes {self._most:,} with its answer: ask in fewer words, or begin a new conversation."
            )
        self.messages = messages
        pieces: list[str] = []

        class Streamer(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    pieces.append(text)
                    say(text)

        streamer = Streamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            self.model.generate(**inputs, streamer=streamer, max_new_tokens=min(self.max_new_tokens, room))
        answer = "".join(pieces)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer

    @property
    def _most(self) -> int:
        """Tokens of the longest conversation."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or MOST

    def _check(self, question: str) -> None:
        """Refuse what the tokenizer would not read as text."""
        known = self.processor.tokenizer.added_tokens_decoder.values()
        marks = [token.content for token in known if token.special] + [getattr(self.processor, "image_token", None)]
        if found := [mark for mark in marks if mark and mark in question]:
            raise QuestionError(
                f"question {shown(question)}: {found[0]!r} is a token with a meaning of its own to the model, and no "
                "text: leave it out, or write it otherwise."
            )
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise QuestionError(
                f"question {shown(question)}: holds what is no text in UTF-8: write it anew."
            ) from error


def to_inputs(chat: Chat, messages: Messages) -> dict[str, Any]:
    """What the model takes of a conversation, on its device and of its type."""
    inputs = chat.processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images_kwargs": chat.options},
    ).to(chat.device)
    return {name: x.to(chat.model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def say_piece(text: str) -> None:
    """Print a piece of an answer at once."""
    print(printable(text, sys.stdout), end="", flush=True)


def questions() -> Iterator[str]:
    """Lines of standard input that are not empty, until it ends; a terminal is shown where to write.

    Raises:
        ValueError: Standard input is closed; said at once, and not when the first line is asked for.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed: give the questions there, a line each.")
    return _lines()


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is no text in {error.encoding}: save the questions in it.") from error
        if not line:
            return
        if line.strip():
            yield line.strip()
