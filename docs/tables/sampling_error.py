from __future__ import annotations

from typing import Any

from tables import by_model


def table(result: dict[str, Any]) -> str:
    return by_model(result, "error", 2)
