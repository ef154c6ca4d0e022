"""The living side of an applied RecurrentMemory: cuts the rows, hands the memory on, joins what comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tightfit.core.calls import argument_names, pooled_place, returns_dict
from tightfit.core.edits import Part
from tightfit.core.hfmodel import has_values
from tightfit.methods.recurrent_memory import layout
from tightfit.methods.recurrent_memory.facts import Facts
from tightfit.methods.recurrent_memory.layout import Piece
from tightfit.methods.recurrent_memory.reading import Request, first_memory, pickers, with_field
from tightfit.ops.replay import Replay, drops

IGNORED = -100
Stock = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of RecurrentMemory that the run needs; `depth` is None for the full gradient."""

    tokens: int
    segment: int
    depth: int | None
    replay: bool
    both_ways: bool
    align: str
    curriculum: int | None


class Recurrence(Part):
    """Runs a model segment by segment.

    Attributes:
        request: what the reader shall do with its next call; None: the reader is called by itself.
        steps: training forwards so far.
        decoding: the `generate` under way, or None.
        sizes: segments and tokens of the last call.
    """

    def __init__(self, settings: Settings, facts: Facts):
        self.settings, self.facts = settings, facts
        self.request: Request | None = None
        self.steps = 0
        self.decoding: Any = None
        self.sizes: tuple[int, int] | None = None

    # -- a part of the recipe ------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = {"segment": self.settings.segment, "steps": self.steps}
        if self.sizes is not None:
            found["segments"], found["length"] = self.sizes
        return found

    def training_tensors(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps)}

    def load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.steps = int(tensors["steps"])

    def __deepcopy__(self, memo: dict) -> Recurrence:
        twin = memo[id(self)] = Recurrence(self.settings, self.facts)
        twin.steps = self.steps
        return twin

    # -- one call ------------------------------------------------------------------------------------------------

    def run(self, model: nn.Module, reader: nn.Module, stock: Stock, call: dict[str, Any], head: str) -> Any:
        """The output of a whole call.

        Args:
            model: the module that was called. reader: the one that takes the memory.
            stock: the model's own forward.
            call: its arguments by name.
            head: as in `Facts`; "hidden" where the reader itself was called.
        """
        main = check_call(call, self.facts, head)
        given = dict(call)
        rows, length = main.shape[:2]
        mask = call.get("attention_mask")
        segment = self.settings.segment
        self.sizes = (max(-(-(length - self.facts.framing) // segment), 1), length)
        training = bool(model.training and torch.is_grad_enabled())
        if self.settings.tokens == 0 and self.sizes[0] == 1:
            return stock(**given)
        tuple_wanted = not returns_dict(model, call.pop("return_dict", None))
        labels, targets, total = self._labels(call, head, mask)
        if "use_cache" in argument_names(model):
            call["use_cache"] = False
        moved = source = None
        if self.facts.causal and head in ("causal", "hidden"):
            moved = layout.shifted_to_left(mask)
            if moved is not None:
                call = {k: _moved(v, moved) if aligned(v, rows, length) else v for k, v in call.items()}
                mask, targets = call["attention_mask"], targets if targets is None else _moved(targets, moved)
            pieces = layout.pieces_from_start(length, segment, mask)
        else:
            ends = layout.pieces_to_end(
                rows,
                length,
                segment,
                mask,
                framing=self.facts.framing,
                align=self.settings.align,
                device=main.device,
            )
            pieces, source = ends.pieces, ends.source
        labelled = targets is not None or (head == "pooled" and labels is not None)
        if training and labelled:
            pieces, total = self._stage(pieces, targets, total, main)
        step = functools.partial(self._step, model, stock, call, targets, total, head, (rows, length), not training)
        pooled = labels if head == "pooled" else None
        results, last = self._loop(model, reader, pieces, step, main, rows, training, pooled)
        out = self._joined(results, last, head, targets, training, source, moved, length)
        return out.to_tuple() if tuple_wanted else out

    def _labels(self, call: dict[str, Any], head: str, mask: Any) -> tuple[Any, Tensor | None, Any]:
        """(labels as given, (B, L) the target of each token or None, number that losses are divided by)."""
        if head == "hidden":
            return None, None, None
        labels = call.pop("labels", None)
        if head == "pooled":
            return labels, None, None
        shifted, items = call.pop("shift_labels", None), call.pop("num_items_in_batch", None)
        if shifted is not None:
            targets = shifted
        elif labels is None:
            return None, None, None
        else:
            targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.facts.shifts else labels
        if torch.is_tensor(mask):
            # a target of padding belongs to no segment
            targets = targets.masked_fill(mask.eq(0).to(targets.device), IGNORED)
        count = targets.ne(IGNORED).sum().clamp_min(1)
        return labels, targets, count if items is None else items

    def _stage(self, pieces: list[Piece], targets: Tensor | None, total: Any, main: Tensor) -> tuple[list[Piece], Any]:
        """The pieces of the curriculum's stage; a loss counts by its batch's share of all targets as before."""
        now, every = self.steps, self.settings.curriculum
        self.steps += 1
        if every is None or not has_values(main):
            return pieces, total
        count = now // every + 1
        if count >= len(pieces):
            return pieces, total
        kept = pieces[:count] if isinstance(pieces[0].columns, slice) else pieces[-count:]
        if targets is None:
            return kept, total
        used = sum(self._targets(piece, targets).ne(IGNORED).sum() for piece in kept)
        share = used / targets.ne(IGNORED).sum().clamp_min(1)  # type: ignore[operator]
        return kept, total * share.clamp_min(1e-12)

    @staticmethod
    def _targets(piece: Piece, targets: Tensor) -> Tensor:
        """The targets of a piece's tokens, each token once."""
        own = piece.take(targets)
        if piece.own is not None:
            own = own.masked_fill(~piece.own, IGNORED)
        return own

    def _loop(self, model, reader, pieces, step, main, rows, training, labels) -> tuple[list[Any], Any]:
        memory = first_memory(reader, rows, main)
        results = []
        out = None
        for number, piece in enumerate(pieces, 1):
            last = number == len(pieces)
            run = functools.partial(step, piece, labels if last else None)
            if last or not (self.settings.replay and torch.is_grad_enabled()):
                result, memory, out = run(memory, whole=True)
            else:
                result, memory = again(run, memory, model, reader)
            results.append(result)
            if self.settings.depth is not None and number % (self.settings.depth + 1) == 0:
                memory = memory.detach()
        return results, out

    def _step(
        self, model, stock, call, targets, total, head, shape, all_logits, piece: Piece, labels, memory, whole=False
    ):
        """(loss or outputs of the segment's tokens, memory behind it, and where `whole` the model's output)."""
        rows, length = shape
        own = {k: piece.take(v) if aligned(v, rows, length) else v for k, v in call.items()}
        main = own["input_ids"] if own.get("input_ids") is not None else own["inputs_embeds"]
        mask = piece.mask(main.shape[1])
        own["attention_mask"] = None if mask is None else mask.long()
        if mask is not None and own.get("input_ids") is not None:
            own["input_ids"] = own["input_ids"].masked_fill(~mask, self.facts.padding or 0)
        picking = bool(pickers(model)) and targets is not None
        if labels is not None:
            own["labels"] = labels
        elif picking:
            # they take the loss over the tokens that are left, in the order in which the reader sees them
            where = self._targets(piece, targets)
            own["labels"] = own["shift_labels"] = self._spread(where)
            own["num_items_in_batch"] = total
        request = Request(memory, counts=piece.counts)
        if self.facts.framing:
            assert piece.counts is not None
            at = (piece.counts - 1).view(-1, 1, *[1] * (main.dim() - 2)).expand(-1, 1, *main.shape[2:])
            request.behind = main.gather(1, at)
        elif head == "pooled":
            request.pooled = self._pooled(own.get("input_ids"), main, piece.counts)
        self.request = request
        try:
            out = stock(**own, return_dict=True)
        finally:
            self.request = None
        assert request.written is not None
        written = piece.chosen(request.written, memory)
        if head == "hidden":
            result = out.last_hidden_state
        elif head == "pooled":
            result = None
        elif picking:
            result = out.loss
        elif targets is not None:
            result = self._loss(out.logits, self._targets(piece, targets), total)
            if all_logits:
                result = (result, out.logits)
        else:
            result = out.logits
        return (result, written, out) if whole else (result, written)

    def _pooled(self, ids: Tensor | None, main: Tensor, counts: Tensor | None) -> Tensor:
        """(B, 1): the column that a decoder's classifier reads."""
        if ids is not None and self.facts.padding is not None:
            return pooled_place(ids, self.facts.padding)
        every = torch.full(main.shape[:1], main.shape[1], device=main.device)
        return (every if counts is None else counts)[:, None] - 1

    def _spread(self, targets: Tensor) -> Tensor:
        """(B, W) -> (B, T): the targets with the memory's places between them, which have none."""
        slots = self.settings.tokens
        if not self.facts.framing or not slots:
            return F.pad(targets, (slots, slots), value=IGNORED)
        between = torch.full_like(targets[:, :1], IGNORED).expand(-1, slots + 1)
        return torch.cat([targets[:, :1], between, targets[:, 1:]], 1)

    def _loss(self, logits: Tensor, targets: Tensor, total: Any) -> Tensor:
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        flat = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(flat, targets.reshape(-1).to(logits.device), ignore_index=IGNORED, reduction="sum")
        return loss / (total.to(loss.device) if torch.is_tensor(total) else total)

    def _joined(self, results, last, head, targets, training, source, moved, length) -> Any:
        if head == "pooled":
            return with_field(last)
        loss = None
        if targets is not None:
            losses = [r[0] if isinstance(r, tuple) else r for r in results]
            loss = functools.reduce(torch.add, losses)
            if not isinstance(results[0], tuple):
                return with_field(last, loss=loss, logits=None)
            results = [r[1] for r in results]
        joined = torch.cat(list(results), 1)
        if source is not None:
            joined = _gathered(joined, source)
        elif moved is not None:
            joined = _gathered(joined, moved.argsort(1))
        return (
            with_field(last, last_hidden_state=joined)
            if head == "hidden"
            else with_field(last, loss=loss, logits=joined)
        )


class _FirstRun:
    """The context of a segment's run in forward: what it drew is kept if it drew at all."""

    def __init__(self, state: Replay, reader: nn.Module, real: bool):
        self.state, self.reader, self.real = state, reader, real

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        self.state.settle(draws=drops(self.reader), real=self.real)


class _SecondRun:
    """The context of its run in backward. A kept graph is gone through several times, so it can be entered anew."""

    def __init__(self, state: Replay, parts: Sequence[Any]):
        self.state, self.choices = state, [(part, part.draws()) for part in parts]

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for part, choice in self.choices:
                stack.callback(part.restore_draws, part.draws())
                part.restore_draws(choice)
            stack.enter_context(self.state.again())
            self.running = stack.pop_all()

    def __exit__(self, *exc: Any) -> None:
        self.running.__exit__(*exc)


@torch._disable_dynamo  # as torch.compiler.disable, which would import the compiler with the package
def again(run: Callable[..., Any], memory: Tensor, model: nn.Module, reader: nn.Module) -> Any:
    """Run a segment and keep the memory before it only; in backward it runs again as it ran."""
    state = Replay(memory.device.type, True, model)
    contexts = _FirstRun(state, reader, has_values(memory)), _SecondRun(state, pickers(reader))
    return checkpoint(run, memory, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


def check_call(call: dict[str, Any], facts: Facts, head: str) -> Tensor:
    """The batch's ids or embeddings.

    Raises:
        ValueError: a call that cannot be cut into segments.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        given = "both" if ids is not None else "neither"
        raise ValueError(f"RecurrentMemory: got {given} of input_ids and inputs_embeds; give exactly one of them")
    main: Tensor = ids if ids is not None else embeds  # type: ignore[assignment]
    if main.dim() != (2 if ids is not None else 3) or 0 in main.shape[:2]:
        raise ValueError(
            f"RecurrentMemory: got a batch of shape {tuple(main.shape)}; accepted is (rows, tokens), none of them 0"
        )
    if call.get("past_key_values") is not None:
        raise ValueError(
            "RecurrentMemory: past_key_values were given; segments share their memory only. Use generate() to decode"
        )
    if call.get("position_ids") is not None:
        raise ValueError(
            "RecurrentMemory: position_ids were given, but positions begin anew in every segment (packed rows "
            "cannot be cut into segments); leave them out"
        )
    for name in ("output_hidden_states", "output_attentions", "output_router_logits", "logits_to_keep"):
        value = call.get(name)
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise ValueError(f"RecurrentMemory: {name}={value} was given; it is not kept over segments. Leave it out")
    mask = call.get("attention_mask")
    if mask is not None:
        if not torch.is_tensor(mask) or mask.shape != main.shape[:2]:
            shape = tuple(getattr(mask, "shape", ()))
            raise ValueError(
                f"attention_mask: got shape {shape}, RecurrentMemory accepts {tuple(main.shape[:2])}, 0 for padding"
            )
        layout.refuse_gaps(mask)
    for name in ("labels", "shift_labels"):
        labels = call.get(name)
        if labels is not None and head in ("causal", "token") and labels.shape != main.shape[:2]:
            raise ValueError(
                f"{name}: got shape {tuple(labels.shape)}, RecurrentMemory accepts {tuple(main.shape[:2])}, one for "
                f"each token of the whole row"
            )
    return main


def aligned(value: Any, rows: int, length: int) -> bool:
    """Whether a tensor has an entry for each token."""
    return torch.is_tensor(value) and value.dim() >= 2 and value.shape[:2] == (rows, length)


def _moved(value: Tensor, index: Tensor) -> Tensor:
    return _gathered(value, index.to(value.device))


def _gathered(value: Tensor, index: Tensor) -> Tensor:
    """(B, N, ...) and (B, L) -> (B, L, ...)."""
    wide = index.view(*index.shape, *[1] * (value.dim() - 2))
    return value.gather(1, wide.expand(*index.shape, *value.shape[2:]))
