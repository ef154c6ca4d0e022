"""Velora: which layers it takes, what they keep, where their directions are saved, and what stays exact."""

import copy
import gc

import models
import pytest
import torch
import transformers as hf
from checks.state import assert_same, gradients, logits, snapshot, train

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, Velora, WtaCrs
from tightfit.core.errors import ConflictError, SelectorError
from tightfit.core.marks import Estimated
from tightfit.core.memory import allocator_peak, live_bytes, saved_bytes
from tightfit.core.simulate import simulate
from tightfit.core.tight import is_tight, state_of
from tightfit.methods.velora import Directions, value_and_down
from tightfit.ops.rows import attention_masks
from tightfit.ops.subtoken import INITS, Subtoken
from tightfit.ops.subtoken import reference as ref

FAMILIES = ("bert", "llama", "t5")
each_family = pytest.mark.parametrize("family", FAMILIES)
RECIPES = [(), (Lora(rank=2),), (Lora(rank=2), FusedOps()), (Checkpointing(),)]
in_turn = pytest.mark.parametrize("family", ["bert", "llama", pytest.param("t5", marks=pytest.mark.slow)])
each_init = pytest.mark.parametrize("init", INITS)


def applied_to(family, *recipe, dtype=torch.float32, seed=3, **options):
    model = models.build(family, **options).to(dtype)
    torch.manual_seed(seed)
    return tightfit.apply(model, list(recipe) or Velora(groups=8))


def estimated(model):
    return {name: m for name, m in model.named_modules() if is_tight(m, Estimated)}


# -- which layers -----------------------------------------------------------------------------------------------------


def test_value_and_down_projections_by_the_names_of_many_models():
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    distil = hf.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    found = {}
    for config in (
        hf.BertConfig(**size),
        hf.DistilBertConfig(**distil.to_diff_dict()),
        hf.LlamaConfig(**size),
        hf.OPTConfig(**{**size, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        hf.GPT2Config(n_embd=32, n_layer=1, n_head=2),
        hf.GPTNeoXConfig(**size),
        hf.ViTConfig(**size),
        hf.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16),
        hf.DebertaV2Config(**size),
        hf.ModernBertConfig(**size),
    ):
        names = value_and_down(tightfit.skeleton(config))
        found[type(config).__name__.removesuffix("Config")] = {".".join(n.split(".")[-2:]) for n in names}
    assert found == {
        "Bert": {"self.value", "output.dense"},
        "DistilBert": {"attention.v_lin", "ffn.lin2"},
        "Llama": {"self_attn.v_proj", "mlp.down_proj"},
        "OPT": {"self_attn.v_proj", "0.fc2"},
        "GPT2": {"mlp.c_proj"},
        "GPTNeoX": {"mlp.dense_4h_to_h"},
        "ViT": {"attention.v_proj", "mlp.fc2"},
        "T5": {"SelfAttention.v", "EncDecAttention.v", "DenseReluDense.wo"},
        "DebertaV2": {"self.value_proj", "output.dense"},
        "ModernBert": {"mlp.Wo"},
    }


@each_family
def test_it_acts_on_weights_that_train(family):
    full = estimated(applied_to(family).model)
    assert sorted(full) == sorted(value_and_down(models.build(family)))
    lora = estimated(applied_to(family, Velora(groups=8), Lora(rank=2)).model)
    assert sorted(lora) == sorted(f"{name}.lora_A.default" for name in full)


@pytest.mark.parametrize("others", [[], [Lora(rank=2)]], ids=["full", "lora"])
def test_heads_keep_their_whole_input(others):
    names = estimated(applied_to("bert", Velora(groups=8, where="*"), *others).model)
    assert names and all(".layer." in name for name in names)
    with pytest.raises(SelectorError, match=r"where='classifier'\): classifier of BertFor\w+ lie outside the blocks"):
        applied_to("bert", Velora(groups=8, where="classifier"), *others)


def test_adapters_that_were_there_before():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["value", "query"]), models.build("bert"))
    names = estimated(tightfit.apply(model, Velora(groups=8, where="value|query")).model)
    assert len(names) == 4 and all(name.endswith(".lora_A.default") for name in names)


# -- what is exact, and what the estimate is --------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("others", RECIPES, ids=str)
def test_outputs_are_bit_equal(family, others):
    dtype, found = torch.bfloat16 if Checkpointing() in others else torch.float32, []
    for recipe in ([*others, Velora(groups=8)], list(others)):
        model = applied_to(family, *recipe, dtype=dtype).model if recipe else models.build(family).to(dtype)
        torch.manual_seed(5)
        found.append(model(**models.batch(model)).logits)
    # a decoder's head does not make its logits at once under FusedOps: those are stock's up to rounding
    assert torch.equal(*(t + 0 for t in found))


@each_family
@pytest.mark.parametrize("lora", [False, True])
def test_only_the_estimated_weights_differ_from_stock(family, lora):
    others = [Lora(rank=2)] if lora else []
    applied = applied_to(family, *others, Velora(groups=8), dtype=torch.float64)
    stock = models.build(family).double()
    if others:
        torch.manual_seed(3)
        tightfit.apply(stock, others)
    if lora:  # an untrained lora_B is zero, and so is then every gradient of lora_A
        for model in (applied.model, stock):
            torch.manual_seed(4)
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.data.normal_()
    batch = models.batch(stock)
    (loss, grads), (wanted_loss, wanted) = gradients(applied.model, batch), gradients(stock, batch)
    assert torch.equal(loss, wanted_loss)
    weights = {f"{name}.weight" for name in estimated(applied.model)}
    assert set(grads) == set(wanted) and weights < set(wanted)
    for name, grad in grads.items():
        if name in weights:
            assert not torch.allclose(grad, wanted[name], rtol=0.1, atol=0), name
        else:
            torch.testing.assert_close(grad, wanted[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@each_family
@pytest.mark.parametrize("lora", [False, True])
def test_weight_gradients_are_those_of_the_estimate(family, lora):
    recipe = [Velora(groups=7, scale=0.5)] + [Lora(rank=2)] * lora
    model = applied_to(family, *recipe, dropout=0.0).model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    seen, batch = {}, models.batch(model)

    def hook(module, inputs, output):
        seen[module] = [inputs[0].detach(), None]
        output.register_hook(lambda grad: seen[module].__setitem__(1, grad))

    layers = estimated(model)
    for layer in layers.values():
        layer.register_forward_hook(hook)
    gradients(model, batch)
    for name, layer in layers.items():
        (x, grad), codec = seen[layer], state_of(layer, Estimated)["codec"]
        mask = batch["attention_mask"] if x.shape[:2] == batch["attention_mask"].shape else None
        if family != "t5":  # its decoder's queries see no padding of their own
            wanted = ref.average_direction(x[mask.bool()], 7)
            torch.testing.assert_close(codec.direction, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        wanted = ref.weight_grad(x, grad, codec.direction, 7, 0.5)
        torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-4, atol=1e-6)


def test_an_input_that_others_rebuild_gives_the_exact_gradient():
    recipe = [FusedOps(), Lora(rank=2)]
    found = []
    for more in ([Velora(groups=8)], []):
        model = applied_to("llama", *recipe, *more, dtype=torch.float64).model
        batch = models.batch(model)
        found.append((gradients(model, batch)[1], saved_bytes(lambda m=model, b=batch: m(**b).loss.backward())))
    (grads, kept), (wanted, fused_kept) = found
    assert kept == fused_kept
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-12, atol=1e-12)


def test_padding_does_not_move_the_direction():
    applied = applied_to("bert", Velora(groups=8), dropout=0.0)
    batch = models.batch(applied.model)
    alike = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)}
    twin = copy.deepcopy(applied.model)
    applied.model(**batch)
    twin(**alike)
    for name, layer in estimated(applied.model).items():
        other = state_of(twin.get_submodule(name), Estimated)["codec"]
        torch.testing.assert_close(state_of(layer, Estimated)["codec"].direction, other.direction)


# -- what is kept -----------------------------------------------------------------------------------------------------


@each_init
def test_saved_bytes_of_a_layer(init):
    model = applied_to("llama", Velora(groups=8, init=init, where="down_proj")).model
    stock, batch = models.build("llama"), models.batch(model)
    found, wanted = (saved_bytes(lambda m=m: m(**batch).loss.backward()) for m in (model, stock))
    rows, width = batch["input_ids"].numel(), 64
    promised = Subtoken(width, 8, init).nbytes((rows, width), torch.float32)
    assert wanted - found == 2 * (rows * width * 4 - promised)


COMBINED = [
    ("bert", RECIPES[0], "batch_average_once"),
    ("llama", RECIPES[1], "batch_average_once"),
    ("bert", RECIPES[2], "random_unbiased"),
    ("llama", RECIPES[3], "random_unbiased"),
    *(pytest.param("t5", others, "batch_average", marks=pytest.mark.slow) for others in RECIPES),
]


@pytest.mark.parametrize(("family", "others", "init"), COMBINED)
def test_planned_bytes_are_kept_bytes(family, others, init):
    model = applied_to(family, *others, Velora(groups=8, init=init, where="*")).model
    batch = models.batch(model)
    planned = simulate(model, batch).saved_bytes
    for _ in range(2):  # the first step settles the directions
        assert saved_bytes(lambda: model(**batch).loss.backward()) == planned


@in_turn
def test_a_plan_consumes_nothing_and_is_right(family):
    gc.collect()
    others = live_bytes()
    applied = applied_to(family, Velora(groups=8), Lora(rank=2), dropout=0.1)
    model, part = applied.model, applied.part(Directions)
    batch = models.batch(model)
    first = simulate(model, batch, optimizer="sgd").peak_bytes
    assert not any(codec.settled or codec.direction.any() for codec in part.codecs.values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert all(codec.settled for codec in part.codecs.values())
    planned = simulate(model, batch, optimizer="sgd").peak_bytes
    assert planned == pytest.approx(first, rel=1e-3)
    assert planned == pytest.approx(allocator_peak(step) - others, rel=3e-3)


def test_a_plan_without_weights_is_that_of_the_model():
    real = models.build("llama")
    recipe = tightfit.chain(Velora(groups=8), Lora(rank=2))
    batch = models.batch(real)
    empty = tightfit.skeleton(real.config, task="causal-lm")
    plans = [tightfit.plan(m, recipe, batch=batch, optimizer="sgd") for m in (real, empty)]
    assert plans[0].by_category == plans[1].by_category and not plans[0].conflicts


def test_nothing_is_kept_in_evaluation_nor_without_gradients():
    applied = applied_to("bert")
    batch = models.batch(applied.model)
    logits(applied.model, batch)
    with torch.no_grad():
        applied.model(**batch)
    applied.model.eval()
    stock = models.build("bert").eval()
    found, wanted = (gradients(m, batch)[1] for m in (applied.model, stock))
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
    assert applied.report()["methods"]["Velora"]["directions_settled"] == 0


# -- with others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "init"), [*zip((*FAMILIES, "bert"), INITS, strict=True)])
def test_recomputed_blocks_give_the_same_gradients(family, init):
    found = []
    for others in ((), (Checkpointing(),)):
        model = applied_to(family, Velora(groups=8, init=init), *others).model
        batch = models.batch(model)
        gradients(model, batch, seed=1)
        found.append(gradients(model, batch, seed=2)[1])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


@each_family
@pytest.mark.parametrize("lora", [False, True])
def test_under_autocast(family, lora):
    model = applied_to(family, *[Lora(rank=2)] * lora, Velora(groups=8), dropout=0.0).model
    twin, batch = copy.deepcopy(model), models.batch(model)
    (loss, found), (wanted_loss, wanted) = gradients(model, batch, autocast=True), gradients(twin, batch)
    torch.testing.assert_close(loss.float(), wanted_loss, rtol=0.05, atol=0.05)
    assert set(found) == set(wanted)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert (grad - wanted[name]).norm() <= 0.1 * wanted[name].norm() + 1e-3, name


def test_gradients_accumulate():
    model = applied_to("bert", dropout=0.0).model
    twin, batches = copy.deepcopy(model), [models.batch(model, seed=s) for s in (1, 2)]
    both = gradients(model, *batches)[1]
    one, two = (gradients(twin, batch)[1] for batch in batches)  # the first batch of both settles the direction
    for name, grad in both.items():
        torch.testing.assert_close(grad, one[name] + two[name], rtol=1e-5, atol=1e-7)


def test_a_deepcopy_has_its_own_directions():
    applied = applied_to("llama", Velora(groups=8), Lora(rank=2))
    twin, batch = copy.deepcopy(applied.model), models.batch(applied.model)
    gradients(twin, batch)
    assert applied.report()["methods"]["Velora"] == {
        "layers": 4,
        "channels_per_number": [4, 8],
        "directions_settled": 0,
    }
    gradients(applied.model, batch)
    for name, layer in estimated(applied.model).items():
        ours, other = (state_of(m, Estimated)["codec"].direction for m in (layer, twin.get_submodule(name)))
        assert ours is not other and torch.equal(ours, other)


@each_init
@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_run_goes_on_to_the_same_bits(init, lora, tmp_path):
    recipe = [Velora(groups=8, init=init)] + [Lora(rank=2)] * lora
    applied = applied_to("llama", *recipe)
    model, batches = applied.model, [models.batch(applied.model, seed=s) for s in (1, 2)]
    train(model, applied.optimizer(torch.optim.SGD, lr=0.1), batches[0], 2)
    applied.save(tmp_path)
    torch.manual_seed(77)
    again = tightfit.load(models.build("llama"), tmp_path)
    found = []
    for run in (applied, again):
        train(run.model, run.optimizer(torch.optim.SGD, lr=0.1), batches[1], 3)
        found.append(dict(run.model.named_parameters()))
    assert all(torch.equal(found[1][name], p) for name, p in found[0].items())


def test_the_checkpoint_is_stock(tmp_path):
    applied = applied_to("bert")
    stock = models.build("bert")
    gradients(applied.model, models.batch(stock))
    assert list(applied.stock_state_dict()) == list(stock.state_dict()) == list(applied.model.state_dict())
    applied.export(tmp_path / "stock")
    _, info = type(stock).from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(applied.remove()) is type(stock)
    assert not estimated(stock)


def test_another_estimator_on_the_same_layer_is_refused():
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(ConflictError, match=r"Velora and WtaCrs both take over model.layers.0.mlp.down_proj"):
        tightfit.apply(model, [Velora(groups=8), WtaCrs()])
    assert_same(before, snapshot(model))
    applied = tightfit.apply(model, [Velora(groups=8, where="down_proj"), WtaCrs(where="q_proj|o_proj")])
    assert torch.isfinite(train(model, applied.optimizer(lr=1e-3), models.batch(model), 1)[0] * torch.ones(1)).all()


@in_turn
def test_mesa_keeps_what_velora_does_not(family):
    batch_of = models.batch
    model = applied_to(family, Mesa(), Velora(groups=8)).model
    assert simulate(model, batch_of(model)).saved_bytes == saved_bytes(lambda: model(**batch_of(model)).loss.backward())


def test_masks_do_not_outlive_a_block():
    applied = applied_to("bert")
    gradients(applied.model, models.batch(applied.model))
    codec, plain = Subtoken(32, 8), Subtoken(32, 8)
    x = torch.randn(3, 9, 32)
    codec.encode(x)
    with attention_masks():
        plain.encode(x)
    assert torch.equal(codec.direction, plain.direction)


@pytest.mark.parametrize("lora", [False, True])
def test_training_lowers_the_loss(lora):
    applied = applied_to("llama", *[Lora(rank=4)] * lora, Velora(groups=8), dropout=0.0)
    losses = train(applied.model, applied.optimizer(lr=1e-2), models.batch(applied.model), 10)
    assert losses[-1] < 0.95 * losses[0]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"groups": 0}, ValueError, r"Velora\(groups=...\): got 0, accepted is an int >= 1"),
        ({"groups": 2.0}, TypeError, r"Velora\(groups=...\): got 2.0 \(float\)"),
        ({"groups": True}, TypeError, r"Velora\(groups=...\): got True"),
        ({"init": "batch_mean"}, ValueError, r"Velora\(init=...\): got 'batch_mean', accepted is one of"),
        ({"scale": 0}, ValueError, r"Velora\(scale=...\): got 0, accepted is a number in \(0, inf\)"),
        ({"scale": float("nan")}, ValueError, r"Velora\(scale=...\): got nan"),
        ({"scale": "1"}, TypeError, r"Velora\(scale=...\): got '1'"),
        ({"where": ""}, ValueError, r"Velora\(where=...\)"),
    ],
)
def test_wrong_fields_are_refused_at_construction(fields, kind, message):
    with pytest.raises(kind, match=message):
        Velora(**fields)


def test_layers_it_cannot_work_on_are_refused():
    model = models.build("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Velora\(groups=33\): .*layer.0.attention.self.value has 32 input channels"):
        tightfit.apply(model, Velora(groups=33))
    with pytest.raises(SelectorError, match=r"Velora: where='valeu': .*did you mean 'value'"):
        tightfit.apply(model, Velora(where="valeu"))
    with pytest.raises(SelectorError, match=r"none of its 4 layers trains .* put adapters on these with Lora\(where"):
        tightfit.apply(model, [Lora(where="query"), Velora(groups=8)])
    assert_same(before, snapshot(model))
    bare = tightfit.skeleton(hf.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=64))
    with pytest.raises(SelectorError, match=r"XLNetModel hold no value or down projection of a known name"):
        tightfit.apply(bare, Velora())


def test_double_backward_is_refused():
    model = applied_to("bert").model
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(model(**models.batch(model)).loss, model.parameters(), create_graph=True)
