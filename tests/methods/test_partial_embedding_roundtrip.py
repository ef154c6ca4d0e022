"""What leaves a model with a reduced vocabulary is stock: state dicts, checkpoints, the model after remove."""

import copy

import models
import pytest
import torch
from partial_embedding_cases import dropped, objective, own_loss, pair, rows, table, train
from safetensors import safe_open

import tightfit
from tightfit import ArtifactError, PartialEmbedding, StateError
from tightfit.core.host import is_mapped
from tightfit.core.tight import is_tight
from tightfit.methods.partial_embedding.tables import find_tables

FAMILIES = tuple(models.FAMILIES)


def facts(model):
    """Everything a user can see of a model without running it."""
    modules = {
        name: (
            type(m),
            set(vars(m)) - {"_is_hf_initialized"},
            getattr(m, "num_embeddings", None),
            getattr(m, "padding_idx", None),
            list(m._buffers),
            sorted(m._non_persistent_buffers_set),
            [len(getattr(m, hooks)) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")],
        )
        for name, m in model.named_modules()
    }
    parameters = [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)]
    return modules, parameters, list(model.state_dict()), model.config.to_dict()


@pytest.mark.parametrize("head", ["full", "split", "pruned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_then_remove_leaves_no_trace(family, head):
    model = models.build(family)
    model.get_input_embeddings().weight.requires_grad_(family != "roberta")
    before, state = facts(model), {k: v.clone() for k, v in model.state_dict().items()}
    with tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model), head=head, force=True)):
        assert any(is_tight(m) for m in model.modules())
    assert facts(model) == before
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_saved_while_reduced_is_stock(family, tmp_path):
    stock, applied = pair(family, dropout=0.0)
    train(applied.model, [models.batch(stock)] * 2, applied.optimizer(lr=1e-2), loss=own_loss)
    trained = {k: v.clone() for k, v in applied.stock_state_dict().items()}
    stock.save_pretrained(tmp_path / "stock")
    applied.model.save_pretrained(tmp_path / "live")
    applied.export(tmp_path / "export")
    for name in ("live", "export"):
        loaded, info = type(stock).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert all(torch.equal(trained[k], v) for k, v in loaded.state_dict().items())
        assert torch.equal(dropped(table(loaded), applied), dropped(table(stock), applied))
        assert torch.equal(rows(table(loaded), applied), table(applied.model))
        assert not torch.equal(table(loaded), table(stock))
        sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in (name, "stock")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
        with (
            safe_open(tmp_path / name / "model.safetensors", "pt") as file,
            safe_open(tmp_path / "stock" / "model.safetensors", "pt") as reference,
        ):
            assert set(file.keys()) == set(reference.keys())
        saved, own = ({n for n, _ in m.named_parameters()} for m in (loaded, stock))
        assert saved == own  # so the ties are the same


def test_the_exported_config_is_the_stock_one(tmp_path):
    stock, applied = pair("gemma2")
    stock.save_pretrained(tmp_path / "a")
    applied.export(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("family", ["bert-mlm", "t5", "llama"])
def test_state_dicts_are_stock_shaped_and_tied_as_in_stock(family):
    stock, applied = pair(family)
    expected, found = stock.state_dict(), applied.model.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    groups = lambda state: sorted(  # noqa: E731
        tuple(k for k in state if state[k].data_ptr() == v.data_ptr()) for v in state.values()
    )
    assert groups(expected) == groups(found)
    # through a wrapper, with a prefix
    wrapped = torch.nn.Sequential(applied.model).state_dict()
    assert all(torch.equal(expected[k], wrapped[f"0.{k}"]) for k in expected)


def test_a_state_dict_follows_training_and_growth():
    stock, applied = pair("bert")
    vocabulary, key = PartialEmbedding.of(applied), "bert.embeddings.word_embeddings.weight"
    first = applied.model.state_dict()[key]
    with torch.no_grad():
        table(applied.model)[5] = 7.0
    second = applied.model.state_dict()[key]
    assert not torch.equal(first, second)
    assert (second[vocabulary.ids[5]] == 7).all()
    vocabulary.grow([70])
    with torch.no_grad():
        table(applied.model).zero_()
    third = applied.model.state_dict()[key]
    assert not third[70].any()
    assert torch.equal(third[71], table(stock)[71])


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_a_full_state_dict_is_sliced_on_load(family):
    _, applied = pair(family)
    other = models.build(family)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    given = other.state_dict()
    shapes = {k: v.shape for k, v in given.items()}
    assert str(applied.model.load_state_dict(given)) == "<All keys matched successfully>"
    assert {k: v.shape for k, v in given.items()} == shapes
    assert torch.equal(table(applied.model), rows(table(other), applied))
    applied.remove()
    assert all(torch.equal(given[k], v) for k, v in applied.model.state_dict().items())


def test_a_reduced_state_dict_is_refused_on_load():
    _, applied = pair("bert")
    state = applied.model.state_dict()
    key = "bert.embeddings.word_embeddings.weight"
    state[key] = rows(state[key], applied)
    with pytest.raises(ArtifactError, match=r"62 rows was given, the stock table has 120.*tightfit.load"):
        applied.model.load_state_dict(state)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_deepcopy_is_independent(family):
    stock, applied = pair(family, unknown="grow")
    twin = copy.deepcopy(applied.model)
    expected = {k: v.clone() for k, v in twin.state_dict().items()}
    train(applied.model, [models.batch(stock, ids=range(9, 110))] * 2, applied.optimizer(lr=0.1))
    PartialEmbedding.of(applied).grow([117, 118])
    assert len(table(applied.model)) > 62 == len(table(twin))
    assert all(torch.equal(expected[k], v) for k, v in twin.state_dict().items())
    # the copy lives on: it trains, grows and saves by itself
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0)
    batches = [models.batch(stock), models.batch(stock, ids=range(9, 110), seed=1)]
    found = train(twin, batches, optimizer)
    assert found == train(stock, batches, torch.optim.AdamW(stock.parameters(), lr=0.1, weight_decay=0))
    assert all(torch.equal(a, b) for a, b in zip(table(stock)[9:66], twin.state_dict()[name_of_table(stock)][9:66]))
    applied.remove()
    assert len(table(twin)) < 120


def name_of_table(model):
    return find_tables(model).inputs[0].aliases[0].name


def test_the_store_of_a_copy_is_not_a_second_store():
    _, applied = pair("bert")
    codec = PartialEmbedding.of(applied).codecs[0]
    assert is_mapped(codec.home)
    twin = copy.deepcopy(applied.model)
    mixed = next(m for m in twin.modules() if hasattr(m, "num_embeddings") and m.num_embeddings == 62)
    held = next(iter(state["held"]["weight"] for state in mixed.__dict__["_tight_layers"].values() if "held" in state))
    assert held.codec is not codec
    assert held.codec.home.data_ptr() == codec.home.data_ptr()


@pytest.mark.parametrize("family", ["bert", "llama", "llama-tied", "t5", "bart"])
@pytest.mark.parametrize("head", ["full", "split"])
def test_save_and_load_give_the_same_model(family, head, tmp_path):
    stock, applied = pair(family, dropout=0.0, head=head, unknown="grow")
    batches = [models.batch(stock), models.batch(stock, ids=range(9, 80), seed=1)]
    train(applied.model, batches, applied.optimizer(lr=1e-2), loss=own_loss)
    applied.save(tmp_path)
    base = models.build(family, dropout=0.0)
    again = tightfit.load(base, tmp_path)
    assert again.recipe == applied.recipe
    assert len(table(base)) == len(table(applied.model)) > 62
    batch = models.batch(stock, seed=2)
    assert torch.equal(objective(base, batch), objective(applied.model, batch))
    assert all(
        torch.equal(a, b) for a, b in zip(applied.stock_state_dict().values(), again.stock_state_dict().values())
    )


def test_loading_on_another_base_is_refused_and_leaves_it(tmp_path):
    _, applied = pair("bert")
    applied.save(tmp_path)
    other = models.build("bert")
    with torch.no_grad():
        table(other)[70:101] += 1  # rows that the artifact does not hold
    with pytest.raises(ArtifactError, match=r"bert.embeddings.word_embeddings.weight.*digest"):
        tightfit.load(other, tmp_path)
    assert len(table(other)) == 120
    assert not any(is_tight(m) for m in other.modules())


def test_merge_is_remove():
    stock, applied = pair("gpt2")
    assert applied.merge() is applied.model
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), applied.model.state_dict().values()))
    with pytest.raises(StateError, match="taken off already"):
        applied.remove()
