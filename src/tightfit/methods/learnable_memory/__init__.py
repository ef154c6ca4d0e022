"""LearnableMemory: learned tokens that the blocks of an image model attend to (arXiv 2203.15243)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, ChildEdit, ClaimEdit, Edit, ModuleEdit, TrainableEdit, inner_claims
from tightfit.core.fields import check_bool, check_choice, check_int
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.learnable_memory.calls import TaskModel, TaskRows, WithMemory
from tightfit.methods.learnable_memory.edits import SharedMemory, check
from tightfit.methods.learnable_memory.memories import Memories, check_name
from tightfit.methods.learnable_memory.places import METHOD, Places, places_of
from tightfit.methods.learnable_memory.records import MEMORY
from tightfit.methods.learnable_memory.tasks import PREFIX, TASKS, Tasks, hold, memory_of, task_of
from tightfit.methods.token_tune.edits import RegistryEdit

__all__ = ["LearnableMemory", "Memories"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnableMemory(Transform):
    """Train a few memory tokens in every block, a class token and a head; the model itself is frozen.

    Memory gives keys and values and nothing else: it asks nothing, passes no MLP, and does not reach the next block.

    "isolated": each task has a class token, memory and a head of its own, and no other token sees them. So the model's
    own rows run as they are, without a graph, and their logits stay bit for bit (`outputs.old_logits`); training keeps
    keys and values of the tokens and the inside of one row, and takes the time of a forward. The model gives the logits
    of the task. Several tasks live beside each other: see `applied.part(Memories)`, whose `next` begins another one,
    `read` takes one from a saved folder, `use` says whose logits the model gives, `logits` gives all of them.

    "shared": all tokens see the memory, and the model's own class token and head train with it. Costs what training the
    whole model does, but for the weights' gradients and the optimizer.

    Fields:
        tokens: memory tokens of each block; 0 only with mode="shared" (class token and head alone).
        mode: "isolated" or "shared".
        task: name of the task that trains.
        num_labels: of its head; None: as many as the model's own. Only with mode="isolated".
        earlier: tasks that are held beside it, in order, each (name, labels, tokens); `Memories.read` fills them.
        visibility: a class token sees its own memory only ("concatenation"), or that of earlier tasks and their class
            tokens too ("extension").
        memory_norm: memory passes the block's norm before keys and values, as the tokens do.
        seed: of new weights.

    Raises:
        TypeError, ValueError: a field out of range, fields that do not go together; the model is no image classifier
            with a class token (when applied), or one of its own parameters was set to train (in a step).
        UnsupportedModelError: its blocks are not norm, attention, residual (when applied).

    Example:
        >>> import tightfit
        >>> tightfit.LearnableMemory(task="digits", num_labels=10)
        LearnableMemory(task='digits', num_labels=10)

    Source: arXiv 2203.15243, section 3. Deviations: the old rows run apart, which gives the masked model's values;
    `memory_norm=False` is what re-implementations do.
    """

    tokens: int = 5
    mode: str = "isolated"
    task: str = "task"
    num_labels: int | None = None
    earlier: tuple[tuple[str, int, int], ...] = ()
    visibility: str = "concatenation"
    memory_norm: bool = True
    seed: int = 0

    name: ClassVar[str] = "learnable-memory"
    paper: ClassVar[str] = "2203.15243"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.TRAINABLE, Slot.NEW_PARAMETERS, Slot.INPUTS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "memory tokens for a frozen image model; several tasks on one model"

    def __post_init__(self) -> None:
        check_choice(self, "mode", ("isolated", "shared"))
        check_int(self, "tokens", 0 if self.mode == "shared" else 1)
        check_name(self.task, f"{METHOD}(task=...)")
        check_int(self, "num_labels", 1, optional=True)
        check_choice(self, "visibility", ("concatenation", "extension"))
        check_bool(self, "memory_norm")
        check_int(self, "seed", 0)
        object.__setattr__(self, "earlier", _earlier(self.earlier, self.task))
        if self.mode == "shared" and (
            self.num_labels is not None or self.earlier or self.visibility != "concatenation"
        ):
            raise ValueError(
                f"{METHOD}(mode='shared'): trains the model's own class token and head, so num_labels, earlier and "
                f"visibility have no meaning; got num_labels={self.num_labels}, earlier={self.earlier}, "
                f"visibility={self.visibility!r}"
            )

    def freezes(self, model: nn.Module) -> Iterator[str]:
        own = _own_of_model(places_of(model)) if self.mode == "shared" else ()
        adapters = set(hfmodel.adapter_parameters(model))
        return (n for n, _ in model.named_parameters() if n not in adapters and not n.startswith(own or ("\0",)))

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        places = places_of(model)
        yield TrainableEdit(parameters=tuple(self.freezes(model)), trainable=False, note="frozen")
        yield from (self._shared if self.mode == "shared" else self._isolated)(model, places)

    def _shared(self, model: nn.Module, places: Places) -> Iterator[Edit]:
        own = _own_of_model(places)
        names = tuple(n for n, _ in model.named_parameters() if n.startswith(own))
        yield TrainableEdit(parameters=names, trainable=True, note="class token and head")
        # nobody may run the blocks without a graph
        yield ClaimEdit(slot=Slot.NEW_PARAMETERS, named="blocks", places=inner_claims(model), note="gradients pass")
        if not self.tokens:
            return
        yield from self._memory(model, places)
        backbone = hfmodel.backbone(model)[0]
        state = {"blocks": places.blocks.removeprefix(f"{backbone}."), "normed": self.memory_norm, "task": self.task}
        yield RegistryEdit(exclusive=True, note="memory beside keys and values")
        yield CallEdit(
            where="backbone",
            mixin=WithMemory,
            state=lambda module: dict(state),
            note=f"{self.tokens} memory tokens in each block",
            part=SharedMemory(self.tokens, places),
        )

    def _isolated(self, model: nn.Module, places: Places) -> Iterator[Edit]:
        memories = Memories(self, places)

        def state(module: nn.Module) -> dict[str, Any]:
            return {"memories": memories}

        def bound(module: nn.Module) -> dict[str, Any]:
            memories.bind(module)
            return state(module)

        yield from self._memory(model, places)
        yield ChildEdit(
            module="",
            child=TASKS,
            make=functools.partial(self._make_tasks, model, places),
            trained=f"{METHOD} trained for its tasks",
            note=f"class token and head of {len(memories.sizes)} tasks",
        )
        # they stay as they are: adapters inside would change the old logits
        yield ClaimEdit(
            slot=Slot.NEW_PARAMETERS,
            exclusive=True,
            named="blocks",
            places=inner_claims(model, places.names),
            note="the old rows run as they are",
        )
        yield RegistryEdit(exclusive=True, note="captures keys and values")
        yield CallEdit(where="model", mixin=TaskModel, state=bound, part=memories, note=f"gives {self.task!r}")
        yield ModuleEdit(slot=Slot.INPUTS, module=places.embeddings, mixin=TaskRows, state=state)
        yield ClaimEdit(
            slot=Slot.INPUTS,
            named="check",
            check=functools.partial(check, memories=memories),
            note="compares with the model",
        )

    def _memory(self, model: nn.Module, places: Places) -> Iterator[Edit]:
        for index in range(places.depth):
            yield ChildEdit(
                module=f"{places.blocks}.{index}",
                child=MEMORY,
                make=functools.partial(self._make_memory, model, places, index),
                trained=f"{METHOD} trained in the blocks",
            )

    def _make_memory(self, model: nn.Module, places: Places, index: int, owner: nn.Module) -> nn.Module:
        memory = memory_of(model, self.task, self.tokens, places.width, self.seed + index + 1)
        for number, (name, _, tokens) in enumerate(self.earlier, start=1):
            more = memory_of(model, name, tokens, places.width, self.seed + number * 1009 + index + 1)
            memory.register_parameter(PREFIX + name, more.of(name))  # type: ignore[arg-type]
            hold(memory, name)
        return memory

    def _make_tasks(self, model: nn.Module, places: Places, owner: nn.Module) -> nn.Module:
        tasks = Tasks()
        for number, (name, labels, _) in enumerate(self.earlier, start=1):
            tasks.add_module(PREFIX + name, task_of(model, places.width, labels, self.seed + number * 1009))
            hold(tasks, name)
        own = task_of(model, places.width, self.num_labels or places.labels, self.seed)
        tasks.add_module(PREFIX + self.task, own)
        return tasks


def _own_of_model(places: Places) -> tuple[str, ...]:
    """Beginnings of the names of the model's own class token and head."""
    return (f"{places.embeddings}.cls_token", f"{places.head}.")


def _earlier(value: Any, task: str) -> tuple[tuple[str, int, int], ...]:
    where = f"{METHOD}(earlier=...)"
    form = "a tuple of (name, labels, tokens), such as (('digits', 10, 5),)"
    if not isinstance(value, tuple | list) or any(not isinstance(t, tuple | list) or len(t) != 3 for t in value):
        raise TypeError(f"{where}: got {value!r}, accepted is {form}")
    names = [task]
    for name, labels, tokens in value:
        check_name(name, where)
        for number in (labels, tokens):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{where}: got {value!r}, accepted is {form}")
            if number < 1:
                raise ValueError(f"{where}: got {number} in {value!r}, accepted is {form}, all numbers at least 1")
        if name in names:
            raise ValueError(f"{where}: task {name!r} appears twice; every task needs a name of its own")
        names.append(name)
    return tuple(tuple(item) for item in value)
