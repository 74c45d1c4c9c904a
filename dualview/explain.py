"""What a given module computes, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dualview.geometry import GridLike, Size, TileGrid
from dualview.models.dual_view_encoder import DualViewEncoder
from dualview.ops.direct_readout import DirectReadout
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.plan import CROP_OF_QUERY


@dataclass(frozen=True)
class Stage:
    """One row: the stage, what it does, how many items it computes, and the shape it gives (per image)."""

    name: str
    what: str
    count: str
    shape: str


@dataclass(frozen=True)
class Explanation:
    """Rows of a table; ``print`` shows them aligned."""

    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        rows = [("stage", "what", "count", "shape per image")]
        rows += [(s.name, s.what, s.count, s.shape) for s in self.stages]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def explain(module: nn.Module, *, grid: GridLike | None = None, tokens: Size = (24, 24)) -> Explanation:
    """Which sub-images and tokens a DEM or a dual-view encoder computes for one image.

    Args:
        module: A [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance],
            [`DirectReadout`][dualview.DirectReadout] or [`DualViewEncoder`][dualview.DualViewEncoder].
        grid: Rows and columns of tiles; may be omitted where the encoder has a fixed grid.
        tokens: Token map (h', w') of one tile; (24, 24) is ViT-L/14 at 336 pixels.

    Raises:
        ValueError: No grid is known, or another than the encoder's fixed one is asked for.
        TypeError: ``module`` is something else.

    Example:
        >>> print(explain(DualPerspectiveEnhance.released(1024), grid=(3, 3)).stages[0].what)
        heads 8, local queries, both maps cut by strides
    """
    if not isinstance(module, (DualPerspectiveEnhance, DirectReadout, DualViewEncoder)):
        raise TypeError(
            f"explain knows DualPerspectiveEnhance, DirectReadout and DualViewEncoder; got {type(module).__name__}."
        )
    fixed = module.grid if isinstance(module, DualViewEncoder) else None
    chosen = fixed if grid is None else TileGrid.of(grid)
    if chosen is None:
        raise ValueError("explain needs a grid: pass grid=(rows, cols).")
    if fixed not in (None, chosen):
        raise ValueError(
            f"grid={chosen} was asked for, but this encoder has a fixed grid of {fixed}: omit the argument."
        )
    if isinstance(module, DualViewEncoder):
        return Explanation(tuple(_encoder_stages(module, chosen, tokens)))
    return Explanation(tuple(_dem_stages(module, chosen, tokens)))


def _encoder_stages(module: DualViewEncoder, grid: TileGrid, tokens: Size) -> list[Stage]:
    n, (h, w) = grid.num_tiles, module.tile
    high = 2 * n if module.dem is not None and n > 1 else 0
    low = 1 if module.low_res is not None or module.dem is None or n == 1 else 0
    stages = []
    if high:
        stages += [
            Stage("local crop", "contiguous blocks", f"{n} sub-images", f"{n} x 3 x {h} x {w}"),
            Stage("stride crop", "interleaved strides", f"{n} sub-images", f"{n} x 3 x {h} x {w}"),
        ]
    if low:
        stages.append(Stage("low resolution", f"image reduced to {h} x {w}", "1 sub-image", f"1 x 3 x {h} x {w}"))
    stages.append(
        Stage(
            "encoder",
            type(module.encoder).__name__,
            f"{high + low} sub-images",
            f"{high + low} x {tokens[0]} x {tokens[1]}",
        )
    )
    if isinstance(module.dem, (DualPerspectiveEnhance, DirectReadout)):
        stages += _dem_stages(module.dem, grid, tokens)
    if module.dem is not None and module.low_res is not None:
        stages.append(Stage("mix", f"{module.low_res} with the low-resolution view", _tokens(tokens), _shape(tokens)))
    return stages


def _dem_stages(module: DualPerspectiveEnhance | DirectReadout, grid: TileGrid, tokens: Size) -> list[Stage]:
    size = grid.map_size(tokens)
    stages = []
    if isinstance(module, DualPerspectiveEnhance):
        cell = tokens[0] * tokens[1]
        for query, other in (("local", "global"), ("global", "local")):
            if module.enhance == other:
                continue
            cut = "blocks" if CROP_OF_QUERY[module.pairing][query] == "local" else "strides"  # type: ignore[index]
            heads = module.attentions[0].num_heads
            stages.append(
                Stage(
                    f"V_{'loc' if query == 'local' else 'glo'}",
                    f"heads {heads}, {query} queries, both maps cut by {cut}",
                    f"{grid.num_tiles} x {cell} queries x {cell} keys",
                    _shape(size, module.dim),
                )
            )
        stages.append(Stage("fusion", type(module.fusion).__name__, _tokens(size), _shape(size, module.dim)))
    else:
        stages.append(Stage("recombine", f"{module.source} features, no enhancement", _tokens(size), _shape(size)))
    out = size if module.readout == "none" else tokens
    stages.append(Stage("readout", module.readout, _tokens(out), _shape(out)))
    return stages


def _tokens(size: Size) -> str:
    return f"{size[0] * size[1]} tokens"


def _shape(size: Size, dim: int | None = None) -> str:
    return f"{size[0]} x {size[1]}" + (f" x {dim}" if dim else "")
