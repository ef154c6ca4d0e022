"""Reversible in use: what is kept, how it begins and ends, random numbers, several forwards, generation, processes."""

import copy
import gc
import warnings

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from checks.state import assert_same, gradients, logits, snapshot, train
from reversible_cases import close, deep, straight, two_step
from torch import nn

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, Reversible
from tightfit.core.errors import ConflictError, StateError, UnsupportedModelError
from tightfit.core.memory import allocator_peak, live_bytes, saved_bytes
from tightfit.core.simulate import simulate
from tightfit.methods.reversible import Coupling
from tightfit.methods.reversible.replay import Replay

STATE_BYTES = 8 << 10


def later(*families):
    return [pytest.param(family, marks=pytest.mark.slow) for family in families]


each_family = pytest.mark.parametrize("family", ["llama", "bert", "t5", *later("gpt2", "bart", "gemma2")])


def reversed_model(family, *recipe, dropout=None, **options):
    model = models.build(family, dropout=dropout)
    return tightfit.apply(model, list(recipe) or Reversible(**options)).model


# -- what is kept -----------------------------------------------------------------------------------------------------


def kept(recipe, blocks, look=live_bytes):
    """(bytes that hooks see, bytes that are alive after the forward) of a model of so many blocks."""
    model = deep("llama", blocks)
    if recipe is not None:
        tightfit.apply(model, recipe)
    batch = models.batch(model, size=8, length=32)
    hooked = saved_bytes(lambda: model(**batch).loss.backward())
    model.zero_grad()
    before = look()
    loss = model(**batch).loss
    alive = look() - before
    loss.backward()
    return hooked, alive


def hooked(recipe, blocks):
    return kept(recipe, blocks, look=lambda: 0)[0]


@pytest.mark.slow
def test_kept_bytes_grow_by_half_a_byte_an_element():
    elements = 8 * 32 * 32
    found = [kept(Reversible(), blocks) for blocks in (4, 8, 16, 32)]
    for (hooked, alive), (more_hooked, more_alive), blocks in zip(found, found[1:], (4, 8, 16)):
        assert (more_hooked - hooked) / blocks == elements / 2
        # tensors that no hook sees: the random state of each block, and numbers of a few bytes
        assert 0 <= (more_alive - alive) / blocks - elements / 2 <= STATE_BYTES


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        (Reversible(), 4),
        (Reversible(variant="meft3", k=2), 4),
        *(
            pytest.param(recipe, bits, marks=pytest.mark.slow)
            for recipe, bits in (
                (Reversible(k=1), 1),
                (Reversible(k=7), 7),
                (Reversible(variant="meft1", k=3), 3),
                (Reversible(exact=False, variant="meft1", allow_inexact=True), 0),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Reversible.allow_inexact:UserWarning")
def test_kept_bytes_grow_by_k_bits_an_element(recipe, bits):
    assert (hooked(recipe, 8) - hooked(recipe, 4)) / 4 == bits * 8 * 32 * 32 / 8


def test_random_states_are_kept_where_numbers_are_drawn(monkeypatch):
    replays, settle = [], Replay.settle

    def record(self, draws, real):
        settle(self, draws, real)
        replays.append(len(self.random))

    monkeypatch.setattr(Replay, "settle", record)
    for dropout, states in ((0.0, [0] * 4), (0.1, [1] * 4)):
        model = deep("bert", 4, dropout=dropout)
        tightfit.apply(model, Reversible())
        gradients(model, models.batch(model))
        assert replays == states
        replays.clear()
    # what no setting tells of is seen when it happens
    model = deep("bert", 4, dropout=0.0)
    block = model.bert.encoder.layer[2]
    block.output.dense.register_forward_hook(lambda m, args, out: out + 0.1 * torch.randn_like(out))
    tightfit.apply(model, Reversible())
    gradients(model, models.batch(model))
    assert replays == [0, 0, 1, 0]


@pytest.mark.slow
def test_plain_and_checkpointed_blocks_keep_more():
    slope = {}
    for name, recipe in (("stock", None), ("checkpointing", Checkpointing()), ("reversible", Reversible())):
        slope[name] = (hooked(recipe, 6) - hooked(recipe, 4)) / 2
    assert slope["checkpointing"] == 8 * slope["reversible"] == 8 * 32 * 32 * 4
    assert slope["stock"] > 8 * slope["checkpointing"]


PLANNED = [
    [Reversible()],
    [Lora(rank=2), Reversible()],
    [Lora(rank=2), FusedOps(), Reversible()],
    [Mesa(attention=True), Reversible()],
    [Reversible(variant="meft2", adapter_dim=4, merge="concat")],
]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("bert", PLANNED[1]),
        *(pytest.param(f, recipe, marks=pytest.mark.slow) for f in ("llama", "bert", "t5") for recipe in PLANNED),
    ],
    ids=str,
)
def test_planned_bytes_are_real_bytes(family, recipe):
    gc.collect()
    others = live_bytes()
    model = models.build(family)
    applied = tightfit.apply(model, recipe)
    batch = models.batch(model, size=4, length=16)
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.0)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    planned = simulate(model, batch, optimizer="sgd")
    assert saved_bytes(step) == planned.saved_bytes
    # labels and the like: numbers of a few bytes that a step makes and the simulation does not
    assert allocator_peak(step) - others == pytest.approx(planned.peak_bytes, abs=256)


@pytest.mark.slow
def test_operators_inside_keep_less_while_a_block_runs_again():
    def peak(*recipe):
        model = models.build("llama")
        tightfit.apply(model, [Lora(rank=2), *recipe, Reversible()])
        batch = models.batch(model, size=8, length=32)
        return simulate(model, batch, optimizer="sgd").phases["backward"]

    assert peak(FusedOps(loss=False)) < peak()


# -- how it begins and ends -------------------------------------------------------------------------------------------


@each_family
def test_a_small_factor_is_the_stock_model(family):
    model = models.build(family)
    batch = models.batch(model)
    wanted = logits(model, batch)
    tightfit.apply(model, Reversible(k=12))
    found = logits(model, batch)
    assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()


def test_two_steps_begin_nearer_to_the_stock_model():
    def far(**fields):
        model = deep("llama", 12)
        batch = models.batch(model)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.15)
        wanted = logits(model, batch).log_softmax(-1)
        tightfit.apply(model, Reversible(**fields))
        return F.kl_div(logits(model, batch).log_softmax(-1), wanted, log_target=True, reduction="batchmean")

    assert far(k=4) < far(variant="meft1", exact=False, lam=0.1, adapter_dim=4, allow_inexact=True, anchors=1)


@each_family
def test_after_the_annealing_it_is_the_stock_model_bit_by_bit(family):
    model = models.build(family)
    batch = models.batch(model)
    wanted, stock = logits(model, batch), gradients(copy.deepcopy(model), batch)
    applied = tightfit.apply(model, [Lora(rank=2, config=None), Reversible(anneal=0.5)])
    assert not torch.equal(logits(model, batch), wanted)
    applied.part(Coupling).set_progress(1.0)
    assert torch.equal(logits(model, batch), wanted)
    full = models.build(family)
    tightfit.apply(full, Reversible(anneal=0.5)).part(Coupling).set_progress(1.0)
    loss, grads = gradients(full, batch)
    assert torch.equal(loss, stock[0])
    close(grads, stock[1], 1e-6)


def test_the_factor_falls_in_the_last_part_of_the_training():
    applied = tightfit.apply(models.build("llama"), Reversible(k=9, anneal=0.4))
    part, seen = applied.part(Coupling), []
    for progress in (0.0, 0.59, 0.61, 0.71, 0.81, 0.91, 1.0):
        part.set_progress(progress)
        seen.append(part.report()["factors"][0])
    assert seen == [2**-9, 2**-9, 2**-10, 2**-11, 2**-12, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"got 1.5, accepted is a share in \[0, 1\]"):
        part.set_progress(1.5)


def test_a_trainer_anneals(tmp_path):
    from checks.test_battery import _trainer_run

    model = models.build("bert")
    applied = tightfit.apply(model, Reversible(anneal=0.5))
    _trainer_run(model, [applied.callback()], tmp_path)
    assert applied.part(Coupling).plan.now() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied.merge()


def test_annealed_training_in_every_stage():
    model = deep("llama", 3)
    applied = tightfit.apply(model, Reversible(k=11, anneal=0.9))
    part, batch = applied.part(Coupling), models.batch(model)
    for progress in (0.0, 0.5, 0.9):
        part.set_progress(progress)
        assert all(torch.isfinite(g).all() for g in gradients(model, batch)[1].values())


def test_leaving_says_what_is_left_behind(tmp_path):
    applied = tightfit.apply(models.build("bert"), Reversible())
    with pytest.warns(
        UserWarning, match=r"export\(\): the weights were trained with a second stream \(factor 0.0625\)"
    ):
        applied.export(tmp_path / "stock")
    for fields in ({"adapter_dim": 2}, {"merge": "concat"}):
        applied = tightfit.apply(models.build("bert"), Reversible(**fields))
        with pytest.raises(
            StateError, match=r"merge\(\): .* has no place in a stock BertForSequenceClassification; save"
        ):
            applied.merge()
        applied.remove()


# -- adapters, merges, spans ------------------------------------------------------------------------------------------


def test_adapters_are_as_many_as_published():
    import transformers as hf

    def count(applied):
        return sum(p.numel() for n, p in applied.model.named_parameters() if p.requires_grad and "classifier" not in n)

    bert = tightfit.skeleton(hf.BertConfig(), task="sequence-classification")
    published = Reversible(variant="meft1", exact=False, lam=0.1, adapter_dim=8, merge="mean", allow_inexact=True)
    assert count(tightfit.apply(bert, published)) == 313_536
    size = {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    opt = tightfit.skeleton(hf.OPTConfig(**size, word_embed_proj_dim=2048), task="causal-lm")
    recipe = Reversible(variant="meft1", adapter_dim=64, merge="weighted", span=(8, 16))
    assert count(tightfit.apply(opt, recipe)) == 8_456_192 // 2  # eight of the sixteen blocks with adapters


@pytest.mark.parametrize("variant", ["two_step", "meft1", "meft2"])
@pytest.mark.parametrize("family", ["llama", *later("bert", "gpt2", "t5")])
def test_adapters_that_do_nothing_change_nothing(family, variant):
    fields = {"variant": variant, "merge": "mean"}
    plain, model = models.build(family), models.build(family)
    tightfit.apply(plain, Reversible(**fields))
    applied = tightfit.apply(model, Reversible(**fields, adapter_dim=3, zero_up=True))
    batch = models.batch(model)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=1e-5, atol=1e-6)
    losses = train(model, applied.optimizer(lr=1e-2), batch, 3)
    assert losses[-1] < losses[0] or family == "t5"
    names = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad and "tight_" in n}
    assert names == ({"tight_parallel"} if variant == "two_step" else {"tight_parallel", "tight_lagged"})


@pytest.mark.slow
def test_every_adapter_gets_a_gradient():
    for variant in ("two_step", "meft1", "meft2", "meft3"):
        for merge in ("state", "mean", "weighted", "concat"):
            model = deep("bert", 3)
            applied = tightfit.apply(model, Reversible(variant=variant, merge=merge, adapter_dim=2))
            grads = gradients(model, models.batch(model))[1]
            assert len(grads) == len(list(applied.parameters())), (variant, merge)


@pytest.mark.parametrize("merge", ["mean", "weighted", "concat"])
def test_merges(merge):
    model, plain = deep("llama", 4), deep("llama", 4)
    applied = tightfit.apply(model, Reversible(k=2, merge=merge))
    bits = applied.report()["methods"]["Reversible"]["bits_behind_the_point"]
    rule = {"mean": lambda a, b: (a + b) / 2, "weighted": lambda a, b: b + 0.1 * a, "concat": lambda a, b: b}[merge]
    update = two_step(2)

    def merged(grid, x1, x2, layer):
        lag, state = update(grid, x1, x2, layer)
        grid.seen = getattr(grid, "seen", 0) + 1
        return (lag, state) if grid.seen % 4 else (lag, rule(lag.float(), state.float()).double())

    straight(plain, bits, merged)
    batch = models.batch(model)
    (loss, found), (slow_loss, wanted) = gradients(model, batch), gradients(plain, batch)
    torch.testing.assert_close(loss, slow_loss, rtol=1e-6, atol=0)
    close({n: g for n, g in found.items() if "tight_merge" not in n}, wanted, 1e-5)


def test_a_span_leaves_the_others_alone():
    model, stock = deep("llama", 6), deep("llama", 6)
    applied = tightfit.apply(model, Reversible(span=(2, 5), k=12))
    assert applied.report()["methods"]["Reversible"]["blocks"] == 3
    batch = models.batch(model)
    found, wanted = gradients(model, batch)[1], gradients(stock, batch)[1]
    close(found, wanted, 1e-2)


# -- random numbers, several forwards, autocast -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_random_numbers_are_those_of_a_plain_run(family):
    runs = []
    for _ in range(2):
        model = models.build(family, dropout=0.1)
        optimizer = tightfit.apply(model, Reversible()).optimizer(torch.optim.SGD, lr=0.1)
        torch.manual_seed(5)
        runs.append((train(model, optimizer, models.batch(model), 5), torch.get_rng_state()))
    stock = models.build(family, dropout=0.1)
    torch.manual_seed(5)
    train(stock, torch.optim.SGD(stock.parameters(), lr=0.1), models.batch(stock), 5)
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][1], torch.get_rng_state())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_two_forwards_before_two_backwards(family, order):
    model = reversed_model(family, dropout=0.0)
    batches = [models.batch(model, seed=1), models.batch(model, seed=2, length=7)]
    wanted = gradients(model, *batches)[1]
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    with torch.no_grad():
        model(**batches[0])
    for i in order:
        losses[i].backward()
    close({n: p.grad for n, p in model.named_parameters()}, wanted, 1e-6)


def test_two_forwards_in_one_loss():
    model = reversed_model("llama", dropout=0.0)
    batches = [models.batch(model, seed=s) for s in (1, 2)]
    wanted = gradients(model, *batches)[1]
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()
    close({n: p.grad for n, p in model.named_parameters()}, wanted, 1e-6)


def test_accumulated_halves_are_the_whole_batch():
    model = reversed_model("bert", dropout=0.0)
    whole = models.batch(model, size=4)
    halves = [{k: v[rows] for k, v in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    wanted, found = gradients(model, whole)[1], gradients(model, *halves)[1]
    close({n: g / 2 for n, g in found.items()}, wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_autocast(family, dtype):
    model, slow = models.build(family), models.build(family)
    applied = tightfit.apply(model, Reversible())
    straight(slow, applied.report()["methods"]["Reversible"]["bits_behind_the_point"], two_step(4))
    seen = []
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    batch, found = models.batch(model), []
    for each in (model, slow):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype):
            loss = each(**batch).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in each.named_parameters()}))
    assert seen == [dtype, dtype]  # forward, and again in backward, which runs without autocast around it
    assert torch.equal(found[0][0], found[1][0])
    close(found[0][1], found[1][1], 3e-2)


def test_half_precision_weights():
    model = models.build("llama").bfloat16()
    slow = copy.deepcopy(model)
    applied = tightfit.apply(model, Reversible())
    straight(slow, applied.report()["methods"]["Reversible"]["bits_behind_the_point"], two_step(4))
    batch = models.batch(model)
    (loss, found), (slow_loss, wanted) = gradients(model, batch), gradients(slow, batch)
    assert torch.equal(loss, slow_loss)
    close(found, wanted, 3e-2)


def test_a_loss_on_an_inner_state():
    model, slow = deep("llama", 5), deep("llama", 5)
    applied = tightfit.apply(model, Reversible())
    straight(slow, applied.report()["methods"]["Reversible"]["bits_behind_the_point"], two_step(4))
    batch = models.batch(model)

    def step(each, which, weight):
        each.zero_grad()
        out = each(**batch, output_hidden_states=True)
        loss = sum(out.hidden_states[i].square().mean() for i in which) + weight * out.loss
        loss.backward()
        return {n: p.grad for n, p in each.named_parameters() if p.grad is not None}

    for which, weight in (((2,), 1.0), ((3,), 0.0), ((1, 3), 0.5)):
        close(step(model, which, weight), step(slow, which, weight), 1e-5)
    # only an inner state's graph is left: what comes after it went with the outputs
    inner = model(**batch, output_hidden_states=True).hidden_states[2].sum()
    with pytest.raises(StateError, match="a gradient starts at an inner hidden state"):
        inner.backward()


def test_backward_twice():
    model = reversed_model("llama", dropout=0.0)
    batch = models.batch(model)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    close({n: p.grad / 2 for n, p in model.named_parameters()}, once, 1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="Reversible cannot be differentiated twice"):
        torch.autograd.grad(model(**batch).loss, list(model.parameters()), create_graph=True)


def test_partly_frozen_models():
    for frozen in ("embed_tokens", "layers.0", "layers.1", "layers.3", "norm"):
        model, slow = deep("llama", 4), deep("llama", 4)
        for each in (model, slow):
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(frozen not in name and "embed" not in name)
        applied = tightfit.apply(model, Reversible())
        straight(slow, applied.report()["methods"]["Reversible"]["bits_behind_the_point"], two_step(4))
        batch = models.batch(model)
        close(gradients(model, batch)[1], gradients(slow, batch)[1], 1e-5)


def test_inference_mode():
    model = reversed_model("llama")
    batch = models.batch(model)
    wanted = logits(model, batch)
    with torch.inference_mode():
        assert torch.equal(model.eval()(**batch).logits, wanted)


def test_evaluation_with_gradients():
    model, slow = models.build("bert").eval(), models.build("bert").eval()
    applied = tightfit.apply(model, Reversible())
    straight(slow, applied.report()["methods"]["Reversible"]["bits_behind_the_point"], two_step(4))
    batch = models.batch(model)
    close(gradients(model, batch)[1], gradients(slow, batch)[1], 1e-5)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "t5", *later("gpt2", "gemma2", "bart")])
def test_generation_with_a_cache_is_that_without(family, side):
    model = reversed_model(family).eval()
    ids = torch.randint(4, 60, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    if side == "right":
        mask = mask.flip(1)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.generate(ids, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


# -- processes --------------------------------------------------------------------------------------------------------


def _worker(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = deep("llama", 4, dropout=0.0)
    torch.manual_seed(7)
    tightfit.apply(model, [Lora(rank=2), Reversible(variant="meft1", merge="mean")])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    batches = [models.batch(model, seed=seed) for seed in (1, 2)]
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(**batches[rank]).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        each = [gradients(model, batch)[1] for batch in batches]
        wanted = {n: (each[0][n] + each[1][n]) / 2 for n in each[0]}
        off = max(float((found[n] - g).norm() / (g.norm() + 1e-6)) for n, g in wanted.items())
        queue.put((set(found) == set(wanted), off))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, args=(str(tmp_path), queue), nprocs=2)
    same, off = queue.get()
    assert same
    assert off < 1e-5


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"anneal": 0.5}, {"variant": "meft3", "adapter_dim": 2}, {"merge": "concat"}], ids=str
)
def test_a_saved_model_comes_back(fields, tmp_path):
    model = models.build("llama")
    applied = tightfit.apply(model, Reversible(**fields))
    part = applied.part(Coupling)
    part.set_progress(0.7)
    batch = models.batch(model)
    train(model, applied.optimizer(lr=1e-2), batch, 2)
    applied.save(tmp_path)
    again = tightfit.load(models.build("llama"), tmp_path)
    assert again.part(Coupling).plan.progress == 0.7
    assert torch.equal(logits(again.model, batch), logits(model, batch))
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(tightfit.ArtifactError, match=r"no recipe\.json"):
        tightfit.load(models.build("llama"), tmp_path)


def test_a_copy_goes_its_own_way():
    model = models.build("llama")
    part = tightfit.apply(model, Reversible(anneal=0.5)).part(Coupling)
    twin, batch = copy.deepcopy(model), models.batch(model)
    before = logits(twin, batch)
    part.set_progress(1.0)
    assert torch.equal(logits(twin, batch), before)
    assert not torch.equal(logits(model, batch), before)


# -- what cannot be run in reverse ------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws numbers that no random state brings back."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x + 0.01 * torch.randn(x.shape, generator=self.generator)


def noisy(layers=4):
    model = deep("llama", layers)
    norm = model.model.layers[1].post_attention_layernorm
    model.model.layers[1].post_attention_layernorm = nn.Sequential(norm, Noisy())
    return model


def test_a_block_that_does_not_repeat_keeps_its_streams():
    model = noisy()
    with pytest.warns(
        UserWarning, match=r"second run of model.layers.1 gave other bits than the first, so these blocks"
    ):
        applied = tightfit.apply(model, Reversible())
    assert applied.report()["methods"]["Reversible"]["kept_blocks"] == ["model.layers.1"]
    batch = models.batch(model)
    found = gradients(model, batch)[1]
    assert all(torch.isfinite(g).all() for g in found.values())
    few, many = kept_by(model, batch), kept_by(deep_reversed(4), batch)
    assert few - many == 2 * 3 * 9 * 32 * 4 - 3 * 9 * 32 // 2
    applied.remove()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"strict=True.*second run of model.layers.1"):
        tightfit.apply(model, Reversible(strict=True))
    assert_same(before, snapshot(model))


def deep_reversed(layers):
    model = deep("llama", layers)
    tightfit.apply(model, Reversible())
    return model


def kept_by(model, batch):
    return saved_bytes(lambda: model(**batch).loss.backward())


def test_overflow_and_what_is_no_number_name_the_block():
    model = deep("llama", 4)
    tightfit.apply(model, Reversible(bits=28))
    model.model.embed_tokens.weight.data.mul_(1e3)
    with pytest.raises(
        StateError, match=r"at block model.layers.0 .* with 28 bits .* \(up to 2\).*Reversible\(bits=24\)"
    ):
        model(**models.batch(model))
    model = deep_reversed(4)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"at block model.layers.2 the states are infinite, not a number"):
        model(**models.batch(model))
    with pytest.raises(StateError, match=r"own states are not finite at block model.layers.2"):
        broken = deep("llama", 4)
        broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
        tightfit.apply(broken, Reversible())


def test_a_model_that_changes_states_between_blocks():
    model = deep_reversed(4)
    model.model.layers[2].register_forward_pre_hook(lambda m, args: (args[0] * 1.0, *args[1:]))
    with pytest.raises(StateError, match=r"input of block model.layers.2 is not the output of the block before it"):
        model(**models.batch(model))
    model = deep("llama", 4)
    model.model.layers[2].register_forward_pre_hook(lambda m, args: (args[0] * 1.0, *args[1:]))
    with pytest.raises(UnsupportedModelError, match=r"changes the states between its blocks, before model.layers.2"):
        tightfit.apply(model, Reversible())
    applied = tightfit.apply(model, Reversible(span=(2, 4)))
    assert torch.isfinite(gradients(applied.model, models.batch(model))[0])


def test_models_it_does_not_fit():
    import transformers as hf

    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    with pytest.raises(UnsupportedModelError, match="has no stack of blocks"):
        tightfit.apply(nn.Sequential(nn.Linear(2, 2)), Reversible())
    with pytest.raises(UnsupportedModelError, match=r"meft3'\): block encoder.block.0 has 0 attention modules"):
        tightfit.apply(models.build("t5"), Reversible(variant="meft3"))
    size |= {"num_hidden_layers": 2, "vocab_size": 120}
    moe = hf.MixtralForCausalLM(hf.MixtralConfig(**size, num_local_experts=2, num_key_value_heads=2))
    with pytest.raises(UnsupportedModelError, match=r"block model.layers.0 has no MLP of two linear layers"):
        tightfit.apply(moe, Reversible(adapter_dim=2))
    assert torch.isfinite(gradients(tightfit.apply(moe, Reversible()).model, models.batch(moe))[0])
    model = models.build("llama")
    model.model.layers[0].forward = None
    with pytest.raises(
        UnsupportedModelError, match=r"could not be tried on an example batch .* such as Reversible\(bits=20\)"
    ):
        tightfit.apply(model, Reversible())
    model = models.build("llama")
    model.activation_checkpointing_enable()
    with pytest.raises(StateError, match=r"gradient checkpointing of this LlamaForCausalLM is on already"):
        tightfit.apply(model, Reversible())
    model = models.build("llama")
    with pytest.raises(ConflictError, match=r"Checkpointing and Reversible both take over model.layers.0"):
        tightfit.apply(model, [Checkpointing(), Reversible()])
    applied = tightfit.apply(model, Reversible())
    with pytest.raises(StateError, match="already carries the recipe"):
        tightfit.apply(model, Reversible())
    applied.remove()


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"variant": "revnet"}, ValueError, r"Reversible\(variant=...\): got 'revnet', accepted is one of"),
        ({"merge": "sum"}, ValueError, r"Reversible\(merge=...\): got 'sum'"),
        ({"k": 13}, ValueError, r"Reversible\(k=...\): got 13, accepted is an int in \[0, 12\]"),
        ({"k": 0.5}, TypeError, r"Reversible\(k=...\): got 0.5 \(float\)"),
        ({"k": True}, TypeError, r"Reversible\(k=...\): got True"),
        ({"exact": 1}, TypeError, r"Reversible\(exact=...\): got 1"),
        (
            {"variant": "meft1", "lam": 0.0},
            ValueError,
            r"Reversible\(lam=...\): got 0.0, accepted is a number in \(0, 1\]",
        ),
        ({"variant": "meft1", "lam": float("nan"), "exact": False}, ValueError, r"Reversible\(lam=...\): got nan"),
        (
            {"variant": "meft2", "beta": 1.5},
            ValueError,
            r"Reversible\(beta=...\): got 1.5, accepted is a number in \(0, 1\]",
        ),
        (
            {"variant": "meft1", "lam": 0.1},
            ValueError,
            r"lam=0.1\): integer streams need a power of two from 2\^-12 to 1",
        ),
        ({"variant": "meft1", "beta": 2.0**-13}, ValueError, r"integer streams need a power of two"),
        ({"lam": 0.5}, ValueError, r"lam=0.5\): the factor of 'two_step' is 2\^-k; give k"),
        ({"anchors": 2}, ValueError, r"anchors=2\): integer streams have no error to limit"),
        ({"allow_inexact": True}, ValueError, r"allow_inexact=True\): integer streams have no error"),
        ({"exact": False, "bits": 20}, ValueError, r"bits=20, exact=False\)"),
        ({"bits": 29}, ValueError, r"Reversible\(bits=...\): got 29"),
        ({"anneal": 1.5}, ValueError, r"Reversible\(anneal=...\): got 1.5"),
        ({"anneal": 0.5, "adapter_dim": 4}, ValueError, r"anneal=0.5\): only 'two_step' without adapters"),
        ({"anneal": 0.5, "variant": "meft1"}, ValueError, r"anneal=0.5\): only 'two_step'"),
        ({"adapter_dim": 0}, ValueError, r"Reversible\(adapter_dim=...\): got 0"),
        ({"adapter_dropout": 1.0}, ValueError, r"Reversible\(adapter_dropout=...\): got 1.0"),
        ({"span": (3, 3)}, ValueError, r"Reversible\(span=...\): got \(3, 3\), accepted is 0 <= first < end"),
        ({"span": (-1, 3)}, ValueError, r"Reversible\(span=...\): got \(-1, 3\)"),
        ({"span": 3}, TypeError, r"Reversible\(span=...\): got 3, accepted is a pair of ints"),
    ],
)
def test_wrong_fields_are_refused_at_construction(fields, kind, message):
    with pytest.raises(kind, match=message):
        Reversible(**fields)


def test_wrong_places_are_refused_when_applied():
    model = deep("llama", 4)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"span=\(2, 5\)\): LlamaForCausalLM has 4 blocks, accepted is an end of at most 4"
    ):
        tightfit.apply(model, Reversible(span=(2, 5)))
    assert_same(before, snapshot(model))
    with pytest.warns(UserWarning, match=r"Reversible\(k=0\): with a factor of 1"):
        loose = Reversible(k=0)
    with pytest.raises(ValueError, match=r"may grow .* times over 40 blocks, too far for 32 bits"):
        tightfit.apply(deep("bert", 40), loose)
