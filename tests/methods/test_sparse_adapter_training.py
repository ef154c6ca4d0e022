"""SparseAdapter in training: the optimizer's step, clipping, scalers, accumulation, checkpoints, the Trainer, DDP."""

import copy
import warnings
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import transformers
from sparse_adapter_cases import applied, build, dense
from torch import distributed as dist

import tightfit
from tightfit import SparseAdapter
from tightfit.core.errors import StateError
from tightfit.methods.sparse_adapter import NotFiniteError
from tightfit.ops.sparse_rows import reference as ref

WIDE = {"dtype": torch.float64}
NAMES = ("rows", "exp_avg", "exp_avg_sq")


def state(part):
    found = [layer.bank.tensor(name).clone() for layer in part.layers for name in NAMES]
    return [*found, *(torch.from_numpy(layer.bank.step.copy()) for layer in part.layers)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def token_sum(model, batch):
    """The loss summed over tokens, so that parts of a batch add up."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")


# -- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_steps_are_those_of_the_dense_model_with_row_wise_adamw(family):
    """Clipping by the joint norm, a learning rate that changes, decay; bert has a head on the device as well."""
    decay = 0.05
    model, found, part = applied(family, weight_decay=decay, betas=(0.8, 0.9), width=400, top_k=3, **WIDE)
    other, beside = dense(family, part, **WIDE)
    head = [p for p in other.parameters() if p.requires_grad]
    assert bool(head) == (family == "bert")
    ours = found.optimizer(torch.optim.SGD, lr=0.05)
    theirs = torch.optim.SGD(head, lr=0.05) if head else None
    moments = [[torch.zeros_like(own.keys) for _ in range(4)] + [torch.zeros(400)] for own in beside]
    for turn in range(4):
        batch, lr = models.batch(model, seed=turn), 0.05 / (turn + 1)
        for group in (*ours.param_groups, *(theirs.param_groups if theirs else ())):
            group["lr"] = lr
        for run in (model, other):
            (3 * run(**batch).loss).backward()
        every = [*head, *beside.parameters()]
        norm, expected = (torch.nn.utils.clip_grad_norm_(p, 0.2) for p in (list(found.parameters()), every))
        torch.testing.assert_close(norm, expected, rtol=1e-10, atol=0)
        assert norm > 0.2
        ours.step()
        ours.zero_grad()
        if theirs:
            theirs.step()
        for own, layer, (m_k, v_k, m_v, v_v, steps) in zip(beside, part.layers, moments):
            touched = own.chosen.any(0).nonzero().flatten().tolist()
            with torch.no_grad():
                ref.row_adamw(own.keys, own.keys.grad, m_k, v_k, steps.clone(), touched, lr, (0.8, 0.9), 1e-8, decay)
                ref.row_adamw(own.values, own.values.grad, m_v, v_v, steps, touched, lr, (0.8, 0.9), 1e-8, decay)
            torch.testing.assert_close(layer.bank.keys, own.keys.detach(), rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(layer.bank.values, own.values.detach(), rtol=1e-8, atol=1e-10)
            assert layer.bank.step.tolist() == steps.int().tolist()
        for p in (*head, *beside.parameters()):
            p.grad = None
    for a, b in zip(found.parameters(), [p for p in model.parameters() if p.requires_grad]):
        assert a is b
    for name, p in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-8, atol=1e-10)


def test_a_step_that_runs_the_backward_itself_is_the_same_step():
    """As Lightning does it: zeroing, forward, backward and clipping in a closure."""
    results = []
    for inside in (False, True):
        model, found, part = applied("llama", **WIDE)
        optimizer = found.optimizer(torch.optim.AdamW, lr=0.05)

        def closure(model=model, found=found, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(**models.batch(model)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(found.parameters(), 1e-3)
            return loss

        for _ in range(3):
            if not inside:
                closure()
            optimizer.step(closure if inside else None)
        results.append(state(part))
    assert same(*results)
    assert all(layer.bank.step.max() == 3 for layer in part.layers)


def test_rows_without_a_gradient_keep_their_bits_on_later_steps_too():
    model, found, part = applied("llama", weight_decay=0.1, width=400, top_k=2)
    optimizer = found.optimizer(lr=0.01)
    moved = [np.zeros(400, dtype=bool) for _ in part.layers]
    still = 0
    for turn in range(3):
        model(**models.batch(model, size=1, length=4, seed=turn)).loss.backward()
        touched = [layer.bank.touched.copy() for layer in part.layers]
        before = state(part)
        optimizer.step()
        optimizer.zero_grad()
        after = state(part)
        for i, rows in enumerate(touched):
            for old, new in zip((*before[3 * i : 3 * i + 3], before[6 + i]), (*after[3 * i : 3 * i + 3], after[6 + i])):
                assert torch.equal(old[~rows], new[~rows])
                assert not torch.equal(old[rows], new[rows])
            still += (moved[i] & ~rows).sum()  # a dense Adam would move these by their momentum
            moved[i] |= rows
            assert not part.layers[i].bank.tensor("grad").any()
    assert still > 0


def test_two_micro_batches_step_as_their_concatenation():
    whole = models.batch(build("llama"), size=4)
    results = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        model, found, part = applied("llama", **WIDE)
        optimizer = found.optimizer(lr=0.01)
        for own in parts:
            token_sum(model, {key: value[own] for key, value in whole.items()}).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(found.parameters()), 1.0)
        optimizer.step()
        results.append([norm, *state(part)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_zeroed_are_forgotten(to_none):
    batch = models.batch(build("llama"))
    results = []
    for discard in (False, True):
        model, found, part = applied("llama")
        optimizer = found.optimizer(lr=0.01)
        if discard:
            model(**models.batch(model, seed=7)).loss.backward()
            optimizer.zero_grad(set_to_none=to_none)
            optimizer.step()
            assert not part.layers[0].bank.step.any() and not part.layers[0].bank.pending
            model(**models.batch(model, seed=8)).loss.backward()
            optimizer.zero_grad(set_to_none=to_none)
        model(**batch).loss.backward()
        optimizer.step()
        results.append(state(part))
    assert same(*results)


def test_gradients_that_are_taken_and_put_in_place_train_the_rows_too():
    """As those do who mix the gradients of several losses; the links' are the norms of their rows' gradients."""
    batch = models.batch(build("llama"))
    results = []
    for taken in (False, True):
        model, found, part = applied("llama")
        optimizer = found.optimizer(lr=0.01)
        loss, trained = model(**batch).loss, list(found.parameters())
        if taken:
            for parameter, grad in zip(trained, torch.autograd.grad(loss, trained)):
                parameter.grad = grad
        else:
            loss.backward()
        optimizer.step()
        assert all(layer.bank.step.any() for layer in part.layers)
        results.append(state(part))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_not_finite_stop_the_step_by_the_layers_name():
    model, found, part = applied("bert")
    optimizer = found.optimizer(lr=0.01)
    (model(**models.batch(model)).loss * float("inf")).backward()
    before, head = state(part), model.classifier.weight.detach().clone()
    with pytest.raises(NotFiniteError, match=r"gradients of the rows of bert\.encoder\.layer\.0 are not finite"):
        optimizer.step()
    assert same(before, state(part)) and torch.equal(model.classifier.weight, head)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_scales_the_rows_too_and_skips_them(fused):
    batch = models.batch(build("bert"))
    results = []
    for scaled in (False, True):
        model, found, part = applied("bert")
        optimizer = found.optimizer(lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        for turn in range(3):
            loss = model(**batch).loss
            scaler.scale(loss * (float("inf") if scaled and turn == 1 else 1.0)).backward()
            if scaled and turn == 1:
                before = state(part)
            if not fused:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(list(found.parameters()), 0.1)
            scaler.step(optimizer) if scaled or turn != 1 else None
            scaler.update()
            if scaled and turn == 1:
                assert same(before, state(part))
            optimizer.zero_grad()
        assert all(layer.bank.step.max() == 2 for layer in part.layers)
        results.append(state(part))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_an_optimizer_that_does_not_hold_the_links_leaves_the_rows_alone():
    model, _, part = applied("bert")
    model(**models.batch(model)).loss.backward()
    before = state(part)
    torch.optim.SGD(model.classifier.parameters(), lr=0.1).step()
    assert same(before, state(part)) and part.layers[0].bank.pending


# -- keeping and resuming ---------------------------------------------------------------------------------------------


def steps(model, found, optimizer, turns):
    for turn in turns:
        model(**models.batch(model, seed=turn)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fields", [{}, {"groups": 20, "probe": 3}], ids=["rows", "groups"])
def test_a_state_dict_resumes_to_the_same_bits(tmp_path, fields):
    model, found, part = applied("llama", width=400, top_k=2, **fields)
    optimizer = found.optimizer(lr=0.01)
    steps(model, found, optimizer, [0, 1])
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    steps(model, found, optimizer, [2])
    model_state, optimizer_state = torch.load(tmp_path / "state", weights_only=True)
    again = build("llama")
    resumed = tightfit.apply(again, SparseAdapter(width=400, top_k=2, **fields))
    assert not again.load_state_dict(model_state).missing_keys
    fresh = resumed.optimizer(lr=0.01)
    fresh.load_state_dict(optimizer_state)
    steps(again, resumed, fresh, [2])
    assert same(state(part), state(SparseAdapter.of(resumed)))
    for layer in part.layers if fields else ():
        means = layer.bank.keys.view(20, 20, 32).mean(1)
        torch.testing.assert_close(torch.from_numpy(layer.bank.router), means, rtol=1e-5, atol=1e-7)


def test_a_state_dict_from_before_the_first_step_brings_the_optimizers_state_back_to_nothing():
    model, found, part = applied("llama", width=400, top_k=2)
    begin = copy.deepcopy(model.state_dict())
    steps(model, found, found.optimizer(lr=0.01), [0])
    after = state(part)
    steps(model, found, found.optimizer(lr=0.01), [1])
    model.load_state_dict(begin)
    steps(model, found, found.optimizer(lr=0.01), [0])
    assert same(state(part), after)


def test_a_copy_made_between_backward_and_step_does_not_add_to_those_gradients():
    model, found, _ = applied("llama")
    token_sum(model, models.batch(model, seed=1)).backward()
    twin = copy.deepcopy(model)
    found.optimizer().zero_grad()
    for each in (model, twin):
        token_sum(each, models.batch(each, seed=2)).backward()
    grads = [[layer.bank.tensor("grad") for layer in m.modules() if hasattr(layer, "bank")] for m in (model, twin)]
    assert len(grads[0]) == 2 and same(*grads)


def test_a_reentrant_checkpoint_after_a_step_takes_no_rows_from_before_it():
    states = []
    for checkpoints in (False, True):
        model, found, part = applied("llama")
        model.enable_input_require_grads()
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": True})
        steps(model, found, found.optimizer(lr=0.3), [0, 0, 0])
        states.append(state(part))
    assert same(*states)


def test_the_saved_file_holds_rows_and_router_and_no_optimizer_state(tmp_path):
    from safetensors import safe_open

    model, found, _ = applied("llama", width=64, groups=8, probe=2, gate="sigmoid")
    steps(model, found, found.optimizer(lr=0.01), [0])
    found.save(tmp_path)
    with safe_open(tmp_path / "tightfit.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    for i in range(2):
        assert shapes.pop(f"part:HostRows/model.layers.{i}.mlp/rows") == [64, 2, 32]
        assert shapes.pop(f"model.layers.{i}.sparse_rows.router") == [8, 32]
        assert shapes.pop(f"model.layers.{i}.sparse_rows.link") == [1]
    assert not shapes
    again = tightfit.load(build("llama"), tmp_path)
    batch = models.batch(model)
    assert torch.equal(again.model.eval()(**batch).logits, model.eval()(**batch).logits)


def trainer_run(folder, *, stop=None, resume=None, seed=0):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, found, part = applied("bert", width=400, top_k=2)
    rows = [{k: v[0] for k, v in models.batch(model, size=1, seed=i).items()} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=1,
        max_grad_norm=0.05,
        report_to="none",
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        seed=seed,
    )

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= stop is not None and state.global_step >= stop

    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[found.callback(), Stop()])
    trainer.train(resume_from_checkpoint=resume)
    return part, model, trainer


def test_a_plain_trainer_trains_and_resumes_to_the_same_bits(tmp_path):
    part, model, trainer = trainer_run(tmp_path / "a")
    assert all(layer.bank.step.any() for layer in part.layers)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 4 and min(norms) > 0.05
    trainer_run(tmp_path / "b", stop=2)
    again, other, _ = trainer_run(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2"))
    assert same(state(part), state(again))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


# -- several processes ------------------------------------------------------------------------------------------------


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), 2), rank=rank, world_size=2)
    try:
        for accumulate in (1, 2):
            model, found, part = applied("bert", width=400, top_k=2, **WIDE)
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = found.optimizer(torch.optim.SGD, lr=0.05)
            for turn in range(2):
                batch = models.batch(model, size=4, seed=turn)
                own = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
                if accumulate == 2:
                    with wrapped.no_sync():
                        wrapped(**{key: value[:1] for key, value in own.items()}).loss.backward()
                    wrapped(**{key: value[1:] for key, value in own.items()}).loss.backward()
                else:
                    wrapped(**own).loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(list(found.parameters()), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            rows = [layer.bank.tensor("rows") for layer in part.layers]
            torch.save([norm, model.classifier.weight.detach(), *rows], f"{folder}/{accumulate}-{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_on_both_batches(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    for accumulate in (1, 2):
        model, found, part = applied("bert", width=400, top_k=2, **WIDE)
        optimizer = found.optimizer(torch.optim.SGD, lr=0.05)
        for turn in range(2):
            (model(**models.batch(model, size=4, seed=turn)).loss * accumulate).backward()
            norm = torch.nn.utils.clip_grad_norm_(list(found.parameters()), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        expected = [norm, model.classifier.weight.detach(), *(layer.bank.tensor("rows") for layer in part.layers)]
        first, second = (torch.load(tmp_path / f"{accumulate}-{rank}") for rank in (0, 1))
        assert same(first, second)
        for a, b in zip(first, expected):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_an_optimizer_without_a_learning_rate_is_refused():
    model, found, _ = applied("llama")
    optimizer = found.optimizer(transformers.Adafactor, lr=None)  # it finds one itself
    model(**models.batch(model)).loss.backward()
    with pytest.raises(StateError, match=r"Adafactor has no learning rate.*relative_step=False"):
        optimizer.step()


def test_a_search_along_a_line_has_no_place_for_rows():
    model, found, part = applied("bert")
    batch, before = models.batch(model), state(part)

    def closure():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    with pytest.raises(StateError, match=r"LBFGS takes many gradients in a step, .* Give the link parameters to"):
        found.optimizer(torch.optim.LBFGS, max_iter=2).step(closure)
    assert same(state(part), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    links = [p for name, p in trained.items() if name.endswith(".link")]
    head = model.classifier.weight.detach().clone()
    torch.optim.LBFGS([p for name, p in trained.items() if not name.endswith(".link")], max_iter=2).step(closure)
    assert same(state(part), before) and not torch.equal(model.classifier.weight, head)
    torch.optim.AdamW(links, lr=1e-2).step()
    assert not same(state(part), before)


def test_sharded_parameters_are_refused_where_their_links_are_lost():
    model, found, _ = applied("bert")
    model(**models.batch(model)).loss.backward()

    class DTensor(torch.nn.Parameter):
        pass

    stranger = DTensor(torch.zeros(1))
    stranger.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([stranger], lr=0.1)
    with pytest.raises(StateError, match="works under DDP, not under FSDP"):
        optimizer.step()
    found.remove()
    optimizer.step()


def test_autocast_and_half_precision_models_train():
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model, found, part = applied("llama", dtype=dtype)
        optimizer = found.optimizer(lr=1e-2)
        batch, losses = models.batch(model), []
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.1
        assert part.layers[0].bank.tensor("rows").dtype == torch.float32


def test_a_copy_of_a_model_under_way_goes_on_alone():
    model, found, part = applied("llama")
    optimizer = found.optimizer(lr=0.01)
    steps(model, found, optimizer, [0])
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    steps(model, found, optimizer, [1])
    steps(twin, None, other, [1])
    banks = [twin.model.layers[i].sparse_rows.bank for i in range(2)]
    for layer, own in zip(part.layers, banks):
        assert torch.equal(layer.bank.tensor("rows"), own.tensor("rows")) and layer.bank is not own


def test_nothing_warns_in_ordinary_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, found, _ = applied("llama")
        steps(model, found, found.optimizer(lr=0.01), [0, 1])
