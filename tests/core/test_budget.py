"""Budgets: units, and everything that is no budget."""

import pytest

import tightfit
from tightfit.core.budget import machine_bytes, parse_budget


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        ("1.5gib", 3 * 2**29),
        (".5 MiB", 2**19),
        ("500 mb", 500 * 10**6),
        ("2e3 B", 2000),
        (4096, 4096),
    ],
)
def test_budgets(text, count):
    assert parse_budget(text, elsewhere=True) == count


@pytest.mark.parametrize(
    "given", ["24", "24.5", "", "GiB", "much", "1 potato", "8 G iB", "nan GiB", "1e400GiB", None, 2.5, True]
)
def test_what_is_no_budget(given):
    with pytest.raises(tightfit.BudgetError, match="budget: got") as caught:
        parse_budget(given)
    assert repr(given) in str(caught.value)


@pytest.mark.parametrize("given", ["0GiB", 0, "-1GiB", -5, "0.1 B"])
def test_a_budget_is_more_than_nothing(given):
    with pytest.raises(tightfit.BudgetError, match="more than zero"):
        parse_budget(given)


def test_a_budget_above_the_machines_memory():
    memory = machine_bytes()
    assert memory is not None and memory > 2**28
    assert parse_budget(memory) == memory
    with pytest.raises(tightfit.BudgetError, match=r"of this machine has .*elsewhere"):
        parse_budget(memory + 1)
    assert parse_budget(memory + 1, elsewhere=True) == memory + 1
    assert parse_budget("900 TiB", elsewhere=True) == 900 * 2**40
