from __future__ import annotations

from typing import Any

from tables import grid


def table(result: dict[str, Any]) -> str:
    """A line per recipe, a column per way to run several processes; why a recipe is refused below."""
    engines = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(result["rows"], key=lambda row: (row["methods"][:1], len(row["methods"]), row["row"])):
        found.setdefault(row["row"], {}).setdefault(row["engine"], []).append(row)
    reasons: list[str] = []
    lines, last = [], None
    for variant, by_engine in found.items():
        first = next(iter(by_engine.values()))[0]
        methods = " + ".join(first["methods"]) or "none (stock)"
        name = f"**{methods}**" if methods != last else ""
        last = methods
        cells = [_cell(by_engine.get(engine, []), reasons) for engine in engines]
        models = dict.fromkeys(row["model"] for rows in by_engine.values() for row in rows)
        lines.append([name, variant, ", ".join(models), *cells])
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    versions = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
    return "\n\n".join([grid(["recipe", "variant", "models", *engines], lines), notes, f"*{versions}.*"])


def _cell(rows: list[dict[str, Any]], reasons: list[str]) -> str:
    """What was found on all models together, the largest difference of them."""
    refused = next((row for row in rows if row["verdict"] == "refused"), None)
    if refused is not None:
        reason = _without_place(refused["reason"])
        if reason not in reasons:
            reasons.append(reason)
        return f"no: {reasons.index(reason) + 1}"
    if not rows:
        return ""
    gap = max((row["gap"] for row in rows), key=float)
    return f"own draws ({gap})" if rows[0]["verdict"] == "own draws" else f"yes ({gap})"


def _without_place(reason: str) -> str:
    """The message without its class; of the module that it names, which differs from model to model, the kind."""
    text = reason.split(": ", 1)[1]
    head, _, rest = text.partition(": ")
    words = rest.split(" ")
    return f"{head}: {' '.join(['an MLP' if '.' in words[0] else words[0], *words[1:]])}" if rest else text
