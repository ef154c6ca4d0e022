"""The frozen backbone under a side net: no graph, no dropout, no KV cache in training."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.calls import argument_names, evaluating, named_call, returns_dict
from tightfit.core.edits import CallEdit, ChildEdit, Claim, Edit, ModuleEdit, StackEdit, StackRunner, TrainableEdit
from tightfit.core.errors import ConflictError, StateError, UnsupportedModelError, shorten
from tightfit.core.tight import state_of
from tightfit.core.transform import Slot
from tightfit.methods.side.places import Place

SIDE = "tight_side"
"""Name of the modules that are added."""


def side_edit(place: Place, method: str, make: Callable[[nn.Module], nn.Module], note: str) -> ChildEdit:
    """Add a side net to the module that runs the stack."""
    trained = f"{method} trained beside the blocks"
    return ChildEdit(module=place.owner, child=SIDE, make=make, trained=trained, note=note)


class OneRun(StackRunner):
    """A runner with a side net, which stands beside one run of the stack in each call of the backbone.

    Attributes:
        runs: of the stack in the call under way; None outside of one.
    """

    runs: int | None = None

    def begin(self, method: str) -> None:
        """Count a run. Raises: UnsupportedModelError for a second one, whose frozen blocks would pass no gradient."""
        if self.runs is None:
            return
        self.runs += 1
        if self.runs > 1:
            raise UnsupportedModelError(
                f"{method}: the model runs the same blocks again in one call (shared weights, as in ALBERT), and what "
                f"a side net adds to one run would get no gradient through the next; use Lora"
            )


@contextlib.contextmanager
def _counted(runners: Sequence[OneRun]) -> Iterator[None]:
    """Let the runners count the runs of their stacks."""
    for runner in runners:
        runner.runs = 0
    try:
        yield
    finally:
        for runner in runners:
            runner.runs = None


def frozen_edits(
    model: nn.Module, method: str, *, dropout: bool, runners: list[OneRun], cache: Any = None
) -> Iterator[Edit]:
    """Freeze the backbone, and let it run as in evaluation mode while the rest trains.

    Args:
        runners: those of its stacks with a side net, once they are there.
    """
    yield TrainableEdit(parameters=tuple(hfmodel.body_parameters(model)), trainable=False)
    yield CallEdit(
        slot=Slot.BLOCKS,
        where="backbone",
        mixin=FrozenBackbone,
        state=lambda module: {"method": method, "dropout": dropout, "cache": cache, "runners": runners},
        note="frozen" if dropout else "frozen, without dropout",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FrozenStackEdit(StackEdit):
    """A stack that runs without a graph, so that adapters inside of it could never train.

    Its runner joins `runners` if it is a `OneRun`; of these the backbone's call counts the runs.
    """

    inside: tuple[str, ...]
    runners: list[OneRun] = dataclasses.field(default_factory=list)

    def make_runner(self) -> StackRunner:
        made = super().make_runner()
        if isinstance(made, OneRun):
            self.runners.append(made)
        return made

    def claims(self) -> frozenset[Claim]:
        return super().claims() | frozenset((Slot.NEW_PARAMETERS, name) for name in self.inside)


def inside(model: nn.Module, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The linear layers in these blocks."""
    prefixes = tuple(f"{block}." for block in blocks)
    return tuple(name for name in hfmodel.block_linears(model) if name.startswith(prefixes))


class _Untouched(StackRunner):
    """Runs a stack without a graph."""

    def block(self, tape: Any, index: int, last: bool, forward, hidden, args: tuple, kwargs: dict) -> Any:
        with torch.no_grad():
            return forward(hidden, *args, **kwargs)


def untouched_edits(model: nn.Module, stacks: Sequence[Place]) -> Iterator[Edit]:
    """Edits of stacks that only run without a graph."""
    for place in stacks:
        yield FrozenStackEdit(
            blocks=place.blocks, inside=inside(model, place.blocks), runner=_Untouched, note="no graph"
        )


class FrozenBackbone:
    """Runs the backbone in evaluation mode, its side nets left out, and without a KV cache in training."""

    def __call__(self, *args, **kwargs):
        own = state_of(self, FrozenBackbone)  # type: ignore[arg-type]
        if not self.training:  # type: ignore[attr-defined]
            with _counted(own["runners"]):
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if torch.is_grad_enabled():
            _refuse_trained(self, own["method"])
            if {"past_key_values", "use_cache"}.intersection(argument_names(self)[: len(args)]):  # type: ignore[arg-type]
                args, kwargs = (), named_call(self, args, kwargs)  # by place (CPM-Ant)
            kwargs = _without_cache(self, kwargs, own["method"])
        with contextlib.ExitStack() as stack:
            if not own["dropout"]:
                stack.enter_context(evaluating(_stock_inside(self)))  # type: ignore[arg-type]
            if own["cache"] is not None:
                stack.enter_context(own["cache"].looking(self, args, kwargs, SIDE))
            stack.enter_context(_counted(own["runners"]))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            if not state_of(self, FrozenBackbone)["dropout"]:  # type: ignore[arg-type]
                # its own forward may drop too (XGLM); what other edits put around that still sees the training
                stack.enter_context(evaluating([self]))  # type: ignore[list-item]
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _stock_inside(module: nn.Module) -> Iterator[nn.Module]:
    """Everything in the backbone but the module itself and side nets."""
    for name, child in module._modules.items():
        if child is not None and name != SIDE:
            yield child
            yield from _stock_inside(child)


def _refuse_trained(backbone: Any, method: str) -> None:
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad and SIDE not in n.split(".")]
    if trained:
        raise ConflictError(
            f"{method}: the backbone runs without a graph, so {shorten(trained, 5)} would never get a gradient; set "
            f"requires_grad to False there, or leave out what trains them"
        )


def _without_cache(backbone: Any, kwargs: dict[str, Any], method: str) -> dict[str, Any]:
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise StateError(
            f"{method}: the model was called in training with a filled {type(cache).__name__} (prefix tuning fills "
            f"it); leave out what fills it"
        )
    if kwargs.get("use_cache"):
        warnings.warn(f"{method}: use_cache=True is ignored while training", UserWarning, stacklevel=4)
    plain = dict(kwargs)
    if cache is not None:
        plain["past_key_values"] = None
    if "use_cache" in argument_names(backbone) or "use_cache" in kwargs:
        plain["use_cache"] = False
    return plain


def with_first(out: Any, states: Tensor) -> Any:
    """The same with other states."""
    return states if torch.is_tensor(out) else (states, *out[1:])


# -- from an encoder to a decoder -------------------------------------------------------------------------------------


class Link:
    """What the encoder's side gives to the decoder's, during one forward of the encoder."""

    def __init__(self) -> None:
        self.given: Tensor | None = None


class Widened:
    """An encoder whose output carries the side's beside its own: (batch, tokens, width + side width).

    Decoder stacks of the same recipe take it apart again. So it goes wherever the encoder's output goes: through beam
    search, through a caller that keeps it.
    """

    def __call__(self, *args, **kwargs):
        own = state_of(self, Widened)  # type: ignore[arg-type]
        link = own["link"]
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        given, link.given = link.given, None
        if given is None:
            return out
        plain = out[0]
        if plain.shape[:-1] != given.shape[:-1]:
            raise UnsupportedModelError(
                f"{own['method']}: the encoder gives {plain.shape[1]} of the {given.shape[1]} tokens its blocks get"
            )
        wide = torch.cat([plain, given.to(plain.dtype)], dim=-1)
        if isinstance(out, tuple):
            return (wide, *out[1:])
        out["last_hidden_state"] = wide
        return out


class Narrowed:
    """The whole model, whose own outputs show the encoder's states as they are."""

    def __call__(self, *args, **kwargs):
        # what stands where in a tuple depends on the model and on the call
        fields = returns_dict(self, kwargs.get("return_dict"))
        out = super().__call__(*args, **(kwargs if fields else {**kwargs, "return_dict": True}))  # type: ignore[misc]
        wide = getattr(out, "encoder_last_hidden_state", None)
        if wide is not None:
            out["encoder_last_hidden_state"] = wide[..., : state_of(self, Narrowed)["width"]]  # type: ignore[arg-type]
        return out if fields else out.to_tuple()


def link_edits(method: str, link: Link, encoder: Place) -> Iterator[Edit]:
    """Edits that let an encoder's output carry the side's."""
    yield ModuleEdit(
        slot=Slot.BLOCKS,
        module=encoder.owner,
        mixin=Widened,
        state=lambda module: {"link": link, "method": method},
        note="side output",
    )
    yield CallEdit(
        slot=Slot.BLOCKS, where="model", mixin=Narrowed, state=lambda module: {"width": encoder.width}, note="outputs"
    )


class Split:
    """Takes a widened encoder output apart, once for each forward.

    Raises:
        StateError: the encoder's output does not carry the side's.
    """

    def __init__(self, width: int, side: int, method: str):
        self.width, self.side, self.method = width, side, method
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, value: Any) -> tuple[Tensor, Tensor] | None:
        """(the encoder's states, the side's) if `value` is the widened output, else None."""
        if not torch.is_tensor(value) or value.dim() != 3 or not value.is_floating_point():
            return None
        if self.seen is None or self.seen[0] is not value:
            if value.shape[-1] == self.width:
                raise StateError(
                    f"{self.method}: the decoder was given encoder outputs of width {self.width}, without what the "
                    f"side net makes; get them from the encoder of this model while the recipe is applied"
                )
            if value.shape[-1] != self.width + self.side:
                return None
            plain, side = value.split([self.width, self.side], dim=-1)
            self.seen = (value, plain.detach().contiguous(), side.contiguous())
        return self.seen[1:]


def plain_call(split: Split | None, args: tuple, kwargs: dict[str, Any], part: int = 0) -> tuple[list, dict[str, Any]]:
    """What a block is called with, where the encoder's output is only its own half (part 0) or the side's (part 1).

    To be called where gradients are on: the side's half needs them.
    """

    def half(value: Any) -> Any:
        return parts[part] if split is not None and (parts := split(value)) is not None else value

    return [half(value) for value in args], {key: half(value) for key, value in kwargs.items()}
