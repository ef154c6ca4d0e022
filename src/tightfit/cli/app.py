"""The commands and their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.cli.errors import Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune the model you want in the memory you have.",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="a recipe file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="change a key, as in train.epochs=1", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="print machine-readable results")]


def _version(wanted: bool) -> None:
    if wanted:
        from tightfit._version import __version__

        typer.echo(f"tightfit {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    pass  # Group takes --debug out of the arguments, wherever it stands


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="where plot, report and runs go")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="a tenth of the rows: to see it work")] = False,
) -> None:
    """Fine-tune a small model on your own machine's docstrings, stock and with four recipes; no network needed."""
    from tightfit.cli.demo import run_demo

    run_demo(output, quick)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods and what each one is."""
    from tightfit.cli.commands import show_methods

    show_methods(as_json)


@app.command()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [key=value ...]", help="a recipe file, and keys to change", show_default=False
        ),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="memory to fit into, as in 24GiB", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="without a recipe file: the model", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="without a recipe file: the data", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="without a recipe file: the task", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(help="write the recommended recipe file there", show_default=False)
    ] = None,
    tune: Annotated[str, typer.Option(help="what may be recommended: full, adapters or any")] = "any",
    exact: Annotated[bool, typer.Option("--exact", help="recommend exact methods only")] = False,
    methods: Annotated[
        str | None, typer.Option(help="recommend these methods only, as in lora,checkpointing", show_default=False)
    ] = None,
    largest_batch: Annotated[bool, typer.Option("--largest-batch", help="the most rows that fit")] = False,
    longest_sequence: Annotated[bool, typer.Option("--longest-sequence", help="the longest rows that fit")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="run one real step beside the prediction")] = False,
    or_measure: Annotated[
        bool, typer.Option("--or-measure", help="run a real step where it cannot be simulated")
    ] = False,
    device: Annotated[str | None, typer.Option(help="plan for cpu or cuda; default: what is here")] = None,
    elsewhere: Annotated[bool, typer.Option("--elsewhere", help="the budget is another machine's")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page with the plot there", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe will cost before anything is trained, and which one fits a budget."""
    from tightfit.cli.planning import Wishes, show_plan

    show_plan(
        Wishes(
            arguments=arguments or [],
            budget=budget,
            model=model,
            data=data,
            task=task,
            output=output,
            tune=tune,
            exact=exact,
            methods=methods,
            largest_batch=largest_batch,
            longest_sequence=longest_sequence,
            verify=verify,
            or_measure=or_measure,
            device=device,
            elsewhere=elsewhere,
            html=html,
            as_json=as_json,
        )
    )


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the output folder")] = False,
) -> None:
    """Train what a recipe file says; everything about the run is in its output folder."""
    from tightfit.cli.commands import run_train

    run_train(recipe, overrides or [], resume)


@app.command()
def compare(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="A.yaml [B.yaml ...]", help="recipe files", show_default=False)
    ],
    methods: Annotated[
        str | None,
        typer.Option(help="with one file: recipes to put in it, as in stock,lora,lora+checkpointing"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="where plot, report and runs go; default: beside the first output")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep the runs that are finished")] = False,
    as_json: Json = False,
) -> None:
    """Train several recipes on the same data and seed: one table, one plot, one report."""
    from tightfit.cli.commands import run_compare

    run_compare(recipes, methods, output, resume, as_json)


@app.command()
def measure(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Measure one training step of a recipe on its longest batch."""
    from tightfit.cli.commands import show_measure

    show_measure(recipe, overrides or [], as_json)


@app.command()
def calibrate(
    again: Annotated[bool, typer.Option("--again", help="measure even if this machine is known")] = False,
    as_json: Json = False,
) -> None:
    """Measure this machine once (about a minute), so that plans know how slow a recipe is."""
    from tightfit.cli.calibrate import run_calibrate

    run_calibrate(again, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder", show_default=False)],
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="upload it to this repository of the Hugging Face Hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make that repository a private one")] = False,
    max_shard_size: Annotated[str, typer.Option(help="the most that one file holds")] = "5GB",
) -> None:
    """Write a run's model as a stock checkpoint that plain from_pretrained loads."""
    from tightfit.cli.commands import run_export

    run_export(run, out, push_to_hub=push_to_hub, private=private or None, max_shard_size=max_shard_size)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder", show_default=False)],
) -> None:
    """Write a run's report.html again: one file that needs nothing else."""
    from tightfit.cli.commands import run_report

    run_report(run)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; ends the process with its exit code."""
    return app(args=arguments, prog_name="tightfit")
