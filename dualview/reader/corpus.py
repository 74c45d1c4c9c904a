"""Pages written as pictures, and conversations about them as rows of LLaVA's JSON format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualview.outputs import new_folder
from dualview.reader.glyphs import Atlas
from dualview.reader.pages import Pages, render, sample_pages
from dualview.reader.questions import ask

BATCH = 8
"""Pages that are drawn at once."""


def write_corpus(
    folder: Path,
    count: int,
    side: int,
    heights: tuple[float, float],
    *,
    seed: int,
    atlas: Atlas,
    chats: int = 1,
    sparse: float = 0.0,
    photographs: Sequence[Tensor] | None = None,
    photographic: float = 0.0,
) -> None:
    """Draw pages and write them into a new folder, with ``chats.json`` and what stands on them beside.

    Args:
        folder: Is made; it must not exist.
        count: How many pages.
        side: Of a page in pixels.
        heights: Least and greatest height of glyphs.
        seed: The same seed gives the same pages and questions.
        atlas: Fonts to draw with, on the device that draws.
        chats: Conversations about each page, each with questions of its own.
        sparse: Share of pages with a code alone.
        photographs: Backgrounds of some pages, (3, h, w) each.
        photographic: Share of those.

    Raises:
        FileExistsError: There is something of that name already.
    """
    rows: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    with new_folder(folder) as made, ThreadPoolExecutor() as pool:
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            pages = sample_pages(size, heights, seed * 1_000_003 + start, sparse)
            said.append({"count": size, "heights": heights, "seed": pages.seed, "sparse": sparse})
            behind = photographs if Random(pages.seed).random() < photographic else None
            names = [f"{start + index:06}.jpg" for index in range(size)]
            pictures = (render(pages, side, atlas, behind) * 255).round().to(torch.uint8).cpu()
            list(pool.map(_save, pictures, [made / name for name in names]))
            for index, name in enumerate(names):
                random = Random(pages.seed * BATCH + index)
                asked = [[(q.text, q.answer) for q in ask(pages, index, random)] for _ in range(chats)]
                rows += [row_of(name, spoken) for spoken in asked]
        for name, written in (("chats", rows), ("pages", said)):
            (made / f"{name}.json").write_text(json.dumps(written), encoding="utf-8")


def pages_of(folder: Path, start: int) -> Pages:
    """What stands on the pages of a folder that `write_corpus` drew at once."""
    return sample_pages(**json.loads((folder / "pages.json").read_text(encoding="utf-8"))[start // BATCH])


def row_of(name: str, spoken: list[tuple[str, str]]) -> dict[str, Any]:
    """A row of LLaVA's format: a picture, and what is asked and said of it."""
    turns = [{"from": who, "value": text} for pair in spoken for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": name, "image": name, "conversations": turns}


def _save(picture: Tensor, path: Path) -> None:
    pixels: np.ndarray[Any, Any] = picture.movedim(0, -1).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=94, subsampling=0)
