"""Operators with own backwards: outputs bit-equal to torch's, gradients exact, and nothing kept twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tightfit.core.memory import saved_bytes
from tightfit.ops.activation import activation, gated_activation, slope_of
from tightfit.ops.activation import reference as activation_reference
from tightfit.ops.affine import Affine
from tightfit.ops.attention import attention, dropout_attention
from tightfit.ops.attention import reference as attention_reference
from tightfit.ops.bits import pack, unpack
from tightfit.ops.dropout import dropout
from tightfit.ops.linear import add_scaled, linear
from tightfit.ops.norm import layer_norm, rms_norm
from tightfit.ops.norm import reference as norm_reference
from tightfit.ops.recompute import recompute
from tightfit.ops.rows import Rows
from tightfit.ops.source import source_of

N, D, H = 12, 16, 24
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def tensors(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype).requires_grad_() for t in made]


HELD = []


def parameters(*shapes):
    """Weights of a module, which do not count as kept."""
    HELD.append(nn.ParameterList(t.detach() for t in tensors(*shapes, dtype=torch.float32, seed=3)))
    return list(HELD[-1])


def compare(ours, stock, inputs, *, equal=True, rtol=1e-12):
    """Outputs bit-equal (where asked), gradients of all inputs close, under a gradient that is no constant."""
    results = []
    for function in (ours, stock):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        torch.manual_seed(7)
        out = function(*leaves)
        pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        out.backward(pull)
        results.append((out.detach(), [t.grad for t in leaves]))
    (out, grads), (expected, stock_grads) = results
    if equal:
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=rtol, atol=rtol)
    for grad, wanted in zip(grads, stock_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=rtol, atol=rtol)


def rms(eps=1e-6):
    def stock(x, w):
        wide = x.float() if x.dtype == torch.bfloat16 else x
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    return stock


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_bits_and_gradients_are_torchs(dtype):
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    x, w, b, scale, shift = tensors((2, N // 2, D), (H, D), (H,), (D,), (D,), dtype=dtype)
    compare(linear, F.linear, [x, w, b], rtol=rtol)
    conv = lambda x, w, b: torch.addmm(b, x.view(-1, D), w).view(2, N // 2, H)  # noqa: E731
    compare(lambda x, w, b: linear(x, w, b, transposed=True), conv, [x, w.t().contiguous(), b], rtol=rtol)
    compare(
        lambda x, w, b: layer_norm(x, (D,), w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (D,), w, b, 1e-5),
        [x, scale, shift],
        rtol=rtol,
    )
    compare(lambda x, w: rms_norm(x, w, 1e-6, lambda t: rms()(t, w)), rms(), [x, scale], rtol=rtol)
    gate, up = tensors((N, H), (N, H), dtype=dtype, seed=1)
    for function in (nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), torch.sin):
        compare(lambda x, f=function: activation(x, f, slope_of(f)), function, [gate], rtol=rtol)
        stock = lambda g, u, f=function: activation_reference.gated_activation(g, u, f)  # noqa: E731
        compare(lambda g, u, f=function: gated_activation(g, u, f, slope_of(f)), stock, [gate, up], rtol=rtol)
    compare(lambda x: dropout(x, 0.3), lambda x: F.dropout(x, 0.3), [x], rtol=rtol)


def test_norms_against_their_formulas():
    x, w, b = tensors((N, D), (D,), (D,))
    ours = lambda x, w, b: layer_norm(x, (D,), w, b, 1e-5)  # noqa: E731
    compare(ours, lambda x, w, b: norm_reference.layer_norm(x, w, b, 1e-5), [x, w, b], equal=False)
    rows, pull = x.detach().requires_grad_(), torch.randn(N, D, dtype=torch.float64)
    weight = w.detach().requires_grad_()
    rms_norm(rows, weight, 1e-6, lambda t: rms()(t, weight)).backward(pull)
    grad_x, grad_w = norm_reference.rms_norm_backward(x.detach(), w.detach(), 1e-6, pull)
    torch.testing.assert_close(rows.grad, grad_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, grad_w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("dtype", "held"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_a_layer_norm_of_whatever_type_is_torchs(dtype, held, autocast, coded):
    codec = Affine() if coded else None
    (x,), params = tensors((N, D), dtype=dtype), tensors((D,), (D,), dtype=held)

    def run(norm):
        def call(*inputs):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return norm(inputs[0], (D,), *inputs[1:], 1e-5)

        return call

    ours = run(lambda *given: layer_norm(*given, codec=codec))
    compare(ours, run(F.layer_norm), [x, *params], rtol=5e-2)


def test_a_weight_stored_around_zero():
    x, w = tensors((N, D), (D,))
    stock = lambda x, w: rms()(x, 1 + w)  # noqa: E731
    compare(lambda x, w: rms_norm(x, w, 1e-6, lambda t: stock(t, w), offset=1.0), stock, [x, w])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
def test_bits_come_back(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.4
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-count // 8)
    assert torch.equal(unpack(packed, count, torch.tensor(2.5)), mask * 2.5)


@pytest.mark.parametrize("shape", [(D,), (N, D), (2, 3, D), (2, 2, 3, D)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_of_a_linear_may_be_written_to(shape, bias):
    inputs = tensors(shape, (H, D), *[(H,)] * bias)
    compare(lambda x, *wb: linear(x, *wb).mul_(2).relu_(), lambda x, *wb: F.linear(x, *wb).mul_(2).relu_(), inputs)


# -- attention ----------------------------------------------------------------------------------------------------

B, HEADS, L, WIDTH = 2, 3, 8, 4


def masks():
    padded = torch.ones(B, 1, L, L, dtype=torch.bool)
    padded[1, :, :, 5:] = False
    additive = torch.zeros(B, 1, L, L, dtype=torch.float64).masked_fill_(~padded, torch.finfo(torch.float64).min)
    return {"none": None, "boolean": padded, "additive": additive}


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_attention_is_torchs(mask, dtype):
    chosen = masks().get(mask)
    chosen = chosen.to(dtype) if mask == "additive" else chosen
    causal = mask == "causal"
    inputs = tensors(*[(B, HEADS, L, WIDTH)] * 3, dtype=dtype)
    compare(
        lambda q, k, v: dropout_attention(q, k, v, chosen, 0.25, causal=causal),
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=chosen, dropout_p=0.25, is_causal=causal
        ).transpose(1, 2),
        inputs,
        rtol=1e-12 if dtype == torch.float64 else 1e-5,
    )


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_attention_under_autocast_is_torchs(mask, biased, dtype):
    chosen, causal = masks().get(mask), mask == "causal"
    chosen = chosen.to(dtype) if mask == "additive" else chosen
    allowed = torch.ones(L, L, dtype=torch.bool).tril()[None, None] if causal else chosen
    inputs = tensors(*[(B, HEADS, L, WIDTH)] * 3, *[(1, HEADS, L, L)] * biased, dtype=dtype)

    def stock(q, k, v, bias=None):
        if bias is None:
            bias = allowed
        elif mask != "none":
            bias = bias + chosen if mask == "additive" else bias.where(allowed, torch.finfo(dtype).min)
        return F.scaled_dot_product_attention(q, k, v, bias, 0.25).transpose(1, 2)

    def under_autocast(function):
        def run(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs)

        return run

    def ours(q, k, v, bias=None):
        return dropout_attention(q, k, v, chosen, 0.25, causal=causal, bias=bias)

    compare(under_autocast(ours), under_autocast(stock), inputs, rtol=3e-2)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("length", [7, L])
@pytest.mark.parametrize("rows", [5, 4, 3])
def test_a_batch_that_parts_do_not_divide(monkeypatch, rows, length, projected):
    monkeypatch.setattr("tightfit.ops.attention.torch.PART_BYTES", 2 * 4 * HEADS * length**2)  # two elements a part
    inputs = tensors(*[(rows, HEADS, length, WIDTH)] * 3, (D, HEADS * WIDTH))

    def stock(q, k, v, w):
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25).transpose(1, 2)
        return F.linear(mixed.reshape(rows, length, -1), w)

    def ours(q, k, v, w):
        mixed = dropout_attention(q, k, v, None, 0.25).reshape(rows, length, -1)
        return (linear if projected else F.linear)(mixed, w)

    compare(ours, stock, inputs)


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal"])
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("parts", [2**20, 1])
def test_a_bias_on_the_scores_learns(monkeypatch, mask, rows, parts):
    monkeypatch.setattr("tightfit.ops.attention.torch.PART_BYTES", parts)  # 1: each batch element by itself
    chosen, causal = masks().get(mask), mask == "causal"
    allowed = torch.ones(L, L, dtype=torch.bool).tril()[None, None] if causal else chosen
    inputs = tensors(*[(B, HEADS, L, WIDTH)] * 3, (rows, HEADS, L, L))

    def stock(q, k, v, bias):
        if mask == "additive":
            bias = bias + chosen
        elif allowed is not None:
            bias = torch.where(allowed, bias, torch.finfo(torch.float64).min)
        return F.scaled_dot_product_attention(q, k, v, bias, 0.25).transpose(1, 2)

    compare(lambda q, k, v, b: dropout_attention(q, k, v, chosen, 0.25, causal=causal, bias=b), stock, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_may_look_at_nothing_looks_at_everything_under_a_bias(dtype):
    chosen = masks()["boolean"].clone()
    chosen[0] = False
    inputs = tensors(*[(B, HEADS, L, WIDTH)] * 3, (1, HEADS, L, L), dtype=dtype)

    def stock(q, k, v, bias):
        bias = torch.where(chosen, bias, torch.finfo(dtype).min)
        return F.scaled_dot_product_attention(q, k, v, bias, 0.25).transpose(1, 2)

    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    compare(lambda q, k, v, b: dropout_attention(q, k, v, chosen, 0.25, bias=b), stock, inputs, rtol=rtol)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_row_that_may_look_at_nothing_gives_zeros_without_a_bias(kind):
    chosen = masks()["boolean"].clone()
    chosen[0] = False
    if kind == "additive":
        chosen = torch.zeros(chosen.shape, dtype=torch.float64).masked_fill_(~chosen, -torch.inf)

    def stock(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, chosen, 0.25).transpose(1, 2)

    compare(lambda q, k, v: dropout_attention(q, k, v, chosen, 0.25), stock, tensors(*[(B, HEADS, L, WIDTH)] * 3))


@pytest.mark.parametrize("held", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("shape", [(64,), (4, 64)], ids=["rows", "more dimensions"])
def test_a_coded_norm_is_torchs_with_whatever_it_has(held, shape):
    (x,) = tensors((N, 4, 64), dtype=torch.float32)
    scale, shift = (t.detach() + 1 for t in tensors(shape, shape, dtype=torch.float32, seed=2))
    given = (scale if held in ("both", "weight") else None, shift if held in ("both", "bias") else None)
    grads = []
    for norm in (F.layer_norm, lambda *given: layer_norm(*given, codec=Affine())):
        leaf, (weight,) = x.detach().clone().requires_grad_(), tensors((3, 64), dtype=torch.float32, seed=4)
        out = norm(leaf, shape, *given, 1e-5)
        linear(out, weight).square().sum().backward()
        grads.append((out.detach(), leaf.grad, weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    for found, wanted in zip(grads[1][1:], grads[0][1:]):
        assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_layer_behind_a_coded_rms_norm_gets_its_output(offset):
    x, w = tensors((N, 64), (64,), dtype=torch.float32)
    found = []
    for codec in (None, Affine()):
        weight = torch.ones(3, 64, requires_grad=True)
        out = rms_norm(x, w, 1e-6, lambda t: rms()(t, offset + w), offset=offset, codec=codec)
        linear(out, weight).square().sum().backward()
        found.append(weight.grad)
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()


def test_norms_of_nothing_with_a_code():
    x, w = torch.zeros(0, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    (layer_norm(x, (64,), w, None, 1e-5, codec=Affine()).sum()).backward()
    (rms_norm(x, w, 1e-6, lambda t: rms()(t, w), codec=Affine()).sum()).backward()
    assert x.grad.shape == (0, 64) and torch.equal(w.grad, torch.zeros(64))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_scaled_sum_hands_its_gradient_to_both(factor):
    compare(
        lambda result, update: add_scaled(result, update * 1, factor),
        lambda result, update: result + update * factor,
        tensors((N, D), (N, D), dtype=torch.float32),
    )


def test_layers_do_not_share_a_code_of_an_input_that_was_written_to():
    codec, weights = Affine(), [torch.zeros(3, 64, requires_grad=True) for _ in range(3)]
    x = torch.randn(N, 64)
    out = linear(x, weights[0], codec=codec).sum() + linear(x, weights[1], codec=codec).sum()
    x.mul_(2)
    (out + linear(x, weights[2], codec=codec).sum()).backward()
    assert torch.equal(weights[0].grad, weights[1].grad)
    torch.testing.assert_close(weights[2].grad, 2 * weights[0].grad, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7])
def test_the_noise_of_dropout_is_the_same_bits_in_backward(p):
    x = torch.ones(64, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    assert torch.equal(x.grad, y)


@pytest.mark.parametrize("function", [nn.SiLU(), nn.GELU()])
def test_what_is_kept_is_not_written_to(function):
    gate, up = tensors((N, H), (N, H), dtype=torch.float32)
    before = gate.detach().clone(), up.detach().clone()
    activation(gate, function, slope_of(function)).sum().backward()
    gated_activation(gate, up, function, slope_of(function)).sum().backward()
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


@pytest.mark.parametrize("kind", ["joint", "no linear"])
@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_a_bias_learns_whoever_runs_the_backward(kind, drop):
    q, k, v, bias, w = tensors(*[(B, HEADS, L, WIDTH)] * 3, (1, HEADS, L, L), (D, HEADS * WIDTH))

    def run(ours):
        def block(q, k, v, bias, w):
            def stock(q, k, v, mask):
                return F.scaled_dot_product_attention(q, k, v, bias, drop).transpose(1, 2).contiguous()

            if not ours:
                mixed = stock(q, k, v, None)
            elif drop:
                mixed = dropout_attention(q, k, v, None, drop, bias=bias)
            else:
                mixed = attention(stock, q, k, v, parameters=(bias,))
            return (linear if ours and kind == "joint" else F.linear)(mixed.reshape(B, L, -1), w)

        return block

    compare(run(True), run(False), [q, k, v, bias, w])


def test_dropout_attention_against_its_formula():
    inputs = tensors(*[(B, HEADS, L, WIDTH)] * 3)
    mask = masks()["boolean"]

    def formula(q, k, v):
        noise = torch.empty(B, HEADS, L, L, dtype=q.dtype).bernoulli_(0.75).div_(0.75)
        return attention_reference.dropout_attention(q, k, v, mask, noise, WIDTH**-0.5).transpose(1, 2)

    compare(lambda q, k, v: dropout_attention(q, k, v, mask, 0.25), formula, inputs, equal=False)


def stock_attention(q, k, v, mask):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


@pytest.mark.parametrize("kind", ["joint", "two users", "no linear"])
@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_the_projection_behind_an_attention_runs_its_backward(kind, drop):
    q, k, v, w = tensors((B, HEADS, L, WIDTH), *[(B, HEADS if drop else 1, L, WIDTH)] * 2, (D, HEADS * WIDTH))
    mask = masks()["boolean"]

    def attend(ours, q, k, v):
        if not drop:
            return attention(stock_attention, q, k, v, mask) if ours else stock_attention(q, k, v, mask)
        if ours:
            return dropout_attention(q, k, v, mask, drop)
        return F.scaled_dot_product_attention(q, k, v, mask, drop).transpose(1, 2).contiguous()

    def block(ours):
        def run(q, k, v, w):
            mixed = attend(ours, q, k, v).reshape(B, L, -1)
            project = linear if ours and kind != "no linear" else F.linear
            out = project(mixed, w)
            return out if kind != "two users" else torch.cat((out, mixed * 2), -1)

        return run

    compare(block(True), block(False), [q, k, v, w])


# -- what is kept -------------------------------------------------------------------------------------------------


def test_linears_behind_a_norm_keep_nothing_of_their_own():
    (x,), (w1, w2, scale) = tensors((N, D), dtype=torch.float32), parameters((H, D), (H, D), (D,))

    def step():
        y = layer_norm(x, (D,), scale, None, 1e-5)
        (linear(y, w1) + linear(y, w2)).sum().backward()

    assert saved_bytes(step) == x.nbytes + 2 * N * 4  # the input, mean and deviation of each row


def test_a_gated_mlp_keeps_gate_and_up():
    (x,), (w1, w2, w3) = tensors((N, D), dtype=torch.float32), parameters((H, D), (H, D), (D, H))

    def step():
        linear(gated_activation(linear(x, w1), linear(x, w2), nn.SiLU(), slope_of(nn.SiLU())), w3).sum().backward()

    assert saved_bytes(step) == x.nbytes + 2 * N * H * 4


def test_attention_keeps_queries_keys_values_and_bits():
    q, k, v = tensors(*[(B, HEADS, L, WIDTH)] * 3, dtype=torch.float32)
    (w,) = parameters((D, HEADS * WIDTH))

    def step():
        linear(dropout_attention(q, k, v, None, 0.25).reshape(B, L, -1), w).sum().backward()

    assert saved_bytes(step) == 3 * q.nbytes + B * HEADS * L * L // 8


def test_dropout_between_a_norm_and_a_linear_adds_bits_only():
    (x,), (w, scale) = tensors((N, D), dtype=torch.float32), parameters((H, D), (D,))

    def step():
        linear(dropout(layer_norm(x, (D,), scale, None, 1e-5), 0.5), w).sum().backward()

    assert saved_bytes(step) == x.nbytes + 2 * N * 4 + N * D // 8

    def stock(x, w, s):
        return F.linear(F.dropout(F.layer_norm(x, (D,), s, None, 1e-5), 0.5), w)

    compare(
        lambda x, w, s: linear(dropout(layer_norm(x, (D,), s, None, 1e-5), 0.5), w), stock, [x, w, scale], rtol=1e-5
    )


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p):
    inputs = tensors((N, D))
    compare(lambda x: dropout(x, p), lambda x: F.dropout(x, p), inputs)
    assert torch.isfinite(dropout(inputs[0], p)).all()


def test_nothing_outlives_the_backward():
    import gc
    import weakref

    x, w, scale = tensors((N, D), (H, D), (D,))
    base = x * 1
    kept = weakref.ref(base.untyped_storage())
    loss = linear(layer_norm(base, (D,), scale, None, 1e-5), w).sum()
    del base
    assert kept() is not None
    loss.backward()
    gc.collect()
    assert kept() is None  # though the loss, and so the graph, is still there


# -- care ---------------------------------------------------------------------------------------------------------


def test_an_output_that_was_written_to_is_kept_itself():
    x, w, scale = tensors((N, D), (H, D), (D,))

    def run(norm, product):
        def function(x, w, s):
            return product(norm(x, (D,), s, None, 1e-5).mul_(2), w)

        return function

    compare(run(layer_norm, linear), run(F.layer_norm, F.linear), [x, w, scale])


def test_frozen_weights_keep_nothing():
    (x,), (w,) = tensors((N, D), dtype=torch.float32), parameters((H, D))
    w.requires_grad_(False)
    assert saved_bytes(lambda: linear(x, w).sum().backward()) == 0


OPERATORS = {
    "linear": lambda x: linear(x, x),
    "layer_norm": lambda x: layer_norm(x, (D,), None, None, 0.1),
    "recompute": lambda x: recompute(torch.sin, x),
    "activation": lambda x: activation(x, nn.SiLU(), slope_of(nn.SiLU())),
    "dropout": lambda x: dropout(x, 0.5),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name):
    (x,) = tensors((D, D))
    with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
        torch.autograd.grad(OPERATORS[name](x).sum(), x, create_graph=True)


def test_autocast_casts_as_torch_does():
    x, w, b, scale = tensors((N, D), (H, D), (H,), (D,), dtype=torch.float32)

    def run(norm, product, act):
        def function(x, w, b, s):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return act(product(norm(x, (D,), s, None, 1e-5), w, b)).float()

        return function

    ours = run(layer_norm, linear, lambda t: activation(t, nn.GELU(), slope_of(nn.GELU())))
    compare(ours, run(F.layer_norm, F.linear, nn.GELU()), [x, w, b, scale], rtol=2e-2)


def test_random_numbers_are_drawn_again():
    (x,) = tensors((N, D))
    compare(
        lambda x: recompute(lambda t: F.dropout(t, 0.5) ** 2, x, random=True), lambda x: F.dropout(x, 0.5) ** 2, [x]
    )


# -- chosen rows --------------------------------------------------------------------------------------------------


class _Spy(Rows):
    """Samples, and knows how many rows it was given."""

    def weight_grad_of_rows(self, grad, noted, rows, transposed):
        def seen(index):
            found = rows(index)
            self.sizes.append((len(found), len(grad)))
            self.rows = found, index
            return found

        self.sizes = []
        return super().weight_grad_of_rows(grad, noted, seen, transposed)


@pytest.mark.parametrize("kind", ["layer norm", "rms norm", "gelu", "swiglu"])
def test_a_sampling_linear_has_only_the_rows_it_chose_rebuilt(kind):
    x, up, scale, shift = tensors((4, 10, 64), (4, 10, 64), (64,), (64,))
    make = {
        "layer norm": lambda: layer_norm(x, (64,), scale, shift, 1e-5),
        "rms norm": lambda: rms_norm(x, scale, 1e-6, lambda t: rms()(t, scale)),
        "gelu": lambda: activation(x, nn.GELU(), slope_of(nn.GELU())),
        "swiglu": lambda: gated_activation(x, up, nn.SiLU(), slope_of(nn.SiLU())),
    }[kind]
    (weight,) = tensors((24, 64), seed=3)
    codec, calls = _Spy(0.3, min_rows=1), []
    out = make()
    source = source_of(out)
    inner = source.rebuild._make
    source.rebuild._make = lambda *kept: calls.append(len(kept[0])) or inner(*kept)
    linear(out, weight, codec=codec).sum().backward()
    assert codec.sizes == [(12, 40)]
    assert calls == [12]
    found, index = codec.rows
    torch.testing.assert_close(found, out.detach().reshape(40, 64)[index], rtol=1e-12, atol=1e-12)


def test_two_parts_of_one_tensor_are_noted_apart():
    whole = torch.randn(8, 10, 64)
    for half in (whole[:4], whole[4:]):
        rows = half.reshape(-1, 64)
        torch.testing.assert_close(Rows(0.3, min_rows=1).note(rows), rows.norm(dim=-1))


def test_hooks_on_gradients_of_what_is_recomputed_run_once():
    x, scale = tensors((N, D), (D,))
    scale.register_hook(lambda grad: grad / 2)
    recompute(lambda t: torch.tanh(t) * scale, x, parameters=(scale,)).sum().backward()
    torch.testing.assert_close(scale.grad, torch.tanh(x.detach()).sum(0) / 2)
