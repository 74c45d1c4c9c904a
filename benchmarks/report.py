"""Tables and plots of result files. `python -m benchmarks.report` puts them into the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results
from benchmarks.cases import KERNELS, OURS

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIRST_PAGE, ROWS = DOCS / "benchmarks.md", DOCS / "index.md", DOCS / "benchmarks"
BEGIN, END = "<!-- written by benchmarks/report.py: begin -->", "<!-- written by benchmarks/report.py: end -->"

Document = dict[str, Any]


# --- Tables ----------------------------------------------------------------------------------------------------------


def tables(document: Document) -> str:
    """All tables of one result file, as Markdown."""
    parts = [_conditions(document), _targets(document)]
    suites = dict.fromkeys(row["suite"] for row in document["rows"])
    parts += [f"## {suite}\n\n{_suite(document, suite)}" for suite in suites]
    return "\n\n".join(part for part in parts if part)


def _conditions(document: Document) -> str:
    machine, versions, limits = document["machine"], document["versions"], document["limits"]
    return (
        f"{machine['name']}, {machine['threads']} threads on {machine['cores']} cores, {document['dtype']}, "
        f"torch {versions['torch']}, Python {versions['python']}, commit {document['commit'] or 'unknown'}, "
        f"{document['created'][:10]}; load average {machine['load_before']} before and {machine['load_after']} after; "
        f"tests before measuring: {document['gate']}. The machine copies {limits['copy_bytes_per_s'] / 1e9:.3g} GB/s "
        f"(read and written) and multiplies matrices at {limits['matmul_ops_per_s'] / 1e9:.3g} G operations/s."
    )


def _targets(document: Document) -> str:
    """What was aimed at; of many peers with one aim only the one that comes nearest to missing it."""
    worst: dict[tuple[str, str, str, float], tuple[float, str]] = {}
    for case, side, what, aim, value, against in _aims(document["rows"]):
        place = (case, side, what, aim)
        worst[place] = min(worst.get(place, (float("inf"), "")), (value, against))
    rows = (
        (case, side, what, against, *(f"{v:.0%}" if what == FRACTION else f"{v:.2f}" for v in (aim, value)),
         "yes" if value >= aim else "**no**")
        for (case, side, what, aim), (value, against) in worst.items()
    )  # fmt: skip
    head = ("case", "side", "of", "against", "aim", "measured", "reached")
    return f"## Aims\n\n{_table(head, rows)}" if worst else ""


FRACTION = "what the machine could do"


def _aims(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, float, float, str]]:
    """Case, side of ours, what is aimed at, how much, how much was measured, and against which side.

    Ratios are to the first of our sides; the kernels' are worked out from them.
    """
    timed = [row for row in rows if row["missing"] is None]
    ours = [row for row in timed if row["role"] == "ours"]
    for row in ours:
        if row["target"] is not None:
            yield row["case"], row["side"], FRACTION, row["target"], row["fraction"], ""
    for row, mine in product(timed, ours):
        if row["role"] != "ours" and (row["suite"], row["case"]) == (mine["suite"], mine["case"]):
            for what, ratio, aim in (("time", "ratio", "target"), ("memory", "memory_ratio", "memory_target")):
                if row[aim] is not None and mine[ratio]:
                    yield row["case"], mine["side"], what, row[aim], row[ratio] / mine[ratio], row["side"]


def _suite(document: Document, suite: str) -> str:
    head = ("case", "side", "median", "quartiles", "time / ours", "peak memory", "memory / ours", "of the limit")
    return _table(head, (_cells(row) for row in document["rows"] if row["suite"] == suite))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    side = f"**{row['side']}**" if row["role"] == "ours" else row["side"]
    side += " (another function)" if row["role"] == "other function" else ""
    if row["missing"] is not None:
        return row["case"], side, f"missing: {row['missing'].replace('|', '/')}", "", "", "", "", ""
    seconds, first = row["seconds"], row["side"] == OURS
    return (
        row["case"],
        side,
        _time(seconds["median"]),
        f"{_time(seconds['q1'])} to {_time(seconds['q3'])}",
        "" if first or row["ratio"] is None else f"{row['ratio']:.2f}",
        f"{row['peak_bytes'] / 2**20:.4g} MiB",
        "" if first or row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
        "" if row["fraction"] is None else f"{row['fraction']:.0%}",
    )


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def compare(old: Document, new: Document) -> str:
    """Time and memory of every row that both files have, new over old."""

    def measured(document: Document) -> dict[tuple[str, ...], dict[str, Any]]:
        return {(r["suite"], r["case"], r["side"]): r for r in document["rows"] if r["missing"] is None}

    before, after = measured(old), measured(new)
    rows = (
        (
            *key,
            _time(before[key]["seconds"]["median"]),
            _time(row["seconds"]["median"]),
            f"{row['seconds']['median'] / before[key]['seconds']['median']:.2f}",
            f"{row['peak_bytes'] / before[key]['peak_bytes']:.2f}" if before[key]["peak_bytes"] else "",
        )
        for key, row in after.items()
        if key in before
    )
    table = _table(("suite", "case", "side", "old", "new", "time, new / old", "memory, new / old"), rows)
    others = [f"only {name}: {', '.join(key)}" for name, keys in (
        ("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())
    ) for key in sorted(keys)]  # fmt: skip
    same = old["machine"]["name"] == new["machine"]["name"]
    return "\n".join([table, *others, *([] if same else ["The machines differ: times cannot be compared."])])


# --- Plots -----------------------------------------------------------------------------------------------------------


def plots(document: Document, stem: str, folder: Path) -> list[Path]:
    """Cost against n, batch and width, and the enhancement module beside its peers; files that can be reproduced."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "dualview", "font.size": 9, "svg.fonttype": "path"}
    drawn = []
    for name, draw in (("scaling", _draw_scaling), ("dem", _draw_dem)):
        rows = [row for row in document["rows"] if row["suite"] == name and row["missing"] is None]
        if rows:
            figure = draw(rows)
            drawn.append(folder / f"bench-{stem}-{name}.svg")
            figure.savefig(drawn[-1], metadata={"Date": None}, facecolor="white")
    return drawn


LOOP = {"marker": "x", "linestyle": "--"}


def _draw_scaling(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    names = {"n": "tiles per side n", "batch": "batch", "d": "width d"}
    for axes, axis in zip(figure.subplots(1, 3), names, strict=True):
        here = [row for row in rows if row["params"]["axis"] == axis]
        for preset, colour in (("released", "tab:blue"), ("paper", "tab:orange")):
            for side in dict.fromkeys(row["side"] for row in here):
                line = [row for row in here if row["params"]["preset"] == preset and row["side"] == side]
                values = [row["params"][axis] for row in line]
                style = {OURS: {"marker": "o"}, KERNELS: {"marker": "s", "linestyle": ":"}}.get(side, LOOP)
                times = [row["seconds"]["median"] * 1e3 for row in line]
                axes.plot(values, times, color=colour, label=f"{preset}, {side}", **style)
        ticks = sorted({row["params"][axis] for row in here})
        axes.set(xlabel=names[axis], ylabel="ms" if axis == "n" else "", yscale="log", xscale="log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle("Enhancement module, forward: time against n, batch and width")
    return figure


def _draw_dem(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    batches = {row["params"]["batch"] for row in rows}
    rows = [row for row in rows if row["params"]["batch"] in (min(batches), max(batches))]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(9, 0.4 + 0.22 * len(rows) + 0.5 * len(cases)), layout="constrained")
    ratios = [sum(row["case"] == case for row in rows) + 1.5 for case in cases]
    panels = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axes, case in zip(panels, cases, strict=True):
        here = [row for row in rows if row["case"] == case][::-1]
        times = [row["seconds"]["median"] * 1e3 for row in here]
        colours = [{"ours": "tab:blue", "peer": "0.6"}.get(row["role"], "0.85") for row in here]
        axes.bar_label(axes.barh([row["side"] for row in here], times, color=colours), fmt="%.3g ms", padding=3)
        axes.set_title(case, loc="left", fontsize=9)
        axes.set_xlim(right=max(times) * 1.15)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- The page --------------------------------------------------------------------------------------------------------


def shown(folder: Path = results.FOLDER) -> dict[str, Document]:
    """The result files that are shown, by stem: not a quick selection of which there is the whole full one."""
    found = {path.stem: results.read(path) for path in sorted(folder.glob("*.json"))}
    whole = {stem for stem, document in found.items() if document["selection"] == "full"}
    return {stem: d for stem, d in found.items() if stem.replace("-quick-", "-full-") not in whole - {stem}}


SUITES = {
    "prefix": "pixels to projected tokens, ViT-L/14-336",
    "train_step": "one training step of a small INF-LLaVA",
    "dem": "the enhancement module",
    "scaling": "the enhancement module over tiles, batch and width",
    "absorb": "products as they are arranged, and arranged by hand",
    "photo": "bytes to normalised tiles",
    "preprocess": "a picture to a canvas",
    "ops": "crops, recombination and re-tiling",
    "large": "overlap, blending, prediction by tiles, stride tiles on disk",
    "import_time": "import, in a new process",
}
"""What the suites with peers measure, in the order of the summary."""

AS_FAST = 0.95
"""Ratios above are taken for equal: less than what one run differs from the next."""


def summary(documents: dict[str, Document]) -> str:
    """Per suite, our time beside that of the fastest other way; then all cases in which another way is faster."""
    fastest: dict[str, dict[str, tuple[float, str]]] = {}
    for document in sorted(documents.values(), key=lambda document: document["selection"] != "quick"):
        if document["device"] == "cpu":
            for suite in {row["suite"] for row in document["rows"]}:
                fastest[suite] = _fastest_peers(row for row in document["rows"] if row["suite"] == suite)
    found = [(suite, fastest[suite]) for suite in SUITES if fastest.get(suite)]
    wins, losses = [], []
    for suite, cases in found:
        ratios = sorted(ratio for ratio, _ in cases.values())
        as_fast = sum(ratio >= AS_FAST for ratio in ratios)
        wins.append((SUITES[suite], f"{as_fast} of {len(ratios)}", *(f"{r:.2f}" for r in (median(ratios), ratios[0]))))
        losses += [(case, side, f"{ratio:.2f}") for case, (ratio, side) in cases.items() if ratio < AS_FAST]
    head = ("what", "cases in which nothing is faster", "fastest other way / ours: median", "least")
    parts = [_table(head, wins)]
    if losses:
        parts += [
            f"Another way is faster by more than {1 - AS_FAST:.0%} here:",
            _table(("case", "the fastest other way", "its time / ours"), losses),
        ]
    return "\n\n".join(parts)


def _fastest_peers(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """By case: the least ratio of a peer's time to ours, and whose it is."""
    found: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["missing"] is None and row["role"] == "peer" and row["ratio"] is not None:
            found[row["case"]] = min(found.get(row["case"], (float("inf"), "")), (row["ratio"], row["side"]))
    return found


def title(document: Document) -> str:
    """What a result file measures, in one line."""
    size, *part = document["selection"].split()
    suites = f": {', '.join(dict.fromkeys(row['suite'] for row in document['rows']))}" if part else ""
    return f"{'GPU' if document['device'] == 'cuda' else 'CPU'}, {document['dtype']}, {size}{suites}"


def section(documents: dict[str, Document]) -> str:
    """What stands on the page of the summary between the two marks."""
    links = [f"- [{title(document)}](benchmarks/{stem}.md)" for stem, document in documents.items()]
    return "\n\n".join([summary(documents), "All rows, with their conditions:", "\n".join(links)])


def rows_page(stem: str, document: Document) -> str:
    """The page with all rows of a result file."""
    suites = {row["suite"] for row in document["rows"] if row["missing"] is None}
    images = [f"![{name}](../assets/bench-{stem}-{name}.svg)" for name in ("scaling", "dem") if name in suites]
    made = (
        f"Written by `python -m benchmarks.report` from `benchmarks/results/{stem}.json`; [summary](../benchmarks.md)."
    )
    return "\n\n".join([f"# {title(document)}", made, tables(document), *images]) + "\n"


HEADLINES = (
    ("pixels to projected tokens, ViT-L", "ViT-L/14-336, 1008 pixels, n=3", "19 passes, 24 layers, tile by tile"),
    ("released DEM, forward", "released, n=3: forward", "loop over tiles"),
    ("released DEM, forward and backward", "released, n=3: forward + backward, frozen features", "loop over tiles"),
    ("paper's DEM, forward", "paper, n=3: forward", "loop over tiles"),
)
"""For the first page: what, its case, and the side that does it as the equations are written."""


def headlines(documents: dict[str, Document]) -> str:
    """A short table of what was measured on a CPU; of several files the last that has a row."""
    measured = {
        (row["case"], row["side"]): row
        for document in documents.values() for row in document["rows"]
        if document["device"] == "cpu" and row["missing"] is None
    }  # fmt: skip
    rows = []
    for what, case, side in HEADLINES:
        ours, theirs = measured.get((case, OURS)), measured.get((case, side))
        if ours is None or theirs is None:
            rows.append((what, "not measured yet", "", ""))
        else:
            times = (_time(row["seconds"]["median"]) for row in (ours, theirs))
            rows.append((what, *times, f"{theirs['ratio']:.2f}"))
    return _table(("one image of 1008 x 1008 pixels, two CPU cores, float32", OURS, "as written", "ratio"), rows)


def page(text: str, made: str) -> str:
    """The page with its section made anew."""
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"the page must hold the lines {BEGIN} and {END}")
    return marked.sub(lambda _: f"{BEGIN}\n\n{made}\n\n{END}", text)


def main() -> None:
    """Bring the page and its pictures up to date with the result files."""
    documents = shown()
    for path, made in ((PAGE, section(documents)), (FIRST_PAGE, headlines(documents))):
        path.write_text(page(path.read_text(encoding="utf-8"), made), encoding="utf-8")
    ROWS.mkdir(exist_ok=True)
    for path in ROWS.glob("*.md"):
        path.unlink()
    for stem, document in documents.items():
        (ROWS / f"{stem}.md").write_text(rows_page(stem, document), encoding="utf-8")
    drawn = [path for stem, document in documents.items() for path in plots(document, stem, DOCS / "assets")]
    print(f"wrote {PAGE.name} and {', '.join(path.name for path in drawn) or 'no plots'} from {list(documents)}")


if __name__ == "__main__":
    main()
