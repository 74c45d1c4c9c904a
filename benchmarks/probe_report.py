"""The page of the probe: `python -m benchmarks.probe_report` writes docs/probe.md and its figure from the results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import probe_tables as tables
from dualview.probe.backgrounds import PHOTOGRAPHS
from dualview.probe.document import Document
from dualview.probe.figure import draw
from dualview.probe.results import Results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "probe"
TEMPLATE = ROOT / "benchmarks" / "probe_page.md"
PAGE, FIGURE = ROOT / "docs" / "probe.md", ROOT / "docs" / "assets" / "probe.svg"

LINEAR, STRIDE_LINEAR = "local + thumbnail, linear", "local + stride, linear"
MATCHED, DIRECT = "MLP of as many parameters", "direct cross-attention"
RELEASED, THUMBNAIL = "DEM released", "DEM released, thumbnail for stride"
SMOOTH, PAPER = "DEM released, smoothed stride", "DEM paper"
RESIDUAL, FIXED = "DEM paper + residual", "DEM paper + residual + norm"
MAIN = (
    *("thumbnail", "local", "stride", "local + stride, added", LINEAR, STRIDE_LINEAR, MATCHED, DIRECT),
    *(RELEASED, "DEM released, local in both roles", THUMBNAIL, SMOOTH, PAPER, FIXED),
)
WHY = (
    *(PAPER, "DEM paper + norm", RESIDUAL, FIXED, "DEM paper, 8 heads", "DEM paper, logits x 8"),
    *("DEM paper, one start for q, k, v", "DEM paper, one start, logits x 8"),
)
GAPS = {
    "thumbnail_helps": (LINEAR, "local", None),
    "thumbnail_helps_large": (LINEAR, "local", "read a large glyph"),
    "stride_thumbnail": (STRIDE_LINEAR, LINEAR, None),
    "thumbnail_in_dem": (THUMBNAIL, RELEASED, None),
    "released_local": (RELEASED, "local", None),
    "released_linear": (RELEASED, LINEAR, None),
    "paper_local": (PAPER, "local", None),
    "paper_residual": (RESIDUAL, PAPER, None),
    "fixed_linear": (FIXED, STRIDE_LINEAR, None),
    "fixed_linear_place": (FIXED, STRIDE_LINEAR, "read at a place"),
    "fixed_matched": (FIXED, MATCHED, None),
    "direct_released": (DIRECT, RELEASED, None),
    "smooth_gain": (SMOOTH, RELEASED, None),
    "thumbnail_smooth": (THUMBNAIL, SMOOTH, None),
}
"""Differences that the text names: an arm, the one it is held against, the task."""


def page(document: Document) -> str:
    """The page of the full grid."""
    return TEMPLATE.read_text(encoding="utf-8").format_map(_facts(document) | _tables(document))


def _facts(document: Document) -> dict[str, str]:
    results, budget = Results(document), document["budget"]
    train, check, test = document["pages"]["336"]
    markers = [100 * results.accuracy(arm, "read at a marker").mean for arm in MAIN]
    gaps = {
        name: tables.signed(results.accuracy(arm, task, against=against)).strip("*")
        for name, (arm, against, task) in GAPS.items()
    }
    photographs = (f"{name} ({licence})" for of in PHOTOGRAPHS.values() for name, licence in of.items())
    return gaps | {
        "seeds": str(len(document["seeds"])),
        "steps": f"{budget['steps']:,}",
        "batch": str(budget["batch"]),
        "rate": f"{budget['rate']:g}",
        "train": f"{train:,}",
        "check": str(check),
        "test": f"{test:,}",
        "gpu": document["machine"]["gpu"],
        "torch": document["versions"]["torch"],
        "date": document["created"][:10],
        "marker_low": f"{min(markers):.0f}",
        "marker_high": f"{max(markers):.0f}",
        "missing": tables.not_reached(document),
        "photographs": "; ".join(photographs),
    }


def _tables(document: Document) -> dict[str, str]:
    results = Results(document)
    levels = ("read at a place", "read at a marker", "read a large glyph", "compare")
    sampled = ("thumbnail", "stride", "local", RELEASED, PAPER)
    return {
        "accuracy": tables.by_task(results, MAIN),
        "levels": "\n\n".join(tables.by_level(results, MAIN, task) for task in levels),
        "costs": tables.costs(results, MAIN),
        "blank": tables.blanked(results),
        **{f"table{n}": tables.of_paper(results, str(n)) for n in (3, 4, 6)},
        "offset": tables.by_offset(results, MAIN),
        "why": tables.by_task(results, WHY),
        "attention": tables.attention(results),
        "gratings": tables.by_level(results, sampled, "direction of a grating"),
        "seams": tables.by_seam(results, ("local", LINEAR, STRIDE_LINEAR, MATCHED, RELEASED, FIXED)),
        "convergence": tables.convergence(results),
        "shift": tables.shift(document),
        "memory": tables.memory(document, training=False),
        "memory_training": tables.memory(document, training=True),
        "points": tables.operating_points(document),
    }


def load(name: str) -> Document:
    """A committed document."""
    found: Document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Write the page and its figure."""
    document = load("h100")
    PAGE.write_text(page(document), encoding="utf-8")
    FIGURE.write_bytes(draw(document, "svg"))


if __name__ == "__main__":
    main()
