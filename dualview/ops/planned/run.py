"""Enhance the live tokens: bring them together as tiles, compute each direction, put back, fuse and read out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import NamedTuple, cast

import einops
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.arguments import check_size
from dualview.geometry import Perspective, Size, TileGrid
from dualview.kernels.chunked_attention import chunks
from dualview.kernels.retile import retile
from dualview.kernels.tables import index_tensor, table
from dualview.kernels.tile_attention import tile_attention
from dualview.ops.fusion import BottleneckConcatFusion, LinearConcatFusion, fuse
from dualview.ops.planned.live import KEYS_OF_QUERY, AxisCut, DirectionPlan, EnhancePlan, regular
from dualview.ops.planned.products import Arrangement, Products, plain_bottlenecks
from dualview.ops.tile_attention import TileAttention
from dualview.ops.tile_attention import tile_attention as attend
from dualview.ops.tiling import crop, recombine
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
    if products.together:
        return enhance_together(plan, grid, attentions[0], fusion, maps, masks)
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
            select(fuse(fusion, *(on_full_map(x, plan, size) for x in enhanced)), 1, plan.read[0]), 2, plan.read[1]
        )
    else:
        fused = fuse(fusion, *enhanced)
    return mean_of_cells(fused, plan.tokens) if plan.averages else fused


def enhance_together(
    plan: EnhancePlan,
    grid: TileGrid,
    attention: TileAttention,
    fusion: nn.Module,
    maps: Mapping[Perspective, list[TileMap]],
    masks: Mapping[Perspective, Tensor | None],
) -> Tensor:
    """The same with the queries of both directions in one tensor, (2, B, Q of all tiles, D), V_loc first.

    One direction asks one tile, so its queries may have any order: that of the other one.
    """
    order = max(plan.directions, key=lambda d: d.num_tiles)
    axes = order.query_rows, order.query_cols
    views = [take_regular(maps[d.query], *axes, order.cut, grid) for d in plan.directions]
    asking = torch.stack(views).flatten(2, -2)
    found, project = [], keys_and_values(attention)
    for d, queries in zip(plan.directions, per_token(attention.q_proj, asking), strict=True):
        (key,) = take_tiles(maps[KEYS_OF_QUERY[d.query]], d.key_rows, d.key_cols, d.cut, grid, [slice(0, d.num_tiles)])
        q, (k, v) = queries.unflatten(1, (d.num_tiles, d.queries)), project(key)
        found.append(attend(q, k, v, num_heads=attention.num_heads, key_mask=mask_of(d, masks, grid)).flatten(1, 2))
    both = attention.finish(torch.stack(found), asking)

    def back(tokens: Tensor) -> Tensor:
        return put_back(tokens.unflatten(1, (order.num_tiles, order.queries)), *axes, order.cut, grid)

    if plain_bottlenecks(fusion, both):
        fused = back(fuse_together(cast(BottleneckConcatFusion, fusion), both))
    else:
        fused = fuse(fusion, *map(back, both))
    return mean_of_cells(fused, plan.tokens) if plan.averages else fused


def mask_of(d: DirectionPlan, masks: Mapping[Perspective, Tensor | None], grid: TileGrid) -> Tensor | None:
    """Which keys of the tiles of a direction may be attended to, (B or 1, T, K)."""
    if (mask := masks[KEYS_OF_QUERY[d.query]]) is None:
        return None
    live = [i * grid.cols + j for i in d.key_rows.tiles for j in d.key_cols.tiles]
    cut = crop(mask.unsqueeze(-1), grid, d.cut, data_format="channels_last", backend="torch").flatten(2)
    return select(cut, 1, live)


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
    keys_of, mask = KEYS_OF_QUERY[d.query], mask_of(d, masks, grid)
    groups = tiles_at_a_time(d, a, attention, maps[d.query][0].tiles)
    queries = take_tiles(maps[d.query], d.query_rows, d.query_cols, d.cut, grid, groups)
    keys = take_tiles(maps[keys_of], d.key_rows, d.key_cols, d.cut, grid, groups)
    if a == Arrangement():
        return put_back(attention(next(queries), next(keys), mask), d.query_rows, d.query_cols, d.cut, grid)

    (r, s), cells = plan.cell, None
    if a.pool == "cells":
        cells = d.query_rows.per_tile // r, r, d.query_cols.per_tile // s, s
    # Over strides, each cell has one token in every tile, at the same index: attention by chunks adds them up itself.
    added_up = d.num_tiles if a.absorb and a.pool == "map" and d.cut == "global" else 0

    def attended() -> Iterator[dict[str, Tensor]]:
        """Of each group, what its queries collect and what is averaged together with it: arguments of `finished`."""
        for tiles, query, key in zip(groups, queries, keys, strict=True):
            key_mask = None if mask is None else mask[:, tiles]
            found = attend_arranged(attention, a, query, key, key_mask, cells=cells, tiles=added_up, folded=folded)
            part = {"found": found.flatten(3) if a.pool == "map" else found}
            if attention.residual:
                block = query.unflatten(2, (d.query_rows.per_tile, d.query_cols.per_tile))
                part["query"] = mean_of_cells(block, cells[::2]).flatten(2, 3) if cells else query
            if key_mask is not None:
                part["any_key"] = key_mask.any(-1)[:, :, None, None].to(query.dtype).expand(-1, -1, found.shape[2], 1)
            yield part

    def finished(found: Tensor, query: Tensor | None = None, any_key: Tensor | None = None) -> Tensor:
        if a.absorb and project:
            found = project_values(attention, found, any_key)
        return attention.finish(found.flatten(3), cast(Tensor, query))

    if a.pool == "map":
        means = mean_across_tiles(attended(), plan, d, grid, added_up=bool(added_up))
        means["found"] = means["found"].unflatten(-1, (attention.num_heads, -1))
        return cast(Tensor, finished(**means).squeeze(1).unflatten(1, plan.tokens))
    parts = [finished(**part) for part in attended()]
    tokens = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if a.pool is None:
        return put_back(tokens, d.query_rows, d.query_cols, d.cut, grid)
    return recombine(tokens.unflatten(2, grid.tile_size(plan.tokens)), grid, "local", data_format="channels_last")


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


def keys_and_values(attention: TileAttention) -> Callable[[Tensor], Sequence[Tensor]]:
    """Both projections of keys, (B, T, K, D): by one product, unless a backward pass would have to join gradients."""
    k_proj, v_proj, dim = attention.k_proj, attention.v_proj, attention.dim
    biases = [bias for bias in (k_proj.bias, v_proj.bias) if bias is not None]
    if torch.is_grad_enabled() or len(biases) == 1:
        return lambda key: (k_proj(key), v_proj(key))
    weights = torch.cat([x.flatten() for x in (k_proj.weight, v_proj.weight, *biases)])
    matrix, bias = weights[: 2 * dim**2].unflatten(0, (-1, dim)), weights[2 * dim**2 :]
    return lambda key: F.linear(key, matrix, bias if biases else None).chunk(2, -1)


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
    # One product that scales, too; of its first operand nothing is read, for beta is 0.
    return torch.addmm(query.detach(), key.t(), query, beta=0, alpha=attention.dim**-0.5)


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
    (local, of_global), (v_loc, v_glo) = attentions, collected
    halves = (
        F.linear(collected_keys, half.weight @ attention.v_proj.weight, half.bias)
        for collected_keys, half, attention in (
            (v_glo, fusion.global_proj, of_global),
            (v_loc, fusion.local_proj, local),
        )
    )
    return torch.cat(list(halves), dim=-1)


# --- Tokens to tiles and back -----------------------------------------------------------------------------------------


def take_tiles(
    maps: list[TileMap], rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid, groups: Sequence[slice]
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
        index, tokens = token_index(source, rows, cols, grid), source.tiles.flatten(1, 3)
        for some in groups:
            yield tokens.index_select(1, index[some].flatten()).unflatten(1, index[some].shape)


def take_regular(maps: list[TileMap], rows: AxisCut, cols: AxisCut, cut: Perspective, grid: TileGrid) -> Tensor:
    """What `take_tiles` takes, in two more dimensions: a view, where positions lie regularly in the tiles of one map.

    Shape:
        (B, present tiles, h, w, D) -> (B, rows of tiles, columns of tiles, rows of a tile, columns of a tile, D)
    """
    if len(maps) == 1 and (view := regular_view(maps[0], rows, cols, grid)) is not None:
        return view
    (tiles,) = take_tiles(maps, rows, cols, cut, grid, [slice(0, len(rows.tiles) * len(cols.tiles))])
    return cast(
        Tensor, tiles.unflatten(2, (rows.per_tile, cols.per_tile)).unflatten(1, (len(rows.tiles), len(cols.tiles)))
    )


def regular_view(source: TileMap, rows: AxisCut, cols: AxisCut, grid: TileGrid) -> Tensor | None:
    """The tokens at ``rows`` x ``cols`` as a view, None where there is none; shape as for `take_regular`."""
    tiles, present = source.tiles, source.present
    there = tuple(sorted({i // grid.cols for i in present})), tuple(sorted({i % grid.cols for i in present}))
    found = [
        regular(axis.positions, len(axis.tiles), source.perspective, n, length, held)
        for axis, n, length, held in zip((rows, cols), grid, tiles.shape[2:4], there, strict=True)
    ]
    in_order = tuple(i * grid.cols + j for i in there[0] for j in there[1])
    if present != in_order or found[0] is None or found[1] is None:
        return None
    (i, u), (j, v) = ([slice(*part) for part in parts] for parts in found if parts is not None)
    part = tiles.unflatten(1, (len(there[0]), len(there[1])))[:, i, j, u, v].transpose(2, 3)  # (B, i, u, j, v, D)
    for dim, axis in ((1, rows), (3, cols)):
        if part.shape[dim] != len(axis.tiles):  # one tile of the source, for all tiles of the cut
            part = part.flatten(dim, dim + 1).unflatten(dim, (len(axis.tiles), axis.per_tile))
    return cast(Tensor, part.transpose(2, 3))


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
    rows, cols = (table(index_tensor, positions, like=plane) for positions in plan.fused)
    full = plane.new_zeros(plane.shape[0], *size, plane.shape[-1])
    full[:, rows[:, None], cols] = plane
    return full


def mean_of_cells(plane: Tensor, size: Size) -> Tensor:
    """The mean of the tokens read of each cell. (..., h * r, w * c, D) -> (..., h, w, D)"""
    if tuple(plane.shape[-3:-1]) == size:
        return plane
    return einops.reduce(plane, "... (h r) (w c) d -> ... h w d", "mean", h=size[0], w=size[1])


def mean_across_tiles(
    parts: Iterable[dict[str, Tensor]], plan: EnhancePlan, d: DirectionPlan, grid: TileGrid, *, added_up: bool
) -> dict[str, Tensor]:
    """The mean of each cell, whose tokens lie in several tiles. (B, tiles of a group, Q, C) -> (B, 1, h * w, C)

    What queries found may be ``added_up`` over the tiles of a group, as a share of the mean: (B, 1, Q, C).
    """
    means: dict[str, Tensor] = {}
    for part in parts:
        for name, x in part.items():
            if d.cut == "local":  # all tiles are one group
                whole = put_back(x, d.query_rows, d.query_cols, d.cut, grid)
                means[name] = mean_of_cells(whole, plan.tokens).flatten(1, 2).unsqueeze(1)
                continue
            wide, share = torch.promote_types(x.dtype, torch.float32), x
            if not (added_up and name == "found"):  # a cell has one token in every tile, at the same index
                every = x.shape[1] == d.num_tiles
                share = x.mean(1, keepdim=True) if every else x.sum(1, keepdim=True, dtype=wide) / d.num_tiles
            means[name] = means[name] + share.to(wide) if name in means else share
    return {name: mean.to(part[name].dtype) for name, mean in means.items()}


def select(x: Tensor, dim: int, wanted: list[int] | tuple[int, ...]) -> Tensor:
    """Entries of one dimension; a view, or ``x`` itself, where they are consecutive."""
    first = wanted[0] if wanted else 0
    if list(wanted) == list(range(first, first + len(wanted))):
        return x if len(wanted) == x.shape[dim] else x.narrow(dim, first, len(wanted))
    return x.index_select(dim, table(index_tensor, tuple(wanted), like=x))
