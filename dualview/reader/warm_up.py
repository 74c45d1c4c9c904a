"""Stage 0: the language model learns questions and answers on pages that are told, before it is shown any.

In the place of each image token it gets what the image should say there, in the language model's own words: the sum of
the embeddings of the cell's name, turned, and of what stands in it. The projector has to learn to speak so. A language
model with drawn weights would have nothing to say to a projector.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from dualview.reader.descent import Descent
from dualview.reader.glyphs import CHARACTERS, CLASSES
from dualview.reader.pages import CELLS, Pages, covered, sample_pages
from dualview.reader.questions import ask, caption, place
from dualview.reader.tokens import ASSISTANT, BOS, END, IMAGE, USER

SYMBOLS = 1 + len(CLASSES) + len(CHARACTERS)
"""Nothing, a glyph, or a part of a large character."""
HEIGHTS = (6.0, 28.0)
IGNORED = -100


class Told(NamedTuple):
    """A batch of pages that are told.

    Attributes:
        symbols: (B, 8, 8)
        input_ids: (B, length)
        labels: (B, length)
    """

    symbols: Tensor
    input_ids: Tensor
    labels: Tensor


def told(symbols: Tensor, embeddings: nn.Embedding, tokenizer: Any, noise: float = 0.2) -> Tensor:
    """What stands for image tokens, (B, 8, 8) to (B, 64, D): the words for the cell and for what is in it, and noise.

    Args:
        symbols: As `symbols_of` gives them.
        embeddings: Of the language model's words.
        tokenizer: Of the language model.
        noise: Its standard deviation, as a part of that of the names.
    """
    names, said = vocabulary(embeddings, tokenizer)
    spoken: Tensor = names + said[symbols].flatten(1, 2)
    return spoken + torch.randn_like(spoken) * (noise * names.std().detach())


def vocabulary(embeddings: nn.Embedding, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """How a page names the cell of each image token, (64, D), and what it says for symbols, (SYMBOLS, D)."""
    cells, contents = (x.to(embeddings.weight.device) for x in _words(tokenizer))
    names: Tensor = embeddings(cells.flatten())
    said: Tensor = (embeddings(contents.clamp(min=0)) * (contents >= 0)[..., None]).sum(1)
    turned = turn(names.shape[-1]).to(names)
    return names @ turned, said @ turned.T


@lru_cache(1)
def turn(width: int) -> Tensor:
    """A fixed rotation (D, D).

    A page names a cell by its word turned, and what is in it by its word turned the other way: no word of a text is
    taken for one of a page, and no name for a content.
    """
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return cast(Tensor, torch.linalg.qr(drawn)[0])


@lru_cache(1)
def _words(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids of the names of cells, (8, 8), and of up to two words for each symbol, (SYMBOLS, 2), -1 for none."""
    named = torch.tensor([[_ids(tokenizer, f" {place((r, c))}")[0] for c in range(CELLS)] for r in range(CELLS)])
    words = [[-1, -1]]
    words += [[_ids(tokenizer, kind if kind in CHARACTERS else f" {kind}")[0], -1] for kind in CLASSES]
    words += [[_ids(tokenizer, "#")[0], _ids(tokenizer, kind)[0]] for kind in CHARACTERS]
    return named, torch.tensor(words)


def symbols_of(pages: Pages) -> Tensor:
    """Which symbol the image token of each cell should stand for, (B, 8, 8)."""
    large = (1 + len(CLASSES) + pages.large.clamp(min=0))[:, None, None]
    return torch.where(covered(pages), large, (1 + pages.kinds).clamp(min=0))


def tokens_of_page(
    pages: Pages, index: int, random: Random, tokenizer: Any, alone: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a page's questions, of all kinds or of one alone.

    Of all kinds, three pages of ten have the caption in their place, without the names.
    """
    ids = [tokenizer.convert_tokens_to_ids(BOS)] + [tokenizer.convert_tokens_to_ids(IMAGE)] * CELLS**2
    labels = [IGNORED] * len(ids)
    if alone is None and random.random() < 0.3:
        text, named = (
            _ids(tokenizer, caption(pages, index, random) + "\n"),
            set(_words(tokenizer)[0].flatten().tolist()),
        )
        return [*ids, *text], [*labels, *(IGNORED if token in named else token for token in text)]
    for question in ask(pages, index, random, None if alone is None else {alone: 1}):
        asked, said = _ids(tokenizer, USER + question.text + ASSISTANT), _ids(tokenizer, question.answer + END)
        ids += [*asked, *said]
        labels += [*[IGNORED] * len(asked), *said]
    return ids, labels


@lru_cache(20_000)
def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def start_as_matcher(model: Any) -> None:
    """Let the first two attention layers of the language model begin where a word finds the cells that it speaks of.

    A question names a cell, or what stands in one, and the tokens of the image say both. From weights without any
    order, to attend from one to the other takes most of the training to find. Queries and keys begin as one map onto
    the channels that rotary positions hardly turn: in half of the heads the name of a cell finds the cell, in the other
    half a content finds the cells that hold it. Values and output begin as maps that together copy what is found, as
    loud as a word: what names find and what contents find, each turned back into words.

    Args:
        model: An `InfLlavaForConditionalGeneration` with a Llama.
    """
    width, heads = model.config.text_config.hidden_size, model.config.text_config.num_attention_heads
    half, per_head = width // 2, width // heads
    slow = torch.arange(per_head) % (per_head // 2) >= per_head // 4
    turned, loud = turn(width), model.get_input_embeddings().weight.std()
    for layer in model.model.language_model.layers[:2]:
        attention = layer.self_attn
        frame, copies = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
        maps = (frame.view(heads, per_head, width) * slow[:, None] * MATCHING).flatten(0, 1)
        attention.k_proj.weight.copy_(maps)
        attention.q_proj.weight.copy_(torch.cat([maps[:half] @ turned.T, maps[half:] @ turned]))
        attention.v_proj.weight.copy_(copies)
        attention.o_proj.weight.copy_(loud * torch.cat([turned.T @ copies[:half].T, turned @ copies[half:].T], 1))


MATCHING = 2.0
"""How sharply a word attends to itself in the beginning."""


class ToldPages(Dataset[Told]):
    """Batches of pages that are told, one for each step; each is drawn from a seed of its own.

    Args:
        tokenizer: Of the language model.
        steps: How many batches.
        seed: Of all of them.
        first: Number of the first, so that a second set follows on another.
        batch: Pages in one.
        alone: A kind of question that every other batch asks alone, of three times as many pages.
    """

    def __init__(
        self, tokenizer: Any, steps: int, seed: int = 0, first: int = 0, *, batch: int = 8, alone: str | None = None
    ) -> None:
        self.tokenizer, self.steps, self.seed, self.first = tokenizer, steps, seed, first
        self.batch, self.alone = batch, alone

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Told:
        if step >= self.steps:
            raise IndexError(step)
        seed = self.seed * 1_000_003 + self.first + step
        alone = self.alone if step % 2 else None
        pages, random = sample_pages(self.batch * (3 if alone else 1), HEIGHTS, seed), Random(seed)
        rows = [tokens_of_page(pages, index, random, self.tokenizer, alone) for index in range(len(pages))]
        ids, labels = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
        padded = pad_sequence(ids, True, self.tokenizer.pad_token_id)
        return Told(symbols_of(pages), padded, pad_sequence(labels, True, IGNORED))


def warm_up(
    model: Any,
    pages: ToldPages,
    *,
    learning_rate: float = 5e-3,
    device: torch.device | str = "cpu",
    workers: int = 0,
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Train the language model of an INF-LLaVA, in place, on pages that are told; nothing else of it is used.

    Args:
        model: An `InfLlavaForConditionalGeneration`.
        pages: What it is told, step by step.
        learning_rate: The highest; AdamW, 60 steps of warm-up, cosine.
        device: Where to compute. The model is left there.
        workers: Processes that draw pages.
        watch: Called with step and loss.
    """
    model = model.to(device).train()
    language, head = model.model.language_model, model.lm_head
    parameters = list({id(p): p for m in (language, head) for p in m.parameters()}.values())
    descent = Descent(parameters, learning_rate, len(pages), watch=watch)
    for batch in DataLoader(pages, batch_size=None, num_workers=workers):
        symbols, ids, labels = (x.to(device) for x in batch)
        words = language.get_input_embeddings()
        page = told(symbols, words, pages.tokenizer)
        embedded = torch.cat([words(ids[:, :1]), page, words(ids[:, 1 + symbols[0].numel() :])], 1)
        states = language(inputs_embeds=embedded).last_hidden_state[:, :-1]
        learnt = labels[:, 1:] != IGNORED
        loss = nn.functional.cross_entropy(head(states[learnt]).float(), labels[:, 1:][learnt])
        descent.step(loss)
    model.eval()
