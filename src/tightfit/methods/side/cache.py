"""What a frozen backbone makes of an example, computed once and kept in mapped files for later epochs.

An example is known by its own tokens (pixels, ...): what a mask hides does not count, so a batch may be padded to
another length. States at hidden places come back as zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tightfit.core.hfmodel import has_values, storage_keys
from tightfit.core.host import map_file
from tightfit.ops.autograd import autocast_dtype, version

SEGMENT_BYTES = 2**25
RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What blocks that do not run cannot give."""

PASSED_ON = ("num_items_in_batch", "use_cache", "return_dict")
"""Arguments on which no state depends."""

Setting = bool | int | float | str


@dataclasses.dataclass
class Slot:
    """Where the tokens of one example are: rows [start, start + count) of a segment, `skip` tokens into the example."""

    segment: int
    start: int
    skip: int
    count: int


class Lookup:
    """One forward: the examples of its batch, and whether all of them are kept already."""

    def __init__(self, cache: FeatureCache, examples: list[tuple[bytes, int, int | None]]):
        self.cache, self.examples = cache, examples
        self.keys = [key for key, _, _ in examples]
        self.served = all(key in cache.slots for key in self.keys)
        self.pending: dict[int, Slot] = {}

    def features(self, tokens: int, device: torch.device) -> Tensor:
        """All columns of the batch, (batch, tokens, columns), zeros at hidden places."""
        out = torch.zeros(len(self.keys), tokens, self.cache.columns, dtype=self.cache.dtype)
        for row, (key, skip, _) in enumerate(self.examples):
            slot = self.cache.slots[key]
            kept = self.cache.segments[slot.segment]
            out[row, skip : skip + slot.count] = kept[slot.start : slot.start + slot.count]
        self.cache.hits += len(self.keys)
        return out.to(device)

    def open(self, columns: int, tokens: int, dtype: torch.dtype) -> None:
        """Make room for the examples that are not kept yet, as far as the limit allows."""
        cache = self.cache
        cache.misses += len(self.keys)
        if columns != cache.columns or dtype != cache.dtype:
            cache.clear()
            cache.columns, cache.dtype = columns, dtype
        claimed = set()
        for row, (key, skip, count) in enumerate(self.examples):
            if key not in cache.slots and key not in claimed:
                slot = cache.room(skip, tokens if count is None else count)
                if slot is None:
                    break
                self.pending[row] = slot
                claimed.add(key)

    def write(self, column: int, values: Tensor) -> None:
        """Keep columns [column, column + width) of the new examples, from (batch, tokens, width)."""
        width = values.shape[-1]
        for row, slot in self.pending.items():
            rows = self.cache.segments[slot.segment][slot.start : slot.start + slot.count]
            rows[:, column : column + width].copy_(values[row, slot.skip : slot.skip + slot.count].detach())

    def close(self) -> None:
        """All columns are written: later forwards may read them."""
        for row, slot in self.pending.items():
            self.cache.slots[self.keys[row]] = slot


class FeatureCache:
    """Outputs of a frozen backbone by example, at most `limit` bytes of them, for as long as the process lives.

    Attributes:
        hits, misses: examples that were read, and that the backbone was run for.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.stamp: Any = None
        self.current: Lookup | None = None
        self.hits = self.misses = 0
        self.columns, self.dtype = 0, torch.float32
        self.clear()

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = FeatureCache(self.limit)  # a copy of the model may train on: it starts an empty one
        return twin

    def clear(self) -> None:
        """Forget everything."""
        self.slots: dict[bytes, Slot] = {}
        self.segments: list[Tensor] = []
        self.used = 0
        self.full = False

    @property
    def bytes(self) -> int:
        """Bytes of the mapped files."""
        return sum(segment.nbytes for segment in self.segments)

    @contextlib.contextmanager
    def looking(self, backbone: Any, args: tuple, kwargs: Mapping[str, Any], own: str) -> Iterator[None]:
        """While active, a runner may take the call's examples; `own` names modules that are not the backbone's."""
        self.current = self._begin(backbone, args, kwargs, own)
        try:
            yield
        finally:
            self.current = None

    def _begin(self, backbone: Any, args: tuple, kwargs: Mapping[str, Any], own: str) -> Lookup | None:
        """Look the examples of a call up; None where they cannot be known (no values, hidden states are asked for)."""
        given = inspect.signature(type(backbone).forward).bind_partial(backbone, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        asked = any(given.get(key) or getattr(backbone.config, key, False) for key in RECORDED)
        used = {key: v for key, v in given.items() if v is not None and v is not backbone and key not in PASSED_ON}
        tensors = {key: value for key, value in used.items() if torch.is_tensor(value)}
        settings = {key: value for key, value in used.items() if isinstance(value, Setting)}
        if asked or not tensors or len(tensors) + len(settings) < len(used):  # a dict of masks, say
            return None
        if torch.compiler.is_compiling() or not all(map(has_values, tensors.values())):
            return None
        size = len(next(iter(tensors.values())))
        if any(value.dim() == 0 or len(value) != size for value in tensors.values()):
            return None
        stamp = self._stamp_of(backbone, next(iter(tensors.values())).device, own)
        if stamp != self.stamp:
            self.clear()
            self.stamp = stamp
        return Lookup(self, list(_examples(tensors, settings, size)))

    def take(self) -> Lookup | None:
        """The call's examples, for the first run of the stack in it."""
        found, self.current = self.current, None
        return found

    def _stamp_of(self, backbone: Any, device: torch.device, own: str) -> tuple:
        """Changes when the backbone's weights and buffers do, or what it computes in."""
        held = (*backbone.named_parameters(), *backbone.named_buffers())
        weights = tuple(_state_of(tensor) for name, tensor in held if own not in name.split("."))
        return str(device), autocast_dtype(device.type), weights

    def room(self, skip: int, count: int) -> Slot | None:
        """Rows for one example, or None when the limit is reached."""
        if self.full:
            return None
        if not self.segments or self.used + count > len(self.segments[-1]):
            row = self.columns * self.dtype.itemsize
            rows = min(max(count, SEGMENT_BYTES // row), (self.limit - self.bytes) // row)
            if rows < count or not self._grow(rows):
                self.full = True
                warnings.warn(
                    f"LadderSide(cache_bytes={self.limit}): full after {len(self.slots)} examples; batches with "
                    f"another one run the backbone again",
                    UserWarning,
                    stacklevel=2,
                )
                return None
        slot = Slot(len(self.segments) - 1, self.used, skip, count)
        self.used += count
        return slot

    def _grow(self, rows: int) -> bool:
        try:
            self.segments.append(map_file((rows, self.columns), self.dtype))
        except (OSError, RuntimeError, AttributeError):  # no space, or no mapping
            return False
        self.used = 0
        return True


def _state_of(tensor: Tensor) -> tuple:
    """Changes when the tensor is written to, or gets another memory or type; not with a write through its `.data`."""
    return id(tensor), version(tensor), tensor.dtype, frozenset(storage_keys([tensor]))


def _examples(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Setting], size: int
) -> Iterator[tuple[bytes, int, int | None]]:
    """For each example a digest of what the model reads, its first token that counts, and how many do (None: all)."""
    host = {key: value.detach().cpu() for key, value in sorted(tensors.items())}
    mask = host.get("attention_mask")
    same = repr(sorted(settings.items())).encode()
    for row in range(size):
        first, count = _span(mask[row]) if mask is not None and mask.dim() == 2 else (0, None)
        digest = hashlib.blake2b(same, digest_size=16)
        for key, value in host.items():
            own = value[row]
            if count is not None and mask is not None and own.shape == mask[row].shape:
                own = own[first : first + count]
            digest.update(f"{key} {tuple(own.shape)} {own.dtype} {first}".encode())
            digest.update(own.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        yield digest.digest(), first, count


def _span(mask: Tensor) -> tuple[int, int | None]:
    """(first token that counts, how many follow it in one piece, or None)."""
    seen = mask.nonzero().flatten().tolist()
    whole = bool(seen) and seen[-1] - seen[0] + 1 == len(seen)
    return (seen[0], len(seen)) if whole else (0, None)
