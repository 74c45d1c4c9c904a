"""Pictures from the patches that packed towers take, and back: permutations, so that nothing is lost."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from dualview.geometry import Size

IN_BLOCKS = "(t h w mh mw) (c ph pw) -> t c (h mh ph) (w mw pw)"
"""Qwen-VL and GLM-V: blocks of merge x merge patches, each patch channel by channel."""
IN_ROWS = "(h w) (ph pw c) -> c (h ph) (w pw)"
"""NaFlex and Gemma 4: row by row, each patch pixel by pixel."""


def from_blocks(patches: Tensor, grid: tuple[int, int, int], patch: int, merge: int) -> Tensor:
    """The frames of a picture or video from its patches in blocks, as Qwen-VL and GLM-V take them.

    Args:
        patches: Patches in blocks of merge x merge.
        grid: Temporal steps, and rows and columns of patches.
        patch: Height and width of a patch in pixels.
        merge: Height and width of a block in patches.

    Shape:
        (t*rows*cols, C*patch*patch) -> (t, C, rows*patch, cols*patch), where C are the channels of a temporal step:
        colours times frames

    Example:
        >>> import torch
        >>> frames = from_blocks(torch.arange(32.0).reshape(8, 4), (1, 2, 4), patch=2, merge=2)
        >>> torch.equal(to_blocks(frames, patch=2, merge=2), torch.arange(32.0).reshape(8, 4))
        True
    """
    steps, rows, cols = grid
    sizes = {"t": steps, "h": rows // merge, "w": cols // merge, "mh": merge, "mw": merge, "ph": patch, "pw": patch}
    return rearrange(patches, IN_BLOCKS, **sizes)


def to_blocks(frames: Tensor, patch: int, merge: int) -> Tensor:
    """Patches in blocks of merge x merge: the inverse of `from_blocks`. (t, C, H, W) -> (t*rows*cols, C*patch*patch)"""
    source, target = IN_BLOCKS.split(" -> ")
    return rearrange(frames, f"{target} -> {source}", mh=merge, mw=merge, ph=patch, pw=patch)


def from_rows(patches: Tensor, grid: Size, patch: int) -> Tensor:
    """A picture from its patches in rows, as NaFlex towers and Gemma 4 take them.

    Shape:
        (rows*cols, patch*patch*C) -> (C, rows*patch, cols*patch)
    """
    return rearrange(patches, IN_ROWS, h=grid[0], w=grid[1], ph=patch, pw=patch)


def to_rows(picture: Tensor, patch: int) -> Tensor:
    """Patches in rows: the inverse of `from_rows`. (C, H, W) -> (rows*cols, patch*patch*C)"""
    source, target = IN_ROWS.split(" -> ")
    return rearrange(picture, f"{target} -> {source}", ph=patch, pw=patch)
