"""The simulated step against the allocator's own account of the same step."""

import gc

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.optimization import Adafactor

from tightfit.core import memory
from tightfit.core.errors import SimulationError
from tightfit.core.plan import plan
from tightfit.core.simulate import example_batch, simulate


def bert(**settings):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(**{**sizes, "vocab_size": 500, **settings})).train()


def llama(**settings):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 128, "vocab_size": 500, **settings})).train()


def experts():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture, vocab_size=500)).train()


def measured_peak(model, batch, optimizer, clip=None):
    """Allocator truth of a warm step, and the bytes it saves for backward."""

    def step():
        loss = model(**batch).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    gc.disable()
    try:
        peak = memory.allocator_peak(step)
    finally:
        gc.enable()
    return peak, memory.saved_bytes(step)


@pytest.mark.parametrize("make", [bert, llama, experts])
@pytest.mark.parametrize("padded", [True, False])
def test_peak_and_saved_bytes_are_the_allocators(make, padded):
    gc.collect()
    others = memory.live_bytes()  # tensors that other tests of this process keep
    model = make()
    batch = example_batch(model, 4, 32, padded=padded)
    found = simulate(model, batch)
    peak, saved = measured_peak(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-4))
    assert found.peak_bytes == pytest.approx(peak - others, rel=1e-4)
    assert found.saved_bytes == saved


def test_the_model_and_the_random_state_are_untouched():
    model = bert().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    simulate(model, (2, 16))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_skeleton_gives_the_same_figure_as_the_model():
    with torch.device("meta"):
        skeleton = bert()
    assert simulate(skeleton, (4, 32)).peak_bytes == simulate(bert(), (4, 32)).peak_bytes


def test_categories_add_up_and_phases_hold_the_peak():
    found = simulate(bert(), (4, 32), clip=1.0)
    assert sum(size for name, size in found.by_category.items() if name != "host") == found.peak_bytes
    assert max(found.phases.values()) == found.peak_bytes == found.phases[found.peak_phase]
    assert max(found.timeline.levels) == found.timeline.levels[found.timeline.peak] == found.peak_bytes


def test_a_phase_begins_at_the_level_that_the_one_before_left():
    model = bert()
    found = simulate(model, (4, 32))
    loss = 4  # alive until the step ends
    assert found.phases["zero_grad"] == found.static_bytes + loss + sum(p.nbytes for p in model.parameters())


def test_a_value_read_from_data_is_named_with_its_module():
    class Reads(torch.nn.Module):
        def forward(self, x):
            return x * x.abs().max().item()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), Reads())

        def forward(self, x):
            return {"loss": self.inner(x).sum()}

    with pytest.raises(SimulationError, match=r"_local_scalar_dense.* inner\.1"):
        simulate(Model(), {"x": torch.zeros(2, 4)}, loss=lambda out: out["loss"])


def test_missing_labels_and_wrong_names_are_refused():
    model = bert()
    batch = example_batch(model, 2, 8)
    with pytest.raises(SimulationError, match="no loss"):
        simulate(model, {k: v for k, v in batch.items() if k != "labels"})
    with pytest.raises(SimulationError, match="adamw-foreach"):
        simulate(model, batch, optimizer="adam")
    with pytest.raises(SimulationError, match=r"got the object AdamW, .* such as torch\.optim\.AdamW"):
        simulate(model, batch, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(SimulationError, match="at least 1"):
        simulate(model, (0, 8))
    with pytest.raises(TypeError, match=r"got BertConfig, accepted is a torch\.nn\.Module"):
        plan(model.config, batch=(2, 8))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate", 0),
        ("accumulate", 1.5),
        ("clip", -1.0),
        ("clip", "1"),
        ("autocast", "bf16"),
        ("loss", "mean"),
        ("extrapolate", "never"),
    ],
)
def test_an_option_that_no_step_can_have_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got {value!r}, accepted"):
        plan(bert(), batch=(2, 8), fallback="measure", **{name: value})


@pytest.mark.parametrize("factory", [torch.optim.Adagrad, torch.optim.ASGD])
def test_an_optimizer_that_reads_numbers_of_its_state(factory):
    others = memory.live_bytes()
    model = bert()
    batch = example_batch(model, 4, 32)
    found = simulate(model, batch, optimizer=factory)
    peak, _ = measured_peak(model, batch, factory(model.parameters()))
    assert found.peak_bytes == pytest.approx(peak - others, rel=1e-4)


def test_an_optimizer_that_reads_weights_is_named_as_the_place():
    def reading(parameters):
        return Adafactor(parameters, scale_parameter=True)

    with pytest.raises(SimulationError, match="in the optimizer: it reads a tensor's value"):
        simulate(bert(), (2, 8), optimizer=reading)
