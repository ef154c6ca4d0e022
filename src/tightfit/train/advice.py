"""Planning with recipe files: what a file's run will take, which recipe fits a budget, how far one reaches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tightfit.core.batch import length_of
from tightfit.core.errors import RecipeError
from tightfit.core.plan import Plan
from tightfit.core.reach import largest_batch, longest_sequence
from tightfit.core.recipe import Recipe, method_classes
from tightfit.core.recommend import Choice, recommend
from tightfit.core.skeleton import is_packed, read_config, skeleton
from tightfit.core.transform import Transform
from tightfit.train.data import longest_batch
from tightfit.train.marked_yaml import dump_yaml
from tightfit.train.recipe_file import RecipeFile, read_recipe_file, write_recipe_file
from tightfit.train.run import Prepared, build_skeleton, filled, plan_options, plan_run
from tightfit.train.sources import DEMO
from tightfit.train.tasks import build_model, model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TASKS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "MTModel": "seq2seq-lm",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "sequence-classification",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advisor:
    """A recipe file with its data and its model, ready for every question of the planner.

    Fields:
        file, prepared: the file, its tokenizer and data.
        model: a skeleton, or with weights.
        recipe: the file's methods, completed from the data.
        device: where the run will be, "cpu" or "cuda".
    """

    file: RecipeFile
    prepared: Prepared
    model: PreTrainedModel
    recipe: Recipe
    device: str

    @classmethod
    def of(cls, file: RecipeFile, prepared: Prepared, *, weights: bool = False, device: str | None = None) -> Advisor:
        """Build the model, without weights unless they are asked for, and complete the recipe."""
        model = build_model(file, prepared.data) if weights else build_skeleton(file, prepared.data)
        recipe = filled(file.recipe, prepared, model)
        here = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(file=file, prepared=prepared, model=model, recipe=recipe, device=device or here)

    @property
    def options(self) -> dict[str, Any]:
        """What `plan` must know about the run beside model, recipe and batch."""
        return plan_options(self.file, self.device)

    @functools.cached_property
    def _longest(self) -> dict[str, torch.Tensor]:
        """Two rows as long as the longest of the data."""
        return longest_batch(self.prepared.data, 2)

    def plan(self, *, fallback: str | None = None) -> Plan:
        """The plan of the file's step on its longest batch, gradients accumulated where the file says so."""
        return plan_run(self.file, self.prepared, self.recipe, self.model, device=self.device, fallback=fallback)

    def recommend(
        self,
        budget: str | int,
        *,
        tune: str = "any",
        exact: bool = False,
        only: Sequence[type[Transform]] | None = None,
        elsewhere: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Choice]:
        """Recipes that fit, at the file's rows per optimizer step; a method of the file is tried as it stands there.

        Args:
            only: the methods to choose from; default: all.
            budget, tune, exact, elsewhere, progress: as for `tightfit.recommend`.

        Raises:
            BudgetError: a malformed budget, or nothing fits.
        """
        rows = self.file.train.batch_size * self.file.train.gradient_accumulation
        methods, extra = self._methods(only)
        return recommend(
            self.model,
            batch=longest_batch(self.prepared.data, rows),
            budget=budget,
            tune=tune,
            exact=exact,
            methods=methods,
            extra=extra,
            effective_batch=rows,
            elsewhere=elsewhere,
            progress=progress,
            **self.options,
        )

    def _methods(self, only: Sequence[type[Transform]] | None) -> tuple[list[Any], list[Transform]]:
        """Method classes and values to choose from, and values that had to be completed from the data."""
        given = {type(transform): transform for transform in self.recipe}
        methods: list[Any] = []
        extra: list[Transform] = []
        for cls in method_classes().values():
            if only is not None and cls not in only:
                continue
            if cls in given:
                methods.append(given[cls])
                continue
            methods.append(cls)
            with contextlib.suppress(TypeError, ValueError):  # it needs more than the data, or does not fit them
                value = cls()
                if value.unfilled() is not None:
                    extra += [t for t in filled(Recipe((value,)), self.prepared, self.model) if not t.unfilled()]
        return methods, extra

    def chosen(self, choice: Choice) -> RecipeFile:
        """The file with a recommended recipe in it; what was completed from the data is left to the run again."""
        open_values = {type(t): t for t in self.file.recipe}
        methods: list[Transform] = []
        for transform in choice.recipe:
            value = open_values.get(type(transform))
            if value is None:
                with contextlib.suppress(TypeError, ValueError):
                    value = type(transform)()
            methods.append(value if value is not None and value.unfilled() is not None else transform)
        train = self.file.train.model_copy(
            update={"batch_size": choice.batch_size, "gradient_accumulation": choice.accumulation}
        )
        return self.file.model_copy(update={"methods": Recipe(tuple(methods)).to_list(), "train": train})

    def largest_batch(self, budget: str | int, **options: Any) -> tuple[int, int]:
        """(rows, tokens): the most rows as long as the longest row of the data that fit, with targets likewise."""
        length = length_of(self._longest) or 1
        return largest_batch(self.model, self.recipe, length=length, budget=budget, **options, **self._reach()), length

    def longest_sequence(self, budget: str | int, **options: Any) -> tuple[int, int]:
        """(rows, tokens): the longest rows that fit at the file's batch size, with targets as long as the data's."""
        rows = self.file.train.batch_size
        found = longest_sequence(self.model, self.recipe, batch_size=rows, budget=budget, **options, **self._reach())
        return rows, found

    def _reach(self) -> dict[str, Any]:
        options = {**self.options, "accumulate": min(2, self.file.train.gradient_accumulation)}
        if self.file.task == "seq2seq-lm":
            options["target_length"] = self._longest["labels"].shape[-1]
        return options


def new_recipe_file(model: str, data: str, task: str | None = None, overrides: Sequence[str] = ()) -> RecipeFile:
    """A recipe file for a model and data, without methods and with defaults for all the rest.

    Args:
        model, data: a path, a hub id, or a demo's name.
        task: default: what the model's architecture, or the demo's data, is for.
        overrides: `key=value`, as for `read_recipe_file`.

    Raises:
        RecipeError: a wrong value, or a task that cannot be told.
        UnsupportedModelError: there is no such model.
    """
    name = model.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "model"
    content = {
        "model": model,
        "task": task or task_of(model, data),
        "data": {"train": data},
        "methods": [],
        "output": f"runs/{name}",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_yaml(content), encoding="utf-8")
        try:
            return read_recipe_file(path, overrides)
        except RecipeError as error:
            line = str(error).replace(f"{path}:", "\0")
            raise RecipeError(_without_line(line)) from None


def _without_line(message: str) -> str:
    """A complaint about a file that the user never saw, without its name and line."""
    before, mark, after = message.partition("\0")
    return before + after.partition(": ")[2] if mark else message


def task_of(model: str, data: str) -> str:
    """The task of a model by its architecture.

    Raises:
        RecipeError: the architecture is none of a task's.
    """
    if data == DEMO:
        return "sequence-classification"
    config = read_config(model_path(model))
    unpacked = {"quantization_config": None} if is_packed(config) else {}
    found = type(skeleton(config, **unpacked)).__name__
    for ending, task in _TASKS.items():
        if found.endswith(ending):
            return task
    raise RecipeError(f"task: cannot be told from {model}, a {found}; give --task, one of {', '.join(_tasks())}")


def _tasks() -> list[str]:
    return sorted(set(_TASKS.values()))


def write_new(file: RecipeFile, path: Path) -> None:
    """Write a recipe file where nothing is yet.

    Raises:
        RecipeError: there is something, or no such folder.
    """
    refuse_existing(path)
    write_recipe_file(file, path)


def refuse_existing(path: Path) -> None:
    """Raise RecipeError unless a new file can be written at `path`."""
    if path.exists():
        raise RecipeError(f"--output: {path} exists; name another file, or move it away")
    if not path.parent.is_dir():
        raise RecipeError(f"--output: there is no folder {path.parent}")
