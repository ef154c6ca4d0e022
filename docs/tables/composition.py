from __future__ import annotations

import re
from typing import Any

from tables import footer, grid


def table(result: dict[str, Any]) -> str:
    """A grid of all pairs, with the reasons of the refused ones below."""
    refusals: dict[frozenset[str], list[tuple[str, str | None]]] = {}
    for row in result["rows"]:
        refusals.setdefault(frozenset(row["pair"]), []).append((row["model"], row["refused"]))
    names = [row["pair"][0] for row in result["rows"] if row["model"] == "Llama" and len(row["pair"]) == 1]
    reasons: list[str] = []

    def cell(one: str, other: str) -> str:
        tried = refusals.get(frozenset([one, other]), [])
        found = list(dict.fromkeys(_reason(why) for _, why in tried if why is not None and one != other))
        reasons.extend(reason for reason in found if reason not in reasons)
        yes = ["yes"] if any(why is None for _, why in tried) else []
        return " / ".join([*yes, *(f"{reasons.index(reason) + 1}" for reason in found)])

    lines = [[f"**{one}**", *(cell(one, other) for other in names[:at])] for at, one in enumerate(names)]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    alone = [
        [name, model, _reason(why)] for name in names for model, why in refusals[frozenset([name])] if why is not None
    ]
    lines = [[*row, *[""] * (len(names) - len(row))] for row in lines[1:]]
    parts = [
        grid(["", *names[:-1]], lines),
        "A number is why a pair is refused; with yes before it, on some models only:",
        notes,
        f"Alone, of {', '.join(result['config']['models'])}, these do not work:",
        grid(["method", "model", "because"], alone),
    ]
    return "\n\n".join(parts) + "\n" + footer(result)


def _reason(refusal: str) -> str:
    """A refusal without the names of modules and methods, to be told of many pairs."""
    claimed = re.findall(r"\(slot '([^']*)'\)", refusal)
    if claimed:
        return f"both need the same places (slot {', '.join(dict.fromkeys(claimed))})"
    text = re.sub(r"^\w+: (For\w+|\w+For\w+ )?(is not supported: )?", "", refusal)
    text = re.sub(r"none of its \d+ layers", "none of its layers", text)
    return re.sub(r" \([^()]*and \d+ more\)", "", text)
