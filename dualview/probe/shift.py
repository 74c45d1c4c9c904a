"""The encoder's domain shift on stride tiles: how their features differ from those of a thumbnail of equal scale.

A stride tile of n x n samples every n-th pixel; its token covers the same 14n x 14n pixels as that of the page reduced
n times, and as n x n tokens of local tiles. An encoder that took the aliased samples as well as the reduced page would
make the same token of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.ops.low_pass import low_pass
from dualview.ops.tiling import crop, recombine
from dualview.probe.draws import Draw, Drawn
from dualview.probe.features import Encode, thumbnail
from dualview.probe.glyphs import NAMES, Array

PATCH = 14
STRIDES = (1, 2, 3, 4)
KINDS = ("thumbnail", "stride", "smoothed stride")


@torch.no_grad()
def domain_shift(
    encode: Encode,
    train: Drawn,
    test: Drawn,
    *,
    strides: tuple[int, ...] = STRIDES,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """A row for each stride and kind of tile, from pages to fit on and pages to test on.

    Decoder and classifier are ridge regressions, fitted to thumbnail tokens of the training pages, as an encoder's
    readers are fitted to ordinary pictures: a token's patch of grey pixels, and the glyph whose middle lies in the
    middle of its patch. Both are tested on pages with other glyphs and photographs.

    Returns:
        mean_shift: Distance between the mean tokens, in standard deviations of the thumbnail's, root mean square.
        spread: Standard deviation over the thumbnail's, mean of the channels.
        cosine_thumbnail: Mean cosine to the thumbnail's token of the same region.
        cosine_local: Mean cosine to the mean of the local tokens of the same region.
        reconstruction: Mean square error of the decoded patch over the variance of the patches.
        accuracy: Of the classifier.
        accuracy_own: Of one that is fitted to this kind of tile.
    """
    rows = []
    drawn = [(draw, [pages for pages, _ in chunks]) for draw, chunks in (train, test)]
    for n in strides:
        fitted = [_tokens(encode, draw, chunks, n, device) for draw, chunks in drawn]
        (known, known_labels), (seen, labels) = fitted
        decoder = _ridge(known["thumbnail"], known["thumbnail patches"])
        reader = _reader(known["thumbnail"], known_labels)
        thumb = seen["thumbnail"]
        mean, deviation = thumb.mean(0), thumb.std(0).clamp_min(1e-6)
        for kind in KINDS:
            tokens, patches = seen[kind], seen[f"{kind} patches"]
            own = _reader(known[kind], known_labels)
            error = (_apply(decoder, tokens) - patches).square().mean()
            rows.append(
                {
                    "stride": n,
                    "kind": kind,
                    "mean_shift": float(((tokens.mean(0) - mean) / deviation).square().mean().sqrt()),
                    "spread": float((tokens.std(0) / deviation).mean()),
                    "cosine_thumbnail": float(F.cosine_similarity(tokens, thumb, dim=-1).mean()),
                    "cosine_local": float(F.cosine_similarity(tokens, seen["local"], dim=-1).mean()),
                    "reconstruction": float(error / patches.var()),
                    "accuracy": _accuracy(reader, tokens, labels),
                    "accuracy_own": _accuracy(own, tokens, labels),
                    "glyphs": int((labels >= 0).sum()),
                }
            )
    return rows


def _tokens(
    encode: Encode, draw: Draw, chunks: list[Array], n: int, device: torch.device | str
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens and grey patches by kind, one of n x n stride tiles for each page, and the glyph that each token shows."""
    parts: dict[str, list[Tensor]] = {}
    for pages in chunks:
        pixels = torch.from_numpy(pages).to(device).float() / 255
        which = torch.arange(len(pixels), device=device) % (n * n)
        page = torch.arange(len(pixels), device=device)
        tiles = {
            "thumbnail": thumbnail(pixels, n),
            "stride": crop(pixels, (n, n), "global")[page, which],
            "smoothed stride": crop(low_pass(pixels, (n, n)), (n, n), "global")[page, which],
        }
        for kind, images in tiles.items():
            parts.setdefault(kind, []).append(encode(images).flatten(0, 2).float())
            grey = F.pixel_unshuffle(images.mean(1, keepdim=True), PATCH)
            parts.setdefault(f"{kind} patches", []).append(grey.movedim(1, -1).flatten(0, 2))
        local = crop(pixels, (n, n), "local")
        tokens = encode(local.flatten(0, 1)).unflatten(0, local.shape[:2])
        whole = recombine(tokens, (n, n), "local", data_format="channels_last").movedim(-1, 1).float()
        parts.setdefault("local", []).append(F.avg_pool2d(whole, n).movedim(1, -1).flatten(0, 2))
    labels = torch.cat([_labels(draw, i, n) for i in range(draw.count)]).to(device)
    return {kind: torch.cat(of) for kind, of in parts.items()}, labels


def _labels(draw: Draw, index: int, n: int) -> Tensor:
    """For each token of a page reduced n times the class of the glyph in the middle of its patch, or -1."""
    side, reach = draw.pixels // (PATCH * n), PATCH * n
    labels = torch.full((side, side), -1)
    for glyph in draw.scene(index).glyphs:
        off = [abs(p % reach - reach / 2) for p in (glyph.y, glyph.x)]
        if max(off) <= reach / 4 and not glyph.hidden:
            labels[glyph.y // reach, glyph.x // reach] = glyph.name
    return labels.flatten()


def _ridge(x: Tensor, y: Tensor, decay: float = 1e-3) -> Tensor:
    x = F.pad(x, (0, 1), value=1).double()
    gram = x.T @ x
    gram += decay * gram.diagonal().mean() * torch.eye(len(gram), device=x.device)
    weights: Tensor = torch.linalg.solve(gram, x.T @ y.double())
    return weights


def _apply(weights: Tensor, x: Tensor) -> Tensor:
    return (F.pad(x, (0, 1), value=1).double() @ weights).float()


def _reader(tokens: Tensor, labels: Tensor) -> Tensor:
    return _ridge(tokens[labels >= 0], F.one_hot(labels[labels >= 0], len(NAMES)))


def _accuracy(reader: Tensor, tokens: Tensor, labels: Tensor) -> float:
    named = _apply(reader, tokens[labels >= 0]).argmax(-1)
    return float((named == labels[labels >= 0]).float().mean())
