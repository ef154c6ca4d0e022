"""YAML that remembers lines: plain values, and for every key the place it was written at.

Scalars follow YAML 1.2: `2e-5` is a number, only `true` and `false` are booleans, dates stay text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tightfit.core.documents import DEPTH, FEW, ShallowLoader, check_document
from tightfit.core.errors import RecipeError

KeyPath = tuple[str | int, ...]

_SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class _Loader(ShallowLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]
    most = FEW  # values that a document may come to, those of its aliases each time


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either reading of YAML would take for something else than text."""

    yaml_implicit_resolvers: ClassVar[dict] = {  # type: ignore[misc]
        k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class MarkedDocument:
    """The content of a file and, for each key path, `file:line`."""

    content: Any
    places: dict[KeyPath, str]


def read_marked_yaml(path: Path) -> MarkedDocument:
    """Read one YAML document. Raises: RecipeError for a missing file, bad syntax or a duplicate key."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder, accepted is a recipe file in YAML") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: byte {error.object[error.start]:#04x} is not UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    places: dict[KeyPath, str] = {}
    return MarkedDocument(_compose(text, str(path), places), places)


def parse_value(text: str, where: str) -> Any:
    """Read one value as YAML; `where` begins the message of an error."""
    return _compose(text, where, {}, single=True)


def dump_yaml(content: Any) -> str:
    """Plain values as YAML that reads back equal, here and in YAML 1.1 readers."""
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if re.search("[\x85\u2028\u2029]", text):  # YAML folds these line breaks to a space unless escaped
        text = yaml.dump(content, Dumper=_Dumper, sort_keys=False)
    return text


def _compose(text: str, name: str, places: dict[KeyPath, str], single: bool = False) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        loader.most = max(len(text), FEW)
        return None if node is None else _value(loader, node, (), name, places, single, ())
    except RecursionError:
        raise RecipeError(f"{name}: not valid YAML: nested deeper than {DEPTH} levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark and not single else name
        context = f" {error.context}" if error.context else ""
        raise RecipeError(f"{place}: not valid YAML: {error.problem}{context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _value(
    loader: _Loader,
    node: yaml.Node,
    key_path: KeyPath,
    name: str,
    places: dict[KeyPath, str],
    single: bool,
    parents: tuple[int, ...],
) -> Any:
    place = name if single else f"{name}:{node.start_mark.line + 1}"
    places.setdefault(key_path, place)
    if id(node) in parents:
        raise RecipeError(f"{place}: {'.'.join(map(str, key_path))}: an alias that contains itself")
    if len(parents) > DEPTH:
        raise RecipeError(f"{place}: nested deeper than {DEPTH} levels")
    if len(places) > loader.most:
        raise RecipeError(f"{place}: aliases that repeat each other, to more values than can be read")
    parents = (*parents, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [
            _value(loader, item, (*key_path, i), name, places, single, parents) for i, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        try:
            value = loader.construct_object(node, deep=True)
            check_document(value, 0)
            return value
        except (yaml.YAMLError, ValueError) as error:
            reason = getattr(error, "problem", None) or error
            raise RecipeError(f"{place}: {'.'.join(map(str, key_path))}: {reason}") from None
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_place = name if single else f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{key_place}: a key must be plain text")
        key = key_node.value
        here = (*key_path, key)
        if key in mapping:
            first = "" if single else f", first on line {places[here].rpartition(':')[2]}"
            raise RecipeError(f"{key_place}: {'.'.join(map(str, here))}: this key is given twice{first}")
        places[here] = key_place
        mapping[key] = _value(loader, value_node, here, name, places, single, parents)
    return mapping
