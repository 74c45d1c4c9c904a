"""Cross-attention between corresponding tiles of two maps."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from dualview.arguments import check_choice, check_count, check_flags
from dualview.kernels import tile_attention as kernel
from dualview.tensors import check_mask, check_queries, check_width
from dualview.views import per_token

Init: TypeAlias = Literal["xavier", "identical"]


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend from every tile of one map to the tile of the same index of another (Eq. 20-21, 24-25).

    softmax(Q K^T / sqrt(D / num_heads)) V, for each tile and head on its own.

    Args:
        query: Projected queries.
        key: Projected keys.
        value: Projected values.
        num_heads: Number of heads that share the width D.
        key_mask: True where a key may be attended to. A tile without any such key gives zeros.

    Shape:
        - query: (..., Q, D); key, value: (..., K, D); key_mask: broadcastable to (..., K)
        - result: (..., Q, D)

    Raises:
        ValueError: The widths or leading dimensions differ, or D is no multiple of ``num_heads``.
        TypeError: One of the three is no tensor.

    Example:
        >>> q, kv = torch.randn(2, 6, 20, 32), torch.randn(2, 6, 20, 32)
        >>> tile_attention(q, kv, kv, num_heads=4).shape
        torch.Size([2, 6, 20, 32])
    """
    check_queries(None, None, query=query, key=key, value=value)
    num_heads = check_count(num_heads, "num_heads", divisor_of=query.shape[-1])

    def by_tile(x: Tensor) -> Tensor:
        """(images, tiles, ...): two leading dimensions stay as they are, others count as tiles of one image."""
        return x if query.dim() == 4 else x.reshape(1, -1, *x.shape[query.dim() - 2 :])

    q, k, v = (by_tile(x).unflatten(-1, (num_heads, -1)) for x in (query, key, value))
    means = "keys that may be attended to"
    mask = None if key_mask is None else by_tile(check_mask(key_mask, "key_mask", [key.shape[:-1]], key, means, True))
    scale = float((query.shape[-1] / num_heads) ** -0.5)
    attended = kernel.tile_attention(q, k, v, scale=scale, key_mask=mask)
    return attended.reshape(query.shape)


class TileAttention(nn.Module):
    """Projections, [`tile_attention`][dualview.tile_attention], and what follows it up to the enhanced tile.

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
        check_flags(bias=bias, out_proj=out_proj, residual=residual, norm=norm)
        self.dim = dim = check_width(dim, device, dtype)
        self.num_heads, self.residual = check_count(num_heads, "num_heads", divisor_of=dim), residual
        self.init = check_choice(init, "init", get_args(Init))

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

    def forward(self, query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Enhance the tiles of one map by those of another.

        Args:
            query: Tiles that ask.
            key: Tiles that answer.
            key_mask: True where a key may be attended to.

        Shape:
            query: (..., Q, D), key: (..., K, D), key_mask: broadcastable to (..., K) -> (..., Q, D)

        Raises:
            ValueError: The widths or leading dimensions do not fit each other.
        """
        check_queries(self, self.dim, query=query, key=key)
        q, k, v = per_token(self.q_proj, query), per_token(self.k_proj, key), per_token(self.v_proj, key)
        return self.finish(tile_attention(q, k, v, num_heads=self.num_heads, key_mask=key_mask), query)

    def finish(self, attended: Tensor, query: Tensor) -> Tensor:
        """What follows the attention: output projection, residual and norm, as far as there are any. (..., Q, D)"""
        if self.out_proj is not None:
            attended = per_token(self.out_proj, attended)
        if self.residual:
            attended = attended + query
        return attended if self.norm is None else self.norm(attended)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, residual={self.residual}, init={self.init!r}"
