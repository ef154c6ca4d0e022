"""A token Turing machine over a stream of token sets, as a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.ops.segment_replay import segment_replay

UNITS = ("transformer", "simplified")
SUMMARISERS = ("mlp", "query")
WRITES = ("summarise", "erase_add")
STD = 0.02
QUERY_HEADS = 8


class TokenTuringStream(nn.Module):
    """Reads sets of tokens one after another, with a memory of `memory` tokens between them.

    A step reads `tokens` tokens from memory and input together, works on these, emits them, and writes memory, input
    and output back to memory. So a step costs the same at any time. In training the inside of one step is kept, and the
    memory between steps: the steps run again in backward, with the gradients of plain backpropagation through time.

    Args:
        width: of the tokens, d.
        inputs: the most tokens of one set; needed for `positions`.
        tokens: read and emitted in a step.
        memory: tokens of memory.
        unit: "transformer" works on the tokens read, and memory is written apart from that; "simplified" works on
            memory and tokens read together, in fixed places, and what becomes of the memory is the next memory.
        layers, mlp, heads, dropout: of the transformer.
        summariser: tokens are summed up with weights from an "mlp", or by learned queries ("query", 8 heads).
        summariser_width: of that MLP.
        positions: every place of memory, input and output has an embedding.
        write: "summarise"; or "erase_add": every token emitted erases a share of each memory token, between none and
            all, and adds to it.
        replay: False keeps everything instead of running steps again.

    Raises:
        TypeError, ValueError: a number out of range; heads that do not divide the width; `positions` without `inputs`.

    Example:
        >>> stream = TokenTuringStream(24, inputs=5, tokens=2, memory=4, heads=4, layers=1, mlp=32)
        >>> outputs, memory = stream(torch.randn(3, 7, 5, 24))
        >>> tuple(outputs.shape), tuple(memory.shape)
        ((3, 7, 2, 24), (3, 4, 24))
        >>> more, memory = stream(torch.randn(3, 1, 5, 24), memory)  # the stream goes on
    """

    def __init__(
        self,
        width: int,
        *,
        inputs: int | None = None,
        tokens: int = 8,
        memory: int = 64,
        unit: str = "transformer",
        layers: int = 4,
        mlp: int = 512,
        heads: int = 12,
        dropout: float = 0.0,
        summariser: str = "mlp",
        summariser_width: int = 64,
        positions: bool = True,
        write: str = "summarise",
        replay: bool = True,
    ):
        super().__init__()
        numbers = {"width": width, "tokens": tokens, "memory": memory, "layers": layers, "mlp": mlp, "heads": heads}
        for name, value in {**numbers, "summariser_width": summariser_width, "inputs": inputs}.items():
            if value is not None:
                _check_count(name, value)
        for name, given, allowed in (
            ("unit", unit, UNITS),
            ("summariser", summariser, SUMMARISERS),
            ("write", write, WRITES),
        ):
            if given not in allowed:
                raise ValueError(f"TokenTuringStream({name}=...): got {given!r}, accepted is one of {allowed}")
        check_heads("TokenTuringStream", width, heads, summariser)
        if not 0 <= dropout < 1:
            raise ValueError(f"TokenTuringStream(dropout=...): got {dropout}, accepted is a number in [0, 1)")
        if positions and inputs is None:
            raise ValueError(
                "TokenTuringStream(positions=True): needs inputs=..., the most tokens of one set; or give "
                "positions=False"
            )
        if unit == "simplified" and write != "summarise":
            raise ValueError(
                f"TokenTuringStream(unit='simplified'): got write={write!r}, but this unit gives the next memory "
                f"itself; leave `write` out"
            )
        self.width, self.inputs, self.tokens, self.slots = width, inputs, tokens, memory
        self.unit_kind, self.write_kind, self.replay, self.dropout = unit, write, replay, dropout
        self.read = _summariser(summariser, width, tokens, summariser_width)
        self.unit = Unit(width, layers, mlp, heads, dropout)
        self.read_places = Places(width, memory, inputs or 0, 0) if positions else None
        self.write_places: Places | None = None
        self.write: nn.Module | None = None
        if unit == "transformer" and write == "summarise":
            self.write = _summariser(summariser, width, memory, summariser_width)
            self.write_places = Places(width, memory, inputs or 0, tokens) if positions else None
        elif write == "erase_add":
            self.write = EraseAdd(width, memory)

    def start(self, x: Tensor) -> Tensor:
        """The memory that a stream begins with, zeros: (B, m, d) for inputs (B, ...)."""
        return x.new_zeros(x.shape[0], self.slots, self.width)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read a stream.

        Args:
            x: (B, T, N, d).
            memory: (B, m, d), of an earlier call; None: the stream begins.
            mask: (B, T, N) bool, which tokens are real; a set without any leaves the memory as it is, and gives zeros.

        Returns:
            (outputs (B, T, p, d), memory (B, m, d))
        """
        self._check(x, memory, mask)
        state = self.start(x) if memory is None else memory
        given = list(zip(x.unbind(1), [None] * x.shape[1] if mask is None else mask.unbind(1)))
        if self.replay and len(given) > 1 and torch.is_grad_enabled():
            random = self.training and self.dropout > 0
            own = list(self.parameters())
            outputs, state = segment_replay(self.step, state, given, own, random=random, module=self)
        else:
            outputs = []
            for part in given:
                out, state = self.step(state, part)
                outputs.append(out)
        return torch.stack(outputs, 1), state

    def step(self, memory: Tensor, given: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """One step: (outputs (B, p, d), next memory) of a memory and (tokens (B, N, d), mask (B, N) or None)."""
        x, mask = given
        both = torch.cat([memory, x], 1)
        seen = None if mask is None else F.pad(mask, (self.slots, 0), value=True)
        z = self.read(both if self.read_places is None else both + self.read_places(x.shape[1]), seen)
        if self.unit_kind == "simplified":
            found = self.unit(torch.cat([memory, z], 1))
            after, out = found[:, : self.slots], found[:, self.slots :]
        else:
            out = self.unit(z)
            after = self._written(memory, x, both, out, seen)
        if mask is not None:
            alive = mask.any(1)[:, None, None]
            after, out = torch.where(alive, after, memory), torch.where(alive, out, torch.zeros_like(out))
        return out, after

    def _written(self, memory: Tensor, x: Tensor, both: Tensor, out: Tensor, seen: Tensor | None) -> Tensor:
        assert self.write is not None
        if self.write_kind == "erase_add":
            return self.write(memory, out)
        every = torch.cat([both, out], 1)
        if self.write_places is not None:
            every = every + self.write_places(x.shape[1])
        return self.write(every, None if seen is None else F.pad(seen, (0, self.tokens), value=True))

    def _check(self, x: Tensor, memory: Tensor | None, mask: Tensor | None) -> None:
        where = "TokenTuringStream: "
        if x.dim() != 4 or x.shape[-1] != self.width:
            raise ValueError(f"{where}got inputs of shape {tuple(x.shape)}, accepted is (B, T, N, {self.width})")
        if 0 in x.shape[:3]:
            raise ValueError(f"{where}got inputs of shape {tuple(x.shape)}; a stream needs rows, steps and tokens")
        if self.inputs is not None and x.shape[2] > self.inputs:
            raise ValueError(f"{where}got sets of {x.shape[2]} tokens, this stream takes up to {self.inputs}")
        wanted = (x.shape[0], self.slots, self.width)
        if memory is not None and tuple(memory.shape) != wanted:
            raise ValueError(f"{where}got a memory of shape {tuple(memory.shape)}, accepted is {wanted}")
        if mask is not None and (mask.shape != x.shape[:3] or mask.dtype != torch.bool):
            raise ValueError(
                f"{where}got a mask of shape {tuple(mask.shape)} and {mask.dtype}, accepted is bool and "
                f"{tuple(x.shape[:3])}"
            )

    def extra_repr(self) -> str:
        return f"{self.width}, tokens={self.tokens}, memory={self.slots}, inputs={self.inputs}"


def check_heads(owner: str, width: int, heads: int, summariser: str) -> None:
    """Raise ValueError where heads do not divide the width."""
    for count, what in (
        (heads, "heads"),
        (QUERY_HEADS if summariser == "query" else 1, "heads of the query summariser"),
    ):
        if width % count:
            raise ValueError(f"{owner}: the width {width} is not divisible by {count} {what}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"TokenTuringStream({name}=...): got {value!r} ({type(value).__name__}), accepted is an int")
    if value < 1:
        raise ValueError(f"TokenTuringStream({name}=...): got {value}, accepted is an int >= 1")


def _summariser(kind: str, width: int, count: int, inner: int) -> nn.Module:
    return Summariser(width, count, inner) if kind == "mlp" else QuerySummariser(width, count)


class Places(nn.Module):
    """An embedding for every place of memory, input and output."""

    def __init__(self, width: int, memory: int, inputs: int, outputs: int):
        super().__init__()
        self.memory = nn.Parameter(torch.randn(memory, width) * STD)
        self.inputs = nn.Parameter(torch.randn(inputs, width) * STD)
        self.outputs = nn.Parameter(torch.randn(outputs, width) * STD) if outputs else None

    def forward(self, inputs: int) -> Tensor:
        """(memory + inputs + outputs, d)."""
        parts = [self.memory, self.inputs[:inputs]]
        return torch.cat(parts if self.outputs is None else [*parts, self.outputs])


class Summariser(nn.Module):
    """softmax over tokens (MLP(LN(V)))^T V: k tokens, each a mean of the tokens given with weights of its own."""

    def __init__(self, width: int, count: int, inner: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, count)

    def weights(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, k, N) of tokens (B, N, d): not negative, and each row sums to 1."""
        scores = self.down(F.gelu(self.up(self.norm(tokens)))).mT
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(-1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.weights(tokens, mask) @ tokens


class QuerySummariser(nn.Module):
    """k learned queries attend to the tokens, with 8 heads."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, width) * STD)
        self.norm, self.kv, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        key, value = (_heads(t, QUERY_HEADS) for t in self.kv(self.norm(tokens)).chunk(2, -1))
        query = _heads(self.queries[None].to(key.dtype), QUERY_HEADS).expand(len(tokens), -1, -1, -1)
        seen = None if mask is None else mask[:, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out(found.transpose(1, 2).flatten(2))


class EraseAdd(nn.Module):
    """M * prod over writers (1 - w e) + sum over writers w a.

    A writer's address w (a softmax over memory tokens) comes from its likeness to a memory token and to that token's
    place; what it erases e is in [0, 1] for every channel, so memory is never turned around.
    """

    def __init__(self, width: int, memory: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(memory, width) * STD)
        self.norm, self.key, self.query = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.erase, self.add = nn.Linear(width, width), nn.Linear(width, width)

    def address(self, memory: Tensor, writers: Tensor) -> Tensor:
        """(B, p, m), each row sums to 1."""
        keys = self.key(self.norm(memory + self.places))
        return (self.query(writers) @ keys.mT / writers.shape[-1] ** 0.5).softmax(-1)

    def forward(self, memory: Tensor, writers: Tensor) -> Tensor:
        w, e = self.address(memory, writers), torch.sigmoid(self.erase(writers))
        left: Any = 1.0
        for at, erased in zip(w.unbind(1), e.unbind(1)):  # one writer at a time: (B, p, m, d) is large
            left = left * (1 - at[..., None] * erased[:, None])
        return memory * left + w.mT @ self.add(writers)


class Unit(nn.Module):
    """Transformer layers, the norm in front, and one behind."""

    def __init__(self, width: int, layers: int, mlp: int, heads: int, dropout: float):
        super().__init__()
        self.depth = layers
        for index in range(layers):  # no ModuleList: that would be taken for a stack of the model's own blocks
            self.add_module(f"layer_{index}", Layer(width, mlp, heads, dropout))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth):
            x = getattr(self, f"layer_{index}")(x)
        return self.norm(x)


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, mlp: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(t, self.heads) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        found = F.scaled_dot_product_attention(q, k, v)
        x = x + self.drop(self.out(found.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_2(x)))))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, d) as (B, heads, N, d / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
