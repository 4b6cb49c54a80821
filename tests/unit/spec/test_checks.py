"""Rules between keys."""

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.spec.load import parse_policy

TEXT = "kvpolicy: 1\nbudget: {}\nprotect: {{sinks: 4, recent: 60}}\nscore: [recency]\n"


def test_budget_below_the_protected_entries_is_refused_where_it_stands():
    with pytest.raises(PolicyError) as caught:
        parse_policy(TEXT.format(63), "p.yaml")

    assert str(caught.value) == ("p.yaml:2:9: budget: must be >= protect.sinks + protect.recent, 64 entries in all: 63")


@pytest.mark.parametrize("budget", [64, 65, "1%", "1KiB"])
def test_budget_that_covers_them_or_is_known_only_later_passes(budget):
    assert parse_policy(TEXT.format(budget)).protect.total == 64


def test_check_sees_overrides():
    with pytest.raises(PolicyError, match=r"^override budget: must be >= protect\.sinks"):
        parse_policy(TEXT.format(64), budget=10)


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        (
            "{recent: 60}",
            r"^p\.yaml:2:9: budget: needs protect: \{prompt: true\}, as it comes on top of the prompt: 25%",
        ),
        ("{prompt: true, recent: 50%}", r"protect\.recent: must be a number of tokens beside a budget that .*: 50%"),
        ("{prompt: true, sinks: 5%}", r"protect\.sinks: must be a number of tokens"),
    ],
)
def test_a_budget_of_what_is_generated_comes_on_top_of_the_prompt(protect, message):
    text = f"kvpolicy: 1\nbudget: 25% of generated\nprotect: {protect}\nscore: [recency]\n"
    with pytest.raises(PolicyError, match=message):
        parse_policy(text, "p.yaml")
