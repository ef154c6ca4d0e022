"""The picture of a comparison: peak memory against step time, one point a recipe."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.core.artifacts import replacing

if TYPE_CHECKING:
    from tightfit.train.bench import Comparison

# Okabe and Ito's palette: told apart under every common colour blindness, and shapes differ too
OURS = {"marker": "o", "color": "#0072B2", "label": "tightfit recipe"}
BASELINE = {"marker": "s", "color": "#D55E00", "label": "baseline"}
DIRECTIONS = [(1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.8), (0.7, -0.8), (-0.7, 0.8), (-0.7, -0.8)]


def draw_comparison(found: Comparison, png: Path, svg: Path) -> str:
    """Draw a comparison into a PNG and an SVG file; returns the SVG's text. Every label is free of the others."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "tightfit", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        points = [(row.step_time, row.peak_bytes / 2**20) for row in found.rows]
        for style, baseline in ((BASELINE, True), (OURS, False)):
            chosen = [point for point, row in zip(points, found.rows) if row.baseline == baseline]
            if chosen:
                axes.scatter(
                    [x for x, _ in chosen],
                    [y for _, y in chosen],
                    s=54,
                    facecolors="none" if baseline else style["color"],
                    edgecolors=style["color"],
                    linewidths=1.8,
                    marker=style["marker"],
                    label=style["label"],
                    zorder=3,
                )
        axes.set_xlabel("step time, ratio to stock (less is faster)")
        axes.set_ylabel("peak memory of one step, MiB (less is better)")
        axes.set_title(f"{found.model}, batch {found.batch}, {found.device}", fontsize=10)
        axes.margins(0.25)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(loc="best", frameon=False)
        canvas.draw()
        place_labels(axes, points, [row.name for row in found.rows])
        for path, kind in ((png, "png"), (svg, "svg")):
            with replacing(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def place_labels(axes: Any, points: list[tuple[float, float]], names: list[str]) -> list[Any]:
    """Put a name near each point where it covers no other name, no point, and nothing outside the axes.

    The nearest free place around the point is taken; a line leads to a name that had to go further away.

    Returns:
        the texts, in the order of the points.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    per_point = axes.figure.dpi / 72
    pixels = [axes.transData.transform(point) for point in points]
    dots = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in pixels]
    frame = axes.get_window_extent(renderer)
    legend = axes.get_legend()
    taken = [legend.get_window_extent(renderer)] if legend is not None else []
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "ha": "left", "va": "bottom"}
    texts = []
    for number, (point, name) in enumerate(zip(points, names)):
        text = axes.annotate(name, point, xytext=(0, 0), **style)
        size = Text.get_window_extent(text, renderer)
        others = taken + [dot for i, dot in enumerate(dots) if i != number]
        best = None
        for place, (left, low) in enumerate(_places(pixels[number], size.width, size.height)):
            box = Bbox.from_bounds(left, low, size.width, size.height).padded(1)
            cost = sum(_shared(box, other) for other in others) + _outside(box, frame)
            if best is None or cost < best[0]:
                best = (cost, place, box)
            if cost == 0:
                break
        assert best is not None
        _, place, box = best
        taken.append(box)
        text.remove()
        offset = ((box.x0 + 1 - pixels[number][0]) / per_point, (box.y0 + 1 - pixels[number][1]) / per_point)
        line = {"arrowstyle": "-", "alpha": 0.5, "lw": 0.8} if place >= len(DIRECTIONS) else None
        texts.append(axes.annotate(name, point, xytext=offset, arrowprops=line, **style))
    return texts


def _places(dot: Any, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Lower left corners of a box around a dot, in pixels, the nearest first."""
    for reach in (10, 18, 28, 40, 55, 75, 100, 130):
        for across, up in DIRECTIONS:
            yield (
                dot[0] + across * reach + width * (across - 1) / 2,
                dot[1] + up * reach + height * (up - 1) / 2,
            )


def _shared(one: Any, other: Any) -> float:
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    up = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across * up if across > 0 and up > 0 else 0.0


def _outside(box: Any, frame: Any) -> float:
    return box.width * box.height - _shared(box, frame)
