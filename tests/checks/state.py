"""Looking at a model closely enough to say that nothing has changed."""

from __future__ import annotations

import torch


def _seen(value):
    """Something comparable that tells a value, or the identity of an object, from another."""
    if isinstance(value, dict):
        return type(value), {key: _seen(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(_seen(item) for item in value)
    if value is None or isinstance(value, str | int | float | bool | torch.dtype | torch.device | torch.Size):
        return value
    return type(value), id(value)


def snapshot(model) -> dict:
    """Names, classes, flags, hooks, `__dict__` keys, object identities, values, config."""
    return {
        "modules": {
            name: {"id": id(m), "class": type(m), **{key: _seen(value) for key, value in vars(m).items()}}
            for name, m in model.named_modules(remove_duplicate=False)
        },
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "objects": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "config": (_seen(vars(model.config)), model.config.to_json_string()),
        "values": {key: value.clone() for key, value in model.state_dict().items()},
    }


def assert_same(before: dict, after: dict) -> None:
    """Fail with the first place that differs."""
    for kind in ("modules", "flags", "objects"):
        assert list(before[kind]) == list(after[kind]), kind
        changed = [name for name, value in before[kind].items() if after[kind][name] != value]
        assert not changed, f"{kind}: {_difference(before[kind][changed[0]], after[kind][changed[0]])} at {changed}"
    assert before["config"] == after["config"]
    assert list(before["values"]) == list(after["values"])
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), f"values of {name}"


def _difference(old, new) -> str:
    if not isinstance(old, dict):
        return f"{old} became {new}"
    keys = sorted(key for key in {*old, *new} if old.get(key, "absent") != new.get(key, "absent"))
    return "; ".join(f"{key}: {old.get(key, 'absent')} became {new.get(key, 'absent')}" for key in keys)


def logits(model, batch):
    """Logits in evaluation mode, real ones; the model's mode is restored."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch).logits.clone()
    model.train(training)
    return out


def gradients(model, *batches, autocast=False, seed=0):
    """Loss and gradients by name after one backward for each batch, from a fixed random state."""
    torch.manual_seed(seed)
    model.zero_grad()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model, optimizer, batch, steps):
    """Losses of some steps on one batch."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
