"""Output layers over a reduced vocabulary: split is exact, pruned is biased low by what it reports, full is stock."""

import copy
import math

import models
import pytest
import torch
import torch.nn.functional as F
from partial_embedding_cases import LANGUAGE_MODELS, dropped, own_loss, pair, rows, same_parameters, table, train
from torch._subclasses.fake_tensor import FakeTensorMode

import tightfit
from tightfit import Lora, PartialEmbedding, UnknownTokenError
from tightfit.methods.partial_embedding.tables import find_tables

HEADS = ("full", "split", "pruned")
MASS = "PartialEmbedding.head='pruned'"
pytestmark = pytest.mark.filterwarnings(f"ignore:{MASS}:UserWarning")


def logits_of(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@pytest.mark.parametrize("head", HEADS)
def test_logits_of_kept_ids_are_the_stock_ones(family, head):
    stock, applied = pair(family, head=head)
    vocabulary, batch = PartialEmbedding.of(applied), models.batch(stock)
    with torch.no_grad():
        expected, found = (logits_of(m.eval(), batch) for m in (stock, applied.model))
    assert found.shape == expected.shape
    torch.testing.assert_close(found[..., vocabulary.ids], expected[..., vocabulary.ids], rtol=1e-5, atol=1e-6)
    away = found[..., vocabulary.dropped]
    if head == "pruned":
        assert (away == -math.inf).all()
    else:
        torch.testing.assert_close(away, expected[..., vocabulary.dropped], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["full", "split"])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_exact_losses_and_their_gradients(family, head):
    """Split equals a full head whose dropped rows stay: kept rows and all else have the stock gradient."""
    stock, applied = pair(family, dropout=0.0, head=head)
    batch = models.batch(stock)
    expected, found = (own_loss(m, batch) for m in (stock, applied.model))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    expected.backward(), found.backward()
    for (name, p), q in zip(stock.named_parameters(), applied.model.parameters(), strict=True):
        full = p.grad if p.shape == q.shape else rows(p.grad, applied)
        torch.testing.assert_close(q.grad, full, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_pruned_loss_is_low_by_the_dropped_mass(family):
    stock, applied = pair(family, dropout=0.0, head="pruned")
    stock.double(), applied.model.double()
    batch = models.batch(stock)
    with pytest.warns(UserWarning, match=r"puts \d\d\.\d% of its probability on dropped tokens.*head='split'"):
        loss = own_loss(applied.model, batch)
    full = own_loss(stock, batch)
    shifted = "CausalLM" in type(stock).__name__ or "LMHead" in type(stock).__name__
    logits, labels = logits_of(stock, batch), batch["labels"]
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    mass = logits.softmax(-1)[..., PartialEmbedding.of(applied).dropped].sum(-1)[labels != -100]
    assert loss <= full
    torch.testing.assert_close((full - loss).double(), -(1 - mass).log().mean(), rtol=1e-5, atol=0)
    reported = applied.report()["methods"]["PartialEmbedding"]["dropped_probability"]
    everywhere = logits_of(stock, batch).softmax(-1)[..., PartialEmbedding.of(applied).dropped].sum(-1).detach()
    assert float(everywhere.min()) <= reported <= float(everywhere.max())


def test_the_warning_of_dropped_mass_comes_once():
    vocabulary = PartialEmbedding.of(pair("llama", head="pruned")[1])
    with pytest.warns(UserWarning, match=MASS) as caught:
        for mass in (0.001, 0.02, 0.001, 0.03):
            vocabulary.note_mass(mass)
    assert len(caught) == 1 and "2.0%" in str(caught[0].message)


def test_the_mode_follows_what_trains():
    def mode(family, *recipe):
        model = models.build(family)
        applied = tightfit.apply(model, [PartialEmbedding(ids=models.kept_ids(model)), *recipe])
        return PartialEmbedding.of(applied).head

    assert mode("bert") == "none"
    assert mode("llama") == mode("llama-tied") == "full"
    assert mode("llama", Lora(rank=2)) == mode("llama-tied", Lora(rank=2)) == "split"


def test_a_tied_trainable_table_with_a_full_head_stays_whole_and_says_so():
    model = models.build("gpt2")
    recipe = PartialEmbedding(ids=models.kept_ids(model))
    plan = tightfit.plan(model, recipe, batch=models.batch(model))
    assert "the tied table trains as a whole" in str(plan)
    with tightfit.apply(model, recipe) as applied:
        assert applied.report()["methods"]["PartialEmbedding"]["rows_kept"] == 120
        assert len(table(model)) == 120


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert-mlm"])
def test_split_trains_as_full_with_its_dropped_rows_frozen(family):
    stock, applied = pair(family, dropout=0.0, head="split")
    away = PartialEmbedding.of(applied).dropped
    for tensor in find_tables(stock).all:
        tensor.tensor.register_hook(lambda g: g.index_fill(0, away, 0.0))
    before = dropped(table(stock).detach().clone(), applied)
    batches = [models.batch(stock, seed=s) for s in range(4)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (stock, applied.model)]
    expected = train(stock, batches, optimizers[0], loss=own_loss)
    assert train(applied.model, batches, optimizers[1], loss=own_loss) == pytest.approx(expected, rel=1e-5)
    same_parameters(stock, applied, rtol=1e-4)
    assert torch.equal(dropped(table(stock), applied), before)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "t5", "bart"])
def test_generate_works_and_is_stock_up_to_dropped_tokens(family, head):
    stock, applied = pair(family, head=head)
    batch = {k: v for k, v in models.batch(stock).items() if k != "labels"}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    vocabulary = PartialEmbedding.of(applied)
    # dropped tokens may be predicted, not read; so let the stock model predict kept ones only
    settings["suppress_tokens"] = vocabulary.dropped.tolist()
    stock.generation_config.suppress_tokens = None
    expected, found = (m.eval().generate(**batch, **settings) for m in (stock, applied.model))
    assert torch.equal(expected, found)


def test_sampling_a_pruned_head_never_gives_a_dropped_token():
    stock, applied = pair("llama", head="pruned")
    out = applied.model.eval().generate(
        models.batch(stock)["input_ids"], max_new_tokens=20, do_sample=True, pad_token_id=0
    )
    assert set(out.flatten().tolist()) <= set(PartialEmbedding.of(applied).ids.tolist())


@pytest.mark.parametrize("head", ["split", "pruned"])
def test_labels_outside_the_kept_ids(head):
    stock, applied = pair("llama", dropout=0.0, head=head)
    batch = models.batch(stock)
    batch["labels"][0, 3] = 77
    batch["labels"][0, 4:] = -100
    if head == "pruned":
        with pytest.raises(UnknownTokenError, match=r"the labels \(head='pruned'\) has 1 token id\(s\).*: 77;"):
            applied.model(**batch)
        return
    with pytest.warns(UserWarning, match="some labels are outside the kept ids; their loss is exact"):
        found = own_loss(applied.model, batch)
    torch.testing.assert_close(found, own_loss(stock, batch), rtol=1e-6, atol=0)
    own_loss(applied.model, batch)  # warned once
    assert applied.report()["methods"]["PartialEmbedding"]["labels_outside"] == 2


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("label", [-7, 120])
def test_labels_outside_the_vocabulary(head, label):
    stock, applied = pair("llama", head=head)
    batch = models.batch(stock)
    batch["labels"][0, 3] = label
    with pytest.raises(IndexError, match=rf"{label} is .*(120 ids|0\.\.119)"):
        applied.model(**batch)


@pytest.mark.parametrize("head", HEADS)
def test_ignored_labels_are_always_allowed(head):
    stock, applied = pair("llama", dropout=0.0, head=head)
    batch = models.batch(stock) | {"labels": torch.full((3, 9), -100)}
    assert own_loss(applied.model, batch).isnan() == own_loss(stock, batch).isnan()


@pytest.mark.parametrize("head", ["full", "split"])
def test_label_smoothing_in_the_loss_is_exact(head):
    stock, applied = pair("llama", dropout=0.0, head=head)
    batch = models.batch(stock)
    losses = [
        F.cross_entropy(m(**batch).logits.view(-1, 120), batch["labels"].view(-1), label_smoothing=0.1)
        for m in (stock, applied.model)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "bart", "bert-mlm"])
def test_low_precision_heads_stay_close(family, head):
    stock, applied = pair(family, dropout=0.0, head=head)
    batch = models.batch(stock)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (own_loss(m, batch).detach() for m in (stock, applied.model))
    assert found.dtype == expected.dtype
    if head == "pruned":
        assert found < expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    stock.bfloat16(), applied.model.bfloat16()
    ids = PartialEmbedding.of(applied).ids
    with torch.no_grad():
        logits = [logits_of(m, batch)[..., ids] for m in (stock, applied.model)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-2, atol=1e-2)


SLOW = pytest.mark.slow
PAIRS = (("llama", "split"), ("llama-tied", "pruned"), ("gemma2", "pruned"), ("t5", "split"), ("bart", "full"))
COMPILED = [pytest.param(*each, marks=SLOW) for each in (("bert", "full"), *PAIRS)]


@pytest.mark.parametrize(("family", "head"), COMPILED)
def test_it_compiles(family, head):
    torch._dynamo.reset()
    stock, applied = pair(family, dropout=0.0, head=head)
    batch = models.batch(stock)
    expected = own_loss(copy.deepcopy(applied.model), batch)
    compiled = torch.compile(applied.model, backend="eager")
    found = own_loss(compiled, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    assert table(applied.model).grad is not None
    if len(table(applied.model)) < 120:
        for wrong, message in ((77, "outside the kept vocabulary"), (-2, r"must lie in \[0, 120\)")):
            batch["input_ids"][0, 2] = wrong
            with pytest.raises(RuntimeError, match=message):
                compiled(**batch)


@pytest.mark.parametrize(("family", "head"), [("bert", "full"), *PAIRS])
def test_a_step_runs_on_fake_tensors(family, head):
    stock, applied = pair(family, head=head)
    parameters = dict(applied.model.named_parameters())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(applied.model, {id(t): fake_of(mode, t) for t in all_tensors(applied.model)})
        batch = {k: mode.from_tensor(v) for k, v in models.batch(stock).items()}
        own_loss(fake, batch).backward()
        torch.optim.AdamW(fake.parameters()).step()
    assert all(p.grad is not None for p in fake.parameters())
    assert all(p.grad is None for p in parameters.values())


def all_tensors(model):
    return [*model.parameters(), *model.buffers()]


def fake_of(mode, tensor):
    twin = mode.from_tensor(tensor.detach())
    return torch.nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else twin


@pytest.mark.parametrize("head", ["full", "split"])
def test_an_adapter_on_the_head_takes_part_or_is_refused(head):
    plain, model = models.build("llama"), models.build("llama")
    adapters, batch = tightfit.Lora(where="lm_head"), models.batch(plain)
    part = tightfit.PartialEmbedding(ids=models.kept_ids(model), force=True, head=head)
    if head == "split":
        with pytest.raises(tightfit.UnsupportedModelError, match="lm_head carries an adapter"):
            tightfit.apply(model, tightfit.chain(adapters, part))
        return
    losses = []
    for each, recipe in ((plain, adapters), (model, tightfit.chain(adapters, part))):
        torch.manual_seed(0)
        optimizer = tightfit.apply(each, recipe).optimizer(torch.optim.SGD, lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[3:], losses[:3])
    assert losses[5] < losses[3]
