"""Recipe files and recipe documents from elsewhere: read, or refused by one error of the library."""

from __future__ import annotations

import json

import pytest
import yaml
from fuzzing import amounts, as_json, bounded, changed_documents, damaged_bytes, draw_cases, works_or_is_refused
from hypothesis import strategies as st

import tightfit
from tightfit.train.recipe_file import read_recipe_file

METHODS = [
    {"Lora": {"rank": 4, "alpha": 8.0, "where": "query|value"}},
    {"Lora": {"config": {"peft_type": "LORA", "r": 2, "target_modules": ["query"]}}},
    {"PartialEmbedding": {"ids": [0, 1, 2, 3], "head": "split", "unknown": "grow"}},
    {"WtaCrs": {"budget": 0.3, "mode": "pps"}},
    {"Velora": {"groups": 8, "where": "*.dense"}},
    {"Mesa": {"bits": 4, "group_size": 32}},
    {"TokenTune": {"ratio": 0.5, "policy": "block"}},
    {"Reversible": {"variant": "meft1", "adapter_dim": 4}},
    {"SparseAdapter": {"width": 96, "top_k": 8}},
    {"LadderSide": {"reduction": 4, "keep_layers": [0, 1]}},
    {"Sherl": {"reduction": 4}},
    {"Losa": {"rank": 4}},
    {"RecurrentMemory": {"tokens": 2, "segment": 8, "bptt": "block:1"}},
    {"TokenTuringMachine": {"tokens": 2, "memory": 3}},
    {"LearnableMemory": {"tokens": 2}},
    {"Checkpointing": {"offload": True}},
    {"FusedOps": {"loss": False}},
]
DOCUMENTS = [{"tightfit": 1, "methods": [method]} for method in METHODS]
FILE = {
    "model": "demo:minilm",
    "task": "sequence-classification",
    "data": {"train": "demo:stdlib", "text": ["text"], "label": "package", "columns": ["a", "b"], "rows": 5},
    "methods": [{"Lora": {"rank": 4}}, {"WtaCrs": {"budget": 0.3}}],
    "train": {"epochs": 2, "learning_rate": 1e-3, "seed": 3, "precision": "bf16"},
    "output": "runs/x",
}


def test_the_documents_are_good():
    for document in DOCUMENTS:
        assert len(tightfit.Recipe.from_json(json.dumps(document))) == 1
    assert {next(iter(m)) for m in METHODS} == {cls.__name__ for cls in tightfit.methods()}


@amounts(120, 3_000)
def test_changed_documents(cases):
    def check(document):
        recipe = works_or_is_refused(lambda: tightfit.Recipe.from_json(as_json(document).decode()))
        if recipe is not None:
            assert tightfit.Recipe.from_json(recipe.to_json()).to_list() == recipe.to_list()

    draw_cases(cases, changed_documents(st.sampled_from(DOCUMENTS)), check)


@pytest.mark.parametrize("kind", ["json", "yaml"])
@amounts(40, 1_500)
def test_damaged_texts(kind, cases):
    def text_of(document):
        return as_json(document) if kind == "json" else yaml.safe_dump(document).encode()

    def check(content):
        text = content.decode("utf-8", "replace")
        read = tightfit.Recipe.from_json if kind == "json" else tightfit.Recipe.from_yaml
        works_or_is_refused(lambda: read(text))

    draw_cases(cases, damaged_bytes(st.sampled_from([text_of(d) for d in DOCUMENTS])), check)


@amounts(30, 1_500)
def test_damaged_recipe_files(cases, tmp_path):
    path = tmp_path / "recipe.yaml"

    def check(content):
        path.write_bytes(content)
        works_or_is_refused(lambda: read_recipe_file(path))

    draw_cases(cases, damaged_bytes(st.just(yaml.safe_dump(FILE, sort_keys=False).encode())), check)


@amounts(40, 1_500)
def test_changed_recipe_files(cases, tmp_path):
    path = tmp_path / "recipe.yaml"

    def check(document):
        path.write_bytes(as_json(document))  # JSON is YAML
        works_or_is_refused(lambda: read_recipe_file(path))

    draw_cases(cases, changed_documents(st.just(FILE)), check)


@amounts(15, 300)
def test_overrides(cases, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(FILE))
    keys = [
        "train.epochs",
        "methods.0.Lora.rank",
        "data",
        "methods",
        "data.text.0",
        "methods.9",
        "model",
        "..",
        "train",
    ]

    def check(pair):
        key, value = pair
        works_or_is_refused(lambda: read_recipe_file(path, [f"{key}={value.decode('utf-8', 'replace')}"]))

    values = damaged_bytes(st.sampled_from([b"3", b"[a, b]", b"{Lora: {rank: 2}}", b""]))
    draw_cases(cases, st.tuples(st.sampled_from(keys), values), check)


LAUGHS = "\n".join(
    [
        "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
        "methods: *a11",
    ]
)


@pytest.mark.parametrize(
    "text",
    [LAUGHS, "methods: &a [*a]", "methods: " + "[" * 20_000, "methods: " + "{a: " * 20_000, "methods: [" + "9" * 9000],
    ids=["laughs", "itself", "lists", "mappings", "digits"],
)
def test_yaml_that_grows(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for read in (lambda: read_recipe_file(path), lambda: tightfit.Recipe.from_yaml(text)):
        with bounded(20), pytest.raises(tightfit.TightfitError) as caught:
            read()
        assert len(str(caught.value)) < 3000


def test_no_python_object_is_built(tmp_path):
    marker = tmp_path / "made"
    path = tmp_path / "recipe.yaml"
    for tag in (f"!!python/object/apply:os.mkdir ['{marker}']", f"!!python/object/new:os.mkdir ['{marker}']"):
        path.write_text(f"model: {tag}\n")
        for read in (lambda: read_recipe_file(path), lambda: tightfit.Recipe.from_yaml(path.read_text())):
            with pytest.raises(tightfit.RecipeError):
                read()
    assert not marker.exists()


@pytest.mark.parametrize(
    "text", ["!!timestamp 2001-99-99x", "!!bool perhaps", "{methods: [{Lora: {rank: !!bool no!}}]}"]
)
def test_what_yaml_cannot_make_is_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for read in (lambda: tightfit.Recipe.from_yaml(text), lambda: read_recipe_file(path)):
        with pytest.raises(tightfit.RecipeError, match=r"no (timestamp|bool): "):
            read()


@pytest.mark.parametrize("key", ["model", "train", "eval"])
def test_a_name_that_is_too_long_for_a_file_is_a_name(key, tmp_path):
    path = tmp_path / "recipe.yaml"
    long = "d" * 5000
    document = {**FILE, "data": {**FILE["data"], **({} if key == "model" else {key: long})}}
    path.write_text(yaml.safe_dump(document | ({"model": long} if key == "model" else {})))
    found = read_recipe_file(path)
    assert long in (found.model, found.data.train, found.data.eval)
