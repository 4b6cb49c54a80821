"""Top-level keys can be replaced by plain Python data, under the rules of the file."""

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.spec.budget import Budget
from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.policy import Compress, Protect

TEXT = "kvpolicy: 1\nbudget: 64\nscore: [recency]\nprotect: {sinks: 4}\n"
DEEP = []
DEEP.append(DEEP)


def test_override_replaces_the_whole_key():
    spec = parse_policy(
        TEXT,
        budget="10%",
        protect={"recent": 16},
        compress={"every": "never"},
        score=[{"use": "attention", "queries": 3, "weight": 2}, "recency"],
        select="topk",
        name="other",
    )

    assert spec.budget == Budget.parse("10%")
    assert spec.protect == Protect(sinks=0, recent=16)
    assert spec.compress == Compress(every="never")
    assert [one.scorer.name for one in spec.score] == ["attention", "recency"]
    assert (spec.score[0].scorer.queries, spec.score[0].weight, spec.name) == (3, 2.0, "other")


def test_override_may_mend_what_the_file_has_wrong():
    assert parse_policy("kvpolicy: 1\nbudget: no\nscore: [recency]\n", budget=5).budget.tokens == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"budget": 0}, "override budget: must be a number of tokens from 1 to 1000000000"),
        ({"budget": True}, "override budget: must be a number of tokens from 1 to 1000000000"),
        ({"budget": 10**5000}, ": an integer of 16610 bits"),
        ({"budgt": 5}, "override budgt: unknown key; did you mean 'budget'? known: kvpolicy, name"),
        ({"protect": {"sink": 3}}, "override protect.sink: unknown key; did you mean 'sinks'? known: sinks, recent"),
        ({"protect": {3: 3}}, "override protect: must have text as its keys: 3"),
        ({"protect": None}, "override protect: must be a mapping with sinks, recent, prompt, regions: null"),
        (
            {"score": [{"use": "attention", "queries": "many"}]},
            "override score[0].queries: must be an integer from 1 to 4096: 'many'",
        ),
        ({"score": [{"use": "history"}]}, "override score[0].of: must be given: a plugin of the stage 'score'"),
        ({"score": []}, "override score: must be a list of 1 to 64 scorers: an empty list"),
        (
            {"score": [{"use": "recency", "weight": float("nan")}]},
            "override score[0].weight: must be a number from -1e+09 to 1e+09: nan",
        ),
        ({"score": DEEP}, "must be nested at most 16 deep"),
        (
            {"select": object()},
            "override select: must be plain data (dict, list, str, int, float, bool): a Python object",
        ),
        ({"select": {"use": b"topk"}}, "override select.use: must be plain data"),
        ({"name": "\ud800"}, "override name: must be a line of text, 1000 characters at most: "),
        ({"kvpolicy": 2}, "override kvpolicy: must be 1, the version of policy files: 2"),
    ],
)
def test_bad_override_is_told_as_such(overrides, message):
    with pytest.raises(PolicyError) as caught:
        parse_policy(TEXT, **overrides)

    assert message in str(caught.value)


def test_override_of_what_is_no_mapping_leaves_the_first_problem():
    with pytest.raises(PolicyError, match=r"^policy:1:1: must be a mapping"):
        parse_policy("[]", budget=5)
