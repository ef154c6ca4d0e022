"""RecurrentMemory in training: memory, random numbers, other methods, Trainer, processes, generation, artifacts."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
import transformers as hf
from recurrent_memory_cases import (
    CLASSIFIERS,
    DECODERS,
    ROPE,
    applied,
    assert_close,
    batch,
    build,
    gradients,
    memory_of,
)
from torch.utils.flop_counter import FlopCounterMode

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, PartialEmbedding, RecurrentMemory, Reversible, chain
from tightfit.core.memory import saved_bytes

# -- memory and time ---------------------------------------------------------------------------------------------------

WIDTH, SLOTS, TEXT, ROWS = 64, 4, 48, 4


def llama(**options):
    torch.manual_seed(0)
    config = {**ROPE, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 60}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **options})).train()


def long_batch(segments, *, mask=True):
    ids = torch.randint(4, 60, (ROWS, TEXT * segments), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, **({"attention_mask": torch.ones_like(ids)} if mask else {})}


def planned(recipe, segments):
    """Planned peak without the batch itself."""
    given = long_batch(segments)
    plan = tightfit.plan(llama(num_hidden_layers=1), recipe, batch=given, optimizer="sgd")
    return plan.peak_bytes - sum(t.nbytes for t in (given["input_ids"], given["attention_mask"]))


STATE = ROWS * SLOTS * WIDTH * 4
"""Bytes of the memory between two segments."""


@pytest.mark.slow
@pytest.mark.parametrize("most", [3, 32])
def test_the_peak_is_flat_in_the_number_of_segments(most):
    recipe = RecurrentMemory(tokens=SLOTS, segment=TEXT)
    one, two, many = (planned(recipe, n) for n in (1, 2, most))
    # from the second segment on all gradients are there while one runs again
    gradients = sum(p.nbytes for p in llama(num_hidden_layers=1).parameters())
    assert two - 2 * STATE <= 1.03 * one + gradients
    assert many - most * STATE <= 1.03 * two
    # besides the memory: the targets
    assert many - two <= (most - 2) * (STATE + ROWS * TEXT * 8 + 2048)


@pytest.mark.slow
def test_stored_backpropagation_grows():
    recipe = chain(Lora(rank=2), RecurrentMemory(tokens=SLOTS, segment=TEXT, replay=False))
    one, three = (planned(recipe, n) for n in (1, 3))
    assert three > 2 * one


def test_kept_bytes_do_not_depend_on_the_segments():
    def kept(segments, **fields):
        model = llama(num_hidden_layers=1)
        applied(model, tokens=SLOTS, segment=TEXT, **fields)
        given = long_batch(segments, mask=False)
        return saved_bytes(lambda: model(**given).loss.backward())

    one, six = kept(1), kept(6)
    assert one <= six <= one + 6 * (STATE + ROWS * TEXT * 8)
    assert kept(6, replay=False) > 5 * one


def test_a_segment_but_the_last_runs_twice():
    def flops(**fields):
        model = llama(num_hidden_layers=1)
        applied(model, tokens=SLOTS, segment=TEXT, **fields)
        with FlopCounterMode(display=False) as counter:
            model(**long_batch(4)).loss.backward()
        return counter.get_total_flops()

    assert flops() / flops(replay=False) == pytest.approx((4 * 4 - 1) / (3 * 4), rel=0.02)


PLANNED = {
    "alone": RecurrentMemory(tokens=3, segment=11),
    "block": RecurrentMemory(tokens=3, segment=11, bptt="block:1", attention="causal"),
    "fused": chain(RecurrentMemory(tokens=3, segment=11), FusedOps()),
    "lora": chain(RecurrentMemory(tokens=3, segment=11), Lora(rank=2), FusedOps(), Checkpointing()),
    "mesa": chain(RecurrentMemory(tokens=3, segment=11), FusedOps(), Mesa()),
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(f, n, marks=() if (f, n) == ("llama", "alone") else pytest.mark.slow)
        for f in ("llama", "bert")
        for n in PLANNED
        if (f, n) != ("bert", "block")
    ],
)
def test_plans_are_real_to_the_byte(family, name):
    model = llama(num_hidden_layers=1) if family == "llama" else build(CLASSIFIERS["bert"], double=False)
    plan = tightfit.plan(model, PLANNED[name], batch=(3, 22))
    found = plan.verify(model)
    assert found.saved_bytes == plan.simulation.saved_bytes
    assert abs(plan.peak_bytes - found.peak_bytes) <= 256


@pytest.mark.parametrize("given", [(2, 100), "dict"], ids=["sizes", "dict"])
def test_rows_beyond_the_window_are_planned(given):
    model = build(DECODERS["gpt2"], double=False)
    ids = torch.randint(4, 100, (2, 100))
    batch = {"input_ids": ids, "labels": ids.clone()} if given == "dict" else given
    with pytest.raises(tightfit.DataError, match="positions"):
        tightfit.plan(model, batch=batch)
    plan = tightfit.plan(model, RecurrentMemory(tokens=4), batch=batch)
    assert abs(plan.peak_bytes - plan.verify(model).peak_bytes) <= 256


# -- the second run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [False, True], ids=["plain", "checkpointed"])
def test_dropout_is_the_same_in_the_second_run(inner):
    results = []
    for replay in (True, False):
        model = build(DECODERS["gpt2"])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        applied(model, tokens=2, segment=5, replay=replay)
        if inner:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        results.append((gradients(model, batch(), batch(seed=1)), torch.rand(1)))
    assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # the generator goes on from where the forward left it


def test_a_scaled_loss_under_autocast():
    results = []
    for replay in (True, False):
        model = build(DECODERS["llama"], double=False)
        applied(model, tokens=2, segment=5, replay=replay)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        (loss * 1024).backward()
        results.append((float(loss.detach()), {n: p.grad / 1024 for n, p in model.named_parameters()}))
    assert_close(results[0], results[1], 1e-6)
    model = build(DECODERS["llama"], double=False)
    applied(model, tokens=2, segment=5)
    assert_close(results[0], gradients(model, batch()), 0.1)


def test_two_forwards_before_one_backward_and_an_evaluation_in_between():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=5)
    first, second = batch(seed=1), batch((9, 14), seed=2)
    wanted = gradients(model, first, second)
    model.zero_grad()
    losses = [model(**first).loss]
    with torch.no_grad():
        model(**batch(seed=3))
    losses.append(model(**second).loss)
    sum(losses).backward()
    assert_close((float(sum(losses).detach()), {n: p.grad for n, p in model.named_parameters()}), wanted)


def test_a_kept_graph_gives_the_same_gradients_twice():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=5)
    loss = model(**batch()).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_error_inside_leaves_nothing_behind():
    model = build(DECODERS["gpt2"])
    out = applied(model, tokens=2, segment=5)
    wanted = gradients(model, batch())
    bad = batch()
    bad["input_ids"][0, 7] = 5000
    with pytest.raises(IndexError):
        model(**bad)
    assert_close(gradients(model, batch()), wanted, 0.0)
    stock = build(DECODERS["gpt2"])
    out.remove()
    ids = batch((12,))["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


# -- beside other methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "others",
    [
        [FusedOps()],
        [Checkpointing()],
        [FusedOps(), Checkpointing(), Lora(rank=2)],
        [Reversible(variant="meft1", adapter_dim=4)],
    ],
    ids=lambda others: "-".join(type(o).__name__ for o in others),
)
def test_the_replay_is_exact_beside_other_methods(family, others):
    results = []
    for replay in (True, False):
        model = build(DECODERS[family])
        torch.manual_seed(1)
        tightfit.apply(model, chain(*others, RecurrentMemory(tokens=2, segment=5, replay=replay)))
        results.append(gradients(model, batch(), batch(seed=2)))
    assert_close(results[0], results[1], 1e-9)
    assert any(n.endswith("memory_tokens.weight") for n in results[0][1])


def test_a_frozen_backbone_trains_the_memory_and_the_adapter():
    model = build(DECODERS["llama"], double=False)
    out = tightfit.apply(model, chain(Lora(rank=2), RecurrentMemory(tokens=2, segment=5)))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.endswith("memory_tokens.weight") for n in names)
    optimizer = out.optimizer(lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_reduced_vocabulary_gives_the_same_step():
    given = batch()
    kept = tuple(sorted({*given["input_ids"].flatten().tolist(), *range(4)}))
    model, twin = build(DECODERS["llama"]), build(DECODERS["llama"])
    memory = RecurrentMemory(tokens=2, segment=5)
    tightfit.apply(model, memory)
    tightfit.apply(twin, chain(memory, PartialEmbedding(ids=kept, force=True)))
    assert torch.equal(memory_of(twin), memory_of(model))
    (loss, grads), (other, reduced) = gradients(model, given), gradients(twin, given)
    assert loss == pytest.approx(other, rel=1e-6)
    for name, gradient in reduced.items():
        wanted = grads[name] if grads[name].shape == gradient.shape else grads[name][list(kept)]
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_curriculum_adds_segments():
    model = build(DECODERS["gpt2"])
    out = applied(model, tokens=2, segment=5, curriculum=2)
    given = batch((15, 15))
    losses = [float(model(**given).loss.detach()) for _ in range(6)]
    parts = []
    for length in (5, 10, 15):  # a segment's last token has its target in the next one
        labels = given["labels"].clone()
        labels[:, length + 1 :] = -100
        parts.append(float(model(**{**given, "labels": labels}).loss.detach()))
    assert losses == pytest.approx([parts[0], parts[0], parts[1], parts[1], parts[2], parts[2]], rel=1e-12)
    assert out.report()["methods"]["RecurrentMemory"]["steps"] == 9
    model.eval()
    assert model(**given).logits.shape == (2, 15, 120)


def test_a_stage_of_the_curriculum_keeps_the_size_of_the_gradient():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=5, curriculum=100)
    given = batch((15, 15))
    alone = float(model(**given).loss.detach())
    assert float(model(**given, num_items_in_batch=28).loss.detach()) == pytest.approx(alone, rel=1e-12)
    assert float(model(**given, num_items_in_batch=56).loss.detach()) == pytest.approx(alone / 2, rel=1e-12)


def _arguments(folder, **fields):
    return hf.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **fields,
    )


def test_trainer_trains_and_evaluates(tmp_path):
    model = build(DECODERS["gpt2"], double=False)
    out = applied(model, tokens=2, segment=5)
    rows = [{k: v[0] for k, v in batch((14,), seed=s).items()} for s in range(8)]
    seen = {}

    def metrics(result):
        seen["shape"] = result.predictions.shape
        return {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())}

    arguments = _arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, learning_rate=1e-2)
    trainer = hf.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=metrics,
        callbacks=[out.callback()],
    )
    before = memory_of(model).detach().clone()
    found = trainer.train()
    assert trainer.evaluate()["eval_loss"] < 20
    assert seen["shape"] == (8, 14, 120)
    assert found.training_loss > 0
    assert not torch.equal(memory_of(model), before)


def test_label_smoothing_by_the_trainer(tmp_path):
    model = build(DECODERS["gpt2"], double=False)
    applied(model, tokens=2, segment=5)
    rows = [{k: v[0] for k, v in batch((14,), seed=s).items()} for s in range(2)]
    arguments = _arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1, learning_rate=0.0)
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.train().training_loss > 0
    assert memory_of(model).grad is None or torch.isfinite(memory_of(model).grad).all()


def _worker(rank, path, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=5)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = batch((14, 14), seed=rank)
    with wrapped.no_sync():
        wrapped(**mine).loss.backward()
    wrapped(**mine).loss.backward()
    queue.put((rank, {n: p.grad.numpy() for n, p in model.named_parameters()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_reduce_their_gradients():
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    queue = context.Queue()
    with tempfile.NamedTemporaryFile(delete=True) as file:
        path = file.name
    workers = [context.Process(target=_worker, args=(rank, path, queue)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    found = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=5)
    _, both = gradients(model, *(batch((14, 14), seed=rank) for rank in (0, 1)))
    for name, gradient in both.items():
        for rank in (0, 1):
            torch.testing.assert_close(torch.from_numpy(found[rank][name]), gradient, rtol=1e-10, atol=1e-12)


# -- generation, artifacts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ("gpt2", "gemma3") else pytest.mark.slow) for f in DECODERS]
)
def test_generation_is_the_forward_of_the_segments_so_far(family, attention):
    model = build(DECODERS[family], double=False).eval()
    applied(model, tokens=3, segment=5, attention=attention)
    model.generation_config.eos_token_id = None
    for length in (3, 5, 12):
        ids = batch((length, length))["input_ids"]
        options = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        found = model.generate(ids, **options)
        wanted = model(input_ids=found.sequences).logits[:, length - 1 : -1]
        torch.testing.assert_close(torch.stack(found.logits, 1), wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(found.sequences, model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False))


def test_rows_of_several_lengths_and_beams_are_read_again():
    model = build(DECODERS["gpt2"], double=False).eval()
    applied(model, tokens=3, segment=5)
    model.generation_config.eos_token_id = None
    given = batch((12, 7), left=True)
    given.pop("labels")
    together = model.generate(**given, max_new_tokens=6, do_sample=False)
    for row, mask in enumerate(given["attention_mask"].bool()):
        alone = model.generate(given["input_ids"][row : row + 1, mask], max_new_tokens=6, do_sample=False)
        assert torch.equal(together[row, -6:], alone[0, -6:])
    beams = model.generate(given["input_ids"][:1], max_new_tokens=6, do_sample=False, num_beams=3)
    assert beams.shape == (1, 18)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_whose_padding_is_known_by_its_id_alone(rows, padding):
    model = build(DECODERS["llama"], double=False).eval()
    applied(model, tokens=3, segment=5)
    model.generation_config.update(pad_token_id=padding, eos_token_id=None)
    ids = batch((8, 8))["input_ids"][:rows]
    ids[0, :3] = padding
    # a config of its own leaves what it does not say to the model's
    for given in ({"max_new_tokens": 6}, {"generation_config": hf.GenerationConfig(max_new_tokens=6)}):
        found = model.generate(ids, do_sample=False, **given)
        assert torch.equal(found[0, 8:], model.generate(ids[:1, 3:], do_sample=False, **given)[0, 5:])


def test_what_the_models_own_config_asks_of_generate_counts_beside_another():
    model = build(DECODERS["gpt2"], double=False).eval()
    applied(model, tokens=3, segment=5)
    model.generation_config.update(eos_token_id=None, guidance_scale=1.5)
    ids, config = batch((7, 7))["input_ids"], hf.GenerationConfig(max_new_tokens=6, do_sample=False)
    found = model.generate(ids, generation_config=config)
    assert torch.equal(found, model.generate(ids, generation_config=config, use_cache=False))


def test_save_and_load_keep_the_memory(tmp_path):
    model = build(DECODERS["gpt2"])
    out = applied(model, tokens=2, segment=5)
    name = next(n for n in model.state_dict() if n.endswith("memory_tokens.weight"))
    with torch.no_grad():
        memory_of(model).normal_()
    out.save(tmp_path)
    base = build(DECODERS["gpt2"])
    again = tightfit.load(base, tmp_path)
    assert again.recipe == out.recipe
    assert torch.equal(base.state_dict()[name], model.state_dict()[name])
    assert_close(gradients(base, batch()), gradients(model, batch()), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_in_half_precision_is_summed_in_float32(dtype):
    model = build(DECODERS["llama"], double=False).to(dtype)
    applied(model, tokens=2, segment=5)
    assert model(**batch()).loss.dtype == torch.float32


def test_slots_begin_as_wide_as_embeddings_are_for_the_blocks():
    model = build(DECODERS["gemma3"])
    table = model.get_input_embeddings()
    tightfit.apply(model, RecurrentMemory(tokens=16, segment=8))
    wanted = float(table(torch.arange(table.num_embeddings)).detach().std())
    assert float(memory_of(model).detach().std()) == pytest.approx(wanted, rel=0.15)
    assert wanted > 2 * float(table.weight.detach().std())


def test_every_slot_begins_with_numbers_of_its_own():
    model = build(DECODERS["gpt2"])
    spread = model.get_input_embeddings().weight.std()
    tightfit.apply(model, RecurrentMemory(tokens=16, segment=8, seed=3))
    memory = memory_of(model).detach()
    assert torch.linalg.matrix_rank(memory) == 16
    assert float(memory.std()) == pytest.approx(float(spread.detach()), rel=0.15)
    twin = build(DECODERS["gpt2"])
    tightfit.apply(twin, RecurrentMemory(tokens=16, segment=8, seed=3))
    assert torch.equal(memory_of(twin), memory)


def test_a_copy_is_independent():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=5)
    twin = copy.deepcopy(model)
    wanted = gradients(model, batch())
    model.zero_grad()
    assert_close(gradients(twin, batch()), wanted, 0.0)
    assert all(p.grad is None for p in model.parameters())
