"""Enhance the live tokens: bring them together as tiles, compute each direction, put back, fuse and read out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import NamedTuple, cast

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.arguments import check_size
from dualview.geometry import Perspective, Size, TileGrid
from dualview.kernels.chunked_attention import chunks
from dualview.kernels.retile import move_of, retile, takes_kernel
from dualview.kernels.tables import index_tensor, table
from dualview.kernels.tile_attention import tile_attention
from dualview.ops.fusion import BottleneckConcatFusion, LinearConcatFusion, fuse
from dualview.ops.planned.live import KEYS_OF_QUERY, AxisCut, DirectionPlan, EnhancePlan
from dualview.ops.planned.products import Arrangement, Products, plain_bottlenecks
from dualview.ops.tile_attention import TileAttention
from dualview.ops.tile_attention import tile_attention as attend
from dualview.views import per_token

LEAST_ROWS = 192
"""Of a product with a weight, on a CPU: 64 rows times 1024 x 1024 make 135 G operations/s, 192 make 160."""


class TileMap(NamedTuple):
    """A token map as tiles of one perspective; some may be absent.

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
    if products.together and all(mask is None for mask in masks.values()):
        if not products.fold_values:
            return enhance_together(plan, grid, attentions[0], fusion, maps)
        tiles, cut, _ = maps["local"][0]
        move = move_of(tiles, cut, KEYS_OF_QUERY[cut], "channels_last", "tiles", grid)
        # A backward pass would have to join the gradients of what was joined here: one more copy of both maps.
        if not torch.is_grad_enabled() and not takes_kernel(tiles, move):
            return enhance_folded(plan, grid, attentions[0], cast(LinearConcatFusion, fusion), maps)
    ways = list(zip(plan.directions, products.directions, attentions, strict=True))
    # Both directions may share one matrix.
    folded = {layers: query_key_matrix(layers) for layers in dict.fromkeys(x for _, a, x in ways if a.fold)}
    enhanced = [
        enhance_direction(
            plan, d, grid, a, layers, maps, masks, folded[layers] if a.fold else None, project=not products.fold_values
        )
        for d, a, layers in ways
    ]
    if products.fold_values:
        return fuse_with_values(cast(LinearConcatFusion, fusion), enhanced, attentions)
    if plan.looks_around:  # the fusion gets whole maps, with zeros where nothing is read
        size = grid.map_size(plan.tokens)
        fused = fuse(fusion, *(on_full_map(x, plan, size) for x in enhanced))
        fused = select(select(fused, 1, plan.read[0]), 2, plan.read[1])
    else:
        fused = fuse(fusion, *enhanced)
    return fused if plan.cell == (1, 1) else mean_of_cells(fused, plan.tokens)


def enhance_together(
    plan: EnhancePlan,
    grid: TileGrid,
    attention: TileAttention,
    fusion: nn.Module,
    maps: Mapping[Perspective, list[TileMap]],
) -> Tensor:
    """The same where one token of each cell is read, with the queries of both directions in one tensor, V_loc first.

    One direction asks one tile: its keys are the tokens that ask in the other direction.
    """
    asking = torch.stack(  # (2, B, h * w, D), in the order of local tiles
        [reduce(torch.add, [read_tokens(of, plan, grid) for of in maps[d.query]]) for d in plan.directions]
    ).flatten(2, -2)
    found = []
    for d, q, other in zip(plan.directions, per_token(attention.q_proj, asking), (asking[1], asking[0]), strict=True):
        key = other.unsqueeze(1)
        if d.num_tiles > 1:
            (key,) = take_tiles(maps[KEYS_OF_QUERY[d.query]], d.key_rows, d.key_cols, d.cut, grid)
        asked, k, v = q.unflatten(1, (d.num_tiles, d.queries)), attention.k_proj(key), attention.v_proj(key)
        found.append(attend(asked, k, v, num_heads=attention.num_heads).flatten(1, 2))
    both = attention.finish(torch.stack(found), asking)
    tiles = grid.num_tiles, *grid.tile_size(plan.tokens)
    if plain_bottlenecks(fusion, both):
        fused = fuse_together(cast(BottleneckConcatFusion, fusion), both)
        return retile(fused.unflatten(1, tiles), "local", "raster", grid)
    return fuse(fusion, *retile(both.unflatten(2, tiles), "local", "raster", grid))


def enhance_folded(
    plan: EnhancePlan,
    grid: TileGrid,
    attention: TileAttention,
    fusion: LinearConcatFusion,
    maps: Mapping[Perspective, list[TileMap]],
) -> Tensor:
    """The same where every token asks, and all weights fold into two matrices that both directions share.

    The keys of both directions are brought into one tensor, where they meet W_k W_q^T in one product.
    """
    folded, values = product_of_weights(attention, fusion)
    answering = [
        reduce(torch.add, [in_cut(x, d.cut, grid) for x in maps[KEYS_OF_QUERY[d.query]]]) for d in plan.directions
    ]
    keys = torch.stack(answering).flatten(4, 7).flatten(2, 3).unsqueeze(-2)
    # One product that scales, too; its first operand is as in `query_key_matrix`.
    asked = torch.addmm(folded[0], keys.flatten(0, -2), folded.t(), beta=0, alpha=attention.dim**-0.5).view(keys.shape)
    (h, w), halves = grid.tile_size(plan.tokens), []
    averages = {  # of the cells in a tile; or over the tiles, each with one token of every cell
        "local": ((h, grid.rows, w, grid.cols), 0, "(b i j u v) d"),
        "global": (None, grid.num_tiles, "(b i u j v) d"),
    }
    for d, k, v, weight in zip(plan.directions, asked, keys, values.chunk(2), strict=True):
        (query,) = take_tiles(maps[d.query], d.query_rows, d.query_cols, d.cut, grid)
        cells, tiles, order = averages[d.cut]
        found = tile_attention(query.unsqueeze(-2), k, v, scale=1.0, cells=cells, tiles=tiles).flatten(0, -2)
        halves.append(
            einops.rearrange(F.linear(found, weight), f"{order} -> b i u j v d", i=grid.rows, j=grid.cols, u=h, v=w)
        )
    return torch.cat(halves[::-1], -1).flatten(3, 4).flatten(1, 2)


def in_cut(source: TileMap, cut: Perspective, grid: TileGrid) -> Tensor:
    """All tokens of a map as tiles of a perspective, where tiles hold whole cells: a view, with all factors of h and w.

    Those of a global tile stand cell by cell of its own, not row by row: as keys they may.

    Shape:
        (B, tiles, h, w, D) -> (B, rows, cols, h / rows, rows, w / cols, cols, D)
    """
    tiles = select(source.tiles, 1, [source.present.index(tile) for tile in range(grid.num_tiles)])
    here = {"local": "(i j) (u y) (v x)", "global": "(y x) (i u) (j v)"}[source.perspective]
    there = {"local": "i j u y v x", "global": "y x u i v j"}[cut]
    return einops.rearrange(tiles, f"b {here} d -> b {there} d", i=grid.rows, y=grid.rows, j=grid.cols, x=grid.cols)


def read_tokens(source: TileMap, plan: EnhancePlan, grid: TileGrid) -> Tensor:
    """The token that is read of each cell, as a view in the order of local tiles, which hold whole cells.

    Shape:
        (B, present tiles, h, w, D) -> (B, rows, cols, h / rows, w / cols, D)
    """
    row, col = plan.read[0][0], plan.read[1][0]
    if source.perspective == "global":  # one tile has them all
        tile = source.tiles[:, source.present.index(row * grid.cols + col)]
        return einops.rearrange(tile, "b (i u) (j v) d -> b i j u v d", i=grid.rows, j=grid.cols)
    return in_cut(source, "local", grid)[:, :, :, :, row, :, col]


def mask_of(d: DirectionPlan, masks: Mapping[Perspective, Tensor | None], grid: TileGrid) -> Tensor | None:
    """Which keys of the tiles of a direction may be attended to, (B or 1, T, K)."""
    if (mask := masks[KEYS_OF_QUERY[d.query]]) is None:
        return None
    live = [i * grid.cols + j for i in d.key_rows.tiles for j in d.key_cols.tiles]
    return select(retile(mask.unsqueeze(-1), "raster", d.cut, grid, backend="torch").flatten(2), 1, live)


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
    """One enhanced map: the tokens that the fusion reads, or the average of each cell; without W_v unless ``project``.

    Shape:
        (B, live rows, live columns, D), or (B, h, w, D) averaged
    """
    mask, groups = mask_of(d, masks, grid), tiles_at_a_time(d, a, attention, maps[d.query][0].tiles)
    queries = take_tiles(maps[d.query], d.query_rows, d.query_cols, d.cut, grid, groups)
    keys = take_tiles(maps[KEYS_OF_QUERY[d.query]], d.key_rows, d.key_cols, d.cut, grid, groups)

    def back(tokens: Tensor) -> Tensor:
        return put_back(tokens, d.query_rows, d.query_cols, d.cut, grid)

    if a == Arrangement():
        return back(attention(next(queries), next(keys), mask))

    def finished(found: Tensor, query: Tensor | None, any_key: Tensor | None) -> Tensor:
        if a.absorb and project:
            found = project_values(attention, found, any_key)
        return attention.finish(found.flatten(-2), cast(Tensor, query))

    (r, s), cells = plan.cell, None
    if a.pool == "cells":
        cells = d.query_rows.per_tile // r, r, d.query_cols.per_tile // s, s
    # Over strides, each cell has one token in every tile, at the same index: attention by chunks adds them up itself.
    added_up = d.num_tiles if a.absorb and a.pool == "map" and d.cut == "global" else 0
    any_key = None if mask is None else mask.any(-1)[:, :, None, None].to(maps[d.query][0].tiles.dtype)
    parts: list[Tensor] = []
    for tiles, query, key in zip(groups, queries, keys, strict=True):
        masked = None if mask is None else mask[:, tiles]
        part = attend_arranged(attention, a, query, key, masked, cells=cells, tiles=added_up, folded=folded)
        dtype = part.dtype
        if a.pool is None:
            part = finished(part, query, None if any_key is None else any_key[:, tiles])
        elif added_up and parts:  # a share of the mean
            part = parts.pop() + part.to(torch.promote_types(dtype, torch.float32))
        parts.append(part)
    tokens = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if a.pool is None:
        return back(tokens)
    tokens = tokens.flatten(3)

    def average(x: Tensor) -> Tensor:
        return mean_of_cells(back(x), plan.tokens)

    if cells:
        found = retile(tokens.unflatten(2, grid.tile_size(plan.tokens)), "local", "raster", grid)
    else:
        found = tokens.to(dtype).squeeze(1).unflatten(1, plan.tokens) if added_up else average(tokens)
    asking = take_tiles(maps[d.query], d.query_rows, d.query_cols, d.cut, grid)
    any_key = None if any_key is None else average(any_key.expand(-1, -1, d.queries, -1))
    found = found.unflatten(-1, (attention.num_heads, -1))
    return finished(found, average(next(asking)) if attention.residual else None, any_key)


def tiles_at_a_time(d: DirectionPlan, a: Arrangement, attention: TileAttention, like: Tensor) -> list[slice]:
    """The tiles, as many at a time as the scores of one image allow; all at once where gradients are recorded.

    A backward pass keeps the operands of all tiles anyway, and adds up gradients of whole maps for every group.
    The queries of a few tiles are projected together: `LEAST_ROWS`.
    """
    spans_tiles = a.pool == "map" and d.cut == "local"  # a cell has tokens of several tiles
    if a == Arrangement() or spans_tiles or torch.is_grad_enabled():
        return [slice(0, d.num_tiles)]
    least = -(-LEAST_ROWS // d.queries)
    return chunks(d.num_tiles, attention.num_heads * d.queries * d.keys, like.device, least)


# --- The products in another order ------------------------------------------------------------------------------------


def attend_arranged(
    attention: TileAttention,
    a: Arrangement,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    *,
    cells: tuple[int, int, int, int] | None,
    tiles: int,
    folded: Tensor | None,
) -> Tensor:
    """What every query, or every average of queries, collects: of the projected values, or of the keys themselves.

    Args:
        attention: The layers.
        a: The order of the products.
        query: Queries.
        key: Keys.
        key_mask: True where a key may be attended to.
        cells: The queries of a tile as cells that are averaged, None where none are.
        tiles: Over how many tiles results are averaged inside of the attention, 0 if they are not.
        folded: W_q W_k^T, with ``a.fold``.

    Shape:
        - query: (B, T, Q, D); key: (B, T, K, D); key_mask: (B or 1, T, K)
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
        cells=cells,
        tiles=tiles,
    )


def fuse_together(fusion: BottleneckConcatFusion, both: Tensor) -> Tensor:
    """The released fusion with a product for both bottlenecks at a time. (2, B, Q, D), V_loc first -> (B, Q, D)"""
    pairs = list(zip(fusion.local_bottleneck.parameters(), fusion.global_bottleneck.parameters(), strict=True))
    weights = torch.cat([x.flatten() for pair in pairs for x in pair])  # in one launch, then apart again
    parts = weights.split([2 * local.numel() for local, _ in pairs])
    down, of_down, up, of_up = (x.unflatten(0, (2, *local.shape)) for x, (local, _) in zip(parts, pairs, strict=True))
    inside = F.gelu(torch.baddbmm(of_down.unsqueeze(1), both.flatten(1, 2), down.mT))
    halves = torch.baddbmm(of_up.unsqueeze(1), inside, up.mT).unflatten(1, both.shape[1:3]).permute(1, 2, 0, 3)
    added = (both[0] + both[1]).unflatten(-1, (2, -1)) + halves
    return cast(Tensor, fusion.norm(added.flatten(2)))


def query_key_matrix(attention: TileAttention) -> Tensor:
    """W_q W_k^T / sqrt(D) of one head, as a weight of `torch.nn.functional.linear`."""
    query, key = attention.q_proj.weight, attention.k_proj.weight
    # One product that scales, too. Its first operand adds nothing, but must be finite: torch.vmap, and the products
    # that torch.compile generates, multiply it by zero.
    return torch.addmm(query.detach(), key.t(), query, beta=0, alpha=attention.dim**-0.5)


def product_of_weights(attention: TileAttention, fusion: LinearConcatFusion) -> Tensor:
    """W_k W_q^T, and W_v with both layers of the fusion, local first, in one product.

    Shape:
        (2, D, D), either as a weight of `torch.nn.functional.linear`
    """
    layers = fusion.local_proj, fusion.global_proj, attention.k_proj, attention.v_proj
    weights = torch.cat([attention.q_proj.weight.t(), *(layer.weight for layer in layers)]).unflatten(0, (2, 2, -1))
    return torch.bmm(*weights)


def _absorbed_queries(attention: TileAttention, query: Tensor, folded: Tensor | None) -> Tensor:
    """(x W_q + b_q) W_k^T per head, (B, T, Q, heads, D)."""
    weight, bias = attention.k_proj.weight, attention.q_proj.bias
    if folded is not None:
        return F.linear(query, folded, None if bias is None else bias @ weight * attention.dim**-0.5).unsqueeze(-2)
    q = attention.q_proj(query).unflatten(-1, (attention.num_heads, -1))
    return torch.einsum("btqhe,hed->btqhd", q, weight.unflatten(0, (attention.num_heads, -1)))


def project_values(attention: TileAttention, collected: Tensor, attended: Tensor | None) -> Tensor:
    """(P y) W_v + b_v per head, where P y was collected of unprojected keys.

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
    """The linear concatenation with W_v folded into its layers, of what was collected; local first. (..., D)"""
    ways = zip(collected, (fusion.local_proj, fusion.global_proj), attentions, strict=True)
    halves = [F.linear(keys, half.weight @ attention.v_proj.weight) for keys, half, attention in ways]
    return torch.cat(halves[::-1], dim=-1)


# --- Tokens to tiles and back -----------------------------------------------------------------------------------------


def take_tiles(
    maps: list[TileMap],
    rows: AxisCut,
    cols: AxisCut,
    cut: Perspective,
    grid: TileGrid,
    groups: Sequence[slice] = (slice(None),),
) -> Iterator[Tensor]:
    """The sum of maps at ``rows`` x ``cols``, as tiles of perspective ``cut``, group after group.

    Shape:
        (B, present tiles, h, w, D) -> (B, tiles of a group, tokens per tile, D)
    """
    for parts in zip(*(_take_tiles(tile_map, rows, cols, cut, grid, groups) for tile_map in maps), strict=True):
        yield reduce(torch.add, parts)


def _take_tiles(
    source: TileMap, rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid, groups: Sequence[slice]
) -> Iterator[Tensor]:
    wanted = [i * grid.cols + j for i in rows.tiles for j in cols.tiles]
    whole = rows.whole and cols.whole
    if whole and source.perspective == cut:
        held = select(source.tiles, 1, [source.present.index(tile) for tile in wanted]).flatten(2, 3)
        for some in groups:
            yield held[:, some].contiguous()  # which every projection of it would make anew
    elif whole and len(groups) == 1 and list(source.present) == wanted == list(range(grid.num_tiles)):
        yield retile(source.tiles, source.perspective, cut, grid).flatten(2, 3)
    else:
        size, tokens = check_size(source.tiles.shape[2:4], "token map"), source.tiles.flatten(1, 3)
        index = table(_token_index, source.perspective, source.present, rows, cols, grid, size, like=tokens)
        for some in groups:
            yield tokens.index_select(1, index[some].flatten()).unflatten(1, index[some].shape)


def put_back(tiles: Tensor, rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    """What `take_tiles` took, with new contents, as the map of the live rows and columns.

    Shape:
        (B, tiles, tokens per tile, D) -> (B, live rows, live columns, D)
    """
    split = tiles.unflatten(2, (rows.per_tile, cols.per_tile))
    if rows.whole and cols.whole and tiles.shape[1] == grid.num_tiles:
        return retile(split, cut, "raster", grid)
    plane = split.unflatten(1, (len(rows.tiles), len(cols.tiles))).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return select(select(plane, 1, rows.index), 2, cols.index)


def _token_index(
    device: torch.device,
    perspective: Perspective,
    present: tuple[int, ...],
    rows: AxisCut,
    cols: AxisCut,
    grid: TileGrid,
    size: Size,
) -> Tensor:
    """Which of all present tokens of a map are taken: (tiles, tokens per tile)."""
    tokens = torch.full((grid.num_tiles, *size, 1), -1, device=device)
    tokens[list(present)] = torch.arange(len(present) * size[0] * size[1], device=device).view(-1, *size, 1)
    plane = retile(tokens, perspective, "raster", grid, backend="torch").squeeze(-1)
    plane = plane[list(rows.positions)][:, list(cols.positions)]
    return einops.rearrange(plane, "(i u) (j v) -> (i j) (u v)", i=len(rows.tiles), j=len(cols.tiles))


def on_full_map(plane: Tensor, plan: EnhancePlan, size: Size) -> Tensor:
    """The live tokens on a map of zeros. (B, fused rows, fused columns, D) -> (B, H, W, D)"""
    if plane.shape[1:3] == size:
        return plane
    rows, cols = (table(index_tensor, positions, like=plane) for positions in plan.fused)
    full = plane.new_zeros(plane.shape[0], *size, plane.shape[-1])
    full[:, rows[:, None], cols] = plane
    return full


def mean_of_cells(plane: Tensor, size: Size) -> Tensor:
    """The mean of the tokens read of each cell. (..., h * r, w * c, D) -> (..., h, w, D)"""
    if tuple(plane.shape[-3:-1]) == size:
        return plane
    return einops.reduce(plane, "... (h r) (w c) d -> ... h w d", "mean", h=size[0], w=size[1])


def select(x: Tensor, dim: int, wanted: list[int] | tuple[int, ...]) -> Tensor:
    """Entries of one dimension; a view, or ``x`` itself, where they are consecutive."""
    first = wanted[0] if wanted else 0
    if list(wanted) == list(range(first, first + len(wanted))):
        return x if len(wanted) == x.shape[dim] else x.narrow(dim, first, len(wanted))
    return x.index_select(dim, table(index_tensor, tuple(wanted), like=x))
