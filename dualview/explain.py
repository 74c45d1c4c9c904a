"""What a module computes, and what it leaves out, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor, nn

from dualview.arguments import check_size, shown
from dualview.cost import Cost, device_of
from dualview.geometry import GridLike, Size, TileGrid
from dualview.kernels.dispatch import BACKEND, choose
from dualview.models.parts import DualView
from dualview.models.view_plan import method_of
from dualview.ops.planned.products import rates_of
from dualview.stages import DEFAULT_TOKENS, Features, Stage, arranged_products, encoder_stages, enhances, stages_of
from dualview.switches import planning

GAP = "  "  # between the columns of the table
MIN_WIDTH = 24  # of what is said of a stage, however narrow the terminal is


@dataclass(frozen=True)
class Explanation:
    """Rows of a table; ``print`` shows them aligned.

    Attributes:
        stages: The rows, in the order of computation; the last is the sum of those whose cost is known.
        implementations: Of everything that there is a kernel for, by name: what runs now, and why.
        products: How the products of the enhancement are arranged: by which estimated time, or why they are not.
    """

    stages: tuple[Stage, ...]
    implementations: dict[str, str] = field(default_factory=dict)
    products: str = ""

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
        if self.products:
            lines += wrap(f"products {self.products}", max(room, MIN_WIDTH), break_on_hyphens=False)
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
    """Which sub-images and tokens a DEM or a dual-view model computes for one image, and at what cost.

    Beside each figure stands that of the full computation, which gives the same output. Operations count matrix
    products, convolutions and attention, two for a multiply-addition; bytes are read and written by every operation as
    if nothing stayed in a cache. They are found by running copies of the stages on tensors without contents: the module
    is neither run nor changed. Below the table stands how the products of the enhancement are arranged, and what runs
    of everything that there is a Triton kernel for, and why.

    Args:
        module: A [`DualViewEncoder`][dualview.DualViewEncoder], an `InfLlavaModel` or
            `InfLlavaForConditionalGeneration`, or a dem that declares a plan:
            [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance], [`DirectReadout`][dualview.DirectReadout], or
            one of your own (``dualview.models.parts.DeclaresTiles``).
        grid: Rows and columns of tiles; may be omitted where the model has a grid. With an INF-LLaVA it is that of an
            image with ``image_grids``.
        tokens: Token map (h', w') of one tile. None: what the encoder gives, or (24, 24), as ViT-L/14 at 336 pixels.

    Raises:
        ValueError: No grid is known, another than the encoder's fixed one is asked for, or a size is not positive.
        TypeError: ``module`` declares no plan.

    Example:
        >>> from dualview import DualPerspectiveEnhance
        >>> dem = DualPerspectiveEnhance.released(1024, device="meta")
        >>> stages = {stage.name: stage for stage in explain(dem, grid=(3, 3)).stages}
        >>> stages["V_glo"].planned, stages["V_glo"].full
        ('9 blocks x 64 queries x 576 keys, absorbed', '9 blocks x 576 queries x 576 keys')
    """
    parts_of, plan_of = method_of(module, "dual_view"), method_of(module, "plan")
    if (parts_of is None and plan_of is None) or isinstance(module, type):
        raise TypeError(
            f"module={shown(module)}: explain knows DualPerspectiveEnhance, DirectReadout, DualViewEncoder, INF-LLaVA "
            "and modules that declare `plan(grid, tokens)`, not their classes."
        )
    tokens = None if tokens is None else check_size(tokens, "tokens")
    parts: DualView | None = None if parts_of is None else parts_of(grid)
    chosen = grid if parts is None else parts.options.grid
    if chosen is None:
        raise ValueError("grid=None: explain needs a grid: pass grid=(rows, cols).")
    size = TileGrid.of(chosen)
    with BACKEND.holding(("torch", "explain"), traced=False):  # tensors without contents are no tensors of a GPU
        dem = module if parts is None else parts.dem
        stages: list[Stage] = []
        features = Features(tokens or DEFAULT_TOKENS)
        if parts is not None:
            stages, features = encoder_stages(parts, size, tokens)
        stages += stages_of(dem, size, features)
        arranged = _arranged(dem, size, features.tokens)
    known = [s for s in stages if s.planned_cost and s.full_cost]
    total = Stage("total", "", "", _sum([s.planned_cost for s in known]), _sum([s.full_cost for s in known]))
    return Explanation((*stages, total), _implementations(dem), arranged)


def _implementations(dem: Any) -> dict[str, str]:
    """What runs of everything that there is a kernel for, for weights of the dem's type where they are."""
    if dem is None or not enhances(dem):
        return {}
    weight: Tensor = next(dem.parameters())
    found = _choice("retile", _weight_of(dem))
    return {"retile": _without_remedies(found) if weight.is_meta else found}


def _choice(kernel: str, weight: Tensor) -> str:
    try:
        choice = choose(kernel, weight)
    except RuntimeError as error:  # "triton" is asked for, and cannot run: to say why is what this is for
        return f"would raise an error: {error}"
    return f"by {choice.name}: {'; '.join(choice.reasons)}"


def _without_remedies(text: str) -> str:
    """What stands before the colon of each reason: who has no tensors can neither move nor cast them."""
    opening, _, reasons = text.partition(": ")
    return f"{opening}: {'; '.join(reason.partition(': ')[0] for reason in reasons.split('; '))}"


def _weight_of(dem: Any) -> Tensor:
    """A tensor of the type of the dem's weights, where they are or may come to be."""
    weight: Tensor = next(dem.parameters())
    return torch.empty(0, dtype=weight.dtype, device=device_of(weight))


def _arranged(dem: nn.Module | None, grid: TileGrid, tokens: Size) -> str:
    """How the products of a dem are arranged, or why they are not."""
    if not enhances(dem):
        return ""
    weight, products = _weight_of(dem), arranged_products(dem, grid, tokens)
    place = f"{weight.device} and {str(weight.dtype).removeprefix('torch.')}"
    if products.estimates:
        stands, (least, *others) = products.estimates[0], sorted(set(products.estimates))
        more = dict.fromkeys(others[:1], "in the next best order")
        more |= {} if stands == least else {stands: "as the equations stand"}
        text = "".join(f", {1000 * seconds:.3g} ms {order}" for seconds, order in more.items())
        how = "not rearranged, by" if stands == least else "rearranged by"
        return f"{how} the rates of {place}: {1000 * least:.3g} ms estimated for one image{text}"
    if not planning():
        return "not rearranged: full_computation computes the equations as they stand"
    if rates_of(weight.device, weight.dtype) is None:
        return f"not rearranged: no rates have been measured for {place}, by which to estimate times"
    return "not rearranged: layers that are hooked, wrapped or replaced are called as they are"


def _sum(costs: list[Cost | None]) -> Cost:
    counted = [cost for cost in costs if cost is not None]
    return Cost(sum(cost.operations for cost in counted), sum(cost.bytes for cost in counted))
