"""The embedded data set: docstrings of the standard library, to be told apart by package.

Found by parsing the source files on the user's machine; no module is imported. A row is a passage of one
docstring. What would give the answer away is masked by `[name]`, by rules that do not depend on the label:
every identifier that contains the name of one of the packages (with what is dotted to it), the names of all
their classes, and the object's own qualified name. Rows are split by object; a text that occurs twice is
used once, and not at all when it occurs in two packages.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MASK = "[name]"
CLASSES = 10
MOST_PER_CLASS = 480
FEWEST_PER_CLASS = 120
EVAL_SHARE = 0.2
_SHORTEST_WORDS, _LONGEST_WORDS = 4, 40
_CANDIDATES = 14  # packages that are parsed; chosen by a count of triple quotes, which costs no parsing
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "distutils",
    "turtledemo",
    "site-packages",
    "dist-packages",
}
_SKIPPED |= {"__pycache__", "encodings", "pydoc_data", "ensurepip", "idle_test", "this"}
_WORD = re.compile(r"\S*[^\W\d_]\S*")
_IDENTIFIER = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")


class DocstringRow(NamedTuple):
    """One masked passage of a docstring, the package it comes from, and the split it is in."""

    text: str
    package: str
    split: str  # "train" or "eval"


class _Object(NamedTuple):
    package: str
    name: str  # qualified, with module and classes
    docstring: str


def stdlib_docstrings() -> list[DocstringRow]:
    """Docstrings of this machine's standard library, masked, sorted, the same on every run.

    About ten packages, those with the most passages; larger ones are cut to a common size. The rows depend
    on the Python version only.

    Example:
        >>> rows = stdlib_docstrings()
        >>> {row.split for row in rows} == {"train", "eval"}
        True
    """
    return list(_found(Path(sysconfig.get_paths()["stdlib"])))


@functools.cache
def _found(root: Path) -> tuple[DocstringRow, ...]:
    files = _candidate_files(root)
    objects: list[_Object] = []
    classes: set[str] = set()
    for package, paths in files.items():
        for path in paths:
            objects.extend(_objects(root, path, package, classes))
    return tuple(_rows(_passages(objects), classes))


def _candidate_files(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    quotes: Counter[str] = Counter()
    for path in _sources(root):
        package = path.relative_to(root).with_suffix("").parts[0]
        if package.startswith("_"):  # _pydecimal holds decimal, _collections_abc collections
            bare = re.sub(r"^_(py)?|_abc$", "", package)
            package = bare if bare in sys.stdlib_module_names else package
        found.setdefault(package, []).append(path)
        source = path.read_bytes()
        quotes[package] += source.count(b'"""') + source.count(b"'''")
    return {package: found[package] for package, _ in sorted(quotes.items(), key=lambda x: (-x[1], x[0]))[:_CANDIDATES]}


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.removesuffix(".py") in _SKIPPED or entry.name.startswith(("__phello__", "config-")):
            continue
        if entry.is_dir():
            yield from _sources(Path(entry.path))
        elif entry.name.endswith(".py"):
            yield Path(entry.path)


def _objects(root: Path, path: Path, package: str, classes: set[str]) -> Iterator[_Object]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file for another version
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")

    def walk(node: ast.AST, name: str) -> Iterator[_Object]:
        docstring = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
        if docstring:
            yield _Object(package, name, inspect.cleandoc(docstring))
        yield from inside(node, name)

    def inside(node: ast.AST, name: str) -> Iterator[_Object]:
        for field in ("body", "orelse", "handlers", "finalbody"):
            for child in getattr(node, field, ()):
                if isinstance(child, ast.ClassDef):
                    classes.add(child.name)
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from walk(child, f"{name}.{child.name}")
                elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                    yield from inside(child, name)

    yield from walk(tree, module)


def _passages(objects: list[_Object]) -> dict[str, tuple[_Object, str]]:
    """Normalised text -> the object it is kept for; texts of more than one package are left out."""
    owners: dict[str, set[str]] = {}
    first: dict[str, tuple[_Object, str]] = {}
    for item in sorted(objects, key=lambda o: (o.name, o.docstring)):
        for passage in _cut(item.docstring):
            key = _normal(passage)
            owners.setdefault(key, set()).add(item.package)
            first.setdefault(key, (item, passage))
    return {key: value for key, value in first.items() if len(owners[key]) == 1}


def _cut(docstring: str) -> Iterator[str]:
    """Paragraphs, short ones joined to the next, as long as they stay within 40 words."""
    pending: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        words = paragraph.split()
        if pending and len(pending) + len(words) > _LONGEST_WORDS:
            yield " ".join(pending)
            pending = []
        pending += words
        while len(pending) > _LONGEST_WORDS:
            yield " ".join(pending[:_LONGEST_WORDS])
            pending = pending[_LONGEST_WORDS:]
    if pending:
        yield " ".join(pending)


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _rows(passages: dict[str, tuple[_Object, str]], classes: set[str]) -> list[DocstringRow]:
    sizes = Counter(item.package for item, text in passages.values() if _is_telling(text))
    ranked = sorted(sizes, key=lambda package: (-sizes[package], package))[:CLASSES]
    chosen = {package for package in ranked if sizes[package] >= FEWEST_PER_CLASS}
    labels = re.compile("|".join(sorted(chosen)), re.IGNORECASE)
    capitalised = {name for name in classes if name != name.lower()}
    owners: dict[str, set[str]] = {}
    first: dict[str, tuple[_Object, str]] = {}
    for item, text in passages.values():
        if item.package in chosen:
            masked = _masked(text, item.name, labels, capitalised)
            key = _normal(masked)
            owners.setdefault(key, set()).add(item.package)
            first.setdefault(key, (item, masked))
    rows = []
    for package in sorted(chosen):
        own = [first[key] for key in first if owners[key] == {package} and _is_telling(first[key][1])]
        own.sort(key=lambda pair: (_share("choice", pair[0].name), pair[1]))
        for item, text in own[:MOST_PER_CLASS]:
            split = "eval" if _share("split", item.name) < EVAL_SHARE else "train"
            rows.append(DocstringRow(text, package, split))
    return sorted(rows)


def _masked(text: str, name: str, labels: re.Pattern[str], classes: set[str]) -> str:
    own = {part.strip("_").lower() for part in name.split(".")}

    def replace(match: re.Match[str]) -> str:
        word = match[0]
        parts = word.split(".")
        hidden = labels.search(word) or any(p in classes or p.strip("_").lower() in own for p in parts)
        return MASK if hidden else word

    return _IDENTIFIER.sub(replace, text)


def _is_telling(text: str) -> bool:
    return len(_WORD.findall(text.replace(MASK, " "))) >= _SHORTEST_WORDS


def _share(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {name}".encode()).digest()[:7], "big") / 2**56
