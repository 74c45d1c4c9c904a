"""What a module computes, and what it leaves out, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from shutil import get_terminal_size
from textwrap import wrap
from typing import TypeAlias

import torch
from torch import nn

from dualview.cost import Cost, cost_of
from dualview.geometry import GridLike, Size, TileGrid
from dualview.kernels.dispatch import choose, use_backend
from dualview.models.dual_view_encoder import DualViewEncoder
from dualview.models.view_plan import ViewPlan
from dualview.ops.direct_readout import DirectReadout
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.fusion import BottleneckConcatFusion
from dualview.ops.plan import DirectionPlan, DirectPlan, EnhancePlan, LayerPlan, full_computation
from dualview.ops.tile_attention import TileAttention

DEFAULT_TOKENS = (24, 24)

GAP = "  "  # between the columns of the table
MIN_WIDTH = 24  # of what is said of a stage, however narrow the terminal is


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


@dataclass(frozen=True)
class Explanation:
    """Rows of a table; ``print`` shows them aligned.

    Attributes:
        stages: The rows, in the order of computation; the last is the sum of those whose cost is known.
        implementations: Of everything that there is a kernel for, by name: what runs now, and why.
    """

    stages: tuple[Stage, ...]
    implementations: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Two lines a stage, what is computed and what would be in full, broken at the width of the terminal."""
        cells: list[tuple[str, str, str, str, str]] = []
        for s in self.stages:
            both = bool(s.full or s.full_cost)
            cells.append((s.name, "computed" if both else "", s.planned, *_figures(s.planned_cost)))
            if both:
                cells.append(("", "in full", s.full, *_figures(s.full_cost)))
        headings = ("stage", "", "what", "GFLOP", "MB moved")
        widths = [max(len(row[i]) for row in (headings, *cells)) for i in range(5)]
        room = get_terminal_size().columns
        widths[2] = max(MIN_WIDTH, min(widths[2], room - sum(widths[:2]) - sum(widths[3:]) - 4 * len(GAP)))
        lines = [line for row in (headings, *cells) for line in _wrapped(row, widths)]
        lines.insert(1, GAP.join("-" * width for width in widths))
        for text in dict.fromkeys(self.implementations.values()):
            names = [name for name, other in self.implementations.items() if other == text]
            lines += wrap(f"{', '.join(names)} {text}", max(room, MIN_WIDTH), break_on_hyphens=False)
        return "\n".join(lines)


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of a row whose third cell is broken where it is too long; figures stand on the right."""
    first, *more = wrap(row[2], widths[2], break_on_hyphens=False) or [""]
    cells = [(row[0], row[1], first, row[3], row[4]), *(("", "", text, "", "") for text in more)]
    return [
        GAP.join(
            text.ljust(width) if i < 3 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _figures(cost: Cost | None) -> tuple[str, str]:
    return ("", "") if cost is None else (f"{cost.operations / 1e9:.2f}", f"{cost.bytes / 1e6:.1f}")


def explain(module: nn.Module, *, grid: GridLike | None = None, tokens: Size | None = None) -> Explanation:
    """Which sub-images and tokens a DEM or a dual-view encoder computes for one image, and at what cost.

    Beside each figure stands that of the full computation, which gives the same output. Operations count matrix
    products, convolutions and attention, two for a multiply-addition; bytes are read and written by every operation as
    if nothing stayed in a cache. They are found by running the stages on tensors without contents. Below the table
    stands what runs of everything that there is a Triton kernel for, and why.

    Args:
        module: A [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance],
            [`DirectReadout`][dualview.DirectReadout] or [`DualViewEncoder`][dualview.DualViewEncoder].
        grid: Rows and columns of tiles; may be omitted where the encoder has a fixed grid.
        tokens: Token map (h', w') of one tile. None: what the encoder gives, or (24, 24), as ViT-L/14 at 336 pixels.

    Raises:
        ValueError: No grid is known, or another than the encoder's fixed one is asked for.
        TypeError: ``module`` is something else.

    Example:
        >>> dem = DualPerspectiveEnhance.released(1024, device="meta")
        >>> stages = {stage.name: stage for stage in explain(dem, grid=(3, 3)).stages}
        >>> stages["V_glo"].planned, stages["V_glo"].full
        ('9 blocks x 64 queries x 576 keys, absorbed', '9 blocks x 576 queries x 576 keys')
    """
    if not isinstance(module, (DualPerspectiveEnhance, DirectReadout, DualViewEncoder)):
        raise TypeError(
            f"explain knows DualPerspectiveEnhance, DirectReadout and DualViewEncoder; got {type(module).__name__}."
        )
    fixed = module.grid if isinstance(module, DualViewEncoder) else None
    if grid is None and fixed is None:
        raise ValueError("explain needs a grid: pass grid=(rows, cols).")
    chosen = TileGrid.of(fixed if grid is None else grid)  # type: ignore[arg-type]  # one of them is given
    if fixed is not None and chosen != fixed:
        raise ValueError(
            f"grid={chosen} was asked for, but this encoder has a fixed grid of {fixed}: omit the argument."
        )
    with use_backend("torch"):  # tensors without contents are no tensors of a GPU
        if isinstance(module, DualViewEncoder):
            stages = _encoder_stages(module, chosen, tokens)
        else:
            tokens = tokens or DEFAULT_TOKENS
            plan = module.plan(chosen, tokens)
            with full_computation():
                full = module.plan(chosen, tokens)
            stages = _stages_of(module, plan, full, chosen, tokens, None)
    known = [s for s in stages if s.planned_cost and s.full_cost]
    total = Stage("total", "", "", _sum([s.planned_cost for s in known]), _sum([s.full_cost for s in known]))
    return Explanation((*stages, total), _implementations(module))


def _implementations(module: nn.Module) -> dict[str, str]:
    """What runs of everything that there is a kernel for, for weights of the module's type where they are.

    Weights on the meta device may come to the GPU, if there is one.
    """
    dem = module.dem if isinstance(module, DualViewEncoder) else module
    if not isinstance(dem, DualPerspectiveEnhance):
        return {}
    names = ["retile", "tile_attention"] + ["fuse_norm"] * isinstance(dem.fusion, BottleneckConcatFusion)
    weight: torch.Tensor = next(dem.parameters())
    if not weight.is_meta:
        return {name: _choice(name, weight) for name in names}
    weight = torch.empty(0, dtype=weight.dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    return {name: _without_remedies(_choice(name, weight)) for name in names}


def _choice(kernel: str, weight: torch.Tensor) -> str:
    try:
        choice = choose(kernel, weight)
    except RuntimeError as error:  # "triton" is asked for, and cannot run: to say why is what this is for
        return f"would raise an error: {error}"
    return f"by {choice.name}: {'; '.join(choice.reasons)}"


def _without_remedies(text: str) -> str:
    """What stands before the colon of each reason: who has no tensors can neither move nor cast them."""
    opening, _, reasons = text.partition(": ")
    return f"{opening}: {'; '.join(reason.partition(': ')[0] for reason in reasons.split('; '))}"


def _sum(costs: list[Cost | None]) -> Cost:
    counted = [cost for cost in costs if cost is not None]
    return Cost(sum(cost.operations for cost in counted), sum(cost.bytes for cost in counted))


def _encoder_stages(module: DualViewEncoder, grid: TileGrid, tokens: Size | None) -> list[Stage]:
    size, (one, features) = grid.map_size(module.tile), _run_of_encoder(module)
    if tokens is None:
        tokens = DEFAULT_TOKENS if features is None else (features.shape[1], features.shape[2])
    planned = module.plan(size, grid, tokens)
    with full_computation():
        full, (one_in_full, _) = module.plan(size, grid, tokens), _run_of_encoder(module)
    resized = ", interpolated inside" if module.resize else ""
    filtered = ", low-pass filtered" if module.low_pass else ""
    passes = module.max_tiles_per_pass
    stages = [
        Stage("canvas", f"{size[0]} x {size[1]} pixels{resized}", ""),
        Stage("local tiles", str(len(planned.local)), str(len(full.local))),
        Stage("stride tiles", f"{len(planned.stride)}{filtered}", str(len(full.stride))),
        Stage("low resolution", _low_view(planned, module.low_res), _low_view(full, module.low_res)),
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
    return stages + _stages_of(module.dem, planned.enhance, full.enhance, grid, tokens, features)


def _layers(layers: LayerPlan) -> str:
    return f"{layers.run} of {layers.total}, {'and' if layers.norm else 'without'} the final norm"


def _run_of_encoder(module: DualViewEncoder) -> tuple[Cost | None, torch.Tensor | None]:
    """What one sub-image costs, and features like its own; None where the encoder cannot be run without contents."""
    encoder = module.encoder
    found: list[torch.Tensor] = []
    inside = encoder if isinstance(encoder, nn.Module) else None
    dtype = torch.float32 if inside is None else next((p.dtype for p in inside.parameters()), torch.float32)

    def call() -> None:
        found.append(encoder(torch.empty(1, 3, *module.tile, dtype=dtype)))

    try:
        cost = cost_of(call, inside)
        return cost, torch.empty(found[0].shape, dtype=found[0].dtype, device="meta")
    except Exception:
        return None, None


def _low_view(plan: ViewPlan, mix: str | None) -> str:
    if plan.low is None:
        return "not used"
    view = plan.views[plan.low]
    what = "1" if view.kind == "low" else f"is {'stride' if view.kind == 'global' else 'local'} tile {view.tile}"
    return f"{what}, mixed by {mix}" if mix else what


Plan: TypeAlias = EnhancePlan | DirectPlan | None


def _stages_of(
    dem: nn.Module | None, planned: Plan, full: Plan, grid: TileGrid, tokens: Size, features: torch.Tensor | None
) -> list[Stage]:
    if isinstance(dem, DualPerspectiveEnhance):
        assert isinstance(planned, EnhancePlan), "a DEM makes such plans"
        assert isinstance(full, EnhancePlan), "a DEM makes such plans"
        return _dem_stages(dem, planned, full, grid, tokens)
    return _direct_stages(dem, planned, full, grid, tokens, features) if isinstance(dem, DirectReadout) else []


def _dem_stages(
    dem: DualPerspectiveEnhance, planned: EnhancePlan, full: EnhancePlan, grid: TileGrid, tokens: Size
) -> list[Stage]:
    dtype = next(dem.parameters()).dtype

    def map_of_tiles() -> torch.Tensor:
        return torch.empty(1, grid.num_tiles, *tokens, dem.dim, dtype=dtype)

    def costs(plan: EnhancePlan) -> list[Cost]:
        """Of each direction, and of what follows them."""
        parts = []
        for d in plan.directions:
            call = partial(dem.compute_direction, d, plan, map_of_tiles, grid)
            parts.append(cost_of(call, dem))
        whole = cost_of(lambda: dem(map_of_tiles(), map_of_tiles(), grid), dem)
        rest = Cost(*(w - sum(part[i] for part in parts) for i, w in enumerate(whole)))
        return [*parts, rest]

    cost = costs(planned)
    with full_computation():
        full_cost = costs(full)
    stages = [
        Stage("V_loc" if d.query == "local" else "V_glo", _direction(d), _direction(f), p, c)
        for d, f, p, c in zip(planned.directions, full.directions, cost, full_cost, strict=False)
    ]
    read = "pooled before W_v" if planned.commutes else f"{len(planned.read[0]) * len(planned.read[1])} tokens"
    everything = f"{grid.num_tiles * tokens[0] * tokens[1]} tokens"
    name = "fusion, readout"
    return [
        Stage("DEM", ", ".join(_options(dem)), ""),
        *stages,
        Stage(name, f"{type(dem.fusion).__name__}, {read}, {dem.readout}", everything, cost[-1], full_cost[-1]),
    ]


def _options(dem: DualPerspectiveEnhance) -> list[str]:
    """Every option of the module that a row of its own does not show."""
    attention = dem.attentions[0]
    assert isinstance(attention, TileAttention)
    both = "separate weights" if len(dem.attentions) > 1 else "shared weights"
    present = {
        both: dem.enhance == "both",
        "biases": attention.q_proj.bias is not None,
        "output projection": attention.out_proj is not None,
        "residual": attention.residual,
        "norm": attention.norm is not None,
        f"both roles played by the {dem.source} map": dem.source != "dual",
        "keys low-pass filtered": dem.low_pass,
        "gate": dem.gate is not None,
    }
    return [f"width {dem.dim}", f"heads {attention.num_heads}", *(name for name, there in present.items() if there)]


def _direction(d: DirectionPlan) -> str:
    cut = "block" if d.cut == "local" else "stride"
    text = f"{d.num_tiles} {cut}{'s' if d.num_tiles > 1 else ''} x {d.queries} queries x {d.keys} keys"
    text += ", absorbed" if d.absorb else ""
    return text + (f", pooled over {d.pool}" if d.pool else "")


def _direct_stages(
    direct: DirectReadout, planned: Plan, full: Plan, grid: TileGrid, tokens: Size, features: torch.Tensor | None
) -> list[Stage]:
    def cost() -> Cost | None:
        if features is None:  # a readout alone has no width
            return None
        shape, dtype = (1, grid.num_tiles, *tokens, features.shape[-1]), features.dtype
        return cost_of(lambda: direct(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype), grid))

    assert planned is not None
    assert full is not None
    texts = [f"{len(plan.live.local) + len(plan.live.stride)} tiles" for plan in (planned, full)]
    with full_computation():
        full_cost = cost()
    return [Stage("readout", f"{texts[0]}, {direct.source}, {direct.readout}", texts[1], cost(), full_cost)]
