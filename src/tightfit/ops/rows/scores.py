"""Guesses, made in forward, at how long the rows of the output's gradient will be."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.ops.rows.valid import FLOOR


class Scores:
    """Base: what a layer has learnt of its gradients' rows."""

    def expected(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """(n,) non-negative guesses for an input of `shape`, on the device of `like`; never 0."""
        raise NotImplementedError

    def keep(self) -> tuple[Tensor, ...]:
        """What of this forward `observe` needs in backward."""
        return ()

    def observe(self, lengths: Tensor, shape: Sequence[int], *kept: Tensor) -> None:
        """Learn from the lengths (n,) of the gradient's rows."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What it has learnt, to be saved: always the same names, with empty tensors where nothing was seen."""
        raise NotImplementedError

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        raise NotImplementedError


class Running(Scores):
    """A running mean of the lengths by position in the sequence.

    Works from the first step on (all positions equal), in one epoch, on streams, at any length: a position that was
    never seen counts as the mean of those that were.
    """

    def __init__(self, decay: float = 0.9):
        self.decay = decay
        self.mean: Tensor | None = None  # (positions,); NaN where nothing was seen

    def expected(self, shape, like):
        length = shape[-2] if len(shape) > 1 else 1
        if self.mean is None:
            return torch.ones_like(like)
        known = _longer(self.mean.to(like.device), length)
        typical = known.nanmean().nan_to_num(nan=1.0).clamp(min=torch.finfo(torch.float32).tiny)
        guess = torch.where(known.isnan(), typical, known).clamp(min=FLOOR * typical)[:length]
        return guess.to(like.dtype).repeat(like.shape[0] // length)

    def observe(self, lengths, shape, *kept):
        length = shape[-2] if len(shape) > 1 else 1
        now = lengths.float().view(-1, length).mean(0)
        now = torch.where(now.isfinite(), now, torch.nan)
        if self.mean is None:
            self.mean = now
            return
        known = _longer(self.mean.to(now.device), length)
        first = known[:length]
        mixed = torch.where(first.isnan(), now, torch.where(now.isnan(), first, first.lerp(now, 1 - self.decay)))
        self.mean = torch.cat([mixed, known[length:]])

    def tensors(self):
        return {"mean": torch.empty(0) if self.mean is None else self.mean}

    def load(self, tensors):
        self.mean = _seen(tensors.get("mean"))


class Cached(Scores):
    """The lengths of each example's rows when it was last seen, in bfloat16 on the host (the paper's way).

    Args:
        examples: rows of the data set; the batch names those it holds (`sample_index`).

    Raises:
        RuntimeError: a forward without indices, or of another length than the first.
    """

    def __init__(self, examples: int):
        self.examples = examples
        self.lengths: Tensor | None = None  # (examples, L) bfloat16; NaN where nothing was seen

    def keep(self):
        index = _index.get()
        if index is None:
            raise RuntimeError(
                "WtaCrs(scores='cache') was given no sample indices: pass `sample_index`, the (B,) numbers of the "
                "examples in the data set, with every training batch (and leave checkpointing out), or take "
                "scores='running' or scores='mask', which need none"
            )
        return (index,)

    def expected(self, shape, like):
        (index,) = self.keep()
        if len(shape) != 3 or index.shape[0] != shape[0]:
            return torch.ones_like(like)
        if self.lengths is None:
            self.lengths = torch.full((self.examples, shape[1]), torch.nan, dtype=torch.bfloat16)
        if self.lengths.shape[1] != shape[1]:
            raise RuntimeError(
                f"WtaCrs(scores='cache') keeps a length per position: the first batch had {self.lengths.shape[1]} "
                f"positions, this one has {shape[1]}; pad to a fixed length, or take scores='running' or 'mask'"
            )
        known = self.lengths.index_select(0, index.to("cpu")).to(like.device, torch.float32)
        typical = known.nanmean().nan_to_num(nan=1.0).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(known.isnan(), typical, known).clamp(min=FLOOR * typical).view(-1).to(like.dtype)

    def observe(self, lengths, shape, *kept):
        if self.lengths is not None and kept and lengths.numel() == kept[0].shape[0] * self.lengths.shape[1]:
            now, index = lengths.view(-1, self.lengths.shape[1]).to("cpu", torch.bfloat16), kept[0].to("cpu")
            # a step that overflowed under a loss scale tells nothing
            now = torch.where(now.isfinite(), now, self.lengths.index_select(0, index))
            self.lengths.index_copy_(0, index, now)

    def tensors(self):
        return {"lengths": torch.empty(0, 0, dtype=torch.bfloat16) if self.lengths is None else self.lengths}

    def load(self, tensors):
        found = _seen(tensors.get("lengths"))
        self.lengths = None if found is None else found.clone()  # it is written to


def _seen(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is not None and tensor.numel() else None


_index: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("index", default=None)


@contextlib.contextmanager
def sample_index(index: Tensor | None) -> Iterator[None]:
    """While active, `Cached` knows which examples (B,) the batch holds."""
    token = _index.set(index)
    try:
        yield
    finally:
        _index.reset(token)


def _longer(known: Tensor, length: int) -> Tensor:
    """Padded with NaN to at least `length` positions."""
    missing = length - known.shape[0]
    return known if missing <= 0 else torch.cat([known, known.new_full((missing,), torch.nan)])
