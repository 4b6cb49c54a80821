"""Three ways to say how much to keep, each read and written alike."""

from fractions import Fraction

import pytest

from kvpolicy.spec.budget import Budget
from kvpolicy.spec.policy import BudgetRule


@pytest.mark.parametrize(
    ("value", "budget", "dumped"),
    [
        (1, Budget(tokens=1), 1),
        ("10%", Budget(share=Fraction(1, 10)), "10%"),
        ("100 %", Budget(share=Fraction(1)), "100%"),
        ("0.125%", Budget(share=Fraction(1, 800)), "0.125%"),
        ("25% of generated", Budget(generated=Fraction(1, 4)), "25% of generated"),
        ("2GiB", Budget(size=2**31), "2GiB"),
        ("1.5 KiB", Budget(size=1536), "1536B"),
        ("1KB", Budget(size=1000), "1000B"),
        ("1.000001GB", Budget(size=1_000_001_000), "1000001000B"),
        ("1024MiB", Budget(size=2**30), "1GiB"),
    ],
)
def test_form_is_read_and_written(value, budget, dumped):
    assert Budget.parse(value) == budget
    assert budget.dump() == dumped
    assert Budget.parse(dumped) == budget
    assert str(budget) == str(dumped)
    assert BudgetRule().accepts(budget)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        True,
        1.0,
        None,
        "",
        "10",
        "0%",
        "101%",
        "1e2%",
        "-1%",
        "0B",
        "0.1B",
        "100% of generated",
        "0% of generated",
        "25 of generated",
        "GiB",
        10**18,
    ],
)
def test_everything_else_is_no_budget(value):
    assert Budget.parse(value) is None


@pytest.mark.parametrize("budget", [Budget(), Budget(tokens=0), Budget(tokens=1, size=1), Budget(share=Fraction(1, 3))])
def test_budget_that_no_file_can_say_breaks_the_rule(budget):
    assert not BudgetRule().accepts(budget)
