"""Losa: the mixers, exact start, bytes in proportion to the states, and what is refused."""

import copy

import models
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from checks.state import assert_same, gradients, logits, snapshot, train
from side_cases import four, made_inside, shaken, side_nets

import tightfit
from tightfit import Lora, Losa
from tightfit.core.memory import saved_bytes
from tightfit.methods.side.losa import Mixer


def image_model(layers=3):
    """A seeded vision transformer in training mode."""
    config = hf.ViTConfig(**{**models.SIZE, "num_hidden_layers": layers}, image_size=16, patch_size=8, num_labels=3)
    return models._seeded(lambda: hf.ViTForImageClassification(config), None)


def images(size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(3, (size,), generator=generator)}


# -- the mixer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kept", [None, (0, 2)])
def test_the_side_stream_is_what_the_paper_says(published, kept):
    base = image_model().double().eval()
    model = copy.deepcopy(base)
    applied = tightfit.apply(model, Losa(rank=4, token_rank=2, keep_layers=kept, published=published))
    shaken(model)
    net = side_nets(model)[0]
    batch = images()
    batch["pixel_values"] = batch["pixel_values"].double()
    states = []
    for block in base.get_submodule(".".join(tightfit.core.hfmodel.stacks(base)[0][0].split(".")[:-1])):
        block.register_forward_hook(
            lambda module, args, out: states.append((args[0], out if torch.is_tensor(out) else out[0]))
        )

    def low_rank(layer, x):
        return F.gelu(x @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias

    with torch.no_grad():
        base(batch["pixel_values"])
        y = states[0][0] if published else torch.zeros_like(states[0][0])
        for index in kept or (0, 1, 2):
            mixer = getattr(net, f"mixer_{index}")
            u = states[index][1] + y
            normed = F.layer_norm(u, (32,), mixer.token_norm.weight, mixer.token_norm.bias)
            u = u + low_rank(mixer.over_tokens, normed.mT).mT
            y = y + low_rank(mixer.channels, F.layer_norm(u, (32,), mixer.norm.weight, mixer.norm.bias))
        out = y if published else states[-1][1] + y
        wanted = base.classifier(base.vit.layernorm(out)[:, 0])
        torch.testing.assert_close(model(batch["pixel_values"]).logits, wanted)
    assert applied.report()["methods"]["Losa"]["kept_layers"] == list(kept or (0, 1, 2))


def test_without_token_mixing_tokens_do_not_see_each_other():
    mixer = Mixer(8, 4, 0, 0, zero=False)
    u, order = torch.randn(2, 5, 8), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(mixer(u[:, order]), mixer(u)[:, order])
    mixing = Mixer(8, 4, 5, 2, zero=False)
    with torch.no_grad():
        for parameter in mixing.parameters():
            parameter.mul_(20)
    assert (mixing(u[:, order]) - mixing(u)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart"])
def test_training_starts_at_the_stock_model_and_reaches_every_mixer(family):
    model = four(family)
    batch = models.batch(model)
    stock = logits(model, batch)
    applied = tightfit.apply(model, Losa(rank=4))
    assert torch.equal(logits(model, batch), stock)
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        _, found = gradients(model, batch)
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert all(found[name].any() for name in trained)
    assert not any("over_tokens" in name for name in trained)


def test_images_mix_tokens_too_and_start_at_the_stock_model():
    model = image_model()
    batch = images()
    stock = logits(model, batch)
    applied = tightfit.apply(model, Losa())
    assert torch.equal(logits(model, batch), stock)
    assert side_nets(model)[0].mixer_1.over_tokens.down.weight.shape == (16, 5)
    losses = train(model, applied.optimizer(lr=1e-2), batch, 8)
    assert losses[-1] < losses[0]


def test_the_published_form_gives_the_side_stream_alone():
    model = image_model()
    stock = logits(model, images())
    tightfit.apply(model, Losa(published=True))
    assert (logits(model, images()) - stock).abs().max() > 1e-3


@pytest.mark.parametrize("published", [False, True])
def test_what_the_mixers_begin_with(published):
    """Drawn, biases aside; what comes out of a mixer is zero unless the start is the published one."""
    model = image_model()
    tightfit.apply(model, Losa(published=published))
    for index in range(3):
        mixer = getattr(side_nets(model)[0], f"mixer_{index}")
        drawn = [mixer.channels.down, mixer.over_tokens.down, mixer.over_tokens.up]
        for layer in [*drawn, mixer.channels.up] if published else drawn:
            assert 0.01 < layer.weight.std() < 0.03 and not layer.bias.any()
        assert published or not mixer.channels.up.weight.any()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_made_inside_the_blocks_is_kept():
    model = four("bert")
    tightfit.apply(model, Losa(rank=4))
    # a block's last norm makes its output, which the mixer reads and keeps
    names = [f"bert.encoder.layer.{i}.{part}" for i in range(4) for part in ("attention", "intermediate")]
    made, kept = made_inside(model, names, models.batch(model))
    assert made
    assert not made & kept


def test_bytes_of_a_mixer_are_in_proportion_to_the_states():
    found = {}
    for layers in (2, 3):
        for tokens in (16, 32):
            config = hf.LlamaConfig(**{**models.SIZE, "num_hidden_layers": layers}, vocab_size=120)
            model = hf.LlamaForCausalLM(config).train()
            tightfit.apply(model, Losa(rank=4))
            ids = torch.randint(120, (2, tokens))
            step = lambda model=model, ids=ids: model(input_ids=ids, labels=ids).loss.backward()  # noqa: E731
            found[layers, tokens] = saved_bytes(step)
            assert all(p.grad is None for n, p in model.named_parameters() if "side" not in n)
    short, long = (found[3, tokens] - found[2, tokens] for tokens in (16, 32))
    assert long == 2 * short
    states = 2 * 16 * 32 * 4
    assert states <= short <= 3 * states


def test_a_plan_is_a_real_step():
    model = image_model()
    plan = tightfit.plan(model, Losa(), batch=images(), optimizer="sgd")
    found = plan.verify(model)
    assert found.peak_bytes == plan.peak_bytes
    assert found.saved_bytes == plan.simulation.saved_bytes


# -- use --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_with_a_cache_is_generation_without(family):
    model = four(family)
    tightfit.apply(model, Losa(rank=4))
    shaken(model).eval()
    batch = models.batch(model)
    batch.pop("labels")
    if family == "llama":  # generation pads on the left
        batch = {key: value.flip(1) for key, value in batch.items()}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


def test_images_save_load_and_remove(tmp_path):
    model = image_model()
    before = snapshot(model)
    applied = tightfit.apply(model, Losa())
    train(model, applied.optimizer(lr=1e-2), images(), 3)
    applied.save(tmp_path)
    base = image_model()
    tightfit.load(base, tmp_path)
    assert torch.equal(logits(base, images()), logits(model, images()))
    with pytest.raises(tightfit.StateError, match=r"has no place in a stock"):
        applied.export(tmp_path / "stock")
    applied.remove()
    assert [name for name, _ in model.named_parameters()] == list(before["flags"])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"rank": 0}, ValueError, r"rank=.*an int >= 1"),
        ({"token_rank": -1}, ValueError, r"token_rank=.*an int >= 0"),
        ({"tokens": 2.0}, TypeError, r"tokens="),
        ({"tokens": 4, "token_rank": 0}, ValueError, r"without token mixers it has no meaning"),
        ({"keep_layers": ()}, ValueError, r"keep_layers=.*at least one"),
        ({"published": None}, TypeError, r"published=.*True or False"),
    ],
)
def test_fields_out_of_range(fields, error, match):
    with pytest.raises(error, match=match):
        Losa(**fields)


def test_what_the_model_cannot_have_is_refused():
    model = four("llama")
    before = snapshot(model)
    for fields, match in (
        ({"token_rank": 4, "tokens": 9}, r"LlamaForCausalLM is causal.*token_rank=0"),
        ({"tokens": 9}, r"LlamaForCausalLM is causal"),
        ({"keep_layers": (4,)}, r"has 4 blocks.*up to 3"),
    ):
        with pytest.raises(ValueError, match=match):
            tightfit.apply(model, Losa(**fields))
    with pytest.raises(tightfit.ConflictError, match=r"Lora and Losa"):
        tightfit.apply(model, [Losa(), Lora()])
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is causal"):
        tightfit.apply(four("t5"), Losa(token_rank=2, tokens=9))
    with pytest.raises(ValueError, match=r"no fixed number of tokens; give tokens="):
        tightfit.apply(four("bert"), Losa(token_rank=2))


def test_another_number_of_tokens_is_refused():
    model = four("bert")
    tightfit.apply(model, Losa(tokens=9))
    model(**models.batch(model, length=9))
    with pytest.raises(ValueError, match=r"made for 9 tokens and got 7.*tokens=7 or token_rank=0"):
        model(**models.batch(model, length=7))


def test_register_tokens_are_mixed_with_the_others():
    config = hf.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, num_register_tokens=3
    )
    model = models._seeded(lambda: hf.Dinov2WithRegistersForImageClassification(config), None)
    expected = logits(model, images())
    tightfit.apply(model, Losa())
    (net,) = side_nets(model)
    assert net.mixer_0.tokens == 1 + 3 + 4  # the class token, the registers, the patches
    assert torch.equal(logits(model, images()), expected)
