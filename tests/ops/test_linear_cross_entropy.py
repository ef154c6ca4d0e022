"""linear_cross_entropy against its reference, its laws, and its promise to hold no full logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tightfit.ops.linear_cross_entropy import HeadLoss, linear_cross_entropy
from tightfit.ops.linear_cross_entropy.reference import linear_cross_entropy as reference
from tightfit.ops.linear_cross_entropy.torch import block_tokens
from tightfit.ops.rows import Rows

VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "split": {"frozen": 9},
    "split-bias": {"bias": True, "frozen": 9},
    "scale": {"bias": True, "scale": 0.37},
    "softcap": {"softcap": 1.5, "scale": 2.0},
    "smoothing": {"label_smoothing": 0.2},
    "everything": {"bias": True, "frozen": 9, "scale": 1.7, "softcap": 2.5, "label_smoothing": 0.1},
    "split-smoothing": {"frozen": 9, "label_smoothing": 0.3},
}


def problem(shape=(11,), width=5, kept=7, frozen=0, bias=False, dtype=torch.float64, ignored=True, **options):
    """Random tensors for one call: (hidden, weight, target, bias or None) and the keyword arguments."""
    hidden = torch.randn(*shape, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(kept, width, dtype=dtype, requires_grad=True)
    target = torch.randint(0, kept + frozen, shape)
    if ignored and target.numel() > 2:
        target.view(-1)[1::4] = -100
    row_bias = torch.randn(kept, dtype=dtype, requires_grad=True) if bias else None
    if frozen:
        options["frozen_weight"] = torch.randn(frozen, width, dtype=dtype)
        options["frozen_bias"] = torch.randn(frozen, dtype=dtype) if bias else None
    return (hidden, weight, target, row_bias), options


def loss_and_grads(function, tensors, options, upstream=None):
    hidden, weight, target, bias = tensors
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    loss = function(hidden, weight, target, bias=bias, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.fixture(autouse=True)
def uninitialised_is_nan():
    """Memory that is read before it is written shows up as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Frozen rows in blocks of a few, so that small problems cross block borders."""
    monkeypatch.setattr("tightfit.ops.linear_cross_entropy.torch.BLOCK_BYTES", 64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_reference_in_double(variant, reduction, small_blocks):
    tensors, options = problem(**VARIANTS[variant])
    upstream = torch.randn(11, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7).double()
    ours = loss_and_grads(
        linear_cross_entropy, tensors, {**options, "reduction": reduction, "chunk_tokens": 3}, upstream
    )
    theirs = loss_and_grads(reference, tensors, {**options, "reduction": reduction}, upstream)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, reduction, small_blocks):
    (hidden, weight, target, bias), options = problem(shape=(4,), **VARIANTS[variant])
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)

    def call(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, chunk_tokens=2, **options)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("shape", [(1,), (5, 123), (2, 3, 4), (0,), (3, 0), ()])
@pytest.mark.parametrize("frozen", [0, 6])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_odd_shapes(shape, frozen, reduction):
    tensors, options = problem(shape=shape, frozen=frozen, dtype=torch.float32)
    options = {**options, "reduction": reduction}
    ours = loss_and_grads(linear_cross_entropy, tensors, {**options, "chunk_tokens": 64})
    theirs = loss_and_grads(reference, tensors, options)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_blocks_in_single_precision(variant):
    tensors, options = problem(shape=(3, 67), width=24, kept=300, dtype=torch.float32, **VARIANTS[variant])
    ours = loss_and_grads(linear_cross_entropy, tensors, options)
    theirs = loss_and_grads(reference, tensors, options)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision(variant, dtype):
    tensors, options = problem(shape=(96,), width=16, kept=40, dtype=dtype, **VARIANTS[variant])
    options = {**options, "reduction": "sum"}
    ours = loss_and_grads(linear_cross_entropy, tensors, {**options, "chunk_tokens": 32})
    exact = [None if t is None else (t.detach().double().requires_grad_() if t.is_floating_point() else t)
             for t in tensors]  # fmt: skip
    exact_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    theirs = loss_and_grads(reference, tensors, options)
    truth = loss_and_grads(reference, exact, exact_options)
    assert ours[0].dtype == torch.float32
    for mine, stock, right in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == stock.dtype
        error, stock_error = ((t.double() - right).norm() / right.norm() for t in (mine, stock))
        # Every result carries at least one rounding to the dtype, 2^-9 or 2^-12 in norm; ours may not be
        # clearly worse than what the same dtype costs a stock head.
        assert error <= 1.5 * stock_error + torch.finfo(dtype).eps / 2


def test_weight_gradient_is_summed_in_single_precision():
    """Of 2048 equal shares each 1/2048 of the sum, a bfloat16 buffer would lose all after the 256th."""
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(2048, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, target, reduction="sum", chunk_tokens=1).backward()
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-1024.0], [1024.0]]))


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_float16_survives_a_loss_scale(loss_scale):
    tensors, _ = problem(shape=(200,), width=8, kept=12, dtype=torch.float16)
    ours = loss_and_grads(linear_cross_entropy, tensors, {}, torch.tensor(loss_scale))
    theirs = loss_and_grads(reference, tensors, {}, torch.tensor(loss_scale))
    for mine, right in zip(ours[1:], theirs[1:], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-3 * right.abs().max().item())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [0, 9])
def test_autocast_matches_stock(weight_dtype, frozen):
    (hidden, weight, target, _), options = problem(shape=(70,), width=16, kept=33, frozen=frozen,
                                                   dtype=torch.float32)  # fmt: skip
    weight = weight.detach().to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_grads(linear_cross_entropy, (hidden, weight, target, None), options)
        theirs = loss_and_grads(reference, (hidden, weight, target, None), options)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == right.dtype
        # two to three bfloat16 roundings (2^-8 each at worst) relative to the largest entry
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=1e-2 * right.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_frozen_rows_of_another_dtype(frozen_dtype, reduction, small_blocks):
    tensors, options = problem(frozen=9, dtype=torch.float32)
    options = {**options, "frozen_weight": options["frozen_weight"].to(frozen_dtype), "reduction": reduction}
    for mine, right in zip(
        loss_and_grads(linear_cross_entropy, tensors, options), loss_and_grads(reference, tensors, options)
    ):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_frozen_rows_receive_no_gradient():
    tensors, options = problem(frozen=9)
    options["frozen_weight"].requires_grad_()
    linear_cross_entropy(*tensors[:3], **options).backward()
    assert options["frozen_weight"].grad is None and tensors[1].grad is not None


def test_split_head_is_the_full_head_with_frozen_rows():
    """Loss and the gradients of hidden and of the kept rows equal those of one head over all rows."""
    (hidden, weight, target, _), options = problem(shape=(40,), kept=7, frozen=9)
    whole = torch.cat([weight.detach(), options["frozen_weight"]]).requires_grad_()
    split = loss_and_grads(linear_cross_entropy, (hidden, weight, target, None), options)
    full = loss_and_grads(linear_cross_entropy, (hidden, whole, target, None), {})
    torch.testing.assert_close(split[0], full[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(split[1], full[1], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(split[2], full[2][:7], rtol=1e-11, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 50), st.integers(0, 2**31),
    st.sampled_from([None, 3.0]),
)  # fmt: skip
def test_frozen_mass_is_what_pruning_loses(tokens, kept, frozen, chunk, seed, softcap):
    """L_full - L_pruned = mean(-log(1 - p_D)) when all targets are kept rows."""
    torch.manual_seed(seed)
    (hidden, weight, _, _), options = problem(shape=(tokens,), kept=kept, frozen=frozen)
    target = torch.randint(0, kept, (tokens,))
    common = {"softcap": softcap, "chunk_tokens": chunk}
    result = linear_cross_entropy(hidden, weight, target, return_frozen_mass=True, **common, **options)
    pruned = linear_cross_entropy(hidden, weight, target, **common)
    assert isinstance(result, HeadLoss) and not result.frozen_mass.requires_grad
    assert result.frozen_mass.shape == (tokens,)
    torch.testing.assert_close(result.loss - pruned, -torch.log1p(-result.frozen_mass).mean(), rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_blocks_do_not_change_the_result(tokens, first, second, seed, frozen):
    torch.manual_seed(seed)
    tensors, options = problem(shape=(tokens,), frozen=5 if frozen else 0, label_smoothing=0.1)
    one, other = (
        loss_and_grads(linear_cross_entropy, tensors, {**options, "reduction": "sum", "chunk_tokens": c})
        for c in (first, second)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_mean_and_none_agree():
    tensors, options = problem(frozen=4)
    each = linear_cross_entropy(*tensors[:3], reduction="none", **options)
    mean = linear_cross_entropy(*tensors[:3], reduction="mean", **options)
    torch.testing.assert_close(each.sum() / (tensors[2] != -100).sum(), mean)


@pytest.mark.parametrize("reference_too", [linear_cross_entropy, reference])
def test_frozen_mass_without_frozen_rows_is_zero(reference_too):
    tensors, _ = problem()
    assert reference_too(*tensors[:3], return_frozen_mass=True).frozen_mass.tolist() == [0.0] * 11


def test_frozen_mass_equals_reference_also_for_ignored_tokens(small_blocks):
    tensors, options = problem(frozen=9, softcap=2.0)
    ours, right = (
        f(*tensors[:3], return_frozen_mass=True, **options).frozen_mass for f in (linear_cross_entropy, reference)
    )
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_as_in_torch(reduction, smoothing):
    (hidden, weight, target, _), options = problem(frozen=4)
    target = torch.full_like(target, -100)
    options = {**options, "reduction": reduction, "label_smoothing": smoothing}
    ours = loss_and_grads(linear_cross_entropy, (hidden, weight, target, None), options)
    theirs = loss_and_grads(reference, (hidden, weight, target, None), options)
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    assert ours[0].isnan().all() == (reduction == "mean")
    assert all(not g.any() for g in ours[1:] + theirs[1:])  # zero, not NaN


def test_ignore_index_may_be_a_row_of_either_half():
    tensors, options = problem(shape=(60,), frozen=9, ignored=False)
    for ignore in (0, 6, 7, 15):
        ours = loss_and_grads(linear_cross_entropy, tensors, {**options, "ignore_index": ignore})
        theirs = loss_and_grads(reference, tensors, {**options, "ignore_index": ignore})
        for mine, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, right)


def test_large_logits_keep_a_small_loss_accurate():
    """Logits of 1e4 with a loss of about 1e-4: log-sum-exp minus target logit would be all rounding error."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[10000.0], [9991.0], [9000.0]])
    expected = F.cross_entropy((hidden @ weight.T).double(), torch.tensor([0]))
    for frozen in (None, 1, 2):
        options = {} if frozen is None else {"frozen_weight": weight[frozen:]}
        loss = linear_cross_entropy(hidden, weight[:frozen], torch.tensor([0]), **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_frozen_half_far_above_or_below_stays_finite(small_blocks):
    for shift in (-1e4, 1e4):
        tensors, options = problem(frozen=9, bias=True, dtype=torch.float32)
        options["frozen_bias"] = options["frozen_bias"] + shift
        ours = loss_and_grads(linear_cross_entropy, tensors, options)
        for mine, right in zip(ours, loss_and_grads(reference, tensors, options), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


# memory


class LargestOutput(TorchDispatchMode):
    """Records the element count of the largest tensor any operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def saved_bytes(call) -> int:
    """Bytes of the distinct storages kept for the backward of `call`."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(storages.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [0, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_never_exist(reduction, frozen, dtype, monkeypatch):
    tokens, width, kept, chunk = 512, 16, 500, 32
    monkeypatch.setattr("tightfit.ops.linear_cross_entropy.torch.BLOCK_BYTES", 4 * 200 * chunk)
    tensors, options = problem(shape=(tokens,), width=width, kept=kept, frozen=frozen, dtype=dtype, softcap=9.0)
    options = {**options, "reduction": reduction, "chunk_tokens": chunk}
    with LargestOutput() as largest:
        loss_and_grads(linear_cross_entropy, tensors, options)
    allowed = max(chunk * kept, tokens * width, kept * width, 200 * chunk, frozen * width)
    assert largest.numel <= allowed < tokens * kept / 10
    with LargestOutput() as largest:
        loss_and_grads(reference, tensors, {**options, "reduction": reduction})
    assert largest.numel >= tokens * kept  # the recorder does see full logits


@pytest.mark.parametrize("frozen", [0, 50])
def test_saved_bytes(frozen):
    (hidden, weight, target, bias), options = problem(
        shape=(64,), width=16, kept=100, frozen=frozen, bias=True, dtype=torch.float32
    )
    gradients = (hidden.numel() + weight.numel() + bias.numel()) * 4 + 8  # and the count of tokens
    call = lambda **kw: linear_cross_entropy(hidden, weight, target, bias=bias, **options, **kw)  # noqa: E731
    assert saved_bytes(call) == gradients
    inputs = [hidden, weight, target, bias, *(t for t in options.values() if isinstance(t, torch.Tensor))]
    assert saved_bytes(lambda: call(reduction="none")) == sum(t.nbytes for t in inputs)
    with torch.no_grad():
        assert saved_bytes(call) == 0


def peak_bytes(call) -> int:
    """Most bytes the allocator had handed out at once during `call`, above those alive before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(events))


@pytest.mark.parametrize("frozen", [0, 6000])
def test_one_block_of_logits_at_a_time(frozen, monkeypatch):
    block = 4 * 64 * 2000
    monkeypatch.setattr("tightfit.ops.linear_cross_entropy.torch.BLOCK_BYTES", block)
    tensors, options = problem(shape=(320,), width=8, kept=2000, frozen=frozen, dtype=torch.float32)
    gradients = tensors[0].nbytes + tensors[1].nbytes
    ours = peak_bytes(lambda: loss_and_grads(linear_cross_entropy, tensors, {**options, "chunk_tokens": 64}))
    assert ours <= 1.2 * block + gradients + 2 * tensors[0].nbytes * bool(frozen)
    assert peak_bytes(lambda: loss_and_grads(reference, tensors, options)) > 10 * block


def test_only_wanted_gradients_are_formed():
    """A frozen head keeps no weight gradient, a detached input none of its own, no_grad nothing at all."""
    hidden, weight = torch.randn(64, 8), torch.randn(90, 8)
    target = torch.randint(0, 90, (64,))
    for head, tokens in itertools.product([False, True], [False, True]):
        call = lambda: linear_cross_entropy(  # noqa: E731
            hidden.detach().requires_grad_(tokens), weight.detach().requires_grad_(head), target  # noqa: B023
        )  # fmt: skip
        expected = 4 * (tokens * hidden.numel() + head * weight.numel())
        assert saved_bytes(call) == (expected + 8 if expected else 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variant", ["bias", "split", "everything"])
def test_an_estimated_weight_gradient_is_right_in_the_mean_and_all_else_exact(variant, reduction):
    tensors, options = problem((40,), width=64, reduction=reduction, chunk_tokens=16, **VARIANTS[variant])
    weight, bias = tensors[1], tensors[3]
    loss, d_hidden, exact, *d_bias = loss_and_grads(linear_cross_entropy, tensors, options)
    draws, total, squares = 400, 0, 0
    for _ in range(draws):
        found = loss_and_grads(linear_cross_entropy, tensors, {**options, "codec": Rows(0.3, min_rows=1)})
        assert torch.equal(found[0], loss)
        assert torch.equal(found[1], d_hidden)
        assert bias is None or torch.equal(found[3], d_bias[0])
        total, squares = total + found[2], squares + (found[2] - exact).square().sum()
    assert exact.shape == weight.shape
    assert squares > 0
    assert (total / draws - exact).norm() <= 2 * (squares / draws**2).sqrt()


def test_tokens_without_a_target_are_never_drawn():
    tensors, options = problem((64,), width=64, ignored=False, chunk_tokens=64)
    tensors[2][10:] = -100
    exact = loss_and_grads(linear_cross_entropy, tensors, options)[2]
    found = loss_and_grads(linear_cross_entropy, tensors, {**options, "codec": Rows(0.2, min_rows=1)})[2]
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-14)


def test_default_block_is_8_to_16_mib_or_64_tokens():
    for rows in (1000, 8192, 30_522, 32_000, 50_257, 128_256, 262_144):
        tokens = block_tokens(rows)
        assert tokens % 64 == 0
        assert 8 * 2**20 <= 4 * rows * tokens <= 16 * 2**20 or tokens == 64


# autograd


def test_backward_twice_and_double_backward(small_blocks):
    for reduction in ("sum", "none"):
        (hidden, weight, target, _), options = problem(frozen=9)
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, **options).sum()
        first = torch.autograd.grad(2 * loss, [hidden, weight], retain_graph=True)
        second = torch.autograd.grad(2 * loss, [hidden, weight])
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, **options).sum()
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_weight_gradient_buffer_becomes_grad():
    """The buffer filled in the forward is scaled in place and handed over: no second (K, d) tensor."""
    (hidden, weight, target, _), _ = problem(kept=50, width=50, dtype=torch.float32)
    kept = []
    with saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        loss = linear_cross_entropy(hidden, weight, target)
    (loss * 3).backward()
    assert weight.grad.data_ptr() in kept


def test_gradients_accumulate_over_steps():
    (hidden, weight, target, _), _ = problem()
    for _ in range(2):
        linear_cross_entropy(hidden, weight, target).backward()
    right = loss_and_grads(reference, (hidden, weight, target, None), {})
    torch.testing.assert_close(weight.grad, 2 * right[2])
    torch.testing.assert_close(hidden.grad, 2 * right[1])


def test_tied_weight():
    table = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    ids, target = torch.randint(0, 12, (9,)), torch.randint(0, 12, (9,))
    grads = []
    for function in (linear_cross_entropy, reference):
        loss = function(torch.tanh(F.embedding(ids, table)), table, target)
        grads.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpoint(reduction):
    (hidden, weight, target, _), options = problem(frozen=4)

    def block(hidden, weight):
        return linear_cross_entropy(hidden.tanh(), weight, target, reduction=reduction, **options).sum()

    plain = torch.autograd.grad(block(hidden, weight), [hidden, weight])
    for reentrant in (False, True):
        loss = checkpoint(block, hidden, weight, use_reentrant=reentrant)
        hidden.grad = weight.grad = None
        loss.backward()
        assert torch.equal(hidden.grad, plain[0]) and torch.equal(weight.grad, plain[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [0, 9])
def test_fake_tensors(reduction, frozen):
    with FakeTensorMode():
        tensors, options = problem(shape=(3, 50), frozen=frozen, bias=True, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss, *grads = loss_and_grads(linear_cross_entropy, tensors, {**options, "reduction": reduction})
    assert loss.shape == ((3, 50) if reduction == "none" else ())
    leaves = [tensors[0], tensors[1], tensors[3]]
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in leaves]


def test_meta_tensors():
    hidden, weight = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(5, 4, device="meta")
    linear_cross_entropy(hidden, weight, torch.empty(6, dtype=torch.int64, device="meta")).backward()
    assert hidden.grad.shape == (6, 4)


@pytest.mark.parametrize("variant, reduction", [("split-bias", "mean"), ("softcap", "none")])
def test_compiles_without_graph_break(variant, reduction):
    torch._dynamo.reset()
    tensors, options = problem(dtype=torch.float32, **VARIANTS[variant])
    options = {**options, "reduction": reduction, "chunk_tokens": 6}
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    right = loss_and_grads(linear_cross_entropy, tensors, options)
    for mine, eager in zip(loss_and_grads(compiled, tensors, options), right, strict=True):
        torch.testing.assert_close(mine, eager)


# bad input


@pytest.mark.parametrize("function", [linear_cross_entropy, reference])
@pytest.mark.parametrize("value", [-1, 16, -101])
def test_target_out_of_range(function, value):
    tensors, options = problem(kept=7, frozen=9)
    tensors[2][3] = value
    with pytest.raises(IndexError, match=rf"target {value} .*0\.\.15"):
        function(*tensors[:3], **options)


def test_target_out_of_range_in_a_compiled_graph():
    torch._dynamo.reset()
    (hidden, weight, target, _), _ = problem(dtype=torch.float32)
    target[0] = 7
    with pytest.raises(RuntimeError, match=r"0\.\.6"):
        torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)(hidden, weight, target)


@pytest.mark.parametrize("function", [linear_cross_entropy, reference])
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"hidden": torch.zeros(11, 4)}, ValueError, r"hidden has shape \(11, 4\).*5"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \(5,\)"),
        ({"weight": torch.zeros(0, 5)}, ValueError, "at least one row"),
        ({"weight": torch.zeros(7, 5).half()}, TypeError, "float16"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target has shape \(3,\)"),
        ({"target": torch.zeros(11)}, TypeError, "int64"),
        ({"bias": torch.zeros(5)}, ValueError, r"expected \(7,\)"),
        ({"frozen_bias": torch.zeros(5)}, ValueError, "without frozen_weight"),
        ({"frozen_weight": torch.zeros(3, 4)}, ValueError, r"\(D, 5\)"),
        ({"frozen_weight": torch.zeros(3, 5), "frozen_bias": torch.zeros(4)}, ValueError, "frozen_bias"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"reduction": "avg"}, ValueError, "'avg'.*'mean'"),
        ({"label_smoothing": 1.5}, ValueError, "between 0 and 1"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0"),
    ],
)
def test_bad_arguments(function, change, error, match):
    arguments = {
        "hidden": torch.zeros(11, 5),
        "weight": torch.zeros(7, 5),
        "target": torch.zeros(11, dtype=torch.int64),
    }
    with pytest.raises(error, match=match):
        function(**{**arguments, **change})
