"""Recipes side by side: one real training step measured, and whole runs compared on the same data and seed."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tightfit.core.apply import Applied, apply
from tightfit.core.documents import finite
from tightfit.core.errors import RecipeError, SimulationError
from tightfit.core.memory import Measurement, interleave, measure
from tightfit.core.simulate.eight_bit import adamw_8bit, embedding_tables
from tightfit.train.data import longest_batch
from tightfit.train.recipe_file import check_optimizer
from tightfit.train.run import Echo, Prepared, _shape, autocast_dtype, filled, plan_run, prepare, train
from tightfit.train.tasks import build_model, primary_metric

if TYPE_CHECKING:
    from tightfit.train.recipe_file import RecipeFile, TrainSection

BASELINES: tuple[set[str], ...] = ({"lora"}, {"checkpointing"}, {"lora", "checkpointing"}, set())
STOCK = "stock"
ROUNDS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe of a comparison.

    Fields:
        name: as the table shows it.
        baseline: stock, Lora, Checkpointing or Lora + Checkpointing.
        metric_name, metric: the task's main metric after training.
        predicted_peak_bytes, peak_bytes, saved_bytes: one training step on the longest batch.
        step_time: median step time as a ratio to the stock step, steps taken in turns.
        step_seconds: the median step time itself; compare it within one machine only.
    """

    name: str
    recipe: str
    baseline: bool
    exact: bool
    metric_name: str
    metric: float
    metrics: dict[str, float]
    predicted_peak_bytes: int | None
    peak_bytes: int
    saved_bytes: int
    step_time: float
    step_seconds: float
    train_seconds: float
    trainable_parameters: int
    total_parameters: int
    run: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows of a comparison, stock first, and what they have in common."""

    model: str
    task: str
    data: str
    seed: int
    batch: str
    device: str
    higher_is_better: bool
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return finite(dataclasses.asdict(self))


def training_step(
    applied: Applied, batch: dict[str, Any], section: TrainSection, device: str | torch.device | None = None
) -> Callable[[], None]:
    """One whole training step (forward, backward, clipping, optimizer) as a callable that keeps nothing.

    Where gradients are accumulated, each part of the step sees `batch`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = applied.model.to(device).train()
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    optimizer = _optimizer(applied, section)
    dtype = autocast_dtype(section)
    kind = torch.device(device).type

    def step() -> None:
        for _ in range(section.gradient_accumulation):
            with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
                loss = model(**batch).loss
            (loss / section.gradient_accumulation).backward()
        if section.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(applied.parameters(), section.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _optimizer(applied: Applied, section: TrainSection) -> torch.optim.Optimizer:
    rate, decay = section.learning_rate, section.weight_decay
    if section.optimizer == "sgd":
        return applied.optimizer(torch.optim.SGD, lr=rate, weight_decay=decay)
    if section.optimizer == "adafactor":
        from transformers import Adafactor

        return applied.optimizer(Adafactor, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
    if section.optimizer == "adamw-8bit":
        tables = embedding_tables(applied.model)
        return applied.optimizer(adamw_8bit(), lr=rate, weight_decay=decay, tables=tables)
    fused = {"fused": True} if section.optimizer == "adamw-fused" else {}
    return applied.optimizer(torch.optim.AdamW, lr=rate, weight_decay=decay, **fused)


def measure_applied(applied: Applied, batch: dict[str, Any], section: TrainSection, repeats: int = 3) -> Measurement:
    """Measure a training step of an applied recipe with a fresh optimizer; it really trains."""
    applied.model.zero_grad(set_to_none=True)
    gc.collect()
    return measure(training_step(applied, batch, section), warmup=1, repeats=repeats)


def measure_recipe(file: RecipeFile) -> dict[str, Any]:
    """Measure one real training step of a recipe file on its longest batch, beside what `plan` says of it."""
    check_optimizer(file.train)
    prepared = prepare(file)
    model = build_model(file, prepared.data)
    recipe = filled(file.recipe, prepared, model)
    batch = longest_batch(prepared.data, file.train.batch_size)
    try:
        planned = plan_run(file, prepared, recipe, model)
        predicted = planned.peak_bytes if not planned.conflicts else None
    except SimulationError:
        predicted = None
    applied = apply(model, recipe)
    facts = applied.report()
    found = measure_applied(applied, batch, file.train)
    return {
        "recipe": str(recipe),
        "model": file.model,
        "batch": _shape(batch),
        "device": _device(),
        "peak_bytes": found.peak_bytes,
        "predicted_peak_bytes": predicted,
        "saved_bytes": found.saved_bytes,
        "seconds": found.seconds,
        "by_category": found.by_category,
        "trainable_parameters": facts["trainable_parameters"],
        "total_parameters": facts["total_parameters"],
    }


def compare(
    files: Sequence[RecipeFile],
    *,
    output: Path,
    names: Sequence[str] | None = None,
    resume: bool = False,
    echo: Echo = lambda line: None,
) -> Comparison:
    """Train every recipe on the same data with the same seed, and measure it beside the stock step.

    The stock run comes first, also where no file asks for it. Each recipe's step is timed in turns with the stock
    step, both models alive; its peak is measured alone. Everything is written under `output`: a run folder for
    each recipe, `comparison.json`, `plot.png`, `plot.svg` and `report.html`.

    Args:
        names: what to call the files; default their recipes.
        resume: keep the runs that are finished already and go on with the others.

    Raises:
        RecipeError: the files differ in task, data or seed, or two of them mean the same.
        ConflictError, UnsupportedModelError: a recipe cannot be applied; nothing was trained.
        TrainingError: a run failed.
    """
    from tightfit.train.card import write_comparison

    runs = _named(files, names, output)
    first = next(iter(runs.values()))
    prepared = _prepare_all(runs, echo)
    rows = []
    for number, (name, file) in enumerate(runs.items(), 1):
        echo(f"{number} of {len(runs)}: {name}")
        shared = prepared[_source(file)]
        result = train(file, resume=resume, prepared=shared)
        ratio, seconds = (1.0, result.step_seconds) if not file.methods else step_time(file, result.recipe, shared)
        rows.append(
            Row(
                name=name,
                recipe=str(file.recipe),
                baseline=is_baseline(file),
                exact=result.exact,
                metric_name=result.metric_name,
                metric=result.metric,
                metrics=result.metrics,
                predicted_peak_bytes=result.predicted_peak_bytes,
                peak_bytes=result.peak_bytes,
                saved_bytes=result.saved_bytes,
                step_time=ratio,
                step_seconds=seconds,
                train_seconds=result.train_seconds,
                trainable_parameters=result.trainable_parameters,
                total_parameters=result.total_parameters,
                run=file.output.name,
            )
        )
    shared = prepared[_source(first)]
    found = Comparison(
        model=first.model,
        task=first.task,
        data=f"{first.data.train}, {len(shared.data.train):,} train and {len(shared.data.eval):,} eval rows",
        seed=first.train.seed,
        batch=_shape(longest_batch(shared.data, first.train.batch_size)),
        device=_device(),
        higher_is_better=primary_metric(shared.data).greater_is_better,
        rows=tuple(rows),
    )
    write_comparison(found, output)
    return found


def step_time(file: RecipeFile, recipe: Any, prepared: Prepared, rounds: int = ROUNDS) -> tuple[float, float]:
    """Median step time of `recipe` as a ratio to stock, and in seconds; steps taken in turns, both models alive."""
    batch = longest_batch(prepared.data, file.train.batch_size)
    stock = apply(build_model(file, prepared.data), None)
    treated = apply(build_model(file, prepared.data), recipe)
    gc.collect()
    steps = {
        STOCK: training_step(stock, batch, file.train),
        "recipe": training_step(treated, batch, file.train),
    }
    times = interleave(steps, rounds=rounds, warmup=1)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return medians["recipe"] / medians[STOCK], medians["recipe"]


def is_baseline(file: RecipeFile) -> bool:
    """Stock, Lora, Checkpointing, or both: what a reader would use without this library."""
    return {transform.name for transform in file.recipe} in BASELINES


def _named(files: Sequence[RecipeFile], names: Sequence[str] | None, output: Path) -> dict[str, RecipeFile]:
    files = list(files)
    if not files:
        raise RecipeError("compare: no recipe was given")
    for other in files[1:]:
        _same(files[0], other)
    names = list(names or [str(file.recipe) for file in files])
    folders: dict[str, str] = {}
    for name in names:
        first = folders.setdefault(_slug(name), name)
        if name == first and names.count(name) > 1:
            raise RecipeError(f"compare: {name} was given more than once")
        if name != first:
            raise RecipeError(f"compare: {first} and {name} would share the folder {_slug(name)}; rename one of them")
    found = dict(zip(names, files, strict=True))
    if all(file.methods for file in files):
        if STOCK in folders:
            raise RecipeError(f"compare: {folders[STOCK]} is the name of the run without methods; rename the other one")
        found = {STOCK: files[0].model_copy(update={"methods": []}), **found}
    ordered = sorted(found, key=lambda name: bool(found[name].methods))
    return {name: found[name].model_copy(update={"output": output / "runs" / _slug(name)}) for name in ordered}


def _same(one: RecipeFile, other: RecipeFile) -> None:
    pairs = [
        ("task", one.task, other.task),
        ("data", one.data, other.data),
        ("train.seed", one.train.seed, other.train.seed),
    ]
    for key, was, now in pairs:
        if was != now:
            raise RecipeError(
                f"compare: the files differ in {key} ({_short(was)} and {_short(now)}); a comparison needs the same "
                f"task, data and seed"
            )


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 80 else str(value)[:77] + "..."


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-").replace("---", "-") or STOCK


def _source(file: RecipeFile) -> str:
    return json.dumps([file.model, file.train.max_length, file.train.max_target_length])


def _prepare_all(runs: dict[str, RecipeFile], echo: Echo) -> dict[str, Prepared]:
    """Load what the runs share, and see that every recipe can be applied before the first one trains."""
    found: dict[str, Prepared] = {}
    for name, file in runs.items():
        key = _source(file)
        if key not in found:
            found[key] = prepare(file)
            for note in found[key].data.notes:
                echo(f"note: {note}")
        model = build_model(file, found[key].data)
        try:
            apply(model, filled(file.recipe, found[key], model)).remove()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    return found


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
