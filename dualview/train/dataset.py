"""Rows as a dataset for transformers' Trainer: pictures are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dualview.arguments import check_callable, check_choice, check_count, check_mapping, check_path
from dualview.images import ImageError, load_image
from dualview.terminal import say
from dualview.train.config import FORMS
from dualview.train.features import FeatureCache
from dualview.train.labels import Tokens, check_processor, tokens_of
from dualview.train.rows import Row, RowError, check_files, checked_rows, read_rows

BadRows = Literal["error", "skip"]
CHARACTERS_PER_TOKEN = 4
"""Of English text, about; rows are only sorted by it."""


class LlavaDataset(Dataset[dict[str, Tensor]]):
    """Rows of LLaVA's JSON format, as inputs of INF-LLaVA with labels.

    A row is ``{"image": path or list of paths, "conversations": [{"from": "human", "value": text}, {"from": "gpt",
    "value": text}, ...]}``, with ``<image>`` in the text of a human turn for each image; a row without an image is text
    alone. All rows are checked when the dataset is made; pictures are opened, and text is tokenised, row by row in
    training.

    Args:
        processor: An `InfLlavaProcessor`.
        form: "plain": an image and its caption, which is learnt; "chat": a conversation, whose answers are learnt.
        max_length: Most tokens of a row; what lies beyond is cut off.
        bad_rows: Whether a bad row is an error, or is reported and skipped. For one that is found bad only when its
            picture is read or its text is cut, the next good row stands in.
        images_kwargs: Arguments of the image processor, as ``{"do_pad": False}``.
        report: Called with a line for every bad row that is skipped.

    Raises:
        TypeError: The processor is another, or what is called cannot be.
        ValueError: The tokenizer or the chat template does not say what is to be learnt; or an option is none.

    Example:
        ``data = LlavaDataset(processor).add("rows.json", "pictures")``, and then ``Collator(0)([data[0], data[1]])``.

    Attributes:
        rows: Those that are good.
        skipped: What was wrong with the others.
        cache: A `FeatureCache` that has been filled with the pictures; None to read the pictures themselves.
    """

    def __init__(
        self,
        processor: Any,
        form: str = "chat",
        *,
        max_length: int | None = None,
        bad_rows: BadRows = "error",
        images_kwargs: dict[str, Any] | None = None,
        report: Callable[[str], None] = say,
    ) -> None:
        check_processor(processor, check_choice(form, "form", FORMS))
        self.processor, self.form = processor, form
        self.max_length = None if max_length is None else check_count(max_length, "max_length")
        self.bad_rows = check_choice(bad_rows, "bad_rows", ("error", "skip"))
        self.images_kwargs = dict(check_mapping(images_kwargs or {}, "images_kwargs"))
        self.report = check_callable(report, "report", "a function of a line")
        self.cache: FeatureCache | None = None
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self._said: set[str] = set()  # of the same lines, for there may be many

    def add(self, file: str | Path, images: str | Path | None = None, *, source: str | None = None) -> LlavaDataset:
        """Add the rows of a file.

        Args:
            file: A ``.json`` or ``.jsonl`` file.
            images: Folder that paths of pictures begin in; None for that of the file.
            source: Where the file comes from, for the message if it is missing.

        Raises:
            ValueError: The file is missing or no JSON, a row is bad and ``bad_rows`` is "error", or all rows are bad.
        """
        check_path(file, "file")
        if images is not None:
            check_path(images, "images")
        file, folder = check_files(file, images, source)
        rows, good = read_rows(file), []
        for row in checked_rows(rows, file, folder, self.form):
            if isinstance(row, Row):
                good.append(row)
            elif self.bad_rows == "error":
                raise row
            else:
                self._skip(row)
        if not good:
            raise ValueError(f"{file}: all {len(rows)} rows are bad; the last is {self.skipped[-1]}")
        self.rows += good
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Inputs of one row: input_ids and labels (length,), and of its images what the image processor gives.

        Raises:
            RowError: The row is bad and ``bad_rows`` is "error", or no row is good.
        """
        for step in range(len(self.rows)):
            row = self.rows[(index + step) % len(self.rows)]
            try:
                return self._inputs(row)
            except RowError as error:
                if self.bad_rows == "error":
                    raise
                self._skip(error)
        raise RowError("no row can be trained on.")

    def _skip(self, error: RowError) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            self.skipped.append(str(error))
            self.report(f"skipped: {error}")

    def _inputs(self, row: Row) -> dict[str, Tensor]:
        tokens: Tokens = tokens_of(row, self.processor, self.form, self.max_length)
        inputs = {"input_ids": torch.tensor(tokens.ids), "labels": torch.tensor(tokens.labels)}
        return inputs | (self._pictures(row) if row.images else {})

    def _pictures(self, row: Row) -> dict[str, Tensor]:
        """What the image processor makes of the pictures of a row, or what the cache has in its place.

        Raises:
            RowError: One of them cannot be read.
            ValueError: One of them is not in the cache.
        """
        try:
            if self.cache is not None and (found := self.cache.read(row.images)) is not None:
                return found
            loaded = [load_image(path) for path in row.images]
        except ImageError as error:
            raise RowError(f"{row.place}: {error}") from error
        if self.cache is not None:
            raise ValueError(
                f"{row.place}: {', '.join(map(str, row.images))} is not in the cache {self.cache.folder}: it was "
                "filled before this picture came, or changed. Resume the run, which fills it anew."
            )
        made: dict[str, Tensor] = self.processor.image_processor(loaded, return_tensors="pt", **self.images_kwargs)
        return dict(made)

    def lengths(self) -> list[int]:
        """About how many tokens each row has, without reading or tokenising it; rows without an image are negative.

        Batches of alike rows are made by it, as the released training code does: with and without an image apart.
        """
        return [_length(row, self.processor.image_seq_length) for row in self.rows]


def _length(row: Row, image_tokens: int) -> int:
    text = 1 + row.size // CHARACTERS_PER_TOKEN
    return text + image_tokens * len(row.images) if row.images else -text


def split_by_kind(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices of rows with an image, and of rows without."""
    kinds: tuple[list[int], list[int]] = ([], [])
    for index, length in enumerate(lengths):
        kinds[length < 0].append(index)
    return kinds
