"""The page of the probe: `python -m benchmarks.probe_report` writes docs/probe.md and its figure from the results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks import probe_tables as tables
from benchmarks.probe_cpu import AVERAGE, EMBEDDED, FASTER, ORDER
from benchmarks.results import FOLDER
from dualview.probe.backgrounds import PHOTOGRAPHS
from dualview.probe.document import Document
from dualview.probe.figure import draw
from dualview.probe.results import Results

ROOT = Path(__file__).parents[1]
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
REDUCED_GAPS = {
    "average": (AVERAGE, RELEASED, None),
    "average_place": (AVERAGE, RELEASED, "read at a place"),
    "concat": (EMBEDDED, AVERAGE, None),
    "concat_place": (EMBEDDED, AVERAGE, "read at a place"),
    "average_linear": (AVERAGE, LINEAR, None),
    "embedded_linear": (EMBEDDED, LINEAR, None),
    "conv": (f"{RELEASED}, conv3x3", RELEASED, None),
    "average_thumb": (f"{AVERAGE}, thumbnail for stride", AVERAGE, None),
    "phases": (f"{RELEASED}, learnt phases", RELEASED, None),
    "faster": (f"{RELEASED}, 2 x the rate", RELEASED, None),
}
"""The same of the reduced series."""
PAIRS = (
    *((AVERAGE, RELEASED), (EMBEDDED, AVERAGE), (EMBEDDED, RELEASED), (RELEASED, LINEAR), (AVERAGE, LINEAR)),
    *((EMBEDDED, LINEAR), (RELEASED, "local"), (AVERAGE, "local"), (EMBEDDED, "local"), (AVERAGE, FIXED)),
    *((EMBEDDED, STRIDE_LINEAR), (EMBEDDED, MATCHED), (EMBEDDED, FIXED)),
    *((FIXED, LINEAR), (FIXED, RELEASED), (LINEAR, "local"), (f"{AVERAGE}, thumbnail for stride", AVERAGE)),
    *((f"{name}, 2 x the rate", name) for name in FASTER),
)
"""What the reduced series holds against each other."""


def page(document: Document, reduced: Document, backbone: Document) -> str:
    """The page of the full grid, of the reduced series, and of the pretrained network."""
    facts = _facts(document) | _reduced_facts(document, reduced)
    glyphs = {row["glyphs"] for row in backbone["shift"] if row["stride"] == 3}
    facts |= {"backbone_pages": str(backbone["pages"]), "backbone_glyphs": f"{max(glyphs):,}"}
    shown = _tables(document) | _reduced_tables(reduced) | {"backbone_shift": tables.shift(backbone)}
    return TEMPLATE.read_text(encoding="utf-8").format_map(facts | shown)


def _gaps(results: Results, of: Mapping[str, tuple[str, str, str | None]]) -> dict[str, str]:
    return {
        name: tables.signed(results.accuracy(arm, task, against=against)).strip("*")
        for name, (arm, against, task) in of.items()
    }


def _seed_range(results: Results) -> float:
    """How far the differences of an arm to the released module lie apart over the seeds, the farthest, in points."""
    right = {arm: results.right(arm, sorted(results.rows[arm])) for arm in MAIN}
    means = {arm: (of * results.weights()).sum((1, 2)) / len(results.questions) for arm, of in right.items()}
    return max(100 * float(np.ptp(means[arm] - means[RELEASED])) for arm in MAIN)


def _reduced_facts(document: Document, reduced: Document) -> dict[str, str]:
    budget, made = reduced["budget"], reduced["machine"]
    train, check, test = reduced["pages"]["336"]
    facts = _gaps(Results(reduced), REDUCED_GAPS) | {
        "steps": f"{budget['steps']:,}",
        "batch": str(budget["batch"]),
        "train": f"{train:,}",
        "check": str(check),
        "test": f"{test:,}",
        "machine": f"{made['name']}, {made['cores']} cores that other work used as well, {made['threads']} thread",
        "torch": reduced["versions"]["torch"],
        "date": reduced["created"][:10],
        "commit": reduced["commit"],
        "found": tables.found_elsewhere(document, reduced),
        "missing": tables.not_reached(reduced),
    }
    missing = tables.not_reached(document, {row["arm"] for row in reduced["rows"]})
    return {f"reduced_{name}": fact for name, fact in facts.items()} | {"missing": missing}


def _reduced_tables(reduced: Document) -> dict[str, str]:
    results = Results(reduced)
    reading = (RELEASED, AVERAGE, EMBEDDED, LINEAR, "local", FIXED)
    shown = {
        "accuracy": tables.by_task(results, results.arms),
        "costs": tables.costs(results, ORDER, timed=False),
        "pairs": tables.differences(results, PAIRS),
        "levels": tables.by_level(results, reading, "read at a place"),
        "offset": tables.by_offset(results, reading),
        "convergence": tables.convergence(results),
        **{f"table{n}": tables.of_paper(results, str(n)) for n in (3, 5, 6)},
    }
    return {f"reduced_{name}": table for name, table in shown.items()}


def _facts(document: Document) -> dict[str, str]:
    results, budget = Results(document), document["budget"]
    train, check, test = document["pages"]["336"]
    markers = [100 * results.accuracy(arm, "read at a marker").mean for arm in MAIN]
    photographs = (f"{name} ({licence})" for of in PHOTOGRAPHS.values() for name, licence in of.items())
    return _gaps(results, GAPS) | {
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
        "seed_range": f"{_seed_range(results):.1f}",
        "marker_low": f"{min(markers):.0f}",
        "marker_high": f"{max(markers):.0f}",
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
    found: Document = json.loads((FOLDER / "probe" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Write the page and its figure."""
    document = load("h100")
    PAGE.write_text(page(document, load("cpu"), load("backbone")), encoding="utf-8")
    FIGURE.write_bytes(draw(document, "svg"))


if __name__ == "__main__":
    main()
