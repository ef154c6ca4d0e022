"""Saved results and run folders from elsewhere: loaded, or refused with the model as it was."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys

import models
import pytest
import torch
from checks.state import assert_same, snapshot
from fuzzing import amounts, as_json, bounded, changed_documents, damaged_bytes, draw_cases, works_or_is_refused
from hypothesis import strategies as st

import tightfit
from tightfit import LadderSide, Lora, Losa, PartialEmbedding, Reversible, SparseAdapter
from tightfit.core import artifacts
from tightfit.core.artifacts import RECIPE_FILE, TENSOR_FILE
from tightfit.train import folder as run_folder
from tightfit.train.card import write_report

RECIPES = {
    "lora": lambda m: Lora(rank=2),
    "dora": lambda m: Lora(config={"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["query"]}),
    "vocabulary": lambda m: PartialEmbedding(ids=models.kept_ids(m), force=True, unknown="grow"),
    "host": lambda m: SparseAdapter(width=96, top_k=8),
    "side": lambda m: LadderSide(),
    "losa": lambda m: Losa(rank=4),
    "reversible": lambda m: Reversible(variant="meft1", adapter_dim=4, merge="mean"),
}


@pytest.fixture(scope="module", params=RECIPES)
def good(request, tmp_path_factory):
    """A saved result, with the base it stands on."""
    folder = tmp_path_factory.mktemp(request.param)
    model = models.build("bert")
    tightfit.apply(model, RECIPES[request.param](model)).save(folder)
    return folder, models.build("bert")


def resign(folder):
    """Fit the digest to the tensor file: whoever changes the one can change the other."""
    document = json.loads((folder / RECIPE_FILE).read_text())
    document["tensors_sha256"] = artifacts.file_digest(folder / TENSOR_FILE)
    (folder / RECIPE_FILE).write_text(json.dumps(document))


def loads_or_is_refused(base, folder, before):
    applied = works_or_is_refused(lambda: tightfit.load(base, folder))
    if applied is not None:
        applied.remove()
        base.load_state_dict(before["values"])  # trained values stay when a recipe is removed
    assert_same(before, snapshot(base))


def few(document):
    """The document with a few of the base's tensors: one is as another."""
    base = {**document["base"]}
    for key in ("tensors", "digests"):
        base[key] = dict(list(base[key].items())[:2])
    return {**document, "base": base}


@amounts(6, 300)
def test_changed_documents(good, cases, tmp_path):
    folder, base = good
    document = json.loads((folder / RECIPE_FILE).read_text())
    shutil.copy(folder / TENSOR_FILE, tmp_path)
    before = snapshot(base)

    def check(pair):
        changed, only_methods = pair
        if only_methods and isinstance(changed, dict):
            changed = {**document, "methods": changed.get("methods", [])}
        (tmp_path / RECIPE_FILE).write_bytes(as_json(changed))
        loads_or_is_refused(base, tmp_path, before)

    draw_cases(cases, st.tuples(changed_documents(st.just(few(document))), st.booleans()), check)


@amounts(4, 300)
def test_damaged_documents(good, cases, tmp_path):
    folder, base = good
    shutil.copy(folder / TENSOR_FILE, tmp_path)
    before = snapshot(base)

    def check(content):
        (tmp_path / RECIPE_FILE).write_bytes(content)
        loads_or_is_refused(base, tmp_path, before)

    draw_cases(cases, damaged_bytes(st.just((folder / RECIPE_FILE).read_bytes())), check)


def split(content: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data: bytes) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + data


@amounts(6, 400)
def test_changed_headers(good, cases, tmp_path):
    folder, base = good
    header, data = split((folder / TENSOR_FILE).read_bytes())
    shutil.copy(folder / RECIPE_FILE, tmp_path)
    before = snapshot(base)

    def check(changed):
        (tmp_path / TENSOR_FILE).write_bytes(joined(changed, data))
        resign(tmp_path)
        loads_or_is_refused(base, tmp_path, before)

    draw_cases(cases, changed_documents(st.just(header)), check)


@amounts(15, 400)
def test_other_tensors(good, cases, tmp_path):
    """Whole files with other shapes, types and names."""
    from safetensors.torch import load_file, save_file

    folder, base = good
    saved = load_file(folder / TENSOR_FILE)
    own = [name for name in saved if name.startswith("part:")]
    shutil.copy(folder / RECIPE_FILE, tmp_path)
    before = snapshot(base)
    types = [torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.uint8, torch.float8_e4m3fn, torch.complex64]
    shapes = st.lists(st.integers(0, 3), max_size=3) | st.just([2**40, 0])
    odd = st.sampled_from([float("nan"), float("inf"), -1.0, 1e30])

    def check(drawn):
        name, kind, shape, dtype, value, other = drawn
        tensors = {key: tensor.clone() for key, tensor in saved.items()}
        old = tensors.pop(name)
        if kind == "shape":
            tensors[name] = torch.ones(shape, dtype=old.dtype)
        elif kind == "dtype":
            tensors[name] = old.to(torch.float32).to(dtype)
        elif kind == "value":
            tensors[name] = torch.full_like(old, value) if old.is_floating_point() else torch.full_like(old, 2**31)
        elif kind == "name":
            tensors[other] = old
        save_file(tensors, tmp_path / TENSOR_FILE)
        resign(tmp_path)
        loads_or_is_refused(base, tmp_path, before)

    names = st.sampled_from(own * 3 + sorted(saved))
    kinds = st.sampled_from(["shape", "dtype", "value", "name", "drop"])
    others = st.sampled_from(["../../etc/passwd", "", "a" * 300, "part:Bank/../x", "bert.encoder"])
    draw_cases(cases, st.tuples(names, kinds, shapes, st.sampled_from(types), odd, others), check)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**27, 0, 7])
def test_declared_headers_are_not_believed(length, tmp_path):
    model = models.build("bert")
    tightfit.apply(model, Lora(rank=2)).save(tmp_path)
    path = tmp_path / TENSOR_FILE
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    resign(tmp_path)
    with bounded(10, 2**28), pytest.raises(tightfit.ArtifactError, match="cannot be read"):
        tightfit.load(models.build("bert"), tmp_path)


def test_declared_shapes_are_not_believed(tmp_path):
    model = models.build("bert")
    tightfit.apply(model, Lora(rank=2)).save(tmp_path)
    header, data = split((tmp_path / TENSOR_FILE).read_bytes())
    name = next(key for key in header if key != "__metadata__")
    for shape in ([2**40, 2**20], [2**62, 4], [2**64, 0], [2**40, 0]):
        (tmp_path / TENSOR_FILE).write_bytes(joined({**header, name: {**header[name], "shape": shape}}, data))
        resign(tmp_path)
        with bounded(10, 2**28), pytest.raises(tightfit.ArtifactError):
            tightfit.load(models.build("bert"), tmp_path)


def test_special_files_are_no_results(tmp_path):
    """A pipe would wait for ever, a device would never end."""
    tightfit.apply(models.build("bert"), Lora(rank=2)).save(tmp_path)
    for name in (RECIPE_FILE, TENSOR_FILE):
        kept = (tmp_path / name).read_bytes()
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
            (tmp_path / name).unlink()
            make(tmp_path / name)
            with bounded(10), pytest.raises(tightfit.ArtifactError):
                tightfit.load(models.build("bert"), tmp_path)
            (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
            (tmp_path / name).write_bytes(kept)


def test_writing_never_follows_a_link_out_of_the_folder(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    for name in (RECIPE_FILE, TENSOR_FILE):
        (tmp_path / "run" / name).symlink_to(outside)
    tightfit.apply(models.build("bert"), Lora(rank=2)).save(tmp_path / "run")
    assert outside.read_text() == "mine"
    tightfit.load(models.build("bert"), tmp_path / "run")


UNSAFE = {
    "megatron": {
        "peft_type": "LORA",
        "target_modules": ["query"],
        "megatron_config": {"a": 1},
        "megatron_core": "evil",
    },
    "adapters": {"peft_type": "XLORA", "hidden_size": 32, "adapters": {"1": "somebody/adapter"}},
    "pattern": {"peft_type": "LORA", "target_modules": "([a-z._0-9]+)+(?!.)x"},
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_an_adapters_config_imports_and_fetches_nothing(kind, tmp_path, monkeypatch):
    """PEFT would import the module a config names, fetch adapters it names, or search with any expression."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = models.build("bert")
    before = snapshot(model)
    with bounded(10), pytest.raises((tightfit.TightfitError, ValueError)):
        tightfit.apply(model, tightfit.Recipe.from_list([{"Lora": {"config": UNSAFE[kind]}}]))
    assert "evil" not in sys.modules
    assert_same(before, snapshot(model))


RUN = {
    "tightfit": "0.1",
    "versions": {"python": "3.11", "torch": "2.13"},
    "device": "cpu",
    "recipe": "Lora",
    "data": {
        "fingerprint": "ab" * 32,
        "train_rows": 3,
        "eval_rows": 2,
        "task": "sequence-classification",
        "label_names": ["a", "b"],
        "num_labels": 2,
        "problem_type": None,
        "notes": [],
    },
    "result": {
        "metrics": {"accuracy": 0.5},
        "metric_name": "accuracy",
        "metric": 0.5,
        "steps": 3,
        "train_seconds": 1.5,
        "trainable_parameters": 3,
        "total_parameters": 30,
        "measured_batch": "2 x 3",
        "peak_bytes": 5,
        "predicted_peak_bytes": None,
        "saved_bytes": 3,
        "step_seconds": 0.5,
        "exact": False,
    },
}
METRICS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "eval_loss": 0.1, "eval_accuracy": 1.0}]
YAML = "model: demo:minilm\ntask: sequence-classification\ndata: {train: demo:stdlib}\noutput: x\n"


@amounts(100, 600)
def test_reports_of_changed_runs(cases, tmp_path):
    """What a report shows is text: nothing of it becomes markup, and no other file is touched."""
    (tmp_path / run_folder.RECIPE).write_text(YAML)

    def check(pair):
        run, metrics = pair
        (tmp_path / run_folder.RUN).write_bytes(as_json(run))
        lines = metrics if isinstance(metrics, list) else [metrics]
        (tmp_path / run_folder.METRICS).write_bytes(b"".join(as_json(line) + b"\n" for line in lines))
        path = works_or_is_refused(lambda: write_report(tmp_path))
        assert path is None or b"<script" not in path.read_bytes()

    draw_cases(cases, st.tuples(changed_documents(st.just(RUN)), changed_documents(st.just(METRICS))), check)
    names = {run_folder.RECIPE, run_folder.RUN, run_folder.METRICS, run_folder.REPORT}
    assert {path.name for path in tmp_path.iterdir()} <= names
