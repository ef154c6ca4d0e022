"""LearnableMemory: values and gradients of a joint masked forward, and tasks that leave each other alone."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from checks.real import assert_planned_as_real
from checks.state import assert_same, gradients, logits, snapshot, train
from learnable_memory_cases import body, deit, images, joint, shaken, vit

import tightfit
from tightfit import Checkpointing, FusedOps, LearnableMemory, Lora
from tightfit.core.memory import saved_bytes
from tightfit.core.simulate import simulate
from tightfit.methods.learnable_memory import Memories

EXACT = {"rtol": 1e-12, "atol": 1e-12}
each_model = pytest.mark.parametrize("build", [vit, deit])
each_visibility = pytest.mark.parametrize("visibility", ["concatenation", "extension"])


def three_tasks(model, visibility="concatenation", **fields):
    """A model with three tasks of other sizes, the last of which trains."""
    recipe = LearnableMemory(
        task="c", num_labels=4, tokens=2, earlier=(("a", 2, 1), ("b", 5, 3)), visibility=visibility, **fields
    )
    applied = tightfit.apply(model, recipe)
    memories = applied.part(Memories)
    memories.unread.clear()
    shaken(model)
    return applied, memories


# -- isolated ---------------------------------------------------------------------------------------------------------


@each_model
@each_visibility
@pytest.mark.parametrize("normed", [True, False])
def test_logits_and_gradients_are_those_of_the_joint_masked_forward(build, visibility, normed):
    model = build()
    stock = copy.deepcopy(model)
    applied, memories = three_tasks(model, visibility, memory_norm=normed)
    batch = images(labels=4)
    wanted_old, wanted = joint(model, batch["pixel_values"], ["a", "b", "c"], visibility, normed)
    loss = torch.nn.functional.cross_entropy(wanted[2], batch["labels"])
    own = list(applied.parameters())
    wanted_grads = torch.autograd.grad(loss, own)
    out = model(**batch)
    assert type(out).__name__ == "ImageClassifierOutput"
    torch.testing.assert_close(out.loss, loss, **EXACT)
    torch.testing.assert_close(out.logits, wanted[2], **EXACT)
    torch.testing.assert_close(out.old_logits, wanted_old, **EXACT)
    assert torch.equal(out.old_logits, stock(batch["pixel_values"]).logits)
    out.loss.backward()
    for parameter, grad in zip(own, wanted_grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, **EXACT)
    assert all(p.grad is None for n, p in model.named_parameters() if "tight_" not in n)
    with torch.no_grad():
        together = memories.logits(batch["pixel_values"])
        assert list(together) == ["old", "a", "b", "c"]
        for name, expected in zip(memories.names, wanted):
            torch.testing.assert_close(together[name], expected, **EXACT)
            memories.use(name)
            torch.testing.assert_close(model(pixel_values=batch["pixel_values"]).logits, expected, **EXACT)
        memories.use("old")
        assert torch.equal(model(batch["pixel_values"]).logits, stock(batch["pixel_values"]).logits)


def test_a_mask_of_patches_is_kept():
    model = vit()
    _, memories = three_tasks(model)
    batch = images()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 1], [1, 0, 0, 1, 1]])
    seen = []
    with torch.no_grad():
        for row in range(3):
            # a token that is masked for everybody could as well hold anything
            pixels = batch["pixel_values"][row : row + 1].clone()
            both = []
            for fill in (0.0, 9.0):
                for patch in (mask[row, 1:] == 0).nonzero().flatten().tolist():
                    y, x = divmod(patch, 2)
                    pixels[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = fill
                both.append(memories.logits(pixels, attention_mask=mask[row : row + 1]))
            for name in both[0]:
                torch.testing.assert_close(both[0][name], both[1][name], **EXACT)
            seen.append(both[0]["c"])
        plain = memories.logits(batch["pixel_values"])["c"]
    torch.testing.assert_close(seen[0], plain[:1], **EXACT)
    assert not torch.allclose(seen[1], plain[1:2])


def test_each_task_alone_is_each_task_among_others():
    model = vit()
    applied, memories = three_tasks(model)
    batch = images()
    with torch.no_grad():
        together = memories.logits(batch["pixel_values"])
        memories.delete("a")
        again = memories.logits(batch["pixel_values"])
    assert list(again) == ["old", "b", "c"]
    for name in again:
        torch.testing.assert_close(again[name], together[name], **EXACT)
    assert applied.recipe.transforms[0].earlier == (("b", 5, 3),)


def test_the_task_that_trains_is_served_in_place_of_a_deleted_one():
    model = vit()
    memories = three_tasks(model)[1]
    pixels = images()["pixel_values"]
    memories.use("a")
    memories.delete("a")
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, memories.logits(pixels)["c"], **EXACT)


def test_tasks_of_one_size_begin_differently():
    model = vit()
    memories = tightfit.apply(model, LearnableMemory(task="a", num_labels=2)).part(Memories)
    memories.next("b", num_labels=2)
    found = memories.logits(images()["pixel_values"])
    assert not torch.allclose(found["a"], found["b"])


def test_under_extension_only_the_last_task_can_go():
    model = vit()
    applied, memories = three_tasks(model, "extension")
    batch = images()
    together = memories.logits(batch["pixel_values"])
    with pytest.raises(ValueError, match=r"delete\('a'\): the later tasks b, c see it"):
        memories.delete("a")
    memories.delete("c")
    again = memories.logits(batch["pixel_values"])
    assert list(again) == ["old", "a", "b"]
    for name in again:
        torch.testing.assert_close(again[name], together[name], **EXACT)
    # the one before trains again
    assert sum(p.numel() for p in applied.parameters()) == 3 * 3 * 32 + 32 + 33 * 5
    assert applied.recipe.transforms[0] == LearnableMemory(
        task="b", num_labels=5, tokens=3, earlier=(("a", 2, 1),), visibility="extension"
    )


@each_visibility
def test_tasks_learned_in_turn_leave_the_earlier_ones_alone(visibility, tmp_path):
    model = vit()
    stock = copy.deepcopy(model).eval()
    applied = tightfit.apply(model, LearnableMemory(task="a", num_labels=4, tokens=2, visibility=visibility))
    memories = applied.part(Memories)
    batch = images(labels=4)
    seen = {"old": stock(batch["pixel_values"]).logits}
    for name, labels in (("a", 4), ("b", 2), ("c", 3)):
        if name != "a":
            memories.next(name, num_labels=labels)
        losses = train(model, applied.optimizer(lr=1e-2), {**batch, "labels": batch["labels"] % labels}, 6)
        assert losses[-1] < losses[0]
        with torch.no_grad():
            found = memories.logits(batch["pixel_values"])
        for known, value in seen.items():
            torch.testing.assert_close(found[known], value, rtol=0, atol=1e-12)
        assert torch.equal(found["old"], seen["old"])
        seen = found
    width, depth = 32, 3
    owned = applied.report()["methods"]["LearnableMemory"]["task_parameters"]
    assert owned == {n: depth * 2 * width + width + 33 * k for n, k in (("a", 4), ("b", 2), ("c", 3))}
    assert sum(p.numel() for p in applied.parameters()) == owned["c"]
    applied.save(tmp_path)
    again = tightfit.load(copy.deepcopy(stock), tmp_path)
    assert again.recipe == applied.recipe
    with torch.no_grad():
        for name, value in again.part(Memories).logits(batch["pixel_values"]).items():
            assert torch.equal(value, seen[name])
    applied.remove()
    assert torch.equal(logits(model, {"pixel_values": batch["pixel_values"]}), seen["old"])


def test_tasks_of_separate_runs_meet_on_one_model(tmp_path):
    base = vit()
    batch = images()
    wanted = {}
    for seed, name in enumerate(("a", "b")):
        model = copy.deepcopy(base)
        applied = tightfit.apply(model, LearnableMemory(task=name, tokens=seed + 1, seed=seed))
        train(model, applied.optimizer(lr=1e-2), batch, 2)
        wanted[name] = logits(model, batch)
        applied.save(tmp_path / name)
    applied = tightfit.apply(base, LearnableMemory(task="c", earlier=(("b", 3, 2),)))
    memories = applied.part(Memories)
    with pytest.raises(tightfit.StateError, match=r"earlier tasks b have no values yet"):
        base(**batch)
    memories.read(tmp_path / "b")
    memories.read(tmp_path / "a", "a")
    assert memories.names == ["b", "a", "c"]
    found = memories.logits(batch["pixel_values"])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **EXACT)
    assert {n.rsplit("_", 1)[-1] for n, p in base.named_parameters() if p.requires_grad and "task_" in n} >= {"c"}
    assert all("task_c" in n for n, p in base.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="is here already"):
        memories.read(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no task z; it has a"):
        memories.read(tmp_path / "a", "z")


def test_what_read_refuses(tmp_path):
    base = vit()
    with tightfit.apply(copy.deepcopy(base), LearnableMemory(task="a")) as applied:
        applied.save(tmp_path / "a")
    with tightfit.apply(copy.deepcopy(base), LearnableMemory(task="x", visibility="extension")) as applied:
        applied.save(tmp_path / "x")
        applied.part(Memories).next("y", num_labels=2)
        applied.save(tmp_path / "xy")
    with tightfit.apply(copy.deepcopy(base), Lora()) as applied:
        applied.save(tmp_path / "lora")

    def of(model=base, **fields):
        model = copy.deepcopy(model)
        return model, tightfit.apply(model, LearnableMemory(**{"task": "c", **fields})).part(Memories)

    with pytest.raises(tightfit.ArtifactError, match="holds no isolated tasks"):
        model, memories = of()
        memories.read(tmp_path / "lora")
    with pytest.raises(tightfit.ArtifactError, match=r"no recipe\.json"):
        memories.read(tmp_path / "nothing")
    recipe = tmp_path / "x" / "recipe.json"
    whole = recipe.read_text()
    recipe.write_text(whole.replace('"extension"', '"extension", "tokens": 4'))
    model, memories = of(visibility="extension")
    with pytest.raises(tightfit.ArtifactError, match=r"task_x is \(5, 32\), expected \(4, 32\); the file is damaged"):
        memories.read(tmp_path / "x")
    assert memories.names == ["c"]
    recipe.write_text(whole)
    other = vit()
    with torch.no_grad():
        body(other).layers[0].mlp.fc1.weight.add_(1)
    model, memories = of(other)
    with pytest.raises(tightfit.ArtifactError, match=r"another model; .*fc1.weight differs"):
        memories.read(tmp_path / "a")
    model, memories = of(memory_norm=False)
    with pytest.raises(ValueError, match="trained with memory_norm=True, here it is False"):
        memories.read(tmp_path / "a")
    model, memories = of(earlier=(("a", 7, 5),))
    with pytest.raises(ValueError, match="has 3 labels and 5 memory tokens, this recipe says 7 and 5"):
        memories.read(tmp_path / "a")
    # extension: what a task saw, it must see here
    model, memories = of(visibility="extension")
    with pytest.raises(ValueError, match="trained with visibility='concatenation', here it is 'extension'"):
        memories.read(tmp_path / "a")
    with pytest.raises(ValueError, match=r"its task 'y' sees x .* and would see none here; the order"):
        memories.read(tmp_path / "xy", "y")
    memories.read(tmp_path / "xy", "x", "y")
    assert memories.names == ["x", "y", "c"]
    model, memories = of(visibility="extension")
    model(**images()).loss.backward()
    with pytest.raises(ValueError, match="'c' was trained already"):
        memories.read(tmp_path / "x")


# -- shared -----------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("normed", [True, False])
def test_shared_memory_is_seen_by_all_tokens(build, normed):
    model = build()
    applied = tightfit.apply(model, LearnableMemory(mode="shared", tokens=4, memory_norm=normed))
    shaken(model)
    batch = images()
    wanted, _ = joint(model, batch["pixel_values"], normed=normed, shared="task")
    own = list(applied.parameters())
    loss = torch.nn.functional.cross_entropy(wanted, batch["labels"])
    grads = torch.autograd.grad(loss, own)
    out = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(out.logits, wanted, **EXACT)
    assert {h.shape[1] for h in out.hidden_states} == {body(model).embeddings.position_embeddings.shape[1]}
    out.loss.backward()
    for parameter, grad in zip(own, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, **EXACT)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {"classifier.weight", "classifier.bias"}
    cls = {n for n, _ in model.named_parameters() if n.endswith("cls_token")}
    assert trained == head | cls | {n for n, _ in model.named_parameters() if "tight_memory" in n}


def test_shared_without_memory_is_the_stock_model(tmp_path):
    model, stock = vit(), vit()
    before = snapshot(model)
    applied = tightfit.apply(model, LearnableMemory(mode="shared", tokens=0))
    batch = images()
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "vit.embeddings.cls_token",
        "classifier.weight",
        "classifier.bias",
    }
    train(model, applied.optimizer(lr=1e-2), batch, 2)
    applied.export(tmp_path / "stock")
    again = type(stock).from_pretrained(tmp_path / "stock").double()
    assert torch.equal(logits(again, batch), logits(model, batch))
    applied.remove()
    assert snapshot(model)["flags"] == before["flags"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["isolated", "shared"])
def test_memory_never_asks(implementation, mode):
    model = vit()
    model.set_attn_implementation(implementation)
    applied = tightfit.apply(model, LearnableMemory(mode=mode, tokens=2))
    shaken(model)
    options = {"output_attentions": True} if implementation == "eager" else {}
    with torch.no_grad():
        out = model(**images(), **options)
        if mode == "shared":
            wanted, _ = joint(model, images()["pixel_values"], shared="task")
        else:
            _, (wanted,) = joint(model, images()["pixel_values"], ["task"])
    # the stock eager attention forms its shares in float32
    torch.testing.assert_close(out.logits, wanted, rtol=0, atol=1e-12 if implementation == "sdpa" else 1e-7)
    if implementation == "eager":
        keys = 7 if mode == "shared" else 5
        assert {tuple(a.shape) for a in out.attentions} == {(3, 2, 5, keys)}
    applied.remove()
    assert model.config._attn_implementation == implementation


# -- with everything else ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["isolated", "shared"])
@pytest.mark.parametrize("beside", [None, Checkpointing(), FusedOps()], ids=str)
def test_gradients_stay_beside_other_methods(mode, beside):
    if mode == "isolated" and isinstance(beside, FusedOps):
        beside = FusedOps(loss=False)
    model, plain = vit().float(), vit().float()
    recipe = LearnableMemory(mode=mode, tokens=2)
    tightfit.apply(plain, recipe)
    tightfit.apply(model, tightfit.chain(recipe, *([beside] if beside else [])))
    shaken(model)
    shaken(plain)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in images().items()}
    found, wanted = gradients(model, batch), gradients(plain, batch)
    torch.testing.assert_close(found[0], wanted[0])
    assert set(found[1]) == set(wanted[1])
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def test_isolated_refuses_what_would_change_the_model():
    model = vit()
    before = snapshot(model)
    with pytest.raises(tightfit.ConflictError, match="LearnableMemory and Lora both take over"):
        tightfit.apply(model, [LearnableMemory(), Lora()])
    with pytest.raises(tightfit.ConflictError, match=r"LearnableMemory and TokenTune both take over \(attention\)"):
        tightfit.apply(model, [LearnableMemory(mode="shared"), tightfit.TokenTune(ratio=0.5)])
    assert_same(before, snapshot(model))
    tightfit.apply(model, LearnableMemory())
    body(model).layernorm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"vit.layernorm.weight must not train"):
        model(**images())


def test_shared_memory_beside_lora():
    model = vit()
    applied = tightfit.apply(model, [LearnableMemory(mode="shared"), Lora(rank=2)])
    losses = train(model, applied.optimizer(lr=1e-2), images(), 6)
    assert losses[-1] < losses[0]


def test_dropout_is_off_in_the_frozen_rows():
    model = vit(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    stock = copy.deepcopy(model).eval()
    tightfit.apply(model, LearnableMemory())
    batch = images()
    assert torch.equal(model(**batch).old_logits, stock(batch["pixel_values"]).logits)
    assert model.training
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("size", [(24, 24), (8, 8)])
def test_another_resolution_needs_interpolated_positions(size):
    model = vit()
    stock = copy.deepcopy(model)
    _, memories = three_tasks(model)
    pixels = torch.randn(2, 3, *size, dtype=torch.double)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(pixels)
    with torch.no_grad():
        out = model(pixels, interpolate_pos_encoding=True)
        assert torch.equal(out.old_logits, stock(pixels, interpolate_pos_encoding=True).logits)
        together = memories.logits(pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(out.logits, together["c"], **EXACT)


def test_a_tuple_where_no_fields_are_wanted():
    model = vit()
    tightfit.apply(model, LearnableMemory(num_labels=7))
    loss, found = model(**images(), return_dict=False)[:2]
    out = model(**images())
    assert torch.equal(loss, out.loss)
    assert torch.equal(found, out.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = vit().to(dtype)
    applied = tightfit.apply(model, LearnableMemory())
    assert {p.dtype for p in applied.parameters()} == {torch.float32}
    batch = images()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    losses = train(model, applied.optimizer(lr=1e-2), batch, 6)
    assert losses[-1] < losses[0]
    model = vit().float()
    applied = tightfit.apply(model, LearnableMemory(visibility="extension"))
    applied.part(Memories).next("b", num_labels=3)
    batch["pixel_values"] = batch["pixel_values"].float()
    wanted, found = gradients(model, batch), gradients(model, batch, autocast=True)
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0.1, atol=2e-2)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokens": 0}, ValueError, r"tokens=...\): got 0, accepted is an int >= 1"),
        ({"tokens": -1, "mode": "shared"}, ValueError, "got -1, accepted is an int >= 0"),
        ({"tokens": True}, TypeError, "got True"),
        ({"tokens": 2.0}, TypeError, "got 2.0"),
        ({"mode": "isolate"}, ValueError, "did you mean 'isolated'"),
        ({"num_labels": 0}, ValueError, "num_labels"),
        ({"task": "old"}, ValueError, "the model's own task"),
        ({"task": "a.b"}, ValueError, "letters, digits"),
        ({"task": 3}, TypeError, "a task's name"),
        ({"visibility": "all"}, ValueError, "visibility"),
        ({"memory_norm": 1}, TypeError, "memory_norm"),
        ({"seed": -1}, ValueError, "seed"),
        ({"earlier": "ab"}, TypeError, "a tuple of"),
        ({"earlier": (("a", 2),)}, TypeError, "a tuple of"),
        ({"earlier": (("a", 2, 0),)}, ValueError, "at least 1"),
        ({"earlier": (("a", True, 1),)}, TypeError, "a tuple of"),
        ({"earlier": (("a", 2, 1), ("a", 2, 1))}, ValueError, "appears twice"),
        ({"earlier": (("task", 2, 1),)}, ValueError, "appears twice"),
        ({"mode": "shared", "num_labels": 3}, ValueError, "own class token and head"),
        ({"mode": "shared", "visibility": "extension"}, ValueError, "own class token and head"),
    ],
)
def test_fields_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        LearnableMemory(**fields)


def test_models_and_tasks_are_checked():
    with pytest.raises(ValueError, match="BertForSequenceClassification is no image classifier with a class token"):
        tightfit.apply(models.bert(), LearnableMemory())
    with pytest.raises(tightfit.UnsupportedModelError, match="LlamaForCausalLM is no image classifier"):
        tightfit.apply(models.llama(), LearnableMemory(mode="shared"))
    model = vit()
    memories = tightfit.apply(model, LearnableMemory(task="a")).part(Memories)
    with pytest.raises(ValueError, match=r"no task 'b'; known are 'a', 'old'"):
        memories.use("b")
    with pytest.raises(ValueError, match="there is such a task already"):
        memories.next("a", num_labels=2)
    with pytest.raises(ValueError, match="the only task"):
        memories.delete("a")
    with pytest.raises(ValueError, match="got 0, accepted is an int >= 1"):
        memories.next("b", num_labels=0)
    with pytest.raises(TypeError, match="tokens"):
        memories.next("b", num_labels=2, tokens=1.5)
    assert memories.names == ["a"]
    memories.next("b", num_labels=3)
    memories.use("a")
    with pytest.raises(tightfit.StateError, match=r"'a' is served, and 'b' is what trains"):
        model(**images())


def test_a_model_that_classifies_otherwise_is_refused():
    model = vit()
    layers = body(model).layers
    layers[1].register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    before = snapshot(model)
    with pytest.raises(tightfit.UnsupportedModelError, match="its logits are off by"):
        tightfit.apply(model, LearnableMemory())
    assert_same(before, snapshot(model))


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [LearnableMemory(), LearnableMemory(mode="shared")], ids=str)
def test_the_plan_is_the_step_to_the_byte(recipe):
    model = vit(layers=4).float()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in images(8).items()}
    assert_planned_as_real(model, tightfit.apply(model, recipe), batch)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LearnableMemory(), LearnableMemory(mode="shared")], ids=str)
def test_a_deep_model_is_planned_from_short_ones(recipe):
    model = vit(layers=14).float()
    tightfit.apply(model, recipe)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in images(4).items()}
    whole, short = (simulate(model, batch, optimizer="sgd", extrapolate=how) for how in (False, True))
    assert (whole.peak_bytes, whole.saved_bytes) == (short.peak_bytes, short.saved_bytes)


def test_kept_are_keys_and_values_and_one_row():
    def kept(layers, tokens):
        model = vit(layers=layers).float()
        tightfit.apply(model, LearnableMemory(tokens=tokens))
        batch = {k: v.float() if v.is_floating_point() else v for k, v in images(16).items()}
        return saved_bytes(lambda: model(**batch).loss)

    def stock(layers):
        model = vit(layers=layers).float()
        batch = {k: v.float() if v.is_floating_point() else v for k, v in images(16).items()}
        return saved_bytes(lambda: model(**batch).loss)

    one = kept(3, 2) - kept(2, 2)
    both = 2 * 16 * (5 + 1 + 2) * 32 * 4  # keys and values of the tokens, the class token and the memory
    assert one < both + 12 * 16 * 32 * 4 + 16 * 4 * 64 * 4  # and the inside of one row
    assert one < 0.5 * (stock(3) - stock(2))
    assert kept(3, 4) - kept(3, 2) == pytest.approx(3 * 2 * 16 * 2 * 32 * 4, rel=0.1)
