"""Accuracy over the height of glyphs and the period of gratings, drawn from a document."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from dualview.probe.document import Document
from dualview.probe.results import Results
from dualview.probe.scenes import LARGE, PERIODS, SIZES

PANELS = (
    ("read at a place", SIZES, "height of the glyph, pixels"),
    ("read at a marker", SIZES, "height of the glyph, pixels"),
    ("read a large glyph", LARGE, "height of the glyph, pixels"),
    ("direction of a grating", PERIODS, "period, pixels"),
)
DRAWN = (
    *("thumbnail", "local", "stride", "DEM released", "local + thumbnail, linear"),
    *("DEM released, thumbnail for stride", "DEM paper", "DEM paper + residual + norm"),
)


def draw(document: Document, form: str = "png") -> bytes:
    """The figure, as PNG or SVG; the same document gives the same bytes.

    Args:
        document: What `dualview probe` wrote.
        form: "png" or "svg".
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = Results(document)
    with rc_context({"svg.hashsalt": "dualview", "font.size": 9}):
        figure = Figure(figsize=(11, 7), layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(2, 2).flat
        for axes, (task, levels, unit) in zip(panels, PANELS, strict=True):
            for arm in (arm for arm in DRAWN if arm in results.rows):
                at = [results.accuracy(arm, task, level=level) for level in levels]
                below = [max(0.0, i.mean - i.low) for i in at]
                above = [max(0.0, i.high - i.mean) for i in at]
                axes.errorbar(levels, [i.mean for i in at], (below, above), marker="o", ms=3, lw=1, label=arm)
            axes.set(title=task, xlabel=unit, ylabel="accuracy", ylim=(0, 1.02), xscale="log")
            axes.set_xticks(levels, [str(level) for level in levels])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        written = BytesIO()
        figure.savefig(written, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return written.getvalue()
