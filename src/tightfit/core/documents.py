"""Documents from elsewhere: plain values within bounds, so that whatever reads them can walk and print them."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

DEPTH = 64
FEW = 100_000
LARGEST = 10**300


def parse_json(text: str) -> Any:
    """A JSON text as plain values.

    Raises:
        ValueError: no valid JSON, or something that `check_document` refuses.

    Example:
        >>> parse_json('{"rank": 8}')
        {'rank': 8}
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    check_document(value, len(text))
    return value


def finite(value: Any) -> Any:
    """Plain values as JSON can hold them: None for a number that is not finite.

    >>> finite({"loss": [0.5, float("nan")]})
    {'loss': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ShallowLoader(yaml.SafeLoader):
    """Safe YAML, nested no deeper than a reader can follow: the scanner's time grows with the square of the depth."""

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level > DEPTH:
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEPTH} levels", problem_mark=mark)
        super().fetch_flow_collection_start(token_class)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, KeyError) as error:  # of "!!bool perhaps", "!!timestamp never"
            kind, mark = node.tag.rpartition(":")[2], node.start_mark
            raise yaml.MarkedYAMLError(problem=f"no {kind}: {str(node.value)[:40]!r}", problem_mark=mark) from error


def check_document(value: Any, length: int) -> None:
    """See that plain values can be walked and printed.

    Args:
        length: of the text they were read from; values that an alias repeats count each time.

    Raises:
        ValueError: more values than the text has characters (and than 100,000), more than 64 levels, a whole number
            of more than 300 digits, or a text that is no valid Unicode.
    """
    left = max(length, FEW)
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        left -= 1
        if left < 0:
            raise ValueError("aliases that repeat each other, to more values than can be read")
        if isinstance(item, str):
            if not is_text(item):
                raise ValueError(f"a text that is no valid Unicode: {item[:20]!r}")
        elif isinstance(item, int):
            if not -LARGEST <= item <= LARGEST:
                raise ValueError("a whole number of more than 300 digits")
        elif isinstance(item, dict | list | tuple | set | frozenset):
            if depth == DEPTH:
                raise ValueError(f"nested deeper than {DEPTH} levels")
            waiting.extend((part, depth + 1) for part in item)
            if isinstance(item, dict):
                waiting.extend((part, depth + 1) for part in item.values())


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be encoded: JSON can spell halves of a character.

    >>> is_text("film"), is_text("\\ud800"), is_text(3)
    (True, False, False)
    """
    if not isinstance(value, str):
        return False
    try:
        return value.isascii() or value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False
