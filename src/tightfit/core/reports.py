"""What a training step takes, in the Trainer's logs: peak and saved bytes, tokens per second, the predicted peak."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from tightfit.core import hfmodel
from tightfit.core.memory import allocation_profile, peak_of, running_profiles
from tightfit.ops.autograd import without_graph

if TYPE_CHECKING:
    from tightfit.core.apply import Applied


class StepReports(TrainerCallback):
    """Adds figures of the step to what the Trainer logs with its loss.

    `peak_bytes` and `saved_bytes` are those of `tightfit.measure`, of the step that is logged (of an epoch's first,
    where epochs are logged): on a GPU the allocator's own maximum, on the CPU a profile of that one step.
    `tokens_per_second` (`rows_per_second` for images) is over the steps since the last log, padding included; loading
    of data, evaluation and saving are left out, and, where there are others, the profiled step.

    Args:
        applied: the recipe whose model is trained.
        predicted_bytes: logged as `predicted_peak_bytes`; None for nothing.
    """

    def __init__(self, applied: Applied, predicted_bytes: int | None = None):
        self._applied = applied
        self._predicted = predicted_bytes
        self._hooks: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        self._figures: dict[str, int] = {}
        self._plain, self._sampled = _Pace(), _Pace()
        self._sampling = self._epoch_begun = False
        self._started: float | None = None
        self._depth = self._input_bytes = 0
        self._saved: dict[int, int] | None = None
        self._packing: Any = None
        self._profiler: Any = None
        self._alive = 0
        self._optimizer: Any = None

    # -- the Trainer's events ---------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if args is None:
            return
        self._close()
        self._forget()
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        model = self._applied.model
        if not (args.torch_compile or hasattr(model, "_orig_mod") or model._compiled_call_impl is not None):
            me = weakref.ref(self)
            self._hooks = [
                model.register_forward_pre_hook(_BeforeForward(me), with_kwargs=True),
                model.register_forward_hook(_AfterForward(me), always_call=True),
            ]

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_begun = True

    def on_step_begin(self, args, state, control, **kwargs):
        if args is None:
            return
        if self._will_be_logged(args, state):
            if args.device.type == "cuda":
                started = time.perf_counter()
                torch.cuda.synchronize(args.device)
                self._plain.waited(time.perf_counter() - started)
            self._begin_sample(args.device)
        self._epoch_begun = False
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args is None or self._started is None:
            return
        if self._sampling and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        (self._sampled if self._sampling else self._plain).end(time.perf_counter() - self._started)
        self._started = None
        if self._sampling:
            self._end_sample(args)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        pace = self._plain if self._plain.seconds else self._sampled
        found = {**self._figures, **pace.rates(args.world_size)}
        if self._predicted is not None:
            found["predicted_peak_bytes"] = self._predicted
        logs.update(found)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(found)
        self._plain, self._sampled = _Pace(), _Pace()

    def on_train_end(self, args, state, control, **kwargs):
        self._close()

    # -- one step ---------------------------------------------------------------------------------------------------

    def _will_be_logged(self, args: Any, state: Any) -> bool:
        step = state.global_step + 1
        if args.logging_strategy == "epoch":
            return self._epoch_begun
        steps = args.logging_strategy == "steps" and state.logging_steps and step % state.logging_steps == 0
        return bool(steps or (args.logging_first_step and step == 1))

    def _begin_sample(self, device: torch.device) -> None:
        self._sampling, self._saved, self._input_bytes = True, None, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu" and not torch.autograd._profiler_enabled():
            self._alive = self._alive_bytes()
            self._profiler = allocation_profile()
            self._profiler.__enter__()
            running_profiles.append(self._profiler)

    def _end_sample(self, args: Any) -> None:
        self._sampling = False
        self._figures = {}
        if args.device.type == "cuda":
            self._figures["peak_bytes"] = torch.cuda.max_memory_allocated(args.device)
        elif self._profiler in running_profiles:
            self._stop_profiler()
            batches = self._input_bytes * args.gradient_accumulation_steps
            self._figures["peak_bytes"] = self._alive + batches + peak_of(self._profiler)
        self._profiler = None
        if self._saved is not None:
            self._figures["saved_bytes"] = sum(self._saved.values())
        self._saved = None

    def _alive_bytes(self) -> int:
        """What the allocator holds for training when a step begins, the batch left out."""
        model = self._applied.model
        own = [*model.parameters(), *model.buffers()]
        gradients = [p.grad for p in own if p.grad is not None]
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        moments = [t for state in states for t in state.values() if torch.is_tensor(t)]
        here = [t for t in (*own, *gradients, *moments) if t.device.type == "cpu"]
        return hfmodel.unique_storage_bytes(here)

    def _stop_profiler(self) -> None:
        if self._profiler in running_profiles:
            running_profiles.remove(self._profiler)
            self._profiler.__exit__(None, None, None)

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._stop_profiler()

    # -- one forward ------------------------------------------------------------------------------------------------

    def before_forward(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count what comes in; in a sampled step's first forward, watch what is kept."""
        self._depth += 1
        if self._depth > 1 or self._started is None or not model.training:
            return
        inputs = [*args, *kwargs.values()]
        (self._sampled if self._sampling else self._plain).add(inputs[:1] if args else [], kwargs)
        if not self._sampling or self._saved is not None or not torch.is_grad_enabled():
            return
        self._input_bytes = sum(t.untyped_storage().nbytes() for t in inputs if torch.is_tensor(t))
        own = hfmodel.storage_keys((*model.parameters(), *model.buffers()))
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.layout == torch.strided and not isinstance(tensor, torch.nn.Parameter):
                for storage in (part.untyped_storage() for part in hfmodel.with_storage(tensor)):
                    if storage._cdata not in own:
                        saved[storage._cdata] = storage.nbytes()
            return without_graph(tensor)

        self._saved = saved
        self._packing = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._packing.__enter__()

    def after_forward(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._packing is not None:
            packing, self._packing = self._packing, None
            packing.__exit__()


class _BeforeForward:
    """A hook that a copy of the model, or one that outlives its Trainer, can carry without harm."""

    def __init__(self, reports: weakref.ref[StepReports]):
        self.reports = reports

    def __call__(self, model, args, kwargs):
        reports = self.reports()
        if reports is not None and reports._applied.model is model:
            reports.before_forward(model, args, kwargs)


class _AfterForward(_BeforeForward):
    def __call__(self, model, args, output):
        reports = self.reports()
        if reports is not None and reports._applied.model is model:
            reports.after_forward()


class _Pace:
    """Tokens, or rows, of some steps and the seconds they took."""

    def __init__(self) -> None:
        self.tokens = self.rows = 0
        self.seconds = 0.0

    def add(self, first: list[Any], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", first[0] if first else None)
        if torch.is_tensor(ids) and not ids.is_floating_point():
            self.tokens += ids.numel()
            return
        embedded = kwargs.get("inputs_embeds")
        if torch.is_tensor(embedded):
            self.tokens += embedded.shape[:-1].numel()
            return
        rows = next((t for t in (*first, *kwargs.values()) if torch.is_tensor(t) and t.dim()), None)
        self.rows += rows.shape[0] if rows is not None else 0

    def end(self, seconds: float) -> None:
        self.seconds += seconds

    def waited(self, seconds: float) -> None:
        self.seconds += seconds if self.seconds else 0.0

    def rates(self, processes: int) -> dict[str, float]:
        counts = {"tokens": self.tokens, "rows": self.rows}
        return {f"{unit}_per_second": n * processes / self.seconds for unit, n in counts.items() if n and self.seconds}
