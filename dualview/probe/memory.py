"""The enhancement module's memory on a GPU beside what its equations predict, and direct cross-attention's."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.switches import full_computation

TOKENS, WIDTH, HEADS = 24, 1024, 8
"""A tile of 336 pixels under CLIP ViT-L/14, and the released module."""


def predicted_scores(grid: int, direct: bool, tokens: int = TOKENS, heads: int = HEADS) -> int:
    """Attention weights of both directions: n^2 tiles of hw queries and hw keys, or n^2 hw queries and as many keys.

    Example:
        >>> predicted_scores(3, True) / predicted_scores(3, False)
        9.0
    """
    keys = tokens**2 * (grid**2 if direct else 1)
    return 2 * heads * grid**2 * tokens**2 * keys


def measured_memory(grids: tuple[int, ...] = (1, 2, 3, 4, 5)) -> list[dict[str, Any]]:
    """A row for each grid, each way to compute, forward alone and with gradients; bfloat16, one image, on the GPU.

    Returns:
        peak_bytes: Allocated at the peak, beyond module and input; None where the GPU's memory does not suffice.
        scores_bytes: What the attention weights alone would take in bfloat16, one byte pair each.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    rows = []
    for n in grids:
        for what in ("as the readout needs", "all tokens", "direct cross-attention"):
            direct, full = what.startswith("direct"), what != "as the readout needs"
            readout: Any = "none" if direct else "bilinear"
            dem = DualPerspectiveEnhance.released(WIDTH, readout=readout, device="cuda", dtype=torch.bfloat16)
            shape = (1, 1, n * TOKENS, n * TOKENS, WIDTH) if direct else (1, n * n, TOKENS, TOKENS, WIDTH)
            tiles = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
            grid = (1, 1) if direct else (n, n)
            for scores in ("fused", "materialised"):
                backends = [SDPBackend.MATH] if scores == "materialised" else fused
                for training in (False, True):
                    with sdpa_kernel(backends), full_computation() if full else nullcontext():
                        peak = _peak(dem, tiles, grid, training)
                    rows.append(
                        {
                            "grid": n,
                            "what": what,
                            "scores": scores,
                            "training": training,
                            "peak_bytes": peak,
                            "scores_bytes": 2 * predicted_scores(n, direct),
                        }
                    )
    return rows


def _peak(dem: nn.Module, tiles: Tensor, grid: tuple[int, int], training: bool) -> int | None:
    try:
        with torch.set_grad_enabled(training):
            for _ in range(2):  # libraries allocate what they keep in the first call
                dem.zero_grad()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                out = dem(tiles[0], tiles[1], grid, backend="torch")
                if training:
                    out.float().square().mean().backward()
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before
                del out
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return int(peak)
