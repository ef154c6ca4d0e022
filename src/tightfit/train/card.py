"""What a reader opens: the model card and the report of a run, and the report of a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.core.artifacts import write_text
from tightfit.core.plan import mib
from tightfit.train import folder
from tightfit.train.marked_yaml import dump_yaml
from tightfit.train.metrics import is_score
from tightfit.train.svg import line_plot

if TYPE_CHECKING:
    from tightfit.train.bench import Comparison, Row
    from tightfit.train.recipe_file import RecipeFile
    from tightfit.train.run import RunResult

COMPARISON = "comparison.json"
PLOT = "plot"

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem .3rem 0; text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr { border-top: 1px solid #8884; }
pre { overflow-x: auto; padding: .8rem; background: #8881; border-radius: .4rem; }
svg { width: 100%; height: auto; }
figure { margin: 0; } figcaption { opacity: .75; }
.plate { background: #fff; border-radius: .4rem; }
"""


def write_card(output: Path, file: RecipeFile, result: RunResult) -> None:
    """Write the run's model card, `README.md`."""
    data = folder.read_run(output)["data"]
    figures = "\n".join(f"| {name} | {value} |" for name, value in figure_rows(result_values(result)))
    methods = dump_yaml({"methods": file.methods}).strip()
    text = f"""\
---
base_model: {json.dumps(file.model)}
library_name: tightfit
tags: [tightfit, {file.task}]
---

# {output.name}

`{file.model}` fine-tuned for {file.task} by [tightfit](https://pypi.org/project/tightfit/) with the recipe
**{file.recipe if file.methods else "stock (full fine-tuning)"}**.

| | |
|---|---|
{figures}

## Recipe

```yaml
{methods}
```

The whole file, with training settings and data, is `recipe.yaml`.

## Data

{data["train_rows"]:,} training rows of `{file.data.train}`, {data["eval_rows"]:,} rows for evaluation{_given(file)}.
Fingerprint of the rows (SHA-256): `{data["fingerprint"]}`.
{"".join(f"{chr(10)}- {note}" for note in data["notes"])}

## Use

This folder holds what was trained, not the base model. For a stock checkpoint that plain `from_pretrained` loads:

```sh
tightfit export {output.name} {output.name}-model
```

Or put it on its base again:

```python
import tightfit

applied = tightfit.load(model, "{output.name}")  # model: the base with its task head, as `recipe.yaml` names it
```
"""
    write_text(output / folder.CARD, text)


def _given(file: RecipeFile) -> str:
    return f" of `{file.data.eval}`" if file.data.eval else " held out"


def result_values(result: RunResult) -> dict[str, Any]:
    """The figures of a run as plain values."""
    from dataclasses import asdict

    return {key: value for key, value in asdict(result).items() if key not in ("output", "recipe")}


def figure_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a run as (name, text), for tables."""
    share = 100 * values["trainable_parameters"] / max(1, values["total_parameters"])
    rows = [(name, f"{value:.4f}") for name, value in values["metrics"].items()]
    rows += [
        ("steps", f"{values['steps']:,}"),
        ("training time", f"{values['train_seconds']:.1f} s"),
        ("trainable parameters", f"{values['trainable_parameters']:,} ({share:.1f} %)"),
        (f"peak of one step ({values['measured_batch']})", mib(values["peak_bytes"])),
        ("saved for backward", mib(values["saved_bytes"])),
    ]
    if values["predicted_peak_bytes"] is not None:
        rows.insert(-1, ("predicted peak", mib(values["predicted_peak_bytes"])))
    return rows


def write_report(run: Path, result: RunResult | None = None) -> Path:
    """Write a run's `report.html`, one file that needs nothing else; returns its path.

    Args:
        result: the run's figures, where they are not in its folder yet.

    Raises:
        ArtifactError: the folder holds no run.
    """
    run = Path(run)
    known, rows = folder.read_run(run), folder.read_metrics(run)
    if result is not None:
        known["result"] = result_values(result)
    parts = [f"<h1>{escape(run.name)}</h1>", f"<p>Recipe: <b>{escape(known['recipe'])}</b></p>"]
    if known["result"]:
        parts.append(_table(("", ""), figure_rows(known["result"])))
    else:
        parts.append("<p>This run is not finished.</p>")
    losses = _points(rows, "loss")
    parts.append(_figure("Training loss", line_plot(losses, x_label="step", y_label="loss")))
    names = dict.fromkeys(k for r in rows for k in r if is_score(k))
    for name in names:
        label = name.removeprefix("eval_")
        plot = line_plot(_points(rows, name), x_label="step", y_label=label, dots=True)
        parts.append(_figure(f"Evaluation: {label}", plot))
    parts.append(f"<h2>Recipe file</h2><pre>{escape((run / folder.RECIPE).read_text(encoding='utf-8'))}</pre>")
    versions = ", ".join(f"{name} {value}" for name, value in known["versions"].items())
    parts.append(f"<p>tightfit {escape(known['tightfit'])}, {escape(versions)}, on {escape(known['device'])}.</p>")
    write_text(run / folder.REPORT, _page(run.name, parts))
    return run / folder.REPORT


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]


def table_rows(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a comparison's table."""
    metric = found.rows[0].metric_name
    head = ("recipe", "peak", "predicted", "of stock", "saved for backward", "step time", metric)
    stock = found.rows[0].peak_bytes
    return head, [
        (
            _label(row),
            mib(row.peak_bytes),
            mib(row.predicted_peak_bytes) if row.predicted_peak_bytes is not None else "-",
            f"{row.peak_bytes / stock:.2f}",
            mib(row.saved_bytes),
            f"{row.step_time:.2f}",
            f"{row.metric:.4f}",
        )
        for row in found.rows
    ]


def _label(row: Row) -> str:
    return "stock (full fine-tuning)" if row.name == "stock" else row.name


def describe(found: Comparison) -> str:
    """What all rows of a comparison have in common, in one sentence."""
    return (
        f"{found.model}, {found.task}, {found.data}, seed {found.seed}; peak, saved bytes and step time of one "
        f"training step on a batch of {found.batch}, on {found.device}; step time as a ratio to stock, steps taken "
        f"in turns"
    )


def write_comparison(found: Comparison, output: Path) -> None:
    """Write `comparison.json`, `plot.png`, `plot.svg` and `report.html`."""
    from tightfit.train.plots import draw_comparison

    write_text(output / COMPARISON, json.dumps(found.to_dict(), indent=1))
    svg = draw_comparison(found, output / f"{PLOT}.png", output / f"{PLOT}.svg")
    head, rows = table_rows(found)
    exact = "Rows in bold keep the gradients of the stock step exactly."
    parts = [
        "<h1>Recipes compared</h1>",
        f"<p>{escape(describe(found))}.</p>",
        _table(head, rows, bold=[row.exact for row in found.rows]),
        f"<p>{exact}</p>",
        f'<figure class="plate">{svg}</figure>',
    ]
    write_text(output / folder.REPORT, _page("Recipes compared", parts))


def _figure(title: str, svg: str) -> str:
    return f"<h2>{escape(title)}</h2><figure>{svg}</figure>" if svg else ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], bold: list[bool] | None = None) -> str:
    def cells(kind: str, values: tuple[str, ...]) -> str:
        return "".join(
            f"<{kind}{' class=number' if place else ''}>{escape(value)}</{kind}>" for place, value in enumerate(values)
        )

    lines = [f"<tr>{cells('th', head)}</tr>"] if any(head) else []
    for number, row in enumerate(rows):
        text = cells("td", row)
        if bold and bold[number]:
            text = text.replace(escape(row[0]), f"<b>{escape(row[0])}</b>", 1)
        lines.append(f"<tr>{text}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _page(title: str, parts: list[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
