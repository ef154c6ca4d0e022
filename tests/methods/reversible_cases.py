"""What the reversible tests share: deeper models, and the same function by plain autograd, slowly."""

import models
import pytest
import torch
import transformers as hf

import tightfit
from tightfit import Reversible
from tightfit.core.edits import StackEdit, StackRunner
from tightfit.core.hfmodel import stacks
from tightfit.methods.reversible.streams import Fixed

SIZE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": models.VOCABULARY}
DEEP = {
    "llama": lambda n: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, num_hidden_layers=n, num_key_value_heads=1)),
    "bert": lambda n: hf.BertForSequenceClassification(hf.BertConfig(**SIZE, num_hidden_layers=n)),
    "gpt2": lambda n: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=n, n_head=2, n_positions=64, vocab_size=120, bos_token_id=1, eos_token_id=1)
    ),
}


def deep(family, layers, dropout=None):
    """A seeded model of that many blocks, in training mode."""
    return models._seeded(lambda: DEEP[family](layers), dropout)


class Straight(StackRunner):
    """The two streams with ordinary tensors: rounded on the grid of 2^-bits, gradients straight through the rounding.

    A block's update is `halves(x1, x2, layer)`, with the rounding of a number and of a quotient as its further tools.
    """

    def __init__(self, bits, update):
        self.bits, self.update = bits, update

    def open(self, hidden):
        start = self.grid(hidden)
        return [start, start]

    def grid(self, x):
        """x rounded to the grid; as float64, so that every number of it is exact."""
        return through(x.double(), (x.detach().double() * 2.0**self.bits).round() / 2.0**self.bits)

    def share(self, x, k):
        """x / 2^k rounded down on the grid."""
        return through(x / 2**k, torch.floor(x.detach() * 2.0 ** (self.bits - k)) / 2.0**self.bits)

    def block(self, tape, index, last, forward, hidden, args, kwargs):
        rest = []

        def layer(x):
            out = forward(x.to(hidden.dtype), *args, **kwargs)
            if torch.is_tensor(out):
                return out
            rest.extend(out[1:])
            return out[0]

        tape[:] = self.update(self, *tape, layer)
        out = tape[1].to(hidden.dtype)
        return (out, *rest) if rest else out


def through(x, value):
    """`value`, whose gradient goes to x."""
    return x + (value - x).detach()


def two_step(k):
    def update(grid, x1, x2, layer):
        out = layer(x2)
        step = grid.grid(out.float() - x2.to(out.dtype).float())
        return x2, x2 + step + grid.share(x1 - x2, k)

    return update


def meft1(k):
    def update(grid, x1, x2, layer):
        return x2, grid.share(x1, k) + grid.grid(layer(x2))

    return update


def straight(model, bits, update):
    """Put the slow form on a model."""
    for blocks in stacks(model):
        StackEdit(blocks=tuple(blocks), runner=lambda: Straight(bits, update)).run(model)
    return model


def recorded_streams(monkeypatch):
    """Streams as each step will have replaced them, and as they will have come back."""
    gone, back = [], []
    forward, inverse = Fixed.forward, Fixed.inverse

    def keep_old(self, half, old, read, x, out):
        gone.append(old.clone())
        return forward(self, half, old, read, x, out)

    def keep_back(self, *arguments):
        found = inverse(self, *arguments)
        back.append(found.clone())
        return found

    monkeypatch.setattr(Fixed, "forward", keep_old)
    monkeypatch.setattr(Fixed, "inverse", keep_back)
    return gone, back


def close(found, wanted, limit):
    """Fail where a gradient is off by more than `limit` of the largest gradient norm."""
    assert set(found) == set(wanted)
    largest = max(float(g.norm()) for g in wanted.values())
    for name, grad in wanted.items():
        off = float((found[name] - grad).norm())
        assert off <= limit * (float(grad.norm()) + 1e-3 * largest), (name, off, float(grad.norm()))


def later(*families):
    return [pytest.param(family, marks=pytest.mark.slow) for family in families]


each_family = pytest.mark.parametrize("family", ["llama", "bert", "t5", *later("gpt2", "bart", "gemma2")])


def reversed_model(family, *recipe, dropout=None, **options):
    model = models.build(family, dropout=dropout)
    return tightfit.apply(model, list(recipe) or Reversible(**options)).model
