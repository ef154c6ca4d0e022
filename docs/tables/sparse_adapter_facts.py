from __future__ import annotations

from typing import Any

from tables import footer, grid, mib, spread


def table(result: dict[str, Any]) -> str:
    settings = result["config"]
    rows = []
    for name in dict.fromkeys(row["adapter"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["adapter"] == name]
        wide = name != "dense, as many rows as on the device"
        count = settings["wide"] if wide else settings["narrow"]
        resident = settings["wide"] if name == "dense, as wide" else settings["narrow"]
        report = own[0]["report"]
        steps = settings["epochs"] * settings["facts"] / settings["batch_size"]
        traffic = f"{mib(report['bytes_to_device'] / steps)}" if report else "-"
        rows.append([name, f"{count:,}", f"{resident:,}", spread([row["known"] for row in own]), traffic])
    header = ["adapter", "rows a layer", "of them on the device", "facts known (range over seeds)"]
    return grid([*header, "MiB to the device a step"], rows) + "\n" + footer(result)
