"""TokenTune: gradients through a subset of the tokens (arXiv 2501.18824)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from tightfit.core.batch import positions
from tightfit.core.edits import CallEdit, ClaimEdit, Edit, ModuleEdit, ModulesEdit, StackEdit
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.fields import check_bool, check_choice, check_float, check_int
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.token_tune.calls import (
    ByBlock,
    Scored,
    SelectedPositions,
    SelectedTokens,
    TunedModel,
    TunedRunner,
)
from tightfit.methods.token_tune.edits import CachingEdit, RegistryEdit, check
from tightfit.methods.token_tune.facts import facts_of
from tightfit.methods.token_tune.policies import POLICIES
from tightfit.methods.token_tune.tuner import Settings, Tuner

SCHEDULES = ("model", "block", "suffix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTune(Transform):
    """Train through a few tokens of each example; all others are constants, their keys and values included.

    The model runs twice: first as it is and without gradients, which gives every token's keys and values, then on the
    selected tokens alone, which attend to all of those. So values are the stock model's, gradients flow along paths
    inside the selection, and a step keeps about the selected share of the activations, and takes (1 + 3r) / 3 of the
    time. In evaluation mode the model is stock. Outputs in training: with labels for each token the logits are those
    of the selected tokens, (B, K, V); other heads see all tokens, the unselected ones as constants.

    Fields:
        ratio: share of each example's tokens, a float; 1.0 is the stock step. Exactly one of `ratio` and `count`.
        count: tokens of each example, an int.
        policy: "random"; "labelled" (random among tokens that have a target); "suffix" (the last ones); "block"
            (random blocks of 16); "score" (the most changed by the blocks, or the highest `token_scores` of the
            batch); "bernoulli" (each token by itself). All but the last keep an encoder's first token, a decoder's
            first and last one, the ends of an answer.
        normalise: the loss is a mean over the "selected" targets, or an estimate of the mean over "all": each token is
            divided by its chance, the sum by the number of all targets.
        unbiased: scale what keys and values get from other tokens' queries, so that the mean gradient is the full one;
            causal language models with policy="bernoulli".
        kv_grad_scale: scale it by this much instead, 1 to 1 / ratio.
        schedule: run the whole "model" twice, or each "block" twice, or the prefix once and the "suffix" with gradients
            (policy="suffix", causal models, rows that end together).
        seed: of the draws, which are the same on every device.

    A batch may hold `token_positions` (B, K), -1 for none, or `token_scores` (B, L).

    Raises:
        TypeError, ValueError: a field out of range, fields that do not go together; when applied, a `count` below the
            tokens that must be kept, or `unbiased` on a model that is not a causal language model.
        UnsupportedModelError: the model mixes tokens outside of attention (when applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.Lora(), tightfit.TokenTune(ratio=0.3))
        chain(Lora(), TokenTune(ratio=0.3))

    Source: arXiv 2501.18824, section 3. Deviations: two runs of the stock model instead of a rewritten one; ragged
    examples; `unbiased`, `kv_grad_scale`, other policies than "random", and schedules are additions.
    """

    ratio: float | None = None
    count: int | None = None
    policy: str = "random"
    normalise: str = "selected"
    unbiased: bool = False
    kv_grad_scale: float = 1.0
    schedule: str = "model"
    seed: int = 0

    name: ClassVar[str] = "token-tune"
    paper: ClassVar[str] = "2501.18824"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.BLOCKS, Slot.INPUTS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "gradients through a subset of the tokens; faster steps, fewer activations"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.count is None):
            raise ValueError(
                f"TokenTune: got ratio={self.ratio!r} and count={self.count!r}; give exactly one of them, a share of "
                f"each example's tokens (ratio=0.3) or their number (count=16)"
            )
        if self.ratio is not None and isinstance(self.ratio, int) and not isinstance(self.ratio, bool):
            raise TypeError(
                f"TokenTune(ratio=...): got {self.ratio} (int), accepted is a float in (0, 1]; ratio=1.0 means all "
                f"tokens, count={self.ratio} this many"
            )
        check_float(self, "ratio", 0, 1, open_low=True, optional=True)
        check_int(self, "count", 1, optional=True)
        check_choice(self, "policy", POLICIES)
        check_choice(self, "normalise", ("selected", "all"))
        check_bool(self, "unbiased")
        check_float(self, "kv_grad_scale", 1, 1 / self.ratio if self.ratio else math.inf)
        check_choice(self, "schedule", SCHEDULES)
        check_int(self, "seed", 0)
        if self.unbiased and self.policy != "bernoulli":
            raise ValueError(
                f"TokenTune(unbiased=True): got policy={self.policy!r}, accepted is 'bernoulli', which draws each "
                f"token by itself"
            )
        if self.unbiased and self.kv_grad_scale != 1:
            raise ValueError(
                f"TokenTune(unbiased=True): got kv_grad_scale={self.kv_grad_scale}; unbiased sets the scale itself, so "
                f"leave it out"
            )
        if self.schedule == "suffix" and (self.policy != "suffix" or self.kv_grad_scale != 1):
            raise ValueError(
                f"TokenTune(schedule='suffix'): got policy={self.policy!r}, kv_grad_scale={self.kv_grad_scale}; "
                f"accepted are policy='suffix' and kv_grad_scale=1"
            )
        if self.schedule == "block" and self.policy == "score":
            raise ValueError(
                "TokenTune(schedule='block'): got policy='score', whose scores come from a run of the whole model; use "
                "schedule='model'"
            )

    @classmethod
    def candidates(cls, model: nn.Module) -> Iterator[TokenTune]:
        try:
            facts_of(model)
        except UnsupportedModelError:
            return
        yield cls(ratio=0.5)
        yield cls(ratio=0.3)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        facts = facts_of(model)
        self._check_model(model, facts)
        settings = Settings(
            self.ratio, self.count, self.policy, self.schedule, self.normalise, self.unbiased, self.kv_grad_scale
        )
        tuner = Tuner(settings, facts, self.seed, positions(model))

        def state(module: nn.Module) -> dict[str, Any]:
            return {"tuner": tuner}

        note = f"{self.ratio} of the tokens" if self.ratio is not None else f"{self.count} tokens of each example"
        yield RegistryEdit(note="captures keys and values")
        if facts.runner:
            yield CallEdit(where="model", mixin=TunedModel, state=state, note="loss over the selected tokens")
        runner = CachingEdit if self.schedule == "suffix" else ModuleEdit
        yield runner(slot=Slot.INPUTS, module=facts.runner, mixin=TunedRunner, state=state, part=tuner, note=note)
        if facts.embeddings:
            yield ModuleEdit(slot=Slot.INPUTS, module=facts.embeddings, mixin=SelectedTokens, state=state)
        if facts.table:
            yield ModuleEdit(slot=Slot.INPUTS, module=facts.table, mixin=SelectedPositions, state=state)
        if self.schedule == "block":
            yield StackEdit(
                blocks=facts.blocks, runner=lambda: ByBlock(tuner), checkpoints=True, note="each block twice"
            )
        if self.policy == "score":

            def blocks(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
                return [(model.get_submodule(name), {}) for name in facts.blocks]

            yield ModulesEdit(slot=Slot.INPUTS, kind="block", mixin=Scored, find=blocks, note="tells its update")
        yield ClaimEdit(
            slot=Slot.INPUTS,
            named="check",
            # whoever takes over blocks cannot hand them selected tokens
            places=frozenset((Slot.BLOCKS, block) for block in facts.blocks),
            check=functools.partial(check, tuner=tuner),
            note="compares with the stock model",
        )

    def _check_model(self, model: nn.Module, facts: Any) -> None:
        where = type(model).__name__
        if self.count is not None and self.count < facts.least:
            kept = "the first and the last" if facts.causal else "the first and both ends of the answer"
            raise ValueError(
                f"TokenTune(count={self.count}): {where} must keep {facts.least} tokens of each example ({kept}); give "
                f"at least that"
            )
        if self.unbiased and facts.head != "causal":
            raise ValueError(
                f"TokenTune(unbiased=True): {where} is no causal language model, and the estimate is unbiased for "
                f"those only; leave it out"
            )
        if self.schedule == "suffix" and not (facts.causal and facts.generates and not facts.several):
            raise ValueError(
                f"TokenTune(schedule='suffix'): {where} is no decoder with a generation cache; use schedule='model'"
            )
        if self.schedule == "block" and (facts.several or facts.rule == "image"):
            raise ValueError(f"TokenTune(schedule='block'): not for {where}; use schedule='model'")
