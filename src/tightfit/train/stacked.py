"""Live bytes of a simulated step as a stacked area, with the peak marked and a measured line over it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from html import escape

from tightfit.core.plan import mib
from tightfit.train.svg import ticks

WIDTH, HEIGHT = 960, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 40, 64
COLUMNS = 480
# Okabe and Ito's palette: told apart by colour-blind readers too
COLOURS = {
    "weights": "#999999",
    "optimizer": "#CC79A7",
    "gradients": "#E69F00",
    "activations": "#56B4E9",
    "temporary": "#009E73",
}


@dataclasses.dataclass(frozen=True)
class Columns:
    """A timeline cut into columns of equal width; each shows the highest moment inside it.

    Attributes:
        phases: phase of each column.
        categories: category -> bytes per column.
        peak: column of the peak.
    """

    phases: list[str]
    categories: dict[str, list[int]]
    peak: int

    @property
    def levels(self) -> list[int]:
        return [sum(parts) for parts in zip(*self.categories.values())]


def columns(timeline, count: int = COLUMNS) -> Columns:
    """Cut a `tightfit.core.simulate.Timeline` into at most `count` columns without losing its peak."""
    levels = timeline.levels
    names = [name for name in COLOURS if name in timeline.categories]
    chosen = []
    for start, end in _cuts(timeline.phases, count):
        chosen.append(max(range(start, end), key=levels.__getitem__))
    peak = next(i for i, at in enumerate(chosen) if levels[at] == levels[timeline.peak])
    return Columns(
        phases=[timeline.phases[at] for at in chosen],
        categories={name: [timeline.categories[name][at] for at in chosen] for name in names},
        peak=peak,
    )


def _cuts(phases: Sequence[str], count: int) -> list[tuple[int, int]]:
    """Ranges of about equal length that never span two phases."""
    ranges = []
    for start, end in _runs(phases):
        parts = max(1, round(count * (end - start) / len(phases)))
        edges = sorted({start + (end - start) * i // parts for i in range(parts + 1)})
        ranges += list(itertools.pairwise(edges))
    return ranges


def stacked_plot(shown: Columns, measured: dict[str, list[int]] | None = None) -> str:
    """The columns as SVG; `measured` gives levels per phase, drawn as a line over the predicted ones."""
    levels = shown.levels
    highest = max(levels + [level for values in (measured or {}).values() for level in values])
    unit, name = (2**30, "GiB") if highest >= 4 * 2**30 else (2**20, "MiB")
    marks = ticks(0, highest / unit)
    top = marks[-1] * unit

    def across(column: float) -> float:
        return LEFT + column / len(levels) * (WIDTH - LEFT - RIGHT)

    def down(level: float) -> float:
        return HEIGHT - BOTTOM - level / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="live bytes over one training step" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="14" fill="currentColor">'
    ]
    for mark in marks:
        y = down(mark * unit)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            f'stroke-opacity="0.15"/><text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{mark:.6g}</text>'
        )
    parts.append(f'<text x="{LEFT - 8}" y="{TOP - 16}" text-anchor="end">{name}</text>')
    parts += _areas(shown, across, down)
    parts += _phases(shown.phases, across)
    if measured:
        parts.append(_line(shown.phases, measured, across, down))
    x, y = across(shown.peak + 0.5), down(levels[shown.peak])
    anchor = "end" if x > WIDTH / 2 else "start"
    parts.append(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#D55E00"/>'
        f'<text x="{x + (-9 if anchor == "end" else 9):.1f}" y="{y - 8:.1f}" text-anchor="{anchor}" '
        f'font-weight="bold">peak {mib(levels[shown.peak])}</text>'
    )
    parts += _legend(shown, bool(measured))
    return "".join(parts) + "</svg>"


def _areas(shown: Columns, across, down) -> list[str]:
    parts, floor = [], [0] * len(shown.phases)
    for name, values in shown.categories.items():
        roof = [a + b for a, b in zip(floor, values)]
        upper = " ".join(f"{across(i):.1f},{down(v):.1f} {across(i + 1):.1f},{down(v):.1f}" for i, v in enumerate(roof))
        lower = " ".join(
            f"{across(i + 1):.1f},{down(floor[i]):.1f} {across(i):.1f},{down(floor[i]):.1f}"
            for i in reversed(range(len(floor)))
        )
        parts.append(f'<polygon points="{upper} {lower}" fill="{COLOURS[name]}"><title>{name}</title></polygon>')
        floor = roof
    return parts


def _phases(phases: Sequence[str], across) -> list[str]:
    parts, last = [], -1000.0
    for start, end in _runs([_measured_name(phase) for phase in phases]):
        x = across(start)
        if start:
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="currentColor" '
                f'stroke-dasharray="3 3" stroke-opacity="0.5"/>'
            )
        middle = (x + across(end)) / 2
        if across(end) - x > 60 and middle - last > 90:
            text = escape(_measured_name(phases[start]).replace("_", " "))
            if "recompute" in phases[start:end]:
                text += " and recompute"
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{text}</text>')
            last = middle
    return parts


def _line(phases: Sequence[str], measured: dict[str, list[int]], across, down) -> str:
    """Measured levels, stretched over the columns that show the same phase."""
    points = []
    for start, end in _runs([_measured_name(phase) for phase in phases]):
        values = measured.get(_measured_name(phases[start]), [])
        width = end - start
        for column in range(width):
            low, high = len(values) * column // width, len(values) * (column + 1) // width
            part = values[low : max(high, low + 1)]
            if part:
                points.append(f"{across(start + column + 0.5):.1f},{down(max(part)):.1f}")
    line = f'<polyline points="{" ".join(points)}" fill="none" stroke="#D55E00" stroke-width="2">'
    return f"{line}<title>measured</title></polyline>"


def _runs(values: Sequence[str]) -> list[tuple[int, int]]:
    """Ranges of equal neighbours."""
    bounds = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(itertools.pairwise(bounds))


def _measured_name(phase: str) -> str:
    return "backward" if phase == "recompute" else phase


def _legend(shown: Columns, measured: bool) -> list[str]:
    entries = [(name, COLOURS[name]) for name, values in shown.categories.items() if any(values)]
    entries += [("measured", "#D55E00")] if measured else []
    parts, x = [], float(LEFT)
    for name, colour in entries:
        parts.append(
            f'<rect x="{x:.0f}" y="{HEIGHT - 24}" width="14" height="14" fill="{colour}"/>'
            f'<text x="{x + 20:.0f}" y="{HEIGHT - 12}">{name}</text>'
        )
        x += 40 + 9 * len(name)
    return parts
