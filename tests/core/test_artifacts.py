"""Saved results: damaged files, other bases, full disks."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import models
import pytest
import torch
from checks.state import assert_same, logits, snapshot, train
from checks.transforms import CountCalls, Counter, HalfTable, OwnLinear

import tightfit
from tightfit import Lora, PartialEmbedding
from tightfit.core import artifacts

RECIPE, TENSORS = artifacts.RECIPE_FILE, artifacts.TENSOR_FILE


def saved(folder, family="bert", recipe=None):
    model = models.build(family)
    applied = tightfit.apply(model, Lora(rank=2) if recipe is None else recipe)
    train(model, applied.optimizer(lr=1e-2), models.batch(model), 1)
    applied.save(folder)
    return model, applied


def edit(folder, change):
    document = json.loads((folder / RECIPE).read_text())
    change(document)
    (folder / RECIPE).write_text(json.dumps(document))


def damage_key(key):
    return lambda folder: edit(folder, lambda d: d.pop(key))


def truncate(folder):
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-7])


def resign(folder):
    """Fit the digest to the tensor file, so that what comes after it is reached."""
    edit(folder, lambda d: d.update(tensors_sha256=artifacts.file_digest(folder / TENSORS)))


def corrupt_header(folder):
    path = folder / TENSORS
    path.write_bytes(b"\0" * 8 + path.read_bytes()[8:])
    resign(folder)


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / TENSORS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / TENSORS)
    resign(folder)


def reshape_tensor(folder):
    """One element where a matrix stood; copying it in would fill the matrix."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / TENSORS)
    tensors[sorted(tensors)[0]] = torch.ones(1, 1)
    save_file(tensors, folder / TENSORS)
    resign(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / RECIPE).unlink(), r"no recipe.json; give the folder that Applied.save wrote"),
        (lambda f: (f / TENSORS).unlink(), r"no tightfit.safetensors"),
        (lambda f: (f / RECIPE).write_text('{"tightfit": 1, '), r"recipe.json: not valid JSON .*damaged"),
        (lambda f: (f / RECIPE).write_bytes(b"\xff\xfe{}"), r"recipe.json: not valid JSON"),
        (lambda f: (f / RECIPE).write_text("[]"), r"format 'list', this version reads format 1"),
        (lambda f: edit(f, lambda d: d.update(tightfit=99)), r"format 99, this version reads format 1"),
        (damage_key("methods"), r"key\(s\) methods are missing"),
        (damage_key("tensors_sha256"), r"key\(s\) tensors_sha256 are missing"),
        (damage_key("base"), r"key\(s\) base, base.class, base.tensors, base.digests are missing"),
        (lambda f: edit(f, lambda d: d.update(base=3)), r"key\(s\) base.class, base.tensors"),
        (lambda f: edit(f, lambda d: d.update(methods=[{"Loro": {}}])), r"recipe.json.*unknown method 'Loro'; did you"),
        (truncate, r"SHA-256 \w{16}... does not match \w{16}... in recipe.json"),
        (corrupt_header, r"tightfit.safetensors: cannot be read"),
        (drop_tensor, r"tensors do not fit the recipe: bert.encoder"),
        (reshape_tensor, r"bert.encoder.* is float32 \[1, 1\], the recipe gives float32 \[2, 32\]"),
        (lambda f: edit(f, lambda d: d.update(methods=[{"Lora": {"rank": 10**10}}])), r"10000000000, 32\] in this one"),
        (lambda f: edit(f, lambda d: d.update(tensors_sha256=7)), r"tensors_sha256 is 7, expected a text"),
        (lambda f: edit(f, lambda d: d["base"].update(tensors=[])), r"base.tensors is \[\], expected names with texts"),
        (lambda f: (f / RECIPE).write_text("[" * 200_000), r"not valid JSON"),
    ],
)
def test_damaged_files_are_named_and_the_model_is_untouched(damage, said, tmp_path):
    saved(tmp_path)
    damage(tmp_path)
    base = models.build("bert")
    before = snapshot(base)
    with pytest.raises(tightfit.ArtifactError, match=said):
        tightfit.load(base, tmp_path)
    assert_same(before, snapshot(base))


def bert(**kw):
    torch.manual_seed(0)
    return models.bert(**kw).train()


def test_another_base_is_refused_with_both_values(tmp_path):
    saved(tmp_path, "bert")
    with pytest.raises(tightfit.ArtifactError, match=r"saved on a BertFor\w+, .* is a LlamaForCausalLM"):
        tightfit.load(models.build("llama"), tmp_path)
    wide = bert(num_labels=5)
    with pytest.raises(tightfit.ArtifactError, match=r"classifier.\w+ is float32 \[2.*saved base and float32 \[5"):
        tightfit.load(wide, tmp_path)
    half = models.build("bert").bfloat16()
    with pytest.raises(tightfit.ArtifactError, match=r"is float32 \[.*in the saved base and bfloat16 \["):
        tightfit.load(half, tmp_path)
    torch.manual_seed(7)
    other = models.bert()
    before = snapshot(other)
    with pytest.raises(tightfit.ArtifactError, match=r"has digest \w{16} in the saved base and \w{16} in"):
        tightfit.load(other, tmp_path)
    assert_same(before, snapshot(other))


def test_rows_that_wait_aside_belong_to_the_base(tmp_path):
    model = models.build("bert")
    recipe = PartialEmbedding(ids=models.kept_ids(model), force=True)
    saved(tmp_path, "bert", recipe)
    other = models.build("bert")
    with torch.no_grad():
        other.get_input_embeddings().weight[61:100] += 1  # rows that the run did not hold
    with pytest.raises(tightfit.ArtifactError, match=r"word_embeddings.weight \(rest\) has digest"):
        tightfit.load(other, tmp_path)


def test_a_part_that_refuses_leaves_trained_values_out(tmp_path, monkeypatch):
    saved(tmp_path, "bert", [CountCalls(), Lora(rank=2)])

    def refuse(self, tensors):
        raise tightfit.ArtifactError("not mine")

    monkeypatch.setattr(Counter, "load_tensors", refuse)
    base = models.build("bert")
    before = snapshot(base)
    with pytest.raises(tightfit.ArtifactError, match="not mine"):
        tightfit.load(base, tmp_path)
    assert_same(before, snapshot(base))


def test_a_parts_tensors_come_back(tmp_path):
    saved(tmp_path, "bert", CountCalls())
    again = tightfit.load(models.build("bert"), tmp_path)
    assert again.report()["methods"]["CountCalls"]["calls"] == 1


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors(*args, **kwargs):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("os.replace", full_disk),
        ("pathlib.Path.replace", full_disk),
        ("os.fsync", full_disk),
        ("safetensors.torch.save_file", full_disk_in_safetensors),
        ("pathlib.Path.write_text", full_disk),
    ],
)
def test_a_failed_write_leaves_the_earlier_save(where, failure, tmp_path, monkeypatch):
    model, applied = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(model, applied.optimizer(lr=1e-2), models.batch(model), 1)
    with monkeypatch.context() as patch:
        patch.setattr(where, failure)
        # Path.replace may or may not go through os.replace: the patch must have been hit, or the write must be whole
        try:
            applied.save(tmp_path)
        except tightfit.ArtifactError as error:
            assert "No space left on device" in str(error)
            assert str(tmp_path) in str(error)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        else:
            assert where == "os.replace"
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECIPE, TENSORS]
    tightfit.load(models.build("bert"), tmp_path)


@pytest.mark.parametrize(("holder", "name"), [(os, "fsync"), (Path, "chmod")])
def test_a_disk_that_is_full_at_the_second_file_leaves_the_earlier_save(holder, name, tmp_path, monkeypatch):
    model, applied = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(model, applied.optimizer(lr=1e-2), models.batch(model), 1)
    works = [getattr(holder, name)]

    def once(*args, **kwargs):
        return works.pop()(*args, **kwargs) if works else full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, once)
        with pytest.raises(tightfit.ArtifactError, match="No space left on device"):
            applied.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    model = models.build("bert")
    applied = tightfit.apply(model, Lora(rank=2))
    monkeypatch.setattr(type(model), "save_pretrained", full_disk)
    with pytest.raises(tightfit.ArtifactError, match=r"could not be written \(No space left"):
        applied.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_full_folder_and_a_file(tmp_path):
    model = models.build("bert")
    applied = tightfit.apply(model, Lora(rank=2))
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(tightfit.ArtifactError, match="exists and is not an empty folder"):
            applied.export(target)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    applied.export(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    with artifacts.replacing_folder(tmp_path / "link") as temporary:
        (temporary / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link"]


@pytest.mark.parametrize("kind", ["mount point", "current folder"])
def test_a_folder_that_cannot_be_replaced_is_refused_first(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: kind == "mount point")
    refused = pytest.raises(tightfit.ArtifactError, match=rf"{kind}.*give a new folder inside")
    with refused, artifacts.replacing_folder(Path(".")):
        raise AssertionError("it was begun")
    assert not any(tmp_path.iterdir())


def test_files_have_the_usual_permissions(tmp_path):
    saved(tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in tmp_path.iterdir())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bfloat16(family, tmp_path):
    def base():
        return models.build(family).bfloat16()

    model = base()
    recipe = [PartialEmbedding(ids=models.kept_ids(model), force=True), OwnLinear()]
    applied = tightfit.apply(model, recipe)
    batch = models.batch(model)
    train(model, applied.optimizer(lr=1e-2), batch, 1)
    applied.save(tmp_path)
    again = base()
    tightfit.load(again, tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_bfloat16_adapters_are_exported_in_the_base_dtype(tmp_path):
    model = models.build("bert").bfloat16()
    applied = tightfit.apply(model, Lora(rank=2))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}  # as get_peft_model does
    applied.export(tmp_path / "out")
    assert type(models.build("bert")).from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_export_has_the_stock_dtype_under_a_stand_in(tmp_path):
    applied = tightfit.apply(models.build("bert"), HalfTable())
    applied.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_no_pickle_is_read(tmp_path, monkeypatch):
    import pickle

    saved(tmp_path)
    monkeypatch.setattr(pickle, "load", full_disk)
    monkeypatch.setattr(torch, "load", full_disk)
    tightfit.load(models.build("bert"), tmp_path)


def test_a_digest_sees_values_shape_and_dtype():
    a = torch.randn(100, 100)
    digests = {artifacts.tensor_digest(t) for t in (a, a + 1, a.view(50, 200), a.bfloat16(), a.t())}
    assert len(digests) == 5
    assert artifacts.tensor_digest(a) == artifacts.tensor_digest(a.clone())
    assert artifacts.tensor_digest(torch.empty(0))


@pytest.mark.parametrize("size", [4097, 8191, 12287, 100_000])
def test_a_digest_reaches_to_the_end_of_a_tensor(size):
    a = torch.zeros(size)
    b = a.clone()
    b[-(size // 8) :] = 1.0
    assert artifacts.tensor_digest(a) != artifacts.tensor_digest(b)


def test_replacing_writes_through_a_temporary_file(tmp_path):
    path = Path(tmp_path) / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyError), artifacts.replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise KeyError
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    artifacts.write_text(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]
