from __future__ import annotations

from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        best, *others = row["recommended"]
        rows.append(
            [
                row["model"],
                mib(row["budget_bytes"]),
                f"{best['recipe']}, {best['rows']} x {best['parts']}",
                f"{mib(best['predicted_peak_bytes'])} / {mib(best['measured_peak_bytes'])}",
                "; ".join(f"{other['recipe']}, {other['rows']} x {other['parts']}" for other in others) or "-",
                "yes" if row["under_budget"] else "no",
                f"{row['best_over_fastest']:.2f}",
                f"{row['best_over_fastest_not_exact_either']:.2f}",
                f"{row['recommend_seconds']:.0f}, {row.get('simulated_steps', '?')} steps",
            ]
        )
    header = [
        "model",
        "budget, MiB",
        "first choice, rows x parts",
        "its peak, MiB, predicted / measured",
        "other choices",
    ]
    header += [
        "all under budget",
        "step time over the fastest alike",
        "... over the fastest of all",
        "CPU s to find, steps simulated",
    ]
    note = (
        "\n\nThe fastest alike is the fastest recipe that fits and is exact where the first choice is; of all, exact "
        "or not. Exact recipes go first by design, so the last ratio may be well above 1."
    )
    return grid(header, rows) + note + "\n" + footer(result)
