"""What attention does where there is memory: records that travel with the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.methods.learnable_memory.places import Site, site_of
from tightfit.methods.token_tune.records import Capture

MEMORY = "tight_memory"
"""Name of the modules that are added to the blocks."""

Attend = Callable[..., tuple[Tensor, Any]]


@dataclasses.dataclass
class Slots:
    """The memory of one block, on its way into keys and values."""

    site: Site
    memory: Any
    normed: bool

    def rows(self, task: str) -> Tensor:
        """E of a task, (m, d)."""
        return self.memory.of(task)

    def projected(self, tasks: Sequence[str], like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tasks' memory, each (B, H, M, D) as `like` is."""
        rows = torch.cat([self.rows(task) for task in tasks])
        norm: Any = self.site.norm
        rows = rows.to(norm.weight.dtype)
        if self.normed:
            rows = norm(rows)
        batch, heads, _, width = like.shape

        def split(projection: Any) -> Tensor:
            out = projection(rows[None]).to(like.dtype)
            return out.view(1, rows.shape[0], heads, width).transpose(1, 2).expand(batch, -1, -1, -1)

        return split(self.site.key), split(self.site.value)


def slots_of(model: nn.Module, blocks: str, normed: bool) -> dict[nn.Module, Slots]:
    """Attention module -> its memory, for the blocks that the model has now."""
    found: dict[nn.Module, Slots] = {}
    inside: Any = model.get_submodule(blocks)
    for index, block in enumerate(inside):
        site = site_of(block, f"{blocks}.{index}")
        found[site.attention] = Slots(site, block._modules.get(MEMORY), normed)
    return found


class Shared:
    """All tokens attend to the memory of one task too."""

    def __init__(self, slots: dict[nn.Module, Slots], task: str):
        self.slots, self.task = slots, task

    def attend(self, call: Attend, module, query, key, value, mask, kwargs):
        keys, values = self.slots[module].projected([self.task], key)
        if mask is not None:
            mask = F.pad(mask, (0, keys.shape[2]), value=True if mask.dtype == torch.bool else 0.0)
        return call(module, query, torch.cat([key, keys], 2), torch.cat([value, values], 2), mask, **kwargs)


class Rows:
    """The class tokens of tasks attend to what was captured, and to their own class token and memory.

    Args:
        slots: attention module -> its memory.
        capture: keys, values and masks of the frozen model.
        tasks: the tasks, one row each; none: a row that only looks, for a check.
        extension: a row sees the earlier ones and their memory too.
        keep: blocks will run again in backward, so what was captured stays.
        extend: what is made here is captured too.
    """

    def __init__(
        self,
        slots: dict[nn.Module, Slots],
        capture: Capture,
        tasks: Sequence[str],
        *,
        extension: bool = False,
        keep: bool = False,
        extend: bool = False,
    ):
        self.slots, self.capture, self.tasks = slots, capture, list(tasks)
        self.extension, self.keep, self.extend = extension, keep, extend

    def attend(self, call: Attend, module, query, key, value, mask, kwargs):
        store = self.capture.kv
        keys, values = store[module] if self.keep or self.extend else store.pop(module)
        seen = keys.shape[2]
        if self.tasks:
            memory = self.slots[module].projected(self.tasks, key)
            keys, values = torch.cat([keys, key, memory[0]], 2), torch.cat([values, value, memory[1]], 2)
        if self.extend:
            store[module] = keys, values
        kwargs["is_causal"] = False
        return call(module, query, keys, values, self.mask(module, query, seen), **kwargs)

    def mask(self, module: nn.Module, query: Tensor, seen: int) -> Tensor | None:
        """What each row may look at, additive (B or 1, 1, R, S); None: everything."""
        given = self.capture.masks[module][0]
        if given is None and len(self.tasks) < 2:
            return None
        sizes = [self.slots[module].rows(task).shape[0] for task in self.tasks]
        rows = range(query.shape[2])
        visible = [[j == i or (self.extension and j < i) for j in rows] for i in rows] if self.tasks else []
        lines = [[*line, *(see for see, size in zip(line, sizes) for _ in range(size))] for line in visible] or [[]]
        own = torch.tensor(lines, dtype=torch.bool, device=query.device).view(1, 1, len(lines), -1)
        if given is None:
            stored = own.new_ones(1, 1, len(lines), seen)
        else:  # what the old class token may look at; tasks seen before are no part of the stock mask
            stored = given[:, :, :1] if given.dtype == torch.bool else given[:, :, :1] == 0
            stored = F.pad(stored, (0, seen - stored.shape[-1]), value=True).expand(-1, -1, len(lines), -1)
        allowed = torch.cat([stored, own.expand(stored.shape[0], stored.shape[1], -1, -1)], -1)
        return torch.zeros_like(allowed, dtype=query.dtype).masked_fill_(~allowed, -torch.inf)
