"""The embedded model's tokenizer: characters, and the words of the questions that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from dualview.reader.pages import sample_pages
from dualview.reader.questions import ask, caption

IMAGE, USER, ASSISTANT, END, PAD, BOS = "<image>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>", "<s>"
SPECIAL = (PAD, BOS, END, IMAGE, USER, ASSISTANT)
VOCABULARY = 448

CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list %}"
    "{% set text = texts | join('') %}"
    "{{ '<image>' * (images | length) }}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ text + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + text + '<|assistant|>' }}{% endif %}"
    "{% endfor %}"
)
"""Images, the question, the answer; an answer is asked for by the end of the question already."""


def build_tokenizer() -> Any:
    """A tokenizer for the questions: their words are tokens; digits and capitals, and all else, single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" [A-H][1-8]|[0-9A-Z]| ?[a-z]+|[^0-9A-Za-z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _texts() -> Iterable[str]:
    pages, random = sample_pages(60, (8, 28), seed=0), Random(0)
    for index in range(len(pages)):
        yield caption(pages, index, random)
        for question in ask(pages, index, random):
            yield question.text
            yield question.answer
