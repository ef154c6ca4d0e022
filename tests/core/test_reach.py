"""The largest batch and the longest sequence: they fit, and the next larger ones do not."""

import models
import pytest
from transformers import BertConfig, LlamaConfig, T5Config

import tightfit
from tightfit.core.errors import SimulationError
from tightfit.core.fitting import need
from tightfit.core.simulate import example_batch

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}


@pytest.fixture(scope="module")
def bert():
    config = BertConfig(**SIZES, vocab_size=1000, max_position_embeddings=128)
    return tightfit.skeleton(config, task="sequence-classification")


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(**SIZES, vocab_size=1000, max_position_embeddings=4096)
    return tightfit.skeleton(config, task="causal-lm")


def peak(model, recipe, batch):
    return need(tightfit.plan(model, recipe, batch=batch))


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        (tightfit.Checkpointing(), 8 << 20),
        pytest.param(None, 50 << 20, marks=pytest.mark.slow),
        pytest.param(tightfit.chain(tightfit.Lora(), tightfit.Checkpointing()), 50 << 20, marks=pytest.mark.slow),
    ],
)
def test_the_largest_batch(bert, recipe, budget):
    counts = []
    size = tightfit.largest_batch(bert, recipe, length=64, budget=budget, progress=counts.append)
    assert peak(bert, recipe, (size, 64)) <= budget < peak(bert, recipe, (size + 1, 64))
    assert counts == list(range(1, len(counts) + 1)) and len(counts) <= 12


@pytest.mark.parametrize(("rows", "budget"), [(1, 20 << 20), pytest.param(4, 50 << 20, marks=pytest.mark.slow)])
def test_the_longest_sequence(llama, rows, budget):
    counts = []
    length = tightfit.longest_sequence(llama, batch_size=rows, budget=budget, progress=counts.append)
    assert peak(llama, None, (rows, length)) <= budget < peak(llama, None, (rows, length + 1))
    assert len(counts) <= 12


def test_full_rows_may_be_longer_for_they_need_no_mask(llama):
    recipe, budget = tightfit.FusedOps(), 20 << 20
    padded = tightfit.longest_sequence(llama, recipe, batch_size=1, budget=budget)
    full = tightfit.longest_sequence(llama, recipe, batch_size=1, budget=budget, padded=False)
    assert full > padded
    batches = [example_batch(llama, 1, length, padded=False) for length in (full, full + 1)]
    assert peak(llama, recipe, batches[0]) <= budget < peak(llama, recipe, batches[1])
    assert tightfit.largest_batch(llama, recipe, length=64, budget=budget, padded=False) > 8
    with pytest.raises(tightfit.DataError, match="0"):
        tightfit.longest_sequence(llama, batch_size=0, budget=budget, padded=False)


def test_targets_have_a_length_of_their_own(bert):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    t5 = tightfit.skeleton(T5Config(**sizes, vocab_size=1000, decoder_start_token_id=0), task="seq2seq-lm")
    size = tightfit.largest_batch(t5, length=2, target_length=48, budget=2 << 20)
    fits, over = (peak(t5, None, example_batch(t5, n, 2, target_length=48)) for n in (size, size + 1))
    assert fits <= 2 << 20 < over
    with pytest.raises(SimulationError, match=r"target_length: got 4, .*takes no targets"):
        tightfit.longest_sequence(bert, batch_size=1, target_length=4, budget=2 << 20)


def test_positions_bound_the_length(bert, llama):
    assert tightfit.longest_sequence(bert, batch_size=1, budget="1GiB") == 128
    assert tightfit.longest_sequence(llama, batch_size=1, budget="20GiB", elsewhere=True) == 4096


def test_images_have_no_length():
    with pytest.raises(tightfit.UnsupportedModelError, match="ViTForImageClassification takes images"):
        tightfit.longest_sequence(models.vit(), batch_size=2, budget="1GiB")


def test_not_even_one_fits(bert):
    with pytest.raises(tightfit.BudgetError, match=r"one row of 64 tokens under Lora, whose peak is .* MiB"):
        tightfit.largest_batch(bert, tightfit.Lora(), length=64, budget="100KiB")
    with pytest.raises(tightfit.BudgetError, match="4 rows of one token under stock"):
        tightfit.longest_sequence(bert, batch_size=4, budget="100KiB")


def test_wrong_input(bert):
    twice = tightfit.chain(tightfit.Lora(), tightfit.Lora(rank=2))
    for call in (
        lambda recipe, budget, n: tightfit.largest_batch(bert, recipe, length=n, budget=budget),
        lambda recipe, budget, n: tightfit.longest_sequence(bert, recipe, batch_size=n, budget=budget),
    ):
        with pytest.raises(tightfit.ConflictError, match="twice"):
            call(twice, "1GiB", 8)
        with pytest.raises(tightfit.BudgetError, match="without a unit"):
            call(None, "24", 8)
        with pytest.raises(tightfit.DataError, match="0, accepted is an int >= 1"):
            call(None, "1GiB", 0)
    with pytest.raises(tightfit.DataError, match="128 positions"):
        tightfit.largest_batch(bert, length=129, budget="1GiB")


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("plan", {"batch": (2, 8)}),
        ("recommend", {"batch": (2, 8), "budget": "1GiB"}),
        ("largest_batch", {"length": 8, "budget": "1GiB"}),
        ("longest_sequence", {"batch_size": 2, "budget": "1GiB"}),
    ],
)
def test_an_option_that_there_is_not_is_named(bert, verb, given):
    with pytest.raises(
        TypeError, match=rf"^{verb}\(autocats=...\): no such option; accepted are .*did you mean 'autoc"
    ):
        getattr(tightfit, verb)(bert, **given, autocats=None)
