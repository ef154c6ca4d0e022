"""Row sampling as a codec: a linear layer keeps some rows of its input, or samples in backward where all are there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.ops.codec import Codec, Like, outer, rows_of
from tightfit.ops.rows.scores import Scores
from tightfit.ops.rows.torch import Sample, kept_rows, row_norms, sample_rows, weight_grad, weighted
from tightfit.ops.rows.valid import row_factor

_NORMS = "_tightfit_norms"


class Rows(Codec):
    """k of n rows, such that the weight gradient formed from them is right in the mean.

    Args:
        budget: fraction of rows kept.
        mode: "pps" or "wta".
        min_rows: keep at least as many.
        scores: what stands for the length of the gradient's rows, which forward cannot know; None: nothing does.
        watch: record how noisy the estimates are, see `noise`.

    Scores are |x| times that, and in backward, where x is at hand because others keep what rebuilds it, |x| |dy|.

    Attributes:
        noise: (2,) running means of the sampling variance and of the squared norm of the estimate.

    Source: arXiv 2305.15265, section 3.
    """

    rebuilds = False

    def __init__(
        self, budget: float, mode: str = "pps", min_rows: int = 16, scores: Scores | None = None, watch: bool = False
    ):
        self.budget, self.mode, self.min_rows = budget, mode, min_rows
        self.scores, self.watch = scores, watch
        self.noise: Tensor | None = None

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        k = kept_rows(flat.shape[0], self.budget, self.min_rows)
        if k == flat.shape[0]:
            return (x,)
        scores, factor = row_norms(flat), row_factor(x.shape)
        if factor is not None:
            scores = scores * factor
        if self.scores is not None:
            scores = scores * self.scores.expected(x.shape, scores)
        sample = sample_rows(scores, k, mode=self.mode)
        rows = flat.index_select(0, sample.rows)
        kept = (rows,) if self.inner is None else self.inner.encode(rows)
        learnt = () if self.scores is None else self.scores.keep()
        return *learnt, *kept, sample.rows.int(), sample.weights

    def weight_grad(self, packed: Sequence[Tensor], grad: Tensor, like: Like, transposed: bool) -> Tensor:
        if len(packed) == 1:
            return outer(grad, packed[0].reshape(-1, like.shape[-1]), transposed)
        count = len(packed) - 2 - (1 if self.inner is None else self.inner.parts)
        learnt, kept, (index, weights) = packed[:count], packed[count:-2], packed[-2:]
        rows = kept[0]
        if self.inner is not None:
            rows = self.inner.decode(kept, torch.Size((index.shape[0], like.shape[-1])), like.dtype)
        if self.scores is not None:
            self.scores.observe(row_norms(grad), like.shape, *learnt)
        return self._estimate(rows, Sample(index, weights), grad, transposed)

    def weight_grad_of(self, grad: Tensor, x: Tensor, transposed: bool) -> Tensor:
        lengths = self.note(x)
        if lengths is None:
            return outer(grad, x, transposed)
        return self.weight_grad_of_rows(grad, lengths, functools.partial(x.index_select, 0), transposed)

    def note(self, x: Tensor) -> Tensor | None:
        n = x.shape[0]
        return None if kept_rows(n, self.budget, self.min_rows) == n else _norms_once(x)

    def weight_grad_of_rows(
        self, grad: Tensor, noted: Tensor, rows: Callable[[Tensor], Tensor], transposed: bool
    ) -> Tensor:
        sample = self._sample(grad, noted)
        return self._estimate(rows(sample.rows), sample, grad, transposed)

    def sampled(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.note(x)
        if lengths is None:
            return grad, x
        sample = self._sample(grad, lengths)
        return weighted(grad, sample), x.index_select(0, sample.rows)

    def _sample(self, grad: Tensor, lengths: Tensor) -> Sample:
        """Rows drawn by |x| |dy|."""
        k = kept_rows(len(lengths), self.budget, self.min_rows)
        return sample_rows(lengths * row_norms(grad), k, mode=self.mode)

    def _estimate(self, rows: Tensor, sample: Sample, grad: Tensor, transposed: bool) -> Tensor:
        found = weight_grad(rows, sample, grad, transposed=transposed)
        if self.watch:
            lengths = row_norms(rows) * row_norms(grad.index_select(0, sample.rows))
            # of a draw without replacement, taken as independent: an upper bound but for rounding
            variance = (sample.weights * (sample.weights - 1) * lengths.square()).sum()
            now = torch.stack([variance.float(), torch.linalg.vector_norm(found).float().square()])
            self.noise = now if self.noise is None else self.noise.lerp(now, 0.1)
        return found

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        n = rows_of(shape)
        k = kept_rows(n, self.budget, self.min_rows)
        whole = torch.Size((k, shape[-1]))
        rows = self.inner.nbytes(whole, dtype) if self.inner is not None and k < n else k * shape[-1] * dtype.itemsize
        return rows if k == n else rows + 8 * k

    def shares_with(self, other: Codec) -> bool:
        if not isinstance(other, Rows):
            return False
        inner = self.inner is other.inner or (self.inner is not None and other.inner is not None)
        mine, theirs = ((r.budget, r.mode, r.min_rows, type(r.scores)) for r in (self, other))
        return mine == theirs and inner


def _norms_once(x: Tensor) -> Tensor:
    """The lengths of the rows of x; siblings read views of one tensor, which remembers them."""
    owner = x if x._base is None or x._base.numel() != x.numel() else x._base
    known: tuple[int, Tensor] | None = getattr(owner, _NORMS, None)
    if known is None or known[0] != x._version or known[1].shape[0] != x.shape[0]:
        known = (x._version, row_norms(x))
        setattr(owner, _NORMS, known)
    return known[1]
