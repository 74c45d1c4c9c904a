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
from dualview.canvas import fit_canvas
from dualview.geometry import TileGrid
from dualview.images import load_image
from dualview.terminal import printable

Messages: TypeAlias = list[dict[str, Any]]


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
        ValueError: The directory holds no model that takes pictures and chats, or weights that are not those of its
            configuration.
        OSError: There is no such directory.
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

        kind = InfLlavaConfig.get_config_dict(model)[0].get("model_type")
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
        lacking = [sorted(report[name]) for name in ("missing_keys", "unexpected_keys")]
        if lacking[0] or (lacking[1] and isinstance(loaded, InfLlavaForConditionalGeneration)):
            raise ValueError(
                f"{model}: weights and config.json do not belong together, so that answers would be of random numbers. "
                f"Without weights: {shortened(lacking[0])}; without a place: {shortened(lacking[1])}. Make the "
                "directory again."
            )
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
        """
        from transformers import TextStreamer

        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.image is not None and not self.messages:
            content.insert(0, {"type": "image", "image": self.image})
        self.messages.append({"role": "user", "content": content})
        inputs = to_inputs(self, self.messages)
        pieces: list[str] = []

        class Streamer(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    pieces.append(text)
                    say(text)

        streamer = Streamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            self.model.generate(**inputs, streamer=streamer, max_new_tokens=self.max_new_tokens)
        answer = "".join(pieces)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer


def shortened(names: list[str]) -> str:
    """The first of many names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


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
    """Lines of standard input that are not empty, until it ends; a terminal is shown where to write."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
