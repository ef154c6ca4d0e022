"""The living side of an applied TokenTune: draws the tokens of each step and runs the model on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.calls import hidden_states
from tightfit.core.edit import Picker
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.methods.token_tune import policies
from tightfit.methods.token_tune.facts import Facts
from tightfit.methods.token_tune.policies import Counter, Draw, Selection
from tightfit.methods.token_tune.records import KEY, Capture, Grouped, Replay
from tightfit.ops.overwrite import overwrite, take
from tightfit.ops.replay import own_casts

Stock = Callable[..., Any]


@dataclasses.dataclass
class Request:
    """What the head asks of one call of the runner.

    Attributes:
        rows: the runner shall return the selected rows only, for a loss on each; else all tokens, of which the others
            are constants.
        labelled: (B, L) bool, the token's target is not ignored; or None.
        keep: (B, n) further positions that must be selected, or None.
        positions, scores: from the caller, or None.
        real: (B, L) bool where the mask of the runner's call does not tell padding; or None.
        items: number of targets that the trainer divides by, or None.
        selection: what was selected, once the runner has run.
    """

    rows: bool = False
    labelled: Tensor | None = None
    keep: Tensor | None = None
    positions: Tensor | None = None
    scores: Tensor | None = None
    real: Tensor | None = None
    items: Any = None
    selection: Selection | None = None


@dataclasses.dataclass
class Settings:
    """The fields of TokenTune that the run needs."""

    ratio: float | None
    count: int | None
    policy: str
    schedule: str
    normalise: str
    unbiased: bool
    kv_grad_scale: float


class Tuner(Picker):
    """Selection, its random source, and the two runs of a step."""

    def __init__(self, settings: Settings, facts: Facts, seed: int, limit: int | None):
        self.settings, self.facts, self.limit = settings, facts, limit
        self.random = Counter(seed)
        self.request: Request | None = None
        self.replay: Replay | None = None
        self.tape: Any = None
        self.sizes: tuple[int, int] | None = None
        self.kept: tuple[Tensor, Tensor] | None = None

    @property
    def whole(self) -> bool:
        """All tokens are selected always: the stock step."""
        return self.settings.ratio == 1.0

    # -- a part of the recipe ------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.random.step)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.random.step = int(tensors["step"])

    def report(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"step": self.random.step, "schedule": self.settings.schedule}
        if self.sizes is not None:
            facts["selected"], facts["length"] = self.sizes
        return facts

    def __deepcopy__(self, memo: dict) -> Tuner:
        twin = memo[id(self)] = Tuner(self.settings, self.facts, self.random.seed, self.limit)
        twin.random.step = self.random.step
        return twin

    # -- for those who call the model with tokens of their own ---------------------------------------------------

    @property
    def picks(self) -> bool:
        return not self.whole

    def keep(self, positions: Tensor, real: Tensor) -> None:
        self.kept = (positions, real)

    def places(self, positions: Tensor) -> Tensor | None:
        request = self.request
        if request is None or not request.rows or request.selection is None:
            return None
        chosen = request.selection.positions.masked_fill(~request.selection.valid, -1)
        return (chosen[:, None, :] == positions[:, :, None]).long().argmax(2)

    def draws(self) -> int:
        return self.random.step

    def restore_draws(self, state: int) -> None:
        self.random.step = state

    # -- one call ------------------------------------------------------------------------------------------------

    def run(self, runner: nn.Module, stock: Stock, call: dict[str, Any]) -> Any:
        """The runner's output with gradients through the selected tokens only.

        Args:
            runner: the module.
            stock: its stock forward.
            call: the arguments, by name.
        """
        request = self.request or Request()
        if call.get("past_key_values") is not None:
            raise ValueError(
                "TokenTune: past_key_values were given in training (prefix tuning gives them); selection needs the "
                "whole sequence in one call"
            )
        if self.facts.generates:
            call = {**call, "use_cache": False}
        if self.settings.schedule == "suffix":
            return self._suffix(stock, call, request, checkpoints(runner))
        if self.settings.schedule == "block":
            return self._by_block(runner, stock, call, request)
        capture = self.capture(runner)
        with torch.no_grad(), own_casts():
            whole = stock(**call, **{KEY: capture})
        self.check_arrival(runner, capture)
        selection = self.choose(request, call, capture)
        rows = self.rows_of(runner, call, selection, capture.length)
        kept = None if request.rows else hidden_states(whole)
        routers = getattr(whole, "router_logits", None)
        del whole
        self.replay = Replay(capture, selection, self.factor(selection), keep=checkpoints(runner))
        try:
            out = stock(**rows, **{KEY: self.replay})
        finally:
            self.replay = None
        out = merged(out, kept, routers, selection)
        return out if kept is None else with_pooled(runner, out)

    def _by_block(self, runner: nn.Module, stock: Stock, call: dict[str, Any], request: Request) -> Any:
        main = _main(call)
        selection = self.choose(request, call, None, main.shape[:2])
        self.tape = (self.capture(runner), selection)
        try:
            out = stock(**call)
            self.check_arrival(runner, self.tape[0])
        finally:
            self.tape = None
        whole = hidden_states(out)
        rows = take(whole, selection.positions)
        # what stands behind the blocks, a norm, ran on all tokens
        found = rows if request.rows else overwrite(whole.detach().clone(), rows, selection.positions, selection.valid)
        routers = getattr(out, "router_logits", None)
        if routers:  # noted twice for each block
            out.router_logits = tuple(with_rows(a, b, selection) for a, b in zip(routers[::2], routers[1::2]))
        return with_hidden(out, found)

    def _suffix(self, stock: Stock, call: dict[str, Any], request: Request, checkpointed: bool) -> Any:
        if checkpointed:
            raise StateError(
                "TokenTune(schedule='suffix'): gradient checkpointing is on, and blocks that run again in backward "
                "would append to the prefix's cache twice; switch it off, or use schedule='model'"
            )
        main = _main(call)
        rows, length = main.shape[:2]
        settings = self.settings
        size = policies.most(settings.ratio, settings.count, length, self.facts.least)
        real = self.real_of(call, (rows, length), main.device)
        known = torch.is_tensor(call.get("attention_mask")) and hfmodel.has_values(real)
        if known and not bool(real[:, -1].all()):
            raise ValueError(
                "TokenTune(schedule='suffix'): a row ends with padding, so the rows' last tokens do not line up; pad "
                "on the left (tokenizer.padding_side='left'), or use another schedule"
            )
        start = length - size
        places = torch.arange(start, length, device=main.device).expand(rows, size)
        share = torch.full((rows, length), size / length, device=main.device)
        request.selection = Selection(places, real[:, start:], share[:, start:])
        self.sizes = (size, length)
        where = self.places_of(call, length, main.device)
        whole = {k: v for k, v in call.items() if v is not None and k not in ("attention_mask", "position_ids")}
        mask = call.get("attention_mask")
        kept = cache = routers = None
        if start:
            first = {k: v[:, :start] if aligned(v, rows, length) else v for k, v in whole.items()}
            first |= {"position_ids": where[..., :start], "attention_mask": None if mask is None else mask[:, :start]}
            with torch.no_grad(), own_casts():
                before = stock(**{**first, "use_cache": True})
            kept, cache = None if request.rows else hidden_states(before), before.past_key_values
            routers = getattr(before, "router_logits", None)
            del before
        rest = {k: v[:, start:] if aligned(v, rows, length) else v for k, v in whole.items()}
        rest |= {"position_ids": where[..., start:], "attention_mask": mask, "past_key_values": cache}
        out = stock(**{**rest, "use_cache": cache is not None}, **{KEY: Grouped()})
        if cache is not None:
            out.past_key_values = None
        if routers is not None:
            both = zip(routers, out.router_logits)
            parts = [[t.view(rows, -1, t.shape[-1]) for t in pair] for pair in both]
            out.router_logits = tuple(torch.cat(pair, 1).flatten(0, 1) for pair in parts)
        return out if kept is None else with_hidden(out, torch.cat([kept, hidden_states(out)], 1))

    # -- its parts -----------------------------------------------------------------------------------------------

    def capture(self, runner: nn.Module) -> Capture:
        """A fresh capture."""
        return Capture({m: n for n, m in runner.named_modules()} if self.facts.several else {})

    def check_arrival(self, runner: nn.Module, capture: Capture) -> None:
        """Every block must have asked the capture."""
        name = self.facts.blocks[0].rsplit(".", 1)[0].removeprefix(self.facts.runner).lstrip(".")
        count = len(runner.get_submodule(name))  # type: ignore[arg-type]
        if capture.reached < count:
            raise UnsupportedModelError(
                f"TokenTune: {type(runner).__name__} is not supported: of its {count} blocks, attention in only "
                f"{capture.reached} could be reached (the others mix tokens in another way, or drop the call's extra "
                f"arguments)"
            )

    def factor(self, selection: Selection) -> Tensor | None:
        """(B, K) that gradients of keys and values from other queries are multiplied with."""
        if self.settings.unbiased:
            return selection.probability.reciprocal()
        scale = self.settings.kv_grad_scale
        return None if scale == 1 else torch.full_like(selection.probability, scale)

    def real_of(self, call: dict[str, Any], shape: tuple[int, int], device: torch.device) -> Tensor:
        """(B, L): no padding."""
        mask = call.get("attention_mask")
        if torch.is_tensor(mask) and mask.shape == torch.Size(shape):
            return mask.to(device).bool()
        return torch.ones(shape, dtype=torch.bool, device=device)

    def choose(self, request: Request, call: dict[str, Any], capture: Capture | None, shape=None) -> Selection:
        """Select the tokens of a call."""
        settings = self.settings
        if shape is None:
            assert capture is not None
            keys = next(iter(capture.kv.values()))[0]
            shape = (keys.shape[0], capture.length)
            device = keys.device
        else:
            device = _main(call).device
        shape = tuple(shape)
        real = request.real.to(device) if request.real is not None else self.real_of(call, shape, device)
        kept, self.kept = self.kept, None
        extra = 0
        if kept is not None:
            if request.positions is not None or request.scores is not None:
                raise ValueError(
                    "TokenTune: token_positions or token_scores were given, but the recipe calls the model with other "
                    "tokens than the batch's, segment by segment; leave them out"
                )
            real, extra = kept[1], kept[0].shape[1]
        keep = policies.keep_set(real, causal=self.facts.causal)
        if request.keep is not None:
            places = request.keep.clamp(0, shape[1] - 1)
            keep = keep | (torch.zeros_like(keep).scatter(1, places, True) & real)
        scores = request.scores
        if scores is not None:
            scores = policies.check_scores(scores, real, positive=settings.policy == "bernoulli")
        elif settings.policy == "score":
            assert capture is not None
            scores = capture.updates
        if settings.policy == "bernoulli" and self.facts.per_token:
            keep = torch.zeros_like(keep)
        if kept is not None:
            keep = keep | torch.zeros_like(keep).scatter(1, kept[0], True)
        if request.positions is not None:
            chance = torch.full(shape, self._share(shape[1]), device=device)
            if scores is not None and settings.policy == "bernoulli":
                chance = policies.in_proportion(chance, scores, real)
            selection = policies.given(request.positions, real, chance)
        else:
            draw = Draw(real, keep, request.labelled, scores)
            random = self.random
            budget = (settings.ratio, settings.count)
            selection = policies.select(draw, *budget, settings.policy, random, self.facts.least, extra)
        self.sizes = (selection.positions.shape[1], shape[1])
        request.selection = selection
        return selection

    def _share(self, length: int) -> float:
        settings = self.settings
        return settings.ratio if settings.ratio is not None else min(1.0, (settings.count or 0) / length)

    def places_of(self, call: dict[str, Any], length: int, device: torch.device) -> Tensor:
        """(1 or B, L), or more dimensions in front: the positions of all tokens."""
        if call.get("position_ids") is not None:
            return call["position_ids"]
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if self.facts.rule == "mask" and torch.is_tensor(mask) and mask.dim() == 2:
            return (mask.cumsum(1) * mask - 1).long()
        places = torch.arange(length, device=device)[None]
        if self.facts.rule == "ids":
            pad = self.facts.padding
            if ids is None:
                return places + pad + 1
            seen = ids.ne(pad).int()
            return (seen.cumsum(1).type_as(seen) * seen).long() + pad
        return places

    def rows_of(self, runner: nn.Module, call: dict[str, Any], selection: Selection, length: int) -> dict[str, Any]:
        """The call with the selected tokens only."""
        positions = selection.positions
        rows = positions.shape[0]
        out = {}
        for name, value in call.items():
            apart = name in ("attention_mask", "position_ids") or name.startswith("encoder_")
            out[name] = take(value, positions) if not apart and aligned(value, rows, length) else value
        if self.facts.rule in ("count", "ids", "mask"):
            places = self.places_of(call, length, positions.device)
            index = positions.expand(*places.shape[:-2], *positions.shape)
            out["position_ids"] = places.expand(*places.shape[:-2], rows, length).gather(-1, index)
        if self.facts.rule != "image":
            # models hand on a mask of four dimensions as it is; what attention looks at was captured
            out["attention_mask"] = selection.valid[:, None, None, :]
        return out


def aligned(value: Any, rows: int, length: int) -> bool:
    """Whether a tensor has an entry for each token."""
    return torch.is_tensor(value) and value.dim() >= 2 and value.shape[:2] == (rows, length)


def hidden_of(out: Any) -> Tensor:
    """The hidden states of a block's output."""
    return out[0] if isinstance(out, tuple) else out


def with_hidden(out: Any, hidden: Tensor) -> Any:
    """A backbone's output with other hidden states."""
    if isinstance(out, tuple):
        return (hidden, *out[1:])
    out.last_hidden_state = hidden
    return out


def with_pooled(runner: Any, out: Any) -> Any:
    """A backbone's output whose pooled state is made from all its tokens."""
    pooler = getattr(runner, "pooler", None)
    if pooler is None:
        return out
    if isinstance(out, tuple):
        return (out[0], pooler(out[0]), *out[2:]) if len(out) > 1 else out
    if getattr(out, "pooler_output", None) is not None:
        out.pooler_output = pooler(out.last_hidden_state)
    return out


def merged(out: Any, kept: Tensor | None, routers: Any, selection: Selection) -> Any:
    """A replay's output, where asked for with all other tokens as constants."""
    if kept is not None:
        out = with_hidden(out, overwrite(kept, hidden_states(out), selection.positions, selection.valid))
    fresh = getattr(out, "router_logits", None)
    if routers is not None and fresh is not None:
        out.router_logits = tuple(with_rows(a, b, selection) for a, b in zip(routers, fresh))
    return out


def with_rows(stored: Tensor, rows: Tensor, selection: Selection) -> Tensor:
    """A router's logits of all tokens (B L, E), those of the selected ones (B K, E) in their places."""
    batch = selection.positions.shape[0]
    whole, fresh = (t.view(batch, -1, t.shape[-1]) for t in (stored.detach(), rows))
    return overwrite(whole, fresh, selection.positions, selection.valid).flatten(0, 1)


def checkpoints(runner: nn.Module) -> bool:
    """Whether blocks will run again in backward."""
    return any(getattr(m, "gradient_checkpointing", False) for m in runner.modules())


def _main(call: dict[str, Any]) -> Tensor:
    found = call.get("input_ids")
    found = call.get("inputs_embeds") if found is None else found
    if found is None:
        raise StateError("TokenTune: the call has neither input_ids nor inputs_embeds")
    return found
