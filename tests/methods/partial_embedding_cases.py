"""What the tests of PartialEmbedding share: reduced twins of tiny models, and objectives over hidden states."""

from __future__ import annotations

import copy

import models
import torch

import tightfit
from tightfit import PartialEmbedding

CLASSIFIERS = ("bert", "roberta")
LANGUAGE_MODELS = tuple(name for name in models.FAMILIES if name not in CLASSIFIERS)
TIED = tuple(name for name in LANGUAGE_MODELS if name != "llama")


def pair(family, *, dropout=None, recipe=(), **fields):
    """A stock model, and the same with the recipe and `PartialEmbedding` applied."""
    stock = models.build(family, dropout=dropout)
    reduced = copy.deepcopy(stock)
    fields = {"ids": models.kept_ids(stock), "head": "split"} | fields
    applied = tightfit.apply(reduced, [PartialEmbedding(**fields), *recipe])
    return stock, applied


def flipped(batch):
    """The batch with its padding on the left."""
    return {k: v.flip(-1) if v.dim() == 2 else v for k, v in batch.items()}


def hidden_states(model, batch):
    out = model(**batch, output_hidden_states=True)
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return [state for name in names for state in (getattr(out, name, None) or ())]


def objective(model, batch):
    """A loss that sees all layers and positions but no output layer, so that nothing may differ by one bit."""
    states = hidden_states(model, batch)
    weight = torch.linspace(-1, 1, states[-1].numel()).reshape(states[-1].shape)
    return (states[-1] * weight).sum() / states[-1].shape[0] + 0.1 * states[-2].square().mean()


def table(model):
    return model.get_input_embeddings().weight


def rows(tensor, applied):
    """The kept rows of a stock-sized tensor."""
    return tensor[PartialEmbedding.of(applied).ids]


def dropped(tensor, applied):
    return tensor[PartialEmbedding.of(applied).dropped]


def same_parameters(stock, applied, *, rtol=None):
    """Every parameter of the reduced model is bit-equal to the stock one, or to its kept rows."""
    own = dict(applied.model.named_parameters())
    for name, parameter in stock.named_parameters():
        expected = parameter.detach()
        if own[name].shape != expected.shape:
            expected = rows(expected, applied)
        if rtol is None:
            assert torch.equal(own[name], expected), name
        else:
            torch.testing.assert_close(own[name].detach(), expected, rtol=rtol, atol=1e-6, msg=lambda m, n=name: n + m)


def train(model, batches, optimizer, *, loss=objective, clip=None, seed=0):
    """Losses of one step per batch, from the same random state."""
    torch.manual_seed(seed)
    model.train()
    losses = []
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def own_loss(model, batch):
    return model(**batch).loss
