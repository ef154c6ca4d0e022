"""The kept vocabulary of a live model: id maps, the rows that stay away, growth, figures."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tightfit.core import processes
from tightfit.core.edits import Part
from tightfit.core.errors import ArtifactError, StateError, UnknownTokenError, shorten
from tightfit.core.host import to_host

SLOT = "_tight_slot"
POSITION = "_tight_position"


class RowCodec:
    """Stands a full table in by its kept rows; the dropped rows wait in a host-side store.

    The first dimension of the tensor is the vocabulary.

    Attributes:
        home: the dropped rows. decay: what they have been shrunk by since.
        given: they are from a state dict, whose rows are shrunk already.
    """

    def __init__(self, full: torch.Tensor, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.home = to_host(full, vocabulary.dropped)
        self.decay = 1.0
        self.given = False
        vocabulary.codecs.append(self)

    def encode(self, full: torch.Tensor) -> torch.Tensor:
        return _rows(full, self.vocabulary.ids)

    def decode(self, small: torch.Tensor) -> torch.Tensor:
        vocabulary = self.vocabulary
        device = "meta" if small.is_meta else "cpu"
        full = torch.empty((vocabulary.size, *small.shape[1:]), dtype=small.dtype, device=device)
        rest = self.home.to(small.dtype)
        full[vocabulary.dropped] = rest if self.decay == 1.0 else rest * self.decay
        full[vocabulary.ids] = small.detach().to(device)
        return full

    def load(self, full: torch.Tensor) -> torch.Tensor:
        vocabulary = self.vocabulary
        if full.shape[0] != vocabulary.size:
            raise ArtifactError(
                f"load_state_dict: a table of {full.shape[0]} rows was given, the stock table has {vocabulary.size}; "
                f"a reduced table carries no ids, so load a stock-shaped state dict, or tightfit.load(model, folder)"
            )
        rest = _rows(full, vocabulary.dropped).detach()
        if self.decay != 1.0 or not torch.equal(rest.cpu(), self.home.to(rest.dtype)):
            self.home, self.decay, self.given = to_host(rest), 1.0, True
        return self.encode(full)

    def residue(self) -> torch.Tensor | None:
        return self.home if self.home.numel() else None

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(RowCodec)
        # the store is replaced, never written to, so the copy can read the same one
        twin.home, twin.decay, twin.given = self.home, self.decay, self.given
        twin.vocabulary = copy.deepcopy(self.vocabulary, memo)
        return twin


def _rows(full: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return full.detach().index_select(0, ids.to(full.device))


class Vocabulary(Part):
    """The kept ids of an applied `PartialEmbedding`, shared by all its edits.

    Attributes:
        ids: (K,) kept ids, ascending. dropped: (V - K,) the others, ascending. Both int64 on the CPU.
        size: V.
    """

    def __init__(self, ids: tuple[int, ...], size: int, unknown: str, head: str, decay_dropped: bool, tokenizer: Any):
        self.size = size
        self.unknown = unknown
        self.head = head
        self.decay_dropped = decay_dropped
        self.tokenizer = tokenizer
        self.first_ids = ids
        self.codecs: list[RowCodec] = []
        self.tables: list[tuple[RowCodec, nn.Module, str]] = []
        self.lookups: list[nn.Module] = []
        self.heads: list[nn.Module] = []
        self.outside_labels: torch.Tensor | None = None
        self.generating = False
        self.mass: list[float] = []
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._watch: weakref.finalize | None = None
        self._set(torch.tensor(ids, dtype=torch.int64))

    def _set(self, ids: torch.Tensor) -> None:
        kept = torch.zeros(self.size, dtype=torch.bool)
        kept[ids] = True
        self.ids = kept.nonzero().reshape(-1)
        self.dropped = (~kept).nonzero().reshape(-1)

    @property
    def fetches(self) -> bool:
        """Whether a row that is not kept may be read."""
        return self.unknown == "fetch" or self.generating

    # -- id maps ------------------------------------------------------------------------------------------------

    def slots(self) -> torch.Tensor:
        """(V,) int32: the row of each kept id, -1 for the others."""
        slots = torch.full((self.size,), -1, dtype=torch.int32)
        slots[self.ids] = torch.arange(len(self.ids), dtype=torch.int32)
        return slots

    def positions(self) -> torch.Tensor:
        """(V,) int64: class number of each id in the loss; dropped ids follow the kept ones, or are -1 if absent."""
        positions = self.slots().to(torch.int64)
        if self.head == "split":
            positions[self.dropped] = len(self.ids) + torch.arange(len(self.dropped))
        return positions

    def unknown_error(self, ids: torch.Tensor, where: str) -> UnknownTokenError:
        """The error for ids outside the kept vocabulary, with their token strings where a tokenizer is known."""
        found = sorted(set(ids.reshape(-1).tolist()))
        names = [f"{i} {self.tokenizer.convert_ids_to_tokens(i)!r}" if self.tokenizer is not None else i for i in found]
        return UnknownTokenError(
            f"PartialEmbedding: {where} has {len(found)} token id(s) outside the kept {len(self.ids)} of {self.size}: "
            f"{shorten(names, 10)}; add them to ids (PartialEmbedding.scan over all data the run uses), or set "
            f'unknown="grow" or unknown="fetch"'
        )

    # -- growth -------------------------------------------------------------------------------------------------

    def grow(self, new_ids) -> int:
        """Take more ids into the kept vocabulary: rows from the store, zero moments, the step count kept.

        Returns how many ids were new. Call it between steps.
        """
        wanted = torch.as_tensor(list(new_ids) if not torch.is_tensor(new_ids) else new_ids.reshape(-1).cpu())
        if wanted.numel() and not (int(wanted.min()) >= 0 and int(wanted.max()) < self.size):
            raise IndexError(f"grow: ids must lie in [0, {self.size}), got {int(wanted.min())}..{int(wanted.max())}")
        union = torch.unique(torch.cat([self.ids, wanted.to(torch.int64)]))
        added = len(union) - len(self.ids)
        if added == 0:
            return 0
        if processes.count() > 1:
            raise self.growth_refused()
        self._refuse_strange_states(len(union))
        old_ids, full = self.ids, [codec.decode(_held(module, attribute)) for codec, module, attribute in self.tables]
        self._set(union)
        into = torch.searchsorted(self.ids, old_ids)
        for (codec, module, attribute), table in zip(self.tables, full):
            codec.home, codec.decay = to_host(table, self.dropped), 1.0
            tensor = _held(module, attribute)
            self._regroup(tensor, into.to(tensor.device), _rows(table, self.ids).to(tensor.device))
        self._refresh()
        return added

    def growth_refused(self) -> StateError:
        """The error for a vocabulary that would grow in each of several processes by itself."""
        return StateError(
            f"PartialEmbedding(unknown='grow'): the vocabulary cannot grow in a run of {processes.count()} processes, "
            f"their tables would differ; give all ids the data use (PartialEmbedding.scan) and unknown='error'"
        )

    def _regroup(self, tensor: torch.Tensor, into: torch.Tensor, grown: torch.Tensor) -> None:
        """Put `grown` under the same tensor object and move its gradient and moments to their new rows."""
        rows = len(tensor)
        for optimizer in self._optimizers:
            state = optimizer.state.get(tensor, {})
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape[:1] == (rows,):
                    state[key] = value.new_zeros(len(grown), *value.shape[1:]).index_copy_(0, into, value)
        gradient, tensor.grad = tensor.grad, None
        # a graph that is still alive holds the old shape; only a change of dtype makes autograd look again
        tensor.data = grown.new_empty(0, dtype=torch.float16 if grown.dtype != torch.float16 else torch.float32)
        tensor.data = grown
        if gradient is not None:
            tensor.grad = torch.zeros_like(grown).index_copy_(0, into, gradient)

    def _refuse_strange_states(self, rows: int) -> None:
        """Moments go row by row with the table, or have its later `rows` already, where they are from a checkpoint.

        A state of another layout (8-bit blocks) cannot be taken along.
        """
        for _, module, attribute in self.tables:
            tensor = _held(module, attribute)
            for optimizer in self._optimizers:
                for key, value in optimizer.state.get(tensor, {}).items():
                    if not torch.is_tensor(value) or value.numel() == 1:
                        continue
                    by_row = value.shape[:1] in (tensor.shape[:1], (rows,))
                    by_column = value.numel() == tensor[0].numel()
                    if not value.is_floating_point() or not (by_row or by_column):
                        raise StateError(
                            f"PartialEmbedding: the vocabulary cannot grow: {type(optimizer).__name__} keeps {key!r} "
                            f"of shape {tuple(value.shape)} and dtype {value.dtype} for a table of shape "
                            f"{tuple(tensor.shape)}, which has no rows to add; scan all data first, or use AdamW"
                        )

    def _refresh(self) -> None:
        slots, positions = self.slots(), self.positions()
        for module in self.lookups:
            old = module._buffers[SLOT]
            assert old is not None
            module._buffers[SLOT] = slots.to(old.device)
            set_lookup_facts(module, self)
        for module in self.heads:
            old = module._buffers[POSITION]
            assert old is not None
            module._buffers[POSITION] = positions.to(old.device)

    # -- part hooks ---------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """From now on see every optimizer step, whoever made the optimizer."""
        if self._watch is None:
            hook = register_optimizer_step_pre_hook(_BeforeStep(weakref.ref(self)))
            self._watch = weakref.finalize(self, hook.remove)

    def unwatch(self) -> None:
        if self._watch is not None:
            self._watch()
            self._watch = None

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        self._follow(optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember an optimizer of our tables, and by how much its weight decay would shrink their dropped rows."""
        codecs = {id(_held(module, attribute)): codec for codec, module, attribute in self.tables}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                codec = codecs.get(id(parameter))
                if codec is None:
                    continue
                self._follow(optimizer)
                if self.decay_dropped and parameter.grad is not None:
                    codec.decay *= 1.0 - float(group["lr"]) * float(group["weight_decay"])

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        if self.decay_dropped and not isinstance(optimizer, torch.optim.AdamW):
            raise ValueError(
                f"PartialEmbedding(decay_dropped=True): {type(optimizer).__name__} moves unused rows by more than a "
                f"factor; only the decoupled weight decay of torch.optim.AdamW can be reproduced"
            )
        self._optimizers.add(optimizer)

    def tensors(self) -> dict[str, torch.Tensor]:
        if not self.decay_dropped:
            return {}
        return {"decay": torch.tensor([codec.decay for codec in self.codecs], dtype=torch.float64)}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for codec, decay in zip(self.codecs, tensors.get("decay", torch.empty(0)).tolist()):
            if not codec.given:
                codec.decay = decay

    def training_tensors(self) -> dict[str, torch.Tensor]:
        return {"ids": self.ids} if len(self.ids) != len(self.first_ids) else {}

    def load_training_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.grow(tensors["ids"])

    def recipe_fields(self) -> dict[str, Any]:
        now = tuple(self.ids.tolist())
        return {} if now == self.first_ids else {"ids": now}

    def host_bytes(self) -> int:
        return sum(c.home.numel() * c.home.element_size() for c in self.codecs)

    def report(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "rows_kept": len(self.ids) if self.tables else self.size,
            "rows_stock": self.size,
            "head": self.head,
            "host_bytes": self.host_bytes(),
        }
        if self.outside_labels is not None:
            facts["labels_outside"] = int(self.outside_labels)
        if self.mass:
            facts["dropped_probability"] = sum(self.mass) / len(self.mass)
        return facts

    def note_mass(self, mass: float) -> None:
        """Record the probability that the full model puts on dropped rows, and warn once when it matters."""
        self.mass.append(mass)
        if mass > 1e-2 and sum(m > 1e-2 for m in self.mass) == 1:
            warnings.warn(
                f"PartialEmbedding(head='pruned'): the full model puts {mass:.1%} of its probability on dropped "
                f"tokens; the loss is biased low by about that much. Use head='split' for the exact loss.",
                stacklevel=2,
            )

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(Vocabulary)
        # optimizers belong to the original; id tensors are replaced, never written to
        shared = {"tokenizer": self.tokenizer, "ids": self.ids, "dropped": self.dropped}
        own: dict[str, Any] = {"_optimizers": weakref.WeakSet(), "_watch": None}
        for key, value in vars(self).items():
            twin.__dict__[key] = (
                own[key] if key in own else shared[key] if key in shared else copy.deepcopy(value, memo)
            )
        if self._watch is not None:
            twin.watch()
        return twin


def _held(module: nn.Module, attribute: str) -> torch.Tensor:
    return getattr(module, attribute)


def set_lookup_facts(module: Any, vocabulary: Vocabulary) -> None:
    """Keep an embedding's `num_embeddings` and `padding_idx` true for its kept rows."""
    padding = module.__dict__["_tight_padding_idx"]
    row = -1 if padding is None else int(torch.searchsorted(vocabulary.ids, padding))
    present = padding is not None and row < len(vocabulary.ids) and int(vocabulary.ids[row]) == padding
    module.padding_idx = row if present else None
    module.num_embeddings = len(vocabulary.ids)


class _BeforeStep:
    def __init__(self, vocabulary: weakref.ref[Vocabulary]):
        self.vocabulary = vocabulary

    def __call__(self, optimizer, args, kwargs):
        vocabulary = self.vocabulary()
        if vocabulary is not None:
            vocabulary.before_step(optimizer)
