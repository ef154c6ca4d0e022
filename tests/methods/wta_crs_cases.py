"""Layers and models under WtaCrs."""

import copy

import models
import torch

import tightfit
from tightfit.ops.linear import linear

N, WIDTH, OUT = 64, 80, 24


def applied_to(family, *recipe, dtype=torch.float64, **options):
    stock = models.build(family, **options).to(dtype).train()
    return stock, tightfit.apply(copy.deepcopy(stock), list(recipe))


def heavy(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def layer(codec, *, rows=N, seed=0):
    """(input, weight, gradient of the output) of a linear layer whose rows differ much in length, run once."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(1.5 * heavy(generator, rows, 1))
    x = (heavy(generator, rows, WIDTH) * lengths).requires_grad_()
    weight = heavy(generator, OUT, WIDTH).requires_grad_()
    bias = heavy(generator, OUT).requires_grad_()
    pull = heavy(generator, rows, OUT) * torch.exp(heavy(generator, rows, 1))
    (linear(x, weight, bias, codec=codec) * pull).sum().backward()
    return x, weight, bias, pull
