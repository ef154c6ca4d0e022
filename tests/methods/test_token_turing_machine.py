"""TokenTuringMachine: the formulas step by step, streams in pieces, and memory constant in the number of steps."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from checks.real import assert_planned_as_real, gradient_over_ranks
from checks.state import gradients, train
from torch import nn

import tightfit
from tightfit import LearnableMemory, Lora, TokenTuringMachine
from tightfit.core.memory import saved_bytes
from tightfit.methods.token_turing_machine import calls
from tightfit.methods.token_turing_machine.stream import EraseAdd, QuerySummariser, Summariser
from tightfit.nn import TokenTuringStream

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WIDTH = 16
KINDS = {
    "transformer": {},
    "simplified": {"unit": "simplified"},
    "query": {"summariser": "query"},
    "erase-add": {"write": "erase_add"},
    "without-positions": {"positions": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def stream(kind="transformer", *, seed=0, **fields):
    torch.manual_seed(seed)
    defaults = {"inputs": 5, "tokens": 3, "memory": 4, "layers": 2, "mlp": 24, "heads": 2}
    found = TokenTuringStream(WIDTH, **{**defaults, **KINDS[kind], **fields}).double()
    for name, parameter in found.named_parameters():
        if "places" in name or "queries" in name:
            nn.init.normal_(parameter)  # so that they matter
    return found


def inputs(steps=4, tokens=5, seed=1, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, steps, tokens, WIDTH, generator=generator, dtype=torch.double)


# -- the formulas -----------------------------------------------------------------------------------------------------


def summed_up(net, v):
    """softmax over tokens (MLP(LN(V)))^T V, or attention of the queries."""
    if isinstance(net, Summariser):
        scores = F.gelu(F.layer_norm(v, (WIDTH,), net.norm.weight, net.norm.bias) @ net.up.weight.T + net.up.bias)
        scores = scores @ net.down.weight.T + net.down.bias
        return torch.stack([(scores[..., i].exp() / scores[..., i].exp().sum(1, keepdim=True)) for i in
                            range(scores.shape[-1])], 1) @ v  # fmt: skip
    assert isinstance(net, QuerySummariser)
    attention = nn.MultiheadAttention(WIDTH, 8, batch_first=True, dtype=torch.double)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([torch.eye(WIDTH, dtype=torch.double), net.kv.weight]))
        attention.in_proj_bias.copy_(torch.cat([torch.zeros(WIDTH, dtype=torch.double), net.kv.bias]))
        attention.out_proj.weight.copy_(net.out.weight)
        attention.out_proj.bias.copy_(net.out.bias)
    normed = net.norm(v)
    return attention(net.queries.expand(len(v), -1, -1), normed, normed, need_weights=False)[0]


def worked(unit, x):
    """The layers as torch has them."""
    for index in range(unit.depth):
        own = getattr(unit, f"layer_{index}")
        layer = nn.TransformerEncoderLayer(
            WIDTH, own.heads, own.up.out_features, 0.0, F.gelu, batch_first=True, norm_first=True, dtype=torch.double
        )
        pairs = {
            "self_attn.in_proj": own.qkv,
            "self_attn.out_proj": own.out,
            "linear1": own.up,
            "linear2": own.down,
            "norm1": own.norm_1,
            "norm2": own.norm_2,
        }
        state = {}
        for name, module in pairs.items():
            joint = name.endswith("in_proj")
            state[f"{name}_weight" if joint else f"{name}.weight"] = module.weight
            state[f"{name}_bias" if joint else f"{name}.bias"] = module.bias
        layer.load_state_dict(state)
        x = layer(x)
    return unit.norm(x)


def stepped(net, memory, x):
    """One step by the formulas of the paper."""
    both = torch.cat([memory, x], 1)
    places = net.read_places
    read = both if places is None else both + torch.cat([places.memory, places.inputs[: x.shape[1]]])
    z = summed_up(net.read, read)
    if net.unit_kind == "simplified":
        found = worked(net.unit, torch.cat([memory, z], 1))
        return found[:, net.slots :], found[:, : net.slots]
    out = worked(net.unit, z)
    if net.write_kind == "erase_add":
        return out, _erased(net.write, memory, out)
    every = torch.cat([both, out], 1)
    places = net.write_places
    if places is not None:
        every = every + torch.cat([places.memory, places.inputs[: x.shape[1]], places.outputs])
    return out, summed_up(net.write, every)


def _erased(write, memory, out):
    after = torch.empty_like(memory)
    for b, m in itertools.product(range(memory.shape[0]), range(memory.shape[1])):
        left, added = torch.ones(WIDTH, dtype=torch.double), torch.zeros(WIDTH, dtype=torch.double)
        for writer in out[b]:
            likeness = write.key(write.norm(memory[b] + write.places)) @ write.query(writer) / WIDTH**0.5
            w = likeness.exp()[m] / likeness.exp().sum()
            left = left * (1 - w * torch.sigmoid(write.erase(writer)))
            added = added + w * write.add(writer)
        after[b, m] = memory[b, m] * left + added
    return after


@each_kind
def test_a_stream_is_the_formulas_step_by_step(kind):
    net, x = stream(kind), inputs()
    memory, wanted = torch.zeros(2, 4, WIDTH, dtype=torch.double), []
    with torch.no_grad():
        for t in range(x.shape[1]):
            out, memory = stepped(net, memory, x[:, t])
            wanted.append(out)
        found, last = net(x)
    torch.testing.assert_close(found, torch.stack(wanted, 1), **EXACT)
    torch.testing.assert_close(last, memory, **EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@each_kind
def test_replay_is_stored_backpropagation_through_time(kind, dropout):
    net = stream(kind, dropout=dropout)
    plain = copy.deepcopy(net)
    plain.replay = False
    x = inputs().requires_grad_()
    memory = torch.randn(2, 4, WIDTH, dtype=torch.double, requires_grad=True)
    mask = torch.rand(2, 4, 5) < 0.7
    mask[1, 2:] = False
    found = []
    for model in (net, plain):
        torch.manual_seed(0)
        outputs, last = model(x, memory, mask)
        loss = outputs.square().sum() + last.sum()
        found.append((loss, torch.autograd.grad(loss, [x, memory, *model.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0], **EXACT)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@each_kind
def test_a_stream_in_pieces_is_the_stream(kind):
    net, x = stream(kind), inputs(steps=6)
    whole, last = net(x)
    for sizes in ([1] * 6, [2, 4], [5, 1]):
        memory, pieces = None, []
        for piece in x.split(sizes, 1):
            out, memory = net(piece, memory)
            pieces.append(out)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
        torch.testing.assert_close(memory, last, **EXACT)
    # gradients go through the memory that is handed on
    loss = torch.cat(pieces, 1).square().sum()
    for a, b in zip(*(torch.autograd.grad(y, list(net.parameters()), allow_unused=True)
                      for y in (loss, whole.square().sum()))):  # fmt: skip
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **EXACT)


@each_kind
def test_later_inputs_change_nothing_before_them(kind):
    net, x = stream(kind), inputs(steps=5)
    changed = x.clone()
    changed[:, 3] = torch.randn_like(changed[:, 3])
    with torch.no_grad():
        a, b = net(x)[0], net(changed)[0]
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3], b[:, 3])
    assert not torch.allclose(a[:, 4], b[:, 4])  # by the memory


def test_the_order_of_tokens_matters_with_positions_only():
    x = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        net = stream("without-positions")
        torch.testing.assert_close(net(x[:, :, order])[0], net(x)[0], **EXACT)
        net = stream()
        assert not torch.allclose(net(x[:, :, order])[0], net(x)[0])


@pytest.mark.parametrize("masked", [False, True])
def test_a_summary_is_a_mean_with_weights(masked):
    net = stream().read
    x = inputs()[:, 0] * 3
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool() if masked else None
    weights = net.weights(x, mask)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.double), **EXACT)
    if masked:
        assert not weights.masked_select(~mask[:, None]).any()
        torch.testing.assert_close(net(x, mask)[1], x[1, :1].expand(3, -1), **EXACT)


def test_masked_tokens_are_as_good_as_absent():
    net, x = stream(), inputs()
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[:, :, 3:] = False
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    with torch.no_grad():
        wanted = net(x[:, :, :3].contiguous())
        for given in (x, other):
            found = net(given, mask=mask)
            torch.testing.assert_close(found[0], wanted[0], **EXACT)
            torch.testing.assert_close(found[1], wanted[1], **EXACT)
        mask[1, 2:] = False  # the second stream ends after two sets
        found = net(x, mask=mask)
        short = net(x[1:, :2, :3].contiguous())
    torch.testing.assert_close(found[1][1:], short[1], **EXACT)
    torch.testing.assert_close(found[0][1:, :2], short[0], **EXACT)
    assert not found[0][1, 2:].any()
    torch.testing.assert_close(found[0][:1], wanted[0][:1], **EXACT)


def test_erasing_never_turns_memory_around():
    torch.manual_seed(0)
    write = EraseAdd(WIDTH, 4).double()
    with torch.no_grad():
        write.add.weight.zero_()
        write.add.bias.zero_()
        write.erase.bias.fill_(50.0)  # erase everything
        memory, writers = torch.randn(2, 4, WIDTH).double(), torch.randn(2, 3, WIDTH).double() * 10
        after = write(memory, writers)
    assert ((after / memory) >= 0).all()
    assert ((after / memory) <= 1).all()
    torch.testing.assert_close(write.address(memory, writers).sum(-1), torch.ones(2, 3).double(), **EXACT)


def test_memory_has_fixed_places_in_the_simplified_unit():
    net, x = stream("simplified"), inputs(steps=1)
    out, memory = net(x)
    with torch.no_grad():
        both = torch.cat([torch.zeros(2, 4, WIDTH).double(), x[:, 0]], 1) + net.read_places(5)
        found = net.unit(torch.cat([torch.zeros(2, 4, WIDTH).double(), net.read(both)], 1))
    torch.testing.assert_close(memory, found[:, :4], **EXACT)
    torch.testing.assert_close(out[:, 0], found[:, 4:], **EXACT)


# -- what it costs ----------------------------------------------------------------------------------------------------


def _flops(call):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@each_kind
def test_every_step_costs_the_same(kind):
    net = stream(kind)
    with torch.no_grad():
        counts = [_flops(lambda: net(inputs(steps=steps))) for steps in (1, 2, 4)]  # noqa: B023
    assert counts[1] == 2 * counts[0] > 0
    assert counts[2] == 4 * counts[0]


def test_training_keeps_the_memory_between_steps():
    def kept(steps, replay):
        net, x = stream(replay=replay), inputs(steps=steps)
        return saved_bytes(lambda: net(x)[0].sum()) - x.nbytes

    state = 2 * 4 * WIDTH * 8
    assert kept(16, True) - kept(8, True) == 8 * state
    assert kept(16, False) - kept(8, False) > 8 * 10 * state


# -- behind an encoder ------------------------------------------------------------------------------------------------

SMALL = {"tokens": 2, "memory": 3, "segment": 3, "layers": 1, "mlp": 16}


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_sets_of_padding_count_for_nothing_wherever_they_are(pool):
    head = calls.StreamHead(stream(), 5, 3, pool).double()
    hidden, real = inputs(4).flatten(1, 2), torch.ones(2, 20, dtype=torch.bool)
    real[0, :5] = False
    real[1, 10:] = False
    wanted = [head(hidden[:1, 5:], real[:1, 5:]), head(hidden[1:, :10], real[1:, :10])]
    torch.testing.assert_close(head(hidden, real), torch.cat(wanted), **EXACT)


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_the_head_reads_the_encoders_tokens(family, pool):
    model = models.build(family, dropout=0.0).double()
    stock = copy.deepcopy(model)
    tightfit.apply(model, TokenTuringMachine(**SMALL, pool=pool, num_labels=4))
    batch = models.batch(model, size=3)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    out = model(**batch)
    plain = {k: v for k, v in batch.items() if k != "labels"}
    base = stock.base_model(**plain)
    hidden, mask = base.last_hidden_state, batch.get("attention_mask")
    head = model.tight_stream
    for row in range(3):
        tokens = hidden[row : row + 1, : int(mask[row].sum()) if mask is not None else None]
        memory, means = None, []
        for part in tokens.split(3, 1):
            emitted, memory = head.stream(part[:, None], memory)
            means.append(emitted.mean((1, 2)))
        pooled = torch.stack(means).mean(0) if pool == "mean" else means[-1]
        torch.testing.assert_close(out.logits[row : row + 1], head.head(pooled), **EXACT)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, batch["labels"]), **EXACT)
    assert type(out) is type(stock(**batch))
    assert torch.equal(out.old_logits, stock(**batch).logits)
    out.loss.backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"tight_stream"}
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(
    ("recipe", "family"),
    [(TokenTuringMachine(**SMALL), "bert"), (TokenTuringMachine(**SMALL), "vit"), (LearnableMemory(tokens=2), "vit")],
)
@pytest.mark.parametrize(
    ("problem", "outputs", "loss"),
    [
        ("regression", 3, F.mse_loss),
        ("multi_label_classification", 1, F.binary_cross_entropy_with_logits),
        (None, 3, F.binary_cross_entropy_with_logits),
    ],
)
def test_the_loss_is_the_one_that_the_config_names(recipe, family, problem, outputs, loss):
    model = models.build(family)
    model.config.problem_type = problem
    tightfit.apply(model, dataclasses.replace(recipe, num_labels=outputs))
    batch = models.batch(model) | {"labels": torch.rand(3, outputs)}
    out = model(**batch)
    torch.testing.assert_close(out.loss, loss(out.logits, batch["labels"]))
    if outputs > 1:  # an earlier task's problem says nothing about classes
        labels = torch.tensor([0, 2, 1])
        out = model(**batch | {"labels": labels})
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))


def test_an_encoder_that_trains_gets_the_gradients_of_the_head():
    model = models.build("bert", dropout=0.0).double()
    applied = tightfit.apply(model, TokenTuringMachine(**SMALL, freeze=False))
    batch = models.batch(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith("classifier") for n in names)
    _, grads = gradients(model, batch)
    assert not any("pooler" in n for n in names)
    assert names == set(grads)
    model.tight_stream.stream.replay = False
    for name, grad in gradients(model, batch)[1].items():
        torch.testing.assert_close(grads[name], grad, **EXACT)
    losses = train(model, applied.optimizer(lr=1e-3), batch, 6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("family", "freeze"),
    [pytest.param("bert", True, marks=pytest.mark.slow), ("bert", False), ("vit", True), ("vit", False)],
)
def test_the_plan_is_the_step_to_the_byte(family, freeze):
    model = models.build(family, dropout=0.0)
    applied = tightfit.apply(model, TokenTuringMachine(**SMALL, freeze=freeze))
    assert_planned_as_real(model, applied, models.batch(model, size=4, length=16))


def test_what_would_not_train_is_refused():
    with pytest.raises(tightfit.ConflictError, match="Lora and TokenTuringMachine both take over"):
        tightfit.apply(models.bert(), [TokenTuringMachine(**SMALL), Lora()])
    model = models.bert()
    tightfit.apply(model, TokenTuringMachine(**SMALL))
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"word_embeddings.weight would never get a gradient"):
        model(**models.batch(model))
    tightfit.apply(models.bert(), [TokenTuringMachine(**SMALL, freeze=False), Lora(rank=2)]).remove()


# -- processes --------------------------------------------------------------------------------------------------------

RECIPES = {
    "vit": [LearnableMemory(tokens=2), LearnableMemory(mode="shared"), TokenTuringMachine(**SMALL)],
    "bert": [TokenTuringMachine(**SMALL, freeze=False)],
}


def _worker(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for family, recipe in ((family, recipe) for family, recipes in RECIPES.items() for recipe in recipes):
        model = models.build(family, dropout=0.0)
        tightfit.apply(model, recipe)
        batches = [models.batch(model, seed=seed) for seed in (1, 2)]
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a parameter that was not waited for is an error in the second step
            model.zero_grad()
            wrapped(**batches[rank]).loss.backward()
        model.zero_grad()
        found = gradient_over_ranks(rank, wrapped, model, batches, gradients)
        if found is not None:
            queue.put((str(recipe), *found))
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, args=(str(tmp_path), queue), nprocs=2)
    for _ in range(4):
        recipe, same, off = queue.get()
        assert same, recipe
        assert off < 1e-5, recipe


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens"),
        ({"memory": 0}, ValueError, "memory"),
        ({"memory": 2.0}, TypeError, "memory"),
        ({"layers": True}, TypeError, "layers"),
        ({"heads": 3}, ValueError, "width 16 is not divisible by 3 heads"),
        ({"width": 12, "summariser": "query"}, ValueError, "not divisible by 8 heads of the query summariser"),
        ({"unit": "mixer"}, ValueError, "unit"),
        ({"write": "add"}, ValueError, "write"),
        ({"inputs": None}, ValueError, "needs inputs"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"unit": "simplified", "write": "erase_add"}, ValueError, "gives the next memory itself"),
    ],
)
def test_a_stream_checks_its_numbers(fields, error, message):
    with pytest.raises(error, match=message):
        TokenTuringStream(**{"width": WIDTH, "inputs": 5, "heads": 2, **fields})


def test_a_stream_checks_what_it_is_given():
    net, x = stream(), inputs()
    for given, message in (
        (x[..., :8], r"accepted is \(B, T, N, 16\)"),
        (x[:, 0], r"accepted is \(B, T, N, 16\)"),
        (x[:, :0], "a stream needs rows, steps and tokens"),
        (x[:, :, :0], "a stream needs rows, steps and tokens"),
        (torch.cat([x, x], 2), "got sets of 10 tokens, this stream takes up to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            net(given)
    with pytest.raises(ValueError, match="got a memory of shape"):
        net(x, torch.zeros(2, 5, WIDTH))
    with pytest.raises(ValueError, match="got a mask of shape"):
        net(x, mask=torch.ones(2, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens"),
        ({"memory": -1}, "memory"),
        ({"segment": 0}, "segment"),
        ({"unit": "simplfied"}, "did you mean 'simplified'"),
        ({"pool": "max"}, "pool"),
        ({"dropout": 1.0}, "dropout"),
        ({"unit": "simplified", "write": "erase_add"}, "gives the next memory itself"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenTuringMachine(**fields)


def test_models_are_checked():
    with pytest.raises(tightfit.UnsupportedModelError, match="is no classifier of texts or images"):
        tightfit.apply(models.llama(), TokenTuringMachine())
    with pytest.raises(ValueError, match="width 32 is not divisible by 12 heads"):
        tightfit.apply(models.bert(), TokenTuringMachine(heads=12))
    assert calls.STREAM not in models.bert()._modules
