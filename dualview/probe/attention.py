"""What attention does at the start and the end of training: how even it is, and what it leaves of a tile's detail."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from dualview.geometry import Perspective
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.planned.live import CROP_OF_QUERY, KEYS_OF_QUERY, MAPS_OF_ROLE
from dualview.ops.tile_attention import TileAttention
from dualview.ops.tiling import crop, recombine
from dualview.probe.scenes import GRID


@torch.no_grad()
def attention_of(dem: DualPerspectiveEnhance, local: Tensor, stride: Tensor) -> dict[str, dict[str, float]]:
    """For each direction of a module, by the role that asks.

    Returns:
        entropy: Mean entropy of the attention weights over its maximum: 1 is an average of all keys.
        detail: Share of the output's variance that lies within a tile, between its tokens; 0 if all are the same.
        detail_in: The same of the tokens that ask.

    Shape:
        local, stride: (B, 9, h, w, D)
    """
    grid = (GRID, GRID)
    maps = {
        "local": recombine(local, grid, "local", data_format="channels_last"),
        "global": recombine(stride, grid, "global", data_format="channels_last"),
    }
    found: dict[str, dict[str, float]] = {}
    for asks, answers in KEYS_OF_QUERY.items():
        if dem.enhance not in ("both", asks):
            continue
        cut = CROP_OF_QUERY[dem.pairing][asks]
        query, key = (_tiles(dem, maps, role, cut) for role in (asks, answers))
        attention = cast(TileAttention, dem.attentions[0 if asks == "global" else -1])
        heads = attention.num_heads
        q, k = (
            project(x).unflatten(-1, (heads, -1)).transpose(2, 3)
            for project, x in ((attention.q_proj, query), (attention.k_proj, key))
        )
        logits = (q @ k.mT).float() * (dem.dim / heads) ** -0.5
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean() / math.log(key.shape[2])
        out = attention(query, key)
        found[asks] = {"entropy": float(entropy), "detail": _detail(out), "detail_in": _detail(query)}
    return found


def gradient_norms(dem: DualPerspectiveEnhance) -> dict[str, float]:
    """Norms of the gradients that the projections hold, over the norms of their weights."""
    found: dict[str, float] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        weights = [getattr(attention, name).weight for attention in dem.attentions]
        found[name] = math.sqrt(sum(_squares(w.grad) for w in weights) / sum(_squares(w) for w in weights))
    return found


def _squares(x: Any) -> float:
    return 0.0 if x is None else float(x.detach().square().sum())


def _tiles(dem: DualPerspectiveEnhance, maps: dict[str, Tensor], role: Any, cut: Perspective) -> Tensor:
    of_role = reduce(torch.add, (maps[perspective] for perspective in MAPS_OF_ROLE[dem.source][role]))
    return crop(of_role, (GRID, GRID), cut, data_format="channels_last").flatten(2, 3)


def _detail(tiles: Tensor) -> float:
    """(B, tiles, tokens, D): variance between tokens of a tile over all variance."""
    tiles = tiles.float()
    within = (tiles - tiles.mean(2, keepdim=True)).square().mean()
    return float(within / (tiles - tiles.mean((0, 1, 2))).square().mean())
