"""Recipes: transforms chained into one value that prints as code and survives JSON and YAML."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tightfit.core.documents import ShallowLoader, check_document, parse_json
from tightfit.core.errors import RecipeError
from tightfit.core.fields import near
from tightfit.core.transform import Transform

if TYPE_CHECKING:
    import torch

FORMAT = 1


@dataclasses.dataclass(frozen=True, repr=False)
class Recipe:
    """A collection of transforms, compared by value. Build one with `chain`.

    Their order counts when two recipes are compared; it does not matter to what is done.
    """

    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.transforms)

    def __len__(self) -> int:
        return len(self.transforms)

    def __repr__(self) -> str:
        return f"chain({', '.join(repr(t) for t in self.transforms)})"

    def __str__(self) -> str:
        return " + ".join(type(t).__name__ for t in self.transforms) or "stock"

    @property
    def exact(self) -> bool:
        """Whether every transform keeps the gradients of the untransformed step."""
        return all(t.is_exact() for t in self.transforms)

    @property
    def long_rows(self) -> bool:
        """Whether rows may be longer than the model has positions."""
        return any(t.long_rows for t in self.transforms)

    def example(self, model: torch.nn.Module, batch_size: int, length: int, **form: Any) -> dict[str, torch.Tensor]:
        """A batch of these sizes that the model takes under the recipe; `form` is `simulate.example_batch`'s.

        Raises:
            SimulationError: no such batch is known.
        """
        from tightfit.core.simulate.batches import example_batch

        tokens = next((ids for t in self.transforms if (ids := t.readable_ids()) is not None), None)
        return example_batch(model, batch_size, length, long_rows=self.long_rows, tokens=tokens, **form)

    def to_list(self) -> list[dict[str, Any]]:
        """The recipe as the `methods:` list of a recipe file."""
        return [{type(t).__name__: t.to_dict()} for t in self.transforms]

    @classmethod
    def from_list(cls, methods: Any) -> Recipe:
        """Build a recipe from `[{"Lora": {"rank": 8}}, "Checkpointing", ...]`.

        Raises:
            RecipeError: an unknown method or field, or a value the method refuses; names the entry.
        """
        if not isinstance(methods, list | tuple):
            raise RecipeError(f"methods: got {type(methods).__name__}, accepted is a list of one-key mappings")
        return cls(tuple(_read_entry(i, entry) for i, entry in enumerate(methods)))

    def to_json(self) -> str:
        """The recipe as a JSON document; `Recipe.from_json` reads it back."""
        return json.dumps({"tightfit": FORMAT, "methods": self.to_list()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            RecipeError: not JSON, no list of methods, or an entry that `from_list` refuses.
        """
        try:
            data = parse_json(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"recipe JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
        except ValueError as error:
            raise RecipeError(f"recipe JSON: {error}") from None
        return cls._from_document(data, "recipe JSON")

    def to_yaml(self) -> str:
        """The recipe as a YAML document, as in a recipe file; `Recipe.from_yaml` reads it back."""
        import yaml

        return yaml.safe_dump({"tightfit": FORMAT, "methods": self.to_list()}, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read what `to_yaml` wrote, or the `methods:` of a recipe file.

        Raises:
            RecipeError: not YAML, no list of methods, or an entry that `from_list` refuses.
        """
        import yaml

        try:
            data = yaml.load(text, Loader=ShallowLoader)
            check_document(data, len(text))
        except RecursionError:
            raise RecipeError("recipe YAML: nested too deeply") from None
        except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
            raise RecipeError(f"recipe YAML: {' '.join(str(error).split())}") from None
        return cls._from_document(data, "recipe YAML")

    @classmethod
    def _from_document(cls, data: Any, what: str) -> Recipe:
        if not isinstance(data, dict) or "methods" not in data:
            raise RecipeError(f"{what}: no 'methods' list at the top level")
        if data.get("tightfit", FORMAT) != FORMAT:
            raise RecipeError(f"{what}: format {data['tightfit']!r}, this version reads format {FORMAT}")
        return cls.from_list(data["methods"])


def chain(*transforms: Transform | Recipe) -> Recipe:
    """Compose transforms and recipes into one recipe; recipes nest and are flattened.

    The order does not matter: edits run in the fixed order of their slots.

    Raises:
        TypeError: an argument is neither a transform nor a recipe.

    Example:
        >>> from tightfit import Checkpointing, Lora, chain
        >>> chain(Lora(rank=4), chain(Checkpointing()))
        chain(Lora(rank=4), Checkpointing())
    """
    flat: list[Transform] = []
    for position, item in enumerate(transforms):
        if isinstance(item, Recipe):
            flat.extend(item.transforms)
        elif isinstance(item, Transform):
            flat.append(item)
        else:
            hint = (
                f"; did you mean {item.__name__}()?" if isinstance(item, type) and issubclass(item, Transform) else ""
            )
            raise TypeError(f"chain(): argument {position} is {item!r}, accepted are transforms and recipes{hint}")
    return Recipe(tuple(flat))


def as_recipe(recipe: Recipe | Transform | list | tuple | None) -> Recipe:
    """Accept a recipe, one transform, a list of them, or None (the stock step)."""
    if recipe is None:
        return Recipe()
    if isinstance(recipe, list | tuple):
        return chain(*recipe)
    return chain(recipe)


def method_classes() -> dict[str, type[Transform]]:
    """Every method by class name: this library's, and those of others that have been imported."""
    importlib.import_module("tightfit.methods")  # or who imported a module of the core alone would find none
    found: dict[str, type[Transform]] = {}
    pending = list(Transform.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.name:
            found[cls.__name__] = cls
    return dict(sorted(found.items()))


def _read_entry(index: int, entry: Any) -> Transform:
    where = f"methods[{index}]"
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise RecipeError(
            f"{where}: got {entry!r}, accepted is one method with its fields, such as 'Lora: {{rank: 8}}'"
        )
    ((name, fields),) = entry.items()
    classes = method_classes()
    if name not in classes:
        raise RecipeError(
            f"{where}: unknown method {name!r}{near(name, list(classes))}; known are {', '.join(classes)}"
        )
    cls = classes[name]
    fields = {} if fields is None else fields
    if not isinstance(fields, dict):
        raise RecipeError(f"{where}.{name}: got {fields!r}, accepted is a mapping of fields")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise RecipeError(
                f"{where}.{name}.{key}: unknown field{near(key, known)}; known are {', '.join(known) or '(none)'}"
            )
    try:
        return cls.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}.{name}: {error}") from error
