from __future__ import annotations

import re
from typing import Any

from tables import grid


def table(result: dict[str, Any]) -> str:
    """A line per method and per variant that differs, a column per integration; below, why some do not go."""
    names = list(dict.fromkeys(row["integration"] for row in result["rows"]))
    cells = {(row["row"], row["integration"]): row for row in result["rows"]}
    reasons: list[str] = []

    def line(variant: str) -> list[str]:
        shown = []
        for name in names:
            row = cells[variant, name]
            if row["reason"] is None:
                shown.append(row["verdict"])
                continue
            reason = _reason(row["reason"])
            if reason not in reasons:
                reasons.append(reason)
            shown.append(f"{row['verdict']} {reasons.index(reason) + 1}")
        return shown

    lines: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for row in result["rows"]:
        method, variant = row["method"], row["row"]
        main = first.setdefault(method, variant)
        found = line(variant)
        if variant == main:
            lines[method] = found
        elif found != lines[method]:
            lines[f"{method}, {_short(variant, main)}"] = found
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    versions = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
    return "\n\n".join([grid(["", *names], [[f"**{n}**", *c] for n, c in lines.items()]), notes, f"*{versions}.*"])


def _short(variant: str, main: str) -> str:
    return variant.removeprefix(f"{main}-").replace("-", " ")


def _reason(text: str) -> str:
    """A refusal without the names of methods, models and modules, to be told of many cells."""
    if "own PEFT adapters both take over" in text:
        return "it runs the blocks without a graph, or takes them over, and the adapters in them would not train"
    if "have been frozen or replaced since" in text:
        return (
            "`get_peft_model` freezes or replaces what the recipe added: call it before `tightfit.apply`, or put "
            "`Lora` into the recipe"
        )
    text = re.sub(r"^\w+(\([^)]*\))?: ", "", text)
    text = re.sub(r"^\w+For\w+ (is not supported: it )?", "", text)
    text = re.sub(r"^\w+ already carries PEFT adapters", "the model already carries PEFT adapters", text)
    text = re.sub(r"\w+Model is not supported: it", "the model", text)
    text = re.sub(r" \(at [^()]*and \d+ more\)", "", text)
    text = re.sub(r"so [\w.]+(, [\w.]+)* and \d+ more ", "so the adapters ", text)
    return re.sub(r"which holds \d+ of \d+ rows", "which holds the kept rows only", text)
