"""What is aimed at on a GPU, and whether the rows reach it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from benchmarks.cases import KERNELS, LOOP, OURS
from benchmarks.gpu_process import RUNNING

BATCHED, COMPILED = "batched SDPA", "batched SDPA, torch.compile"
ONE_BATCH = "19 views, one batch"
BY_VIEW = "view + permute"
PLAIN = "normalise, permute, rearrange twice"
FASTEST = 1.05
"""Ours counts as the fastest within this factor."""

HOST = {OURS: 2.0, KERNELS: 2.5}
"""How often the host may take as long as for view, permute and copy."""

NO_SIDES = ("limit", "clone")
"""What begins like this is no way to do the same work."""
Rows = list[dict[str, Any]]


class NotMeasured(Exception):  # noqa: N818 - no error: a line of the table
    """A figure that a bar needs is missing, and why."""


def bars(rows: Rows, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Every aim: what, the aim, what was measured, and "reached", "fell short" or "not measured"."""

    def find(suite: str, case: str, side: str, key: str = "eager_ms") -> float:
        for row in rows:
            if (row["suite"], row["case"], row["side"]) == (suite, case, side):
                if row[key] is None:
                    raise NotMeasured(f"{case}, {side}: {row['missing'] or row['no_graph'] or 'no figure'}")
                return float(row[key])
        raise NotMeasured(f"{case}, {side}: no row")

    found = []
    for what, aim, at_most, figure in (*_of_enhancement(find), *_of_others(find, rows, limits), *_fastest(rows)):
        try:
            value = figure()
        except NotMeasured as reason:
            found.append({"bar": what, "aim": aim, "measured": None, "verdict": f"not measured: {reason}"})
        else:
            reached = value <= aim if at_most else value >= aim
            found.append(
                {"bar": what, "aim": aim, "measured": value, "verdict": "reached" if reached else "fell short"}
            )
    return found


Bar = tuple[str, float, bool, Callable[[], float]]
"""What, how much, whether at most rather than at least, and the figure."""


def _of_enhancement(find: Any) -> Iterator[Bar]:
    def ratio(case: str, other: str, key: str = "eager_ms") -> Callable[[], float]:
        return lambda: find("dem", case, other, key) / find("dem", case, OURS, key)

    one, step = "released, batch 1: forward", "released, batch 8: forward and backward, frozen features"
    yield f"{one}, graph, ms", 0.12, True, lambda: find("dem", one, OURS, "graph_ms")
    yield f"{one}, graph, against the loop", 10, False, ratio(one, LOOP, "graph_ms")
    for batch in (16, 32):
        yield (
            f"released, batch {batch}: forward, against the loop",
            12,
            False,
            ratio(f"released, batch {batch}: forward", LOOP),
        )
    full = "released, batch 32: forward"
    limit = lambda: find("dem", full, "limit of projected operations") / find("dem", full, OURS)  # noqa: E731
    yield f"{full}, share of the matrix limit", 0.55, False, limit
    for batch in (1, 8, 16, 32):
        case = f"released, batch {batch}: forward"
        yield f"{case}, against batched SDPA", 1, False, ratio(case, BATCHED)
    yield f"{step}, against the loop", 5, False, ratio(step, LOOP)
    yield f"{step}, graph, against the loop", 10, False, ratio(step, LOOP, "graph_ms")
    yield f"{step}, memory, the loop's over ours", 4, False, ratio(step, LOOP, "peak_bytes")
    for batch in (16, 32):
        case = f"paper, batch {batch}: forward"
        yield f"{case}, against the loop", 3, False, ratio(case, LOOP)
        yield f"{case}, against compiled batched SDPA", 2, False, ratio(case, COMPILED)
    yield (
        "paper, batch 1: forward, graph, ms",
        0.2,
        True,
        lambda: find("dem", "paper, batch 1: forward", OURS, "graph_ms"),
    )
    step_of_paper = "paper, batch 8: forward and backward, frozen features"
    yield f"{step_of_paper}, against the loop", 4, False, ratio(step_of_paper, LOOP)


def _of_others(find: Any, rows: Rows, limits: dict[str, float]) -> Iterator[Bar]:
    cases = {row["case"]: row["params"] for row in rows if row["suite"] == "ops"}
    for (case, params), side in product(cases.items(), (OURS, KERNELS)):
        least = 1000 * params["moved_bytes"] / limits["copy_bytes_per_s"]
        yield f"{case}, {side}, share of copy bandwidth", 0.85, False, partial(_share, find, case, side, least)
    for name, (side, most) in product(("local_crop", "global_stride_crop", "recombine", "re-tile"), HOST.items()):
        case = f"{name}, one small map"
        yield f"{case}, {side}, host time over that of {BY_VIEW}", most, True, partial(_over, find, case, side)
    photos = "8 photographs, live tiles"
    yield f"{photos}, against plain torch", 2, False, lambda: find("photo", photos, PLAIN) / find("photo", photos, OURS)
    prefix = "ViT-L/14-336, 1008 pixels, batch 8"
    for treatment in ("", ", compiled tower"):
        yield (
            f"{prefix}{treatment}, against 19 views in one batch",
            1.95,
            False,
            lambda treatment=treatment: (
                find("prefix", prefix, ONE_BATCH + treatment) / find("prefix", prefix, OURS + treatment)
            ),
        )
    yield (
        f"{prefix}, share of the matrix limit, with a compiled tower",
        0.55,
        False,
        lambda: (
            find("prefix", prefix, "limit of planned operations") / find("prefix", prefix, f"{OURS}, compiled tower")
        ),
    )


def _share(find: Any, case: str, side: str, least: float) -> float:
    return least / float(find("ops", case, side))


def _over(find: Any, case: str, side: str) -> float:
    return float(find("host", case, side)) / float(find("host", case, BY_VIEW))


def _fastest(rows: Rows) -> Iterator[Bar]:
    """What "auto" takes over the fastest side of every case, eager and as a graph."""
    cases = dict.fromkeys((row["suite"], row["case"]) for row in rows if row["suite"] != "host")
    for suite, case in cases:
        here = [row for row in rows if (row["suite"], row["case"]) == (suite, case)]
        ours = next((row for row in here if row["side"] == OURS), None)
        for key, name in (("eager_ms", "eager"), ("graph_ms", "graph")):
            timed = [row[key] for row in here if row[key] is not None and not row["side"].startswith(NO_SIDES)]
            if ours is not None and timed and ours[key] is not None:
                figure = partial(operator.truediv, ours[key], min(timed))
                yield f"{case}, {name}, over the fastest side", FASTEST, True, figure


def table(found: list[dict[str, Any]]) -> str:
    """All aims, one a line."""
    lines = []
    for bar in found:
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.3g}"
        lines.append(f"{bar['verdict'].partition(':')[0]:12s} aim {bar['aim']:<6g} measured {measured:8s} {bar['bar']}")
        if bar["measured"] is None:
            lines.append(f"             {bar['verdict'].partition(': ')[2]}")
    return "\n".join(lines)


def summary(document: dict[str, Any]) -> str:
    """What fell short, and by how much; what is wrong, what failed, and how much has not been measured."""
    found, rows = document["bars"], document["rows"]
    counts = Counter(bar["verdict"].partition(":")[0] for bar in found)
    lines = [
        f"{counts['reached']} aims reached, {counts['fell short']} fell short, {counts['not measured']} not measured"
    ]
    lines += [
        f"fell short: {bar['bar']}: {bar['measured']:.3g}, aimed at {bar['aim']:g}"
        for bar in found
        if bar["verdict"] == "fell short"
    ]
    for said, key in product(("wrong: ", "failed: ", RUNNING), ("missing", "no_graph")):
        lines += [f"{row['case']}, {row['side']}: {row[key]}" for row in rows if (row[key] or "").startswith(said)]
    sections = document["sections"].items()
    lines += [f"section {name}: {state or 'not begun'}" for name, state in sections if state != "done"]
    return "\n".join(lines)
