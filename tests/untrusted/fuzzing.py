"""Files as an enemy or a bad disk would leave them, and the bounds within which reading them must stay."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tightfit

LONGEST_MESSAGE = 3000
SECONDS = 20
EXTRA_BYTES = 3 * 2**29


def amounts(quick: int, slow: int):
    """Parametrise a test by how many cases it draws: few in every run, many where slow tests are run."""
    return pytest.mark.parametrize("cases", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def draw_cases(cases: int, strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
    """Call `check` with `cases` drawn values; the same ones in every run of the same code."""
    options: dict[str, Any] = {"max_examples": cases, "deadline": None, "database": None, "derandomize": True}
    phases = [Phase.explicit, Phase.generate]  # what is found is small enough to read

    @settings(**options, phases=phases, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def case(value):
        check(value)

    case()


@contextlib.contextmanager
def bounded(seconds: int = SECONDS, extra_bytes: int = EXTRA_BYTES) -> Iterator[None]:
    """Fails what runs too long, and what asks for more address space than that."""

    def too_long(*_):
        raise AssertionError(f"still running after {seconds} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    earlier = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (taken + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def works_or_is_refused(action: Callable[[], Any]) -> Any:
    """What the action gives, or None where it raised an error of the library that a person can read."""
    try:
        with bounded():
            return action()
    except tightfit.TightfitError as error:
        text = str(error)
        assert text and len(text) < LONGEST_MESSAGE, f"a message of {len(text)} characters: {text[:300]}"
        text.encode("utf-8")  # it can be printed
        return None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-3:]
        raise AssertionError(f"a bare {type(error).__name__}: {str(error)[:300]}, from {where}") from None


# -- what is put into documents ---------------------------------------------------------------------------------


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


ODD_NUMBERS = [0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400), 1e308, -0.0, 5e-324]
ODD_NUMBERS += [float("nan"), float("inf"), -float("inf"), True]
ODD_TEXTS = ["", " ", "\0", "\x1b[31m", "\u202e", "\ud800", "a" * 5000, "../../x", "/etc/passwd", "~", "file:///etc"]
ODD_TEXTS += ["*", "[", "**|", "(a+)+$", "%s{0}", "__class__", "1e5", "NaN", "null", "\r\n", "é" * 10, "Lora", "demo:x"]
LEAVES = st.none() | st.sampled_from(ODD_NUMBERS) | st.sampled_from(ODD_TEXTS) | st.integers() | st.text(max_size=8)
ANYTHING = st.recursive(
    LEAVES | st.floats() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
) | st.builds(nested, st.sampled_from([5, 60, 200]), st.sampled_from(["list", "dict"]))


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place of a document, as the keys that lead to it."""
    yield path
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*path, key))


def put(document: Any, path: tuple, value: Any) -> Any:
    """The document with another value at one place."""
    if not path:
        return value
    changed = copy.deepcopy(document)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


@st.composite
def changed_documents(draw, documents: st.SearchStrategy) -> Any:
    """A document with one to three of its places changed, dropped, or given another name."""
    document = draw(documents)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "rename"])) if path else "value"
        if kind == "value":
            document = put(document, path, draw(ANYTHING))
            continue
        document = copy.deepcopy(document)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        value = holder.pop(path[-1])
        if kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=6))] = value
    return document


def as_json(document: Any) -> bytes:
    """JSON as `json.dumps` has it: NaN and lone surrogates and all, and numbers of any length."""
    return json.dumps(document).encode("ascii")


# -- what is done to bytes --------------------------------------------------------------------------------------

PIECES = [
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b'"',
    b"'",
    b"{",
    b"[" * 3000,
    b"{'a':" * 500,
    b"\n\n",
    b"\r",
    b"\t",
]
PIECES += [b"9" * 5000, b"1e999", b"NaN", b"-", b": ", b"- ", b"&a [*a]", b"*a", b"!!python/name:os.system", b"\\ud800"]
PIECES += [b"!!timestamp 2001-99-99", b"\xef\xbb\xbf", b"%YAML 9.9\n---\n", b"\x1f\x8b", b",", b"\\", b"a" * 9000, b"?"]


@st.composite
def damaged_bytes(draw, contents: st.SearchStrategy) -> bytes:
    """A file with some bytes flipped, dropped, doubled or put in, or cut off."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 12))
        kind = draw(st.sampled_from(["flip", "drop", "double", "put", "put", "cut"]))
        if kind == "flip":
            new = draw(st.binary(min_size=1, max_size=6))
            content[at : at + len(new)] = new
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + 10 * length]
        elif kind == "put":
            content[at:at] = draw(st.sampled_from(PIECES))
        else:
            del content[at:]
    return bytes(content)
