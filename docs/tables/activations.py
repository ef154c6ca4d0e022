from __future__ import annotations

from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    stock = {row["model"]: row for row in result["rows"] if row["recipe"] == "stock"}
    parts = []
    for model, base in stock.items():
        rows = []
        for row in result["rows"]:
            if row["model"] == model:
                peak = f"{row['peak_bytes'] / base['peak_bytes']:.3f}"
                saved = [f"{base[key] / row[key]:.2f}" for key in ("block_bytes", "saved_bytes")]
                rows.append([row["recipe"], mib(row["peak_bytes"]), peak, *saved])
        header = ["recipe", "peak of forward and backward above the weights, MiB", "of stock"]
        header += ["kept by the blocks, times less", "kept by the model, times less"]
        parts.append(f"**{model}, {base['batch']}**\n\n" + grid(header, rows))
    return "\n\n".join(parts) + "\n" + footer(result)
