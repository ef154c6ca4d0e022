"""Reversible in floating point: the algebra, the error model, and the guard in front of what is not exact."""

import models
import pytest
import torch
from checks.state import gradients
from reversible_cases import close, deep
from torch import nn

import tightfit
from tightfit import Lora, Reversible
from tightfit.core.edits import StackEdit
from tightfit.core.hfmodel import stacks
from tightfit.methods.reversible import Coupling
from tightfit.methods.reversible.guard import growth, headroom, largest_distance, predicted_error
from tightfit.methods.reversible.streams import Fixed, Floating, Half
from tightfit.methods.reversible.tape import Tape

VARIANTS = {
    "two_step": Reversible(k=2, exact=False),
    "meft1": Reversible(variant="meft1", exact=False, lam=0.1, adapter_dim=4),
    "meft2": Reversible(variant="meft2", exact=False, beta=0.1, adapter_dim=4),
    "meft3": Reversible(variant="meft3", exact=False, lam=0.1, beta=0.1, adapter_dim=4),
}
WIDTH = 16


class Toy(nn.Module):
    """The functions that halves are made of, in float64."""

    def __init__(self, post_norm):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(3)
        )
        self.post_norm = post_norm
        self.double()

    def sublayer(self, i, x):
        norm, inner = self.norms[i], self.maps[i]
        return norm(x + inner(x)) if self.post_norm else x + inner(norm(x))

    def call(self, part, x):
        if part == "lagged":
            return self.maps[2](x) / 10
        if part == "attention":
            return self.sublayer(0, x)
        return self.sublayer(1, self.sublayer(0, x) if part == "block" else x)


def undone(variant, post_norm, blocks, numbers):
    """Relative error of the streams after that many blocks forward and back again."""
    torch.manual_seed(1)
    halves = VARIANTS[variant]._halves()
    toys = [Toy(post_norm) for _ in range(blocks)]
    worst = 0.0
    with torch.no_grad():
        start = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        streams, before, kept = (numbers.open(start), numbers.open(start)), [], []
        for toy in toys:
            before.append(streams)
            for half in halves:
                read, old = streams[half.reads], streams[1 - half.reads]
                x = numbers.value(read, torch.float64)
                new, dropped = numbers.forward(half, old, read, x, toy.call(half.part, x))
                streams = half.after(read, new)
                kept.append(dropped)
        for toy in reversed(toys):
            for half in reversed(halves):
                read, new = half.split(streams)
                x = numbers.value(read, torch.float64)
                old = numbers.inverse(half, new, read, x, toy.call(half.part, x), kept.pop())
                streams = half.before(read, old)
            for found, wanted in zip(streams, before.pop()):
                worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    return worst


# -- algebra and error model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("post_norm", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_inverse_of_forward(variant, post_norm):
    halves = VARIANTS[variant]._halves()
    for blocks in range(1, 7):
        error = undone(variant, post_norm, blocks, Floating())
        assert error <= predicted_error(halves, post_norm, blocks, 1.1e-16)


@pytest.mark.parametrize("variant", ["two_step", "meft1", "meft2", "meft3"])
def test_inverse_of_forward_in_integers_has_no_error(variant, monkeypatch):
    fields = {"variant": variant, "k": 3, **({} if variant == "two_step" else {"adapter_dim": 4})}
    monkeypatch.setitem(VARIANTS, variant, Reversible(**fields))
    assert undone(variant, True, 6, Fixed(20)) == 0.0


def test_growth_is_the_published_one():
    def rate(factor, post_norm=False, **more):
        return growth((Half("block", factor, **more), Half("lagged", 1.0)), post_norm)

    assert [round(rate(m), 2) for m in (0.1, 0.5, 1.0)] == [11.92, 3.73, 2.62]
    assert [rate(m, True) for m in (0.1, 0.5, 1.0)] == [10, 2, 1.25]
    assert growth((Half("attention", 0.1), Half("mlp", 0.1)), False) == pytest.approx(140)
    assert growth((Half("attention", 0.1), Half("mlp", 0.1)), True) == pytest.approx(100)
    assert rate(2.0**-4, about=True) == 16
    # what was measured to pass must not be promised beyond
    fp32 = 2.0**-24
    for factor, pre, post in ((0.1, 4, 4), (0.5, 8, 14), (1.0, 11, 1000)):
        halves = (Half("block", factor),)
        assert pre - 4 <= largest_distance(halves, False, fp32) <= pre
        assert largest_distance(halves, True, fp32) <= post
    assert largest_distance((Half("attention", 0.1), Half("mlp", 0.1)), False, fp32) <= 2


@pytest.mark.parametrize("m", [1.0, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("blocks", [1, 4, 24])
def test_the_room_left_in_integers_is_what_the_streams_may_grow(m, blocks):
    def grown(step, halves):
        lag, state, largest = 1.0, 1.0, 1.0
        for _ in range(halves):
            lag, state = state, step(lag, state)
            largest = max(largest, state)
        return largest

    one, two, about = (Half("block", m),), (Half("attention", m), Half("mlp", m)), (Half("block", m, about=True),)
    for halves, post_norm, largest in (
        (one, False, grown(lambda lag, state: state + m * lag, blocks)),
        (two, False, grown(lambda lag, state: state + m * lag, 2 * blocks)),
        (one, True, grown(lambda lag, state: 1 + m * lag, blocks)),
        (about, True, grown(lambda lag, state: 1 + m * (lag + state), blocks)),
    ):
        assert 0.25 <= largest / 2 ** headroom(halves, post_norm, blocks) <= 2.0


# -- the guard --------------------------------------------------------------------------------------------------------

PUBLISHED = {"variant": "meft1", "exact": False, "lam": 0.1, "adapter_dim": 4}


def test_the_guard_refuses_and_names_the_safe_distance():
    model = deep("llama", 16)
    message = r"16 blocks in float32 have a predicted relative error of .*accepted is up to 0.001: anchors=3 keeps"
    with pytest.raises(ValueError, match=message):
        tightfit.apply(model, Reversible(**PUBLISHED))
    with pytest.raises(ValueError, match="anchors=3"):
        tightfit.plan(model, Reversible(**PUBLISHED), batch=(2, 8))
    tightfit.apply(model, Reversible(**PUBLISHED, anchors=3)).remove()
    tightfit.apply(model, Reversible(**PUBLISHED, span=(0, 3))).remove()
    with pytest.warns(UserWarning, match="gradients of the lower blocks are noise"):
        tightfit.apply(model, Reversible(**PUBLISHED, allow_inexact=True))
    with pytest.raises(ValueError, match=r"anchors=1 keeps"):
        tightfit.apply(deep("llama", 4).bfloat16(), Reversible(**PUBLISHED))


def test_the_guard_looks_again_under_autocast():
    model = deep("llama", 3)
    tightfit.apply(model, Reversible(**PUBLISHED))
    batch = models.batch(model)
    gradients(model, batch)
    with pytest.raises(ValueError, match="3 blocks in bfloat16"):
        gradients(model, batch, autocast=True)


def by_autograd(model, halves):
    """The same coupling with the graph kept whole."""

    class Kept(tightfit.core.edits.StackRunner):
        def open(self, hidden):
            return [hidden, hidden]

        def block(self, tape, index, last, forward, hidden, args, kwargs):
            lag, state = tape
            adapter = getattr(forward.__self__, "tight_lagged", None)
            new = halves[0].factor * lag + forward(state, *args, **kwargs)
            tape[:] = [state if adapter is None else state + adapter(new), new]
            return (tape[0] + new) / 2 if last else new

    for blocks in stacks(model):
        for name in blocks:
            tightfit.core.tight.loosen(model.get_submodule(name), tightfit.core.stack.StackMixin)
        StackEdit(blocks=tuple(blocks), runner=Kept).run(model)
    return model


def cosines(found, wanted, blocks):
    """Per block, from the first: the cosine between its gradients."""

    def of(grads, i):
        return torch.cat([g.flatten() for n, g in grads.items() if f".{i}." in n])

    return [float(torch.cosine_similarity(of(found, i), of(wanted, i), dim=0)) for i in range(blocks)]


def both(family, blocks, **fields):
    recipe = Reversible(variant="meft1", exact=False, merge="mean", **fields)
    pair = []
    for _ in range(2):
        model = deep(family, blocks, dropout=0.1)
        torch.manual_seed(2)
        tightfit.apply(model, recipe)
        pair.append(model)
    by_autograd(pair[1], recipe._halves())
    batch = models.batch(pair[0])
    return gradients(pair[0], batch)[1], gradients(pair[1], batch)[1]


@pytest.mark.parametrize(
    ("family", "blocks", "fields"),
    [
        ("llama", 5, {"lam": 0.5}),
        ("llama", 7, {"lam": 1.0, "adapter_dim": 4}),
        ("bert", 11, {"lam": 0.5, "adapter_dim": 4}),
        ("llama", 12, {"lam": 0.1, "adapter_dim": 4, "anchors": 3}),
    ],
)
def test_gradients_within_the_guard(family, blocks, fields):
    found, wanted = both(family, blocks, **fields)
    assert set(found) == set(wanted)
    assert min(cosines(found, wanted, blocks)) >= 0.999


@pytest.mark.filterwarnings("ignore:Reversible.allow_inexact:UserWarning")
def test_why_the_guard_exists():
    found, wanted = both("llama", 16, lam=0.1, allow_inexact=True)
    cosine = cosines(found, wanted, 16)
    assert cosine[-2] > 0.999
    assert cosine[-10] < 0.5


def test_two_step_in_floating_point():
    pair = []
    for exact in (False, True):
        model = deep("bert", 3, dropout=0.1)
        tightfit.apply(model, Reversible(exact=exact, k=2))
        pair.append(gradients(model, models.batch(model)))
    torch.testing.assert_close(pair[0][0], pair[1][0], rtol=1e-5, atol=1e-6)
    close(pair[0][1], pair[1][1], 1e-2)


def test_annealing_in_floating_point():
    pair = []
    for exact in (False, True):
        model = deep("llama", 4, dropout=0.1)
        tightfit.apply(model, Reversible(exact=exact, k=2, anneal=0.9)).part(Coupling).set_progress(0.9)
        pair.append(gradients(model, models.batch(model)))
    torch.testing.assert_close(pair[0][0], pair[1][0], rtol=1e-5, atol=1e-6)
    close(pair[0][1], pair[1][1], 1e-2)


def test_streams_are_float32_at_least():
    hidden = torch.randn(1, 2, 4)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert Tape(Floating(), (), hidden.to(dtype)).streams[0].dtype == wide


def test_lora_trains_inside():
    model = deep("llama", 3)
    applied = tightfit.apply(model, [Lora(rank=2), Reversible(variant="meft2", exact=False, beta=0.1)])
    _, grads = gradients(model, models.batch(model))
    assert len(grads) == len(list(applied.parameters()))
