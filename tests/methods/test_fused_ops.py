"""FusedOps: the outputs and gradients of stock from fewer kept tensors."""

import copy
import gc

import models
import pytest
import torch
import transformers as hf
from checks.state import gradients

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, PartialEmbedding
from tightfit.core.errors import SelectorError
from tightfit.core.memory import allocator_peak, live_bytes, saved_bytes
from tightfit.core.simulate import example_batch, simulate
from tightfit.core.tight import is_tight
from tightfit.methods.operators.modules import FusedGate


def twin(family, *recipe, dtype=torch.float64, **options):
    """A stock model and a copy with FusedOps and the recipe applied, and the stock one with the recipe alone."""
    stock = models.build(family, **options).to(dtype)
    fused = copy.deepcopy(stock)
    torch.manual_seed(3)
    applied = tightfit.apply(fused, [FusedOps(), *recipe])
    if recipe:
        torch.manual_seed(3)
        stock = tightfit.apply(stock, list(recipe)).model
    return stock, applied


def assert_equal_gradients(stock, fused, batch, *, tolerance):
    (loss, grads), (wanted_loss, wanted) = gradients(fused, batch), gradients(stock, batch)
    torch.testing.assert_close(loss, wanted_loss, rtol=tolerance, atol=tolerance)
    assert set(grads) == set(wanted) and wanted
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradients_are_those_of_stock(family, dropout):
    stock, applied = twin(family, dropout=dropout)
    # decoders take their loss in float32, root-mean-square norms their mean
    tolerance = 1e-12 if family in ("bert", "roberta") else 1e-6
    assert_equal_gradients(stock, applied.model, models.batch(stock), tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_outputs_are_bit_equal(family, dtype):
    stock, applied = twin(family, dtype=dtype)
    batch = models.batch(stock)
    outputs = []
    for model in (stock, applied.model):
        torch.manual_seed(5)
        outputs.append(model(**batch).logits)
    assert torch.equal(*outputs)


def test_other_architectures():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words = {"vocab_size": 99, "pad_token_id": 0}
    decoder = {**size, "num_key_value_heads": 1, **words}
    distil = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, **words}
    mamba = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}
    opt = {**size, "ffn_dim": 64, "word_embed_proj_dim": 32, **words}
    for config, kind in (
        (hf.DistilBertConfig(**distil), hf.DistilBertForTokenClassification),
        (hf.ElectraConfig(**size, embedding_size=32, **words), hf.ElectraForSequenceClassification),
        (hf.ModernBertConfig(**size, **words), hf.ModernBertForSequenceClassification),
        (hf.ViTConfig(**size, image_size=32, patch_size=16), hf.ViTForImageClassification),
        (hf.Qwen3Config(**decoder, head_dim=16), hf.Qwen3ForCausalLM),
        (hf.MistralConfig(**decoder, head_dim=16, sliding_window=4), hf.MistralForCausalLM),
        (hf.OPTConfig(**opt), hf.OPTForCausalLM),
        (hf.GPTNeoXConfig(**size, **words), hf.GPTNeoXForCausalLM),
        (hf.Phi3Config(**decoder), hf.Phi3ForCausalLM),
        # its norm is also given a gate
        (hf.Mamba2Config(**mamba, hidden_size=32, num_hidden_layers=2, **words), hf.Mamba2ForCausalLM),
    ):
        torch.manual_seed(0)
        stock = kind(config).double().train()
        batch = example_batch(stock, 2, 8)
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        fused = copy.deepcopy(stock)
        tightfit.apply(fused, FusedOps())
        assert_equal_gradients(stock, fused, batch, tolerance=1e-6)


def gated_t5():
    size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 120}
    config = hf.T5Config(**size, feed_forward_proj="gated-gelu", dropout_rate=0.3, decoder_start_token_id=0)
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(config)


class GELU(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class SiLU(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.5 * x)


@pytest.mark.parametrize("kind", [GELU, SiLU, lambda: torch.nn.SiLU(inplace=True)])
def test_activations_that_only_have_the_name(kind):
    stock = models.build("bert").double()
    for layer in stock.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = kind()
    assert_equal_gradients(stock, after_applying(stock, FusedOps()), models.batch(stock), tolerance=1e-12)


def fused_gates(model):
    return sum(is_tight(module, FusedGate) for module in model.modules())


def after_applying(stock, recipe):
    fused = copy.deepcopy(stock)
    before = torch.get_rng_state()
    tightfit.apply(fused, recipe)
    assert torch.equal(torch.get_rng_state(), before)
    return fused


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_gated_mlp_keeps_its_dropout_in_whatever_mode_it_is_found(mode):
    stock = getattr(gated_t5().double(), mode)()
    fused = after_applying(stock, FusedOps())
    assert fused_gates(fused) == 4
    assert_equal_gradients(stock.train(), fused.train(), models.batch(stock), tolerance=1e-6)
    assert_equal_gradients(stock.eval(), fused.eval(), models.batch(stock), tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gated_mlp_whose_last_layer_stays_in_float32(dtype):
    stock = gated_t5().train().to(dtype)
    for name, parameter in stock.named_parameters():
        if ".wo." in name:  # as `from_pretrained` leaves them
            parameter.data = parameter.data.float()
    assert_equal_gradients(stock, after_applying(stock, FusedOps()), models.batch(stock), tolerance=2e-2)


class Gated(torch.nn.Module):
    """An MLP that is gated but for what `odd` says."""

    def __init__(self, odd):
        super().__init__()
        self.odd, self.drop = odd, 0.5
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(32, 32, bias=False) for _ in range(3))
        self.act_fn = torch.nn.SiLU(inplace=odd == "an activation in place")
        self.dropout = torch.nn.Dropout(0.5 if "module" in odd else 0.0)
        self.factor = torch.nn.Parameter(torch.ones(())) if odd == "a factor" else 1

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.odd == "a clamp":
            gate, up = gate.clamp(max=10.0), up.clamp(min=-10.0, max=10.0)
        if self.odd == "float32 inside":
            return self.down_proj((self.act_fn(gate.float()) * up.float()).to(gate.dtype))
        out = self.down_proj(self.act_fn(gate) * up * self.factor)
        if self.odd == "a dropout function behind":
            return torch.nn.functional.dropout(out, self.drop, self.training)
        return self.dropout(out) if self.odd == "a dropout module behind" else out


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_the_activation_of_a_gated_mlp(kind):
    stock, applied = twin("llama", dropout=0.0)
    heard = []

    def hook(module, *seen):
        (value,) = seen[0] if kind != "forward" else seen[1:]
        heard.append(kind)
        return value * 2 if kind == "forward" else (value * 2,)

    for model in (stock, applied.model):
        getattr(model.model.layers[0].mlp.act_fn, f"register_{kind}_hook")(hook)
    assert_equal_gradients(stock, applied.model, models.batch(stock), tolerance=1e-6)
    assert len(heard) == 2


ODD = ["a clamp", "float32 inside", "a factor", "a dropout function behind", "a dropout module behind"]
ODD += ["an activation in place"]


@pytest.mark.parametrize("odd", ODD)
def test_what_only_looks_like_a_gated_mlp(odd):
    torch.manual_seed(0)
    stock = models.build("llama")
    for layer in stock.model.layers:
        layer.mlp = Gated(odd)
    stock.bfloat16().eval()
    fused = after_applying(stock, FusedOps())
    assert fused_gates(fused) == 0
    assert_equal_gradients(stock.train(), fused.train(), models.batch(stock), tolerance=2e-2)


def _falcon(**kw):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    return hf.FalconForCausalLM(hf.FalconConfig(**size, hidden_dropout=0.0, attention_dropout=0.0, **kw))


@pytest.mark.parametrize("recipe", [FusedOps(), Mesa(attention=True)])
@pytest.mark.parametrize("make", [_falcon, lambda: _falcon(alibi=True), models.deepseek_sparse])
def test_models_that_ask_for_the_name_of_their_attention_keep_it(make, recipe):
    torch.manual_seed(0)
    stock = make().train()
    batch = example_batch(stock, 3, 24)
    fused = copy.deepcopy(stock)
    tightfit.apply(fused, recipe)
    torch.testing.assert_close(fused(**batch).loss, stock(**batch).loss, rtol=1e-6, atol=0)
    if recipe.exact:
        assert_equal_gradients(stock, fused, batch, tolerance=1e-4)


# -- what is kept -------------------------------------------------------------------------------------------------


def block_bytes(model, size):
    """Saved bytes of the blocks of a model without weights, in one simulated step."""
    found = simulate(model, example_batch(model, *size, padded=False), optimizer="sgd", extrapolate=False)
    return sum(count for name, count in found.saved_by_module.items() if "layer" in name)


def bert(dropout):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf.BertForSequenceClassification(hf.BertConfig(**rates, num_hidden_layers=4, vocab_size=99))


def llama(dtype=torch.float32):
    config = hf.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=2, num_attention_heads=8, vocab_size=99
    )
    return hf.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize(
    ("make", "size", "least"),
    [
        (lambda: llama(), (4, 256), 2.0),
        (lambda: llama(torch.bfloat16), (4, 256), 1.9),
        (lambda: bert(0.1), (16, 128), 2.5),
        (lambda: bert(0.0), (16, 128), 1.7),
    ],
    ids=["llama", "llama bf16", "bert", "bert without dropout"],
)
def test_blocks_keep_less(make, size, least):
    with torch.device("meta"):
        stock, fused = make().train(), make().train()
    tightfit.apply(fused, FusedOps())
    assert block_bytes(stock, size) / block_bytes(fused, size) >= least


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_planned_bytes_are_kept_bytes(family):
    _, applied = twin(family, dtype=torch.float32)
    batch = models.batch(applied.model)
    assert simulate(applied.model, batch).saved_bytes == saved_bytes(lambda: applied.model(**batch).loss.backward())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_a_plan_leaves_nothing_behind_and_is_right(family):
    gc.collect()
    others = live_bytes()
    stock, applied = twin(family, dtype=torch.float32, dropout=0.1)
    batch = models.batch(stock)
    del stock
    planned = simulate(applied.model, batch, optimizer="sgd").peak_bytes
    optimizer = torch.optim.SGD(applied.model.parameters(), lr=0.0)

    def step():
        applied.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert planned == pytest.approx(allocator_peak(step) - others, rel=3e-3)


def test_attention_with_a_learned_bias_keeps_no_probabilities():
    import transformers as hf

    def kept(length, *recipe):
        with torch.device("meta"):
            size = {"num_layers": 2, "num_decoder_layers": 2, "d_model": 64, "d_ff": 64, "num_heads": 4, "d_kv": 16}
            model = hf.T5ForConditionalGeneration(hf.T5Config(**size, decoder_start_token_id=0)).train()
        batch = {"input_ids": torch.ones(2, length, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long)}
        return simulate(tightfit.apply(model, list(recipe)).model, batch).saved_bytes

    # what grows with the square of the length; a head's share of it in float32 for one row
    square = {r: kept(192, *r) - 2 * kept(128, *r) + kept(64, *r) for r in ((), (FusedOps(),))}
    share = 2 * 64 * 64 * 4
    blocks = 2 * 2 * 4 * share
    assert square[()] > 2 * blocks
    # the bias of all heads and its buckets (int64) once for all blocks; of each block a bit for a probability
    assert square[FusedOps(),] == 4 * share + 2 * share + blocks // 32


def test_adapters_keep_nothing_of_their_inputs():
    stock, applied = twin("bert", Lora(rank=2), dtype=torch.float32)
    batch = models.batch(stock)
    plain, fused = (saved_bytes(lambda m=m: m(**batch).loss.backward()) for m in (stock, applied.model))
    assert fused < 0.6 * plain


# -- with others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("other", ["lora", "lora with dropout", "checkpointing", "partial embedding"])
def test_other_methods_in_the_recipe(family, other):
    model = models.build(family)
    dropped = {"peft_type": "LORA", "r": 2, "lora_dropout": 0.3, "target_modules": "all-linear"}
    recipe = {
        "lora": Lora(rank=2),
        "lora with dropout": Lora(config=dropped),
        "checkpointing": Checkpointing(),
        "partial embedding": PartialEmbedding(ids=models.kept_ids(model), force=True, head="full"),
    }[other]
    stock, applied = twin(family, recipe)
    assert_equal_gradients(stock, applied.model, models.batch(model), tolerance=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_checkpointed_blocks_under_hooks_on_what_is_kept(family):
    stock, applied = twin(family, Checkpointing(offload=True), dropout=0.1)
    batch = models.batch(stock)
    assert simulate(applied.model, batch).saved_bytes == saved_bytes(lambda: applied.model(**batch).loss.backward())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert_equal_gradients(stock, applied.model, batch, tolerance=1e-6)


def test_two_forwards_then_one_backward():
    stock, applied = twin("bert", dropout=0.0)
    batches = [models.batch(stock, seed=s) for s in (1, 2)]
    found = []
    for model in (stock, applied.model):
        model.zero_grad()
        sum(model(**batch).loss for batch in batches).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for ours, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_a_kept_graph_gives_the_same_gradients_twice():
    _, applied = twin("bert")
    loss = applied.model(**models.batch(applied.model)).loss
    parameters = list(applied.model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_call_with_other_parameters():
    stock, applied = twin("llama")
    found = []
    for model in (stock, applied.model):
        given = {name: p.detach().clone().requires_grad_() for name, p in stock.named_parameters()}
        if model is applied.model:
            with torch.no_grad():
                _ = [p.add_(1.0) for p in model.parameters()]
        torch.func.functional_call(model, given, (), models.batch(stock)).loss.backward()
        found.append({name: p.grad for name, p in given.items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_a_compiled_model_runs_stock_operators():
    stock, applied = twin("bert", dropout=0.0)
    applied.model.compile(backend="aot_eager")
    assert_equal_gradients(stock, applied.model, models.batch(stock), tolerance=1e-10)


def test_removal_restores_the_attention():
    model = models.build("bert")
    applied = tightfit.apply(model, FusedOps())
    assert model.config._attn_implementation == "tightfit_sdpa"
    applied.remove()
    assert model.config._attn_implementation == "sdpa"


def test_chosen_modules_only():
    model = models.build("bert")
    rows = tightfit.plan(model, FusedOps(where="intermediate.*|output.dense"), batch=(2, 8)).edits
    found = {row.target: row.note for row in rows if row.target not in ("(block)", "(lora)")}
    assert found == {"(linear)": "6 x linear", "(activation)": "2 x activation"}


def test_bad_input():
    with pytest.raises(TypeError, match=r"FusedOps\(loss=...\): got 1"):
        FusedOps(loss=1)
    with pytest.raises(ValueError, match=r"FusedOps\(where=...\): got 'a\|'"):
        FusedOps(where="a|")
    with pytest.raises(SelectorError, match="'no_such'"):
        tightfit.apply(models.build("bert"), FusedOps(where="no_such"))
    with pytest.raises(SelectorError, match=r"no module .* that where='encoder' matches has a fused form"):
        tightfit.apply(models.build("bert"), FusedOps(where="encoder"))
    model = models.build("bert")
    applied = tightfit.apply(model, FusedOps())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(
            applied.model(**models.batch(model)).loss, model.parameters(), create_graph=True, allow_unused=True
        )


def test_adapters_of_another_type_keep_no_copies_of_their_inputs():
    stock, applied = twin("llama", Lora(rank=2), dtype=torch.bfloat16)
    assert {p.dtype for p in applied.parameters()} == {torch.float32}
    batch = models.batch(stock)
    plain, fused = (saved_bytes(lambda m=m: m(**batch).loss.backward()) for m in (stock, applied.model))
    assert fused < 0.35 * plain
    for name, grad in gradients(applied.model, batch)[1].items():
        wanted = gradients(stock, batch)[1][name]
        assert (grad - wanted).norm() <= 0.02 * wanted.norm() + 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["recipe", "before"])
def test_adapters_on_the_head_leave_the_gradient_behind_it_whole(family, where):
    import peft

    first = "q_proj" if family == "llama" else "c_attn"
    config = peft.LoraConfig(r=2, target_modules=[first, "lm_head"])
    found = []
    for fused in ([], [FusedOps()]):
        torch.manual_seed(1)
        model = models.build(family, dropout=0.0)
        batch = models.batch(model)
        if where == "before":
            model = peft.get_peft_model(model, config)
        tightfit.apply(model, [*([Lora(config=config)] if where == "recipe" else []), *fused])
        found.append(gradients(model, batch)[1])
    expected, gradient = found
    assert any(first in name and value.abs().max() > 0 for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-6)
