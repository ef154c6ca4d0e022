"""LadderSide: exact start, no graph in the backbone, the side net against a slow reference, generation."""

import copy
import math

import models
import pytest
import torch
import transformers as hf
from checks.state import gradients, logits, train
from side_cases import DROPS_APART, drops_apart

import tightfit
from tightfit import LadderSide, Lora, Losa, Sherl
from tightfit.core.edits import planning
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.memory import saved_bytes
from tightfit.methods.side.net import small_config

FAMILIES = ("bert", "llama", "t5", "gpt2", "bart", "gemma2", "roberta")
T5 = {"decoder_start_token_id": 0}
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64, **T5}
T5_LARGE = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "d_kv": 64, **T5}
T5_3B = {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128, **T5}


def nets(model):
    return [module for name, module in model.named_modules() if name.endswith("tight_side")]


def shaken(model, seed=5):
    """Side nets that do something: the last layer begins at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for net in nets(model):
            for name, parameter in net.named_parameters():
                if name == "gates":
                    parameter.normal_(std=0.1)
                elif name.startswith("up."):
                    parameter.normal_(std=0.3)
    return model


def built(family, **fields):
    model = models.build(family)
    applied = tightfit.apply(model, LadderSide(**fields))
    return model, applied


# -- start and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_at_the_stock_model_and_reaches_every_parameter(family):
    model = models.build(family)
    batch = models.batch(model)
    stock = logits(model, batch)
    applied = tightfit.apply(model, LadderSide(reduction=4))
    assert torch.equal(logits(model, batch), stock)
    _, first = gradients(model, batch)
    lifted = {name for name in first if ".tight_side.up." in name}
    assert len(lifted) == 2
    assert all(first[name].any() for name in lifted)
    applied.optimizer(torch.optim.SGD, lr=0.1).step()
    _, second = gradients(model, batch)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(second) == trained
    assert all(second[name].any() for name in trained)
    assert all("tight_side" in name or name.startswith("classifier") for name in trained)


@pytest.mark.parametrize("fields", [{"merge": "alpha"}, {"projection": "pool"}, {"init": "random"}])
def test_the_other_exact_starts(fields):
    model = models.build("llama")
    stock = logits(model, models.batch(model))
    tightfit.apply(model, LadderSide(reduction=4, **fields))
    torch.testing.assert_close(logits(model, models.batch(model)), stock, rtol=0, atol=0)


def test_the_share_of_alpha_begins_with_a_dead_side_net():
    model, _ = built("llama", reduction=4, merge="alpha")
    _, found = gradients(model, models.batch(model))
    assert [name for name, grad in found.items() if grad.any()] == ["model.tight_side.share"]


def test_gates_are_halves_and_open_both_ways():
    model, applied = built("llama", reduction=4)
    net = nets(model)[0]
    state, hidden = torch.randn(2, 3, 8), torch.randn(2, 3, 32)
    below = hidden[..., net.channels]
    torch.testing.assert_close(net.mixed(state, hidden, 1), (state + below) / 2)
    assert applied.report()["methods"]["LadderSide"]["shares_of_the_side_state"] == [[0.5, 0.5]]
    with torch.no_grad():
        net.gates.fill_(20.0)
    torch.testing.assert_close(net.mixed(state, hidden, 1), state)
    with torch.no_grad():
        net.gates.fill_(-20.0)
    torch.testing.assert_close(net.mixed(state, hidden, 1), below)


def test_at_the_full_width_the_side_blocks_are_the_blocks():
    model, _ = built("llama", reduction=1)
    net = nets(model)[0]
    for rung, block in enumerate(model.model.layers):
        side = dict(net.block(rung).named_parameters())
        assert all(torch.equal(side[name], p) for name, p in block.named_parameters())
    assert torch.equal(net.norm.weight, model.model.norm.weight)


# -- against a slow reference -----------------------------------------------------------------------------------------


def rotary(model, length, reduction):
    small = small_config(model.config, reduction, 0.0)
    tables = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(small)
    return tables(torch.zeros(1, dtype=torch.double), torch.arange(length)[None])


ROTARY = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TURNING)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**TURNING, bos_token_id=1, eos_token_id=1)),  # in pairs
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**TURNING)),  # half of a head
}
TURNING = {**models.SIZE, "hidden_size": 64, "vocab_size": 50, "max_position_embeddings": 32}


@pytest.mark.parametrize("family", ROTARY)
def test_side_heads_turn_by_distances_as_the_models_do(family):
    torch.manual_seed(0)
    model = ROTARY[family]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    tightfit.apply(model, LadderSide(reduction=2, merge="side"))
    ids, places = torch.arange(1, 11)[None], torch.arange(10)[None]
    here, further = (model(input_ids=ids, position_ids=places + far).logits for far in (0, 7))
    torch.testing.assert_close(here, further, rtol=1e-4, atol=1e-4 * float(here.detach().abs().max()))


def slow(model, base, ids, reduction, projection):
    """Logits of the ladder by hand from the hidden states of the stock model, without padding."""
    net = nets(model)[0]
    states = base(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]  # before the final norm
    states = (*states, last_state(base, ids))
    down = {
        "frozen_linear": lambda tap, h: h[..., net.channels],
        "pool": lambda tap, h: torch.stack([c.mean(-1) for c in h.split(reduction, -1)], -1),
        "linear": lambda tap, h: h @ tap.weight.T + tap.bias,
        "lowrank": lambda tap, h: h @ tap[0].weight.T @ tap[1].weight.T,
    }[projection]
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=torch.double).triu(1)[None, None]
    side = down(net.first, states[0])
    for rung in range(len(states) - 1):
        share = torch.sigmoid(net.gates[rung] / 0.1)
        side = share * side + (1 - share) * down(getattr(net, f"tap_{rung}"), states[rung + 1])
        side = net.block(rung)(side, attention_mask=mask, position_embeddings=rotary(model, length, reduction))
    out = states[-1] + net.up(net.norm(side))
    return base.lm_head(base.model.norm(out))


def last_state(base, ids):
    kept = []
    handle = base.model.norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    base(ids, use_cache=False)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("projection", ["frozen_linear", "pool", "linear", "lowrank"])
def test_the_ladder_is_what_the_paper_says(projection):
    base = models.build("llama").double().eval()
    model = copy.deepcopy(base)
    tightfit.apply(model, LadderSide(reduction=4, projection=projection, rank=3))
    shaken(model)
    ids = models.batch(model)["input_ids"][:1]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, slow(model, base, ids, 4, projection))


# -- what is kept ------------------------------------------------------------------------------------------------------


def kept_and_made(model, batch):
    """Storages that autograd keeps, with the shapes; storages of everything made inside the stock blocks."""
    kept, made, alive = {}, set(), []
    handles = []
    for name, module in model.named_modules():
        if ".layer" in name and "tight_side" not in name:

            def note(module, args, out):
                for value in out if isinstance(out, tuple) else (out,):
                    if torch.is_tensor(value):
                        alive.append(value)  # so that no other tensor gets its place
                        made.add(value.untyped_storage()._cdata)

            handles.append(module.register_forward_hook(note))

    def pack(tensor):
        alive.append(tensor)
        kept[tensor.untyped_storage()._cdata] = tuple(tensor.shape)
        return tensor

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    return {key: shape for key, shape in kept.items() if key not in own}, made, loss


@pytest.mark.parametrize(("projection", "wide"), [("frozen_linear", 0), ("pool", 0), ("linear", 3), ("lowrank", 3)])
def test_nothing_of_the_backbone_is_kept(projection, wide):
    model, _ = built("bert", reduction=4, projection=projection)
    kept, made, _loss = kept_and_made(model, models.batch(model))
    full = [shape for shape in kept.values() if shape[-1:] == (32,) and math.prod(shape) == 3 * 9 * 32]
    assert len(full) == wide  # the blocks' outputs, and the first one's input
    if not wide:
        assert not made & set(kept)


def test_no_gradient_for_the_backbone_and_none_kept_for_more_blocks():
    found = []
    for layers in (4, 8):
        config = hf.BertConfig(**{**models.SIZE, "num_hidden_layers": layers}, vocab_size=120)
        model = hf.BertForSequenceClassification(config).train()
        tightfit.apply(model, LadderSide(reduction=8, keep_layers=(1, 3)))
        batch = models.batch(model)
        found.append(saved_bytes(lambda model=model, batch=batch: model(**batch).loss.backward()))
        assert all(p.grad is None for n, p in model.named_parameters() if "side" not in n and "classifier" not in n)
    assert found[0] == found[1]


def test_dropout_of_the_backbone_is_off_in_training_and_modes_are_left_alone():
    model = models.build("bert", dropout=0.3)
    tightfit.apply(model, LadderSide(reduction=4))
    model.classifier.p = model.dropout.p = 0.0
    modes = [module.training for module in model.modules()]
    batch = models.batch(model)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model(**batch).logits, logits(model, batch))
    other = models.build("bert", dropout=0.3)
    tightfit.apply(other, LadderSide(reduction=4, backbone_dropout=True))
    other.dropout.p = 0.0
    assert not torch.equal(other(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("family", DROPS_APART)
@pytest.mark.parametrize("recipe", [LadderSide(reduction=2), Losa(rank=2), Sherl(reduction=2)], ids=lambda r: r.name)
def test_no_dropout_where_the_head_goes_past_the_backbone_or_the_decoder_drops_itself(recipe, family):
    model = drops_apart(family)
    batch = models.batch(model)
    expected = logits(model, batch)
    tightfit.apply(model, recipe)
    assert torch.equal(model(**batch).logits, expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["opt", "bart decoder"])
def test_a_head_that_goes_past_the_backbone_trains_without_a_cache_too(family):
    model = drops_apart(family)
    tightfit.apply(model, LadderSide(reduction=2))
    assert model(**models.batch(model)).past_key_values is None
    next(model.model.decoder.layers[0].parameters()).requires_grad_(True)
    with pytest.raises(tightfit.ConflictError, match="would never get a gradient"):
        model(**models.batch(model))


def test_dropout_of_the_side_net_is_one_number():
    model, _ = built("bert", reduction=4, dropout=0.25)
    rates = {m.p for m in nets(model)[0].modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    assert {m.p for m in model.bert.encoder.layer.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


# -- counts and plans -------------------------------------------------------------------------------------------------

PUBLISHED = {"projection": "linear", "merge": "side"}


SIZES = pytest.mark.parametrize(
    ("config", "kept", "count"),
    [
        (T5_BASE, (1, 2, 3, 5, 6, 7, 9, 10, 11), 3_878_712),
        (T5_LARGE, tuple(range(1, 24, 2)), 9_057_328),
        (T5_3B, (23,), 2_494_896),
    ],
    ids=["base", "large", "3b"],
)


@SIZES
def test_the_published_sizes(config, kept, count):
    model = tightfit.skeleton(hf.T5Config(**config), task="seq2seq-lm")
    with planning():
        applied = tightfit.apply(model, LadderSide(keep_layers=kept, **PUBLISHED))
    assert sum(p.numel() for p in applied.parameters()) == count


@SIZES
@pytest.mark.slow
def test_the_published_sizes_by_plan(config, kept, count):
    model = tightfit.skeleton(hf.T5Config(**config), task="seq2seq-lm")
    plan = tightfit.plan(model, LadderSide(keep_layers=kept, **PUBLISHED), batch=(1, 4), optimizer="sgd")
    assert plan.trainable_parameters == count


def above_weights(model, recipe, batch):
    found = tightfit.plan(model, recipe, batch=batch, optimizer="sgd")
    phases = found.simulation.phases
    return max(phases["forward"], phases["backward"]) - found.by_category["weights"]


@pytest.mark.parametrize(
    ("config", "task", "batch"),
    [
        (hf.BertConfig, "sequence-classification", (16, 128)),
        pytest.param(lambda: hf.T5Config(**T5_BASE), "seq2seq-lm", (8, 128), marks=pytest.mark.slow),
    ],
    ids=["bert-base", "t5-base"],
)
def test_a_quarter_of_the_stock_peak(config, task, batch):
    model = tightfit.skeleton(config(), task=task)
    assert above_weights(model, LadderSide(), batch) <= 0.25 * above_weights(model, [], batch)


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "by"), [("t5", "call"), ("t5", "config"), ("bart", "call")])
def test_a_tuple_shows_the_encoders_states_as_they_are(family, by):
    model, _ = built(family, reduction=4)
    stock = models.build(family).eval()
    batch = {**models.batch(model), "output_hidden_states": True}
    for each in (model.eval(), stock):
        each.config.return_dict = by != "config"
    if by == "call":
        batch["return_dict"] = False
    found, expected = model(**batch), stock(**batch)
    assert isinstance(found, tuple) and len(found) == len(expected)
    shapes = [[t.shape for t in out if torch.is_tensor(t)] for out in (found, expected)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart", "gemma2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(family, beams):
    model, _ = built(family, reduction=4)
    shaken(model).eval()
    batch = models.batch(model)
    batch.pop("labels")
    if family in ("llama", "gpt2", "gemma2"):  # generation pads on the left
        batch = {key: value.flip(1) for key, value in batch.items()}
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    stock = models.build(family).eval().generate(**batch, **options)
    cached = model.generate(**batch, **options, use_cache=True)
    again = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    assert len(cached.scores) == 6
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(again.scores), rtol=1e-4, atol=1e-4)
    assert (cached.scores[2] - stock.scores[2])[:, 4:].abs().max() > 0.1


def test_padding_on_either_side_changes_nothing():
    model, _ = built("llama", reduction=4)
    shaken(model).eval()
    ids = models.batch(model)["input_ids"][:1]
    blank = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.ones_like(ids)
    alone = logits(model, {"input_ids": ids})
    left = logits(
        model,
        {
            "input_ids": torch.cat([blank, ids], 1),
            "attention_mask": torch.cat([blank, mask], 1),
            "position_ids": torch.cat([blank, torch.arange(ids.shape[1])[None]], 1),
        },
    )
    right = logits(model, {"input_ids": torch.cat([ids, blank], 1), "attention_mask": torch.cat([mask, blank], 1)})
    torch.testing.assert_close(left[:, 4:], alone)
    torch.testing.assert_close(right[:, :-4], alone)


def test_recorded_states_are_the_models_own():
    model, _ = built("t5", reduction=4)
    stock = models.build("t5")
    batch = models.batch(model)
    found, wanted = (m.eval()(**batch, output_hidden_states=True) for m in (model, stock))
    assert [h.shape for h in found.encoder_hidden_states] == [h.shape for h in wanted.encoder_hidden_states]
    assert [h.shape for h in found.decoder_hidden_states] == [h.shape for h in wanted.decoder_hidden_states]
    torch.testing.assert_close(found.encoder_last_hidden_state, wanted.encoder_last_hidden_state)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_side_net_follows_the_models_attention(implementation):
    model, _ = built("llama", reduction=4)
    shaken(model)
    batch = models.batch(model)
    before = logits(model, batch)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(model, batch), before)
    assert nets(model)[0].block(0).self_attn.config._attn_implementation == implementation


def test_images():
    model = models._seeded(models.vit, None)
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    stock = logits(model, pixels)
    applied = tightfit.apply(model, LadderSide(reduction=4))
    assert torch.equal(logits(model, pixels), stock)
    losses = train(model, applied.optimizer(lr=1e-2), pixels, 8)
    assert losses[-1] < losses[0]


def test_a_model_in_half_precision_gets_a_side_net_in_single():
    model = models.build("llama").bfloat16()
    applied = tightfit.apply(model, LadderSide(reduction=4))
    assert {p.dtype for p in applied.parameters()} == {torch.float32}
    batch = models.batch(model)
    shaken(model)
    _, found = gradients(model, batch)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert model(**batch).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_backbone(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = models.build("llama")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    made = (
                        bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                        if bits == 4
                        else bnb.nn.Linear8bitLt(
                            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
                        )
                    )
                    made.load_state_dict(linear.state_dict())
                    setattr(parent, name, made.to("cpu"))
    plain = models.build("llama")
    tightfit.apply(plain, LadderSide(reduction=4))
    applied = tightfit.apply(model, LadderSide(reduction=4))
    assert sum(p.numel() for p in applied.parameters()) == sum(p.numel() for p in plain.parameters() if p.requires_grad)
    side, wanted = (nets(m)[0].block(0).mlp.up_proj.weight for m in (model, plain))
    assert side.dtype == torch.float32
    if torch.equal(nets(model)[0].channels, nets(plain)[0].channels):
        assert (side - wanted).abs().mean() < 0.2 * wanted.abs().mean()
    losses = train(model, applied.optimizer(lr=1e-2), models.batch(model), 6)
    assert losses[-1] < losses[0]


def _deberta():
    """Its blocks read a table of relative positions, which nothing cuts."""
    config = hf.DebertaV2Config(
        **models.SIZE, vocab_size=models.VOCABULARY, relative_attention=True, pos_att_type=["p2c", "c2p"]
    )
    return hf.DebertaV2ForSequenceClassification(config)


def _fnet():
    sizes = {key: value for key, value in models.SIZE.items() if key != "num_attention_heads"}
    return hf.FNetForSequenceClassification(hf.FNetConfig(**sizes, vocab_size=models.VOCABULARY))


def test_blocks_that_cannot_be_side_blocks_are_refused():
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.tensor([0, 1])}
    with pytest.raises(UnsupportedModelError, match=r"FNetConfig names no one width of attention heads"):
        tightfit.apply(_fnet(), LadderSide(reduction=2))
    reason = r"LadderSide\(reduction=2\): a DebertaV2Layer of 1/2 of the widths does not run on what"
    with pytest.raises(UnsupportedModelError, match=reason):
        tightfit.plan(_deberta(), LadderSide(reduction=2), batch=batch)
    model = _deberta().train()
    applied = tightfit.apply(model, LadderSide(reduction=2))
    with pytest.raises(UnsupportedModelError, match=reason):
        model(**batch)
    applied.remove()
    model(**batch).loss.backward()


@pytest.mark.parametrize("recipe", [LadderSide(reduction=2), Losa(), Sherl(reduction=2, late_layers=0)])
def test_blocks_that_run_again_in_one_call_are_refused(recipe):
    # the later runs are frozen: what a side net adds to the earlier ones would get no gradient, in silence
    groups = 2 if isinstance(recipe, Sherl) else 1
    sizes = {**models.SIZE, "num_hidden_layers": 4, "num_hidden_groups": groups}
    model = hf.AlbertForSequenceClassification(hf.AlbertConfig(**sizes, embedding_size=16, vocab_size=50))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with tightfit.apply(model, recipe):
        for mode in (True, False):
            with pytest.raises(UnsupportedModelError, match="same blocks again in one call"):
                model.train(mode)(**batch)
    with pytest.raises(UnsupportedModelError, match="same blocks again in one call"):
        tightfit.plan(model, recipe, batch=(1, 4))


def test_a_cache_switch_that_is_given_by_place():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64, "num_hidden_layers": 2}
    config = hf.CpmAntConfig(**sizes, vocab_size=models.VOCABULARY, prompt_length=4, position_bias_max_distance=64)
    torch.manual_seed(0)
    model = hf.CpmAntForCausalLM(config).train()
    ids = torch.randint(5, 100, (2, 8))
    wanted = model(input_ids=ids, use_cache=False).logits
    tightfit.apply(model, Losa())
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)


def test_adapters_inside_the_frozen_blocks_are_refused():
    model = models.build("llama")
    with pytest.raises(tightfit.ConflictError, match=r"LadderSide and Lora.*new parameters"):
        tightfit.apply(model, [LadderSide(), Lora()])
