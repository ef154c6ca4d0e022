"""RecurrentMemory: what it computes, against stock models run segment by segment."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from models import VOCABULARY
from recurrent_memory_cases import (
    CLASSIFIERS,
    DECODERS,
    TAGGERS,
    applied,
    assert_close,
    batch,
    build,
    cross_entropy,
    gradients,
    memory_of,
    slow_decoder,
    slow_encoder,
)

import tightfit
from tightfit import RecurrentMemory

SEGMENT = 5


def slow_loss(model, memory, given, *, both_ways=True, cuts=()):
    pairs = []
    for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"]):
        real = mask.bool()
        logits, _ = slow_decoder(model, memory, ids[real], SEGMENT, both_ways=both_ways, cuts=cuts)
        pairs.append((logits, F.pad(labels[real][1:], (0, 1), value=-100)))
    return cross_entropy(pairs)


def slow_gradients(stock, memory, given, **options):
    stock.zero_grad()
    memory = memory.detach().clone().requires_grad_()
    loss = slow_loss(stock, memory, given, **options)
    loss.backward()
    grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads, memory.grad


def compare(found, wanted, limit):
    loss, grads = found
    own = next(n for n in grads if n.endswith("memory_tokens.weight"))
    assert_close((loss, {**grads, own: grads[own]}), (wanted[0], {**wanted[1], own: wanted[2]}), limit)


QUICK = ("gpt2", "opt", "gemma3")
"""Families that the dearer tests see in a quick run."""

SOME = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in DECODERS]


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", SOME)
def test_ragged_batches_are_the_stock_model_segment_by_segment(family, attention, left):
    model = build(DECODERS[family])
    stock = copy.deepcopy(model)
    applied(model, tokens=3, segment=SEGMENT, attention=attention)
    given = batch(left=left)
    wanted = slow_gradients(stock, memory_of(model), given, both_ways=attention == "bidirectional")
    limit = 1e-12 if family in ("gpt2", "opt") else 1e-6  # the others' norms or rotations are float32
    compare(gradients(model, given), wanted, limit)


def test_eager_attention():
    model = build(DECODERS["gpt2"], eager=True)
    stock = copy.deepcopy(model)
    applied(model, tokens=3, segment=SEGMENT)
    given = batch()
    compare(gradients(model, given), slow_gradients(stock, memory_of(model), given), 1e-12)


@pytest.mark.parametrize(("bptt", "cuts"), [("none", (1, 2, 3)), ("block:0", (1, 2, 3)), ("block:1", (2,))])
def test_a_gradient_is_cut_at_its_boundaries(bptt, cuts):
    model = build(DECODERS["gpt2"])
    stock = copy.deepcopy(model)
    applied(model, tokens=2, segment=SEGMENT, bptt=bptt)
    given = batch()
    compare(gradients(model, given), slow_gradients(stock, memory_of(model), given, cuts=cuts), 1e-12)


@pytest.mark.parametrize("bptt", ["full", "block:1", "none"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_replay_is_stored_backpropagation(family, bptt):
    model = build(DECODERS[family])
    kept = copy.deepcopy(model)
    applied(model, tokens=2, segment=SEGMENT, bptt=bptt)
    applied(kept, tokens=2, segment=SEGMENT, bptt=bptt, replay=False)
    batches = [batch(seed=1), batch((9, 16), seed=2)]
    assert_close(gradients(model, *batches), gradients(kept, *batches))


def test_a_long_block_is_the_full_gradient():
    found = {}
    for bptt in ("full", "block:3", "block:7", "block:2"):
        model = build(DECODERS["gpt2"])
        applied(model, tokens=2, segment=SEGMENT, bptt=bptt)
        found[bptt] = gradients(model, batch())
    assert_close(found["block:3"], found["full"], 0.0)
    assert_close(found["block:7"], found["full"], 0.0)
    with pytest.raises(AssertionError):
        assert_close(found["block:2"], found["full"])


def test_without_bptt_the_memory_learns_from_the_first_segment_only():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=SEGMENT, bptt="none")
    given = batch((15,))
    loss, grads = gradients(model, given)
    rest = {**given, "labels": given["labels"].clone()}
    rest["labels"][:, SEGMENT + 1 :] = -100  # targets of the first segment
    first_loss, first = gradients(model, rest)
    name = next(n for n in grads if n.endswith("memory_tokens.weight"))
    assert loss != first_loss
    torch.testing.assert_close(grads[name] * 14, first[name] * SEGMENT, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("family", SOME)
def test_no_memory_and_one_segment_is_the_stock_model_bit_for_bit(family, mask):
    model = build(DECODERS[family])
    stock = copy.deepcopy(model)
    tightfit.apply(model, RecurrentMemory(tokens=0, segment=20))
    given = batch()
    if not mask:
        del given["attention_mask"]
    found, wanted = gradients(model, given), gradients(stock, given)
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][n], g) for n, g in wanted[1].items())
    assert torch.equal(model(**given).logits, stock(**given).logits)


def test_no_memory_reads_segments_alone():
    model = build(DECODERS["gpt2"])
    stock = copy.deepcopy(model)
    tightfit.apply(model, RecurrentMemory(tokens=0, segment=SEGMENT))
    ids = batch((15,))["input_ids"]
    alone = stock(input_ids=ids.view(3, SEGMENT)).logits.view(1, 15, -1)
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_past_alone_matters(attention):
    model = build(DECODERS["llama"])
    applied(model, tokens=2, segment=SEGMENT, attention=attention)
    ids = batch((15,))["input_ids"]
    other = ids.clone()
    other[0, 7] = (other[0, 7] + 1) % 100
    with torch.no_grad():
        a, b = (model.eval()(input_ids=x).logits for x in (ids, other))
    assert torch.equal(a[:, :7], b[:, :7])
    for later in (8, 10, 14):  # in its own segment, and through the memory in the next one
        assert not torch.equal(a[:, later], b[:, later])


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
def test_evaluation_gives_logits_for_every_token_and_the_training_loss(left):
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=SEGMENT)
    given = batch(left=left)
    out = model(**given)
    assert out.logits is None
    with torch.no_grad():
        found = model.eval()(**given)
    assert type(found) is type(out)
    torch.testing.assert_close(found.loss, out.loss.detach(), rtol=1e-12, atol=0)
    for row, mask in enumerate(given["attention_mask"].bool()):
        alone = model(input_ids=given["input_ids"][row : row + 1, mask]).logits
        torch.testing.assert_close(found.logits[row : row + 1, mask], alone, rtol=1e-12, atol=1e-12)
    as_tuple = model(**given, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], model(**given).logits)


def test_labels_that_are_shifted_already_stay():
    """The decoders of encoder-decoders, by themselves, compare each token with its own label."""
    sizes = {"decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
    model = build(lambda: hf.BartForCausalLM(hf.BartConfig(**sizes, d_model=24, vocab_size=VOCABULARY)))
    applied(model, tokens=2, segment=SEGMENT)
    given = batch()
    loss = model(**given).loss
    with torch.no_grad():
        logits = model.eval()(**given).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-12, atol=0)


def test_a_loss_on_logits_gets_the_same_gradients():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=SEGMENT)
    given = batch()
    wanted = gradients(model, given)
    model.zero_grad()
    targets = F.pad(given["labels"][:, 1:], (0, 1), value=-100)
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    assert_close((float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}), wanted)


def test_the_number_of_items_divides_the_loss():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=SEGMENT)
    given = batch()
    count = int((given["labels"][:, 1:] != -100).sum())
    alone = float(model(**given).loss.detach())
    for items in (40, torch.tensor(40)):
        shared = float(model(**given, num_items_in_batch=items).loss.detach())
        assert shared == pytest.approx(alone * count / 40, rel=1e-12)
    shifted = F.pad(given["labels"][:, 1:], (0, 1), value=-100)
    given["shift_labels"] = shifted
    del given["labels"]
    assert float(model(**given).loss.detach()) == pytest.approx(alone, rel=1e-12)


def test_no_target_at_all_is_a_loss_of_zero():
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=SEGMENT)
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    loss, grads = gradients(model, given)
    assert loss == 0
    assert all(not g.any() for g in grads.values())


def test_embeddings_instead_of_ids():
    model = build(DECODERS["llama"])
    applied(model, tokens=2, segment=SEGMENT)
    given = batch()
    wanted = model(**given).loss
    embeds = model.get_input_embeddings()(given.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **given).loss, wanted, rtol=1e-6, atol=0)


# -- encoders, classifiers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["right", "left"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers_see_their_last_segment(family, align):
    model = build(CLASSIFIERS[family])
    stock = copy.deepcopy(model)
    applied(model, tokens=3, segment=SEGMENT, align=align)
    given = batch((19, 12, 7, 4))
    labels = torch.tensor([0, 2, 1, 1])
    together = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels)
    together.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    rows = []
    model.zero_grad()
    for ids, mask, label in zip(given["input_ids"], given["attention_mask"], labels):
        alone = model(input_ids=ids[None, mask.bool()], labels=label[None])
        (alone.loss / 4).backward()
        rows.append(alone.logits)
    limit = {"llama": 1e-6}.get(family, 1e-12)
    torch.testing.assert_close(together.logits, torch.cat(rows), rtol=limit, atol=limit)
    assert_close((0, grads), (0, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), limit)
    if family not in ("bert", "roberta", "electra", "distilbert"):
        return
    memory = memory_of(model)
    for row, (ids, mask) in enumerate(zip(given["input_ids"], given["attention_mask"])):
        hidden = slow_encoder(stock, memory, ids[mask.bool()], SEGMENT, align)[-1][1]
        torch.testing.assert_close(together.logits[row], _head(stock, hidden)[0], rtol=limit, atol=limit)


def test_a_decoders_classifier_reads_its_last_token_also_without_a_padding_id():
    model = build(CLASSIFIERS["llama"])
    applied(model, tokens=3, segment=SEGMENT)
    ids = batch((SEGMENT * 2 + 2,))["input_ids"]
    wanted = model(input_ids=ids).logits
    found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    model.config.pad_token_id = None
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-12, atol=1e-12)


def _head(stock, hidden):
    if hasattr(stock, "pre_classifier"):
        return stock.classifier(torch.relu(stock.pre_classifier(hidden[:, 0])))
    pooler = getattr(stock.base_model, "pooler", None)
    return stock.classifier(pooler(hidden) if pooler is not None else hidden)


@pytest.mark.parametrize("align", ["right", "left"])
@pytest.mark.parametrize("family", TAGGERS)
def test_taggers_see_each_token_in_its_segment(family, align):
    model = build(TAGGERS[family])
    applied(model, tokens=3, segment=SEGMENT, align=align)
    given = batch((19, 12, 7, 4), tags=3)
    loss, grads = gradients(model, given)
    with torch.no_grad():
        together = model.eval()(**given)
    model.train()
    assert together.logits.shape[:2] == given["input_ids"].shape
    assert float(together.loss) == pytest.approx(loss, rel=1e-12)
    model.zero_grad()
    pairs = []
    for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"]):
        real = mask.bool()
        logits = model(input_ids=ids[None, real]).logits[0]
        pairs.append((logits, labels[real]))
    row_logits = torch.cat([p[0] for p in pairs])
    limit = {"llama": 1e-6}.get(family, 1e-12)
    torch.testing.assert_close(
        together.logits[given["attention_mask"].bool()], row_logits.detach(), rtol=limit, atol=limit
    )
    wanted = _once_per_token(model, given, align)
    wanted.backward()
    assert_close((loss, grads), (float(wanted.detach()), {n: p.grad for n, p in model.named_parameters()}), limit)


def _once_per_token(model, given, align):
    """The loss with every token counted once: the frame's tokens stand in several segments."""
    pairs = []
    for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"]):
        real = mask.bool()
        pairs.append((model(input_ids=ids[None, real]).logits[0], labels[real]))
    return cross_entropy(pairs)


def test_a_tagger_is_the_stock_model_segment_by_segment():
    model = build(TAGGERS["bert"])
    stock = copy.deepcopy(model)
    applied(model, tokens=3, segment=SEGMENT)
    ids = batch((17,))["input_ids"]
    logits = model(input_ids=ids).logits[0]
    parts = slow_encoder(stock, memory_of(model), ids[0], SEGMENT, "right")
    for columns, hidden in parts:
        torch.testing.assert_close(logits[columns], stock.classifier(hidden)[0, 1:-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits[0], stock.classifier(parts[0][1])[0, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits[-1], stock.classifier(parts[-1][1])[0, -1], rtol=1e-12, atol=1e-12)


def test_a_backbone_alone_gives_hidden_states_for_every_token():
    import transformers as hf

    model = build(lambda: hf.LlamaModel(hf.LlamaConfig(**_rope())))
    applied(model, tokens=2, segment=SEGMENT)
    given = batch()
    given.pop("labels")
    out = model(**given)
    assert out.last_hidden_state.shape == (3, 17, 24)
    out.last_hidden_state.square().sum().backward()
    assert memory_of(model).grad.abs().sum() > 0


def test_a_backbone_called_past_the_head_reads_segments_too():
    model = build(DECODERS["llama"])
    applied(model, tokens=2, segment=SEGMENT)
    given = batch()
    labels = given.pop("labels")
    hidden = model.model(**given).last_hidden_state  # as TRL does
    with torch.no_grad():
        wanted = model.eval()(**given, labels=labels).logits
    torch.testing.assert_close(model.lm_head(hidden), wanted, rtol=1e-6, atol=1e-6)


def _rope():
    from recurrent_memory_cases import ROPE

    return ROPE
