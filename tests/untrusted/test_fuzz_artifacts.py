"""Saved recipes from elsewhere: whatever is in the files, loading works or is one clear error, and changes nothing."""

from __future__ import annotations

import json
import shutil

import models
import pytest
import torch
from checks.state import assert_same, snapshot
from fuzzing import ANYTHING, places, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tightfit
from tightfit.core import artifacts
from tightfit.core.artifacts import RECIPE_FILE, TENSOR_FILE

QUICK = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    tightfit.apply(models.build("bert"), tightfit.Lora(rank=2)).save(folder)
    return folder


@pytest.fixture(scope="module")
def base():
    return models.build("bert")


def loads_or_is_refused(base, folder):
    before = snapshot(base)
    try:
        tightfit.load(base, folder).remove()
    except tightfit.TightfitError as error:
        assert len(str(error)) < 2000
    assert_same(before, snapshot(base))


@QUICK
@given(data=st.data())
def test_any_change_of_the_recipe_loads_or_is_refused(good, base, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    document = json.loads((good / RECIPE_FILE).read_text())
    few = [p for p in places(document) if "tensors" not in p or len(p) < 3]  # one of the base's tensors is as another
    path = data.draw(st.sampled_from(few))
    (folder / RECIPE_FILE).write_text(json.dumps(put(document, path, data.draw(ANYTHING))))
    shutil.copy(good / TENSOR_FILE, folder)
    loads_or_is_refused(base, folder)


@QUICK
@given(data=st.data())
def test_any_tensors_load_or_are_refused(good, base, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tensors")
    tensors = load_file(good / TENSOR_FILE)
    name = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(["shape", "dtype", "name", "part"]))
    value = tensors.pop(name)
    if change == "shape":
        tensors[name] = torch.ones(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    elif change == "dtype":
        tensors[name] = value.to(data.draw(st.sampled_from([torch.int64, torch.bool, torch.bfloat16, torch.float64])))
    else:
        other = data.draw(st.sampled_from(["../../etc/passwd", "", "a" * 300, "part:Bank/../x", "bert.encoder"]))
        tensors[other if change == "name" else f"part:{other}"] = value
    save_file(tensors, folder / TENSOR_FILE)
    document = json.loads((good / RECIPE_FILE).read_text())
    document["tensors_sha256"] = artifacts._file_digest(folder / TENSOR_FILE)
    (folder / RECIPE_FILE).write_text(json.dumps(document))
    loads_or_is_refused(base, folder)


@QUICK
@given(at=st.integers(0, 400), byte=st.binary(min_size=1, max_size=9))
def test_damaged_tensor_headers_are_refused(good, base, tmp_path_factory, at, byte):
    folder = tmp_path_factory.mktemp("header")
    content = bytearray((good / TENSOR_FILE).read_bytes())
    content[at : at + len(byte)] = byte
    (folder / TENSOR_FILE).write_bytes(content)
    document = json.loads((good / RECIPE_FILE).read_text())
    document["tensors_sha256"] = artifacts._file_digest(folder / TENSOR_FILE)
    (folder / RECIPE_FILE).write_text(json.dumps(document))
    loads_or_is_refused(base, folder)
