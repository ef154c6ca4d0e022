"""Shows the docstrings' own sections in the reference: `Example:` as code, `Fields:` as a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = {"Example": "Examples", "Fields": "Attributes"}


class OwnSections(griffe.Extension):
    """Renames sections to what griffe's Google style knows them by."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^( *)(Example|Fields):$", lambda m: f"{m[1]}{SECTIONS[m[2]]}:", text)
