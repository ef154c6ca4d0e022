"""Recommended recipes: they fit when run for real, they come in the promised order, and what is refused says why."""

import dataclasses
from types import SimpleNamespace

import models
import pytest
import torch
from checks.transforms import HalfTable, OwnLinear
from transformers import BertConfig, BertForSequenceClassification

import tightfit
from tightfit.core.fitting import MARGIN, ROUGH, Fit, Fitting, estimate, need
from tightfit.core.recommend import best_first, candidates, choices
from tightfit.core.search import INDIFFERENT, Search
from tightfit.core.transform import Transform

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
BATCH = (8, 64)
METHODS = [tightfit.Checkpointing, tightfit.Lora]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=2000, max_position_embeddings=64))


@pytest.fixture(scope="module")
def peaks(model):
    """Peaks of the stock step: whole, and one row at a time."""
    whole = tightfit.plan(model, batch=BATCH)
    single = tightfit.plan(model, batch=(1, BATCH[1]), accumulate=2)
    return need(whole), need(single)


def test_the_stock_step_is_first_where_it_fits(model, peaks):
    found = tightfit.recommend(model, batch=BATCH, budget=peaks[0], methods=METHODS)
    best = found[0]
    assert best.recipe == tightfit.chain() and (best.batch_size, best.accumulation) == (8, 1)
    assert best.relative_step_time == pytest.approx(1.0)
    assert best.plan.peak_bytes <= peaks[0]
    assert 2 <= len(found) <= 3
    assert all(need(choice.plan) <= peaks[0] for choice in found)
    assert "the gradients of the stock step" in best.why
    assert "than the first choice" in found[1].why
    order = [choice.recipe.exact for choice in found]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    ("share", "tune", "methods"),
    [
        (0.2, "full", METHODS),
        pytest.param(0.7, "full", METHODS, marks=pytest.mark.slow),
        pytest.param(0.2, "adapters", METHODS, marks=pytest.mark.slow),
        pytest.param(0.7, "adapters", METHODS, marks=pytest.mark.slow),
        pytest.param(0.5, "any", None, marks=pytest.mark.slow),
    ],
)
def test_every_recommendation_run_for_real_stays_under_its_budget(model, peaks, share, tune, methods):
    whole, single = peaks
    budget = round(single + share * (whole - single))
    found = tightfit.recommend(model, batch=BATCH, budget=budget, tune=tune, methods=methods)
    for choice in found:
        assert choice.batch_size * choice.accumulation == BATCH[0]
        assert tune == "any" or choice.recipe.exact == (tune == "full")
        measured = choice.plan.verify()
        assert measured.peak_bytes <= budget
        assert abs(measured.peak_error) < MARGIN["cpu"]


@pytest.mark.slow
def test_exact_recipes_only(model, peaks):
    found = tightfit.recommend(model, batch=BATCH, budget=peaks[1] + 1, exact=True, methods=METHODS)
    assert found and all(choice.recipe.exact for choice in found)
    times = [choice.relative_step_time for choice in found]
    assert times == sorted(times)


def test_given_methods_are_tried_as_they_stand(model, peaks):
    lora = tightfit.Lora(rank=3)
    found = tightfit.recommend(model, batch=BATCH, budget=peaks[0], tune="adapters", methods=[lora])
    assert [choice.recipe for choice in found] == [tightfit.chain(lora)]
    vocabulary = tightfit.PartialEmbedding(ids=range(200))
    found = tightfit.recommend(model, batch=BATCH, budget=peaks[0], tune="full", methods=[], extra=[vocabulary])
    assert tightfit.chain(vocabulary) in [choice.recipe for choice in found]


@pytest.mark.slow
def test_the_stronger_value_of_a_method_is_tried_where_the_milder_does_not_fit(model):
    def peak(rank):
        recipe = tightfit.chain(tightfit.Lora(rank=rank))
        return need(tightfit.plan(model, recipe, batch=(1, 64), accumulate=2))

    budget = (peak(16) + peak(4)) // 2
    found = tightfit.recommend(model, batch=BATCH, budget=budget, methods=[tightfit.Lora])
    assert [choice.recipe for choice in found] == [tightfit.chain(tightfit.Lora(rank=4))]


def fit(time, *transforms):
    return Fit(tightfit.chain(*transforms), None, 8, 1, time)


def test_of_recipes_about_as_fast_the_simplest_goes_first():
    lora, mesa, fused = tightfit.Lora(), tightfit.Mesa(), tightfit.FusedOps()
    fastest, simple, slow = fit(0.70, lora, mesa), fit(0.73, lora), fit(0.76, fused, lora)
    assert best_first([slow, fastest, simple], 3) == [simple, fastest, slow]
    clear = fit(0.74, lora)  # six per cent are more than the prediction's error
    assert best_first([clear, fastest], 2) == [fastest, clear]
    exact = fit(0.9, fused)
    assert best_first([simple, exact], 2) == [exact, simple]


def test_the_last_place_is_for_a_faster_recipe_that_is_not_exact():
    exact = [fit(time, *[tightfit.FusedOps()][:count]) for count, time in ((0, 1.0), (1, 0.9))]
    faster, slower = fit(0.8, tightfit.Lora()), fit(0.87, tightfit.Lora())
    assert best_first([*exact, faster], 2) == [exact[1], faster]
    assert best_first([*exact, slower], 2) == [exact[1], exact[0]]  # of the first choice's time it is 97 %
    assert best_first([*exact, faster], 1) == [exact[1]]
    assert best_first([exact[1], faster, exact[0]], 3) == [exact[1], exact[0], faster]
    third = fit(1.4, tightfit.Checkpointing())
    assert best_first([exact[0], third, fit(0.9, tightfit.FusedOps())], 1)[0].time == 0.9


def test_of_like_times_what_approximates_least_is_the_simplest():
    one, two = tightfit.FusedOps(), tightfit.Lora()
    mixed, plain = fit(0.71, one, two), fit(0.70, two, tightfit.Mesa())
    assert best_first([plain, mixed], 2) == [mixed, plain]


def shown(recipe, time, mebibytes, size, turns):
    return Fit(tightfit.chain(recipe), SimpleNamespace(peak_bytes=mebibytes << 20), size, turns, time)


def test_why_a_recipe_is_chosen():
    best = shown(tightfit.Checkpointing(), 1.25, 40, 8, 1)
    found = choices([best, shown(tightfit.Lora(), 1.0, 50, 2, 4), shown(tightfit.Mesa(), 1.251, 30, 1, 8)])
    assert found[0].why == ("peak 40.0 MiB, 1.25 x the stock step time (predicted); the gradients of the stock step")
    assert "the batch in 4 parts of 2 rows; not the gradients of the stock step: low-rank" in found[1].why
    assert found[1].why.endswith("20% faster and 10.0 MiB more than the first choice")
    assert "the batch in 8 parts of 1 row;" in found[2].why
    assert found[2].why.endswith("as fast and 10.0 MiB less than the first choice")
    assert [(c.batch_size, c.accumulation) for c in found] == [(8, 1), (2, 4), (1, 8)]
    slow = choices([best, shown(tightfit.FusedOps(), 1.5, 40, 8, 1)])[1]
    assert "20% slower" in slow.why


def test_a_choice_that_a_check_refutes_makes_room_for_what_was_left_out_for_it(model, peaks, monkeypatch):
    budget = peaks[0] - 1
    simulated = Fitting._simulated

    def too_small(fitting, draft, size, options):
        found = simulated(fitting, draft, size, options)
        if options.get("extrapolate") != "unchecked" or len(draft.recipe) or size != BATCH[0]:
            return found
        return dataclasses.replace(found, peak_bytes=budget // 2, notes=("extended from 2 and 3 of 8 like blocks",))

    monkeypatch.setattr(Fitting, "_simulated", too_small)
    (found,) = tightfit.recommend(model, batch=BATCH, budget=budget, methods=[])
    assert (found.recipe, found.batch_size) == (tightfit.chain(), 4) and need(found.plan) <= budget


def test_effective_batch(model, peaks):
    found = tightfit.recommend(model, batch=BATCH, budget=peaks[0], effective_batch=32, methods=[])
    assert all(choice.batch_size * choice.accumulation == 32 for choice in found)
    ids = torch.ones(6, 16, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(6, dtype=torch.long)}
    choice = tightfit.recommend(model, batch=batch, budget="1GiB", effective_batch=8, methods=[])[0]
    assert (choice.batch_size, choice.accumulation) == (4, 2)  # the batch shows no more than 6 rows


@pytest.mark.slow
def test_pruning_keeps_the_best(model, peaks):
    """The pruned search finds as good a first choice as simulating everything."""
    budget = round(peaks[1] * 1.05)
    groups = candidates(model, METHODS, (), "any", False)
    options = {"optimizer": "adamw"}
    every = Search(model, BATCH, budget, None, dict(options)).run(groups, 3, prune=False)
    best = best_first(every, 3)[0]
    found = tightfit.recommend(model, batch=BATCH, budget=budget, methods=METHODS)[0]
    assert found.recipe.exact == best.recipe.exact
    assert found.relative_step_time <= best.time * (1 + INDIFFERENT)


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        pytest.param(tightfit.Checkpointing(), marks=pytest.mark.slow),
        pytest.param(tightfit.Lora(), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_of_a_smaller_batch_is_near(model, recipe):
    whole = tightfit.plan(model, recipe, batch=BATCH)
    for size in (4, 1):
        part = tightfit.plan(model, recipe, batch=(size, BATCH[1]), accumulate=2)
        assert estimate(whole.simulation, size / BATCH[0]) == pytest.approx(part.peak_bytes, rel=0.1)


# What is known of one recipe, from steps that were simulated


def planned(peak, *, slack=0, device="cpu", measured=False, notes=()):
    """A plan of which one row in eight takes an eighth."""
    categories = {"weights": [0], "gradients": [0], "optimizer": [0], "activations": [peak], "temporary": [0]}
    timeline = SimpleNamespace(phases=["forward"], categories=categories)
    source = SimpleNamespace(options={"device": device})
    simulation = SimpleNamespace(slack_bytes=slack, timeline=timeline)
    return SimpleNamespace(peak_bytes=peak, simulation=simulation, source=source, measured=measured, notes=notes)


@pytest.fixture
def fitting(model):
    return Fitting(model, BATCH, 1000, BATCH[0], {"optimizer": "adamw"}, lambda count: None)


def test_what_a_plan_needs_at_worst():
    assert need(planned(1000, slack=100)) == 1103
    assert need(planned(1000, slack=100, device="cuda")) == 1166
    assert need(planned(1000, measured=True)) == 1000


def test_a_gradient_stands_beside_the_sum_it_is_added_to():
    categories = {
        "weights": [10, 10, 10, 10],
        "gradients": [0, 30, 50, 50],
        "optimizer": [20, 20, 20, 20],
        "activations": [400, 200, 0, 0],
        "temporary": [0, 0, 0, 8],
    }
    phases = ["forward", "backward", "backward", "optimizer"]
    step = SimpleNamespace(timeline=SimpleNamespace(phases=phases, categories=categories))
    assert estimate(step, 1) == 80 + 400
    assert estimate(step, 1 / 16) == 80 + 30 + 200 / 16 - 0.5
    assert estimate(step, 0) == 80 + 30


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({8: 1900}, 4),  # the most rows that are guessed to fit
        ({8: 1900, 4: 1050}, 2),
        ({8: 1900, 4: 900}, None),
        ({1: 200}, 4),
        ({2: 1900}, 1),
        ({2: round(2 * ROUGH * 990)}, 1),  # the guess may be that much above the truth
        ({2: round(2 * ROUGH * 1010)}, None),
        ({1: 1001}, None),
        ({8: 4000, 1: 240}, 2),  # of two steps the nearer one by proportion
    ],
)
def test_the_next_micro_batch_to_simulate(fitting, known, expected):
    for size, peak in known.items():
        fitting.plans[tightfit.chain(), size] = planned(peak)
    assert fitting.next_size(tightfit.chain()) == expected


def test_a_guess_from_a_step_that_accumulated_goes_by_what_that_one_needed(fitting, monkeypatch):
    recipe = tightfit.chain()
    monkeypatch.setattr("tightfit.core.fitting.estimate", lambda simulation, share: 600 * share)
    fitting.plans[recipe, 8] = planned(800)
    assert fitting.guess(recipe, 4) == 300
    fitting.plans[recipe, 4] = planned(1200)
    assert fitting.guess(recipe, 2) == pytest.approx(300 * need(planned(1200)) / 600)


def test_a_recipe_is_settled_at_the_most_rows_that_fit(fitting):
    recipe = tightfit.chain()
    fitting.made = lambda recipe, size: size
    fitting.plans |= {(recipe, size): planned(size * 200) for size in (1, 4, 8)}
    assert fitting.settled(recipe) == 4
    fitting.budget = 100
    assert fitting.settled(recipe) is None


@pytest.mark.parametrize(("peak", "kept"), [(990, True), (999, False)])
def test_an_extended_plan_is_checked_before_it_is_an_answer(fitting, monkeypatch, peak, kept):
    checked = planned(peak)
    monkeypatch.setattr(fitting, "_simulated", lambda draft, size, options: checked)
    found = Fit(tightfit.chain(), planned(900, notes=("extended from 2 and 3 of 8 like blocks per stack",)), 8, 1, 1.0)
    again = fitting.checked(found)
    assert (again is not None and again.plan is checked) if kept else again is None
    whole = dataclasses.replace(found, plan=planned(900))
    assert fitting.checked(whole) is whole


@pytest.mark.parametrize(("spared", "may"), [(3, True), (4, False)])
def test_a_stronger_value_is_tried_where_it_may_take_enough_away(fitting, spared, may):
    mild, strong = (tightfit.chain(tightfit.Lora(rank=rank)) for rank in (16, 4))
    gain = fitting.draft(mild).static_bytes - fitting.draft(strong).static_bytes
    assert gain > 0
    fitting.plans[mild, 1] = planned(10 * gain, measured=True)
    fitting.budget = round(10 * gain / ROUGH) - spared * gain
    assert fitting.may_fit_after(strong, mild) == may


def test_where_nothing_was_simulated_the_floor_says_whether_a_stronger_value_may_fit(fitting):
    mild, strong = (tightfit.chain(tightfit.Lora(rank=rank)) for rank in (16, 4))
    fitting.budget = fitting.floor(strong)
    assert fitting.may_fit_after(strong, mild)
    fitting.budget -= 1
    assert not fitting.may_fit_after(strong, mild)


def test_the_most_frugal_recipes_are_the_last_resort(model, monkeypatch):
    groups = [[tightfit.Checkpointing()], [tightfit.Lora(rank=16), tightfit.Lora(rank=4)]]
    search = Search(model, BATCH, 1 << 40, None, {"optimizer": "adamw"})
    lora, checkpointing = tightfit.Lora(rank=4), tightfit.Checkpointing()
    wanted = [tightfit.chain(checkpointing, lora), tightfit.chain(lora)]
    assert search._frugal(groups, {1}) == wanted
    assert search._frugal(groups, None)[:2] == wanted and len(search._frugal(groups, None)) == 3
    monkeypatch.setattr(Search, "_best_first", lambda self, names, limit: None)
    monkeypatch.setattr(Search, "_whole_time", lambda self, names: 1.0)
    monkeypatch.setattr(Fitting, "settled", lambda self, recipe: None)
    found = search.run(groups, 3)
    assert [(fit.recipe, fit.size) for fit in found] == [(wanted[0], 1)]


def test_all_values_of_a_method_are_tried_down_to_the_one_that_fits(model):
    def peak(rank):
        recipe = tightfit.chain(tightfit.Lora(rank=rank))
        return need(tightfit.plan(model, recipe, batch=(1, 64), accumulate=2))

    values = [tightfit.Lora(rank=rank) for rank in (64, 32, 2)]
    search = Search(model, (1, BATCH[1]), (peak(32) + peak(2)) // 2, 2, {"optimizer": "adamw"})
    assert [fit.recipe for fit in search.run([values], 3)] == [tightfit.chain(values[-1])]


def test_methods_that_do_not_work_on_the_model_are_left_out(model, peaks):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Nowhere(Transform):
        def edits(self, model, context):
            raise tightfit.UnsupportedModelError("not on this model")

    found = tightfit.recommend(model, batch=BATCH, budget=2 * peaks[0], methods=[Nowhere(), tightfit.Checkpointing])
    assert {str(choice.recipe) for choice in found} == {"stock", "Checkpointing"}


def test_recipes_with_conflicts_are_left_out(model, peaks):
    two = [OwnLinear(where="*.query"), HalfTable()]
    found = tightfit.recommend(model, batch=BATCH, budget=peaks[0], methods=[*two, *two])
    for choice in found:
        assert not choice.plan.conflicts
        assert len({type(t) for t in choice.recipe}) == len(choice.recipe)


def test_progress_is_told(model, peaks):
    seen = []
    methods = [tightfit.Checkpointing]
    tightfit.recommend(
        model, batch=BATCH, budget=peaks[0], methods=methods, progress=lambda done, of: seen.append((done, of))
    )
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(of >= done for done, of in seen)


# Nothing fits, and wrong input


def test_nothing_fits(model):
    with pytest.raises(tightfit.BudgetError) as caught:
        tightfit.recommend(model, batch=BATCH, budget="300KiB", methods=METHODS)
    text = str(caught.value)
    assert "no recipe fits 300KiB" in text and "the smallest peak found is" in text
    assert "with 1 row at a time" in text and "give at least that much" in text


def test_adapters_alone_need_a_method_that_makes_one(model):
    with pytest.raises(ValueError, match=r"none of the methods freezes weights of this BertFor.*such as Lora"):
        tightfit.recommend(model, batch=BATCH, budget="1GiB", tune="adapters", methods=[tightfit.Checkpointing])


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (8, 32),
        pytest.param(8, 128, marks=pytest.mark.slow),
        pytest.param(1, 16, marks=pytest.mark.slow),
        (1, 64),
    ],
)
def test_the_longest_half_that_fits_is_named(rows, length):
    """As a micro-batch of one row, the later ones of which find gradients there."""
    config = BertConfig(**SIZES, vocab_size=200, max_position_embeddings=256)
    model = tightfit.skeleton(config, task="sequence-classification")
    budget = need(tightfit.plan(model, batch=(1, length), accumulate=min(2, rows)))
    for given, words in ((budget, f"with it, sequences of {length} tokens would fit"), (budget - 1, "fit")):
        with pytest.raises(tightfit.BudgetError, match=words) as caught:
            tightfit.recommend(model, batch=(rows, 256), budget=given, methods=[])
        assert (f"of {length} tokens" in str(caught.value)) == (given == budget)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": "24"}, ["without a unit"]),
        ({"budget": "900TiB"}, ["of this machine"]),
        ({"batch": (8, 65)}, ["65", "64 positions"]),
        ({"batch": {"ids": torch.ones(2, 2)}}, ["'ids'", "takes no such input"]),
        ({"tune": "ful"}, ["tune", "'ful'", "did you mean 'full'"]),
        ({"limit": 0}, ["limit", "0"]),
        ({"effective_batch": 2.5}, ["effective_batch", "2.5"]),
        ({"extra": [tightfit.PartialEmbedding()]}, ["PartialEmbedding", "ids are missing"]),
    ],
)
def test_wrong_arguments_are_named(model, changes, words):
    arguments = {"batch": BATCH, "budget": "1GiB", **changes}
    with pytest.raises(ValueError) as caught:
        tightfit.recommend(model, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("changes", [{"methods": ["lora"]}, {"fallback": "measure"}, {"accumulate": 2}])
def test_wrong_types_are_named(model, changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        tightfit.recommend(model, batch=BATCH, budget="1GiB", **changes)


def test_a_model_that_cannot_be_simulated_names_the_operator():
    class Reads(BertForSequenceClassification):
        def forward(self, input_ids=None, labels=None, **kwargs):
            out = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            assert out.logits.sum().item() is not None
            return out

    model = Reads(models.bert().config)
    with pytest.raises(tightfit.SimulationError, match="_local_scalar_dense"):
        tightfit.recommend(model, batch=(2, 8), budget="1GiB")
