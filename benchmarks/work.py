"""Operations and bytes that a computation cannot do without: what the limits of the machine are applied to.

Operations are those of the matrix products of the plan, 2 per multiply-addition. Bytes are those of every live input,
weight and output, moved once. Softmax, norms, activations and intermediate results are not counted, so a limit is
below what can be reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from dualview import DualPerspectiveEnhance

Backward = Literal["none", "weights", "all"]


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    operations: float = 0
    moved: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.moved + other.moved)


class Product(NamedTuple):
    """One kind of matrix product: multiply-additions, and how many of its two operands are features as given."""

    macs: float
    given: int = 0


def operations(products: list[Product], backward: Backward) -> float:
    """2 per multiply-addition; backward the same again per operand that has a gradient."""

    def times(product: Product) -> int:
        return 1 + {"none": 0, "weights": 2 - product.given, "all": 2}[backward]

    return 2 * sum(product.macs * times(product) for product in products)


def copy(elements: int, itemsize: int) -> Work:
    """Every element read once and written once."""
    return Work(moved=2 * elements * itemsize)


def dem(
    module: DualPerspectiveEnhance, grid: tuple[int, int], tokens: tuple[int, int], batch: int, itemsize: int,
    backward: Backward = "none",
) -> Work:  # fmt: skip
    """The planned DEM: q queries against p keys in each of t tiles, k = t p keys, r rows read out, width d, g heads.

    projected: q d^2 + 2 k d^2 (queries, keys, values) + 2 q p d (scores, values)
    absorbed:  2 q d^2 (queries, into key space; q d^2, and d^3 once, where W_q W_k^T is multiplied out) + 2 q p d g
    (scores, collecting keys) + o d^2 (values of what is left after pooling, o = q without); pooled over the cells of a
    tile, only o rows of attention meet the values.
    Then o d^2 for an output projection; the fusion is d^2 a token (linear), or 2 (d d/16 + d/16 d/2) = 3 d^2 / 16.
    """
    with torch.set_grad_enabled(backward != "none"):
        plan, chosen = module.plan(grid, tokens), module.products(grid, tokens, next(module.parameters()))
    d, attention = module.dim, module.attentions[0]
    products = []
    for way, a in zip(plan.directions, chosen.directions, strict=True):
        q, p = batch * way.num_tiles * way.queries, way.keys
        out = batch * tokens[0] * tokens[1] if a.pool else q
        collected = out if a.pool == "cells" else q
        products.append(Product(q * d * d, given=1))
        if a.absorb:
            products += [Product(0 if a.fold else q * d * d), Product(out * d * d)]
            products.append(Product((q + collected) * p * d * attention.num_heads, given=1))
        else:
            products.append(Product(2 * batch * way.num_tiles * p * d * d, given=1))
            products.append(Product((q + collected) * p * d))
        if attention.out_proj is not None:
            products.append(Product(out * d * d))
    if any(a.fold for a in chosen.directions):
        products.append(Product(d**3 * len(module.attentions)))
    fused = batch * (tokens[0] * tokens[1] if chosen.directions[0].pool else len(plan.fused[0]) * len(plan.fused[1]))
    products.append(Product(fused * d * d * (3 / 16 if isinstance(module.fusion, _bottleneck()) else 1)))
    cell = batch * tokens[0] * tokens[1] * d
    features = (len(plan.live.local) + len(plan.live.stride)) * cell
    weights = sum(p.numel() for p in module.parameters())
    again = {"none": 0, "weights": weights, "all": weights + features}[backward]  # gradients are written
    return Work(operations(products, backward), itemsize * (features + weights + cell + again))


def _bottleneck() -> type[nn.Module]:
    from dualview import BottleneckConcatFusion

    return BottleneckConcatFusion


def vit(tower: nn.Module, layers: int, images: int, itemsize: int) -> Work:
    """A vision transformer: per layer 4 T d^2 (projections) + 2 T d m (MLP) + 2 T^2 d; patches of p^2 pixels."""
    c = tower.config
    patches = (c.image_size // c.patch_size) ** 2
    tokens, d = patches + 1, c.hidden_size
    layer = 4 * tokens * d * d + 2 * tokens * d * c.intermediate_size + 2 * tokens * tokens * d
    macs = images * (layers * layer + patches * 3 * c.patch_size**2 * d)
    weights = layers * (4 * d * d + 2 * d * c.intermediate_size)
    return Work(2 * macs, itemsize * (weights + images * (3 * c.image_size**2 + tokens * d)))


def mlp(rows: int, width: int, out: int, itemsize: int) -> Work:
    """Linear(width, out), activation, Linear(out, out)."""
    weights = width * out + out * out
    return Work(2 * rows * weights, itemsize * (weights + rows * (width + out)))
