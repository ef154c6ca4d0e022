"""LadderSide: which channels are taken over, how a side net begins, and what is refused."""

import math

import models
import pytest
import torch
import transformers as hf
from checks.state import assert_same, gradients, logits, snapshot

import tightfit
from tightfit import Checkpointing, LadderSide
from tightfit.methods.side.rows import choose, cut, fisher, groups_of, linears, magnitude

# -- groups and choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", [(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", 32, 16)]),
        ("gpt2", [(("attn.c_attn",), "attn.c_proj", 32, 16), (("mlp.c_fc",), "mlp.c_proj", 128, 128)]),
        (
            "bert",
            [
                (
                    ("attention.self.query", "attention.self.key", "attention.self.value"),
                    "attention.output.dense",
                    32,
                    16,
                )
            ],
        ),
        ("bart", [(("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), "self_attn.out_proj", 32, 16)]),
    ],
)
def test_groups_are_found_from_order_and_sizes(family, wanted):
    model = models.build(family)
    found = groups_of(model.get_submodule(tightfit.core.hfmodel.stacks(model)[0][0]), 32, 16)
    assert len(found) == 2
    for group, facts in zip(found, wanted):
        assert (group.makers, group.reader, group.inner, group.unit) == facts
    assert found[0].attention
    assert not found[1].attention


def test_a_decoder_block_has_three_groups():
    model = models.build("t5")
    found = groups_of(model.decoder.block[0], 32, 16)
    assert [group.attention for group in found] == [True, True, False]


class Toy(torch.nn.Module):
    """An MLP whose loss needs few of its inner channels and outputs."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        with torch.no_grad():
            self.down.weight[:, [i for i in range(12) if i not in (2, 5, 11)]] *= 1e-3

    def forward(self, x):
        return self.down(self.up(x))[:, [1, 6]].square().sum()


def test_fisher_finds_the_rows_that_matter():
    torch.manual_seed(0)
    toy = Toy()
    rows = [{"x": torch.randn(1, 8)} for _ in range(20)]
    picked = [
        choose([toy], 8, 4, 4, fisher(toy, [toy], rows, lambda model, row: model(row["x"])), rotary=False)
        for _ in range(2)
    ]
    assert picked[0] == picked[1]
    assert picked[0].states == (1, 6)
    assert picked[0].groups == (((2, 5, 11),),)
    assert all(p.grad is None and p.requires_grad for p in toy.parameters())


def test_a_cut_block_holds_the_chosen_rows_and_columns():
    torch.manual_seed(0)
    toy, side = Toy(), Toy()
    side.up, side.down = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    cut(side, toy, groups_of(toy, 8, 4), (1, 6), [(2, 5, 11)])
    assert torch.equal(side.up.weight, toy.up.weight[[2, 5, 11]][:, [1, 6]])
    assert torch.equal(side.up.bias, toy.up.bias[[2, 5, 11]])
    assert torch.equal(side.down.weight, toy.down.weight[[1, 6]][:, [2, 5, 11]])
    assert torch.equal(side.down.bias, toy.down.bias[[1, 6]])


def test_magnitude_takes_the_largest_rows():
    toy = Toy()
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.fill_(0.01)
        toy.up.weight[[0, 4, 7]] = 1.0
        toy.down.weight[[3, 5]] = 1.0
    assert choose([toy], 8, 4, 4, magnitude([toy]), rotary=False).groups == (((0, 4, 7),),)
    assert choose([toy], 8, 4, 4, magnitude([toy]), rotary=False).states == (3, 5)


def test_a_head_loses_the_same_channels_in_queries_keys_and_values():
    model = models.build("bert")
    block = model.bert.encoder.layer[0]
    with torch.no_grad():
        block.attention.self.key.weight[[3, 16 + 3]] += 10.0
    tightfit.apply(model, LadderSide(reduction=16))
    net = model.bert.encoder.tight_side
    states = net.channels.tolist()
    side = net.block(0).attention.self
    for name in ("query", "key", "value"):
        taken, full = getattr(side, name).weight, getattr(block.attention.self, name).weight
        assert torch.equal(taken, full[[3, 19]][:, states])


def test_rotating_heads_keep_their_frequencies():
    model = models.build("llama")
    tightfit.apply(model, LadderSide(reduction=4))
    net = model.model.tight_side
    rows = [head + offset for head in (0, 16) for offset in (0, 4, 8, 12)]
    full = model.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(net.block(1).self_attn.q_proj.weight, full[rows][:, net.channels])


def test_relative_positions_move_to_the_first_kept_block():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2, "vocab_size": 120}
    config = hf.T5Config(**sizes, decoder_start_token_id=0)
    model = models._seeded(lambda: hf.T5ForConditionalGeneration(config), None)
    tightfit.apply(model, LadderSide(reduction=4, keep_layers=(1, 3)))
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    net = model.encoder.tight_side
    assert torch.equal(net.block(1).layer[0].SelfAttention.relative_attention_bias.weight, table)
    assert not any("relative" in name for name, _ in net.block(3).named_parameters())
    _, found = gradients(model, models.batch(model))
    assert any("relative" in name for name in found)


def test_norms_follow_the_states():
    model = models.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    tightfit.apply(model, LadderSide(reduction=4))
    net, stock = model.model.tight_side, model.model.layers[1]
    assert torch.equal(net.norm.weight, model.model.norm.weight[net.channels])
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(getattr(net.block(1), name).weight, getattr(stock, name).weight[net.channels])


# -- fit ---------------------------------------------------------------------------------------------------------------


def test_fit_returns_a_value_that_starts_from_its_channels():
    model = models.build("llama")
    before = snapshot(model)
    batches = [models.batch(model, seed=seed) for seed in (1, 2)]
    value = LadderSide.fit(model, batches, reduction=4)
    assert_same(before, snapshot(model))
    assert value == LadderSide.fit(model, batches, reduction=4)
    assert value != LadderSide.fit(model, batches, samples=1, reduction=4)
    assert value.init == "fisher"
    assert len(value.channels[0]) == 8
    assert all(heads == (0, 4, 8, 12) for heads, *_ in value.channels[1:])  # they turn by position
    recipe = tightfit.chain(value)
    assert tightfit.Recipe.from_json(recipe.to_json()) == recipe
    assert hash(tightfit.Recipe.from_json(recipe.to_json())) == hash(recipe)
    tightfit.apply(model, value)
    assert tuple(model.model.tight_side.channels.tolist()) == value.channels[0]


def test_fit_takes_every_example_by_itself_and_without_dropout():
    model = models.build("bert", dropout=0.3)
    whole = models.batch(model)
    parts = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(3)]
    assert LadderSide.fit(model, [whole], reduction=4) == LadderSide.fit(model, parts, reduction=4)


def test_fit_leaves_modes_and_gradients_alone_and_does_not_count_them():
    model = models.build("bert", dropout=0.0)
    batch = models.batch(model)
    expected = LadderSide.fit(model, [batch], reduction=4)
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter) * 1000
    held = [parameter.grad.clone() for parameter in model.parameters()]
    assert LadderSide.fit(model, [batch], reduction=4) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), held))


def test_fit_needs_data_with_labels():
    model = models.build("bert")
    batch = models.batch(model)
    with pytest.raises(ValueError, match=r"no examples.*magnitude"):
        LadderSide.fit(model, [])
    with pytest.raises(ValueError, match=r"give \[batch\]"):
        LadderSide.fit(model, batch)
    batch.pop("labels")
    with pytest.raises(ValueError, match=r"input_ids, attention_mask and no labels.*magnitude"):
        LadderSide.fit(model, [batch])
    with pytest.raises(ValueError, match=r"needs data: use LadderSide\.fit"):
        tightfit.apply(model, LadderSide(init="fisher"))
    model.bert.encoder.layer[0].output.dense.weight = torch.nn.Parameter(
        torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"quantised.*init='magnitude'"):
        LadderSide.fit(model, [models.batch(model)])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"reduction": 0}, ValueError, r"reduction=.*got 0.*an int >= 1"),
        ({"reduction": 8.0}, TypeError, r"reduction=.*got 8\.0"),
        ({"keep_layers": ()}, ValueError, r"keep_layers=.*at least one"),
        ({"keep_layers": (1, 1)}, ValueError, r"keep_layers=.*ascending"),
        ({"keep_layers": (-1, 1)}, ValueError, r"keep_layers=.*from 0 on"),
        ({"keep_layers": 3}, TypeError, r"keep_layers=.*tuple of indices"),
        ({"keep_layers": (True,)}, TypeError, r"keep_layers=.*tuple of indices"),
        ({"projection": "frozen"}, ValueError, r"projection=.*frozen_linear"),
        ({"merge": "sum"}, ValueError, r"merge=.*'residual', 'side', 'alpha'"),
        ({"init": "svd"}, ValueError, r"init=.*'magnitude', 'fisher', 'random'"),
        ({"temperature": 0.0}, ValueError, r"temperature=.*\(0"),
        ({"temperature": math.nan}, ValueError, r"temperature=.*nan"),
        ({"dropout": 1.0}, ValueError, r"dropout=.*\[0, 1\)"),
        ({"backbone_dropout": 1}, TypeError, r"backbone_dropout=.*True or False"),
        ({"channels": ((0, 1),)}, ValueError, r"channels are what init='fisher' chose"),
        ({"channels": ((0, "a"),), "init": "fisher"}, TypeError, r"accepted is what LadderSide.fit"),
    ],
)
def test_fields_out_of_range(fields, error, match):
    with pytest.raises(error, match=match):
        LadderSide(**fields)


def test_what_the_model_does_not_have_is_refused_and_the_model_left_alone():
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"reduction=3\): does not divide hidden_size=32.*one of 1, 2, 4, 8, 16$"):
        tightfit.apply(model, LadderSide(reduction=3))
    with pytest.raises(ValueError, match=r"keep_layers=\(0, 2\)\): LlamaForCausalLM has 2 blocks.*up to 1"):
        tightfit.apply(model, LadderSide(keep_layers=(0, 2)))
    with pytest.raises(tightfit.ConflictError, match=r"Checkpointing and LadderSide"):
        tightfit.apply(model, [LadderSide(), Checkpointing()])
    assert_same(before, snapshot(model))
    with pytest.raises(tightfit.UnsupportedModelError, match=r"one stack of blocks.*has 0"):
        tightfit.apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), LadderSide())


def test_a_backbone_parameter_that_is_set_to_train_is_refused():
    model = models.build("bert")
    tightfit.apply(model, LadderSide())
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"so encoder\.layer\.1\.output\.dense\.weight would never get a gradient"):
        model(**models.batch(model))
    logits(model, models.batch(model))  # evaluation does not mind


def test_a_cache_in_training():
    model = models.build("llama")
    tightfit.apply(model, LadderSide())
    batch = models.batch(model)
    assert model(**batch).past_key_values is None
    with pytest.warns(UserWarning, match=r"use_cache=True is ignored"):
        assert model(**batch, use_cache=True).past_key_values is None
    cache = hf.DynamicCache(config=model.config)
    stock = models.build("llama").eval()
    with torch.no_grad():
        stock(batch["input_ids"], past_key_values=cache, use_cache=True)
    with pytest.raises(tightfit.StateError, match=r"in training with a filled DynamicCache"):
        model(**batch, past_key_values=cache)
    model.eval()
    with pytest.raises(tightfit.StateError, match=r"filled without the side net"), torch.no_grad():
        model(batch["input_ids"][:, :1], past_key_values=cache, use_cache=True)


def test_encoder_outputs_from_elsewhere_are_refused():
    model = models.build("t5")
    tightfit.apply(model, LadderSide())
    batch = models.batch(model)
    plain = models.build("t5").get_encoder()(batch["input_ids"])
    with pytest.raises(tightfit.StateError, match=r"encoder outputs of width 32, without what the side net"):
        model(encoder_outputs=plain, labels=batch["labels"])
    own = model.get_encoder()(batch["input_ids"])
    assert torch.isfinite(model(encoder_outputs=own, labels=batch["labels"]).loss)


def test_the_saved_result_needs_its_own_base(tmp_path):
    model = models.build("llama")
    applied = tightfit.apply(model, LadderSide(reduction=4))
    applied.save(tmp_path)
    other = models.llama(tied=True)
    before = snapshot(other)
    with pytest.raises(tightfit.ArtifactError, match=r"another base model"):
        tightfit.load(other, tmp_path)
    assert_same(before, snapshot(other))
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(tightfit.ArtifactError, match=r"no recipe\.json"):
        tightfit.load(models.build("llama"), tmp_path)


def test_linear_layers_of_a_block_come_with_their_stock_names():
    assert [name for name, _ in linears(Toy())] == ["up", "down"]
