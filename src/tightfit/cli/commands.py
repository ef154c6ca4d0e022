"""What the commands do: read, call the library, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tightfit.core.errors import RecipeError

if TYPE_CHECKING:
    from tightfit.train.bench import Comparison


def quiet() -> None:
    """Silence what other libraries say about things that are as they should be; for a process of our own only."""
    import logging
    import warnings

    import datasets
    from transformers.utils import logging as said

    # PEFT imports torchao wherever it is installed, which then tells of kernels that this machine cannot load
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    said.set_verbosity_error()
    said.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|peft")


def say(line: str) -> None:
    """One line for the user; results go to standard output, all else to standard error."""
    print(line, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Print a table in the terminal's width, or as wide as it needs where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)


def show_methods(as_json: bool) -> None:
    import tightfit

    facts: list[dict[str, Any]] = [
        {
            "class": cls.__name__,
            "name": cls.name,
            "paper": cls.paper,
            "touches": sorted(slot.label for slot in cls.touches),
            "exact": cls.exact,
            "reversible": cls.reversible,
            "summary": cls.summary,
        }
        for cls in tightfit.methods()
    ]
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = Table("method", "on the command line", "arXiv", "exact", "touches", "what it does")
    for f in facts:
        exact = "yes" if f["exact"] else "no"
        table.add_row(f["class"], f["name"], f["paper"] or "-", exact, ", ".join(f["touches"]), f["summary"])
    show(table)


def run_train(path: Path, overrides: list[str], resume: bool) -> None:
    quiet()
    from tightfit.train.card import figure_rows, result_values
    from tightfit.train.recipe_file import read_recipe_file
    from tightfit.train.run import train

    file = read_recipe_file(path, overrides)
    result = train(file, resume=resume, echo=_first_process(say))
    if not _is_first():
        return
    table = Table("", f"{result.output}", show_header=True)
    for name, value in figure_rows(result_values(result)):
        table.add_row(name, value)
    show(table)
    print(f"report: {result.output / 'report.html'}")
    print(f"next:   tightfit export {result.output} {result.output}-model")


def run_compare(paths: list[Path], methods: str | None, output: Path | None, resume: bool, as_json: bool) -> None:
    key = next((path for path in paths if "=" in path.name and not path.exists()), None)
    if key is not None:
        raise RecipeError(f"compare: got {key}, accepted are recipe files; change the key in the file")
    if methods is not None and len(paths) > 1:
        raise RecipeError(f"--methods: accepted with one recipe file, {len(paths)} were given")
    quiet()
    from tightfit.presets import named
    from tightfit.train.bench import compare
    from tightfit.train.recipe_file import read_recipe_file

    files = [read_recipe_file(path) for path in paths]
    names = [path.stem for path in paths] if len(paths) > 1 else None
    if methods is not None:
        recipes = [named(name) for name in methods.split(",")]
        files = [files[0].model_copy(update={"methods": recipe.to_list()}) for recipe in recipes]
    output = output or files[0].output.with_name(f"{files[0].output.name}-compare")
    check_new(output, resume)
    found = compare(files, output=output, names=names, resume=resume, echo=say)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        show_comparison(found, output)


def check_new(output: Path, resume: bool) -> None:
    """Refuse a folder with something in it, unless its runs are to be gone on with."""
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"--output: {output} exists and is not empty; name another, or go on with it by --resume")


def show_comparison(found: Comparison, output: Path) -> None:
    from tightfit.train.card import describe, table_rows

    head, rows = table_rows(found)
    table = Table(caption=f"{describe(found)}.", caption_justify="left")
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    show(table)
    print(f"plot:   {output / 'plot.png'}, {output / 'plot.svg'}")
    print(f"report: {output / 'report.html'}")


def show_measure(path: Path, overrides: list[str], as_json: bool) -> None:
    quiet()
    from tightfit.core.plan import mib
    from tightfit.train.bench import measure_recipe
    from tightfit.train.recipe_file import read_recipe_file

    found = measure_recipe(read_recipe_file(path, overrides))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(f"{found['recipe']}", f"batch {found['batch']}, {found['device']}")
    rows: list[tuple[str, Any]] = [("peak", found["peak_bytes"]), ("predicted peak", found["predicted_peak_bytes"])]
    rows += [("saved for backward", found["saved_bytes"]), *found["by_category"].items()]
    for name, value in rows:
        table.add_row(name, mib(value) if value is not None else "-")
    table.add_row("step time", f"{found['seconds'] * 1000:.0f} ms")
    trainable, total = found["trainable_parameters"], found["total_parameters"]
    table.add_row("trainable parameters", f"{trainable:,} of {total:,}")
    show(table)


def run_export(run: Path, out: Path, **options: Any) -> None:
    quiet()
    from tightfit.train.run import export_run

    export_run(run, out, **options)
    print(f"{out}: a stock checkpoint; load it by from_pretrained({str(out)!r})")
    if options["push_to_hub"]:
        print(f"on the Hub: {options['push_to_hub']}")


def run_report(run: Path) -> None:
    from tightfit.train.card import write_report

    print(write_report(run))


def _is_first() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _first_process(echo: Any) -> Any:
    return echo if _is_first() else lambda line: None
