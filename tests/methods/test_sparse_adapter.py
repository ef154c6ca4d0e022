"""SparseAdapter: what it computes, which rows take part, and what stays untouched."""

import copy
import warnings

import models
import pytest
import torch
import transformers as hf
from checks.state import logits
from sparse_adapter_cases import FAMILIES, applied, build, dense

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, Reversible, SparseAdapter
from tightfit.core.errors import ArtifactError, ConflictError, SelectorError, StateError, UnsupportedModelError
from tightfit.methods.sparse_adapter import HostMemoryError, NotFiniteError, bank

each_family = pytest.mark.parametrize("family", FAMILIES)
WIDE = {"dtype": torch.float64}


def backward(model, *batches):
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
    return loss.detach()


def row_grads(part):
    return [layer.bank.tensor("grad").clone() for layer in part.layers]


# -- the sum ----------------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("fields", [{}, {"width": 64, "groups": 8, "probe": 2}], ids=["rows", "groups"])
def test_outputs_and_gradients_are_those_of_the_dense_adapter_with_masks(family, fields):
    model, _, part = applied(family, **WIDE, **fields)
    other, beside = dense(family, part, **WIDE)
    batch = models.batch(model)
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits, rtol=1e-12, atol=1e-12)
    found, expected = backward(model, batch), backward(other, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for own, layer in zip(beside, part.layers):
        grad = layer.bank.tensor("grad")
        torch.testing.assert_close(grad[:, 0], own.keys.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad[:, 1], own.values.grad, rtol=1e-10, atol=1e-12)
        used = own.chosen.any(0)
        assert 0 < used.sum() < len(used)
        assert torch.equal(torch.from_numpy(layer.bank.touched), used)


@each_family
def test_values_of_zero_change_nothing_and_give_keys_no_gradient(family):
    stock = build(family).eval()
    model, applied_, part = applied(family, spread=0)
    batch = models.batch(model)
    assert torch.equal(logits(model, batch), logits(stock, batch))
    backward(model, batch)
    for grad in row_grads(part):
        assert not grad[:, 0].any() and grad[:, 1].any()
    before = [layer.bank.keys.clone() for layer in part.layers]
    applied_.optimizer(lr=0.1).step()
    assert all(torch.equal(layer.bank.keys, old) for layer, old in zip(part.layers, before))
    assert all(layer.bank.values.any() for layer in part.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows_for_every_token_is_the_dense_parallel_adapter_bit_for_bit(dtype):
    fields = {"width": 40, "top_k": 40, "selection": "union"}
    model, _, part = applied("bert", spread=0.3, **fields)
    model.to(dtype)
    layer = part.layers[0]
    h = torch.randn(3, 9, 32).to(dtype)
    keys, values = layer.bank.keys.to(dtype), layer.bank.values.to(dtype)
    assert torch.equal(layer(h).detach(), torch.relu(h @ keys.t()) @ values)
    model, _, part = applied("bert", width=40, top_k=40)
    h, layer = h.float(), part.layers[0]
    expected = torch.relu(h @ layer.bank.keys.t()) @ layer.bank.values
    torch.testing.assert_close(layer(h).detach(), expected, rtol=2e-5, atol=2e-5)


def test_a_trained_router_gets_a_gradient_and_weighs_rows():
    fields = {"width": 64, "groups": 8, "probe": 2, "gate": "sigmoid"}
    model, _, part = applied("llama", **WIDE, **fields)
    layer = part.layers[1]
    h = torch.randn(7, 32, dtype=torch.float64)
    router = layer.router.detach()
    logit = h @ router.t()
    chosen = tightfit.ops.sparse_rows.reference.top_rows_of_groups(h, layer.bank.keys, 5, logit, 2)
    gate = torch.sigmoid(logit).repeat_interleave(8, dim=1)
    expected = (torch.relu(h @ layer.bank.keys.t()).where(chosen, 0.0) * gate) @ layer.bank.values
    torch.testing.assert_close(layer(h).detach(), expected, rtol=1e-12, atol=1e-12)
    backward(model, models.batch(model))
    assert layer.router.grad.any() and "sparse_rows.router" in dict(model.model.layers[0].named_parameters())


# -- which tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(r"ignore:SparseAdapter\(selection='union'\):UserWarning")
@pytest.mark.parametrize("selection", ["token", "union"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_later_token_does_not_reach_earlier_ones(family, selection):
    model, _, _ = applied(family, selection=selection, spread=1.0, width=400, top_k=2, **WIDE)
    batch = models.batch(model, size=2)
    before = logits(model, batch)
    batch["input_ids"][0, 7] = 50 if batch["input_ids"][0, 7] != 50 else 51
    change = (logits(model, batch) - before)[0, :7].abs().max()
    assert (change < 1e-12) == (selection == "token")


@pytest.mark.filterwarnings(r"ignore:SparseAdapter\(selection='union'\):UserWarning")
@pytest.mark.parametrize("selection", ["token", "union"])
@each_family
def test_a_sequence_gives_the_same_alone_and_in_a_padded_batch(family, selection):
    model, _, part = applied(family, selection=selection, spread=1.0, **WIDE)
    batch = models.batch(model)
    alone = {k: v[1:2, :8] if v.dim() > 1 else v[1:2] for k, v in batch.items()}
    together, single = logits(model, batch)[1], logits(model, alone)[0]
    same = torch.allclose(together[: len(single)], single, rtol=1e-9, atol=1e-9)
    assert same == (selection == "token")
    assert part.report()["selections"] == 2 * len(part.layers)


def test_padding_has_no_say():
    model, _, part = applied("llama")
    batch = models.batch(model)
    backward(model, batch)
    before = [layer.bank.touched.copy() for layer in part.layers]
    model.zero_grad()
    batch["input_ids"][batch["attention_mask"] == 0] = 77
    backward(model, batch)
    assert all((layer.bank.touched == old).all() for layer, old in zip(part.layers, before))


def test_no_positive_score_gives_the_base_output_and_moves_nothing():
    model, _, part = applied("llama", spread=0)
    for layer in part.layers:
        layer.bank.tensor("rows").zero_()
    batch, stock = models.batch(model), build("llama")
    assert torch.equal(logits(model, batch), logits(stock, batch))
    loss = backward(model, batch)
    assert torch.equal(loss, backward(stock, batch))
    found = part.report()
    assert found["rows_resident"] == 0 and not any(layer.bank.pending for layer in part.layers)
    assert all(layer.link.grad.tolist() == [0.0] for layer in part.layers)


def test_the_cap_keeps_rows_of_largest_summed_score_and_says_what_it_dropped():
    model, _, part = applied("llama", max_resident=6, **WIDE)
    other, beside = dense("llama", part, cap=6, **WIDE)
    batch = models.batch(model)
    with pytest.warns(UserWarning, match=r"max_resident=6.*asked for \d+ rows of model.layers.0.mlp") as found:
        backward(model, batch)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(**batch).logits, other(**batch).logits, rtol=1e-12, atol=1e-12)
    backward(other, batch)
    for own, layer in zip(beside, part.layers):
        assert torch.equal(torch.from_numpy(layer.bank.touched), own.chosen.any(0))
        assert layer.bank.touched.sum() == 6
        torch.testing.assert_close(layer.bank.tensor("grad")[:, 0], own.keys.grad, rtol=1e-10, atol=1e-12)
    report = part.report()
    assert report["rows_resident"] == 6 < report["rows_wanted"]
    assert report["cap_hits"] == 4 and 0 < report["dropped_share"] < 1


def test_the_traffic_of_steps_is_counted():
    model, applied_to_it, part = applied("llama", **WIDE)
    optimizer = applied_to_it.optimizer(lr=1e-3)
    batch = models.batch(model)
    shares = []
    for _ in range(2):
        backward(model, batch)
        shares += [layer.bank.touched.mean() for layer in part.layers]
        optimizer.step()
        optimizer.zero_grad()
    found = part.report()
    assert found["steps"] == 2 and 0 < found["touched_share"] == pytest.approx(sum(shares) / len(shares))
    width, number = model.config.hidden_size, next(model.parameters()).element_size()
    tokens = batch["input_ids"].numel()
    states, rows = tokens * width * number, 2 * width * number
    layers = 2 * len(part.layers)
    # down: hidden states, the mask's numbers, and the gradients of the rows that are on the device
    assert found["bytes_to_host"] >= layers * states
    assert found["bytes_to_device"] >= round(found["rows_resident"] * layers) * rows


# -- memory strategies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"retain": "refetch"}, {"store": "disk"}, {"retain": "refetch", "store": "disk"}])
def test_where_rows_are_kept_changes_no_bit(fields):
    batch = models.batch(build("llama"))
    results = []
    for own in ({}, fields):
        model, _, part = applied("llama", **own)
        loss = backward(model, batch)
        results.append([loss, *row_grads(part)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", [{}, {"retain": "refetch"}, {"lookahead": 1}])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit_and_selects_once(family, fields, reentrant):
    batch = models.batch(build(family))
    results = []
    for checkpoints in (False, True):
        model, _, part = applied(family, **fields)
        if checkpoints:
            if reentrant:
                model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss = backward(model, batch, models.batch(model, seed=1, length=7))
        results.append([loss, *row_grads(part)])
        assert part.report()["selections"] == 2 * len(part.layers)
    for a, b in zip(*results):
        # T5's blocks share a position bias, whose gradient is then summed in another order
        torch.testing.assert_close(a, b, rtol=0, atol=0 if family == "llama" else 1e-6)


def test_two_forwards_in_one_backward_give_the_sum_of_both():
    results = []
    for joint in (True, False):
        model, _, part = applied("llama", **WIDE)
        batches = [models.batch(model, seed=seed) for seed in (1, 2)]
        if joint:
            sum(model(**batch).loss for batch in batches).backward()
        else:
            backward(model, *batches)
        results.append((row_grads(part), [layer.link.grad for layer in part.layers]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_of_one_beginning_are_told_apart_under_checkpointing(reentrant):
    results = []
    for checkpoints in (False, True):
        model, _, part = applied("llama", **WIDE)
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        one, other = (models.batch(model, size=1, length=64, seed=seed) for seed in (1, 2))
        ids = one["input_ids"].clone()
        ids[:, -3:] = other["input_ids"][:, -3:]
        losses = [model(input_ids=given, labels=given).loss for given in (one["input_ids"], ids)]
        (losses[0] - 2 * losses[1]).backward()
        results.append(row_grads(part))
    torch.testing.assert_close(*results)


def test_two_forwards_of_one_shape_before_their_backward_are_told_apart_under_checkpointing():
    results = []
    for checkpoints in (False, True):
        model, _, part = applied("llama")
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": False})
        first, second = (model(**models.batch(model, seed=seed)).loss for seed in (1, 2))
        (first + 2 * second).backward()
        results.append(row_grads(part))
        assert part.report()["selections"] == 4
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_an_encoder_does_not_look_ahead_into_the_decoder():
    layers = applied("t5", lookahead=1)[2].layers
    assert [layer.first for layer in layers] == [True, False, True, False]
    assert [layer.later for layer in layers] == [(layers[1],), (), (layers[3],), ()]


def test_looking_ahead_chooses_other_rows_but_computes_with_them_as_ever():
    model, _, part = applied("llama", lookahead=1, **WIDE)
    exact, _, plain = applied("llama", **WIDE)
    batch = models.batch(model)
    backward(model, batch)
    backward(exact, batch)
    assert (part.layers[0].bank.touched == plain.layers[0].bank.touched).all()
    assert (part.layers[1].bank.touched != plain.layers[1].bank.touched).any()
    # a layer whose rows were all chosen by someone else is still exact where all rows are chosen
    whole, _, many = applied("llama", lookahead=1, top_k=48, **WIDE)
    all_rows, _, few = applied("llama", top_k=48, **WIDE)
    a, b = backward(whole, batch), backward(all_rows, batch)
    assert many.layers[1].bank.touched.any() and few.layers[1].bank.touched.any()
    assert torch.isfinite(a) and abs(a - b) < 0.2


def test_moving_and_casting_the_model_leave_the_rows_alone():
    model, _, part = applied("llama")
    before = [layer.bank.tensor("rows").clone() for layer in part.layers]
    address = [layer.bank.tensor("rows").data_ptr() for layer in part.layers]
    model.half()
    model.to(torch.bfloat16)
    model.to("cpu")
    model.double()
    for layer, rows, home in zip(part.layers, before, address):
        now = layer.bank.tensor("rows")
        assert torch.equal(now, rows) and now.data_ptr() == home and now.dtype == torch.float32
    assert max(p.numel() for name, p in model.named_parameters() if "sparse_rows" in name) == 1


def test_a_copy_has_rows_of_its_own():
    model, _, part = applied("llama")
    twin = copy.deepcopy(model)
    own = twin.model.layers[0].sparse_rows
    assert own.bank is not part.layers[0].bank and own.ledger is not part.ledger
    assert own.ledger is twin.model.layers[1].sparse_rows.ledger
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    backward(twin, models.batch(twin))
    optimizer.step()
    assert own.bank.step.any() and not part.layers[0].bank.step.any()
    assert not part.layers[0].bank.pending


def test_disabled_it_is_the_stock_model():
    model, _, part = applied("llama")
    batch = models.batch(model)
    with part.disabled():
        assert torch.equal(logits(model, batch), logits(build("llama"), batch))
    assert not torch.equal(logits(model, batch), logits(build("llama"), batch))


def test_evaluation_and_generation_leave_no_gradients():
    model, _, part = applied("llama")
    batch = models.batch(model)
    model.eval()
    model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    model(**batch).loss.requires_grad_().backward()
    with torch.no_grad():
        model.train()(**batch)
    assert not any(layer.bank.pending for layer in part.layers)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, r"top_k=\.\.\.\): got 0, accepted is an int in \[1, 6144\]"),
        ({"width": 32, "top_k": 33}, r"top_k=\.\.\.\): got 33, accepted is an int in \[1, 32\]"),
        ({"width": 0}, r"width=\.\.\.\): got 0"),
        ({"max_resident": 0}, r"max_resident=\.\.\.\): got 0"),
        ({"groups": 0}, r"groups=\.\.\.\): got 0"),
        ({"groups": 4, "probe": 0}, r"probe=\.\.\.\): got 0"),
        ({"groups": 4, "probe": 5}, r"got 5 of 4 groups, accepted is 1 to 4"),
        ({"scale": float("nan")}, r"scale=\.\.\.\): got nan, accepted is a number in \(-inf, inf\)"),
        ({"max_resident": 63}, r"one token could not have its rows; give max_resident >= 64"),
        ({"groups": 90}, r"the width 6144 is not a multiple of it; give a divisor, the nearest are 64 and 96|96 and"),
        ({"groups": 1024, "probe": 8}, r"8 groups hold 48 rows, fewer than top_k=64"),
        ({"gate": "sigmoid"}, r"a router needs groups"),
        ({"selection": "all"}, r"selection=\.\.\.\): got 'all'"),
        ({"betas": (0.9, 1.0)}, r"two numbers in \[0, 1\)"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseAdapter(**fields)


def test_the_nearest_divisors_are_named():
    with pytest.raises(ValueError, match="the nearest are 384 and 512"):
        SparseAdapter(groups=400)
    assert SparseAdapter(groups="auto").group_count == 256  # 4 sqrt(6144) is 313; 384 is further
    for width in (2048, 3072, 6144, 8192, 16384):
        found = SparseAdapter(width=width, groups="auto")
        assert width % found.group_count == 0 and found.probed_groups == 8


def test_modules_that_are_no_mlps():
    with pytest.raises(SelectorError, match=r"'\*attn' matches no suitable module.*its MLPs are model.layers.0.mlp"):
        tightfit.apply(build("llama"), SparseAdapter(width=64, where="*attn"))
    model = build("llama")
    found = tightfit.apply(model, SparseAdapter(width=64, where="layers.1.mlp"))
    assert [n for n, _ in model.named_modules() if n.endswith("sparse_rows")] == ["model.layers.1.sparse_rows"]
    with pytest.raises(StateError, match="already carries the recipe"):
        tightfit.apply(model, SparseAdapter(width=64))
    found.remove()


def test_the_attention_of_a_mixture_of_experts_is_no_mlp():
    config = hf.MixtralConfig(**models.SIZE, num_key_value_heads=1, num_local_experts=2, vocab_size=models.VOCABULARY)
    with pytest.raises(UnsupportedModelError, match="no block that ends in an MLP of linear layers"):
        tightfit.apply(hf.MixtralForCausalLM(config), SparseAdapter(width=64))


def test_union_on_a_causal_model_warns_of_the_leak():
    with pytest.warns(UserWarning, match="later ones have chosen, so LlamaForCausalLM sees what it shall predict"):
        tightfit.apply(build("llama"), SparseAdapter(width=64, selection="union"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tightfit.apply(build("bert"), SparseAdapter(width=64, selection="union"))


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_too_little_memory_is_said_before_any_is_taken(store, monkeypatch):
    monkeypatch.setattr(bank, "free_bytes", lambda store: 100_000)
    monkeypatch.setattr(bank, "_zeros", lambda *args: pytest.fail("allocated"))
    with pytest.raises(HostMemoryError, match=r"2 layers of 32 need 2,107,392 bytes.*100,000 free.*width=46"):
        tightfit.apply(build("llama"), SparseAdapter(width=1024, store=store))
    assert isinstance(HostMemoryError(), MemoryError)


def test_hidden_states_that_are_not_finite_are_refused_by_the_layers_name():
    model, _, _ = applied("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(NotFiniteError, match=r"hidden states that model\.layers\.1\.mlp gets are not finite for"):
        model(**models.batch(model))
    assert isinstance(NotFiniteError(), FloatingPointError)


def test_rows_of_another_adapter_are_refused_and_nothing_is_loaded(tmp_path):
    _, found, _ = applied("llama")
    found.save(tmp_path)
    again = tightfit.load(build("llama"), tmp_path)
    part = SparseAdapter.of(again)
    before = [layer.bank.tensor("rows").clone() for layer in part.layers]
    tensors = {name: rows.clone() for name, rows in part.tensors().items()}
    last = list(tensors)[-1]
    with pytest.raises(ArtifactError, match=r"model.layers.1.mlp are \[47, 2, 32\], this adapter's are \[48, 2, 32\]"):
        part.load_tensors({**{k: v + 1 for k, v in tensors.items()}, last: tensors[last][:47]})
    with pytest.raises(ArtifactError, match="rows of 1 MLPs, this adapter stands beside 2"):
        part.load_tensors({last: tensors[last]})
    assert all(torch.equal(layer.bank.tensor("rows"), rows) for layer, rows in zip(part.layers, before))
    with pytest.raises(ArtifactError, match="load the same base"):
        tightfit.load(build("gpt2"), tmp_path)


def test_a_step_while_rows_wait_for_their_backward_is_refused():
    model, found, part = applied("llama")
    optimizer = found.optimizer(lr=0.1)
    loss = model(**models.batch(model)).loss
    with pytest.raises(StateError, match="in use by a forward whose backward has not run"):
        optimizer.step()
    assert isinstance(StateError(), RuntimeError)
    loss.backward()
    optimizer.step()
    model(**models.batch(model))  # let go of without a backward
    optimizer.step()
    assert part.layers[0].bank.step.max() == 1


def test_merging_is_refused_and_removing_gives_the_base_back(tmp_path):
    model, found, part = applied("llama")
    for leave in (found.merge, lambda: found.export(tmp_path / "x")):
        with pytest.raises(StateError, match="has no place in a stock LlamaForCausalLM"):
            leave()
    found.remove()
    batch = models.batch(model)
    assert torch.equal(logits(model, batch), logits(build("llama"), batch))
    assert part.layers[0].bank.hollow


# -- with other methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("beside", [FusedOps(), Mesa(), Checkpointing()], ids=repr)
def test_rows_get_the_same_gradients_beside_other_methods(family, beside):
    batch, results = models.batch(build(family)), []
    for others in ((), (beside,)):
        model = build(family)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        found = tightfit.apply(model, tightfit.chain(SparseAdapter(width=48, top_k=5, freeze=False), *others))
        part = SparseAdapter.of(found)
        for layer in part.layers:
            layer.bank.values.copy_(layer.bank.keys)
        backward(model, batch)
        results.append(row_grads(part))
    tolerance = 0.05 if isinstance(beside, Mesa) else 1e-5
    for a, b in zip(*results):
        assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_the_same_layers_do_not_scale_the_rows(dora):
    settings = {"peft_type": "LORA", "r": 2, "use_dora": dora, "target_modules": "all-linear"}
    model = build("llama")
    found = tightfit.apply(model, tightfit.chain(SparseAdapter(width=48, top_k=5), Lora(config=settings)))
    part, mlp, h = SparseAdapter.of(found), model.model.layers[0].mlp, torch.randn(2, 4, 32)
    layer = part.layers[0]
    layer.bank.values.copy_(layer.bank.keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)  # DoRA multiplies the layer's output
        beside = mlp(h)
        with part.disabled():
            beside = beside - mlp(h)
        torch.testing.assert_close(beside, layer(h), rtol=1e-4, atol=1e-5)
    assert beside.abs().max() > 1e-3
    loss = backward(model, models.batch(model))
    assert torch.isfinite(loss) and layer.bank.pending


@pytest.mark.parametrize("method", [SparseAdapter(width=64, top_k=8), Reversible(variant="meft1")])
def test_trainable_copies_of_the_models_own_adapters_train_on(method):
    import peft

    model = models.build("llama")
    copied = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, copied)
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    tightfit.apply(model, method)
    assert any("lm_head.modules_to_save" in name for name in own)
    backward(model, models.batch(model))
    assert own <= {name for name, p in model.named_parameters() if p.grad is not None}


def test_it_is_refused_where_blocks_are_run_by_a_tape():
    model = build("llama")
    with pytest.raises(ConflictError, match=r"both take over model\.layers\.0"):
        tightfit.apply(model, tightfit.chain(SparseAdapter(width=64), Reversible()))
