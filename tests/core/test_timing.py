"""The time model: what it prices how, on tables made up for the test and on simulated steps of many families."""

import dataclasses
import functools
import json
import time

import models
import pytest
import torch
from transformers import BertConfig, LlamaConfig

import tightfit
from tightfit.core import timing
from tightfit.core.calibrate import built_in
from tightfit.core.prices import KIND, along, price, product_seconds
from tightfit.core.simulate import example_batch, simulate

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
QUICK = ("gpt2", "gemma2", "t5", "vit")


@pytest.fixture(scope="module")
def known():
    return built_in()


@pytest.fixture(scope="module")
def tables(known):
    return known.tables("float32")


@functools.cache
def stepped(name="bert", recipe=None, batch=(4, 32), vocabulary=3000, tied=False, **options):
    """The simulated step of a small model."""
    if name == "bert":
        model = tightfit.skeleton(BertConfig(**SMALL, vocab_size=vocabulary), task="sequence-classification")
    else:
        config = LlamaConfig(**SMALL, vocab_size=vocabulary, tie_word_embeddings=tied)
        model = tightfit.skeleton(config, task="causal-lm")
    return tightfit.plan(model, recipe, batch=batch, **options).simulation


@pytest.fixture(scope="module")
def stock():
    return stepped()


# -- prices -----------------------------------------------------------------------------------------------------------


def test_every_kind_that_can_be_priced_is_in_the_tables(tables):
    others = {"scale_", "log_softmax", "log_softmax_backward", "mean", "sqrt_zero", "fused", "permuted", "transposed"}
    assert set(KIND.values()) | others <= set(tables["kinds"])


@pytest.mark.parametrize(
    "operator, inputs, outputs, kind",
    [
        ("aten.mul.Tensor", ((64, 64), (64, 64)), ((64, 64),), "add"),
        ("aten.mul.Tensor", ((64, 64), ()), ((64, 64),), "scale"),
        ("aten.mul_.Tensor", ((64, 64),), ((64, 64),), "scale_"),
        ("aten._log_softmax.default", ((8, 30_000),), ((8, 30_000),), "log_softmax"),
        ("aten._log_softmax.default", ((8, 4),), ((8, 4),), "softmax"),
        ("aten.sum.dim_IntList", ((512, 64),), ((1, 64),), "sum"),
        ("aten.mean.dim", ((512, 64),), ((512, 1),), "mean"),
        ("aten.sum.default", ((512, 64),), ((),), "mean"),
        ("aten._unsafe_view.default", ((512, 64),), ((8, 64, 64),), "nothing"),
        ("mine.codec.default", ((512, 64),), ((512, 64),), "unknown"),
    ],
)
def test_kinds(tables, operator, inputs, outputs, kind):
    found, seconds = price(operator, inputs, outputs, tables)
    assert found == kind
    assert (seconds == 0) == (kind == "nothing")


def test_a_product_is_priced_by_its_dimensions(tables):
    single = tables["products"]["single"]
    linear = price("aten.addmm.default", ((512,), (2048, 128), (128, 512)), ((2048, 512),), tables)
    assert linear == ("product", pytest.approx(single[2048, 512, 128]))
    batched = price("aten.bmm.default", ((6, 64, 16), (6, 16, 256)), ((6, 64, 256),), tables)[1]
    assert batched == pytest.approx(6 * tables["products"]["batched"][64, 256, 16])
    between = product_seconds(single, 256, 512, 512)
    assert single[128, 512, 512] < between < single[512, 512, 512]
    assert product_seconds(single, 4 * 2048, 512, 512) == pytest.approx(4 * single[2048, 512, 512])


def test_a_convolution_is_a_product_and_its_backward_two(tables):
    images, kernels, made = (2, 3, 64, 64), (96, 3, 8, 8), (2, 96, 8, 8)
    forward = price("aten.convolution.default", (images, kernels, (96,)), (made,), tables)[1]
    backward = price("aten.convolution_backward.default", (made, images, kernels), (images, kernels), tables)[1]
    assert forward == pytest.approx(product_seconds(tables["products"]["single"], 128, 96, 192))
    assert backward == pytest.approx(2 * forward)


def test_reading_another_layout_costs_extra(tables):
    shapes = ((64, 64, 64),), ((64, 64, 64),)
    plain, permuted, transposed = (
        price(f"aten.clone.default{layout}", *shapes, tables)[1] for layout in ("", "/permuted", "/transposed")
    )
    assert plain < permuted < transposed
    assert transposed == pytest.approx(along(tables["kinds"]["transposed"], 64**3))


def test_lists_of_tensors_are_worked_through_one_by_one(tables):
    shapes = ((512, 64), (64,)) * 2
    found = price("aten._foreach_add_.List", shapes, (), tables)[1]
    assert found == pytest.approx(sum(along(tables["kinds"]["add_"], n) for n in (512 * 64, 64)))


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_beside_itself(known, stock):
    assert timing.relative_step_time(stock, stock, known) == 1
    twice = timing.relative_step_time(stock, stock, known, repeat=2)
    assert 1 < twice < 2  # the optimizer steps once


def test_phases_and_kinds_add_up(known, stock):
    found = timing.step_time(stock, known)
    assert found.seconds == pytest.approx(sum(found.by_kind.values()))
    assert {"forward", "backward", "optimizer"} <= set(found.phases)
    assert all(seconds >= 0 for seconds in (*found.phases.values(), *found.by_kind.values()))


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in models.FAMILIES]
)
def test_every_operator_of_every_family_has_a_price(known, family):
    model = models.FAMILIES[family]()
    found = timing.step_time(simulate(model, example_batch(model, 2, 16)), known)
    assert not found.unpriced


def test_custom_operators_pay_for_their_way_through_python(known, stock):
    def seconds(operator):
        call = ("forward", operator, "float32", ((4, 4),), ((4, 4),))
        return timing.step_time(dataclasses.replace(stock, calls={call: 1000}), known).by_kind

    own, torchs = seconds("mine.codec.default")["unknown"], seconds("aten.clone.default")["copy"]
    assert own == pytest.approx(torchs + 1000 * (timing.THROUGH_PYTHON - 1) * known.dispatch["forward"])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_recomputation_is_counted(known, name):
    plain, again = (stepped(name, recipe, vocabulary=100) for recipe in (None, tightfit.Checkpointing()))
    arithmetic = dataclasses.replace(known, dispatch={"forward": 0.0})
    stock, found = timing.step_time(plain, arithmetic), timing.step_time(again, arithmetic)
    assert "recompute" not in stock.phases
    assert found.phases["recompute"] > 0.5 * stock.phases["forward"]
    # the blocks' forward products, a third of theirs, run once more
    assert 1.2 < found.by_kind["product"] / stock.by_kind["product"] < 1.4
    assert 1 < timing.relative_step_time(again, plain, known) < 1.8


def test_frozen_weights_have_no_gradient_and_no_optimizer(known, stock):
    found, full = timing.step_time(stepped(recipe=tightfit.Lora()), known), timing.step_time(stock, known)
    assert found.phases["optimizer"] < 0.5 * full.phases["optimizer"]


def test_a_first_steps_optimizer_state_is_no_part_of_a_step(known, stock):
    assert any(call[0] == "optimizer" and "zeros_like" in call[1] for call in stock.calls)
    without = {call: n for call, n in stock.calls.items() if "zeros_like" not in call[1] or call[0] != "optimizer"}
    warm = dataclasses.replace(stock, calls=without)
    assert timing.step_time(warm, known) == timing.step_time(stock, known)


@pytest.mark.parametrize("turns", [1, 2])
def test_micro_batches(turns):
    assert timing.micro_batches(stepped("llama", accumulate=turns)) == turns
    assert timing.micro_batches(stepped("llama", tightfit.Checkpointing(), accumulate=turns)) == turns


@pytest.mark.parametrize("turns, optimizer", [(1, "adamw"), (2, "adamw"), (1, "adamw-foreach")])
def test_rows_never_looked_up_have_zero_moments(turns, optimizer):
    found = timing.untouched(stepped("llama", accumulate=turns, optimizer=optimizer))
    share = (1 - 1 / 3000) ** (4 * 32)  # chance that 128 draws leave a row out
    assert found == {"torch.float32": pytest.approx(share * 3000 * 64, rel=1e-3)}


def test_a_table_that_is_also_the_head_has_none():
    assert timing.untouched(stepped("llama", tied=True)) == {}
    assert timing.untouched(stepped("llama", optimizer="sgd")) == {}
    assert timing.untouched(stepped("llama", tightfit.Lora())) == {}


def test_roots_of_zeros_cost_what_the_tables_say(known):
    step = stepped("llama")
    kinds = {**known.kinds["float32"]}
    kinds["sqrt_zero"] = [(size, 2 * seconds) for size, seconds in kinds["sqrt"]]
    double = dataclasses.replace(known, kinds={"float32": kinds})
    elements = timing.untouched(step)["torch.float32"]
    assert timing.step_time(step, double).by_kind["sqrt of zeros"] == pytest.approx(along(kinds["sqrt"], elements))


def test_large_blocks_are_faulted_in_every_time():
    logits = 4 * 512 * 40_000 * 4
    found = timing.fresh_bytes(stepped("llama", batch=(4, 512), vocabulary=40_000))
    assert found["forward"] >= 2 * logits and found["backward"] >= 2 * logits
    assert logits not in (
        size for size in timing.fresh_bytes(stepped("llama", batch=(1, 16), vocabulary=40_000)).values()
    )


def test_element_types_that_were_not_measured_take_those_of_float32(known):
    half = stepped("bert", autocast=torch.bfloat16)
    assert timing.step_time(half, known).seconds > 0
    assert known.tables("torch.float64") == known.tables("torch.float32")
    assert known.tables("torch.bfloat16") != known.tables("torch.float32")


def test_coefficients_survive_json(known):
    again = timing.Coefficients.from_json(json.loads(json.dumps(known.to_json())), measured=False)
    assert again == known


def test_the_note_says_where_figures_come_from_and_how_far_off(known):
    assert "tightfit calibrate" in known.note() and "another machine" not in known.note()
    own = dataclasses.replace(known, measured=True)
    for note in (known.note(), own.note()):
        assert "5%" in note and "15%" in note and "one thread" in note


def test_pricing_a_step_is_quick(known):
    step = stepped("bert", tightfit.chain(tightfit.Lora(), tightfit.Checkpointing()))
    start = time.process_time()
    timing.step_time(step, known)
    assert time.process_time() - start < 0.05
