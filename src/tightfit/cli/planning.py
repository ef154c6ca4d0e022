"""`tightfit plan`: will it fit, what would, how far does it reach, and does the prediction hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tightfit.cli.commands import quiet, show
from tightfit.cli.waiting import waiting
from tightfit.core.errors import BudgetError, RecipeError, SimulationError

if TYPE_CHECKING:
    from tightfit.core.plan import Plan
    from tightfit.core.recommend import Choice
    from tightfit.core.transform import Transform
    from tightfit.core.verify import Verification
    from tightfit.train.advice import Advisor
    from tightfit.train.recipe_file import RecipeFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked for on the command line."""

    arguments: list[str]
    model: str | None = None
    data: str | None = None
    task: str | None = None
    budget: str | None = None
    elsewhere: bool = False
    device: str | None = None
    tune: str = "any"
    exact: bool = False
    methods: str | None = None
    output: Path | None = None
    largest_batch: bool = False
    longest_sequence: bool = False
    verify: bool = False
    or_measure: bool = False
    html: Path | None = None
    as_json: bool = False

    @property
    def without_recipe(self) -> bool:
        return self.model is not None or self.data is not None

    def check(self) -> None:
        """Raise RecipeError where the arguments contradict each other."""
        if self.without_recipe and (self.model is None or self.data is None):
            raise RecipeError("plan: --model and --data go together; give both, or a recipe file")
        if not self.without_recipe and not self.arguments:
            raise RecipeError("plan: give a recipe file, or --model, --data and --budget to have one recommended")
        if self.task is not None and not self.without_recipe:
            raise RecipeError(f"plan: --task goes with --model and --data; beside a recipe file write task={self.task}")
        files = [argument for argument in self.arguments if "=" not in argument]
        if self.without_recipe and files:
            raise RecipeError(f"plan: got the recipe file {files[0]} and --model; give one of them")
        reach = {"--largest-batch": self.largest_batch, "--longest-sequence": self.longest_sequence}
        recommending = {
            "--output": self.output is not None,
            "--tune": self.tune != "any",
            "--exact": self.exact,
            "--methods": self.methods is not None,
        }
        needing = {**reach, **recommending, "--elsewhere": self.elsewhere, "--model": self.without_recipe}
        for name, given in needing.items():
            if given and self.budget is None:
                raise RecipeError(f"plan: {name} needs --budget, as in --budget 8GiB")
        step = {"--verify": self.verify, "--or-measure": self.or_measure, "--html": self.html is not None}
        for name in (name for name, given in reach.items() if given):
            if self.without_recipe:
                raise RecipeError(f"plan: {name} is for a recipe file; give one in place of --model and --data")
            for other in (other for other, given in {**recommending, **step}.items() if given):
                raise RecipeError(f"plan: {name} only says how far the recipe reaches; leave {other} out")
        if self.html is not None and self.html.is_dir():
            raise RecipeError(f"plan: --html is {self.html}, a folder; name a file")
        if self.html is not None and not self.html.parent.is_dir():
            raise RecipeError(f"plan: --html is {self.html}, there is no folder {self.html.parent}")
        if self.device not in (None, "cpu", "cuda"):
            raise RecipeError(f"plan: --device is {self.device!r}, accepted are cpu and cuda")
        from tightfit.core.recommend import TUNE

        if self.tune not in TUNE:
            raise RecipeError(f"plan: --tune is {self.tune!r}, accepted are {', '.join(TUNE)}")


def show_plan(wishes: Wishes) -> None:
    """Answer what was asked for.

    Raises:
        RecipeError, BudgetError, DataError: wrong input, a recipe with conflicts, or one that does not fit.
    """
    wishes.check()
    if wishes.budget is not None:
        _limit(wishes)
    only = _only(wishes.methods)
    from tightfit.train.advice import Advisor, new_recipe_file, refuse_existing
    from tightfit.train.recipe_file import read_recipe_file
    from tightfit.train.run import prepare

    if wishes.without_recipe and wishes.output is None:
        wishes = dataclasses.replace(wishes, output=Path("recipe.yaml"))
    if wishes.output is not None:
        refuse_existing(wishes.output)
    quiet()
    if wishes.without_recipe:
        assert wishes.model is not None and wishes.data is not None
        file = new_recipe_file(wishes.model, wishes.data, wishes.task, wishes.arguments)
    else:
        file = read_recipe_file(Path(wishes.arguments[0]), wishes.arguments[1:])
    prepared = prepare(file)
    advisor = Advisor.of(file, prepared, weights=wishes.verify, device=wishes.device)
    if wishes.without_recipe:
        _recommend_new(wishes, advisor, only)
    elif wishes.largest_batch or wishes.longest_sequence:
        _reach(wishes, advisor)
    else:
        _plan(wishes, advisor, only)


def _only(methods: str | None) -> list[type[Transform]] | None:
    if methods is None:
        return None
    from tightfit.presets import named

    return [type(transform) for name in methods.split(",") for transform in named(name)]


# -- a recipe file -----------------------------------------------------------------------------------------------------


def _plan(wishes: Wishes, advisor: Advisor, only: list[type[Transform]] | None) -> None:
    found = _planned(wishes, advisor)
    if found.conflicts:
        _print_plan(wishes, found, {}, None)
        raise RecipeError(f"{wishes.arguments[0]}: the recipe cannot be applied: {found.conflicts[0]}")
    more: dict[str, Any] = {}
    measured: Verification | None = None
    if wishes.verify and found.simulation is not None:
        with waiting("running a real step"):
            measured = found.verify(in_place=True)
        more["verification"] = measured.to_dict()
    if wishes.budget is None:
        _print_plan(wishes, found, more, measured)
        return
    from tightfit.core.fitting import need
    from tightfit.core.plan import mib

    limit = _limit(wishes)
    if need(found) <= limit:
        _print_plan(wishes, found, {**more, "budget_bytes": limit, "fits": True}, measured)
        if not wishes.as_json:
            print(f"fits in {mib(limit)}, {mib(limit - found.peak_bytes)} to spare")
        return
    over = f"the predicted peak of {mib(found.peak_bytes)} is {mib(found.peak_bytes - limit)} over the budget of"
    if found.peak_bytes <= limit:
        over = f"the predicted peak of {mib(found.peak_bytes)} may be {mib(need(found))} at worst, over the budget of"
    line = f"{wishes.arguments[0]}: {over} {mib(limit)}"
    more |= {"budget_bytes": limit, "fits": False}
    try:
        choices = _choices(wishes, advisor, only)
    except BudgetError as error:
        _print_plan(wishes, found, {**more, "choices": []}, measured)
        raise BudgetError(f"{line}; {error}") from None
    file = advisor.chosen(choices[0]) if wishes.output is not None else None
    if file is not None and wishes.output is not None:
        _write(file, wishes.output)
        more["written"] = str(wishes.output)
    _print_plan(wishes, found, {**more, "choices": [choice.to_dict() for choice in choices]}, measured)
    if not wishes.as_json:
        print(f"\ndoes not fit in {mib(limit)}; these do:")
        _print_choices(choices)
    if file is None:
        raise BudgetError(f"{line}; --output FILE writes the first recipe that fits")
    _print_next(wishes, choices[0])


def _planned(wishes: Wishes, advisor: Advisor) -> Plan:
    with waiting("simulating a step"):
        try:
            return advisor.plan()
        except SimulationError:
            if not wishes.or_measure:
                raise
    with waiting("running a real step"):
        real = type(advisor).of(advisor.file, advisor.prepared, weights=True, device=advisor.device)
        return real.plan(fallback="measure")


def _print_plan(wishes: Wishes, found: Plan, more: dict[str, Any], measured: Verification | None) -> None:
    if wishes.html is not None:
        from tightfit.train.plan_report import write_plan_page

        write_plan_page(found, wishes.html, measured)
    if wishes.as_json:
        print(json.dumps({**found.to_dict(), "budget_bytes": None, "fits": None, **more}, indent=1))
        return
    print(found)
    if measured is not None:
        print(f"\n{str(measured).split(chr(10), 3)[3]}")
    if wishes.html is not None:
        print(f"page: {wishes.html}")


def _reach(wishes: Wishes, advisor: Advisor) -> None:
    assert wishes.budget is not None
    found: dict[str, Any] = {"recipe": str(advisor.recipe), "budget_bytes": _limit(wishes)}
    lines = []
    with waiting("simulating steps") as tell:
        options: dict[str, Any] = {"elsewhere": wishes.elsewhere, "progress": tell}
        if wishes.largest_batch:
            rows, length = advisor.largest_batch(wishes.budget, **options)
            found["largest_batch"] = {"rows": rows, "length": length}
            lines.append(f"largest batch:    {rows} rows of {length} tokens")
        if wishes.longest_sequence:
            rows, length = advisor.longest_sequence(wishes.budget, **options)
            found["longest_sequence"] = {"rows": rows, "length": length}
            lines.append(f"longest sequence: {length} tokens in {rows} rows")
    if wishes.as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['recipe']} in {wishes.budget}")
    print("\n".join(lines))


# -- no recipe ---------------------------------------------------------------------------------------------------------


def _recommend_new(wishes: Wishes, advisor: Advisor, only: list[type[Transform]] | None) -> None:
    choices = _choices(wishes, advisor, only)
    best = choices[0]
    file = advisor.chosen(best)
    assert wishes.output is not None
    measured = None
    if wishes.verify:
        with waiting("running a real step"):
            measured = best.plan.verify(in_place=True)
    _write(file, wishes.output)
    if wishes.html is not None:
        from tightfit.train.plan_report import write_plan_page

        write_plan_page(best.plan, wishes.html, measured)
    if wishes.as_json:
        out: dict[str, Any] = {"model": file.model, "budget_bytes": _limit(wishes), "written": str(wishes.output)}
        if measured is not None:
            out["verification"] = measured.to_dict()
        print(json.dumps({**out, "choices": [choice.to_dict() for choice in choices]}, indent=1))
        return
    _print_choices(choices)
    if measured is not None:
        print(f"\n{measured}")
    _print_next(wishes, best)


def _choices(wishes: Wishes, advisor: Advisor, only: list[type[Transform]] | None) -> list[Choice]:
    assert wishes.budget is not None
    with waiting("looking for recipes that fit") as tell:
        return advisor.recommend(
            wishes.budget,
            tune=wishes.tune,
            exact=wishes.exact,
            only=only,
            elsewhere=wishes.elsewhere,
            progress=tell,
        )


def _print_choices(choices: list[Choice]) -> None:
    from tightfit.core.plan import mib

    table = Table("", "recipe", "rows x parts", "predicted peak", "step time", "gradients")
    for number, choice in enumerate(choices, 1):
        table.add_row(
            str(number),
            str(choice.recipe),
            f"{choice.batch_size} x {choice.accumulation}",
            mib(choice.plan.peak_bytes),
            f"{choice.relative_step_time:.2f}",
            "exact" if choice.recipe.exact else "not exact",
        )
    show(table)
    for number, choice in enumerate(choices, 1):
        print(f"{number}. {choice}")


def _print_next(wishes: Wishes, best: Choice) -> None:
    if wishes.as_json:
        return
    print(f"\nwrote {wishes.output} with the first one ({best.recipe})")
    print(f"next: tightfit train {wishes.output}")


def _write(file: RecipeFile, path: Path) -> None:
    from tightfit.train.advice import write_new

    write_new(file, path)


def _limit(wishes: Wishes) -> int:
    import torch

    from tightfit.core.budget import parse_budget

    assert wishes.budget is not None
    here = "cuda" if torch.cuda.is_available() else "cpu"
    return parse_budget(wishes.budget, device=wishes.device or here, elsewhere=wishes.elsewhere)
