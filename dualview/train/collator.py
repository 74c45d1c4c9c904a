"""Rows to a batch: padded at the right, labels with -100, the pictures of all rows one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualview.arguments import check_count
from dualview.train.labels import IGNORED

PICTURES = ("pixel_values", "image_grids", "image_sizes", "view_features", "image_canvases")
"""What belongs to images, and is joined along its first dimension."""


class Collator:
    """Makes one batch of the rows of a `LlavaDataset`.

    A batch of text alone has no pictures. INF-LLaVA itself then encodes one tile that counts for nothing, so that
    processes that train together call the same modules.

    Args:
        pad_token_id: What fills up ``input_ids``.

    Raises:
        ValueError: That is no id.

    Example:
        >>> long, short = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}
        >>> Collator(pad_token_id=0)([long, short])["labels"].tolist()
        [[-100, 6, 7], [5, -100, -100]]
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = check_count(pad_token_id, "pad_token_id", low=0)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Join rows.

        Args:
            rows: Mappings of ``input_ids`` and ``labels``, and what the image processor gives where there are images.

        Shape:
            - input_ids, attention_mask, labels: (rows, longest)
            - pixel_values: (images or tiles of all rows, 3, height, width)
            - image_grids, image_sizes: (images of all rows, 2)
        """
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        for name in PICTURES:
            if parts := [row[name] for row in rows if name in row]:
                batch[name] = torch.cat(parts)
        return batch
