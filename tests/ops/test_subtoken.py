"""Sub-token projections: the estimate, what is kept of x, and where the direction comes from."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from tightfit.core.memory import allocator_peak, live_bytes, saved_bytes
from tightfit.ops.codec import Like
from tightfit.ops.linear import linear
from tightfit.ops.rows import attention_masks
from tightfit.ops.subtoken import INITS, Subtoken
from tightfit.ops.subtoken import reference as ref

# even, padded, padded past a whole group, one channel each, one group
CUTS = [(12, 3), (10, 4), (10, 6), (7, 7), (5, 1)]
each_cut = pytest.mark.parametrize(("width", "groups"), CUTS)
each_init = pytest.mark.parametrize("init", INITS)
OUT, N = 6, 40


def tensors(width, n=N, out=OUT, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, n // 2, width), (out, width), (out,), (2, n // 2, out))
    x, w, b, pull = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return (x + 0.3).requires_grad_(), Parameter(w), Parameter(b), pull


def used_direction(codec, packed):
    return codec._kept_direction(packed).double()


@each_cut
@each_init
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_estimate_is_the_projection(width, groups, init, dtype):
    x, _, _, pull = tensors(width, dtype=dtype)
    x = x.detach()
    codec = Subtoken(width, groups, init, scale=0.5)
    packed = codec.encode(x)
    scale = 0.5 * (codec.size if init == "random_unbiased" else 1)
    v = used_direction(codec, packed)
    assert v.norm() == pytest.approx(1, abs=1e-6)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    found = codec.decode(packed, x.shape, x.dtype)
    assert found.shape == x.shape and found.dtype == x.dtype
    torch.testing.assert_close(found.double(), ref.estimate(x.double(), v, groups, scale), **tolerance)
    rows, like = pull.reshape(-1, OUT), Like(x.shape, x.dtype)
    wanted = rows.double().t() @ found.double().reshape(-1, width)
    allowed = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-5}
    for transposed in (False, True):
        grad = codec.weight_grad(packed, rows, like, transposed).double()
        torch.testing.assert_close(grad.t() if transposed else grad, wanted, **allowed)


@each_cut
def test_a_second_projection_changes_nothing(width, groups):
    x = tensors(width)[0].detach()
    codec = Subtoken(width, groups, "random")
    if width % groups:  # the padding cuts the estimate, which is no multiple of v any more
        x = x[..., : width // codec.size * codec.size]
        codec = Subtoken(x.shape[-1], x.shape[-1] // codec.size, "random")
    once = codec.decode(codec.encode(x), x.shape, x.dtype)
    twice = codec.decode(codec.encode(once), x.shape, x.dtype)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-6)


@each_init
def test_output_and_the_other_gradients_are_exact(init):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, w, b, pull = tensors(12, dtype=dtype)
        found, wanted = linear(x, w, b, codec=Subtoken(12, 3, init)), F.linear(x, w, b)
        assert torch.equal(found, wanted)
        grads = [torch.autograd.grad(y, (x, w, b), pull) for y in (found, wanted)]
        tolerance = 0 if dtype == torch.float64 else torch.finfo(dtype).eps
        torch.testing.assert_close(grads[0][0], grads[1][0], rtol=4 * tolerance, atol=4 * tolerance)
        torch.testing.assert_close(grads[0][2], grads[1][2], rtol=4 * tolerance, atol=4 * tolerance)
        assert not torch.allclose(grads[0][1], grads[1][1], rtol=0.1)


@pytest.mark.parametrize("init", INITS[:2])
def test_multiples_of_the_direction_give_the_exact_gradient(init):
    v = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    factors = torch.rand(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    x = (factors[:, :, None] * v).flatten(1)
    _, w, b, pull = tensors(12)
    grads = []
    for codec in (Subtoken(12, 4, init), None):
        y = linear(x, w, b, codec=codec) if codec else F.linear(x, w, b)
        grads.append(torch.autograd.grad(y, w, pull.reshape(N, OUT))[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "groups"), [(48, 12), (50, 7)])
def test_random_unbiased_has_the_right_mean(width, groups):
    x, _, _, pull = tensors(width, out=24)
    codec, rows = Subtoken(width, groups, "random_unbiased"), pull.reshape(N, 24)
    exact = rows.t() @ x.detach().reshape(N, width)
    draws = 400
    found = []
    for _ in range(draws):
        found.append(codec.weight_grad(codec.encode(x.detach()), rows, Like(x.shape, x.dtype), False))
    errors = torch.stack(found) - exact
    one = errors.square().sum((1, 2)).mean()
    assert errors.mean(0).norm() <= 1.5 * (one / draws).sqrt()
    assert one <= 2 * codec.size * exact.norm() ** 2  # about size - 1 where the sub-tokens are alike


@each_cut
@each_init
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_as_promised(width, groups, init, dtype):
    x, w, b, _ = tensors(width, dtype=dtype)
    codec = Subtoken(width, groups, init)
    promised = codec.nbytes(x.shape, dtype)
    assert saved_bytes(lambda: linear(x, w, b, codec=codec).sum().backward()) == promised
    direction = 0 if codec.keeps_direction else 4 * codec.size
    assert promised <= N * groups * dtype.itemsize + direction


@pytest.mark.parametrize(("width", "groups"), [(768, 32), (700, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_input_is_ever_in_memory(width, groups, dtype):
    n = 4096
    x, grad = torch.randn(n, width).to(dtype), torch.randn(n, 8).to(dtype)

    def step():
        codec = Subtoken(width, groups, "batch_average")
        codec.weight_grad(codec.encode(x), grad, Like(x.shape, x.dtype), False)

    step()
    before = live_bytes()
    assert allocator_peak(step) - before < 0.35 * x.nbytes


def test_what_is_kept_goes_with_the_graph():
    x, w, b, _ = tensors(12)
    codec = Subtoken(12, 3)
    gc.collect()
    before = live_bytes()
    y = linear(x, w, b, codec=codec)
    assert live_bytes() > before
    del y
    assert live_bytes() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_direction_follows_its_layer():
    codec = Subtoken(12, 3)
    x, grad = torch.randn(N, 12), torch.randn(N, OUT)
    wanted = codec.weight_grad(codec.encode(x), grad, Like(x.shape, x.dtype), False)
    found = codec.weight_grad(codec.encode(x.cuda()), grad.cuda(), Like(x.shape, x.dtype), False)
    assert codec.direction.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


# -- the direction --------------------------------------------------------------------------------------------------


@each_cut
def test_the_average_direction(width, groups):
    x, other = (tensors(width, seed=s)[0].detach() for s in (0, 1))
    wanted, second = (ref.average_direction(t, groups).float() for t in (x, other))
    once, every = Subtoken(width, groups), Subtoken(width, groups, "batch_average")
    for batch, now in ((x, wanted), (other, second)):
        once.encode(batch)
        torch.testing.assert_close(once.direction, wanted)
        torch.testing.assert_close(every.encode(batch)[1], now)
    low = Subtoken(width, groups)
    low.encode(x.bfloat16())
    torch.testing.assert_close(low.direction, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-20])
def test_a_mean_without_direction_gives_the_constant_one(value):
    codec = Subtoken(12, 3)
    codec.encode(torch.full((4, 12), value))
    torch.testing.assert_close(codec.direction, torch.full((4,), 0.5))


def test_masked_rows_do_not_count_in_the_mean():
    x = tensors(10)[0].detach()
    valid = torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.5
    for dtype in (torch.float64, torch.bfloat16):
        codec, plain = Subtoken(10, 4), Subtoken(10, 4)
        with attention_masks(valid.view(2, N // 2)):
            codec.encode(x.to(dtype))
        plain.encode(x.reshape(N, 10)[valid].to(dtype))
        torch.testing.assert_close(codec.direction, plain.direction)


def test_random_directions_leave_the_random_state_alone():
    before = torch.get_rng_state()
    codecs = [Subtoken(12, 3, "random", seed=s) for s in (0, 0, 1)]
    drawn = Subtoken(12, 3, "random_unbiased")
    first = drawn.encode(torch.ones(2, 12))[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(codecs[0].direction, codecs[1].direction)
    assert not torch.equal(codecs[0].direction, codecs[2].direction)
    assert torch.equal(drawn.encode(torch.ones(2, 12))[1], first)  # until its step has been taken
    drawn.weight_grad((torch.ones(2, 3), first), torch.ones(2, 5), Like(torch.Size((2, 12)), torch.float32), False)
    assert not torch.equal(drawn.encode(torch.ones(2, 12))[1], first)


@each_init
def test_a_checkpointed_layer_takes_the_same_sample(init):
    x, w, b, pull = tensors(12)
    grads = []
    for run in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=False)):
        codec = Subtoken(12, 3, init)
        for _ in range(2):
            (grad,) = torch.autograd.grad(run(lambda x, c=codec: linear(x, w, b, codec=c).sin()), w, pull)
            grads.append(grad)
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])
    assert torch.equal(grads[0], grads[1]) == (init != "random_unbiased")


@each_init
def test_state_comes_back(init):
    x, w, b, pull = tensors(12)

    def grad(codec):
        return torch.autograd.grad(linear(x.clone(), w, b, codec=codec), w, pull)[0]

    codec = Subtoken(12, 3, init, seed=1)
    grad(codec)
    torch.manual_seed(99)
    other, twin = Subtoken(12, 3, init, seed=2), copy.deepcopy(codec)
    other.load_state({k: t.clone() for k, t in codec.state().items()})
    wanted = grad(codec)
    assert torch.equal(grad(other), wanted) and torch.equal(grad(twin), wanted)
    assert all(torch.equal(t, other.state()[k]) for k, t in codec.state().items())
    if init == "batch_average_once":
        codec.direction.zero_()
        assert twin.direction.any()


def test_random_directions_differ_by_layer_and_by_the_seed_of_torch():
    def direction(torch_seed, seed):
        torch.manual_seed(torch_seed)
        return Subtoken(12, 3, "random", seed=seed).direction

    assert torch.equal(direction(1, 0), direction(1, 0))
    assert not torch.equal(direction(1, 0), direction(1, 1)) and not torch.equal(direction(1, 0), direction(2, 0))


@each_init
@each_cut
def test_a_plan_sees_no_values(width, groups, init):
    codec = Subtoken(width, groups, init)
    twin = copy.deepcopy(codec)
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin.direction = torch.empty(codec.size)
        x, w = torch.empty(N, width, requires_grad=True), torch.empty(OUT, width, requires_grad=True)
        linear(x, w, codec=twin).sum().backward()
        assert w.grad.shape == w.shape
    assert not codec.settled and codec.draws == 0


# -- bad input ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"groups": 13}, "groups is 13; a token of 12 channels is cut into 1 to 12 groups"),
        ({"groups": 0}, "groups is 0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"init": "mean"}, "init is 'mean'; choose one of batch_average_once"),
    ):
        with pytest.raises(ValueError, match=message):
            Subtoken(12, **{"groups": 3, **options})
    with pytest.raises(ValueError, match="the input has 8 channels; this codec was made for 12"):
        Subtoken(12, 3).encode(torch.ones(2, 8))
    with pytest.raises(TypeError, match=r"the input is torch.int64"):
        linear(torch.ones(2, 12, dtype=torch.int64), tensors(12)[1], codec=Subtoken(12, 3))


def test_no_rows():
    _, w, b, _ = tensors(12)
    y = linear(torch.ones(0, 12, dtype=torch.float64), w, b, codec=Subtoken(12, 3))
    y.sum().backward()
    assert y.shape == (0, OUT) and w.grad.shape == w.shape and not w.grad.any()


def test_a_nan_reaches_the_gradient():
    x, w, b, pull = tensors(12)
    with torch.no_grad():
        x[0, 0, 5] = float("nan")
    (grad,) = torch.autograd.grad(linear(x, w, b, codec=Subtoken(12, 3)), w, pull)
    assert grad[:, 4:8].isnan().all() and not grad[:, :4].isnan().any()


def test_writing_to_the_input_afterwards_changes_nothing():
    x, w, b, pull = tensors(12)
    grads = []
    for write in (False, True):
        given = x.detach().clone()
        y = linear(given, w, b, codec=Subtoken(12, 3))
        if write:
            given.zero_()
        grads.append(torch.autograd.grad(y, w, pull)[0])
    assert torch.equal(*grads)


def test_gradients_of_gradients_are_refused():
    x, w, b, pull = tensors(12)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(linear(x, w, b, codec=Subtoken(12, 3)), w, pull, create_graph=True)


def _rank(rank, file, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    out = []
    for init in ("batch_average_once", "random"):
        codec = Subtoken(12, 3, init)
        codec.encode(torch.randn(5, 12) + rank)
        out.append(codec.direction.tolist())
    results[rank] = out
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_on_a_kept_direction(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (str(tmp_path / "ranks"), results), nprocs=2)
        assert results[0] == results[1]
