"""The attention of one direction with its products in another order (`Arrangement`).

Tokens of tiles are (B, T, Q, D). Where averages are taken inside, the result holds one token for each cell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dualview.kernels.tile_attention import tile_attention
from dualview.ops.fusion import LinearConcatFusion
from dualview.ops.planned.products import Arrangement
from dualview.ops.tile_attention import TileAttention


def attend_arranged(
    attention: TileAttention,
    a: Arrangement,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    *,
    members: int,
    folded: Tensor | None,
) -> Tensor:
    """What every query, or every average of queries, collects: of the projected values, or of the keys themselves.

    Args:
        attention: The layers.
        a: The order of the products.
        query: Queries; those that are averaged over cells stand ``members`` apart.
        key: Keys.
        key_mask: True where a key may be attended to.
        members: Queries of a cell that ask one tile, 1 where none are averaged inside it.
        folded: W_q W_k^T, with ``a.fold``.

    Shape:
        - query: (B, T, members * G, D); key: (B, T, K, D); key_mask: (B or 1, T, K)
        - result: (B, T, G, heads, D / heads), or (..., heads, D) absorbed; T is 1 if averaged over tiles
    """
    heads = attention.num_heads
    if a.absorb:  # all heads ask the same keys
        q = _absorbed_queries(attention, query, folded)
        k = v = key.unsqueeze(-2)
    else:
        q, k, v = (
            projected.unflatten(-1, (heads, -1))
            for projected in (attention.q_proj(query), attention.k_proj(key), attention.v_proj(key))
        )
    return tile_attention(
        q,
        k,
        v,
        scale=float((attention.dim / heads) ** -0.5),
        key_mask=key_mask,
        members=members,
        over_tiles=a.pool == "tiles",
    )


def query_key_matrix(attention: TileAttention) -> Tensor:
    """W_q W_k^T of one head, as a weight of `torch.nn.functional.linear`."""
    return attention.k_proj.weight.t() @ attention.q_proj.weight


def _absorbed_queries(attention: TileAttention, query: Tensor, folded: Tensor | None) -> Tensor:
    """(x W_q + b_q) W_k^T per head, (B, T, Q, heads, D)."""
    weight, bias = attention.k_proj.weight, attention.q_proj.bias
    if folded is not None:
        return F.linear(query, folded, None if bias is None else bias @ weight).unsqueeze(-2)
    q = attention.q_proj(query).unflatten(-1, (attention.num_heads, -1))
    return torch.einsum("btqhe,hed->btqhd", q, weight.unflatten(0, (attention.num_heads, -1)))


def project_values(attention: TileAttention, collected: Tensor, attended: Tensor | None) -> Tensor:
    """(P y) W_v + b_v per head, for keys that were collected unprojected.

    The rows of P sum to one; ``attended`` is their sum, where some have no key and sum to zero.

    Shape:
        collected: (..., heads, D), attended: (..., 1) -> (..., heads, D / heads)
    """
    weight = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
    values = torch.einsum("...hd,hed->...he", collected, weight)
    if attention.v_proj.bias is None:
        return values
    bias: Tensor = attention.v_proj.bias
    if attention.k_proj.bias is not None:  # the softmax drops it: its gradient is zero, but there is one
        bias = bias + 0 * attention.k_proj.bias.sum()
    bias = bias.unflatten(0, (attention.num_heads, -1)).to(values.dtype)  # as under autocast
    return values + bias if attended is None else values + attended.to(values.dtype).unsqueeze(-1) * bias


def fuse_with_values(fusion: LinearConcatFusion, collected: list[Tensor], attentions: list[TileAttention]) -> Tensor:
    """Linear concatenation of what was collected of keys, W_v folded into its layers; local first. (..., D)"""
    (local, of_global), (v_loc, v_glo) = attentions, collected
    halves = (
        F.linear(collected_keys, half.weight @ attention.v_proj.weight, half.bias)
        for collected_keys, half, attention in (
            (v_glo, fusion.global_proj, of_global),
            (v_loc, fusion.local_proj, local),
        )
    )
    return torch.cat(list(halves), dim=-1)
