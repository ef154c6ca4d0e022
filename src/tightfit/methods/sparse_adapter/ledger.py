"""What the layers of one model share: gradients on their way to the host, their joint norm, the optimizer's step.

Rows are no parameters, so a trainer does not know them. Each layer's `link`, a parameter of one element, speaks for
its rows: after a backward its gradient is the norm of the rows' gradients. Whatever then happens to gradients as a
whole (clipping by their joint norm, unscaling, the check for infinities) happens to it too, and how much it was
scaled by is what the rows' gradients are scaled by when the optimizer that holds it steps.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tightfit.core.errors import StateError
from tightfit.methods.sparse_adapter.errors import NotFiniteError
from tightfit.methods.sparse_adapter.traffic import Arriving, Traffic
from tightfit.ops.sparse_rows import Resident

if TYPE_CHECKING:
    from tightfit.methods.sparse_adapter.layer import Record, SparseRows

_BLOCK_ROWS = 4096


def in_backward() -> bool:
    """Whether a backward pass is running: a forward then is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def distributed_call() -> tuple[Any, bool] | None:
    """The process group of the DDP model whose forward is running, and whether its backward will synchronise."""
    model = DistributedDataParallel._active_ddp_module
    return None if model is None else (model.process_group, model.require_backward_grad_sync)


class Ledger:
    """The layers' common side; a copy of the model has one of its own."""

    def __init__(self, hollow: bool):
        self.hollow = hollow
        self.traffic = Traffic()
        self._layers: dict[int, weakref.ref[SparseRows]] = {}
        self._arriving: list[tuple[SparseRows, Record, Arriving]] = []
        self._task = -1
        self._collected: set[int] = set()
        self._world: Any = None
        self._warned = False
        self._turn = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        twin = memo[id(self)] = Ledger(self.hollow)
        return twin

    def join(self, layer: SparseRows) -> None:
        """A layer that trains."""
        self._layers[layer.place] = weakref.ref(layer)

    @property
    def layers(self) -> list[SparseRows]:
        """The layers that have trained, in model order."""
        return [layer for _, ref in sorted(self._layers.items()) if (layer := ref()) is not None]

    def warn_of_cap(self, layer: SparseRows, found: Resident) -> None:
        """Say once that tokens ask for more rows than may become resident."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"SparseAdapter(max_resident={layer.settings.cap}): the tokens of a batch asked for {found.wanted} rows of "
            f"{layer.name}; those of the smallest summed scores were dropped ({100 * found.dropped:.1f} % of the sum). "
            f"report() counts it; give a larger max_resident, a smaller top_k, or fewer tokens",
            UserWarning,
            stacklevel=2,
        )

    # -- after a backward -------------------------------------------------------------------------------------------

    def collect(self, layer: SparseRows, record: Record, grad: Tensor) -> None:
        """Take the gradient of a slot, in a backward pass."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._collected.clear()
            self._world = None
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_last)
        # not of a second forward in this backward, whose link has no gradient yet
        if layer.bank.pending and layer.place not in self._collected and _was_zeroed(layer.link):
            layer.bank.drop_grad()
        self._collected.add(layer.place)
        self.join(layer)
        if record.world is not None and record.world[1]:
            self._world = record.world[0]
        self.receive()
        self._turn = 1 - self._turn
        arriving = self.traffic.down(grad, f"gradients {self._turn}")
        self._arriving.append((layer, record, arriving))
        if grad.device.type == "cpu":
            self.receive()

    def receive(self) -> None:
        """Add the gradients that have arrived to their banks."""
        while self._arriving:
            layer, record, arriving = self._arriving.pop(0)
            host = self.traffic.wide(arriving.wait(), layer.bank.shape.wide, "wide gradients")
            found = record.found
            spread = len(found.rows) and found.slots[-1] != len(found.rows) - 1
            own = torch.from_numpy(host.numpy()[found.slots]) if spread else host[: len(found.rows)]
            layer.bank.add_grad(found.rows, own)
            record.open = False

    def _finish_last(self) -> None:
        """Finish behind the callbacks that are there now: DDP's own writes to the links' gradients."""
        if self._world is not None:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        else:
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        self._task = -1
        self.receive()
        if self._world is not None:
            self._sum_over(_host_group(self._world))
            self._world = None
        for layer in self.layers:
            if not layer.bank.pending:
                continue
            norm = layer.bank.measure_norm(self.traffic.work)
            if layer.link.grad is None:
                layer.link.grad = torch.zeros_like(layer.link)
            layer.link.grad.fill_(norm)

    def _sum_over(self, group: Any) -> None:
        """The mean of all processes' gradients, over the union of their rows."""
        world = dist.get_world_size(group)
        for layer in self.layers:
            bank = layer.bank
            touched = torch.from_numpy(bank.touched.view(np.uint8))
            dist.all_reduce(touched, dist.ReduceOp.MAX, group=group)
            union = np.flatnonzero(bank.touched)
            grad = bank.tensor("grad")
            for start in range(0, len(union), _BLOCK_ROWS):
                index = torch.from_numpy(union[start : start + _BLOCK_ROWS])
                part = torch.index_select(grad, 0, index)
                dist.all_reduce(part, group=group)
                grad.index_copy_(0, index, part.div_(world))
            bank.pending = len(union) > 0

    # -- before a step ----------------------------------------------------------------------------------------------

    def refuse_open(self) -> None:
        """Raise StateError while rows wait for a backward."""
        if not self._open():
            return
        gc.collect()  # what an exception has left may be in cycles
        names = self._open()
        if names:
            raise StateError(
                f"optimizer.step(): rows of {names[0]} and {len(names) - 1} other layers are in use by a forward whose "
                f"backward has not run; run it before the step, or let go of its outputs"
            )

    def _open(self) -> list[str]:
        refs = ((layer, ref()) for layer in self.layers for ref in layer.run.records)
        return list(dict.fromkeys(layer.name for layer, record in refs if record is not None and record.open))


def _was_zeroed(link: Tensor) -> bool:
    """Whether somebody has zeroed the gradients since the last backward."""
    return link.grad is None or float(link.grad) == 0.0


_host_groups: dict[int, Any] = {}


def _host_group(group: Any) -> Any:
    """A process group of the same ranks that can sum tensors of the CPU."""
    if "gloo" in str(dist.get_backend(group)):
        return group
    if id(group) not in _host_groups:
        _host_groups[id(group)] = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
    return _host_groups[id(group)]


# -- the optimizer's step -------------------------------------------------------------------------------------------

_links: dict[int, weakref.ref[SparseRows]] = {}
_jobs: dict[int, list[tuple[SparseRows, float, float]]] = {}
_hooks: list[Any] = []


def known_to_optimizers(layer: SparseRows) -> None:
    """From now on the layer's rows step with the optimizer that holds its link."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    layer.ledger.join(layer)
    _links[id(layer.link)] = weakref.ref(layer)


def _held(optimizer: torch.optim.Optimizer) -> list[tuple[SparseRows, dict[str, Any]]]:
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            ref = _links.get(id(parameter))
            layer = ref() if ref is not None else None
            if layer is not None and layer.link is parameter:
                found.append((layer, group))
    return found


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _has_closure(args, kwargs):
        _prepare(optimizer, "nothing was updated")


def _has_closure(args: Any, kwargs: Any) -> bool:
    """Whether the step runs the backward itself; `args` begin with the optimizer."""
    return (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None


def _prepare(optimizer: torch.optim.Optimizer, left: str) -> None:
    """Note the layers that are to be updated by this step; `left` says what was not where that cannot be."""
    if not _links:
        return
    held = _held(optimizer)
    if not held:
        _refuse_sharded(optimizer)
        return
    if isinstance(optimizer, torch.optim.LBFGS):  # a search along a line, whose slope the links are no part of
        raise StateError(
            f"optimizer.step(): LBFGS takes many gradients in a step, and the rows of {held[0][0].name} take one, by "
            f"an AdamW of their own with its learning rate; {left}. Give the link parameters to another optimizer"
        )
    _jobs.pop(id(optimizer), None)
    for ledger in {id(layer.ledger): layer.ledger for layer, _ in held}.values():
        ledger.receive()
        ledger.refuse_open()
    waiting = [(layer, group) for layer, group in held if layer.bank.pending]
    for layer, _ in waiting:
        if layer.link.grad is None:
            layer.bank.drop_grad()
    waiting = [(layer, group) for layer, group in waiting if layer.bank.pending]
    if not waiting:
        return
    skipped, inverse = _scaler_of(optimizer)
    norms = torch.stack([layer.link.grad.detach().double().sum() for layer, _ in waiting]).tolist()  # type: ignore
    jobs = []
    for (layer, group), norm in zip(waiting, norms):
        if skipped or (norm == 0.0 and layer.bank.norm != 0.0):
            layer.bank.drop_grad()
            continue
        if not (math.isfinite(norm) and math.isfinite(layer.bank.norm)):
            raise NotFiniteError(
                f"SparseAdapter: the gradients of the rows of {layer.name} are not finite (norm {layer.bank.norm}); "
                f"{left}. Lower the learning rate, or clip gradients"
            )
        if group.get("lr") is None:
            raise StateError(
                f"optimizer.step(): {type(optimizer).__name__} has no learning rate (lr=None), and the rows of "
                f"{layer.name} step with the optimizer's; give it one (for Adafactor: relative_step=False)"
            )
        factor = norm / layer.bank.norm if layer.bank.norm else 1.0
        jobs.append((layer, float(group["lr"]), factor * inverse))
    _jobs[id(optimizer)] = jobs


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _has_closure(args, kwargs):
        _prepare(optimizer, "no rows were updated")
    for layer, lr, factor in _jobs.pop(id(optimizer), ()):
        layer.run.kept.clear()
        layer.run.steps += 1
        layer.run.moved += int(layer.bank.touched.sum())
        layer.bank.update(lr, factor, layer.settings.adamw, layer.ledger.traffic.work)
        with torch.no_grad():
            layer.link.zero_()


def _scaler_of(optimizer: torch.optim.Optimizer) -> tuple[bool, float]:
    """For optimizers that unscale in their own kernel: whether the step is skipped, and what to multiply with."""
    found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    skipped = found is not None and float(found) > 0
    return skipped, 1.0 if scale is None else 1.0 / float(scale)


def _refuse_sharded(optimizer: torch.optim.Optimizer) -> None:
    """Raise StateError where links were sharded away: their rows would silently not train."""
    waiting = [layer for ref in _links.values() if (layer := ref()) is not None and layer.bank.pending]
    if waiting and any(type(p).__name__ == "DTensor" or hasattr(p, "device_mesh") for p in _parameters(optimizer)):
        raise StateError(
            f"optimizer.step(): {type(optimizer).__name__} holds sharded parameters and not the link of "
            f"{waiting[0].name}, so the rows of SparseAdapter would not train; it works under DDP, not under FSDP"
        )


def _parameters(optimizer: torch.optim.Optimizer):
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
