"""What the stages of a dual-view model compute and leave out, and what that costs: the rows of `explain`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualview.cost import Cost, cost_of, device_of, modules_of, run_without_contents
from dualview.geometry import LiveTiles, Perspective, Size, TileGrid
from dualview.models.parts import DualView, all_tiles
from dualview.models.view_plan import ViewPlan, method_of, plan_encoder
from dualview.ops.planned.live import MAPS_OF_ROLE, DirectionPlan, EnhancePlan, LayerPlan
from dualview.ops.planned.products import Arrangement, Products
from dualview.ops.planned.run import TileMap, enhance_direction, query_key_matrix
from dualview.switches import FULL

DEFAULT_TOKENS = (24, 24)


@dataclass(frozen=True)
class Stage:
    """One row of the table, for one image.

    Attributes:
        name: The stage.
        planned: What is computed.
        full: What the equations, computed in full, would compute.
        planned_cost: Operations and bytes of what is computed; None where they cannot be counted.
        full_cost: Those of the full computation.
    """

    name: str
    planned: str
    full: str
    planned_cost: Cost | None = None
    full_cost: Cost | None = None


class Features(NamedTuple):
    """What is known of the features of one tile.

    Attributes:
        tokens: Token map (h', w').
        width: Their width; None where the encoder could not be run without contents.
        dtype: Their type.
        device: Where they are.
    """

    tokens: Size
    width: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def enhances(dem: Any) -> bool:
    """Whether a dem has all that `DualPerspectiveEnhance` has, and so the rows of one."""
    names = ("plan", "products", "attentions", "fusion", "dim", "enhance", "source", "readout", "gate")
    return all(hasattr(dem, name) for name in names)


def arranged_products(dem: Any, grid: TileGrid, tokens: Size) -> Products:
    """How the products of a dem are arranged where its weights are or may come to be."""
    return run_without_contents(lambda it: it.products(grid, tokens, next(it.parameters())), dem)[1]  # type: ignore[no-any-return]  # the protocol of the dem


# --- The encoder -----------------------------------------------------------------------------------------------------


def encoder_stages(parts: DualView, grid: TileGrid, tokens: Size | None) -> tuple[list[Stage], Features]:
    """The rows up to the encoder, and the features that it gives, with ``tokens`` in place of its own if given."""
    options, size = parts.options, grid.map_size(parts.options.tile)
    one, features = _run_of_encoder(parts)
    if tokens is not None:
        features = features._replace(tokens=tokens)
    planned = plan_encoder(*parts, grid, size, full=False)
    with FULL.holding(True, traced=False):
        full, (one_in_full, _) = plan_encoder(*parts, grid, size, full=True), _run_of_encoder(parts)
    resized = ", interpolated inside" if options.resize else ""
    filtered = ", low-pass filtered" if options.low_pass else ""
    passes = options.max_tiles_per_pass
    stages = [
        Stage("canvas", f"{size[0]} x {size[1]} pixels{resized}", ""),
        Stage("local tiles", str(len(planned.local)), str(len(full.local))),
        Stage("stride tiles", f"{len(planned.stride)}{filtered}", str(len(full.stride))),
        Stage("low resolution", _low_view(planned, options.low_res), _low_view(full, options.low_res)),
    ]
    if planned.layers is not None and full.layers is not None:
        stages.append(Stage("layers", _layers(planned.layers), _layers(full.layers)))
    counts = len(planned.views), len(full.views)
    stages.append(
        Stage(
            "encoder",
            f"{counts[0]} sub-images" + (f", at most {passes} in one pass" if passes else ""),
            f"{counts[1]} sub-images",
            *(None if c is None else c.times(count) for c, count in zip((one, one_in_full), counts, strict=True)),
        )
    )
    return stages, features


def _layers(layers: LayerPlan) -> str:
    return f"{layers.run} of {layers.total}, {'and' if layers.norm else 'without'} the final norm"


def _run_of_encoder(parts: DualView) -> tuple[Cost | None, Features]:
    """What one sub-image costs and what its features are, as far as the encoder can be run without contents."""
    weights = (p for module in modules_of((parts.encoder,)) for p in module.parameters())
    like = next(weights, torch.empty(0))
    dtype, device = like.dtype, device_of(like)

    def encode(encoder: Any) -> Features:
        out = encoder(torch.empty(1, 3, *parts.options.tile, dtype=dtype, device=device))
        return Features((out.shape[1], out.shape[2]), out.shape[3], out.dtype, out.device)

    try:
        return run_without_contents(encode, parts.encoder)
    except Exception:
        return None, Features(DEFAULT_TOKENS)


def _low_view(plan: ViewPlan, mix: str | None) -> str:
    if plan.low is None:
        return "not used"
    view = plan.views[plan.low]
    what = "1" if view.kind == "low" else f"is {'stride' if view.kind == 'global' else 'local'} tile {view.tile}"
    return f"{what}, mixed by {mix}" if mix else what


# --- The dem ---------------------------------------------------------------------------------------------------------


def stages_of(dem: Any, grid: TileGrid, features: Features) -> list[Stage]:
    """The rows of a dem that declares a plan, none for any other."""
    if method_of(dem, "plan") is None:
        return []
    return _enhance_stages(dem, grid, features.tokens) if enhances(dem) else [_readout_stage(dem, grid, features)]


def _enhance_stages(dem: Any, grid: TileGrid, tokens: Size) -> list[Stage]:
    planned, arranged = dem.plan(grid, tokens), arranged_products(dem, grid, tokens)
    *cost, rest = _costs(dem, grid, planned, arranged)
    with FULL.holding(True, traced=False):
        full, as_written = dem.plan(grid, tokens), arranged_products(dem, grid, tokens)
        *full_cost, full_rest = _costs(dem, grid, full, as_written)
    pairs = zip(planned.directions, arranged.directions, full.directions, as_written.directions, strict=True)
    texts = [(_direction(d, a), _direction(f, w)) for d, a, f, w in pairs]
    names = ["V_loc" if d.query == "local" else "V_glo" for d in planned.directions]
    pooled = any(a.pool for a in arranged.directions)
    read = "pooled before W_v" if pooled else f"{len(planned.read[0]) * len(planned.read[1])} tokens"
    read += ", W_v folded in" if arranged.fold_values else ""
    return [
        Stage("DEM", ", ".join(_options(dem)), ""),
        *(Stage(n, *t, p, c) for n, t, p, c in zip(names, texts, cost, full_cost, strict=True)),
        Stage(
            "fusion, readout",
            f"{type(dem.fusion).__name__}, {read}, {dem.readout}",
            f"{grid.num_tiles * tokens[0] * tokens[1]} tokens",
            rest,
            full_rest,
        ),
    ]


def _costs(dem: Any, grid: TileGrid, plan: EnhancePlan, products: Products) -> list[Cost]:
    """Of each direction, and of all else."""

    def tiles(it: Any) -> Tensor:
        weight = next(it.parameters())
        return torch.empty(1, grid.num_tiles, *plan.tokens, it.dim, dtype=weight.dtype, device=weight.device)

    def direction(d: DirectionPlan, a: Arrangement, folded_before: bool, it: Any) -> None:
        attention = it.attentions[0 if d.query == "global" else -1]
        given: dict[Perspective, TileMap] = {
            "local": TileMap(tiles(it), "local", all_tiles(grid).local),
            "global": TileMap(tiles(it), "global", all_tiles(grid).stride),
        }
        maps = {role: [given[p] for p in MAPS_OF_ROLE[it.source][role]] for role in given}
        folded = None
        if a.fold:
            folded = tiles(it).new_empty(it.dim, it.dim) if folded_before else query_key_matrix(attention)
        no_mask: dict[Perspective, Tensor | None] = {"local": None, "global": None}
        enhance_direction(plan, d, grid, a, attention, maps, no_mask, folded, project=not products.fold_values)

    parts, folded_before = [], False
    for d, a in zip(plan.directions, products.directions, strict=True):
        parts.append(cost_of(partial(direction, d, a, folded_before), dem))
        folded_before = a.fold and len(dem.attentions) == 1
    whole = cost_of(lambda it: it(tiles(it), tiles(it), grid), dem)
    return [*parts, Cost(*(w - sum(part[i] for part in parts) for i, w in enumerate(whole)))]


def _options(dem: Any) -> list[str]:
    """Every option of the module that a row of its own does not show."""
    attention = dem.attentions[0]
    both = "separate weights" if len(dem.attentions) > 1 else "shared weights"
    present = {
        both: dem.enhance == "both",
        "biases": attention.q_proj.bias is not None,
        "output projection": attention.out_proj is not None,
        "residual": attention.residual,
        "norm": attention.norm is not None,
        f"both roles played by the {dem.source} map": dem.source != "dual",
        "gate": dem.gate is not None,
    }
    return [f"width {dem.dim}", f"heads {attention.num_heads}", *(name for name, there in present.items() if there)]


def _direction(d: DirectionPlan, a: Arrangement) -> str:
    cut = "block" if d.cut == "local" else "stride"
    text = f"{d.num_tiles} {cut}{'s' if d.num_tiles > 1 else ''} x {d.queries} queries x {d.keys} keys"
    text += ", absorbed" if a.absorb else ""
    text += ", folded" if a.fold else ""
    return text + (f", pooled over {a.pool}" if a.pool else "")


def _readout_stage(dem: Any, grid: TileGrid, features: Features) -> Stage:
    """The one row of a dem that declares which tiles it needs, and no more."""

    def cost(live: LiveTiles) -> Cost | None:
        def call(it: Any) -> None:
            local, stride = (
                torch.empty(
                    1, len(tiles), *features.tokens, features.width or 0, dtype=features.dtype, device=features.device
                )
                for tiles in live
            )
            it(local, stride, grid, live=live)

        if features.width is None:  # a readout alone has no width
            return None
        try:
            return cost_of(call, dem)
        except Exception:  # it cannot be run without contents
            return None

    planned = LiveTiles(*(tuple(tiles) for tiles in dem.plan(grid, features.tokens).live))
    planned_cost = cost(planned)
    full = all_tiles(grid)
    with FULL.holding(True, traced=False):
        full_cost = cost(full)
    what = [getattr(dem, name) for name in ("source", "readout") if isinstance(getattr(dem, name, None), str)]
    texts = [f"{sum(len(tiles) for tiles in live)} tiles" for live in (planned, full)]
    name = "readout" if what else type(dem).__name__
    return Stage(name, ", ".join([texts[0], *what]), texts[1], planned_cost, full_cost)
