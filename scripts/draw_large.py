"""Draw the pictures of docs/large.md: where tiles lie, what they contribute, and by which weights.

python scripts/draw_large.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dualview.blending import shares
from dualview.tile_positions import TilePositions

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def tiles() -> Figure:
    """Tiles of 5 x 6 on a map of 11 x 15 that share 1 x 2 positions: moved inside, padded, without their margins."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = (
        ("shift", (0, 0), "border='shift'"),
        ("pad", (0, 0), "border='pad'"),
        ("shift", (1, 1), "shift, margin 1"),
    )
    for axes, (border, margin, title) in zip(figure.subplots(1, 3), panels, strict=True):
        overlap = (1, 2) if margin == (0, 0) else (2, 2)
        positions = TilePositions((11, 15), (5, 6), overlap, border)
        rows, cols = positions.kept(margin)
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                colour = COLOURS[(i + 2 * j) % 4]
                inside = (col.first, row.first), col.stop - col.first, row.stop - row.first
                axes.add_patch(Rectangle(*inside, facecolor=colour, alpha=0.35, linewidth=0))
                axes.add_patch(Rectangle((col.start, row.start), 6, 5, fill=False, edgecolor=colour, linewidth=1.2))
        axes.add_patch(Rectangle((0, 0), 15, 11, fill=False, edgecolor="black", linewidth=2))
        axes.set(xlim=(-0.5, 18.5), ylim=(13.5, -0.5), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"{title}: {positions.grid[0]} x {positions.grid[1]} tiles", fontsize=9)
        axes.spines[:].set_visible(False)
    return figure


def weights() -> Figure:
    """Each tile's share of the result along one axis: 100 positions, tiles of 40 that share 16."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    kept = TilePositions((100, 1), (40, 1), (16, 0)).kept()[0]
    for axes, window in zip(figure.subplots(1, 3, sharey=True), ("constant", "linear", "hann"), strict=True):
        for (_, first, stop, _), share, colour in zip(kept, shares(kept, window)[1], COLOURS, strict=False):
            axes.plot(torch.arange(first, stop), share, color=colour)
            axes.fill_between(torch.arange(first, stop), share, color=colour, alpha=0.2)
        axes.set_title(f'window="{window}"', fontsize=9)
        axes.set(xlim=(0, 99), ylim=(0, 1.05), xlabel="position")
    figure.axes[0].set_ylabel("share of the mean")
    return figure


def main() -> None:
    """Write both."""
    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "dualview", "font.size": 9, "svg.fonttype": "path"}
    for name, figure in {"tiles": tiles(), "weights": weights()}.items():
        saved: Any = {"metadata": {"Date": None}, "facecolor": "white"}
        figure.savefig(ASSETS / f"large-{name}.svg", **saved)


if __name__ == "__main__":
    main()
