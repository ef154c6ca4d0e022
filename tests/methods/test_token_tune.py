"""TokenTune: forward values of the stock model, gradients through the selected tokens only."""

from __future__ import annotations

import copy

import pytest
import token_tune_cases as cases
import torch
import transformers as hf
from token_tune_cases import ARCHITECTURES, DECODERS, IMAGES, batch, build, gap, gradients, positions, reference_loss

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, TokenTune, chain
from tightfit.methods.token_tune.tuner import Tuner

ENCODERS_SIDE = ("bert-span", "distilbert", "electra", "roberta", "bert-class", "bart")
PADDINGS = [
    pytest.param(name, padding, id=f"{name}-{padding or 'none'}", marks=() if padding == "right" else pytest.mark.slow)
    for name in ARCHITECTURES
    for padding in ("right", "left", None)
    if not (name in IMAGES and padding) and not (padding == "left" and name in ENCODERS_SIDE)
]
FEW = ("bert", "llama", "vit", "bart")


def some(*names):
    """A few architectures in the quick tests, the others in the slow ones."""
    marked = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked)


each = some(*ARCHITECTURES)


@pytest.fixture(autouse=True)
def in_float64():
    with cases.doubles():
        yield


def tuned(name, *others, **fields):
    """A model with TokenTune on it, half of its tokens by default."""
    model = build(name)
    if not {"ratio", "count"} & set(fields):
        fields["ratio"] = 0.5
    return model, tightfit.apply(model, chain(TokenTune(**fields), *others))


def losses(model, inputs, pos=None):
    return model(**inputs, **({} if pos is None else {"token_positions": pos})).loss


@pytest.mark.slow  # the next test compares the losses
@pytest.mark.parametrize(("name", "padding"), PADDINGS)
def test_selected_rows_are_the_stock_models(name, padding):
    model = build(name)
    inputs = batch(model, padding)
    runner = cases.runner_of(model)
    pos = positions(model, inputs)
    call = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")}
    if name == "bart":
        call["encoder_hidden_states"] = torch.randn(3, 7, 16, dtype=torch.float64)
    expected = runner(**call).last_hidden_state
    tightfit.apply(model, TokenTune(ratio=0.5))
    found = runner(**call, token_positions=pos).last_hidden_state
    mask = cases.selected(pos, expected.shape[1])
    assert found.requires_grad
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-12)
    if padding is None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "padding"), PADDINGS)
def test_gradients_are_those_of_explicit_detaching(name, padding):
    model = build(name)
    inputs = batch(model, padding)
    pos = positions(model, inputs)
    loss = reference_loss(model, inputs, pos)
    wanted = gradients(model, loss)
    stock = gradients(model, losses(model, inputs))
    assert gap(wanted, stock) > 1e-3  # the reference does stop something
    tightfit.apply(model, TokenTune(ratio=0.5))
    found_loss = losses(model, inputs, pos)
    torch.testing.assert_close(found_loss, loss, rtol=0, atol=1e-12)
    assert gap(gradients(model, found_loss), wanted) < 1e-12


@each
def test_all_tokens_give_the_stock_gradients(name):
    model = build(name)
    # where an answer begins is a choice among padding too, which is never selected
    inputs = batch(model, None if name == "bert-span" else "right")
    loss = losses(model, inputs)
    wanted = gradients(model, loss)
    real = cases.real(model, inputs)
    every = torch.where(real, torch.arange(real.shape[1]), -1)
    tightfit.apply(model, TokenTune(ratio=0.5))
    found = losses(model, inputs, every)
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-12)
    assert gap(gradients(model, found), wanted) < 1e-12


@each
def test_the_order_of_positions_and_checkpointing_change_nothing(name):
    model, applied = tuned(name)
    inputs = batch(model)
    pos = positions(model, inputs)
    wanted = gradients(model, losses(model, inputs, pos))
    assert gap(gradients(model, losses(model, inputs, pos.flip(1))), wanted) < 1e-12
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert gap(gradients(model, losses(model, inputs, pos)), wanted) < 1e-12
    applied.remove()


@some(*(n for n in ARCHITECTURES if n not in (*IMAGES, "bart")))
def test_blocks_run_twice_give_the_same(name):
    model, applied = tuned(name)
    inputs = batch(model)
    pos = positions(model, inputs)
    loss = losses(model, inputs, pos)
    wanted = gradients(model, loss)
    applied.remove()
    blocks = TokenTune(ratio=0.5, schedule="block")
    for recipe in (blocks, chain(blocks, Checkpointing()), chain(Checkpointing(), blocks)):
        with tightfit.apply(model, recipe):
            found = losses(model, inputs, pos)
            torch.testing.assert_close(found, loss, rtol=0, atol=1e-12)
            assert gap(gradients(model, found), wanted) < 1e-12
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_checkpointed_blocks_keep_their_inputs_only():
    def saved(blocks, *recipe):
        from transformers import LlamaConfig, LlamaForCausalLM

        size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50}
        model = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=blocks)).train()
        return tightfit.plan(model, list(recipe), batch=(4, 40), optimizer="sgd").simulation.saved_bytes

    tokens = TokenTune(ratio=0.25, schedule="block")
    kept = (saved(5, tokens, Checkpointing()) - saved(3, tokens, Checkpointing())) / 2
    inputs = 4 * (40 + 10) * 64 * 4  # of all tokens and of the selected ones
    assert inputs <= kept <= inputs + 512
    assert (saved(5, tokens) - saved(3, tokens)) / 2 > 4 * kept


@pytest.mark.parametrize("padding", [None, "left"])
@some(*DECODERS, "llama-class")
def test_a_suffix_behind_a_cached_prefix_gives_the_same(name, padding):
    model = build(name)
    inputs = batch(model, padding, length=12)
    found = []
    for schedule in ("model", "block", "suffix"):
        with tightfit.apply(model, TokenTune(count=5, policy="suffix", schedule=schedule)):
            # a decoder keeps its first token; without padding name the last ones alone
            pos = torch.arange(7, 12).expand(3, 5)
            loss = losses(model, inputs, None if schedule == "suffix" else pos)
            found.append((loss, gradients(model, loss)))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=0, atol=1e-12)
        assert gap(grads, found[0][1]) < 1e-12


@each
def test_unselected_ids_get_no_gradient(name):
    if name in IMAGES:
        pytest.skip("no ids")
    model, _applied = tuned(name)
    inputs = batch(model)
    runner = cases.runner_of(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table = runner.get_input_embeddings().weight
    if head is not None and head.weight is table:
        pytest.skip("its table is the head too")
    pos = positions(model, inputs)
    losses(model, inputs, pos).backward()
    mask = cases.selected(pos, inputs["input_ids"].shape[1])
    used = set(inputs["input_ids"][mask].tolist())
    touched = set(table.grad.abs().sum(1).nonzero().flatten().tolist())
    assert touched
    assert touched <= used


@some(*DECODERS)
def test_what_stands_behind_the_selection_does_not_matter(name):
    model, _applied = tuned(name)
    model.router_aux_loss_coef = 0.0  # a balance loss looks at all tokens
    inputs = batch(model, None)
    pos = torch.tensor([[0, 2, 4]] * 3)
    wanted = gradients(model, losses(model, inputs, pos))
    inputs["input_ids"][:, 7:] = (inputs["input_ids"][:, 7:] + 5) % 45 + 3
    assert gap(gradients(model, losses(model, inputs, pos)), wanted) < 1e-12


def test_same_seed_same_sets_and_the_state_is_saved(tmp_path):
    def draws(seed, steps=3):
        model, applied = tuned("llama", seed=seed)
        inputs = batch(model)
        return model, applied, [float(losses(model, inputs).detach()) for _ in range(steps)]

    model, applied, first = draws(1)
    assert draws(1)[2] == first
    assert draws(2)[2] != first
    assert len(set(first)) > 1
    applied.save(tmp_path)
    inputs = batch(model)
    following = float(losses(model, inputs).detach())
    again = build("llama")
    tightfit.load(again, tmp_path)
    assert float(losses(again, inputs).detach()) == following
    twin = copy.deepcopy(model)
    assert float(losses(twin, inputs).detach()) == float(losses(model, inputs).detach())


@each
def test_names_and_evaluation_stay_stock(name):
    model = build(name)
    inputs = batch(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._attn_implementation
    model.eval()
    expected = model(**inputs)
    with tightfit.apply(model, TokenTune(count=3)):
        assert not model.training
        found = model(**inputs)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert "tightfit" not in model.config.to_json_string()


@some("gpt2", "llama", "gemma3", "bart")
def test_generation_is_unaffected(name):
    model = build(name).eval()
    ids = batch(model, None)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    with tightfit.apply(model, TokenTune(ratio=0.3)):
        assert torch.equal(model.generate(ids, **options), expected)
        model.train()
        losses(model, batch(model)).backward()
        model.eval()
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
@some("bert-class", "llama", "gpt2")
def test_adapters(name, dora):
    model = build(name)
    inputs = batch(model)
    pos = positions(model, inputs)
    config = {"peft_type": "LORA", "r": 2, "use_dora": dora, "target_modules": "all-linear"}
    applied = tightfit.apply(model, chain(Lora(config=config)))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora" in n and p.dim() > 1:
                p.normal_(0, 0.1, generator=generator)
    model.double()
    wanted = gradients(model, loss := reference_loss(model, inputs, pos))
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    applied.remove()
    applied = tightfit.apply(model, chain(TokenTune(ratio=0.5), Lora(config=config)))
    model.double().load_state_dict(values, strict=False)
    found = losses(model, inputs, pos)
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-12)
    assert gap(gradients(model, found), wanted) < 1e-12
    model.eval()
    before = model(**inputs).logits
    merged = applied.merge().eval()
    torch.testing.assert_close(merged(**inputs).logits, before, rtol=0, atol=1e-10)


@some("bert", "bert-class", "llama", "gpt2", "mistral", "vit", "bart")
def test_fused_operators_and_checkpointing_give_the_same(name):
    model, applied = tuned(name)
    inputs = batch(model)
    pos = positions(model, inputs)
    wanted = gradients(model, losses(model, inputs, pos))
    applied.remove()
    for others in ([FusedOps()], [Checkpointing()], [FusedOps(), Checkpointing()]):
        with tightfit.apply(model, chain(TokenTune(ratio=0.5), *others)):
            assert gap(gradients(model, losses(model, inputs, pos)), wanted) < 1e-7  # FusedOps sums in float32


def test_one_mask_for_all_tokens():
    """LayoutLM hands its attention a mask with one row, (B, 1, 1, L)."""
    model = hf.LayoutLMForTokenClassification(hf.LayoutLMConfig(**cases.TEXT, **cases.NO_DROPOUT, num_labels=3))
    model = model.double().train()
    inputs = batch(model) | {"bbox": torch.arange(120).view(3, 10, 4)}
    pos = positions(model, inputs)
    expected = model(**inputs).logits
    tightfit.apply(model, TokenTune(ratio=0.5))
    found = model(**inputs, token_positions=pos).logits
    wanted = expected.gather(1, pos.sort(1).values.clamp_min(0)[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(found[:1], wanted[:1], rtol=0, atol=1e-12)


def test_decoder_ids_are_made_from_labels_as_the_model_does():
    """Blenderbot makes them in its forward, and has no method for it."""
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = hf.BlenderbotConfig(
        **sizes, **heads, d_model=16, vocab_size=50, max_position_embeddings=32, dropout=0.0, decoder_start_token_id=1
    )
    model = hf.BlenderbotForConditionalGeneration(config).double().train()
    inputs = batch(model)
    expected = gradients(model, model(**inputs).loss)
    tightfit.apply(model, TokenTune(count=10))
    assert gap(gradients(model, model(**inputs).loss), expected) < 1e-12


def test_a_tuple_holds_what_the_stock_tuple_holds():
    model = build("qwen3-moe")
    inputs = batch(model, None)
    expected = model(**inputs, return_dict=False)
    tightfit.apply(model, TokenTune(count=10))
    found = model(**inputs, return_dict=False)
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=1e-12)  # loss, balance loss, logits
    torch.testing.assert_close(model(**inputs)[0], expected[0], rtol=0, atol=1e-12)


def test_the_ends_of_an_answer_are_always_selected():
    model, applied = tuned("bert-span", ratio=0.1)
    inputs = batch(model, None)
    tuner = applied.part(Tuner)
    seen = []
    choose = tuner.choose

    def noted(*args, **kwargs):
        seen.append(choose(*args, **kwargs))
        return seen[-1]

    tuner.choose = noted
    model(**inputs)
    chosen = cases.selected(seen[0].positions.masked_fill(~seen[0].valid, -1), 10)
    assert chosen[:, [0, 1, 3]].all()


def test_labels_that_are_shifted_already_stay():
    """The decoders of encoder-decoders, by themselves, compare each token with its own label."""
    config = hf.BartConfig(
        d_model=16,
        encoder_layers=3,
        decoder_layers=3,
        decoder_ffn_dim=24,
        decoder_attention_heads=4,
        vocab_size=50,
        dropout=0.0,
    )
    model = hf.BartForCausalLM(config).double().train()
    inputs = batch(model)
    expected = gradients(model, model(**inputs).loss)
    tightfit.apply(model, TokenTune(count=10))
    assert gap(gradients(model, model(**inputs).loss), expected) < 1e-12
