"""Cross-attention between corresponding tiles of two maps."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.kernels.dispatch import Backend
from dualview.ops.attend import attend_rows
from dualview.ops.gather import Pooling

Init: TypeAlias = Literal["xavier", "identical"]


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    key_mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attend from every tile of one map to the tile of the same index of another (Eq. 20-21, 24-25).

    softmax(Q K^T / sqrt(D / num_heads)) V, for each tile and head on its own.

    Args:
        query: Projected queries.
        key: Projected keys.
        value: Projected values.
        num_heads: Number of heads that share the width D.
        key_mask: True where a key may be attended to. A tile without any such key gives zeros.
        backend: "auto", "torch" or "triton"; None for what [`use_backend`][dualview.use_backend] says.

    Shape:
        - query: (..., Q, D); key, value: (..., K, D); key_mask: broadcastable to (..., K)
        - result: (..., Q, D)

    Raises:
        ValueError: The widths or leading dimensions differ, or D is no multiple of ``num_heads``.
        RuntimeError: "triton" was asked for and cannot run.

    Example:
        >>> q, kv = torch.randn(2, 6, 20, 32), torch.randn(2, 6, 20, 32)
        >>> tile_attention(q, kv, kv, num_heads=4).shape
        torch.Size([2, 6, 20, 32])
    """
    if key.shape != value.shape or query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"tile_attention got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: key "
            "and value must have one shape, and the query the same leading dimensions and width."
        )
    if num_heads < 1 or query.shape[-1] % num_heads:
        raise ValueError(f"num_heads={num_heads} must be a positive divisor of the width {query.shape[-1]}.")

    rows = [x[None].flatten(0, -3).unflatten(-1, (num_heads, -1)).transpose(1, 2)[None] for x in (query, key, value)]
    mask = None if key_mask is None else key_mask.expand(key.shape[:-1]).reshape(1, -1, key.shape[-2])
    scale = float((query.shape[-1] / num_heads) ** -0.5)
    attended = attend_rows(rows[0], rows[1], rows[2], mask, scale, backend=backend)
    return attended[0].transpose(1, 2).reshape(query.shape)


class TileAttention(nn.Module):
    """Projections, [`tile_attention`][dualview.tile_attention], and what follows it up to the enhanced tile.

    The call takes what a plan decides, none of which changes the result: ``absorb`` projects the queries into key space
    in place of the keys, with one matrix if that is given as ``folded``; ``pool`` averages inside. ``project=False``
    stops before W_v, for one head and where nothing else follows. With ``key_at``, ``key`` holds tokens in any order,
    (B, tokens, D), of which those at ``key_at`` (T, K) are the keys of each tile.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of heads.
        bias: Whether the projections have biases.
        out_proj: Whether a linear layer follows the attention.
        residual: Whether the unprojected query is added.
        norm: Whether a LayerNorm (eps 1e-5) comes last.
        init: "xavier" draws each projection on its own; "identical" starts all of them from one draw, as the released
            training code does.
        device: Where to make the parameters.
        dtype: Type of the parameters.

    Shape:
        query: (..., Q, D), key: (..., K, D), key_mask: broadcastable to (..., K) -> (..., Q, D)

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``init`` is unknown.

    Example:
        >>> TileAttention(32, num_heads=4)(torch.randn(1, 6, 20, 32), torch.randn(1, 6, 20, 32)).shape
        torch.Size([1, 6, 20, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        bias: bool = False,
        out_proj: bool = False,
        residual: bool = False,
        norm: bool = False,
        init: Init = "xavier",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive divisor of dim={dim}, and that at least 1.")
        if init not in ("xavier", "identical"):
            raise ValueError(f'init={init!r}: must be "xavier" or "identical".')
        self.num_heads, self.residual, self.init = num_heads, residual, init

        def linear() -> nn.Linear:
            return nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(), linear(), linear()
        self.out_proj = linear() if out_proj else None
        self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier uniform, biases zero."""
        projections = [p for p in (self.q_proj, self.k_proj, self.v_proj, self.out_proj) if p is not None]
        for projection in projections:
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
            if self.init == "identical":
                with torch.no_grad():
                    projection.weight.copy_(projections[0].weight)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None = None,
        *,
        key_at: Tensor | None = None,
        absorb: bool = False,
        folded: Tensor | None = None,
        pool: Pooling | None = None,
        project: bool = True,
    ) -> Tensor:
        if query.dim() != 4:  # any leading dimensions count as tiles
            queries, keys = (x[None].flatten(0, -3)[None] for x in (query, key))
            mask = None if key_mask is None else key_mask.expand(key.shape[:-1]).reshape(1, -1, key.shape[-2])
            tiles = self.forward(queries, keys, mask, absorb=absorb, folded=folded, project=project)
            return tiles.reshape(query.shape)
        if key_mask is not None and key_at is None:
            key_mask = key_mask.expand(key_mask.shape[0] if key_mask.dim() == 3 else 1, *key.shape[1:3])
        attended = self._attend(query, key, key_mask, key_at, absorb=absorb, folded=folded, pool=pool)
        if absorb and project:
            attended = self._project_values(attended, query, key_mask, pool)
        enhanced: Tensor = attended.flatten(-2)
        if self.out_proj is not None:
            enhanced = self.out_proj(enhanced)
        if self.residual:
            enhanced = enhanced + (query if pool is None else pool.tokens(query))
        return enhanced if self.norm is None else self.norm(enhanced)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None,
        key_at: Tensor | None,
        *,
        absorb: bool,
        folded: Tensor | None,
        pool: Pooling | None,
    ) -> Tensor:
        """What every query and head collects: of the values, or if absorbed of the keys as they are.

        Shape:
            (B, T, Q, D), (B, T, K, D) -> (B, T, Q, heads, D / heads), or (..., heads, D) if absorbed
        """
        scale = float((query.shape[-1] / self.num_heads) ** -0.5)
        if absorb:  # all heads ask the same keys
            shared = key.unsqueeze(2) if key_at is None else key
            rows = self._absorbed_queries(query, folded)
            per_head = attend_rows(rows, shared, shared, key_mask, scale, pool, key_at)
        else:
            q, k, v = (
                x.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
                for x in (self.q_proj(query), self.k_proj(key), self.v_proj(key))
            )
            per_head = attend_rows(q, k, v, key_mask, scale, pool)
        by_query: Tensor = per_head.transpose(2, 3)
        return (
            by_query
            if pool is None or pool.inside
            else pool.tokens(by_query.flatten(-2)).unflatten(-1, by_query.shape[-2:])
        )

    @property
    def value_matrix(self) -> Tensor | None:
        """W_v, if it alone follows the softmax: one head, and no bias, output projection, residual or norm."""
        after = (self.v_proj.bias, self.out_proj, self.norm)
        alone = self.num_heads == 1 and not self.residual and all(part is None for part in after)
        return self.v_proj.weight if alone else None

    @property
    def query_key_matrix(self) -> Tensor:
        """W_q W_k^T of one head, as a weight of `torch.nn.functional.linear`."""
        return self.k_proj.weight.t() @ self.q_proj.weight

    def _absorbed_queries(self, query: Tensor, folded: Tensor | None) -> Tensor:
        """(q W_q + b_q) W_k^T per head, (B, T, heads, Q, D): the keys then need no projection.

        Their bias b_k would add one constant to all scores of a query, which the softmax drops.
        """
        weight = self.k_proj.weight
        if folded is not None:
            bias = None if self.q_proj.bias is None else self.q_proj.bias @ weight
            return F.linear(query, folded, bias).unsqueeze(2)
        q = self.q_proj(query).unflatten(-1, (self.num_heads, -1))
        return torch.einsum("btqhe,hed->bthqd", q, weight.unflatten(0, (self.num_heads, -1)))

    def _project_values(self, attended: Tensor, query: Tensor, key_mask: Tensor | None, pool: Pooling | None) -> Tensor:
        """(P x) W_v + b_v per head, for the rows of P sum to one; where all keys are masked they sum to zero."""
        weight = self.v_proj.weight.unflatten(0, (self.num_heads, -1))
        values = torch.einsum("btqhd,hed->btqhe", attended, weight)
        if self.v_proj.bias is None:
            return values
        bias: Tensor = self.v_proj.bias.unflatten(0, (self.num_heads, -1)).to(values.dtype)  # as under autocast
        if key_mask is None:
            return values + bias
        sums = key_mask.any(-1)[:, :, None, None].to(values.dtype).expand(*query.shape[:3], 1)
        return values + (sums if pool is None else pool.tokens(sums)).unsqueeze(-1) * bias

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, residual={self.residual}, init={self.init!r}"
