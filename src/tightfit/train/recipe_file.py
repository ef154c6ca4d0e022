"""Recipe files: one YAML file naming model, task, data, methods and training, checked before anything runs.

Every complaint is one line: file, line, key, what was given, what is accepted, and the nearest known key.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tightfit.core.errors import RecipeError
from tightfit.core.fields import near
from tightfit.train.marked_yaml import KeyPath, dump_yaml, parse_value, read_marked_yaml

if TYPE_CHECKING:
    from tightfit.core.recipe import Recipe

Task = Literal[
    "sequence-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "seq2seq-lm",
    "image-classification",
]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0, lt=2**31)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSection(_Section):
    """Where the rows come from and which columns they are in.

    Fields:
        train, eval: a local file or folder, a hub id (`id` or `id:split`), or `demo:stdlib`.
        eval_fraction: the part of `train` held out when `eval` is not given.
        text, label: input columns (two for sentence pairs) and the label column.
        target: the text to produce (seq2seq-lm, and causal-lm with a prompt).
        tags: the tag column of token-classification.
        columns: names for a file without a header line.
        rows, eval_rows: use the first N rows only.
        format: the file format where the file's name does not tell it.
        subset: the configuration of a hub data set.
        regression: whether labels are numbers to predict; decided from the labels when not given.
        packed: causal-lm: cut the joined texts into full blocks of `max_length` instead of one row a text.
    """

    train: Name
    eval: Name | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    text: Annotated[list[Name], Field(min_length=1, max_length=2)] | None = None
    label: Name | None = None
    target: Name | None = None
    tags: Name | None = None
    columns: Annotated[list[Name], Field(min_length=1)] | None = None
    rows: Count | None = None
    eval_rows: Count | None = None
    format: Literal["tsv", "csv", "jsonl", "json", "parquet", "conll", "txt"] | None = None
    subset: Name | None = None
    regression: bool | None = None
    packed: bool | None = None

    @field_validator("text", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class TrainSection(_Section):
    """How the model is trained; names follow `transformers.TrainingArguments` where they mean the same.

    `precision: bf16` and `fp16` keep fp32 weights and run the step under autocast, as
    `TrainingArguments(bf16=True)` does. `group_by_length` puts examples of about one length into a batch, so that less
    is computed on padding; which ones still differs from epoch to epoch. `non_finite` says what happens when a loss or
    a gradient is not finite: `stop` ends the run before it reaches the weights, `skip` leaves the batch out, at most
    `max_skipped` times in a row. `optimizer: adamw-8bit` is bitsandbytes' AdamW with a byte for each moment; those of
    embeddings and of parameters below 4,096 elements stay in fp32.
    """

    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Count | None = None
    batch_size: Count = 32
    eval_batch_size: Count | None = None
    gradient_accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    optimizer: Literal["adamw", "adamw-fused", "sgd", "adafactor", "adamw-8bit"] = "adamw"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    max_length: Count = 128
    max_target_length: Count | None = None
    group_by_length: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_every: Count | None = None
    save_every: Count | None = None
    logging_steps: Count = 10
    report_to: list[Name] = []
    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: Count = 3

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class RecipeFile(_Section):
    """A whole recipe file with its defaults filled in."""

    model: Name
    task: Task
    data: DataSection
    methods: list[dict[str, dict[str, Any]]] = []
    train: TrainSection = TrainSection()
    output: Path

    @property
    def recipe(self) -> Recipe:
        """The methods as a `Recipe`. Raises: RecipeError."""
        return _recipe(self.methods)

    @field_validator("methods", mode="before")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        if value is None:
            return []
        return [_method_entry(entry) for entry in value] if isinstance(value, list) else value

    @field_validator("train", mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("train")
    @classmethod
    def _lengths(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        if value.group_by_length and info.data.get("task") == "image-classification":
            raise ValueError("group_by_length: images have no length; leave it out")
        return value

    @field_validator("output", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return Path(value) if isinstance(value, str) and value.strip() else value


def read_recipe_file(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read, check and complete a recipe file.

    Paths of data and model are looked for from the current directory first, then beside the recipe file.

    Args:
        overrides: `key=value` with dotted keys, as in `train.epochs=1` or `methods.0.Lora.rank=4`;
            values are read as YAML.

    Raises:
        RecipeError: one line naming file, line and key, what was given and what is accepted.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "recipe.yaml"
        >>> _ = path.write_text('''
        ... model: demo:minilm
        ... task: sequence-classification
        ... data: {train: demo:stdlib}
        ... output: runs/demo
        ... ''')
        >>> read_recipe_file(path, ["train.epochs=1"]).train.epochs
        1.0
    """
    path = Path(path)
    document = read_marked_yaml(path)
    content, places = document.content, dict(document.places)
    if not isinstance(content, dict):
        given = "nothing" if content is None else type(content).__name__
        raise RecipeError(f"{path}:1: a recipe file is a mapping with {_listed(RecipeFile)}, got {given}")
    for override in overrides:
        _override(content, places, override)
    try:
        parsed = RecipeFile.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_explain(error, content, places, path)) from None
    _check_methods(parsed, places, path)
    return _locate(parsed, path)


def check_optimizer(section: TrainSection) -> None:
    """Raise RecipeError for an optimizer whose library is not installed; a plan does not need it."""
    if section.optimizer == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("train.optimizer: adamw-8bit needs bitsandbytes: pip install bitsandbytes")


def write_recipe_file(recipe_file: RecipeFile, path: str | Path) -> None:
    """Write the file with all defaults filled in (temporary file, fsync, rename)."""
    from tightfit.core.artifacts import write_text

    write_text(Path(path), dump_yaml(recipe_file.model_dump(mode="json", exclude_none=True)))


def is_local(name: str) -> bool:
    """Whether a data or model name means a path of this machine rather than a hub id."""
    if name.startswith("demo:"):
        return False
    looks = name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(_FILE_SUFFIX.search(name))
    return looks or os.path.exists(Path(name).expanduser())  # pathlib raises for a name too long


_FILE_SUFFIX = re.compile(r"\.(tsv|csv|jsonl|json|parquet|conll|txt|npz|yaml|safetensors)(\.gz)?$|\.gz$|-ubyte$")


def _recipe(methods: Any) -> Recipe:
    import tightfit  # noqa: F401  (every method registers on import)
    from tightfit.core.recipe import Recipe

    return Recipe.from_list(methods)


def _method_entry(entry: Any) -> Any:
    if isinstance(entry, str):
        return {entry: {}}
    if isinstance(entry, dict):
        return {name: {} if fields is None else fields for name, fields in entry.items()}
    return entry


def _check_methods(parsed: RecipeFile, places: dict[KeyPath, str], path: Path) -> None:
    for index, entry in enumerate(parsed.methods):
        try:
            _recipe([entry])
        except RecipeError as error:
            message = re.sub(r"^methods\[0\]\.?", "", str(error)).removeprefix(": ")
            ((name, fields),) = entry.items() if len(entry) == 1 else ((next(iter(entry), ""), {}),)
            said = re.search(r"\.(\w+): unknown field|\((\w+)=\.\.\.\)", message)
            key = next((k for k in (said.groups() if said else ()) if k in fields), None)
            place = _place(places, ("methods", index, name, key) if key else ("methods", index, name), path)
            raise RecipeError(f"{place}: methods[{index}]: {message}") from None


def _override(content: dict, places: dict[KeyPath, str], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted or "" in dotted.split("."):
        raise RecipeError(f"override {override!r}: accepted is key=value with a dotted key, as in train.epochs=1")
    where = f"override {override!r}"
    value = parse_value(text, where)
    holder: Any = content
    key_path: KeyPath = ()
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: str | int = part
        if isinstance(holder, list):
            if not part.isdigit() or int(part) >= len(holder):
                raise RecipeError(f"{where}: {part!r} is no position in a list of {len(holder)}")
            key = int(part)
        elif not isinstance(holder, dict):
            raise RecipeError(f"{where}: {'.'.join(parts[:depth])} holds {holder!r}, it has no key {part!r}")
        key_path += (key,)
        if last:
            holder[key] = value
            for old in [place for place in places if place[: len(key_path)] == key_path]:
                del places[old]
            places[key_path] = where
            return
        if isinstance(holder, list):
            holder[int(part)] = _method_entry(holder[int(part)]) if parts[0] == "methods" else holder[int(part)]
        elif holder.get(part) is None:
            holder[part] = {}
            places[key_path] = where
        holder = holder[key]


def _place(places: dict[KeyPath, str], key_path: KeyPath, path: Path) -> str:
    while key_path:
        if key_path in places:
            return places[key_path]
        key_path = key_path[:-1]
    return f"{path}:1"


def _explain(error: ValidationError, content: Any, places: dict[KeyPath, str], path: Path) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        # pydantic adds names of union members and validators to a location: keep what the file really has
        key_path: KeyPath = ()
        found: Any = content
        for part in problem["loc"]:
            if part in found if isinstance(found, dict) else isinstance(found, list) and isinstance(part, int):
                found = found[part]
            elif problem["type"] != "missing":
                continue
            key_path += (part,)
        holder = key_path[:-1] if problem["type"] == "missing" else key_path
        problems.append((f"{_place(places, holder, path)}: {_dotted(key_path)}: ", problem, key_path))
    # a misspelt key is a missing one too: say the first
    where, problem, key_path = min(problems, key=lambda p: p[1]["type"] != "extra_forbidden")
    return where + _reason(problem, key_path)


def _reason(problem: Any, key_path: KeyPath) -> str:
    kind, given, context = problem["type"], problem.get("input"), problem.get("ctx", {})
    if kind == "extra_forbidden":
        section = _section(key_path[:-1])
        known = list(section.model_fields) if section else []
        return f"unknown key, accepted are {', '.join(known)}{near(key_path[-1], known)}"
    if kind == "missing":
        section = _section(key_path[:-1])
        example = {"task": get_args(Task)[0], "output": "runs/my-run", "train": "data.tsv"}.get(str(key_path[-1]))
        hint = f", as in {key_path[-1]}: {example}" if example else ""
        return f"this key is required{hint}" + (
            f"; accepted keys are {', '.join(section.model_fields)}" if section else ""
        )
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context.get("expected", ""))
        return f"got {given!r}, accepted is one of {', '.join(choices)}{near(given, choices)}"
    if kind == "string_too_short":
        return "got an empty text"
    accepted = {
        "model_type": f"a mapping with {_listed(_section(key_path))}",
        "dict_type": "a mapping of fields",
        "list_type": "a list",
        "string_type": "a text",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "greater_than": f"a number > {context.get('gt')}",
        "greater_than_equal": f"a number >= {context.get('ge')}",
        "less_than": f"a number < {context.get('lt')}",
        "less_than_equal": f"a number <= {context.get('le')}",
        "finite_number": "a finite number",
        "is_instance_of": "a path",
        "path_type": "a path",
        "too_short": f"a list of at least {context.get('min_length')}",
        "too_long": f"a list of at most {context.get('max_length')}",
    }.get(kind, problem["msg"])
    shown = "nothing" if given is None else f"{given!r} ({type(given).__name__})"
    return f"got {shown}, accepted is {accepted}"


def _section(key_path: KeyPath) -> type[BaseModel] | None:
    sections: dict[KeyPath, type[BaseModel]] = {(): RecipeFile, ("data",): DataSection, ("train",): TrainSection}
    return sections.get(key_path)


def _listed(section: type[BaseModel] | None) -> str:
    return ", ".join(section.model_fields) if section else "keys"


def _dotted(key_path: KeyPath) -> str:
    return ".".join(str(part) for part in key_path) or "(top level)"


def _locate(parsed: RecipeFile, path: Path) -> RecipeFile:
    def beside(name: str | None) -> str | None:
        if name is None or name.startswith(("demo:", "/", "~")):
            return name
        forms = (name, name.partition(":")[0])  # a folder's name may go on with a split
        here, there = (any(os.path.exists(place / form) for form in forms) for place in (Path(), path.parent))
        return str(path.parent / name) if there and not here else name

    data = parsed.data.model_copy(update={"train": beside(parsed.data.train), "eval": beside(parsed.data.eval)})
    return parsed.model_copy(update={"model": beside(parsed.model), "data": data})
