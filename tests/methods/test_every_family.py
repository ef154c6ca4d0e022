"""Every family of transformers that a small model can be made of: as stock, or refused with the reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import families

import tightfit
from tightfit import Checkpointing, FusedOps, LadderSide, Lora, Losa, Mesa, Reversible, Sherl, TokenTune, WtaCrs, chain
from tightfit.core.errors import TightfitError, UnsupportedModelError

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
    """The recipe on a copy, or None where it is refused."""
    twin = copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tightfit.apply(twin, recipe).model
    except (TightfitError, ValueError):  # a ValueError where a field does not fit the model's sizes
        return None


def untrained(model, idle):
    """Parameters that got no gradient, where none of the layers that are idle in the stock model stands behind them."""
    own = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
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


@pytest.mark.slow
@pytest.mark.parametrize(("head", "kind"), families.families(), ids=lambda part: part)
def test_as_stock_or_refused(head, kind):
    model, batch, wanted, gradients, rounding = stock_step(head, kind)
    if kind in RANDOM or not torch.isfinite(wanted) or not torch.equal(step(model, batch)[0], wanted):
        pytest.skip("no loss that comes again")
    idle = {".".join(n.split(".")[-3:-1]) for n, _ in model.named_parameters() if n not in gradients}
    wrong = {}
    for name, recipe in {**EXACT, **SAME_LOSS, "Reversible": Reversible()}.items():
        twin = applied(model, recipe)
        if twin is None:
            continue
        try:
            loss, found = step(twin, batch)
        except UnsupportedModelError:
            continue
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"[:150]
            continue
        if name != "Reversible" and not torch.allclose(loss, wanted.to(loss), rtol=max(rounding, 1e-6), atol=0):
            wrong[name] = f"loss {float(loss)}, stock {float(wanted)}"
        elif name in EXACT and (off := difference(found, gradients)) > rounding:
            wrong[name] = f"gradients {off:.1e} off"
        elif name not in EXACT and (left := untrained(twin, idle)):
            wrong[name] = f"no gradient: {left[:3]}"
        elif not all(torch.isfinite(value).all() for value in found.values()):
            wrong[name] = "gradients are not finite"
    assert not wrong
