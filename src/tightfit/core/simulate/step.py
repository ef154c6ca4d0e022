"""One training step on a fake copy of the model, tracked."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tightfit.core.errors import SimulationError, TightfitError
from tightfit.core.simulate import cuda
from tightfit.core.simulate.attribution import Attribution
from tightfit.core.simulate.counts import Counts
from tightfit.core.simulate.eight_bit import embedding_tables, modelled
from tightfit.core.simulate.optimizers import make_optimizer
from tightfit.core.simulate.shadow import Faker, answering_masks, fake_copy
from tightfit.core.simulate.tracker import (
    BACKWARD,
    CLIP,
    FORWARD,
    OPTIMIZER,
    SETUP,
    ZERO_GRAD,
    Trace,
    Tracker,
)
from tightfit.ops.autograd import without_graph

Loss = Callable[[Any], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a step consists of beside the model and the batch."""

    optimizer: Any = "adamw"
    clip: float | None = None
    autocast: torch.dtype | None = None
    loss: Loss | None = None
    device: str = "cpu"
    train: bool = True
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Raise SimulationError or ValueError where an option is none that a step can have."""
        if self.device not in ("cpu", "cuda"):
            raise SimulationError(f"device: got {self.device!r}, accepted are 'cpu' and 'cuda'")
        if isinstance(self.accumulate, bool) or not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"accumulate: got {self.accumulate!r}, accepted is an int >= 1")
        if self.clip is not None and not (isinstance(self.clip, int | float) and self.clip > 0):
            raise ValueError(f"clip: got {self.clip!r}, accepted is a number above 0, or None for no clipping")
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast: got {self.autocast!r}, accepted are torch.bfloat16, torch.float16 and None")
        if self.loss is not None and not callable(self.loss):
            raise ValueError(f"loss: got {self.loss!r}, accepted is a function from the model's outputs to a scalar")


def trace_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    options: StepOptions,
    lists: dict[int, list[nn.Module]] | None = None,
) -> tuple[Trace, Counts]:
    """Simulate one warm step and return what it allocated and computed.

    Args:
        model: real, on `meta`, or transformed; not changed.
        batch: what the model is called with.
        options: optimizer, clipping and so on.
        lists: id of a ModuleList -> the modules to keep of it (a model with fewer blocks).

    Raises:
        SimulationError: an operator that has no fake kernel, or a value or shape that depends on data.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = None
    collecting = gc.isenabled()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what it reports is raised below
    try:
        twin = fake_copy(model, mode, lists)
        faker = Faker(mode)
        inputs = {key: faker(t) if isinstance(t, torch.Tensor) else t for key, t in batch.items()}
        twin.model.train(options.train)
        tracker = Tracker(Attribution(twin.model), faker)
        tracker.static(twin.weights, "weights")
        tracker.ignore(twin.host)
        tracker.static((t for t in inputs.values() if isinstance(t, torch.Tensor)), "activations")
        gc.disable()
        with torch.random.fork_rng(devices=[]), mode:
            optimizer = _optimizer(twin.model, tracker, options) if options.train else None
            with tracker, tracker.attribution.running(), _seen_by(tracker), answering_masks():
                _run(twin.model, inputs, optimizer, tracker, options)
            if optimizer is not None:
                tracker.move_to_start(_state(optimizer), "optimizer")
    except TightfitError:
        raise
    except Exception as error:
        raise _explained(error, model, tracker) from error
    finally:
        if tracker is not None:
            tracker.close()
        if collecting:
            gc.enable()
        log.setLevel(level)
    trace = tracker.trace
    return (cuda.on_device(trace) if options.device == "cuda" else trace), tracker.counts


def _run(model, inputs, optimizer, tracker: Tracker, options: StepOptions) -> None:
    tracker.begin(FORWARD)
    if not options.train:
        with torch.no_grad(), _autocast(options), cuda.kernels(options.device):
            model(**inputs)
        return
    with cuda.kernels(options.device):
        for turn in range(options.accumulate):
            if turn:
                tracker.begin(FORWARD)
            with _autocast(options), _saved(tracker):
                loss = loss_of(model(**inputs), options.loss)
            tracker.begin(BACKWARD)
            loss.backward()
            loss = loss.detach()  # the graph's nodes go, and what they hold beside the tensors that backward frees
    parameters = [p for p in model.parameters() if p.requires_grad]
    tracker.mark((p.grad for p in parameters if p.grad is not None), "gradients")
    for parameter in parameters:
        if parameter.grad is None and parameter in optimizer.state:
            tracker.forget(_tensors(optimizer.state[parameter]))
    if options.clip is not None:
        tracker.begin(CLIP)
        foreach = True if options.device == "cuda" else None
        nn.utils.clip_grad_norm_(parameters, options.clip, foreach=foreach)
    tracker.begin(OPTIMIZER)
    optimizer.step()
    tracker.begin(ZERO_GRAD)
    optimizer.zero_grad()


def loss_of(outputs: Any, function: Loss | None) -> torch.Tensor:
    """The scalar that a step starts its backward from. Raises: SimulationError."""
    loss = function(outputs) if function is not None else getattr(outputs, "loss", None)
    if loss is None and hasattr(outputs, "last_hidden_state"):  # a bare backbone
        return outputs.last_hidden_state.mean()
    if not isinstance(loss, torch.Tensor):
        raise SimulationError(
            f"loss: the model's outputs ({type(outputs).__name__}) hold no loss; put labels into the batch or give "
            f"simulate(..., loss=...) a function from the outputs to a scalar"
        )
    return loss


def _autocast(options: StepOptions):
    if options.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=options.autocast)


def _optimizer(model: nn.Module, tracker: Tracker, options: StepOptions) -> torch.optim.Optimizer:
    """The optimizer, its state recorded as alive before the step.

    The named ones make their state at the beginning of a first step that is otherwise like every other, so it is
    enough to move the state to the start afterwards. Of any other optimizer a first step is run unrecorded.
    """
    parameters = list(model.parameters())
    if not callable(options.optimizer):
        return make_optimizer(options.optimizer, parameters, options.device, embedding_tables(model))
    with unset_fake_temporarily():  # tables that it computes are no part of the step
        made = make_optimizer(options.optimizer, parameters, options.device)
    optimizer = modelled(made, options.device)
    if optimizer is made:
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        unrecorded = Tracker(tracker.attribution, tracker.faker)  # answers for the numbers that a step reads
        unrecorded.adopt(optimizer.state)
        with unrecorded:
            optimizer.step()
        unrecorded.close()
        for parameter in parameters:
            parameter.grad = None
        tracker.static(_state(optimizer), "optimizer")
    return optimizer


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for state in optimizer.state.values() for tensor in _tensors(state)]


def _tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    return [item for item in state.values() if isinstance(item, torch.Tensor)]


@contextlib.contextmanager
def _saved(tracker: Tracker) -> Iterator[None]:
    """Note the storages packed for backward."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        number = tracker.storage_id(tensor)
        if number is not None:
            tracker.trace.saved.add(number)
        return without_graph(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextlib.contextmanager
def _seen_by(tracker: Tracker) -> Iterator[None]:
    """Show the tracker two things that reach the allocator without dispatch: generator states and resized storages."""
    get_state, resize = torch.get_rng_state, torch.UntypedStorage.resize_

    def get_rng_state() -> torch.Tensor:
        state = get_state()
        tracker.record_external(state)
        return state

    def resize_(self, size):
        out = resize(self, size)
        tracker.resized(self)
        return out

    torch.get_rng_state, torch.UntypedStorage.resize_ = get_rng_state, resize_  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.get_rng_state, torch.UntypedStorage.resize_ = get_state, resize  # type: ignore[method-assign]


def _explained(error: Exception, model: nn.Module, tracker: Tracker | None) -> SimulationError:
    """The planner's own error for what went wrong inside the fake step."""
    name = type(model).__name__
    if tracker is None:
        return SimulationError(f"{name}: cannot be copied for simulation ({type(error).__name__}: {error})")
    operator, module = tracker.failed or ("no operator", tracker.attribution.path(tracker.phase))
    outside = {SETUP: "the optimizer", OPTIMIZER: "the optimizer", CLIP: "clipping"}
    place = f"module {module}" if module else outside.get(tracker.phase, "the model's own forward")
    reasons = {
        "DataDependentOutputException": "it reads a tensor's value, which a simulated tensor does not have",
        "DynamicOutputShapeException": "the shape of its output depends on a tensor's values",
        "UnsupportedOperatorException": "it has no fake kernel (torch.library.register_fake)",
    }
    reason = reasons.get(type(error).__name__, f"{type(error).__name__}: {str(error).rstrip(' .')}")
    return SimulationError(
        f"{name}: the training step cannot be simulated at {operator} in {place}: {reason}. "
        f"Measure a real step instead (tightfit.measure), or remove that operator"
    )
