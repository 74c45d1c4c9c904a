"""Tables of the probe's results, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dualview.probe.arms import ARMS
from dualview.probe.document import Document, missing
from dualview.probe.draws import Draw
from dualview.probe.questions import TASKS
from dualview.probe.results import LEVEL, SHORT, TASK, Results, chance
from dualview.probe.scenes import CELL, LARGE, PERIODS, SIZES
from dualview.probe.statistics import Interval

REFERENCE = "DEM released"
PICKED = ("read at a place", "read a large glyph", "compare")
"""Tasks of the shorter tables."""


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def share(interval: Interval) -> str:
    """A mean in percent, with its interval."""
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def signed(interval: Interval) -> str:
    """A difference in points, with its interval; bold where the interval does not hold 0."""
    text = f"{100 * interval.mean:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text


def by_task(results: Results, arms: Iterable[str]) -> str:
    """Accuracy by task in percent."""
    rows = [["*chance*", "", *(f"{100 * chance(task):.0f}" for task in TASKS)]]
    for arm in (arm for arm in arms if arm in results.rows):
        means = [100 * results.accuracy(arm, task).mean for task in TASKS]
        rows.append([arm, share(results.accuracy(arm)), *(f"{mean:.1f}" for mean in means)])
    return markdown(("arm", "mean of the tasks", *SHORT), rows)


def costs(results: Results, arms: Iterable[str], *, timed: bool = True) -> str:
    """Difference to the released module, parameters, operations, and time where nothing else ran on the machine."""
    head = ["arm", "against DEM released, points", "parameters", "M operations a page"]
    rows = []
    for arm in (arm for arm in arms if arm in results.rows):
        cost = results.document["cost"][arm]
        rows.append(
            [
                arm,
                "" if arm == REFERENCE else signed(results.accuracy(arm, against=REFERENCE)),
                f"{cost['parameters']:,.0f}",
                f"{cost['operations'] / 1e6:,.1f}",
                *([f"{1e6 * cost['seconds']:,.0f}", str(len(results.rows[arm]))] if timed else []),
            ]
        )
    return markdown([*head, *(["µs a page", "seeds"] if timed else [])], rows)


def by_level(results: Results, arms: Iterable[str], task: str) -> str:
    """Accuracy over the height of glyphs or the period of gratings, in percent."""
    levels = {"read a large glyph": LARGE, "direction of a grating": PERIODS}.get(task, SIZES)
    rows = [
        [arm, *(f"{100 * results.accuracy(arm, task, level=level).mean:.1f}" for level in levels)]
        for arm in arms
        if arm in results.rows
    ]
    return markdown((task, *(f"{level} px" for level in levels)), rows)


def by_seam(results: Results, arms: Iterable[str]) -> str:
    """Accuracy on and off seams, in percent."""
    task = "read at a seam"
    rows = [
        [arm, *(share(results.accuracy(arm, task, seam=seam)) for seam in (False, True))]
        for arm in arms
        if arm in results.rows
    ]
    return markdown(("arm", "off the seam", "on the seam"), rows)


def of_paper(results: Results, table: str) -> str:
    """The rows of one of the paper's tables, by our readings."""
    names = [arm.name for arm in ARMS if table in arm.table.split(", ") and arm.pixels == 336]
    rows = [
        [
            arm,
            share(results.accuracy(arm)),
            "" if arm == REFERENCE else signed(results.accuracy(arm, against=REFERENCE)),
            *(f"{100 * results.accuracy(arm, task).mean:.1f}" for task in PICKED),
        ]
        for arm in names
        if arm in results.rows
    ]
    if len(rows) < 2:
        return "Not reached."
    return markdown(("arm", "mean of the tasks", "against DEM released", *PICKED), rows)


def differences(results: Results, pairs: Iterable[tuple[str, str]]) -> str:
    """Of pairs that were trained, an arm against another."""
    rows = [
        [arm, against, *(signed(results.accuracy(arm, task, against=against)) for task in (None, *PICKED))]
        for arm, against in pairs
        if {arm, against} <= results.rows.keys()
    ]
    return markdown(("arm", "against", "mean of the tasks", *PICKED), rows)


def blanked(results: Results) -> str:
    """Accuracy with one view replaced by its mean at test time."""
    rows = []
    for arm in results.arms:
        for view in results.facts(arm)["blank"]:
            seen = [f"{100 * results.accuracy(arm, task, blank=view).mean:.1f}" for task in TASKS]
            rows.append([arm, view, share(results.accuracy(arm, blank=view)), *seen])
    return markdown(("arm", "blank", "mean of the tasks", *SHORT), rows)


def attention(results: Results) -> str:
    """What attention does at the start and the end, and the gradients of the first step."""
    rows = []
    for arm in results.arms:
        facts = results.facts(arm)["attention"]
        for role in facts.get("start", {}):
            start, end = facts["start"][role], facts["end"][role]
            gradients = facts["gradients"]
            ratio = (gradients["q_proj"] + gradients["k_proj"]) / (2 * gradients["v_proj"])
            rows.append(
                [
                    arm,
                    role,
                    f"{start['entropy']:.3f} to {end['entropy']:.3f}",
                    f"{start['detail_in']:.2f}",
                    f"{start['detail']:.3f} to {end['detail']:.3f}",
                    f"{ratio:.3f}",
                ]
            )
    head = ("arm", "who asks", "entropy", "detail of the query", "detail of the output", "gradient of q, k over v")
    return markdown(head, rows)


def convergence(results: Results) -> str:
    """Accuracy on pages kept for checking, in the course of training, mean over the seeds."""
    rows = []
    for arm in results.arms:
        curves = [row["curve"] for row in results.rows[arm].values()]
        half, late, end = (
            sum(curve[place][1] for curve in curves) / len(curves)
            for place in (len(curves[0]) // 2 - 1, len(curves[0]) * 9 // 10 - 1, -1)
        )
        rows.append([arm, str(curves[0][-1][0]), *(f"{100 * x:.1f}" for x in (half, late, end))])
    return markdown(("arm", "steps", "after half", "after nine tenths", "at the end"), rows)


def shift(document: Document) -> str:
    """The encoder on stride tiles, mean over the seeds."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in document["shift"]:
        rows.setdefault((row["stride"], row["kind"]), []).append(row)
    names = {
        "cosine_thumbnail": "cosine to the thumbnail",
        "cosine_local": "cosine to local tokens",
        "mean_shift": "shift of the mean",
        "spread": "spread",
        "reconstruction": "error of the decoder",
        "accuracy": "probe of the thumbnail",
        "accuracy_own": "probe of its own",
    }
    body = [
        [str(n), kind, *(f"{sum(row[name] for row in of) / len(of):.3f}" for name in names)]
        for (n, kind), of in rows.items()
    ]
    return markdown(("stride", "tile", *names.values()), body)


def memory(document: Document, training: bool) -> str:
    """Peak memory in MiB beside that of the attention weights alone.

    With gradients the library's own operation is used whatever torch is told, and keeps no weights.
    """
    rows = [row for row in document["memory"] if row["training"] == training]
    kept = ("fused",) if training else ("materialised", "fused")
    names = {"materialised": "weights kept", "fused": "weights not kept"}
    body = []
    for n in dict.fromkeys(row["grid"] for row in rows):
        of = {(row["what"], row["scores"]): row for row in rows if row["grid"] == n}
        predicted = [of["all tokens", "fused"], of["direct cross-attention", "fused"]]
        measured = [of[what, scores]["peak_bytes"] for scores in kept for what in WAYS]
        body.append([f"{336 * n}", *map(_mebibytes, [*(row["scores_bytes"] for row in predicted), *measured])])
    head = [f"{way}, {names[scores]}" for scores in kept for way in WAYS.values()]
    return markdown(("pixels a side", "predicted weights, DEM", "predicted weights, direct", *head), body)


WAYS = {"as the readout needs": "DEM, what is read", "all tokens": "DEM in full", "direct cross-attention": "direct"}


def _mebibytes(count: int | None) -> str:
    return "out of memory" if count is None else f"{count / 2**20:,.0f}"


def operating_points(document: Document, budgets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)) -> str:
    """The largest measured page, in pixels a side, that fits a budget in MiB, by way to compute."""
    body = []
    for training, scores in ((False, "materialised"), (False, "fused"), (True, "fused")):
        for what, name in WAYS.items():
            rows = [
                row
                for row in document["memory"]
                if (row["what"], row["scores"], row["training"]) == (what, scores, training)
            ]
            kind = "training" if training else "inference, weights " + ("not kept" if scores == "fused" else "kept")
            sides = []
            for budget in budgets:
                fits = [row["grid"] for row in rows if (row["peak_bytes"] or 2**60) <= budget * 2**20]
                sides.append(str(336 * max(fits)) if fits else "none")
            body.append([name, kind, *sides])
    return markdown(("way", "for", *(f"{budget} MiB" for budget in budgets)), body)


def by_offset(results: Results, arms: Iterable[str], largest: int = 10) -> str:
    """Accuracy of reading small glyphs by how far their middle is from that of their cell of 42 pixels."""
    draw = Draw("test", "test", 0, results.document["pages"][str(results.pixels)][2], results.pixels)
    off = np.full(results.questions.shape[:2], -1)
    for i in range(draw.count):
        middle = {(g.row + 1, g.col + 1): (g.y - CELL * g.row, g.x - CELL * g.col) for g in draw.scene(i).glyphs}
        for j, q in enumerate(results.questions[i]):
            if q[TASK] in READING and q[LEVEL] <= largest:
                off[i, j] = max(abs(p - CELL // 2) for p in middle[q[1], q[2]])
    bands = ((0, 4), (4, 7), (7, 11), (11, CELL))
    rows = []
    for arm in (arm for arm in arms if arm in results.rows):
        right = results.right(arm, list(results.rows[arm]))
        rows.append([arm, *(f"{100 * right[:, (off >= low) & (off < high)].mean():.1f}" for low, high in bands)])
    head = ("at a place or a seam, 6 to 10 px", "up to 3 px off", "4 to 6", "7 to 10", "11 and more")
    return markdown(head, rows)


READING = [list(TASKS).index(task) for task in ("read at a place", "read at a seam")]


def not_reached(document: Document, found: Iterable[str] = ()) -> str:
    """Arms and seeds that were planned and not trained in time, but for the arms found elsewhere."""
    left: dict[str, list[str]] = {}
    for arm, seed in missing(document):
        left.setdefault(arm, []).append(str(seed))
    lines = [f"- {arm}: seed {', '.join(seeds)}" for arm, seeds in left.items() if arm not in found]
    return "\n".join(lines) or "Nothing."


def found_elsewhere(document: Document, other: Document) -> str:
    """Of those arms the ones that another document has, each with its seeds there."""
    seeds: dict[str, list[str]] = {}
    for row in other["rows"]:
        seeds.setdefault(row["arm"], []).append(str(row["seed"]))
    left = dict.fromkeys(arm for arm, _ in missing(document))
    return "\n".join(f"- {arm}: seed {', '.join(seeds[arm])}" for arm in left if arm in seeds) or "Nothing."
