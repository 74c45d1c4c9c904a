"""An INF-LLaVA, or another model with an attached module, as a model of lmms-eval, which loads this file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lmms_eval.api.model import lmms

from dualview.chat import Chat, to_inputs
from dualview.models.adapter.attach import attachment_of
from dualview.models.adapter.files import load_adapter
from dualview.models.adapter.processors import adapt_processor

GENERATION = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")


class DualViewLmms(lmms):
    """Answers one request after the other, in the model's own chat format.

    Args:
        pretrained: Directory that `dualview convert` made, any model that a module can be attached to, or a name of one
            on the hub.
        adapter: Folder that `save_adapter` has written for this model: what is evaluated is the model with it.
        size: Of INF-LLaVA, pixels a side that pictures are scaled to; None for the model's own, 336 as the released
            inference code.
        device: Where to compute; None for a GPU where there is one.
        dtype: Type of the weights; None for that of the files.
        batch_size: Only 1: pictures are encoded one by one.
        max_new_tokens: Longest answer, where the task does not say it.

    Raises:
        ValueError: ``batch_size`` is another, the directory holds no model that takes pictures and chats, or the folder
            nothing that was attached to it.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 512,
    ) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"batch_size={batch_size}: must be 1, for requests are answered one by one.")
        if adapter is not None and size is not None:
            raise ValueError(
                f"size={size} is for INF-LLaVA, and adapter={adapter!r} for other models: give one of them."
            )
        self.chat = Chat(pretrained, size=size, device=device, dtype=dtype, max_new_tokens=max_new_tokens)
        if adapter is not None:
            record = attachment_of(load_adapter(self.chat.model, adapter))
            if record.source != "upsample":
                self.chat.processor = adapt_processor(self.chat.processor, record.grid, record.source)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers, each cut off before the first of the texts that end it."""
        answers = []
        for text, options, images in self._each(requests):
            given = {name: options[name] for name in GENERATION if options.get(name) is not None}
            if not given.get("temperature"):  # 0 stands for greedy
                given |= {"do_sample": False, "temperature": None, "top_p": None}
            given.setdefault("do_sample", True)  # a temperature alone asks for it; the model's own setting is greedy
            inputs = to_inputs(self.chat, _messages(text, images))
            out = self.chat.model.generate(**inputs, **({"max_new_tokens": self.chat.max_new_tokens} | given))
            answer: str = self.chat.processor.decode(
                out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
            ends = options.get("until") or []
            for end in [ends] if isinstance(ends, str) else ends:
                answer = answer.split(end, maxsplit=1)[0] if end else answer
            answers.append(answer)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Logarithms of the probability of each continuation, and whether it is the greedy one."""
        found = []
        for text, target, images in self._each(requests):
            inputs = to_inputs(self.chat, _messages(text, images))
            ids = self.chat.processor.tokenizer(target, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = ids.to(inputs["input_ids"])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.inference_mode():
                logits = self.chat.model(**inputs).logits[:, -ids.shape[1] - 1 : -1].float()
            worth = logits.log_softmax(-1).gather(-1, ids[..., None]).sum()
            found.append((float(worth), bool((logits.argmax(-1) == ids).all())))
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not there: no task of the paper asks in rounds."""
        raise NotImplementedError("dualview answers tasks of a single round: use one.")

    def _each(self, requests: list[Any]) -> Iterator[tuple[str, Any, list[Any]]]:
        """The text of a request, its options or its continuation, and its pictures."""
        for request in requests:
            text, second, to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            yield text, second(doc) if callable(second) else second, list(to_visual(doc) or [])


def _messages(text: str, images: list[Any]) -> list[dict[str, Any]]:
    """One question; its pictures come first, wherever a task marks them."""
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text.replace("<image>", "").strip()}]}]
