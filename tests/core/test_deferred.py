"""Deferred logits behave as the tensor they stand for, and are never computed where only the loss is wanted."""

import copy
import io

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tightfit.core.deferred import DeferredHead, DeferredLogits, HeadSource
from tightfit.core.errors import StateError
from tightfit.core.tight import loosen, tighten

TOKENS, WIDTH, SIZE = (2, 5), 8, 30


def head(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, SIZE, bias=bias, dtype=dtype)
    tighten(module, DeferredHead, {"source": HeadSource()})
    return module


def both(bias=False, dtype=torch.float32):
    """Deferred logits, the real ones, and the hidden states of each, as leaves of their own graphs."""
    module = head(bias, dtype)
    values = torch.randn(*TOKENS, WIDTH, dtype=dtype)
    hidden = [values.clone().requires_grad_() for _ in range(2)]
    return module(hidden[0]), F.linear(hidden[1], module.weight, module.bias), hidden


def is_deferred(value):
    return type(value) is DeferredLogits and value._real is None


KEPT_DEFERRED = {
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.float64),
    "device": lambda z: z.to(z.device),
    "scale": lambda z: z * 2,
    "scale from the left": lambda z: 0.5 * z,
    "divide": lambda z: z / 3.0,
    "cap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "shift": lambda z: z + torch.linspace(-1, 1, SIZE)[None],
    "wider shift": lambda z: z + torch.linspace(-1, 1, SIZE, dtype=torch.float64),
    "view": lambda z: z.view(-1, SIZE),
    "view last": lambda z: z.view(10, -1),
    "reshape": lambda z: z.reshape((-1, SIZE)),
    "flatten": lambda z: z.flatten(0, 1),
    "contiguous": lambda z: z[:, :-1].contiguous(),
    "slice": lambda z: z[:, :-1, :],
    "ellipsis": lambda z: z[..., :-1, :],
    "trailing ellipsis": lambda z: z[0, ...],
    "all": lambda z: z[...],
    "token": lambda z: z[:, -1],
    "one token": lambda z: z[0, 1],
    "negative step": lambda z: z[:, 1::2],
}
COMPUTED = {
    "vocabulary slice": lambda z: z[..., :4],
    "vocabulary index": lambda z: z[0, 0, 3],
    "last dimension": lambda z: z[..., 3],
    "mask": lambda z: z[torch.ones(TOKENS, dtype=torch.bool)],
    "new axis": lambda z: z[None],
    "softmax": lambda z: z.softmax(-1),
    "argmax": lambda z: z.argmax(-1),
    "add": lambda z: z + 1,
    "add itself": lambda z: z + z,
    "tensor first": lambda z: torch.ones(SIZE) + z,
    "multiply by a tensor": lambda z: z * torch.ones(SIZE),
    "transpose": lambda z: z.transpose(0, 1),
    "view apart": lambda z: z.view(-1),
    "flatten all": lambda z: z.flatten(),
    "stack": lambda z: torch.stack([z, z]),
    "clone": lambda z: z.clone(),
    "detach": lambda z: z.detach(),
    "integers": lambda z: z.long(),
    "numpy": lambda z: torch.as_tensor(z.detach().numpy()),
    "list": lambda z: torch.tensor(z.tolist()),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use", KEPT_DEFERRED.values(), ids=KEPT_DEFERRED)
def test_what_stays_deferred_has_the_right_facts_and_values(use, bias):
    deferred, real, _ = both(bias)
    found, expected = use(deferred), use(real)
    assert is_deferred(found) and is_deferred(deferred)
    assert (found.shape, found.dtype, found.device, found.dim()) == (
        expected.shape, expected.dtype, expected.device, expected.dim()
    )  # fmt: skip
    assert len(found) == len(expected) and found.size(-1) == SIZE and found.numel() == expected.numel()
    assert found.is_floating_point() and torch.is_tensor(found) and isinstance(found, torch.Tensor)
    assert is_deferred(found)  # looking at facts computes nothing
    assert "shape" in repr(found)
    assert torch.equal(found.detach(), expected)


@pytest.mark.parametrize("use", COMPUTED.values(), ids=COMPUTED)
def test_any_other_use_computes_and_goes_on_as_stock(use):
    deferred, real, _ = both()
    found, expected = use(deferred), use(real)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


def test_gradients_flow_through_computed_logits():
    deferred, real, hidden = both()
    for value in (deferred, real):
        (value.float() / 2.0)[:, :-1].log_softmax(-1).square().sum().backward()
    assert torch.equal(hidden[0].grad, hidden[1].grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["plain", "scaled", "capped", "shifted"])
def test_the_loss_is_taken_from_the_hidden_states(name, smoothing, reduction):
    change = {
        "plain": lambda z: z.float(),
        "scaled": lambda z: z * 3 / 2.0,
        "capped": lambda z: torch.tanh(z * 2 / 3.0) * 3.0,
        "shifted": lambda z: (z + torch.linspace(-2, 2, SIZE)[None]) * 1.5,
    }[name]
    deferred, real, hidden = both(bias=True)
    labels = torch.randint(SIZE, TOKENS)
    labels[0, 2] = -100
    losses = []
    for value in (deferred, real):
        rows = change(value)[:, :-1].contiguous().view(-1, SIZE)
        loss = F.cross_entropy(rows, labels[:, 1:].reshape(-1), label_smoothing=smoothing, reduction=reduction)
        loss.sum().backward()
        losses.append(loss)
    assert is_deferred(deferred)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad, rtol=1e-5, atol=1e-7)


def test_losses_that_cannot_be_chunked_are_computed():
    labels = torch.randint(SIZE, TOKENS)
    for settings, target in (
        ({"weight": torch.rand(SIZE)}, labels.view(-1)),
        ({}, torch.rand(10, SIZE)),
    ):
        deferred, real, _ = both()
        losses = [F.cross_entropy(z.view(-1, SIZE), target, **settings) for z in (deferred, real)]
        assert torch.equal(*losses)
    deferred, real, _ = both()
    twice = [F.cross_entropy(torch.tanh(torch.tanh(z)).view(-1, SIZE), labels.view(-1)) for z in (deferred, real)]
    torch.testing.assert_close(*twice)


# -- writing into logits ----------------------------------------------------------------------------------------


def loss_of(logits, labels):
    return F.cross_entropy(logits.view(-1, SIZE), labels.view(-1))


WRITES = {
    "item": lambda z: z.__setitem__((..., 3), -50.0),
    "in place": lambda z: z.mul_(2.0),
    "masked": lambda z: z.masked_fill_(torch.arange(SIZE) < 5, -9.0),
    "operator": lambda z: z.__iadd__(torch.linspace(-3, 3, SIZE)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_written_into_logits_reaches_the_loss(write, mode):
    labels = torch.randint(SIZE, TOKENS)
    with mode():
        deferred, real, _ = both()
        for value in (deferred, real):
            write(value)
        assert torch.equal(loss_of(deferred, labels), loss_of(real, labels))


@pytest.mark.parametrize("taken", ["before", "after"])
def test_slices_share_memory_with_what_they_are_slices_of(taken):
    with torch.no_grad():
        deferred, real, _ = both()
        for value in (deferred, real):
            part = value[:, 1:3] if taken == "before" else None
            flat = value.view(-1, SIZE)
            flat[0] = 7.0
            part = value[:, 1:3] if part is None else part
            part.mul_(2.0)
            value[1, 2, 3] = 5.0
        assert torch.equal(deferred.clone(), real)
        assert torch.equal(flat, real.view(-1, SIZE))


def test_looking_does_not_cost_the_chunked_loss():
    deferred, real, _ = both()
    assert torch.equal(deferred.sum(), real.sum())
    labels = torch.randint(SIZE, TOKENS)
    torch.testing.assert_close(loss_of(deferred, labels), loss_of(real, labels))


# -- as things stood when the head was called ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_made_without_gradients_have_none_later(mode):
    module, labels = head(), torch.randint(SIZE, TOKENS)
    with mode():
        deferred = module(torch.randn(*TOKENS, WIDTH))
    assert is_deferred(deferred)
    assert not loss_of(deferred, labels).requires_grad
    assert not deferred.log_softmax(-1).requires_grad


def test_a_look_without_gradients_takes_none_away():
    deferred, real, hidden = both()
    for value in (deferred, real):
        shifted = value[:, :-1]
        with torch.no_grad():
            assert not value.view(-1, SIZE).argmax(-1).requires_grad
            assert not (value * 2).exp().requires_grad
        shifted.softmax(-1).square().sum().backward()
    assert torch.equal(hidden[0].grad, hidden[1].grad)


def test_logits_that_are_read_behind_autocast_are_those_of_within():
    module = head()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.randn(*TOKENS, WIDTH).bfloat16()
        deferred, expected = module(hidden), F.linear(hidden, module.weight)
    assert torch.equal(deferred.detach(), expected)


def test_logits_that_are_read_behind_the_step_are_refused():
    deferred, _, _ = both()
    labels = torch.randint(SIZE, TOKENS)
    loss_of(deferred, labels).backward()
    torch.optim.SGD([deferred._head.weight], lr=0.1).step()
    for read in (lambda: deferred.argmax(-1), lambda: loss_of(deferred, labels)):
        with pytest.raises(StateError, match="read them before the optimizer's step"):
            read()


def test_hooks_on_the_heads_backward_see_real_logits():
    module, seen = head(), []
    handle = module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    loss_of(module(torch.randn(*TOKENS, WIDTH, requires_grad=True)), torch.randint(SIZE, TOKENS)).backward()
    assert seen == [(*TOKENS, SIZE)]
    handle.remove()
    assert is_deferred(module(torch.randn(*TOKENS, WIDTH)))


# -- the surroundings -------------------------------------------------------------------------------------------


def test_copies_and_files_hold_values():
    deferred, real, _ = both()
    assert torch.equal(copy.deepcopy(deferred), real)
    file = io.BytesIO()
    torch.save({"logits": deferred.detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["logits"], real)


def test_autocast_gives_stock_dtypes():
    deferred_head = head()
    stock = nn.Linear(WIDTH, SIZE, bias=False)
    stock.load_state_dict(deferred_head.state_dict())
    hidden, labels = torch.randn(*TOKENS, WIDTH), torch.randint(SIZE, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = deferred_head(hidden), stock(hidden)
        assert found.dtype == expected.dtype == torch.bfloat16
        losses = loss_of(found, labels), loss_of(expected, labels)
        assert torch.equal(found.detach(), expected)
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_low_precision_losses_have_the_stock_dtype():
    deferred, real, _ = both(dtype=torch.bfloat16)
    labels = torch.randint(SIZE, TOKENS)
    found, expected = loss_of(deferred, labels), loss_of(real, labels)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_the_head_gives_plain_logits_again_when_loosened():
    module = head()
    loosen(module, DeferredHead)
    assert type(module(torch.randn(*TOKENS, WIDTH))) is torch.Tensor


@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f not in ("bert", "roberta")])
def test_no_stock_model_computes_its_logits_for_the_loss(family, monkeypatch):
    model = models.build(family)
    tighten(model.get_output_embeddings(), DeferredHead, {"source": HeadSource()})
    computed = []
    monkeypatch.setattr(DeferredLogits, "materialise", lambda self: computed.append(self))
    out = model(**models.batch(model))
    out.loss.backward()
    assert not computed
    assert out.logits.shape == (3, 9, 120)
