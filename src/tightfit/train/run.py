"""A whole training run: recipe file in, run folder out."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tightfit.core import processes
from tightfit.core.apply import Applied, apply
from tightfit.core.artifacts import explained, load, read_document, replacing_folder
from tightfit.core.budget import parse_bytes
from tightfit.core.errors import ConflictError, RecipeError, SimulationError, TrainingError
from tightfit.core.hub import check_repository, push
from tightfit.core.memory import end_left_profiles
from tightfit.core.plan import Plan, plan
from tightfit.core.recipe import Recipe
from tightfit.core.skeleton import is_packed, read_config, skeleton
from tightfit.train import checkpoints, folder
from tightfit.train.data import TaskData, load_data, longest_batch
from tightfit.train.failures import is_no_space, is_out_of_memory, no_space, out_of_memory, unwritten
from tightfit.train.metrics import is_score
from tightfit.train.recipe_file import check_optimizer
from tightfit.train.stopping import StopRequest, stopping_on_signals
from tightfit.train.tasks import build_model, build_tokenizer, model_path, primary_metric, set_pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tightfit.train.recipe_file import RecipeFile, TrainSection

Echo = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run gave.

    Fields:
        output: the run folder.
        recipe: the recipe as applied, its ids filled in.
        steps: optimizer steps, those before a resume included.
        metric_name, metric: the task's main metric on the eval rows.
        metrics: all eval metrics and the loss.
        train_seconds: wall time of training in this process, evaluation included.
        peak_bytes, saved_bytes, step_seconds: one training step on the longest batch, as `tightfit.measure`
            has it; the batch is `measured_batch`.
        predicted_peak_bytes: what `plan` said of that step; None when it could not be simulated.
        trainable_parameters, total_parameters: under the recipe.
        exact: every method keeps the gradients of the stock step.
    """

    output: Path
    recipe: Recipe
    steps: int
    metric_name: str
    metric: float
    metrics: dict[str, float]
    train_seconds: float
    peak_bytes: int
    saved_bytes: int
    step_seconds: float
    measured_batch: str
    predicted_peak_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run's tokenizer and data, the part that runs on the same data share."""

    tokenizer: Any
    data: TaskData


def prepare(file: RecipeFile) -> Prepared:
    """Load tokenizer and data of a recipe file."""
    tokenizer = build_tokenizer(file)
    return Prepared(tokenizer, load_data(file, tokenizer))


def filled(recipe: Recipe, prepared: Prepared, model: PreTrainedModel) -> Recipe:
    """The recipe with every method completed that takes something from the data (the ids of a vocabulary)."""
    from datasets import DatasetDict

    rows = DatasetDict({"train": prepared.data.train, "eval": prepared.data.eval})
    done = []
    for transform in recipe:
        fill = getattr(transform, "fill", None)
        if transform.unfilled() is not None and fill is not None:
            transform = fill(data=rows, tokenizer=prepared.tokenizer, model=model)
        done.append(transform)
    return Recipe(tuple(done))


def build_skeleton(file: RecipeFile, data: TaskData) -> PreTrainedModel:
    """The model of `build_model` without its weights: enough to plan with, unless they are packed ones."""
    config = read_config(model_path(file.model))
    if is_packed(config):
        return build_model(file, data)
    overrides: dict[str, Any] = {}
    if data.num_labels is not None and file.task != "question-answering":
        overrides = {"num_labels": data.num_labels, "problem_type": data.problem_type}
    model = skeleton(config, task=file.task, dtype=torch.float32, **overrides)
    set_pad_token(model, data)
    return model  # type: ignore[return-value]


def plan_run(
    file: RecipeFile,
    prepared: Prepared,
    recipe: Recipe,
    model: PreTrainedModel,
    *,
    device: str | None = None,
    fallback: str | None = None,
) -> Plan:
    """The plan of a run's step on its longest batch. Raises: SimulationError, and what `plan` raises."""
    batch = longest_batch(prepared.data, file.train.batch_size)
    turns = min(2, file.train.gradient_accumulation)  # more of them peak where the second does
    options = plan_options(file, device or _device_type())
    return plan(model, recipe, batch=batch, accumulate=turns, fallback=fallback, **options)


def plan_options(file: RecipeFile, device: str) -> dict[str, Any]:
    """What `plan` must know about a run's step beside model, recipe, batch and accumulation."""
    return {
        "optimizer": planned_optimizer(file),
        "autocast": autocast_dtype(file.train),
        "clip": file.train.max_grad_norm or None,
        "device": device,
    }


def autocast_dtype(section: TrainSection) -> torch.dtype | None:
    """The dtype a run's forward is cast to; None for fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(section.precision)


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def planned_optimizer(file: RecipeFile) -> str:
    """The name `plan` has for the optimizer a run will use."""
    name = file.train.optimizer
    return "adamw-foreach" if name == "adamw" and torch.cuda.is_available() else name


def train(
    file: RecipeFile, *, resume: bool = False, echo: Echo = lambda line: None, prepared: Prepared | None = None
) -> RunResult:
    """Train what a recipe file says and leave a run folder behind.

    The folder holds the resolved recipe file, metrics, checkpoints, the trained recipe (`tightfit.load` puts it on
    its base), a model card and a report. A run that was stopped or killed goes on from its newest checkpoint with
    `resume=True`, to the same weights, bit for bit, as an uninterrupted one on the same machine.

    Args:
        resume: go on with the run in `file.output`; a new one begins where there is none.
        echo: called with each line a user should read.
        prepared: tokenizer and data, where they are loaded already.

    Raises:
        RecipeError, DataError, ConflictError, UnsupportedModelError: before anything is written.
        TrainingError: the run failed (no space, a loss or gradient that is not finite, out of memory); its
            checkpoints stay.
        KeyboardInterrupt: Ctrl-C or SIGTERM (then it is a `Terminated`); the step was finished and a checkpoint
            written, unless Ctrl-C was pressed twice.

    Example:
        >>> from tightfit.train.recipe_file import read_recipe_file
        >>> from tightfit.train.run import train
        >>> train(read_recipe_file("recipe.yaml"))  # doctest: +SKIP
    """
    _join_processes()
    folder.check_free(file, resume)
    check_optimizer(file.train)
    if file.train.precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError("train.precision: fp16 needs a GPU; on the CPU accepted are fp32 and bf16")
    if file.train.report_to:
        from tightfit.train.trainer import check_trackers

        check_trackers(file.train)
    prepared = prepared or prepare(file)
    for note in prepared.data.notes:
        echo(f"note: {note}")
    model = build_model(file, prepared.data)
    last = _newest(file) if resume else None
    finished = resume and (file.output / folder.RUN).is_file() and folder.read_run(file.output)["result"]
    if finished:
        echo(f"the run in {file.output} is finished")
        _in_turn(lambda: folder.tidy(file.output))
        return _stored(file, finished)
    if last is None:
        recipe = filled(file.recipe, prepared, model)
        predicted = _predicted(file, prepared, recipe, model, echo)
        applied = apply(model, recipe)
    else:
        checkpoints.check_unchanged(last)
        echo(f"resuming from {last}")
        recipe = Recipe.from_list(read_document(last)["methods"])
        predicted = _predicted(file, prepared, recipe, model, echo)
        applied = load(model, last)
    stop = StopRequest()
    with folder.held(file, resume):
        if resume and not processes.rank() and _newest(file) != last:
            raise RecipeError(
                f"output: another run was at work in {file.output} while this one got ready; go on from what it left, "
                f"by --resume once more"
            )
        try:
            _in_turn(lambda: folder.prepare(file, prepared.data, str(applied.recipe)))
            result = _run(file, prepared, applied, last, predicted, stop, echo)
        except Exception as error:
            if is_no_space(error) and not isinstance(error, TrainingError):
                raise no_space(file.output, unwritten(error)) from error
            if not is_out_of_memory(error) or processes.launched() > 1:
                raise
            del applied, model  # their memory is needed to look for another recipe
            gc.collect()
            raise out_of_memory(error, file, prepared, predicted, echo) from error
    if result is None:
        raise stop.error()
    return result


def _run(
    file: RecipeFile,
    prepared: Prepared,
    applied: Applied,
    last: Path | None,
    predicted: int | None,
    stop: StopRequest,
    echo: Echo,
) -> RunResult | None:
    from tightfit.train.bench import measure_applied
    from tightfit.train.callbacks import EvaluationStopped, ProgressBar, RunCallback, evaluation_is_due, scores_at
    from tightfit.train.card import write_card, write_report
    from tightfit.train.trainer import build_trainer

    output, data = file.output, prepared.data
    listener, bar = RunCallback(output / folder.METRICS, echo, stop), ProgressBar()
    state = checkpoints.trainer_state(last) if last else None
    folder.rewind_metrics(output, state.global_step if state else 0)
    trainer = build_trainer(applied, data, file.train, output, listener, [bar], predicted)
    started = time.perf_counter()
    done = state is not None and state.global_step >= state.max_steps
    scores: dict[str, float] | None = None
    try:
        with stopping_on_signals(stop, echo):
            if done:
                trainer.state = state  # type: ignore[assignment]
            else:
                trainer.args.eval_on_start = state is not None and evaluation_is_due(state, file.train)
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            if not stop:
                scores = scores_at(trainer.state) or trainer.evaluate()
    except EvaluationStopped:
        pass
    finally:
        bar.close()
        end_left_profiles()
    if scores is None or stop:
        echo(f"stopped at step {trainer.state.global_step}; go on with --resume")
        return None
    seconds = time.perf_counter() - started
    steps, main = trainer.state.global_step, trainer.is_world_process_zero()
    figures = applied.report()
    if main:
        applied.save(output)
    final_recipe = applied.recipe
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    metric = primary_metric(data)
    measured = measure_applied(applied, longest_batch(data, file.train.batch_size), file.train)
    result = RunResult(
        output=output,
        recipe=final_recipe,
        steps=steps,
        metric_name=metric.name,
        metric=scores[f"eval_{metric.name}"],
        metrics={key.removeprefix("eval_"): value for key, value in scores.items() if is_score(key)},
        train_seconds=seconds,
        peak_bytes=measured.peak_bytes,
        saved_bytes=measured.saved_bytes,
        step_seconds=measured.seconds,
        measured_batch=_shape(longest_batch(data, file.train.batch_size)),
        predicted_peak_bytes=predicted,
        trainable_parameters=figures["trainable_parameters"],
        total_parameters=figures["total_parameters"],
        exact=final_recipe.exact,
    )
    if main:
        write_card(output, file, result)
        write_report(output, result)
        folder.write_result(output, result)  # last, because a run that has it is finished
    return result


def export_run(
    run: Path,
    out: Path,
    *,
    max_shard_size: int | str = "5GB",
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> None:
    """Write the model of a finished run as a stock checkpoint with its tokenizer; plain `from_pretrained` loads it.

    Args:
        max_shard_size: of one file, in bytes or as in "5GB".
        push_to_hub: a repository of the Hugging Face Hub to upload the folder to, as in "user/name".
        private: whether a repository that is made for it is private.

    Raises:
        ArtifactError: `run` holds no finished run, its base is another model now, `out` is not empty or cannot be
            written, or the Hub refuses the upload (then `out` stays).
        BudgetError: `max_shard_size` is no size.
    """
    max_shard_size = parse_bytes(max_shard_size, "max_shard_size")
    if push_to_hub is not None:
        check_repository(push_to_hub)
    file = folder.read_recipe(run)
    tokenizer = build_tokenizer(file)
    model = build_model(file, folder.stored_data(run, tokenizer))
    applied = load(model, run)
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(out) as temporary:
            applied.export(temporary, max_shard_size=max_shard_size)
            if not any(temporary.glob("*token*")):  # a recipe that changes the vocabulary writes its own
                tokenizer.save_pretrained(temporary)
    if push_to_hub is not None:
        push(out, push_to_hub, private=private)


def _predicted(file: RecipeFile, prepared: Prepared, recipe: Recipe, model: PreTrainedModel, echo: Echo) -> int | None:
    try:
        found = plan_run(file, prepared, recipe, model)
    except SimulationError as error:
        echo(f"note: the step could not be simulated: {error}")
        return None
    if found.conflicts:
        raise ConflictError("; ".join(str(conflict) for conflict in found.conflicts))
    return found.peak_bytes


def _newest(file: RecipeFile) -> Path | None:
    found = checkpoints.checkpoints(file.output / folder.CHECKPOINTS)
    return found[-1] if found else None


def _stored(file: RecipeFile, values: dict[str, Any]) -> RunResult:
    return RunResult(output=file.output, recipe=Recipe.from_list(read_document(file.output)["methods"]), **values)


def _shape(batch: dict[str, Any]) -> str:
    name = next((n for n in ("input_ids", "pixel_values") if n in batch), next(iter(batch)))
    return " x ".join(map(str, batch[name].shape))


def _join_processes() -> None:
    """Under `accelerate launch`, meet the other processes before any of them writes."""
    if processes.launched() > 1:
        from accelerate import PartialState

        PartialState()


def _in_turn(action: Callable[[], None]) -> None:
    """Run `action` in the first process, then in the others, once all have come here."""
    processes.wait()
    for rank in range(processes.count()):
        if processes.rank() == rank:
            action()
        processes.wait()
