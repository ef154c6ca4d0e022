"""The pieces of the simulation: real values, errors, categories, extension of short stacks, hidden bytes, CUDA."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tightfit
from tightfit.core.edits import planning
from tightfit.core.errors import SimulationError
from tightfit.core.simulate import example_batch, simulate
from tightfit.core.simulate.cuda import CachingAllocator, rounded
from tightfit.core.simulate.hidden import Signature, Spec, measure_hidden, run_alone, smaller


def llama(blocks, **settings):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 200, **settings}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **sizes))


def t5(blocks):
    config = T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=blocks, num_heads=2, vocab_size=200, decoder_start_token_id=0
    )
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def edited(model, *methods):
    with planning():
        return tightfit.apply(model, tightfit.chain(*methods)).model


class Wrapped(nn.Module):
    """A body whose sum is the loss."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, **extra):
        return self.body(x, **extra).sum()


def loss_of(out):
    return out


# -- extension of short stacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, options",
    [
        (llama, {"optimizer": "adamw-foreach"}),
        (t5, {}),
        pytest.param(
            lambda blocks: edited(llama(blocks), tightfit.FusedOps(), tightfit.Mesa()), {}, marks=pytest.mark.slow
        ),
        (lambda blocks: edited(llama(blocks), tightfit.WtaCrs(scores="running")), {}),
    ],
    ids=["decoder, foreach", "encoder-decoder, loop", "codes", "samples"],
)
@pytest.mark.parametrize("blocks, how", [(6, True), pytest.param(10, "unchecked", marks=pytest.mark.slow)])
def test_short_stacks_extend_to_the_whole_one_to_the_byte(make, options, blocks, how):
    model = make(blocks)
    full = simulate(model, (2, 16), extrapolate=False, **options)
    short = simulate(model, (2, 16), extrapolate=how, **options)
    assert "extended" in short.notes[0] and not full.notes
    assert short.peak_bytes == full.peak_bytes
    assert short.phases == full.phases
    assert short.by_category == full.by_category
    assert short.saved_by_module == full.saved_by_module
    assert (short.flops, short.operators) == (full.flops, full.operators)
    assert (short.peak_phase, short.peak_module) == (full.peak_phase, full.peak_module)


def test_blocks_that_differ_are_simulated_in_full():
    model = llama(8)
    model.model.layers[4].mlp.gate_proj.weight.requires_grad_(False)
    found = simulate(model, (2, 16), extrapolate=True)
    assert not found.notes
    assert found.peak_bytes == simulate(model, (2, 16), extrapolate=False).peak_bytes


# -- copies ----------------------------------------------------------------------------------------------------------


def test_tied_weights_and_views_of_one_storage_are_counted_once():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            flat = torch.zeros(2, 64, 64)
            self.first, self.second = nn.Parameter(flat[0]), nn.Parameter(flat[1])
            self.again = self.first
            self.cache = [torch.zeros(10)]

        def forward(self, x):
            return (x @ self.first @ self.second @ self.again).sum()

    found = simulate(Views(), {"x": torch.zeros(2, 64)}, loss=loss_of, optimizer="sgd")
    assert found.by_category["weights"] == 2 * 64 * 64 * 4 + 40
    assert found.static_bytes == found.by_category["weights"] + 2 * 64 * 4


def test_state_outside_the_module_tables_is_copied_too():
    class Counting(nn.Linear):
        def forward(self, x):
            self.__dict__["_seen"] += 1
            return super().forward(x)

    body = Counting(4, 4)
    body.__dict__["_seen"] = torch.zeros((), dtype=torch.long)
    simulate(Wrapped(body), {"x": torch.zeros(2, 4)}, loss=loss_of)
    assert body.__dict__["_seen"].item() == 0


# -- real values -----------------------------------------------------------------------------------------------------


def test_decisions_on_batch_values_follow_the_batch():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x, keep):
            rows = self.linear(x)[keep]  # the shape depends on the values
            return rows.exp().sum() if bool(keep.all()) else rows.exp().exp().exp().sum()

    batch = {"x": torch.zeros(100, 64), "keep": torch.ones(100, dtype=torch.bool)}
    every = simulate(Choosing(), batch, loss=loss_of)
    some = simulate(Choosing(), {**batch, "keep": torch.arange(100) < 50}, loss=loss_of)
    row = 64 * 4
    # exponentials are kept for backward: one of all rows, or three of half of them
    assert every.saved_by_module[""] == 100 * row
    assert some.saved_by_module[""] == 3 * 50 * row


def test_a_batch_with_padding_builds_a_mask_that_one_without_does_not():
    model = llama(2)
    padded = simulate(model, example_batch(model, 4, 64, padded=True))
    full = simulate(model, example_batch(model, 4, 64, padded=False))
    assert padded.saved_bytes > full.saved_bytes


@pytest.mark.parametrize("draw", [lambda: torch.rand([]), lambda: torch.rand(1)])
def test_a_block_that_is_left_out_at_random_is_there_in_the_largest_step(draw):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return (x if draw() < 0.9 else self.linear(x).exp()).sum()

    found = simulate(Wrapped(Skipping()), {"x": torch.zeros(100, 64, requires_grad=True)}, loss=loss_of)
    assert found.saved_by_module["body"] == 100 * 64 * 4


# -- the step --------------------------------------------------------------------------------------------------------


def test_checkpointing_has_its_own_phase_and_saves_less():
    config = GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=200, use_cache=False)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    plain = simulate(model, (4, 64))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = simulate(model, (4, 64))
    assert "recompute" in again.phases and "recompute" not in plain.phases
    assert again.saved_bytes < plain.saved_bytes / 2
    assert sum(again.flops.values()) > sum(plain.flops.values())


def test_parameters_without_gradient_get_no_state():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 800)

        def forward(self, x):
            return self.used(x).sum()

    for optimizer in ("adamw", torch.optim.AdamW):
        found = simulate(Unused(), {"x": torch.zeros(2, 8)}, loss=loss_of, optimizer=optimizer)
        assert found.by_category["optimizer"] == 2 * (8 * 8 + 8) * 4 + 2 * 4


def test_a_named_optimizer_is_as_warm_as_one_that_stepped_before():
    model = llama(2)
    named = simulate(model, (2, 16), optimizer="adamw")
    given = simulate(model, (2, 16), optimizer=lambda parameters: torch.optim.AdamW(parameters, foreach=False))
    assert (named.peak_bytes, named.static_bytes) == (given.peak_bytes, given.static_bytes)


def test_accumulation_keeps_gradients_through_the_second_forward():
    model = llama(2)
    once, twice = simulate(model, (2, 16)), simulate(model, (2, 16), accumulate=2)
    trainable = sum(p.numel() * 4 for p in model.parameters())
    assert twice.phases["forward"] - once.phases["forward"] == trainable + 4  # and the first loss


def test_a_forward_without_training_keeps_nothing():
    found = simulate(llama(2), (2, 16), train=False)
    assert list(found.phases) == ["forward"] and found.saved_bytes == 0
    assert found.by_category["optimizer"] == 0


def test_an_operator_without_fake_kernel_is_named():
    library = torch.library.Library("tightfit_test", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x.clone(), "CPU")

    class Opaque(nn.Module):
        def forward(self, x):
            return torch.ops.tightfit_test.opaque(x)

    with pytest.raises(SimulationError, match=r"opaque.*module body\.1"):
        model = Wrapped(nn.Sequential(nn.Linear(4, 4), Opaque()))
        simulate(model, {"x": torch.zeros(2, 4)}, loss=loss_of)


def test_shapes_that_do_not_fit_are_the_simulations_error():
    with pytest.raises(SimulationError, match=r"addmm.*module body.*reduction dim"):
        simulate(Wrapped(nn.Linear(4, 4)), {"x": torch.zeros(2, 5)}, loss=loss_of)


# -- kernel-internal memory ------------------------------------------------------------------------------------------


def test_operands_copied_to_a_common_type_are_found():
    left, right = Spec((64, 64), (64, 1), torch.bfloat16), Spec((64, 64), (64, 1), torch.float32)
    mixed = Signature(torch.ops.aten.mul.Tensor, (left, right), ())
    sizes, skipped = run_alone([mixed])
    assert sizes[mixed] == 64 * 64 * 4 and not skipped


def test_a_large_half_precision_product_follows_from_small_ones(monkeypatch):
    def product(rows, inner, columns):
        left = Spec((rows, inner), (inner, 1), torch.bfloat16)
        right = Spec((inner, columns), (1, inner), torch.bfloat16)
        return Signature(torch.ops.aten.mm.default, (left, right), ())

    large = product(200, 160, 300)
    assert [f.specs()[0].shape for f in smaller(large)] == [(32, 64), (64, 64), (32, 128)]
    direct, _ = run_alone([large])
    monkeypatch.setattr("tightfit.core.simulate.hidden._is_small", lambda found: found is not large)
    followed, _ = run_alone([large])
    assert followed[large] == pytest.approx(direct[large], rel=1e-3, abs=256)


# -- CUDA ------------------------------------------------------------------------------------------------------------


def test_cuda_keeps_boolean_dropout_masks_and_rounds_sizes():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=200, use_cache=False)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    cpu, cuda = simulate(model, (4, 64)), simulate(model, (4, 64), device="cuda")
    assert cuda.saved_bytes < cpu.saved_bytes
    assert all(size % 512 == 0 for name, size in cuda.by_category.items())
    assert any("modelled" in note for note in cuda.notes)
    assert cuda.reserved_bytes() > cuda.peak_bytes
    assert torch.nn.functional.dropout is not None and cpu.peak_bytes == simulate(model, (4, 64)).peak_bytes


class Attends(nn.Module):
    """Attention with a mask of its own, added to the scores."""

    def __init__(self, grows):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(1, 1, 10, 10), requires_grad=grows)

    def forward(self, x):
        x = self.linear(x)
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.bias).sum()


@pytest.mark.parametrize("grows", [False, True])
def test_cuda_has_no_fused_attention_for_a_mask_that_trains(grows):
    found = simulate(Attends(grows), {"x": torch.zeros(2, 2, 10, 16)}, loss=loss_of, device="cuda", optimizer="sgd")
    operators = " ".join(found.timeline.operators)
    assert ("efficient_attention" in operators) != grows
    assert ("constant_pad_nd" in operators) != grows  # rows of the mask in multiples of 16


@pytest.mark.parametrize("inplace", [False, True])
def test_cuda_keeps_no_mask_beside_a_dropout_in_place(inplace):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.dropout(self.linear(x), 0.5, True, inplace).sum()

    found = simulate(Drops(), {"x": torch.zeros(4, 8)}, loss=loss_of, device="cuda")
    assert any("native_dropout" in name for name in found.timeline.operators) != inplace
    assert found.by_category["optimizer"] == 2 * (512 + 512)  # moments; the counts of steps stay on the host


def test_what_was_too_large_to_run_is_slack(monkeypatch):
    spec = Spec((64, 64), (64, 1), torch.float32)
    large, small = (Signature(func, (spec,), ()) for func in (torch.ops.aten.exp.default, torch.ops.aten.sin.default))
    monkeypatch.setattr("tightfit.core.simulate.hidden.run_alone", lambda wanted: ({small: 100}, [large]))
    found = measure_hidden({3: large, 5: large, 7: small}, [0, 0, 0, 900, 0, 700, 0, 800], [1000] * 8)
    assert found.extra == {7: 100}
    assert found.slack_bytes == spec.nbytes - 100  # the nearer one is 100 below the highest level
    assert "aten.exp" in found.notes[0] and "aten.sin" not in found.notes[0]


def test_the_example_batch_has_padding_in_its_last_row_alone():
    batch = example_batch(llama(1), 3, 16)
    assert batch["attention_mask"].sum(1).tolist() == [16, 16, 12]
    assert (batch["labels"] == -100).tolist() == (batch["attention_mask"] == 0).tolist()
    full = example_batch(llama(1), 3, 16, padded=False)
    assert bool(full["attention_mask"].all()) and torch.equal(full["labels"], full["input_ids"])


def test_the_caching_allocator_reuses_and_merges_blocks():
    allocator = CachingAllocator()
    small = [allocator.allocate(300_000) for _ in range(6)]
    assert allocator.reserved == 2 << 20
    large = allocator.allocate(30 << 20)
    assert allocator.reserved == 32 << 20
    allocator.free(large)
    parts = [allocator.allocate(15 << 20), allocator.allocate(15 << 20)]
    assert allocator.reserved == 32 << 20 and parts[1] - parts[0] == 15 << 20
    for block in parts:
        allocator.free(block)
    assert allocator.allocate(30 << 20) == large
    for block in reversed(small):
        allocator.free(block)
    assert allocator.allocate(1 << 20) == small[0]
    assert allocator.reserved == 32 << 20
    assert rounded(1) == 512 and rounded(512) == 512


def test_an_example_batch_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    example_batch(llama(1), 2, 8)
    assert torch.equal(state, torch.get_rng_state())


def test_simulation_works_on_a_deep_copied_model_with_hooks():
    model = llama(2)
    twin = copy.deepcopy(model)
    seen = []
    twin.model.layers[0].register_forward_hook(lambda *a: seen.append(1))
    assert simulate(twin, (2, 16)).peak_bytes == simulate(model, (2, 16)).peak_bytes
    assert seen


def test_edits_that_know_their_place_in_the_stack_are_not_extended():
    from tightfit.core.simulate.extrapolate import like_stacks
    from tightfit.core.tight import tighten

    class Mixin:
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    def edited(state):
        model = llama(8)
        for i, block in enumerate(model.model.layers):
            tighten(block.mlp, Mixin, state(i))
        return model

    assert like_stacks(llama(8)).period == 1
    assert like_stacks(edited(lambda i: {"budget": 0.3, "index": i})).period == 1
    assert like_stacks(edited(lambda i: {"budget": 0.3 if i != 4 else 0.5})) is None
    assert like_stacks(edited(lambda i: {"shared": object()})) is None


class Shared:
    """State that copies of a model share."""

    def __init__(self, table):
        self.table = table

    def __deepcopy__(self, memo):
        return Shared(self.table)


@pytest.mark.parametrize("device, counted", [("cpu", 64 * 8 * 4), ("meta", 0)])
def test_state_that_copies_share_is_never_an_allocation_of_the_step(device, counted):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False)
            self.store = Shared(torch.zeros(64, 8, device=device))

        def forward(self, x):
            return (self.linear(x) * self.store.table[:4]).sum()

    found = simulate(Reads(), {"x": torch.zeros(4, 8)}, loss=loss_of, optimizer="sgd")
    assert found.by_category["weights"] == 8 * 8 * 4 + counted
    assert found.saved_by_module.get("", 0) == 0  # the view of the table is no memory of its own
    assert found.phases["forward"] == found.static_bytes + 2 * 4 * 8 * 4


def test_outputs_of_other_tensor_classes_are_not_looked_into():
    class Lazy(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.grad_fn.__get__:
                raise AssertionError("the simulation looked")
            return super().__torch_function__(func, types, args, kwargs or {})

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("the simulation computed")

    class Returns(nn.Module):
        def forward(self, x):
            return torch.Tensor._make_wrapper_subclass(Lazy, x.shape, dtype=x.dtype, device=x.device)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.lazy = nn.Linear(4, 4), Returns()

        def forward(self, x):
            hidden = self.linear(x)
            self.lazy(hidden)
            return hidden.sum()

    assert simulate(Model(), {"x": torch.zeros(2, 4)}, loss=loss_of).peak_bytes > 0
