"""One method in one user's script: a tiny model with the recipe on it, watched while somebody else's loop trains it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks.rows import ROWS, Row
from torch.optim.optimizer import register_optimizer_step_post_hook

import tightfit
from tightfit.core.recipe import as_recipe

ALIKE = ("checkpointing-offload", "ladder-side-published", "token-tune-count", "recurrent-memory-block")
"""Variants that meet a user's script as their method does."""


def method_of(row: Row) -> str:
    return type(as_recipe(row.make(models.build("bert"))).transforms[0]).__name__


METHODS = [
    row for row in ROWS if row.name not in ALIKE and method_of(row) in {cls.__name__ for cls in tightfit.methods()}
]
"""The rows of the battery that stand for methods of the package."""


def stock(family: str) -> Any:
    """The same stock model each time; its dropout is its config's, where that is written."""
    return models.build(family)


def applied_to(row: Row, model: Any) -> Any:
    """The recipe on the model, with the same new parameters each time."""
    torch.manual_seed(1)
    return tightfit.apply(model, row.make(model))


def rows_of(model: Any, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of one length, as a dataset has them."""
    ids = [i for i in models.kept_ids(model) if i > 8]
    batches = [models.batch(model, size=1, seed=100 * seed + i, ids=ids) for i in range(count)]
    return [{key: value[0] for key, value in batch.items()} for batch in batches]


def collated(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batches_of(model: Any, count: int, size: int = 2) -> list[dict[str, torch.Tensor]]:
    rows = rows_of(model, count * size)
    return [collated(rows[i : i + size]) for i in range(0, len(rows), size)]


class Steps:
    """Counts the steps of all optimizers of the process while it is entered."""

    def __enter__(self):
        self.count = 0
        self._hook = register_optimizer_step_post_hook(lambda *_: self._one())
        return self

    def _one(self):
        self.count += 1

    def __exit__(self, *exc):
        self._hook.remove()


class Watch:
    """What a run did to a model: trainable parameters must get gradients and move, frozen ones must not."""

    def __init__(self, model: Any):
        self.model = model
        self.before = {name: value.clone() for name, value in everything(model).items()}
        self.trains = {name for name, p in model.named_parameters() if p.requires_grad}
        self.heard: set[str] = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.heard.add(name))

    def check(self) -> None:
        """The model trained, in all that should train and in nothing else."""
        assert self.trains, "nothing trains"
        now = everything(self.model)
        parameters = dict(self.model.named_parameters())
        assert self.trains == {name for name, p in parameters.items() if p.requires_grad}
        assert all(torch.isfinite(value).all() for value in now.values() if value.is_floating_point())
        moved = {name for name in parameters if not _equal(now[name], self.before[name])}
        silent = [name for name in self.trains - self.heard if _equal(now[name], self.before[name])]
        assert not silent, f"no gradient: {sorted(silent)}"
        # what lives in host memory moves there, and its handle among the parameters stays
        still = [name for name in self.trains - moved if not _moved_below(name.rpartition(".")[0], self.before, now)]
        assert not still, f"trainable, and did not move: {sorted(still)}"
        wrong = sorted(moved - self.trains)
        assert not wrong, f"frozen, and moved: {wrong}"
        assert all(p.grad is None for p in parameters.values() if not p.requires_grad)


def everything(model: Any) -> dict[str, torch.Tensor]:
    """Parameters, and what else the model's checkpoints hold."""
    state = {key: value.detach() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return state | {name: parameter.detach() for name, parameter in model.named_parameters()}


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in everything(model).items()}


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _moved_below(prefix: str, before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> bool:
    buffers = [name for name in now if name.startswith(f"{prefix}.")]
    return any(name in before and not _equal(now[name], before[name]) for name in buffers)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    off = {name: float((found[name] - value).abs().max()) for name, value in expected.items() if value.numel()}
    other = [f"{name} by {gap:.0e}" for name, gap in off.items() if gap]
    assert not other, f"{len(other)} of {len(off)} tensors end elsewhere: {', '.join(other[:3])}"


def check_leaves(row: Row, family: str, applied: Any, folder: Path) -> None:
    """What is exported is a stock checkpoint that loads; where none can hold the result, the saved recipe loads."""
    if row.exports:
        applied.export(folder / "stock")
        loaded, info = type(stock(family)).from_pretrained(folder / "stock", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        merged = applied.merge()
        assert type(merged) is type(loaded)
        assert_same_weights(everything(loaded), everything(merged))
        loaded(**models.batch(loaded, seed=9))
        return
    with pytest.raises(tightfit.StateError, match="has no place in a stock"):
        applied.export(folder / "stock")
    applied.save(folder / "saved")
    base = stock(family)
    tightfit.load(base, folder / "saved")
    loaded = everything(base)
    # moments that only a run that goes on needs are not saved
    assert_same_weights(loaded, {name: v for name, v in everything(applied.model).items() if name in loaded})
    base(**models.batch(base, seed=9))


def tokenizer() -> Any:
    """Words w3 to w118 for the ids 3 to 118; no special one begins as a word does, or it would be found in it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = {0: "<pad>", 2: "<eos>", 119: "<unk>"}
    inner = Tokenizer(WordLevel({names.get(i, f"w{i}"): i for i in range(models.VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentences(count: int, length: int = 6, seed: int = 0) -> list[str]:
    """Texts of words that the recipes with a small vocabulary keep."""
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(f"w{int(i)}" for i in torch.randint(9, 66, (length,), generator=generator)) for _ in range(count)]


def quiet(**more: Any) -> dict[str, Any]:
    """Settings of every Trainer here: on the CPU, telling nobody."""
    return {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.0, "seed": 3, **more}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one method does under one integration.

    Attributes:
        verdict: "yes"; "no": refused before training, with one clear reason; "-": the method is not for the models
            that the integration trains.
        model: the model it was tried on.
        reason: of a "no" or a "-".
    """

    verdict: str
    model: str
    reason: str | None = None
