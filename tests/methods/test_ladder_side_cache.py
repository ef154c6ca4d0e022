"""The feature cache of LadderSide: the same losses, the backbone run once for an example, bounds, validity."""

import copy

import models
import pytest
import torch
import transformers as hf
from side_cases import drops_apart, four, shaken, side_nets

import tightfit
from tightfit import LadderSide

LARGE = 2**24


def runs_of(model, block):
    """Counts the examples that a block is run for."""
    counted = []
    model.get_submodule(f"{block}").register_forward_hook(lambda module, args, out: counted.append(len(args[0])))
    return counted


def epochs(model, applied, batches, count=3):
    """Losses of some epochs of training."""
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.1)
    losses = []
    for _ in range(count):
        for batch in batches:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def inner_runs(model, family):
    inside = {"bert": "bert.encoder.layer.0.attention", "llama": "model.layers.0.mlp"}
    return runs_of(model, inside[family])


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("projection", ["frozen_linear", "pool"])
def test_losses_are_the_same_and_later_epochs_skip_the_blocks(family, projection):
    fields = {"reduction": 4, "projection": projection, "keep_layers": (0, 2, 3)}
    plain, kept = four(family, dropout=0.0), four(family, dropout=0.0)
    applied = tightfit.apply(plain, LadderSide(**fields))
    applied_kept = tightfit.apply(kept, LadderSide(**fields, cache_bytes=LARGE))
    shaken(plain), shaken(kept)
    batches = [models.batch(plain, seed=seed) for seed in range(3)]
    counted = inner_runs(kept, family)
    assert epochs(kept, applied_kept, batches) == epochs(plain, applied, batches)
    assert counted == [3, 3, 3]
    facts = applied_kept.report()["methods"]["LadderSide"]
    assert facts["cached_examples"] == 9
    assert facts["cached_bytes"] <= LARGE


def test_examples_are_served_where_the_head_goes_past_the_backbone():
    model = drops_apart("opt")
    applied = tightfit.apply(model, LadderSide(reduction=2, cache_bytes=LARGE))
    shaken(model)
    batch = models.batch(model)
    first = model(**batch).loss
    assert applied.report()["methods"]["LadderSide"]["cached_examples"] == 3
    counted = runs_of(model, "model.decoder.layers.0.self_attn.q_proj")
    assert torch.equal(model(**batch).loss, first)
    assert counted == []


def test_the_same_tokens_in_other_columns_are_another_example():
    model = four("bert", dropout=0.0)
    tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    shaken(model)
    plain = copy.deepcopy(model)  # whose cache is empty
    ids, mask = torch.arange(5, 13)[None].repeat(2, 1), torch.ones(2, 8, dtype=torch.long)
    behind, before = (ids, mask.clone()), (ids.roll(3, 1), mask.clone())
    behind[1][:, 5:], before[1][:, :3] = 0, 0
    model(input_ids=behind[0], attention_mask=behind[1])
    found, wanted = (m(input_ids=before[0], attention_mask=before[1]).logits for m in (model, plain))
    assert torch.equal(found, wanted)


def test_examples_are_known_by_themselves_not_by_their_batch():
    model = four("bert", dropout=0.0)
    tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    shaken(model)
    one, two = models.batch(model, seed=1), models.batch(model, seed=2)
    plain = copy.deepcopy(model)  # its cache is empty
    counted = inner_runs(model, "bert")
    model(**one), model(**two)
    mixed = {key: torch.cat([one[key][1:], two[key][:2]]) for key in one}
    longer = {
        key: torch.nn.functional.pad(value, (0, 4)) if value.dim() == 2 else value for key, value in mixed.items()
    }
    for batch in (mixed, longer):
        torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    assert counted == [3, 3]
    changed = {**one, "token_type_ids": torch.ones_like(one["input_ids"])}
    torch.testing.assert_close(model(**changed).loss, plain(**changed).loss)
    assert counted == [3, 3, 3]


def test_padding_on_the_left_is_another_example():
    model = four("llama", dropout=0.0)
    tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    shaken(model)
    plain = copy.deepcopy(model)
    counted = inner_runs(model, "llama")
    right = models.batch(model)
    left = {key: value.flip(1) for key, value in right.items()}
    for batch in (right, left, right, left):
        torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    assert counted == [3, 3]


def test_images_are_kept_too():
    config = hf.ViTConfig(**models.SIZE, image_size=16, patch_size=8, num_labels=3)
    model = models._seeded(lambda: hf.ViTForImageClassification(config), 0.0)
    applied = tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    shaken(model)
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}
    first, second = (model(**batch).loss for _ in range(2))
    assert torch.equal(first, second)
    assert applied.report()["methods"]["LadderSide"]["cached_examples"] == 3


def test_the_limit_holds_and_what_fits_is_still_read():
    model = four("bert", dropout=0.0)
    row = (4 * 8 + 32) * 4
    applied = tightfit.apply(model, LadderSide(reduction=4, cache_bytes=25 * row))
    shaken(model)
    counted = inner_runs(model, "bert")
    one, two = models.batch(model, seed=1), models.batch(model, seed=2)
    model(**one)  # 9 + 8 + 7 tokens
    with pytest.warns(UserWarning, match=r"cache_bytes=6400\): full after 3 examples"):
        model(**two)
    for batch in (one, two, one, two):
        model(**batch)
    assert counted == [3, 3, 3, 3]
    assert applied.report()["methods"]["LadderSide"]["cached_bytes"] <= 25 * row


def test_other_weights_or_another_precision_start_anew():
    model = four("bert", dropout=0.0)
    tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    shaken(model)
    counted = inner_runs(model, "bert")
    batch = models.batch(model)
    before = model(**batch).loss
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(3)
    changed = model(**batch).loss
    assert not torch.equal(before, changed)
    assert torch.equal(model(**batch).loss, changed)
    assert len(counted) == 2
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
        model(**batch)
    assert len(counted) == 3


def _other_memory(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 3


@pytest.mark.parametrize(
    "change",
    [_other_memory, lambda model: model.to(torch.bfloat16), lambda model: model.model.rotary_emb.inv_freq.mul_(0.5)],
    ids=["memory", "dtype", "buffer"],
)
def test_other_memory_another_dtype_or_other_buffers_start_anew(change):
    losses = []
    for fields in ({}, {"cache_bytes": LARGE}):
        model = four("llama")
        tightfit.apply(model, LadderSide(reduction=4, **fields))
        shaken(model)
        batch = models.batch(model)
        before = model(**batch).loss
        change(model)
        losses.append(model(**batch).loss)
        assert not torch.equal(before, losses[-1])
    assert torch.equal(*losses)


def test_settings_of_the_call_and_masks_by_kind_are_not_mixed_up():
    model = models.build("gemma2")
    tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    shaken(model)
    plain = copy.deepcopy(model)
    ids = models.batch(model)["input_ids"]
    size = len(ids), 1, ids.shape[1], ids.shape[1]
    for masks in (torch.ones(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool).tril()):
        given = {"input_ids": ids, "attention_mask": {"full_attention": masks, "sliding_attention": masks}}
        assert torch.equal(model(**given).logits, plain.eval()(**given).logits)


def test_the_trainer_of_a_language_model_reads_what_was_kept(tmp_path):
    model = four("llama", dropout=0.0)
    applied = tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    counted = inner_runs(model, "llama")
    batch = models.batch(model, size=4)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    arguments = hf.TrainingArguments(
        tmp_path, num_train_epochs=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    hf.Trainer(model, arguments, train_dataset=rows).train()
    assert applied.report()["methods"]["LadderSide"]["cached_examples"] == 4
    assert counted == [2, 2]


def test_a_mixture_of_experts_that_gives_its_routing_runs():
    config = hf.MixtralConfig(**models.SIZE, num_key_value_heads=1, num_local_experts=2, vocab_size=models.VOCABULARY)
    model = hf.MixtralForCausalLM(config).train()
    tightfit.apply(model, LadderSide(reduction=2, cache_bytes=LARGE))
    batch = models.batch(model)
    first, second = (model(**batch, output_router_logits=True).aux_loss for _ in range(2))
    assert torch.equal(first, second)


def test_evaluation_and_recorded_states_run_the_backbone():
    model = four("bert", dropout=0.0)
    tightfit.apply(model, LadderSide(reduction=4, cache_bytes=LARGE))
    batch = models.batch(model)
    model(**batch)
    counted = inner_runs(model, "bert")
    states = model(**batch, output_hidden_states=True).hidden_states
    assert not torch.equal(states[0], states[1])
    model.eval()
    model(**batch)
    assert len(counted) == 2


def test_nothing_is_kept_while_planning():
    model = four("bert")
    recipe = LadderSide(reduction=4, cache_bytes=LARGE)
    plan = tightfit.plan(model, recipe, batch=models.batch(model), optimizer="sgd")
    bare = tightfit.plan(model, LadderSide(reduction=4), batch=models.batch(model), optimizer="sgd")
    assert plan.peak_bytes == bare.peak_bytes
    applied = tightfit.apply(model, recipe)
    assert applied.report()["methods"]["LadderSide"]["cached_examples"] == 0
    assert not side_nets(model)[0].up.weight.any()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"projection": "linear"}, r"projection='linear'\).*must stay the same"),
        ({"backbone_dropout": True}, r"backbone_dropout=True\).*must stay the same"),
        ({"cache_bytes": 0}, r"cache_bytes=.*an int >= 1"),
    ],
)
def test_fields_that_do_not_go_together(fields, match):
    with pytest.raises(ValueError, match=match):
        LadderSide(**{"cache_bytes": LARGE, **fields})


def test_models_whose_features_cannot_be_kept_are_refused():
    with pytest.raises(tightfit.UnsupportedModelError, match=r"has an encoder and a decoder"):
        tightfit.apply(four("t5"), LadderSide(cache_bytes=LARGE))
    config = hf.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=120)
    encoder = hf.T5EncoderModel(config).train()
    tightfit.apply(encoder, LadderSide(cache_bytes=LARGE))
    with pytest.raises(tightfit.UnsupportedModelError, match=r"a T5Block gives more than its states"):
        encoder(input_ids=torch.ones(2, 5, dtype=torch.long))
