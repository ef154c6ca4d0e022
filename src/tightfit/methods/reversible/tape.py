"""One tape per forward: it carries the streams up, and what is got back of them down again.

Each half step is one autograd Function. It keeps the bits that a division dropped, and by reference the arguments of
its block's call. Only the last one keeps the streams; in backward each hands them, one step earlier, to the one below.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tightfit.core.errors import StateError
from tightfit.core.hfmodel import has_values, storage_key
from tightfit.core.recording import note
from tightfit.methods.reversible.replay import Extras, Part
from tightfit.methods.reversible.streams import Fixed, Floating, Half, Streams
from tightfit.methods.reversible.tiles import Tiled
from tightfit.ops.autograd import inner_gradients, refuse_second_derivative, saved_apart, version
from tightfit.ops.replay import Replay

Numbers = Fixed | Floating


class Tape:
    """The streams of one forward.

    Attributes:
        numbers: what the streams are made of.
        halves: the half steps of a block.
        edges: the streams as the tensors that autograd knows, while the forward runs.
    """

    def __init__(self, numbers: Numbers, halves: tuple[Half, ...], hidden: Tensor, debug: bool = False):
        self.numbers, self.halves, self.debug = numbers, halves, debug
        opened = numbers.open(hidden)
        self.streams: Streams | None = (opened, opened)
        self.edges: list[Tensor] = [hidden, hidden]
        self.steps = 0
        self.nodes: dict[int, weakref.ref] = {}
        self.reached: tuple[int, Streams] | None = None
        self._seen: tuple | None = None

    def enter(self, hidden: Tensor, name: str) -> None:
        """A block is called with `hidden`, which must be what the block before gave.

        Raises:
            StateError: the model changed the states between two blocks.
        """
        if self._seen is not None:
            if self._seen != _look(hidden):
                raise StateError(
                    f"Reversible: the input of block {name} is not the output of the block before it, so the model "
                    f"changes the states between its blocks; keep Reversible to a span without that place (span=...)"
                )
            self.edges[1] = hidden

    def leave(self) -> Tensor:
        """What the block returns."""
        if len(self.halves) > 1 and any(edge.requires_grad for edge in self.edges):
            # who waits for the gradient of what a block returns (FSDP) is called before the half of the other stream
            self.edges = list(_Together.apply(*self.edges))
        self._seen = _look(self.edges[1])
        return self.edges[1]

    def close(self) -> None:
        """The forward is over: what backward needs is kept by the graph."""
        self.streams, self.edges = None, []

    def run(self, half: Half, part: Part, name: str, *, draws: bool, last: bool, keep: bool) -> Any:
        """Take the half step; returns the part's further outputs."""
        assert self.streams is not None
        given = part.take_tensors()
        old, read = self.edges[1 - half.reads], self.edges[half.reads]
        self.steps += 1
        step = _Step(self, half, part, name, self.steps, last, keep)
        wanted = any(t.requires_grad for t in (old, read, *part.parameters, *given))
        if torch.is_grad_enabled() and wanted:
            step.replay = Replay(read.device.type, random=True, module=part.module)
            value, *made = _Reverse.apply(step, old, read, *part.parameters, *given)
            step.replay.settle(draws, has_values(read))
        else:
            value, made = step.first(self._x(half, read), given)
        self.edges = list(half.after(read, value))
        if step.extras is None:
            return None
        rest, noted = step.extras.filled(made, given)
        note(noted)
        return rest

    def _x(self, half: Half, read: Tensor) -> Tensor:
        assert self.streams is not None
        return self.numbers.value(self.streams[half.reads], read.dtype)

    def after(self, number: int) -> Streams:
        """The streams after step `number`, in backward."""
        reached, self.reached = self.reached, None
        if reached is not None and reached[0] == number:
            return reached[1]
        node = self.nodes.get(number + 1, lambda: None)()
        if node is None:
            raise StateError(
                "Reversible: a gradient starts at an inner hidden state, and what follows it in the stack was let go "
                "of, so its streams cannot be had back; keep the model's output until backward is over"
            )
        return node.step.before(node.saved_tensors)


def _look(tensor: Tensor) -> tuple:
    return storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), version(tensor)


class _Step:
    """One half step of one forward; holds no tensor but the random state."""

    replay: Replay
    needs: tuple[bool, ...]
    versions: tuple[int, ...]
    extras: Extras | None = None

    def __init__(self, tape: Tape, half: Half, part: Part, name: str, number: int, last: bool, keep: bool):
        self.tape, self.half, self.part, self.name, self.number = tape, half, part, name, number
        self.last, self.keep = last, keep
        self.lowest = self.dropped = False
        self.given = 0
        self.fixed: list[bool] = []
        self.dtype = torch.float32

    def first(self, x: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the part and move the streams on: (the new stream's value, further new tensors)."""
        value, made, _ = self.forward(x, given, lambda: self.part(x, given))
        return value, made

    def forward(
        self, x: Tensor, given: Sequence[Tensor], run: Callable[[], tuple[Tensor, Any]]
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        tape, half, numbers = self.tape, self.half, self.tape.numbers
        assert tape.streams is not None
        old, read = tape.streams[1 - half.reads], tape.streams[half.reads]
        out, rest = run()
        if out.shape != read.shape:
            raise StateError(
                f"Reversible: block {self.name} changes the shape of the states from {tuple(read.shape)} to "
                f"{tuple(out.shape)}; only blocks that keep it can be run in reverse"
            )
        if rest is not None:
            self.extras = Extras(rest, given)
        dtype = out.dtype
        with torch.no_grad():
            new, dropped = numbers.forward(half, old, read, x.detach(), out.detach())
            made = self.extras.made(rest) if self.extras is not None else []
            self.fixed = [not t.requires_grad for t in made]
            made = [t.detach() for t in made]
            del out, rest
            bad = numbers.out_of_range(new)
            tape.streams = half.after(read, new)
            if bad is not None and has_values(bad) and (bad.device.type == "cpu" or tape.debug) and bool(bad):
                raise StateError(self._overflow())
            return numbers.value(new, dtype, bad), made, dropped

    def _overflow(self) -> str:
        bits = getattr(self.tape.numbers, "bits", 0)
        return (
            f"Reversible: at block {self.name} the states are infinite, not a number, or too large for fixed point "
            f"with {bits} bits behind the point (up to {2 ** (29 - bits):,}); if the model's own states are finite, "
            f"give fewer bits, such as Reversible(bits={max(0, bits - 4)})"
        )

    # -- in backward ------------------------------------------------------------------------------------------------

    def again(self, x: Tensor, given: Sequence[Tensor], keeping: bool) -> tuple[Tensor, Any]:
        """The part's outputs with their graph, or without what a graph keeps."""
        apart = saved_apart() if keeping else torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing)
        with torch.enable_grad(), apart:
            return self.part(x, given)

    def parameter_versions(self) -> tuple[int, ...]:
        """Changes when somebody writes to a parameter that trains."""
        return tuple(p._version for p in self.part.parameters)

    def check(self) -> None:
        """Raise where the part cannot run as it ran."""
        if self.parameter_versions() != self.versions:
            raise StateError(
                f"Reversible: a parameter of block {self.name} was modified between the forward and its backward (an "
                f"optimizer step?), so the block's input cannot be had back; run the backward first, or the forward "
                f"again"
            )

    def leaves(self, given: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        return [t.detach().requires_grad_() if need else t.detach() for t, need in zip(given, needs)]

    def after(self, saved: Sequence[Tensor]) -> Streams:
        """The streams after this step; `saved` is what it kept."""
        return (saved[-2], saved[-1]) if self.last else self.tape.after(self.number)

    def before(self, saved: Sequence[Tensor]) -> Streams:
        """The streams before this step, where its own backward does not run."""
        if self.keep:
            return saved[-2], saved[-1]
        self.check()
        read, new = self.half.split(self.after(saved))
        x = self.tape.numbers.value(read, self.dtype).requires_grad_(self.needs[1])
        given = self.leaves(saved[: self.given], self.needs[2 + len(self.part.parameters) :])
        with self.replay.again():
            out, _ = self.again(x, given, keeping=False)
        return self.half.before(read, self.undo(new, read, x, out, saved))

    def run_again(
        self, x: Tensor, given: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor, Callable[[], list[Tensor | None]]]:
        """The part's first output, and what makes the gradients of (the stream that is read, parameters, arguments)."""
        needs = self.needs[1:]
        if isinstance(self.part, Tiled) and not self.part.whole and grads[0] is not None:
            out, found = self.part.backward(self.replay, x, given, needs, grads[0])
            return out, lambda: found
        with self.replay.again():
            out, rest = self.again(x, given, keeping=True)
        outputs = [out, *(self.extras.made(rest) if self.extras is not None else [])]
        # edges hold the graph, but not what it led to
        pairs = [
            (get_gradient_edge(t), g.to(t.dtype)) for t, g in zip(outputs, grads) if g is not None and t.requires_grad
        ]
        wanted = [t for t, need in zip([x, *self.part.parameters, *given], needs) if need]

        def gradients() -> list[Tensor | None]:
            found: Any = iter(())
            if pairs and wanted:
                edges, sent = zip(*pairs)
                found = iter(inner_gradients(edges, wanted, sent))
            return [next(found, None) if need else None for need in needs]

        return out, gradients

    def undo(self, new: Tensor, read: Tensor, x: Tensor, out: Tensor, saved: Sequence[Tensor]) -> Tensor:
        dropped = saved[self.given] if self.dropped else None
        with torch.no_grad():
            return self.tape.numbers.inverse(self.half, new, read, x.detach(), out.detach(), dropped)

    def backward(self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of (old stream, stream that is read, parameters, arguments)."""
        self.check()
        tape, half, count = self.tape, self.half, len(self.part.parameters)
        new: Tensor | None = None
        if self.keep:
            streams = (saved[-2], saved[-1])
            read = streams[half.reads]
        else:
            read, new = half.split(self.after(saved))
        x = tape.numbers.value(read, self.dtype).requires_grad_(self.needs[1])
        given = self.leaves(saved[: self.given], self.needs[2 + count :])
        out, gradients = self.run_again(x, given, grads)
        if self.lowest:
            tape.reached = None
        elif self.keep:
            tape.reached = (self.number - 1, streams)
        else:
            assert new is not None
            tape.reached = (self.number - 1, half.before(read, self.undo(new, read, x, out, saved)))
        del new, read, saved, x, out, given
        result = gradients()
        grad = grads[0]
        if grad is None:
            return [None, *result]
        if half.about and self.needs[1]:
            result[0] = grad * -half.factor if result[0] is None else result[0].sub(grad, alpha=half.factor)
        return [grad * half.factor if self.needs[0] else None, *result]


def _nothing(tensor: Any) -> Any:
    return None


class _Together(torch.autograd.Function):
    """Both streams as they are, through one node: neither gradient goes on before the other is there."""

    @staticmethod
    def forward(ctx, *streams):
        ctx.set_materialize_grads(False)
        return tuple(stream.view_as(stream) for stream in streams)

    @staticmethod
    def backward(ctx, *grads):
        return grads


class _Reverse(torch.autograd.Function):
    """A half step whose inputs are not kept."""

    @staticmethod
    def forward(ctx, step: _Step, old: Tensor, read: Tensor, *tensors: Tensor):
        tape, count = step.tape, len(step.part.parameters)
        given = tensors[count:]
        step.needs = (old.requires_grad, read.requires_grad, *(t.requires_grad for t in tensors))
        step.versions = step.parameter_versions()
        step.given, step.dtype = len(given), read.dtype
        # below the first step that trains nothing asks for the streams
        step.lowest = not (old.requires_grad or read.requires_grad)
        x = tape._x(step.half, read).requires_grad_(read.requires_grad)
        leaves = step.leaves(given, step.needs[2 + count :])
        assert tape.streams is not None
        before = tape.streams
        # the same kernels as in backward, where a graph is asked for; this one keeps nothing
        value, made, dropped = step.forward(x, leaves, lambda: step.again(x, leaves, keeping=False))
        kept: list[Tensor] = [*before] if step.keep else []
        if not step.keep:
            if dropped is not None and not step.lowest:
                step.dropped = True
                kept.append(dropped)
            kept += tape.streams if step.last else ()
        ctx.step = step
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, fixed in zip(made, step.fixed) if fixed))
        ctx.save_for_backward(*given, *kept)
        tape.nodes[step.number] = weakref.ref(ctx)
        return value, *made

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivative("Reversible")
        return None, *ctx.step.backward(ctx.saved_tensors, grads)
