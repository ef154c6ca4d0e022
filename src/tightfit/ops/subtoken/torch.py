"""Sub-token projections: of each group of M channels of a token, its component along one direction v (VeLoRA).

The rank-one estimate x_hat = s t v^T is never made. From t (n, G) and the output's gradient Y (n, O) the weight
gradient is A = Y^T t, an (O, G) matrix M times cheaper than Y^T x, spread along v. The estimate is biased unless v is
drawn anew at each step: what of a sub-token is orthogonal to v is lost to the weight gradient, and to nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.ops.codec import Codec, Like, outer, rows_of
from tightfit.ops.rows import row_factor

INITS = ("batch_average_once", "batch_average", "random", "random_unbiased")

# rows that are widened or padded at a time, so that no second x is ever in memory
_CHUNK = 256
_TINY = 1e-12


class Subtoken(Codec):
    """Keeps one number per sub-token of M = ceil(I / groups) channels: 1 / M of the input's bytes.

    Args:
        width: I, the channels of a token.
        groups: G, sub-tokens per token; the last is padded with zeros. Where M is rounded up so far that fewer
            sub-tokens hold all channels, only those are kept.
        init: the direction v (M,). "batch_average_once": the mean sub-token of the first batch; "batch_average": of
            each batch (padding left out where `attention_masks` knows it); "random": drawn once; "random_unbiased":
            drawn for each step and the estimate scaled by M, so that its mean is x and its relative variance about
            M - 1 (give groups such that M <= 8).
        scale: factor of the estimate, and so of the weight gradient.
        seed: tells the random directions of several layers apart; torch's own seed is mixed in, its state not touched.

    Raises:
        ValueError: groups outside [1, width], scale not above 0, unknown init; an input of another width (encode).

    State: `direction` and `settled` of the modes that keep their direction, `seed` and `draws` of "random_unbiased"
    (see `state`). Under torch.distributed a mean that is kept is that over all processes' rows, and a
    random direction comes from rank 0.

    Example:
        >>> codec, x = Subtoken(4, groups=2), torch.tensor([[3.0, 4.0, 6.0, 8.0]])
        >>> packed = codec.encode(x)
        >>> packed[0], codec.decode(packed, x.shape, x.dtype)
        (tensor([[ 5., 10.]]), tensor([[3., 4., 6., 8.]]))

    Source: arXiv 2405.17991, section 3. Deviations: the weight gradient without the rebuilt input; "random_unbiased".
    """

    rebuilds = False  # `decode` is for looking at; a linear layer wants `weight_grad`
    least = 0

    def __init__(
        self, width: int, groups: int = 32, init: str = "batch_average_once", scale: float = 1.0, *, seed: int = 0
    ):
        if not 1 <= groups <= width:
            raise ValueError(f"groups is {groups}; a token of {width} channels is cut into 1 to {width} groups")
        if not scale > 0:
            raise ValueError(f"scale is {scale}; give a number above 0")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; choose one of {', '.join(INITS)}")
        self.width, self.groups, self.init, self.scale = width, groups, init, scale
        self.size = -(-width // groups)
        self.count = -(-width // self.size)
        self.seed = _mixed(torch.initial_seed(), seed)
        self.draws = 0
        self.settled = False
        self.direction = self._drawn() if init == "random" else torch.zeros(self.size)

    @property
    def keeps_direction(self) -> bool:
        """Whether v is the layer's, not the step's."""
        return self.init in ("batch_average_once", "random")

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[-1] != self.width:
            raise ValueError(f"the input has {x.shape[-1]} channels; this codec was made for {self.width}")
        rows = x.reshape(-1, self.width)
        direction = self._direction(x, rows)
        codes = self._project(rows, direction.to(x.dtype))
        return (codes,) if self.keeps_direction else (codes, direction)

    def decode(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        codes, direction = packed[0].to(dtype), self._kept_direction(packed).to(dtype)
        rows = (codes.unsqueeze(-1) * (direction * self.factor)).flatten(1)
        return rows[:, : self.width].reshape(shape)

    def weight_grad(self, packed: Sequence[Tensor], grad: Tensor, like: Like, transposed: bool) -> Tensor:
        direction = self._kept_direction(packed).to(grad.dtype)
        along = outer(grad, packed[0].to(grad.dtype), transposed).mul_(self.factor)  # (O, G), or (G, O)
        self.draws += 1  # here, so that a recomputed forward draws what the forward drew
        if transposed:
            return (along.unsqueeze(1) * direction.unsqueeze(1)).flatten(0, 1)[: self.width]
        return (along.unsqueeze(2) * direction).flatten(1)[:, : self.width]

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        codes = rows_of(shape) * self.count * dtype.itemsize
        return codes if self.keeps_direction else codes + self.size * torch.float32.itemsize

    def shares_with(self, other: Codec) -> bool:
        return False  # each layer has its direction, and a step its own

    @property
    def factor(self) -> float:
        """What the projection is multiplied by."""
        return self.scale * (self.size if self.init == "random_unbiased" else 1)

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name; empty where every step finds its direction by itself."""
        if self.keeps_direction:
            return {"direction": self.direction, "settled": torch.tensor(self.settled)}
        if self.init == "random_unbiased":
            return {"seed": torch.tensor(self.seed), "draws": torch.tensor(self.draws)}
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if "direction" in state:
            self.direction.copy_(state["direction"])
            self.settled = bool(state["settled"])
        if "seed" in state:
            self.seed, self.draws = int(state["seed"]), int(state["draws"])

    # -- the direction -------------------------------------------------------------------------------------------

    def _direction(self, x: Tensor, rows: Tensor) -> Tensor:
        """v for these rows, float32; settles it where the layer keeps one."""
        if self.init == "random_unbiased":
            return self._drawn().to(rows.device)
        if self.init == "batch_average":
            return self._average(x, rows)
        if self.direction.device != rows.device:
            self.direction = self.direction.to(rows.device)
        if not self.settled:
            if self.init == "batch_average_once":
                self.direction.copy_(self._average(x, rows, over_processes=True))
            else:
                _from_first_rank(self.direction)
            self.settled = True
        return self.direction

    def _kept_direction(self, packed: Sequence[Tensor]) -> Tensor:
        return self.direction if self.keeps_direction else packed[1]

    def _drawn(self) -> Tensor:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.draws))
        return _unit(torch.randn(self.size, generator=generator))

    def _average(self, x: Tensor, rows: Tensor, over_processes: bool = False) -> Tensor:
        factor = row_factor(x.shape)
        valid = None if factor is None else (factor == 1).float()
        if valid is None and rows.dtype in (torch.float32, torch.float64):
            total = rows.sum(0)
        else:
            total = rows.new_zeros(self.width, dtype=torch.float32)
            for start in range(0, rows.shape[0], _CHUNK):
                part = rows[start : start + _CHUNK].float()
                total += part.sum(0) if valid is None else valid[start : start + _CHUNK] @ part
        if over_processes and _several(total):
            dist.all_reduce(total)  # only its direction counts, so the number of rows need not be summed
        mean = F.pad(total, (0, self.count * self.size - self.width)).view(self.count, self.size).sum(0)
        return _unit(mean / (rows.shape[0] * self.groups)).float()

    def _project(self, rows: Tensor, direction: Tensor) -> Tensor:
        """z . v for every sub-token: (n, I) -> (n, G)."""
        column, missing = direction.unsqueeze(1), self.count * self.size - self.width
        if not missing:
            return (rows.reshape(-1, self.size) @ column).view(-1, self.count)
        codes = rows.new_empty(rows.shape[0], self.count)
        for start in range(0, rows.shape[0], _CHUNK):
            part = F.pad(rows[start : start + _CHUNK], (0, missing)).view(-1, self.size)
            codes[start : start + _CHUNK] = (part @ column).view(-1, self.count)
        return codes


def _unit(vector: Tensor) -> Tensor:
    """The vector with length 1; all components equal where it has none that is a number."""
    norm = torch.linalg.vector_norm(vector)
    even = torch.full_like(vector, vector.numel() ** -0.5)
    return torch.where(norm.isfinite() & (norm >= _TINY), vector / norm, even)


def _several(vector: Tensor) -> bool:
    """Whether there are processes to agree with; a plan talks to nobody."""
    return dist.is_available() and dist.is_initialized() and not isinstance(vector, FakeTensor)


def _from_first_rank(vector: Tensor) -> None:
    """Every process gets the vector of rank 0."""
    if _several(vector):
        dist.broadcast(vector, src=0)


def _mixed(*numbers: int) -> int:
    """A seed that depends on all the numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")
