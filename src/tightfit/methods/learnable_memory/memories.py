"""The living side of an applied LearnableMemory: runs the tasks' rows, and keeps tasks apart."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import artifacts, hfmodel
from tightfit.core.calls import hidden_states
from tightfit.core.edits import Part
from tightfit.core.errors import ArtifactError, ConflictError, StateError, UnsupportedModelError, shorten
from tightfit.core.fields import near
from tightfit.methods.heads import answered, frozen
from tightfit.methods.learnable_memory.places import METHOD, Places
from tightfit.methods.learnable_memory.records import MEMORY, Rows, slots_of
from tightfit.methods.learnable_memory.tasks import (
    PREFIX,
    TASKS,
    Task,
    drop,
    hold,
    memory_of,
    owners,
    release,
    task_of,
)
from tightfit.methods.token_tune.records import KEY, Capture
from tightfit.methods.token_tune.tuner import checkpoints

OLD = "old"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
EXTENSION = "extension"


def check_name(name: Any, where: str) -> None:
    """Raise TypeError / ValueError unless a task may be called so."""
    if not isinstance(name, str):
        raise TypeError(f"{where}: got {name!r} ({type(name).__name__}), accepted is a task's name, a str")
    if not NAME.fullmatch(name) or name == OLD:
        raise ValueError(
            f"{where}: got {name!r}, accepted are letters, digits, '_' and '-' (and not {OLD!r}, the model's own task)"
        )


class Memories(Part):
    """The tasks of an applied `LearnableMemory` in mode "isolated": `applied.part(Memories)`.

    Attributes:
        task: the task that trains.
        earlier: the tasks that are held, in order: name -> (labels, memory tokens).
        served: the task whose logits the model gives; "old" is its own.
    """

    def __init__(self, transform: Any, places: Places):
        self.places, self.normed, self.seed = places, transform.memory_norm, transform.seed
        self.visibility = transform.visibility
        self.task: str = transform.task
        self.sizes: dict[str, tuple[int, int]] = {
            **{name: (labels, tokens) for name, labels, tokens in transform.earlier},
            transform.task: (transform.num_labels or places.labels, transform.tokens),
        }
        self.served = self.task
        self.unread = {name for name, _, _ in transform.earlier}
        self.trained = False
        self.pending: Tensor | None = None
        self._model: weakref.ref[Any] | None = None

    def __deepcopy__(self, memo: dict) -> Memories:
        twin = memo[id(self)] = Memories.__new__(Memories)
        twin.__dict__.update(self.__dict__)
        twin.sizes, twin.unread, twin._model = dict(self.sizes), set(self.unread), None
        return twin

    # -- a part of the recipe ------------------------------------------------------------------------------------

    @property
    def earlier(self) -> dict[str, tuple[int, int]]:
        return {name: size for name, size in self.sizes.items() if name != self.task}

    def recipe_fields(self) -> dict[str, Any]:
        labels, tokens = self.sizes[self.task]
        earlier = tuple((name, *size) for name, size in self.earlier.items())
        return {"task": self.task, "num_labels": labels, "tokens": tokens, "earlier": earlier}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.unread.clear()  # the earlier tasks' values are buffers of the model, and in the file

    def report(self) -> dict[str, Any]:
        width, depth = self.places.width, self.places.depth
        owned = {name: depth * m * width + width + (width + 1) * labels for name, (labels, m) in self.sizes.items()}
        return {"task": self.task, "served": self.served, "task_parameters": owned}

    # -- tasks ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """All tasks in order, the one that trains last."""
        return list(self.sizes)

    def bind(self, model: nn.Module) -> None:
        """Note whose tasks these are."""
        if self._model is None or self._model() is not model:
            self._model = weakref.ref(model)

    @property
    def model(self) -> Any:
        found = self._model() if self._model is not None else None
        if found is None:
            raise StateError(f"{METHOD}: the model is gone, or was copied and not called since")
        return found

    def use(self, task: str) -> None:
        """Give that task's logits from now on; "old": the model's own. Training needs the task that trains."""
        self._known([task, OLD] if task == OLD else [task])
        self.served = task

    def next(self, task: str, *, num_labels: int, tokens: int | None = None) -> None:
        """Hold the task that trains as it is, and begin a new one; make a new optimizer afterwards."""
        self._check_new(task)
        own = self.sizes[self.task][1] if tokens is None else tokens
        for field, value in (("num_labels", num_labels), ("tokens", own)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"next({field}=...): got {value!r}, accepted is an int >= 1")
            if value < 1:
                raise ValueError(f"next({field}=...): got {value}, accepted is an int >= 1")
        model = self.model
        self._add(model, task, num_labels, own)
        for owner in owners(model, self.places.blocks):
            hold(owner, self.task)
        self.sizes[task] = (num_labels, own)
        self.task = self.served = task
        self.trained = False

    def delete(self, task: str) -> None:
        """Remove a task; where later ones see it ("extension"), only the last one can go.

        With the task that trains, the one before it trains again.
        """
        self._known([task])
        if len(self.sizes) == 1:
            raise ValueError(f"delete({task!r}): it is the only task; remove() the recipe instead")
        if self.visibility == EXTENSION and task != self.task:
            later = self.names[self.names.index(task) + 1 :]
            raise ValueError(
                f"delete({task!r}): the later tasks {shorten(later)} see it (visibility='extension'), so they would "
                f"change; delete those first"
            )
        inside = owners(self.model, self.places.blocks)
        for owner in inside:
            drop(owner, task)
        del self.sizes[task]
        self.unread.discard(task)
        if task == self.task:
            self.task = self.names[-1]
            for owner in inside:
                release(owner, self.task)
        if self.served == task:
            self.served = self.task

    def read(self, folder: str | os.PathLike, *tasks: str) -> None:
        """Take tasks from what `Applied.save` wrote, before the one that trains; none named: all that are there.

        Raises:
            ArtifactError: damaged, another method's, or trained on another model.
            ValueError: a task that is not there or of another size, another `memory_norm` or `visibility`, or, with
                visibility="extension", tasks that did not see the ones which they would see here.
        """
        from tightfit.core.recipe import Recipe

        document, tensors = artifacts.read(folder)
        found: Any = next((t for t in Recipe.from_list(document["methods"]) if type(t).__name__ == METHOD), None)
        if found is None or found.mode != "isolated":
            raise ArtifactError(f"{folder}: holds no isolated tasks of {METHOD}")
        self._check_base(folder, document["base"]["digests"])
        for field, here in (("memory_norm", self.normed), ("visibility", self.visibility)):
            if getattr(found, field) != here:
                raise ValueError(
                    f"{folder}: its tasks were trained with {field}={getattr(found, field)!r}, here it is {here!r}"
                )
        labels = found.num_labels or self.places.labels
        there = {**{name: (n, m) for name, n, m in found.earlier}, found.task: (labels, found.tokens)}
        wanted = list(tasks) or [t for t in there if t != self.task or t in tasks]
        missing = [task for task in wanted if task not in there]
        if missing:
            raise ValueError(f"{folder}: has no task {shorten(missing)}; it has {shorten(there)}")
        self._check_order(folder, list(there), wanted)
        model = self.model
        for task in wanted:
            known = self.sizes.get(task)
            if task == self.task or (known is not None and task not in self.unread):
                raise ValueError(f"{folder}: task {task!r} is here already")
            if known is not None and known != there[task]:
                raise ValueError(
                    f"{folder}: task {task!r} has {there[task][0]} labels and {there[task][1]} memory tokens, this "
                    f"recipe says {known[0]} and {known[1]}"
                )
        values = {task: self._values(folder, tensors, task, *there[task]) for task in wanted}
        for task in wanted:
            if task not in self.sizes:
                self._add(model, task, *there[task])
                for owner in owners(model, self.places.blocks):
                    hold(owner, task)
                last = self.sizes.pop(self.task)
                self.sizes |= {task: there[task], self.task: last}
            model.load_state_dict(values[task], strict=False)
            self.unread.discard(task)

    def logits(self, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """The logits of every task and the model's own ("old"), from one run of the model and one of the rows."""
        model = self.model
        call = {"pixel_values": pixel_values, **kwargs}
        self._check_read()
        capture, old = self._captured(model, type(model)._stock.__get__(model), call)
        found = self._rows(model, capture, call, self.names, extension=self.visibility == EXTENSION)
        return {OLD: old[0] if isinstance(old, tuple) else old.logits, **dict(zip(self.names, found))}

    # -- a call --------------------------------------------------------------------------------------------------

    def run(self, model: Any, stock: Any, call: dict[str, Any]) -> Any:
        """The served task's output; the old rows run in the stock model, without gradients."""
        labels = call.pop("labels", None)
        training = model.training and torch.is_grad_enabled()
        if training:
            self._check_training(model)
        self._check_read()
        capture, old = self._captured(model, stock, call)
        if self.visibility == EXTENSION:
            before = self.names[: self.names.index(self.served)]
            if before:
                with frozen(model):
                    self._rows(model, capture, call, before, extension=True, extend=True)
        (logits,) = self._rows(model, capture, call, [self.served])
        return answered(model, old, logits, call, labels, self.sizes[self.served][0])

    def _captured(self, model: Any, stock: Any, call: dict[str, Any]) -> tuple[Capture, Any]:
        capture = Capture({})
        with frozen(model):
            out = stock(**call, **{KEY: capture})
        depth = len(model.get_submodule(self.places.blocks))
        if capture.reached != depth:
            raise UnsupportedModelError(
                f"{METHOD}: {type(model).__name__} is not supported: of its {depth} blocks, attention in only "
                f"{capture.reached} could be reached"
            )
        return capture, out

    def _rows(
        self,
        model: Any,
        capture: Capture,
        call: dict[str, Any],
        tasks: Sequence[str],
        **options: bool,
    ) -> list[Tensor]:
        holder: Any = model._modules[TASKS]
        own: list[Task] = [holder.of(task) for task in tasks]
        keep = model.training and torch.is_grad_enabled() and checkpoints(model)
        record = Rows(slots_of(model, self.places.blocks, self.normed), capture, tasks, keep=keep, **options)
        hidden = self.hidden_rows(model, torch.cat([task.cls for task in own], 1), call, record)
        return [task.logits(hidden[:, i]) for i, task in enumerate(own)]

    def hidden_rows(self, model: Any, tokens: Tensor, call: dict[str, Any], record: Rows) -> Tensor:
        """The final states (B, R, d) of class tokens (1, R, d)."""
        embeddings: Any = model.get_submodule(self.places.embeddings)
        place = embeddings.position_embeddings[:, :1]
        rows = (tokens.to(place.dtype) + place).expand(call["pixel_values"].shape[0], -1, -1)
        dropout = getattr(embeddings, "dropout", None)
        self.pending = rows if dropout is None else dropout(rows)
        try:
            out = hfmodel.backbone(model)[1](pixel_values=call["pixel_values"], **{KEY: record})
        finally:
            self.pending = None
        return hidden_states(out)

    # -- checks --------------------------------------------------------------------------------------------------

    def _known(self, tasks: Sequence[str]) -> None:
        known = [*self.names, OLD]
        for task in tasks:
            if task not in known:
                raise ValueError(
                    f"{METHOD}: no task {task!r}; known are {', '.join(map(repr, known))}{near(task, known)}"
                )

    def _check_new(self, task: Any) -> None:
        check_name(task, "next(...)")
        if task in self.sizes:
            raise ValueError(f"next({task!r}): there is such a task already; known are {shorten(self.names)}")
        self._check_read()

    def _check_read(self) -> None:
        unread = [name for name in self.names if name in self.unread]
        if unread and hfmodel.has_values(next(self.model.parameters())):
            raise StateError(
                f"{METHOD}: the earlier tasks {shorten(unread)} have no values yet; read(folder) them, or load() what "
                f"was saved"
            )

    def _check_training(self, model: Any) -> None:
        if self.served != self.task:
            raise StateError(
                f"{METHOD}: {self.served!r} is served, and {self.task!r} is what trains; use({self.task!r}) first"
            )
        trained = [n for n, p in model.named_parameters() if p.requires_grad and not _ours(n)]
        if trained:
            raise ConflictError(
                f"{METHOD}(mode='isolated'): the model is shared by the tasks and runs without a graph, so "
                f"{shorten(trained, 5)} must not train; set requires_grad to False there, or take mode='shared'"
            )
        self.trained = True

    def _check_base(self, folder: str | os.PathLike, digests: dict[str, str]) -> None:
        for name, parameter in self.model.named_parameters():
            if not _ours(name) and digests.get(name) != artifacts.tensor_digest(parameter):
                raise ArtifactError(f"{Path(folder)}: its tasks were trained on another model; {name} differs")

    def _values(
        self, folder: str | os.PathLike, tensors: dict[str, Tensor], task: str, labels: int, tokens: int
    ) -> dict[str, Tensor]:
        """What a saved task owns, by its names in the model."""
        width, own = self.places.width, f"{TASKS}.{PREFIX}{task}"
        shapes: dict[str, tuple[int, ...]] = {
            **{f"{block}.{MEMORY}.{PREFIX}{task}": (tokens, width) for block in self.places.names},
            f"{own}.cls": (1, 1, width),
            f"{own}.head.weight": (labels, width),
            f"{own}.head.bias": (labels,),
        }
        for name, shape in shapes.items():
            found = tuple(tensors[name].shape) if name in tensors else "absent"
            if found != shape:
                raise ArtifactError(f"{Path(folder)}: {name} is {found}, expected {shape}; the file is damaged")
        return {name: tensors[name] for name in shapes}

    def _check_order(self, folder: str | os.PathLike, there: list[str], wanted: list[str]) -> None:
        if self.visibility != EXTENSION:
            return
        here = [name for name in self.names if name != self.task and name not in self.unread and name not in wanted]
        last = max(there.index(task) for task in wanted)
        if [*here, *wanted] != there[: last + 1]:
            raise ValueError(
                f"{folder}: its task {there[last]!r} sees {shorten(there[:last]) or 'none'} (visibility='extension'), "
                f"and would see {shorten([*here, *wanted[:-1]]) or 'none'} here; the order of tasks must be kept"
            )
        if self.trained:
            raise ValueError(
                f"{folder}: {self.task!r} was trained already, and would see tasks that it has not seen; read earlier "
                f"tasks first"
            )

    def _add(self, model: Any, task: str, labels: int, tokens: int) -> None:
        """Make what a new task owns."""
        width, seed = self.places.width, self.seed + len(self.sizes) * 1009
        for index, block in enumerate(model.get_submodule(self.places.blocks)):
            made = memory_of(model, task, tokens, width, seed + index + 1)
            block._modules[MEMORY].register_parameter(PREFIX + task, made.of(task))
        model._modules[TASKS].add_module(PREFIX + task, task_of(model, width, labels, seed))


def _ours(name: str) -> bool:
    return not {MEMORY, TASKS}.isdisjoint(name.split("."))
