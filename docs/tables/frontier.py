from __future__ import annotations

from typing import Any

from tables import footer, grid

Row = dict[str, Any]

PRESETS = {
    "exact": "FusedOps",
    "balanced": "Lora + FusedOps + Mesa, attention",
    "fast": "Lora + TokenTune 0.2",
    "smallest": "Lora + FusedOps + Reversible",
}
"""Names of `tightfit.presets`, and of the same recipes in the result file."""


def passes(result: dict[str, Any]) -> str:
    """Planned peak of forward and backward above weights and batch, as a part of the stock model's."""
    return _planned(result, "peak_bytes")


def steps(result: dict[str, Any]) -> str:
    """Planned peak of the whole step, as a part of the stock model's."""
    return _planned(result, "whole_peak_bytes")


def _planned(result: dict[str, Any], key: str) -> str:
    found = {(row["shape"], row["recipe"]): row for row in result["rows"]}
    recipes = list(dict.fromkeys(row["recipe"] for row in result["rows"]))
    shapes = [s for s in result["config"]["shapes"] if all((s, recipe) in found for recipe in recipes)]
    lines = []
    for recipe in recipes:
        cells = []
        for shape in shapes:
            row, stock = found.get((shape, recipe), {}), found.get((shape, "stock"), {})
            cells.append(f"{row[key] / stock[key]:.2f}" if key in row and key in stock else "")
        lines.append([recipe, *cells])
    return grid(["recipe", *shapes], lines) + "\n" + footer(result)


def table(result: dict[str, Any]) -> str:
    """Rows that were timed: bytes and time beside stock, and whether no other of the table is better in both."""
    lines = []
    for shape in result["config"]["shapes"]:
        rows = timed(result, shape)
        edge = frontier(rows)
        stock = next((row for row in rows if row["recipe"] == "stock"), None)
        for row in rows:
            part = f"{row['peak_bytes'] / stock['peak_bytes']:.2f}" if stock else ""
            best = "yes" if row in edge else ""
            kind = "baseline" if row["recipe"] in result["config"]["baselines"] else ""
            lines.append([shape, row["recipe"], kind, part, f"{row['measured']:.2f}", best])
    header = ["model", "recipe", "", "peak of forward and backward / stock", "step time / stock", "on the frontier"]
    return grid(header, lines) + "\n" + footer(result)


def claim(result: dict[str, Any]) -> str:
    """At every point of the baselines' frontier: the fastest recipe of no more bytes, the leanest of no more time."""
    baselines, lines = result["config"]["baselines"], []
    for shape in result["config"]["shapes"]:
        rows = timed(result, shape)
        ours = [row for row in rows if row["recipe"] not in baselines]
        for point in frontier([row for row in rows if row["recipe"] in baselines]):
            faster = min(
                (row for row in ours if row["peak_bytes"] <= point["peak_bytes"]),
                key=lambda row: row["measured"],
                default=None,
            )
            leaner = min(
                (row for row in ours if row["measured"] <= point["measured"]),
                key=lambda row: row["peak_bytes"],
                default=None,
            )
            lines.append([shape, point["recipe"], *_beside(faster, point, "measured")])
            lines[-1] += _beside(leaner, point, "peak_bytes")
    header = ["model", "baseline", "fastest recipe of no more bytes", "its time / the baseline's"]
    header += ["leanest recipe of no more time", "its peak / the baseline's"]
    return grid(header, lines) + "\n" + footer(result)


def presets(result: dict[str, Any]) -> str:
    """Where the named recipes stand: peak of forward and backward, of the whole step, and step time beside stock's."""
    found = {(row["shape"], row["recipe"]): row for row in result["rows"]}
    lines = []
    for name, recipe in PRESETS.items():
        cells = []
        for shape in result["config"]["shapes"]:
            row, stock = found.get((shape, recipe), {}), found.get((shape, "stock"), {})
            if "peak_bytes" not in row:
                cells.append("")
                continue
            parts = [f"{row[key] / stock[key]:.2f}" for key in ("peak_bytes", "whole_peak_bytes")]
            cells.append("; ".join([*parts, f"{row['measured']:.2f}" if "measured" in row else "-"]))
        lines.append([f"`{name}`", recipe, *cells])
    return grid(["preset", "recipe", *result["config"]["shapes"]], lines) + "\n" + footer(result)


def _beside(row: Row | None, point: Row, key: str) -> list[str]:
    return ["none", ""] if row is None else [row["recipe"], f"{row[key] / point[key]:.2f}"]


def timed(result: dict[str, Any], shape: str) -> list[Row]:
    return [row for row in result["rows"] if row["shape"] == shape and "measured" in row]


def frontier(rows: list[Row]) -> list[Row]:
    """Rows that no other beats in both bytes and time, leanest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["peak_bytes"], row["measured"])):
        if not found or row["measured"] < found[-1]["measured"]:
            found.append(row)
    return found
