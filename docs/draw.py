"""Draw docs/images/frontier.svg from the frontier's result file: a panel per model, names for the rows that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables.frontier import Row, frontier, timed

from tightfit.train.plots import BASELINE, OURS, place_labels

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "frontier.json"
IMAGE = ROOT / "docs" / "images" / "frontier.svg"


def draw(result: dict[str, Any]) -> None:
    """Peaks against step times, both as a part of stock's."""
    baselines = result["config"]["baselines"]
    shapes = [shape for shape in result["config"]["shapes"] if len(timed(result, shape)) > 1]
    labels = []
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "tightfit", "font.size": 9}):
        figure = Figure(figsize=(11, 4.3 * ((len(shapes) + 1) // 2)), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots((len(shapes) + 1) // 2, 2, squeeze=False).flatten()
        for panel, shape in zip(panels, shapes):
            rows = timed(result, shape)
            whole = next(row["peak_bytes"] for row in rows if row["recipe"] == "stock")
            for style, baseline in ((BASELINE, True), (OURS, False)):
                chosen = [row for row in rows if (row["recipe"] in baselines) == baseline]
                panel.scatter(
                    *zip(*_points(chosen, whole)),
                    s=34,
                    facecolors="none" if baseline else style["color"],
                    edgecolors=style["color"],
                    marker=style["marker"],
                    label=style["label"],
                    zorder=3,
                )
                edge = zip(*reversed(_points(frontier(chosen), whole)))
                panel.step(*edge, where="post", color=style["color"], alpha=0.4, lw=1)
            panel.set_title(shape, fontsize=10)
            panel.set_xlabel("step time of forward and backward / stock")
            panel.set_ylabel("peak of forward and backward / stock")
            panel.margins(0.12)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25)
            panel.legend(loc="upper right", frameon=False)
            named = {*baselines, *(row["recipe"] for row in frontier(rows))}
            names = [row["recipe"] if row["recipe"] in named else "" for row in rows]
            labels.append((panel, _points(rows, whole), names))
        for panel in panels[len(shapes) :]:
            panel.set_visible(False)
        canvas.draw()
        for label in labels:
            place_labels(*label)
        figure.savefig(IMAGE, format="svg", metadata={"Date": None})


def _points(rows: list[Row], whole: int) -> list[tuple[float, float]]:
    return [(row["measured"], row["peak_bytes"] / whole) for row in rows]


if __name__ == "__main__":
    draw(json.loads(RESULT.read_text(encoding="utf-8")))
