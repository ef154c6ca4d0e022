"""Every family of transformers that a small model can be made of: as stock, or refused with the reason.

What is found is what docs/data/families.json says, of which the table in the docs is made. Anew:
`TIGHTFIT_WRITE_TABLES=1 pytest -m slow tests/methods/test_every_family.py`, then `python docs/generate.py`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from checks import families

import tightfit
from tightfit import Checkpointing, FusedOps, LadderSide, Lora, Losa, Mesa, Reversible, Sherl, TokenTune, WtaCrs, chain
from tightfit.core.errors import TightfitError, UnsupportedModelError
from tightfit.core.memory import saved_bytes

TABLE = Path(__file__).parents[2] / "docs" / "data" / "families.json"
WRITES = bool(os.environ.get("TIGHTFIT_WRITE_TABLES"))

EXACT = {
    "FusedOps": FusedOps(),
    "Checkpointing": Checkpointing(),
    "FusedOps, Checkpointing": chain(FusedOps(), Checkpointing()),
    "WtaCrs of all rows": WtaCrs(budget=1.0),
    "FusedOps, WtaCrs of all rows": chain(FusedOps(), WtaCrs(budget=1.0)),
    "TokenTune of all tokens": TokenTune(ratio=1.0),
}
SAME_LOSS = {
    "Mesa": Mesa(),
    "FusedOps, Mesa": chain(FusedOps(), Mesa(attention=True)),
    "Lora": Lora(rank=2),
    "LadderSide": LadderSide(reduction=2),
    "Sherl": Sherl(reduction=2),
    "Losa": Losa(),
}
RANDOM = {"reformer", "phimoe", "bigbird_pegasus", "big_bird"}
"""They compute otherwise in training than in evaluation without dropout, or draw numbers."""


WEIGHED = {"FusedOps"}
"""Of which it is noted how much is kept for backward, as a share of stock's."""


def step(model, batch):
    """(loss, gradients by name) of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(found, wanted):
    """Norm of the difference, over that of what is wanted; infinite where a gradient is missing."""
    if set(wanted) - set(found):
        return float("inf")
    off = sum((found[name] - value).double().square().sum() for name, value in wanted.items())
    return float((off / sum(value.double().square().sum() for value in wanted.values())).sqrt())


def applied(model, recipe):
    """The recipe on a copy.

    Raises:
        TightfitError, ValueError: it is refused; a ValueError where a field does not fit the model's sizes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tightfit.apply(copy.deepcopy(model), recipe).model


def untrained(model, idle):
    """Parameters that got no gradient, without experts that no token chose and layers that are idle in stock too."""
    own = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and "expert" not in n]
    return [name for name in own if not any(layer in name for layer in idle)]


def stock_step(head, kind):
    """(model, batch, loss, gradients, rounding) of the stock model; the test is skipped where there is none."""
    try:
        model = families.build(head, kind)
        batch = families.batch(head, model)
        try:
            return model, *cast(model, batch, torch.float64), 1e-6
        except RuntimeError:  # grouped products take no float64
            return model, *cast(model, batch, torch.float32), 1e-4
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {error}"[:150])


def cast(model, batch, dtype):
    """(batch, loss, gradients) of a model that was cast."""
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return batch, *step(model.to(dtype), batch)


@pytest.fixture(scope="module")
def outcomes():
    """What the tests have found, by family; written where that is asked for."""
    found = []
    yield found
    if WRITES:
        versions = {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "transformers", "peft")}
        TABLE.write_text(json.dumps({"versions": versions, "rows": found}, indent=1) + "\n", encoding="utf-8")


def verdict(name, recipe, model, batch, wanted, gradients, rounding):
    """("yes", share of stock's saved bytes), ("no", the reason) or ("wrong", how)."""
    try:
        twin = applied(model, recipe)
        loss, found = step(twin, batch)
    except UnsupportedModelError as error:
        return "no", str(error)
    except (TightfitError, ValueError) as error:
        ours = hasattr(tightfit, re.match(r"\w*", str(error))[0])  # it begins with the method's name
        return "no" if ours else "wrong", str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    idle = {".".join(n.split(".")[-3:-1]) for n, _ in model.named_parameters() if n not in gradients}
    if name != "Reversible" and not torch.allclose(loss, wanted.to(loss), rtol=max(rounding, 1e-6), atol=0):
        return "wrong", f"loss {float(loss)}, stock {float(wanted)}"
    if name in EXACT and (off := difference(found, gradients)) > rounding:
        return "wrong", f"gradients {off:.1e} off"
    if name not in EXACT and (left := untrained(twin, idle)):
        return "wrong", f"no gradient: {left[:3]}"
    if not all(torch.isfinite(value).all() for value in found.values()):
        return "wrong", "gradients are not finite"
    return "yes", round(kept(twin, batch) / kept(copy.deepcopy(model), batch), 3) if name in WEIGHED else None


def kept(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved_bytes(lambda: model(**batch))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "kind"), families.families(), ids=lambda part: part)
def test_as_stock_or_refused(head, kind, outcomes):
    model, *stock, rounding = stock_step(head, kind)
    batch, wanted, gradients = stock
    # a step may leave states in a model (RecurrentGemma), which could not be copied
    fresh = families.build(head, kind).to(next(model.parameters()).dtype)
    if kind in RANDOM or not torch.equal(step(model, batch)[0], wanted):
        pytest.skip("no loss that comes again")
    if not all(torch.isfinite(value).all() for value in (wanted, *gradients.values())):
        pytest.skip("stock: gradients that are not finite")
    recipes = {**EXACT, **SAME_LOSS, "Reversible": Reversible()}
    found = {name: verdict(name, recipe, fresh, *stock, rounding) for name, recipe in recipes.items()}
    outcomes.append({"head": head, "kind": kind, "model": type(model).__name__, "found": found})
    assert not {name: how for name, (said, how) in found.items() if said == "wrong"}
