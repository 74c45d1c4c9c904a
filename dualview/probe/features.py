"""Pages as a frozen encoder sees them: from local tiles, stride tiles, smoothed stride tiles, and a thumbnail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dualview.interpolation import resized
from dualview.large.progress import counted
from dualview.ops.low_pass import low_pass
from dualview.ops.tiling import crop
from dualview.probe.draws import Draw
from dualview.probe.glyphs import Array
from dualview.probe.scenes import GRID

Encode = Callable[[Tensor], Tensor]
"""Pixels (T, 3, h, w) from 0 to 1 to tokens (T, h', w', D)."""


@dataclass
class Views:
    """Features of pages; of a pixel permutation as of the others, by the same frozen encoder.

    Attributes:
        local: Of local tiles, (B, 9, h, w, D).
        stride: Of stride tiles.
        thumb: Of the page reduced to one tile, (B, h, w, D).
        smooth: Of stride tiles of the page after a low-pass filter; None where no arm asks for them.
    """

    local: Tensor
    stride: Tensor
    thumb: Tensor
    smooth: Tensor | None = None

    def pick(self, index: Tensor, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Some pages, of some views."""
        return {name: getattr(self, name).index_select(0, index).to(dtype) for name in names}

    def __len__(self) -> int:
        return len(self.local)


def tiles_of(pages: Tensor, *, smooth: bool) -> dict[str, Tensor]:
    """The pixels of the views of pages (B, 3, H, W) from 0 to 1, of smoothed stride tiles where they are wanted."""
    tiles = {
        "local": crop(pages, (GRID, GRID), "local"),
        "stride": crop(pages, (GRID, GRID), "global"),
        "thumb": thumbnail(pages),
    }
    return tiles | ({"smooth": crop(low_pass(pages, (GRID, GRID)), (GRID, GRID), "global")} if smooth else {})


def thumbnail(pages: Tensor, by: int = GRID) -> Tensor:
    """Pages reduced by the antialiased interpolation that a low-resolution view is made with."""
    height, width = pages.shape[-2:]
    return resized(pages, (height // by, width // by)).clamp(0, 1)


@torch.no_grad()
def encode_draw(
    encode: Encode,
    draw: Draw,
    *,
    chunks: Iterable[tuple[Array, Array]] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
    smooth: bool = True,
    progress: bool = False,
) -> tuple[Views, Tensor]:
    """Features and questions of all pages of a draw, kept on the device.

    Args:
        encode: The frozen encoder.
        draw: Which pages.
        chunks: Its pages, where they are drawn already.
        device: Where to encode, and to keep the features.
        dtype: Of the features kept.
        smooth: Whether smoothed stride tiles are encoded, too, a third of the work.
        progress: Whether a bar shows how many pages are done.
    """
    parts: dict[str, list[Tensor]] = {}
    questions = []
    with counted(draw.count, f"{draw.role} pages, seed {draw.seed}", "pages", shown=progress) as done:
        for pages, asked in draw.chunks() if chunks is None else chunks:
            pixels = torch.from_numpy(pages).to(device).float() / 255
            for name, tiles in tiles_of(pixels, smooth=smooth).items():
                flat = encode(tiles.flatten(0, -4))
                parts.setdefault(name, []).append(flat.unflatten(0, tiles.shape[:-3]).to(dtype))
            questions.append(torch.from_numpy(asked).to(device))
            done(len(pages))
    return Views(**{name: torch.cat(of) for name, of in parts.items()}), torch.cat(questions)
