"""Recipes and transforms as values."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, ClassVar

import pytest
from checks import transforms

import tightfit
from tightfit import Checkpointing, Lora, PartialEmbedding, Recipe, Slot, Transform, chain
from tightfit.core.fields import check_bool, check_choice, check_float, check_int, check_selector


def test_chains_nest_and_compare_by_value():
    nested = chain(Lora(rank=4), chain(Checkpointing(), chain(PartialEmbedding(ids=[3, 1]))))
    flat = chain(Lora(rank=4), Checkpointing(), PartialEmbedding(ids=(1, 3)))
    assert nested == flat
    assert hash(nested) == hash(flat)
    assert len(nested) == 3
    assert str(nested) == "Lora + Checkpointing + PartialEmbedding"
    assert repr(nested) == "chain(Lora(rank=4), Checkpointing(), PartialEmbedding(ids=(1, 3)))"
    assert chain() == Recipe([])
    assert str(chain()) == "stock"


def test_exactness_is_that_of_all():
    assert chain(Checkpointing(), PartialEmbedding()).exact
    assert not chain(Checkpointing(), Lora()).exact
    assert not chain(PartialEmbedding(head="pruned")).exact


@pytest.mark.parametrize(
    ("item", "said"),
    [(Lora, r"argument 0 is .*did you mean Lora\(\)\?"), ("Lora", "argument 0 is 'Lora', accepted are transforms")],
)
def test_chain_refuses_other_things(item, said):
    with pytest.raises(TypeError, match=said):
        chain(item)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("Lora", r"methods: got str, accepted is a list"),
        ([3], r"methods\[0\]: got 3, accepted is one method"),
        ([{"Lora": {}, "Checkpointing": {}}], r"methods\[0\]: got .*accepted is one method"),
        (["Checkpointing", "Loraa"], r"methods\[1\]: unknown method 'Loraa'; did you mean 'Lora'\?; known are .*Lora"),
        ([{"Lora": [8]}], r"methods\[0\].Lora: got \[8\], accepted is a mapping"),
        (
            [{"Lora": {"rnak": 8}}],
            r"methods\[0\].Lora.rnak: unknown field; did you mean 'rank'\?; known are rank, alpha",
        ),
        ([{"Lora": {"rank": 0}}], r"methods\[0\].Lora: Lora\(rank=...\): got 0, accepted is an int >= 1"),
    ],
)
def test_a_method_list_is_read_strictly(methods, said):
    with pytest.raises(tightfit.RecipeError, match=said):
        Recipe.from_list(methods)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "recipe JSON: line 1, column 2"),
        ("[]", "recipe JSON: no 'methods' list"),
        ('{"tightfit": 2, "methods": []}', "format 2, this version reads format 1"),
    ],
)
def test_json_that_is_no_recipe(text, said):
    with pytest.raises(tightfit.RecipeError, match=said):
        Recipe.from_json(text)


def test_yaml():
    text = "methods:\n- Checkpointing\n- Lora: {rank: 4}\n- PartialEmbedding:\n"
    assert Recipe.from_yaml(text) == chain(Checkpointing(), Lora(rank=4), PartialEmbedding())
    with pytest.raises(tightfit.RecipeError, match=r"recipe YAML: .*line 1"):
        Recipe.from_yaml("a: [")


def test_a_transform_with_tuples_and_conveniences_round_trips():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Pieces(Transform):
        layers: tuple[int, ...] = (1, 2)
        helper: Any = dataclasses.field(default=None, compare=False, repr=False)
        name: ClassVar[str] = "test-pieces"

    recipe = chain(Pieces(layers=(4,), helper=object()))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.to_list() == [{"Pieces": {"layers": [4]}}]
    assert chain(Pieces()).to_list() == [{"Pieces": {}}]
    with pytest.raises(TypeError, match="cannot be written into a recipe"):
        chain(Pieces(layers=(object(),))).to_json()


@pytest.mark.parametrize(
    ("method", "field", "given", "kept"),
    [
        (tightfit.PartialEmbedding, "ids", [3, 1], (1, 3)),
        (tightfit.Reversible, "span", [0, 2], (0, 2)),
        (tightfit.LadderSide, "keep_layers", [0, 2], (0, 2)),
        (tightfit.Sherl, "keep_layers", [[0, 1], [0, 2]], ((0, 1), (0, 2))),
        (tightfit.Losa, "keep_layers", [1], (1,)),
        (tightfit.SparseAdapter, "betas", [0.8, 0.99], (0.8, 0.99)),
        (tightfit.LearnableMemory, "earlier", [["digits", 10, 5]], (("digits", 10, 5),)),
    ],
)
def test_a_list_is_taken_as_a_tuple(method, field, given, kept):
    value = method(**{field: given})
    assert getattr(value, field) == kept and value == method(**{field: kept}) and hash(value) is not None
    assert Recipe.from_yaml(chain(value).to_yaml()) == chain(value)


def test_transforms_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Lora().rank = 3
    with pytest.raises(TypeError):
        Lora(8)


def test_facts_of_the_methods():
    classes = tightfit.methods()
    assert {cls.__name__ for cls in classes} >= {"Lora", "Checkpointing", "PartialEmbedding"}
    assert not {cls.__name__ for cls in classes} & set(vars(transforms))
    assert len({cls.name for cls in classes}) == len(classes)
    for cls in classes:
        assert cls.summary
        assert not cls.paper or re.fullmatch(r"\d{4}\.\d{5}", cls.paper)
        assert cls.touches
        assert all(isinstance(slot, Slot) for slot in cls.touches)
        assert isinstance(cls.exact, bool)
        assert isinstance(cls.reversible, bool)
        assert issubclass(cls, Transform)
        assert getattr(tightfit, cls.__name__) is cls


def test_an_incomplete_transform_says_what_is_missing():
    import models

    with pytest.raises(
        ValueError, match=r"PartialEmbedding: ids are missing; give ids=..., or let PartialEmbedding.scan"
    ):
        tightfit.apply(models.build("bert"), PartialEmbedding())


@dataclasses.dataclass
class Fields:
    x: Any


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            lambda f: check_int(f, "x", 1, 9),
            [1, 9],
            [(0, ValueError), (10, ValueError), (True, TypeError), (1.0, TypeError)],
        ),
        (lambda f: check_int(f, "x", 1, optional=True), [None, 4], [("1", TypeError)]),
        (
            lambda f: check_float(f, "x", 0, 1, open_low=True, open_high=True),
            [0.5],
            [(0, ValueError), (1, ValueError), (math.nan, ValueError), (False, TypeError), ("a", TypeError)],
        ),
        (lambda f: check_float(f, "x", 0), [0, 5.5], [(math.inf, ValueError), (-1, ValueError)]),
        (lambda f: check_bool(f, "x"), [True, False], [(1, TypeError), (None, TypeError)]),
        (lambda f: check_choice(f, "x", ("a", "b")), ["a"], [("c", ValueError), (None, ValueError), ([], ValueError)]),
        (lambda f: check_choice(f, "x", (4, 8)), [4], [(True, ValueError), (5, ValueError)]),
        (lambda f: check_selector(f, "x"), ["a|b.*"], [("", ValueError), ("a||b", ValueError), (3, TypeError)]),
    ],
)
def test_field_checks(check, good, bad):
    for value in good:
        check(Fields(value))
    for value, kind in bad:
        with pytest.raises(kind, match=r"Fields\(x=...\): got .*accepted is "):
            check(Fields(value))
