"""Enhance the live tokens: bring them together as tiles, compute each direction, put back, fuse and read out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.arguments import check_size
from dualview.geometry import Perspective, Size, TileGrid
from dualview.kernels.retile import retile
from dualview.kernels.tables import listed, table
from dualview.kernels.tile_attention import tile_attention
from dualview.ops.fusion import LinearConcatFusion
from dualview.ops.planned.live import KEYS_OF_QUERY, AxisCut, DirectionPlan, EnhancePlan
from dualview.ops.planned.products import Arrangement, Products
from dualview.ops.tile_attention import TileAttention
from dualview.ops.tiling import crop, recombine


class TileMap(NamedTuple):
    """A token map as tiles of one perspective, of which some may be absent.

    Attributes:
        tiles: (B, present tiles, h, w, D).
        perspective: How the map is cut.
        present: Which tiles of the grid they are.
    """

    tiles: Tensor
    perspective: Perspective
    present: tuple[int, ...]


def enhance_live(
    plan: EnhancePlan,
    grid: TileGrid,
    products: Products,
    attentions: list[TileAttention],
    fusion: nn.Module,
    maps: Mapping[Perspective, list[TileMap]],
    masks: Mapping[Perspective, Tensor | None],
) -> Tensor:
    """The fused and read out map, from live tokens alone.

    Args:
        plan: The live tokens.
        grid: Rows and columns of tiles.
        products: How they are computed.
        attentions: The attention of each direction of the plan.
        fusion: What merges the directions.
        maps: The maps that play each role; the tokens of two are added.
        masks: Which tokens of the map in each role may be attended to, (B or 1, H, W).

    Shape:
        (B, h, w, D), or (B, H, W, D) if the readout reads everything and averages nothing
    """
    folded: dict[TileAttention, Tensor] = {}  # both directions may share one matrix
    enhanced = []
    for d, a, attention in zip(plan.directions, products.directions, attentions, strict=True):
        if a.fold and attention not in folded:
            folded[attention] = query_key_matrix(attention)
        matrix = folded.get(attention) if a.fold else None
        values = not products.fold_values
        enhanced.append(enhance_direction(plan, d, grid, a, attention, maps, masks, matrix, project=values))
    if products.fold_values:
        return fuse_with_values(cast(LinearConcatFusion, fusion), enhanced, attentions)
    if plan.looks_around:  # the fusion looks around, so it gets whole maps, with zeros where nothing is read
        size = grid.map_size(plan.tokens)
        fused = select(
            select(fusion(*(on_full_map(x, plan, size) for x in enhanced)), 1, plan.read[0]), 2, plan.read[1]
        )
    else:
        fused = fusion(*enhanced)
    return mean_of_cells(fused, plan.tokens) if plan.averages else fused


def enhance_direction(
    plan: EnhancePlan,
    d: DirectionPlan,
    grid: TileGrid,
    a: Arrangement,
    attention: TileAttention,
    maps: Mapping[Perspective, list[TileMap]],
    masks: Mapping[Perspective, Tensor | None],
    folded: Tensor | None,
    *,
    project: bool = True,
) -> Tensor:
    """One enhanced map: its tokens that the fusion reads, or the average of each cell; without W_v unless ``project``.

    Shape:
        (B, live rows, live columns, D), or (B, h, w, D) averaged
    """
    keys_of = KEYS_OF_QUERY[d.query]
    query = _take_sum(maps[d.query], d.query_rows, d.query_cols, d.cut, grid)
    key = _take_sum(maps[keys_of], d.key_rows, d.key_cols, d.cut, grid)
    mask = masks[keys_of]
    if mask is not None:
        live = [i * grid.cols + j for i in d.key_rows.tiles for j in d.key_cols.tiles]
        cut = crop(mask.unsqueeze(-1), grid, d.cut, data_format="channels_last", backend="torch").flatten(2)
        mask = select(cut, 1, live)
    if a == Arrangement():
        return put_back(attention(query, key, mask), d.query_rows, d.query_cols, d.cut, grid)

    cells = Cells(plan, d, grid, a)
    query = cells.group(query)
    collected = attend_arranged(attention, a, query, key, mask, members=cells.members, folded=folded)
    collected = cells.average(collected.flatten(3), inside=True).unflatten(-1, collected.shape[3:])
    if a.absorb and project:
        attended = None
        if mask is not None:
            any_key = mask.any(-1)[:, :, None, None].to(query.dtype)
            attended = cells.average(any_key.expand(-1, -1, query.shape[2], -1))
        collected = project_values(attention, collected, attended)
    tokens = attention.finish(collected.flatten(3), cells.average(query) if attention.residual else query)
    return cells.map_of(tokens)


# --- The products in another order ------------------------------------------------------------------------------------


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
        scale=1.0 if a.fold else float((attention.dim / heads) ** -0.5),
        key_mask=key_mask,
        members=members,
    )


def query_key_matrix(attention: TileAttention) -> Tensor:
    """W_q W_k^T / sqrt(D) of one head, as a weight of `torch.nn.functional.linear`."""
    scaled: Tensor = attention.q_proj.weight * attention.dim**-0.5
    return attention.k_proj.weight.t() @ scaled


def _absorbed_queries(attention: TileAttention, query: Tensor, folded: Tensor | None) -> Tensor:
    """(x W_q + b_q) W_k^T per head, (B, T, Q, heads, D)."""
    weight, bias = attention.k_proj.weight, attention.q_proj.bias
    if folded is not None:
        return F.linear(query, folded, None if bias is None else bias @ weight * attention.dim**-0.5).unsqueeze(-2)
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


# --- The average over cells -------------------------------------------------------------------------------------------


class Cells:
    """Where one direction takes the average of the readout's cells.

    Queries that are averaged inside a tile are put in order first, those of one cell ``members`` apart.
    """

    def __init__(self, plan: EnhancePlan, d: DirectionPlan, grid: TileGrid, a: Arrangement) -> None:
        self.plan, self.d, self.grid, self.pool = plan, d, grid, a.pool
        self.members = plan.cell[0] * plan.cell[1] if a.pool == "cells" else 1

    def group(self, query: Tensor) -> Tensor:
        """Queries of one cell of a tile ``members`` apart. (B, T, Q, D), unchanged"""
        if self.pool != "cells":
            return query
        rows, (r, s) = self.d.query_rows.per_tile // self.plan.cell[0], self.plan.cell
        return rearrange(query, "b t (i r j s) d -> b t (r s i j) d", i=rows, r=r, s=s)

    def average(self, x: Tensor, *, inside: bool = False) -> Tensor:
        """The mean over each cell; ``inside``: of what the attention has already averaged inside. (B, T, Q, C)"""
        d = self.d
        if self.pool is None or (self.pool == "cells" and inside):
            return x
        if self.pool == "cells":
            return cast(Tensor, x.unflatten(2, (self.members, -1)).mean(2))
        if d.cut == "global":  # a cell has one token in every tile, at the same place
            return x.mean(1, keepdim=True)
        whole = put_back(x, d.query_rows, d.query_cols, d.cut, self.grid)
        return mean_of_cells(whole, self.plan.tokens).flatten(1, 2).unsqueeze(1)

    def map_of(self, x: Tensor) -> Tensor:
        """The tokens of all tiles as one map. (B, T, Q, C) -> (B, rows, columns, C)"""
        d = self.d
        if self.pool is None:
            return put_back(x, d.query_rows, d.query_cols, d.cut, self.grid)
        if self.pool == "cells":
            h, w = self.grid.tile_size(self.plan.tokens)
            return recombine(x.unflatten(2, (h, w)), self.grid, "local", data_format="channels_last")
        return cast(Tensor, x.squeeze(1).unflatten(1, self.plan.tokens))


# --- Tokens to tiles and back -----------------------------------------------------------------------------------------


def take_tiles(source: TileMap, rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    """The tokens at ``rows`` x ``cols`` as tiles of perspective ``cut``.

    Shape:
        (B, present tiles, h, w, D) -> (B, tiles, tokens per tile, D)
    """
    wanted = [i * grid.cols + j for i in rows.tiles for j in cols.tiles]
    if rows.whole and cols.whole:
        if source.perspective == cut:
            held = select(source.tiles, 1, [source.present.index(tile) for tile in wanted])
            return held.flatten(2, 3).contiguous()  # which every projection of it would make anew
        if len(source.present) == len(wanted) == grid.num_tiles:
            whole: Tensor = retile(source.tiles, source.perspective, cut, grid)
            return whole.flatten(2, 3)
    index = token_index(source, rows, cols, grid)
    return cast(Tensor, source.tiles.flatten(1, 3).index_select(1, index.flatten()).unflatten(1, index.shape))


def _take_sum(maps: list[TileMap], rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    taken = [take_tiles(tile_map, rows, cols, cut, grid) for tile_map in maps]
    return taken[0] if len(taken) == 1 else taken[0] + taken[1]


def put_back(tiles: Tensor, rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    """What `take_tiles` took, with new contents, as the map of the live rows and columns.

    Shape:
        (B, tiles, tokens per tile, D) -> (B, live rows, live columns, D)
    """
    split = tiles.unflatten(2, (rows.per_tile, cols.per_tile))
    if rows.whole and cols.whole and tiles.shape[1] == grid.num_tiles:
        return recombine(split, grid, cut, data_format="channels_last")
    plane = split.unflatten(1, (len(rows.tiles), len(cols.tiles))).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return select(select(plane, 1, rows.index), 2, cols.index)


def token_index(source: TileMap, rows: AxisCut, cols: AxisCut, grid: TileGrid) -> Tensor:
    """Which of all tokens of a map `take_tiles` takes: (tiles, tokens per tile)."""
    size = check_size(source.tiles.shape[2:4], "token map")
    return table(_token_index, source.perspective, source.present, rows, cols, grid, size, like=source.tiles)


def _token_index(
    device: torch.device,
    perspective: Perspective,
    present: tuple[int, ...],
    rows: AxisCut,
    cols: AxisCut,
    grid: TileGrid,
    size: Size,
) -> Tensor:
    tokens = torch.full((grid.num_tiles, *size, 1), -1, device=device)
    tokens[list(present)] = torch.arange(len(present) * size[0] * size[1], device=device).view(-1, *size, 1)
    plane = retile(tokens, perspective, "raster", grid, backend="torch").squeeze(-1)
    plane = plane[list(rows.positions)][:, list(cols.positions)]
    return rearrange(plane, "(i u) (j v) -> (i j) (u v)", i=len(rows.tiles), j=len(cols.tiles))


def on_full_map(plane: Tensor, plan: EnhancePlan, size: Size) -> Tensor:
    """The live tokens on a map of zeros. (B, fused rows, fused columns, D) -> (B, H, W, D)"""
    if plane.shape[1:3] == size:
        return plane
    rows, cols = (table(listed, positions, like=plane) for positions in plan.fused)
    full = plane.new_zeros(plane.shape[0], *size, plane.shape[-1])
    full[:, rows[:, None], cols] = plane
    return full


def mean_of_cells(plane: Tensor, size: Size) -> Tensor:
    """The mean of the tokens read of each cell. (..., h * r, w * c, D) -> (..., h, w, D)"""
    if tuple(plane.shape[-3:-1]) == size:
        return plane
    return reduce(plane, "... (h r) (w c) d -> ... h w d", "mean", h=size[0], w=size[1])


def select(x: Tensor, dim: int, wanted: list[int] | tuple[int, ...]) -> Tensor:
    """Entries of one dimension; a view, or ``x`` itself, where they are consecutive."""
    first = wanted[0] if wanted else 0
    if list(wanted) == list(range(first, first + len(wanted))):
        return x if len(wanted) == x.shape[dim] else x.narrow(dim, first, len(wanted))
    return x.index_select(dim, table(listed, tuple(wanted), like=x))
