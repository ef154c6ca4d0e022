"""Draw docs/images/frontier.svg from the frontier's result file: a panel per model, names for the rows that count."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables.frontier import Row, frontier, timed

from tightfit.train.plots import BASELINE, OURS, place_labels

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "frontier.json"
IMAGE = ROOT / "docs" / "images" / "frontier.svg"


def draw(result: dict) -> None:
    """Peaks against step times, both as a part of stock's."""
    shapes = [shape for shape in result["config"]["shapes"] if len(timed(result, shape)) > 1]
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "tightfit", "font.size": 9}):
        figure = Figure(figsize=(11, 4.3 * ((len(shapes) + 1) // 2)), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots((len(shapes) + 1) // 2, 2, squeeze=False).flatten()
        for panel, shape in zip(panels, shapes):
            rows = timed(result, shape)
            stock = next(row for row in rows if row["recipe"] == "stock")

            def place(row: Row, whole: int = stock["peak_bytes"]) -> tuple[float, float]:
                return row["measured"], row["peak_bytes"] / whole

            for style, baseline in ((BASELINE, True), (OURS, False)):
                chosen = [row for row in rows if (row["recipe"] in result["config"]["baselines"]) == baseline]
                panel.scatter(
                    *zip(*map(place, chosen)),
                    s=34,
                    facecolors="none" if baseline else style["color"],
                    edgecolors=style["color"],
                    marker=style["marker"],
                    label=style["label"],
                    zorder=3,
                )
                edge = [place(row) for row in frontier(chosen)]
                panel.step(*zip(*reversed(edge)), where="post", color=style["color"], alpha=0.4, lw=1)
            panel.set_title(shape, fontsize=10)
            panel.set_xlabel("step time of forward and backward / stock")
            panel.set_ylabel("peak of forward and backward / stock")
            panel.margins(0.12)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25)
            panel.legend(loc="upper right", frameon=False)
        for panel in panels[len(shapes) :]:
            panel.set_visible(False)
        canvas.draw()
        for panel, shape in zip(panels, shapes):
            rows = timed(result, shape)
            whole = next(row["peak_bytes"] for row in rows if row["recipe"] == "stock")
            best = [row for row in rows if row in frontier(rows) or row["recipe"] in result["config"]["baselines"]]
            points = [(row["measured"], row["peak_bytes"] / whole) for row in rows]
            place_labels(panel, points, [row["recipe"] if row in best else "" for row in rows])
        figure.savefig(IMAGE, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "docs"))
    draw(json.loads(RESULT.read_text(encoding="utf-8")))
