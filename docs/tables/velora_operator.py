from __future__ import annotations

from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    lora = {row["model"]: row for row in result["rows"] if row.get("recipe") == "Lora" and "model" in row}
    rows = []
    for row in (r for r in result["rows"] if "model" in r):
        base = lora[row["model"]]
        cells = [f"{mib(row[key])} ({row[key] / base[key]:.2f})" for key in ("saved_bytes", "peak_bytes")]
        rows.append([f"{row['model']}, {row['batch']}", row["recipe"], *cells])
    header = ["model", "recipe", "saved for backward, MiB (of Lora)", "peak above the weights, MiB (of Lora)"]
    return grid(header, rows) + "\n" + footer(result)


def layers(result: dict[str, Any]) -> str:
    rows, sizes = [], ("kept_bytes", "temporary_bytes")
    for row in (r for r in result["rows"] if "layer" in r):
        kept, temporary = ([f"{count / 2**10:,.1f}" for count in row[key].values()] for key in sizes)
        low, high = row["of_peft_quartiles"]
        times = [f"{row['of_peft']:.2f} ({low:.2f}-{high:.2f})", f"{row['of_torch']:.2f}"]
        rows.append([row["layer"], *times, " / ".join(kept), " / ".join(temporary)])
    header = ["layer", "time / PEFT's (quartiles)", "time / torch's", "kept, KiB: torch / PEFT / Velora"]
    return grid([*header, "temporary, KiB: torch / PEFT / Velora"], rows) + "\n" + footer(result)


def times(result: dict[str, Any]) -> str:
    rows = [
        [row["timed_model"], row["recipe"], f"{row['measured']:.2f} ({row['measured_least']:.2f})"]
        for row in result["rows"]
        if "timed_model" in row
    ]
    return grid(["model", "recipe", "step time / Lora (of the fastest steps)"], rows) + "\n" + footer(result)
