"""Reversible in use: adapters, spans, random numbers, several forwards, generation, processes, saving."""

import copy

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checks.real import gradient_over_ranks
from checks.state import gradients, logits, train
from reversible_cases import close, deep, later, reversed_model, straight, two_step
from torch import nn

import tightfit
from tightfit import Lora, Reversible
from tightfit.core.errors import StateError
from tightfit.methods.reversible import Coupling

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


@pytest.mark.parametrize("recipe", [(Lora(rank=2), Reversible()), (Reversible(variant="meft1", adapter_dim=4),)])
def test_a_step_between_forward_and_backward_is_refused(recipe):
    model = deep("llama", 3)
    optimizer = tightfit.apply(model, tightfit.chain(*recipe)).optimizer(torch.optim.SGD, lr=0.5)
    first, second = (model(**models.batch(model, seed=seed)).loss for seed in (0, 1))
    first.backward()
    optimizer.step()
    with pytest.raises(StateError, match="modified between the forward and its backward"):
        second.backward()
    model(**models.batch(model)).loss.backward()


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


def test_a_trained_merge_of_a_model_in_half_precision():
    model = models.build("llama").bfloat16()
    plain = copy.deepcopy(model)
    tightfit.apply(plain, Reversible())
    applied = tightfit.apply(model, Reversible(merge="concat"))
    batch = models.batch(model)
    (loss, found), (plain_loss, wanted) = gradients(model, batch), gradients(plain, batch)
    assert torch.equal(loss, plain_loss)  # it begins as the state alone
    close({n: found[n] for n in wanted}, wanted, 3e-2)
    losses = train(model, applied.optimizer(lr=1e-2), batch, 8)
    assert losses[-1] < losses[0]


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


@pytest.mark.parametrize("fields", [{}, {"variant": "meft1", "adapter_dim": 4}, {"exact": False, "k": 1}])
def test_hooks_on_gradients_run_once(fields):
    model = deep("llama", 3)
    applied = tightfit.apply(model, Reversible(**fields))
    batch, seen = models.batch(model), []
    _, wanted = gradients(model, batch)
    for parameter in applied.parameters():
        parameter.register_hook(lambda grad: seen.append(1) or grad / 2)
    _, found = gradients(model, batch)
    assert len(seen) == len(wanted)
    close(found, {name: grad / 2 for name, grad in wanted.items()}, 1e-7)


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
    found = gradient_over_ranks(rank, wrapped, model, batches, gradients)
    if found is not None:
        queue.put(found)
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
