from __future__ import annotations

from typing import Any

from tables import footer, grid

WHY = {
    "WTA-CRS": "it leaves alone what norms, dropout, attention and the loss keep; the paper's batch is not known",
    "VeLoRA": "",
    "Mesa": "",
    "TokenTune": "four fifths of this step are weights, gradients and moments; the paper's batch is not known",
    "MEFT": "",
    "LST": "",
}


def table(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        beside, recipe, best = (row[key][0] for key in ("beside", "recipe", "best"))
        base = row["peaks"][beside]
        size = "{} x {}".format(*row["size"])
        what = "forward and backward" if row["activations"] else "whole step"
        found = [f"{row['peaks'][name] / base:.2f}" for name in (recipe, best)]
        lines.append(
            [row["paper"], f"{row['model']}, {size}", what, f"{recipe} / {beside}", f"{row['published']:.2f}", found[0]]
        )
        lines[-1] += [f"{best}: {found[1]}", WHY[row["paper"]]]
    header = ["paper", "model", "peak of", "ratio", "published", "here", "best here", "why it differs"]
    return grid(header, lines) + "\n" + footer(result)
