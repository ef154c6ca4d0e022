# ruff: noqa: F401, F811 (fixtures are imported)
"""Whole steps with kernels and without: the same loss, the same bytes kept, the same gradients."""

import pytest
import torch
from kernel_devices import counted, each_device, kernels_on
from models import bert, gemma2, llama

import tightfit
from tightfit import FusedOps, Mesa, chain
from tightfit.core.memory import saved_bytes

pytestmark = pytest.mark.slow


def built(family, device):
    torch.manual_seed(0)
    return {"llama": llama, "gemma2": gemma2, "bert": bert}[family]().train().to(device)


def batch_of(family, device):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 110, (2, 12), generator=generator).to(device)
    labels = torch.tensor([0, 1], device=device) if family == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@each_device
@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("recipe", [chain(FusedOps()), chain(FusedOps(), Mesa(attention=True))], ids=["exact", "coded"])
def test_steps(family, recipe, device, kernels_on, counted):
    batch, made = batch_of(family, device), []
    for on in (True, False):
        kernels_on(on)
        model = tightfit.apply(built(family, device), recipe).model

        def step(model=model):
            torch.manual_seed(2)
            loss = model(**batch).loss
            loss.backward()
            return loss.detach()

        loss = step()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        made.append((loss, grads, saved_bytes(step)))
        if on:
            ran = set(counted)
    assert {"_backward"} <= ran and (family == "bert" or {"_statistics", "_gradient"} <= ran)
    assert family != "bert" or "_times_noise" in ran
    assert family != "llama" or "_gated_backward" in ran
    assert ("_unpack" in ran) == ("Mesa" in str(recipe))
    (loss, grads, kept), (plain_loss, plain_grads, plain_kept) = made
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)  # the chunked loss sums in another order
    assert kept == plain_kept and grads.keys() == plain_grads.keys()
    exact = "Mesa" not in str(recipe)
    ours, theirs = (torch.cat([g.flatten() for g in found.values()]) for found in (grads, plain_grads))
    # codes by the CPU's own kernel and by Triton's round a tie in fifty apart
    assert (ours - theirs).norm() <= (1e-5 if exact or device == "cuda" else 5e-3) * theirs.norm()
