"""Edits of TokenTune: the attention registry, and a check on the model's own weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.calls import evaluating, hidden_states, mismatch, random_images, refusing
from tightfit.core.edits import Claim, Edit, Handle, ModuleEdit
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.tight import state_of
from tightfit.core.transform import Slot
from tightfit.methods.token_tune.calls import TunedRunner
from tightfit.methods.token_tune.records import token_attention
from tightfit.methods.token_tune.tuner import Request, Tuner

PREFIX = "tightfit_tokens_"
ACCEPTED = ("sdpa", "eager", "tightfit_sdpa")
PROBE = 12
"""Tokens of a row of the self-check, fewer where the model has fewer positions."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RegistryEdit(Edit):
    """Put the attention that asks the call's record over the model's own, whichever that is by now."""

    slot: Slot = Slot.INPUTS

    @property
    def target(self) -> str:
        return "(attention)"

    def run(self, model: nn.Module) -> Handle:
        return _RegistryHandle(model)


class _RegistryHandle(Handle):
    def __init__(self, model: nn.Module):
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

        self.changed: list[tuple[Any, str]] = []
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            now = getattr(config, "_attn_implementation_internal", None)
            if not isinstance(now, str) or not now.startswith(ACCEPTED):
                continue
            name = PREFIX + now
            AttentionInterface.register(name, functools.partial(token_attention, base=now))
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[now])  # or the mask is silently None
            config._attn_implementation_internal = name
            self.changed.append((config, now))

    def undo(self, model: nn.Module) -> None:
        for config, before in reversed(self.changed):
            if config._attn_implementation_internal == PREFIX + before:
                config._attn_implementation_internal = before


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CachingEdit(ModuleEdit):
    """Run a module with a cache of its own in training."""

    def claims(self) -> frozenset[Claim]:
        return super().claims() | {(Slot.INPUTS, "(cache)")}


def check(model: nn.Module, tuner: Tuner) -> None:
    """Compare on a random, ragged batch.

    Raises:
        UnsupportedModelError: the model cannot be run so, or the selected tokens' hidden states differ from the stock
            model's.
    """
    trial = f"TokenTune: {type(model).__name__} is not supported: a trial with made-up inputs, selected tokens apart,"
    with refusing(lambda error: f"{trial} ended in {error}", AttributeError, LookupError):
        _check(model, tuner)


def _check(model: nn.Module, tuner: Tuner) -> None:
    runner: Any = hfmodel.stock_module(model, tuner.facts.runner)
    call, real = probe(runner, tuner)
    if call is None:
        return
    length = real.shape[1]
    places = torch.tensor([[0, 2, 5, length - 1], [0, 1, 4, -1]], device=real.device).clamp_max(length - 1)
    state = state_of(runner, TunedRunner)
    stock = functools.partial(type(runner)._stock, runner)
    suffix = tuner.settings.schedule == "suffix"
    before = (tuner.random.step, tuner.sizes)
    with evaluating(model.modules()):
        with torch.no_grad():
            expected = hidden_states(stock(**call)).clone()
        tuner.request = Request(positions=None if suffix else places)
        try:
            with torch.enable_grad():  # a part of attention that would not train is found by its gradient
                found = hidden_states(state["tuner"].run(runner, stock, call)).detach()
        finally:
            tuner.request = None
    tuner.random.step, tuner.sizes = before
    off = mismatch(found.where(real[..., None], 0.0), expected.where(real[..., None], 0.0))
    if off is not None:
        raise UnsupportedModelError(
            f"TokenTune: {type(model).__name__} is not supported: with selected tokens apart its hidden states are "
            f"{off}, so tokens are mixed somewhere outside of attention"
        )


def probe(runner: Any, tuner: Tuner) -> tuple[dict[str, Any] | None, torch.Tensor]:
    """A small random call of the runner, with its (B, L) mask of real tokens; None where no inputs can be made up."""
    like = next(p for p in runner.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    config = runner.config
    if tuner.facts.rule == "image":
        pixels = random_images(config, like)
        with torch.no_grad(), evaluating(runner.modules()):
            tokens = runner.embeddings(pixels).shape[1]
        return {"pixel_values": pixels}, torch.ones(2, tokens, dtype=torch.bool, device=like.device)
    width = getattr(config, "embedding_size", None) or config.hidden_size
    table = runner.get_input_embeddings()
    width = getattr(table, "embedding_dim", width)
    length = min(PROBE, tuner.limit or PROBE)
    embeds = torch.randn(2, length, width, generator=generator).to(like) * 0.5
    mask = torch.ones(2, length, dtype=torch.long, device=like.device)
    if length > 6:
        mask[1, : 2 if tuner.settings.schedule == "suffix" else 0] = 0
        if tuner.settings.schedule != "suffix":
            mask[1, length - 3 :] = 0
    call: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
    if tuner.facts.several:
        other = torch.randn(2, 7, config.d_model, generator=generator).to(like)
        call["encoder_hidden_states"] = other
    return call, mask.bool()
