"""The mixins: on the model for labels and loss, on the runner for its two runs, on modules that place tokens."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tightfit.core import hfmodel, processes
from tightfit.core.calls import named_call, pooled_place, returns_dict
from tightfit.core.edits import StackRunner
from tightfit.core.errors import StateError
from tightfit.core.stack import asked_to_checkpoint, block_of
from tightfit.core.tight import state_of
from tightfit.methods.token_tune.loss import targets_of, token_loss
from tightfit.methods.token_tune.records import KEY, Capture, Replay
from tightfit.methods.token_tune.tuner import Request, Tuner, hidden_of
from tightfit.ops.overwrite import overwrite, take
from tightfit.ops.replay import own_casts

log = logging.getLogger(__name__)

GIVEN = ("token_positions", "token_scores")
"""What a batch may hold for TokenTune itself."""


class TunedModel:
    """A model with a head: takes the labels, and forms the loss over the selected tokens."""

    def forward(self, *args, **kwargs):
        stock = super().forward  # type: ignore[misc]
        tuner: Tuner = state_of(self, TunedModel)["tuner"]  # type: ignore[arg-type]
        call = named_call(self, args, kwargs)
        request = Request(positions=call.pop(GIVEN[0], None), scores=call.pop(GIVEN[1], None))
        if not _active(self) or tuner.whole:
            return stock(**call)
        labels = _prepared(self, tuner, call, request)
        tuple_wanted = labels is not None and not returns_dict(self, call.get("return_dict"))
        if tuple_wanted:  # what stands where in a tuple depends on the model and on the call
            call["return_dict"] = True
        tuner.request = request
        try:
            out = stock(**call)
        finally:
            tuner.request = None
        if labels is None:
            return out
        assert request.selection is not None
        settings = tuner.settings
        by_chance = settings.unbiased or settings.normalise == "all"
        loss = token_loss(out.logits, labels, request.selection, by_chance=by_chance, items=request.items)
        balance = getattr(out, "aux_loss", None)
        if balance is not None:
            loss = loss + getattr(hfmodel.without_peft(self), "router_aux_loss_coef", 0.0) * balance
        out = type(out)(**{**dict(out.items()), "loss": loss})  # in its place: fields have numbers too
        return out.to_tuple() if tuple_wanted else out


def _active(module: Any) -> bool:
    return module.training and torch.is_grad_enabled()


def _prepared(model: Any, tuner: Tuner, call: dict[str, Any], request: Request) -> Tensor | None:
    """Take from a call what the loss needs; returns the targets in the order of the tokens, or None."""
    head, labels = tuner.facts.head, call.get("labels")
    if call.get("logits_to_keep"):
        raise ValueError(
            "TokenTune: logits_to_keep was given in training; the selected tokens decide which logits exist"
        )
    if head == "span":
        ends = [call[key] for key in ("start_positions", "end_positions") if call.get(key) is not None]
        request.keep = torch.stack([e.view(-1) for e in ends], 1) if ends else None
    if head == "pooled" and tuner.facts.causal:
        # such a head reads the last token whose id is not that of padding, with or without a mask: not the separator
        # at the end of a text that has the same id; what stands behind it does not matter
        ids, pad = call.get("input_ids"), getattr(hfmodel.text_config(model), "pad_token_id", None)
        if torch.is_tensor(ids) and pad is not None:
            places = torch.arange(ids.shape[1], device=ids.device)
            real = (
                ids.ne(pad)
                if call.get("attention_mask") is None
                else tuner.real_of(call, (ids.shape[0], ids.shape[1]), ids.device)
            )
            request.real = real & (places <= pooled_place(ids, pad))
    shifted = call.get("shift_labels")
    if not tuner.facts.per_token or (labels is None and shifted is None):
        return None
    targets = targets_of(labels, shifted, shifts=tuner.facts.shifts)
    request.items = call.pop("num_items_in_batch", None)
    call.pop("shift_labels", None)
    request.rows, request.labelled, call["labels"] = True, targets.ne(-100), None
    if head == "seq2seq":
        if call.get("decoder_input_ids") is None and call.get("decoder_inputs_embeds") is None:
            call["decoder_input_ids"] = _decoder_ids(hfmodel.without_peft(model), targets)
        if call.get("decoder_attention_mask") is None:
            request.real = targets.ne(-100)
    return targets


def _decoder_ids(model: Any, labels: Tensor) -> Tensor:
    """What the model itself makes of labels where no ids are given."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    modules = (sys.modules.get(cls.__module__) for cls in type(model).__mro__)
    shift = next((found for m in modules if (found := getattr(m, "shift_tokens_right", None)) is not None), None)
    if shift is None:
        raise ValueError(
            f"TokenTune: {type(model).__name__} was given labels without decoder_input_ids, and has nothing to make "
            f"them with; give both"
        )
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


class TunedRunner:
    """The backbone, or a decoder: runs once without gradients, and again on the selected tokens."""

    def forward(self, *args, **kwargs):
        stock = super().forward  # type: ignore[misc]
        tuner: Tuner = state_of(self, TunedRunner)["tuner"]  # type: ignore[arg-type]
        call = named_call(self, args, kwargs)
        if tuner.request is None:  # called by itself
            given = Request(positions=call.pop(GIVEN[0], None), scores=call.pop(GIVEN[1], None))
            if not _active(self) or tuner.whole:
                return stock(**call)
            tuner.request = given
            try:
                return self._run(tuner, stock, call)
            finally:
                tuner.request = None
        return self._run(tuner, stock, call) if _active(self) else stock(**call)

    def _stock(self, **call: Any) -> Any:
        return super().forward(**call)  # type: ignore[misc]

    def _run(self, tuner: Tuner, stock: Any, call: dict[str, Any]) -> Any:
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules()):  # type: ignore[attr-defined]
            _warn_of_dropout(type(self).__name__)
        return tuner.run(self, stock, call)  # type: ignore[arg-type]


@functools.cache
def _warn_of_dropout(name: str) -> None:
    log.warning(
        "TokenTune: %s has dropout, drawn anew for the selected tokens; they equal the stock step's in distribution "
        "only. Set the dropout rates to 0 for equality",
        name,
    )


class SelectedTokens:
    """The module that makes the tokens of an image: the selected ones only, in the second run."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        replay = state_of(self, SelectedTokens)["tuner"].replay  # type: ignore[arg-type]
        return out if replay is None else take(out, replay.selection.positions)


class SelectedPositions:
    """A position table whose model takes no positions: those of the selected tokens, in the second run."""

    def forward(self, *args, **kwargs):
        replay: Replay | None = state_of(self, SelectedPositions)["tuner"].replay  # type: ignore[arg-type]
        if replay is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        table: Any = self
        places = torch.arange(replay.capture.length, device=table.weight.device)
        whole = super().forward(None, 0, position_ids=places)  # type: ignore[misc]
        return take(whole.view(1, replay.capture.length, -1), replay.selection.positions)


class Scored:
    """A block that tells how much it adds to each token."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        record = kwargs.get(KEY)
        if isinstance(record, Capture):
            before = args[0] if args else kwargs["hidden_states"]
            record.add_update(before, out[0] if isinstance(out, tuple) else out)
        return out


class ByBlock(StackRunner):
    """Both runs block by block: captured keys and values exist for one block at a time, but for what it keeps.

    Under checkpointing each block keeps its input, of all tokens and of the selected ones, and does both runs again.
    """

    def __init__(self, tuner: Tuner):
        self.tuner = tuner

    def open(self, hidden: Any) -> Any:
        return None if self.tuner.tape is None else {"rows": None, "replay": None}

    def block(self, tape: Any, index: int, last: bool, forward: Any, hidden: Any, args: tuple, kwargs: dict) -> Any:
        if tape is None:
            return forward(hidden, *args, **kwargs)
        if processes.is_fsdp(block_of(forward)):
            # hooks on what a block returns get its parameters for backward, and no gradient comes to that here
            raise StateError(
                "TokenTune(schedule='block'): the blocks are sharded (fully_shard); use schedule='model', which works "
                "under FSDP, or DDP"
            )
        tuner = self.tuner
        capture, selection = tuner.tape
        length, positions = hidden.shape[1], selection.positions
        if index == 0:
            tape["rows"] = take(hidden, positions)
            tape["replay"] = Replay(capture, selection, tuner.factor(selection))

        def rows_of(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(rows_of(v) for v in value)
            fits = torch.is_tensor(value) and value.dim() in (2, 3) and value.shape[1] == length
            return take(value, positions) if fits else value

        def both(whole: Tensor, rows: Tensor, capture: Capture, replay: Replay) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), own_casts():
                whole = hidden_of(forward(whole, *args, **{**kwargs, KEY: capture}))
            own = {key: rows_of(value) for key, value in kwargs.items()}
            return whole, hidden_of(forward(rows, *map(rows_of, args), **{**own, KEY: replay}))

        def apart(whole: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            own = Capture(capture.names)
            found = both(whole, rows, own, Replay(own, selection, tape["replay"].factor))
            capture.reached += own.reached
            return found

        if asked_to_checkpoint(block_of(forward)):
            whole, tape["rows"] = checkpoint(apart, hidden.detach(), tape["rows"], use_reentrant=False)
        else:
            whole, tape["rows"] = both(hidden.detach(), tape["rows"], capture, tape["replay"])
        if not last:
            return whole
        return overwrite(whole, tape["rows"], positions, selection.valid)
