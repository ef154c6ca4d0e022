"""Bad input is refused where it happens, with what was given, what is allowed and what to do."""

import copy
import functools

import models
import numpy as np
import pytest
import torch
from partial_embedding_cases import pair, table
from torch import nn
from transformers import (
    IBertConfig,
    IBertForSequenceClassification,
    MobileBertConfig,
    MobileBertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

import tightfit
from tightfit import DataError, PartialEmbedding, StateError, UnknownTokenError, UnsupportedModelError
from tightfit.core.tight import is_tight

FAMILIES = tuple(models.FAMILIES)


class Names:
    """As much of a tokenizer as error messages need."""

    all_special_ids, all_special_tokens = (0,), ("[PAD]",)
    backend_tokenizer = None

    def convert_ids_to_tokens(self, token_id):
        return f"word{token_id}"

    def get_vocab(self):
        return {f"word{i}": i for i in range(120)}


def untouched(model):
    return not any(is_tight(m) for m in model.modules()) and len(table(model)) == 120


# -- the value --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "got no ids, accepted is at least one"),
        ([1, 2, 2, 3, 3], "given more than once: 2, 3"),
        ([-1, 2], "got -1, accepted are ids from 0 on"),
        ([1, 2.5, "x"], r"not integers: 2\.5, 'x'"),
        ([True, 3], "not integers: True"),
        (torch.tensor([1.0, 2.0]), r"not integers: 1\.0, 2\.0"),
        (7, "got 7, accepted is an iterable of distinct ints"),
        ("12", "got '12', accepted is an iterable of distinct ints"),
    ],
)
def test_ids_that_are_none(ids, message):
    with pytest.raises(ValueError, match=rf"PartialEmbedding\(ids=\.\.\.\): {message}"):
        PartialEmbedding(ids=ids)


def test_ids_in_any_form_give_one_value():
    forms = [[3, 1, 2], {1, 2, 3}, np.array([2, 1, 3]), torch.tensor([1, 3, 2]), iter([1, 2, 3]), range(1, 4)]
    assert {PartialEmbedding(ids=ids) for ids in forms} == {PartialEmbedding(ids=(1, 2, 3))}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "half"}, r"head=.*'half'.*auto.*full.*split.*pruned"),
        ({"unknown": "skip"}, r"unknown=.*'skip'.*error.*grow.*fetch"),
        ({"decay_dropped": 1}, "decay_dropped=.*1"),
        ({"force": "yes"}, "force=.*'yes'"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PartialEmbedding(ids=[1], **fields)


def test_a_recipe_without_ids_says_how_to_get_them():
    model = models.build("bert")
    with pytest.raises(ValueError, match=r"ids are missing.*PartialEmbedding.scan\(data"):
        tightfit.apply(model, PartialEmbedding())
    assert untouched(model)


# -- ids and the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_outside_the_table_leave_the_model_alone(family):
    model = models.build(family)
    with pytest.raises(ValueError, match=r"120, 4000 outside the vocabulary of 120 ids"):
        tightfit.apply(model, PartialEmbedding(ids=[*models.kept_ids(model), 120, 4000]))
    assert untouched(model)


def test_ids_that_the_config_uses_are_asked_for():
    model = models.build("bart")
    with pytest.raises(
        ValueError, match=r"missing: 0 \(config.bos_token_id\), 1 \(config.pad_token_id\), 2 \(config.eos"
    ):
        tightfit.apply(model, PartialEmbedding(ids=range(3, 70)))
    assert untouched(model)
    with pytest.raises(ValueError, match=r"missing: 0 \(special token '\[PAD\]'\)"):
        tightfit.apply(models.bert(pad_token_id=None), PartialEmbedding(ids=[5], tokenizer=Names()))


def test_a_saving_too_small_is_refused_unless_forced():
    model = models.build("bert")
    recipe = {"ids": [i for i in range(120) if i != 50]}
    with pytest.raises(
        ValueError, match=r"keeping 119 ids saves 0\.\d\d % .* less than 2 %; leave it out, or set force=True"
    ):
        tightfit.apply(model, PartialEmbedding(**recipe))
    assert untouched(model)
    tightfit.apply(model, PartialEmbedding(**recipe, force=True))
    assert len(table(model)) == 119


# -- ids at run time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_id_is_named_and_never_another_row(family):
    _, applied = pair(family, tokenizer=Names())
    batch = models.batch(applied.model)
    batch["input_ids"][0, :3] = torch.tensor([77, 90, 77])
    with pytest.raises(UnknownTokenError) as caught:
        applied.model(**batch)
    message = str(caught.value)
    assert "77 'word77', 90 'word90'" in message and "2 token id(s) outside the kept 62 of 120" in message
    assert "PartialEmbedding.scan" in message and 'unknown="grow"' in message


def test_at_most_ten_unknown_ids_are_listed():
    _, applied = pair("bert")
    with pytest.raises(
        UnknownTokenError, match=r"25 token id\(s\).*: 70, 71, 72, 73, 74, 75, 76, 77, 78, 79 and 15 more;"
    ):
        applied.model(torch.arange(70, 95)[None])


@pytest.mark.parametrize("unknown", ["error", "grow", "fetch"])
@pytest.mark.parametrize("wrong", [-1, -120, 120, 5000])
def test_ids_outside_the_vocabulary_are_index_errors(unknown, wrong):
    _, applied = pair("bert", unknown=unknown)
    batch = models.batch(applied.model)
    batch["input_ids"][1, 1] = wrong
    with torch.no_grad(), pytest.raises(IndexError, match=rf"token id {wrong} is out of range: the vocabulary has 120"):
        applied.model.eval()(**batch)


def test_empty_and_int32_batches_are_fine():
    stock, applied = pair("bert")
    inner = applied.model.get_input_embeddings()
    assert inner(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 32)
    ids = torch.tensor([[50, 119]], dtype=torch.int32)
    assert torch.equal(inner(ids), stock.get_input_embeddings()(ids))


# -- models -----------------------------------------------------------------------------------------------------


def test_models_without_a_plain_token_table():
    vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedModelError, match="ViTForImageClassification"):
        tightfit.apply(vit, PartialEmbedding(ids=[1]))
    with pytest.raises(UnsupportedModelError, match="Linear has no token embedding"):
        tightfit.apply(nn.Linear(2, 2), PartialEmbedding(ids=[1]))


def test_an_embedding_with_a_lookup_of_its_own_is_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = IBertForSequenceClassification(IBertConfig(**sizes, vocab_size=90))
    with pytest.raises(UnsupportedModelError, match="word_embeddings is a QuantEmbedding"):
        tightfit.apply(model, PartialEmbedding(ids=range(30)))
    assert not any(is_tight(m) for m in model.modules())


def test_a_packed_table_is_refused_by_type():
    model = models.build("bert")
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(torch.zeros(120, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedModelError, match=r"word_embeddings.weight is a Parameter of dtype torch.int8.*unquantised"
    ):
        tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))


def test_a_head_of_another_size_is_refused():
    model = models.build("llama")
    model.lm_head = nn.Linear(32, 100)
    with pytest.raises(UnsupportedModelError, match="does not have one row for each of the 120 rows"):
        tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))


def test_a_head_that_is_more_than_its_rows_is_refused_in_part():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = MobileBertConfig(**sizes, vocab_size=90, embedding_size=16, intra_bottleneck_size=32, true_hidden_size=32)
    model = MobileBertForMaskedLM(config)
    for head in ("split", "pruned"):
        with pytest.raises(UnsupportedModelError, match=r"predictions\.dense beside .*use head='full'"):
            tightfit.apply(model, PartialEmbedding(ids=range(30), head=head, force=True))
    tightfit.apply(model, PartialEmbedding(ids=range(30), force=True))


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = models.bert()
    with pytest.raises(StateError, match=r"meta device.*load the weights before"):
        tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))


def test_wrapped_models_are_refused():
    model = models.build("bert")
    with pytest.raises(StateError, match="before wrapping"):
        tightfit.apply(nn.DataParallel(model), PartialEmbedding(ids=models.kept_ids(model)))
    model.get_input_embeddings().weight.ds_id = 0  # as ZeRO-3 marks its partitioned parameters
    with pytest.raises(StateError, match=r"word_embeddings.weight is flattened or partitioned.*before wrapping"):
        tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))


def test_applying_twice_and_removing_twice():
    _, applied = pair("bert")
    with pytest.raises(StateError, match="already carries the recipe PartialEmbedding"):
        tightfit.apply(applied.model, PartialEmbedding(ids=[1]))
    with pytest.raises(StateError, match="copy of, or holds, a model with a recipe applied"):
        tightfit.apply(copy.deepcopy(applied.model), PartialEmbedding(ids=[1]))
    applied.remove()
    with pytest.raises(StateError, match="taken off already"):
        applied.remove()
    tightfit.apply(applied.model, PartialEmbedding(ids=models.kept_ids(applied.model)))


def test_resizing_is_refused_while_reduced():
    _, applied = pair("gpt2")
    with pytest.raises(StateError, match=r"resize_token_embeddings.*resize before apply"):
        applied.model.resize_token_embeddings(130)
    applied.remove().resize_token_embeddings(130)
    assert len(table(applied.model)) == 130


@pytest.mark.parametrize("how", ["modules_to_save", "target_modules"])
def test_adapters_on_the_embedding_itself_are_refused(how):
    import peft

    _, applied = pair("bert")
    config = peft.LoraConfig(**{"target_modules": ["query"]} | {how: ["word_embeddings"]})
    model = peft.get_peft_model(applied.model, config)
    with pytest.raises(UnsupportedModelError, match="the token embedding 'word_embeddings' was wrapped"):
        model(**models.batch(applied.model))


def test_trained_tokens_of_the_embedding_are_refused():
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[20, 30])
    model = peft.get_peft_model(models.build("llama"), config)
    with pytest.raises(UnsupportedModelError, match=r"is a TrainableTokens.*leave the embedding out of these"):
        tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))


@pytest.mark.parametrize("adapted", [None, "before", "after"])
def test_a_fused_head_that_reads_the_rows_itself_is_refused(adapted):
    import peft

    stock = model = models.build("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if adapted == "before":
        model = peft.get_peft_model(stock, config)
    # beside adapters the head is frozen, and reduced by default
    head = "auto" if adapted == "before" else "split"
    tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(stock), head=head))
    if adapted == "after":
        model = peft.get_peft_model(stock, config)

    @functools.wraps(type(stock).forward)  # as TRL does it
    def forward(*args, fused_lm_head=False, **kwargs):
        raise AssertionError("must not be reached")

    stock.forward = forward
    with pytest.raises(StateError, match=r"head='split'.*holds 62 of 120 rows; use head='full'"):
        model(**models.batch(stock), fused_lm_head=True)


# -- scanning ---------------------------------------------------------------------------------------------------


def test_scanning_a_stream_needs_a_sample_budget():
    import datasets

    stream = datasets.Dataset.from_dict({"input_ids": [[4, 5], [5, 6]]}).to_iterable_dataset()
    model = models.build("bert")
    with pytest.raises(DataError, match="samples"):
        PartialEmbedding.scan(stream, model=model, progress=False)
    assert {4, 5, 6} <= set(PartialEmbedding.scan(stream, model=model, samples=2, progress=False).ids)


@pytest.mark.parametrize("keep", [[-1], [120, 7]])
def test_scanning_keeps_only_ids_that_exist(keep):
    with pytest.raises(ValueError, match=rf"scan\(keep=...\): {keep[0]} outside the vocabulary of 120"):
        PartialEmbedding.scan([[5, 6]], model=models.build("bert"), keep=keep, progress=False)


def test_scanning_rare_ids():
    model, rows = models.build("bert"), [[5, 6, 6], [6, 7]]
    assert PartialEmbedding.scan(rows, model=model, progress=False).ids == (0, 5, 6, 7)
    assert PartialEmbedding.scan(rows, model=model, min_count=2, keep=[90], progress=False).ids == (0, 6, 90)
    with pytest.raises(ValueError, match=r"min_count.*got 0, accepted is an int >= 1"):
        PartialEmbedding.scan(rows, model=model, min_count=0, progress=False)


def test_filling_keeps_the_other_fields():
    given = PartialEmbedding(head="pruned", unknown="grow", decay_dropped=True)
    filled = given.fill(data=[[5, 6]], model=models.build("bert"), progress=False)
    assert filled == PartialEmbedding(ids=(0, 5, 6), head="pruned", unknown="grow", decay_dropped=True)
    assert eval(repr(filled), {"PartialEmbedding": PartialEmbedding}) == filled
