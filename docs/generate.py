"""Write the tables of README and docs from benchmarks/results: text between `<!-- results:NAME -->` and `<!-- end -->`.

`python docs/generate.py` rewrites the files; `--check` says which are out of date and exits with 1.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- results:([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def footer(result: dict[str, Any]) -> str:
    """Where the figures come from."""
    versions = result["versions"]
    return (
        f"\n*{result['date']}, {result['device']}, {result['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {result['commit']}.*"
    )


def demo(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            mib(row["peak_bytes"]),
            mib(row["predicted_peak_bytes"]),
            mib(row["saved_bytes"]),
            f"{row['step_time']:.2f}",
            f"{row['metric']:.4f}",
        ]
        for row in result["rows"]
    ]
    header = ["recipe", "peak, MiB", "predicted, MiB", "saved for backward, MiB", "step time / stock", "accuracy"]
    return table(header, rows) + "\n" + footer(result)


def partial_embedding(result: dict[str, Any]) -> str:
    rows = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["task"] == task]
        first = own[0]
        error = 100 * (first["predicted_drop"] / first["measured_drop"] - 1)
        rows.append(
            [
                task,
                f"{first['kept_rows']:,} of 30,522",
                f"{spread([r['stock'] for r in own])}",
                f"{spread([r['partial_embedding'] for r in own])}",
                "yes" if all(r["identical"] for r in own) else "no",
                f"{mib(first['stock_peak_bytes'])} -> {mib(first['peak_bytes'])}",
                f"{mib(first['measured_drop'])} ({error:+.2f} %)",
                f"{first['step_time']:.3f}",
            ]
        )
    header = [
        "task",
        "rows kept",
        "stock",
        "PartialEmbedding",
        "every metric of every seed identical",
        "peak, MiB",
        "drop, MiB (error of the prediction)",
        "step time / stock",
    ]
    return table(header, rows) + "\n" + footer(result)


def vocabulary_shares(result: dict[str, Any]) -> str:
    rows = [
        [
            row["data"],
            f"{row['kept_rows']:,}",
            f"{row['published_percent']:.2f}",
            f"{row['planned_percent']:.2f}",
            f"{row['adamw_bytes_saved'] / 1e6:,.0f}",
        ]
        for row in result["rows"]
    ]
    header = ["data", "rows kept of 250,002", "parameters removed, published, %", "by plan, %", "AdamW fp32 saves, MB"]
    return table(header, rows) + "\n" + footer(result)


def plan_accuracy(result: dict[str, Any]) -> str:
    summary = result["summary"]
    rows = [[key, *(f"{value:.4f}" for value in values)] for key, values in summary.items()]
    return table(["relative error, %", "median", "95th percentile", "worst"], rows) + "\n" + footer(result)


def spread(values: list[float]) -> str:
    """Mean and range over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.4f} ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else f"{mean:.4f}"


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    function.__name__: function for function in (demo, partial_embedding, vocabulary_shares, plan_accuracy)
}


def rendered(text: str) -> str:
    """The text with every marked section made anew; a section without a result file stays as it is."""

    def section(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[2]}.json"
        if not path.exists():
            return match[0]
        return f"{match[1]}{RENDERERS[match[2].replace('-', '_')](json.loads(path.read_text()))}\n{match[4]}"

    return MARK.sub(section, text)


def main(check: bool) -> int:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
