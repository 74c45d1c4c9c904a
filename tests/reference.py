"""Slow references, written from the equations of arXiv 2407.16198 with index loops. Nothing of dualview is used here.

A grid is (n_H, n_W), rows before columns; a map is indexed [Y, X, ...], a tile [y, x, ...], heights first. The paper
writes I(x, y), width first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


# --- Eq. 5-6 and 11-17: crops and their inverses ---------------------------------------------------------------------


def cells(perspective: str, grid: Pair, tile: Pair) -> Iterator[tuple[tuple[int, int, int], Pair]]:
    """Every ((tile index, y, x), (Y, X)): where each cell of each tile lies on the map."""
    (n_h, n_w), (h, w) = grid, tile
    for i in range(n_h * n_w):
        row, col = i // n_w, i % n_w  # Eq. 11-12
        for y in range(h):
            for x in range(w):
                if perspective == "local":
                    yield (i, y, x), (row * h + y, col * w + x)  # Eq. 13
                else:
                    yield (i, y, x), (row + y * n_h, col + x * n_w)  # Eq. 16-17


def cut(full: Tensor, grid: Pair, perspective: str) -> Tensor:
    """(H, W, ...) -> (n_H n_W, h, w, ...)"""
    h, w = full.shape[0] // grid[0], full.shape[1] // grid[1]
    tiles = full.new_empty((grid[0] * grid[1], h, w, *full.shape[2:]))
    for (i, y, x), (big_y, big_x) in cells(perspective, grid, (h, w)):
        tiles[i, y, x] = full[big_y, big_x]
    return tiles


def join(tiles: Tensor, grid: Pair, perspective: str) -> Tensor:
    """(n_H n_W, h, w, ...) -> (H, W, ...)"""
    _, h, w, *rest = tiles.shape
    full = tiles.new_empty((grid[0] * h, grid[1] * w, *rest))
    for (i, y, x), (big_y, big_x) in cells(perspective, grid, (h, w)):
        full[big_y, big_x] = tiles[i, y, x]
    return full


def crop(x: Tensor, grid: Pair, perspective: str, data_format: str) -> Tensor:
    """`cut` for any batch dimensions and either place of the channels."""
    batch = x.dim() - 3
    plane = batch + (data_format == "channels_first")
    tiles = cut(x.movedim((plane, plane + 1), (0, 1)), grid, perspective)  # (N, h, w, *batch, C)
    return tiles.movedim((0, 1, 2), (batch, plane + 1, plane + 2))


def recombine(tiles: Tensor, grid: Pair, perspective: str, data_format: str) -> Tensor:
    """`join` for any batch dimensions and either place of the channels."""
    batch = tiles.dim() - 4
    plane = batch + (data_format == "channels_first")
    full = join(tiles.movedim((batch, plane + 1, plane + 2), (0, 1, 2)), grid, perspective)  # (H, W, *batch, C)
    return full.movedim((0, 1), (plane, plane + 1))


# --- The choice of a grid ---------------------------------------------------------------------------------------------


def best_grids(size: Pair, tile: Pair, max_tiles: int) -> list[Pair]:
    """All grids that share the first place by pixels kept, then by canvas not used for them."""
    (height, width), (h, w) = size, tile
    ranked: dict[tuple[Fraction, Fraction], list[Pair]] = {}
    for rows in range(1, max_tiles + 1):
        for cols in range(1, max_tiles // rows + 1):
            side = Fraction(1)  # the factor by which the image shrinks to fit
            while side * height > rows * h or side * width > cols * w:
                side = Fraction(rows * h, height) if side * height > rows * h else Fraction(cols * w, width)
            kept = (side * height) * (side * width)
            ranked.setdefault((-kept, rows * h * cols * w - kept), []).append((rows, cols))
    return ranked[min(ranked)]


# --- Eq. 7 and the other readouts, low pass ---------------------------------------------------------------------------


def read_out(full: Tensor, grid: Pair, readout: str) -> Tensor:
    """(H, W, D) -> (h, w, D), cell by cell."""
    if readout == "none":
        return full
    (n_h, n_w), height, width = grid, full.shape[0], full.shape[1]
    small = full.new_zeros((height // n_h, width // n_w, *full.shape[2:]))
    for y in range(small.shape[0]):
        for x in range(small.shape[1]):
            if readout == "average":
                cell = [full[y * n_h + a, x * n_w + b] for a in range(n_h) for b in range(n_w)]
                small[y, x] = sum(cell[1:], cell[0]) / len(cell)
            elif readout == "centre":
                small[y, x] = full[y * n_h + n_h // 2, x * n_w + n_w // 2]
            else:  # half-pixel centres: output y lies at (y + 1/2) n - 1/2 of the input
                for big_y, a in _linear(y, n_h, height):
                    for big_x, b in _linear(x, n_w, width):
                        small[y, x] += a * b * full[big_y, big_x]
    return small


def _linear(place: int, n: int, length: int) -> list[tuple[int, float]]:
    at = (place + 0.5) * n - 0.5
    low = math.floor(at)
    return [(low, 1 - (at - low)), (min(low + 1, length - 1), at - low)]


def low_pass(full: Tensor, grid: Pair) -> Tensor:
    """(H, W, D): the tent (n - |k|) / n^2 along both axes, the border repeated."""
    (n_h, n_w), height, width = grid, full.shape[0], full.shape[1]
    smooth = torch.zeros_like(full)
    for y in range(height):
        for x in range(width):
            for a in range(1 - n_h, n_h):
                for b in range(1 - n_w, n_w):
                    weight = (n_h - abs(a)) / n_h**2 * (n_w - abs(b)) / n_w**2
                    smooth[y, x] += weight * full[min(max(y + a, 0), height - 1), min(max(x + b, 0), width - 1)]
    return smooth


# --- Eq. 18-27: attention, enhancement, fusion ------------------------------------------------------------------------


def _precise(x: Tensor) -> Tensor:
    """At least float32, as plain torch computes softmax and norms of half-precision tensors."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int = 1, alive: Tensor | None = None) -> Tensor:
    """Eq. 20-21 of one tile: (Q, D), (K, D), (K, D) and optionally which keys count -> (Q, D)"""
    if alive is not None:
        k, v = k[alive], v[alive]
    out = torch.zeros_like(q)
    if k.shape[0] == 0:
        return out
    d = q.shape[-1] // heads
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = _precise(q[:, part] @ k[:, part].T / math.sqrt(d))
        weights = (scores - scores.max(1, keepdim=True).values).exp()
        out[:, part] = (weights / weights.sum(1, keepdim=True)).to(v.dtype) @ v[:, part]
    return out


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def layer_norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    wide = _precise(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / ((centred * centred).mean(-1, keepdim=True) + 1e-5).sqrt()
    return (normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    wide = _precise(x)
    return (wide * (1 + torch.erf(wide / math.sqrt(2))) / 2).to(x.dtype)


def fuse(name: str, v_loc: Tensor, v_glo: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Eq. 26-27 and the rest of Table 5, and the released fusion: two (H, W, D) -> (H, W, D)"""
    if name == "linear_concat":
        return torch.cat([linear(v_glo, weights, "global_proj"), linear(v_loc, weights, "local_proj")], -1)
    if name == "bottleneck_concat":
        parts = [
            linear(gelu(linear(v, weights, f"{side}_bottleneck.0")), weights, f"{side}_bottleneck.2")
            for side, v in (("local", v_loc), ("global", v_glo))
        ]
        return layer_norm(torch.cat(parts, -1) + v_glo + v_loc, weights, "norm")
    if name == "addition":
        return v_glo + v_loc
    if name == "weighted_addition":
        a = 1 / (1 + (-weights["logit"]).exp())
        return a * v_glo + (1 - a) * v_loc
    if name == "multiplication":
        return v_glo * v_loc
    if name == "max_pool":
        return torch.where(v_glo > v_loc, v_glo, v_loc)
    if name == "conv3x3":
        both = torch.cat([v_glo, v_loc], -1)
        height, width = both.shape[:2]
        out = weights["conv.bias"].expand(height, width, -1).clone()
        for y in range(height):
            for x in range(width):
                for a in range(3):
                    for b in range(3):
                        if 0 <= y + a - 1 < height and 0 <= x + b - 1 < width:
                            out[y, x] += weights["conv.weight"][:, :, a, b] @ both[y + a - 1, x + b - 1]
        return out
    raise AssertionError(name)


PAPER: dict[str, Any] = {
    "num_heads": 1,
    "pairing": "paper",
    "share_weights": True,
    "residual": False,
    "fusion": "linear_concat",
    "readout": "average",
    "enhance": "both",
    "source": "dual",
}
RELEASED: dict[str, Any] = PAPER | {
    "num_heads": 8,
    "pairing": "released",
    "residual": True,
    "fusion": "bottleneck_concat",
    "readout": "bilinear",
}


def enhanced_maps(
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    local_tiles: Tensor,
    stride_tiles: Tensor,
    grid: Pair,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """V_loc and V_glo of one image from its tiles (N, h, w, D), and raster masks for keys of either map."""
    f_loc, f_glo = join(local_tiles, grid, "local"), join(stride_tiles, grid, "global")
    if options["source"] == "sum":
        f_loc = f_glo = f_loc + f_glo
        if masks[0] is not None and masks[1] is not None:
            masks = (masks[0] | masks[1],) * 2
    elif options["source"] != "dual":
        f_loc = f_glo = {"local": f_loc, "global": f_glo}[options["source"]]
        masks = (masks[{"local": 0, "global": 1}[options["source"]]],) * 2

    def direction(query: Tensor, key: Tensor, mask: Tensor | None, perspective: str, prefix: str) -> Tensor:
        own = _under(weights, prefix)
        queries, keys = cut(query, grid, perspective), cut(key, grid, perspective)
        alive = None if mask is None else cut(mask, grid, perspective)
        out = []
        for i in range(len(queries)):
            q, k = queries[i].flatten(0, 1), keys[i].flatten(0, 1)
            v = attend(
                linear(q, own, "q_proj"),
                linear(k, own, "k_proj"),
                linear(k, own, "v_proj"),
                options["num_heads"],
                None if alive is None else alive[i].flatten(),
            )
            if "out_proj.weight" in own:
                v = linear(v, own, "out_proj")
            if options["residual"]:
                v = v + q
            if "norm.weight" in own:
                v = layer_norm(v, own, "norm")
            out.append(v.reshape(queries[i].shape))
        return join(torch.stack(out), grid, perspective)

    glo_cut, loc_cut = {"paper": ("global", "local"), "released": ("local", "global")}[options["pairing"]]
    separate = options["enhance"] == "both" and not options["share_weights"]
    return (
        direction(f_loc, f_glo, masks[1], loc_cut, "attentions.1" if separate else "attentions.0"),  # Eq. 22-25
        direction(f_glo, f_loc, masks[0], glo_cut, "attentions.0"),  # Eq. 18-21
    )


def enhance(
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    local_tiles: Tensor,
    stride_tiles: Tensor,
    grid: Pair,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The whole DEM of one image: tiles (N, h, w, D) -> (h, w, D), or the map with readout "none"."""
    v_loc, v_glo = enhanced_maps(options, weights, local_tiles, stride_tiles, grid, masks)
    if options["enhance"] == "both":
        fused = fuse(options["fusion"], v_loc, v_glo, _under(weights, "fusion"))
    else:
        fused = linear({"local": v_loc, "global": v_glo}[options["enhance"]], weights, "fusion")
    out = read_out(fused, grid, options["readout"])
    return out * weights["gate"] if "gate" in weights else out


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in weights.items() if name.startswith(f"{prefix}.")}
