"""Mistakes that earlier tools of this kind made, each of them once and for all."""

import copy

import datasets
import models
import pytest
import torch
import transformers as hf
from partial_embedding_cases import hidden_states, objective, own_loss, pair, rows, table, train
from test_vocabulary_tokenizer import USED, bert, gpt2, seen, xlm_roberta

import tightfit
from tightfit import PartialEmbedding
from tightfit.methods.partial_embedding.tokenizer import retokenisation_report, trim_tokenizer


def total(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "gemma2", "bert-mlm", "t5", "bart"])
def test_a_tied_head_never_makes_the_model_larger(family, tmp_path):
    for head in ("full", "split", "pruned"):
        stock, applied = pair(family, head=head)
        assert total(applied.model) <= total(stock)
        assert applied.model.get_output_embeddings().weight is table(applied.model)
        applied.export(tmp_path / head)
        loaded = type(stock).from_pretrained(tmp_path / head)
        assert loaded.get_output_embeddings().weight is table(loaded)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_and_decoder_read_the_same_reduced_table(family):
    stock, applied = pair(family)
    inner = applied.model if family == "t5" else applied.model.model
    original = stock if family == "t5" else stock.model
    ids = torch.tensor([[9, 40, 102, 119]])
    for side in ("encoder", "decoder"):
        ours, theirs = getattr(inner, side).embed_tokens, getattr(original, side).embed_tokens
        assert len(ours.weight) == 62
        assert torch.equal(ours(ids), theirs(ids))


@pytest.mark.parametrize("head", ["full", "split"])
def test_a_decoder_may_have_a_table_of_its_own(head):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    parts = (hf.BertConfig(**sizes, vocab_size=90), hf.BertConfig(**sizes, vocab_size=90, is_decoder=True))
    parts[1].add_cross_attention = True
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=1, pad_token_id=0)
    stock = hf.EncoderDecoderModel(config=config).eval()
    reduced = copy.deepcopy(stock)
    tightfit.apply(reduced, PartialEmbedding(ids=[0, 1, *range(20, 60)], head=head))
    batch = {"input_ids": torch.tensor([[21, 40, 59]]), "labels": torch.tensor([[30, 57]])}
    torch.testing.assert_close(reduced(**batch).loss, stock(**batch).loss)


@pytest.mark.parametrize("pad", [119, 0, 40])
def test_padding_may_be_any_kept_id(pad):
    """Its number inside the table is another one; pooling of the last token goes by the original."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 120}
    stock = hf.GPT2ForSequenceClassification(
        hf.GPT2Config(**sizes, pad_token_id=pad, bos_token_id=119, eos_token_id=119, num_labels=3)
    ).eval()
    model = copy.deepcopy(stock)
    tightfit.apply(model, PartialEmbedding(ids=sorted({*models.kept_ids(stock), pad})))
    ids = torch.tensor([[10, 11, 12, pad, pad], [20, 21, 22, 23, 24], [30, pad, pad, pad, pad]])
    batch = {"input_ids": ids, "attention_mask": (ids != pad).long()}
    assert torch.equal(model(**batch).logits, stock(**batch).logits)


def test_roberta_positions_follow_the_original_pad():
    """Here pad 7 stands in row 1, and id 1, whose number the row takes, is an ordinary word."""
    torch.manual_seed(0)
    config = hf.RobertaConfig(
        **models.SIZE, vocab_size=120, pad_token_id=7, bos_token_id=8, eos_token_id=9, max_position_embeddings=66
    )
    stock = hf.RobertaModel(config).eval()
    model = copy.deepcopy(stock)
    applied = tightfit.apply(model, PartialEmbedding(ids=[1, 7, 8, 9, *range(50, 70)]))
    assert model.embeddings.word_embeddings.padding_idx == PartialEmbedding.of(applied).ids.tolist().index(7) == 1
    for ids in ([[8, 1, 50, 1, 9, 7, 7]], [[7, 7, 8, 1, 50, 1, 9]]):
        batch = {"input_ids": torch.tensor(ids)}
        batch["attention_mask"] = (batch["input_ids"] != 7).long()
        assert torch.equal(model(**batch).last_hidden_state, stock(**batch).last_hidden_state)


def test_the_padding_row_keeps_getting_no_gradient():
    stock, applied = pair("bert")
    batch = models.batch(stock)
    assert (batch["input_ids"] == 0).any()
    for model in (stock, applied.model):
        objective(model.train(False), batch).backward()
    assert not table(applied.model).grad[0].any()
    assert torch.equal(table(applied.model).grad, rows(table(stock).grad, applied))
    applied.remove()
    assert applied.model.get_input_embeddings().padding_idx == 0


def test_padding_that_is_not_kept_leaves_no_padding_row():
    embedding = torch.nn.Embedding(120, 8, padding_idx=100)
    model = models.build("bert")
    model.bert.embeddings.word_embeddings = torch.nn.Embedding(120, 32, padding_idx=100)
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))
    assert model.get_input_embeddings().padding_idx is None
    PartialEmbedding.of(applied).grow([100])
    assert model.get_input_embeddings().padding_idx == PartialEmbedding.of(applied).ids.tolist().index(100)
    applied.remove()
    assert model.get_input_embeddings().padding_idx == 100 == embedding.padding_idx


def test_ragged_rows_and_every_column_of_ids_are_scanned():
    model = models.build("t5")
    data = [{"input_ids": [50, 51], "labels": [60, -100]}, {"input_ids": [52], "labels": [61]}]
    assert {50, 51, 52, 60, 61} <= set(PartialEmbedding.scan(data, model=model, progress=False).ids)


def test_the_data_keeps_its_format():
    data = datasets.Dataset.from_dict({"input_ids": [[50, 51], [52, 53]], "text": ["a", "b"]})
    data.set_format("torch", columns=["input_ids"])
    before, fingerprint = dict(data.format), data._fingerprint
    PartialEmbedding.scan(data, model=models.build("bert"), progress=False)
    assert dict(data.format) == before and data._fingerprint == fingerprint


def test_an_untied_head_is_not_overwritten_by_the_input_table(tmp_path):
    """mT5: the config says tied, the checkpoint is not."""
    stock = models.build("t5", dropout=0.0)
    stock.lm_head.weight = torch.nn.Parameter(torch.randn_like(stock.lm_head.weight))
    model = copy.deepcopy(stock)
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(stock), head="split"))
    assert model.lm_head.weight is not model.shared.weight
    assert total(stock) - total(model) == 2 * 58 * 32
    batch = models.batch(stock)
    torch.testing.assert_close(own_loss(model, batch), own_loss(stock, batch), rtol=1e-6, atol=0)
    applied.export(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path)
    assert all(torch.equal(stock.state_dict()[k], v) for k, v in loaded.state_dict().items())


def test_constants_of_the_logits_stay():
    """BART's final_logits_bias has one entry per id of the full vocabulary."""
    stock, applied = pair("bart", dropout=0.0)
    assert stock.final_logits_bias.abs().sum() > 0
    assert applied.model.final_logits_bias.shape == (1, 120)
    batch = models.batch(stock)
    torch.testing.assert_close(own_loss(applied.model, batch), own_loss(stock, batch), rtol=1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(applied.model(**batch).logits + 0, stock(**batch).logits, rtol=1e-5, atol=1e-5)


def test_the_optimizer_swaps_the_table_wherever_it_stands():
    """In a second group, behind others, with other settings; nothing else moves."""
    stock, model = models.build("bert", dropout=0.0), models.build("bert", dropout=0.0)
    optimizers = []
    for m in (stock, model):
        rest = [p for p in m.parameters() if p is not table(m)]
        groups = [{"params": rest[:7]}, {"params": [*rest[7:12], table(m), *rest[12:]], "lr": 1e-2}]
        optimizers.append(torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0))
    batches = [models.batch(stock, seed=s) for s in range(3)]
    for m, optimizer in zip((stock, model), optimizers):
        train(m, batches, optimizer)
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))
    before = [[id(p) for p in g["params"]] for g in optimizers[1].param_groups]
    applied.adopt(optimizers[1])
    after = [[id(p) for p in g["params"]] for g in optimizers[1].param_groups]
    assert after[0] == before[0]
    assert [a != b for a, b in zip(after[1], before[1])] == [i == 5 for i in range(len(after[1]))]
    assert optimizers[1].param_groups[1]["params"][5] is table(model)
    assert train(model, batches, optimizers[1]) == train(stock, batches, optimizers[0])


def test_a_checkpoint_of_another_size_is_an_error_not_random_weights():
    _, applied = pair("bert")
    other = hf.BertForSequenceClassification(hf.BertConfig(**models.SIZE, vocab_size=90, max_position_embeddings=64))
    with pytest.raises(tightfit.ArtifactError, match="90 rows was given, the stock table has 120"):
        applied.model.load_state_dict(other.state_dict())


def test_saved_dtypes_are_those_of_the_model(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stock = models.build("bert").to(dtype)
        model = copy.deepcopy(stock)
        applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))
        assert table(model).dtype == PartialEmbedding.of(applied).codecs[0].home.dtype == dtype
        assert {v.dtype for v in model.state_dict().values()} == {v.dtype for v in stock.state_dict().values()}


def test_scaled_and_renormalised_embeddings_keep_their_own_forward():
    """BART and Gemma scale in a subclass; max_norm belongs to the module."""
    for family in ("bart", "gemma2"):
        stock, applied = pair(family)
        ids = torch.tensor([[9, 50, 119]])
        for ours, theirs in zip(applied.model.modules(), stock.modules(), strict=True):
            if isinstance(theirs, torch.nn.Embedding) and theirs.num_embeddings == 120:
                assert type(theirs) in type(ours).__mro__
                assert torch.equal(ours(ids), theirs(ids))
    stock = models.build("bert")
    stock.get_input_embeddings().max_norm = 0.5
    model = copy.deepcopy(stock)
    tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(stock)))
    batch = models.batch(stock)
    with torch.no_grad():
        pairs = zip(hidden_states(stock.eval(), batch), hidden_states(model.eval(), batch))
        assert all(torch.equal(a, b) for a, b in pairs)


# -- permanent trimming -----------------------------------------------------------------------------------------


def test_trimming_keeps_bytes_and_merge_parents_or_says_so():
    tokenizer = gpt2()
    with pytest.raises(ValueError, match="merge parents of kept tokens"):
        trim_tokenizer(tokenizer, seen(tokenizer, USED))
    trimmed = trim_tokenizer(tokenizer, seen(tokenizer, USED), close=True)
    text = "\u2603 never seen: \x00\xff"
    assert trimmed.tokenizer.decode(trimmed.tokenizer(text)["input_ids"]) == text


def test_texts_that_are_read_in_another_way_are_counted():
    for make, keys in (
        (bert, ["texts_with_new_unknown"]),
        (xlm_roberta, ["texts_with_new_unknown", "texts_resegmented"]),
    ):
        tokenizer = make()
        trimmed = trim_tokenizer(tokenizer, seen(tokenizer, USED))
        report = retokenisation_report(tokenizer, trimmed, ["Counting tides and gulls until the morning", USED[0]])
        assert report["texts_changed"] == 1 == sum(report[key] for key in keys)
