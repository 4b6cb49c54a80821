"""Places and paths read as in an editor; problems come in the order of the file."""

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.spec.tree import Item, Problems, SourcePosition, below


def test_place_and_path_make_the_beginning_of_a_message():
    assert SourcePosition("p.yaml", 7, 11).at("score[0].queries") == "p.yaml:7:11: score[0].queries"
    assert SourcePosition("p.yaml", 7, 11).at("") == "p.yaml:7:11"
    assert SourcePosition("override").at("budget") == "override budget"


@pytest.mark.parametrize(
    ("path", "key", "whole"),
    [
        ("", "score", "score"),
        ("score", 0, "score[0]"),
        ("score[0]", "pool", "score[0].pool"),
        ("", "a b", "['a b']"),
        ("pool", "x" * 100, f"pool['{'x' * 59}…']"),
    ],
)
def test_path_grows_by_keys_and_numbers(path, key, whole):
    assert below(path, key) == whole


def test_plain_data_has_no_places():
    place = SourcePosition("p.yaml", 1, 1)
    tree = Item({"a": Item((Item(1, place), Item(None, place)), place)}, place)

    assert tree.plain == {"a": (1, None)}
    assert tree.only({"b"}).plain == {}


def test_problems_are_sorted_by_place_and_keep_the_first_cause():
    problems = Problems()
    problems.raise_any()
    cause = ValueError("why")
    problems.add(SourcePosition("p.yaml", 9, 1), "b", "second")
    problems.add(SourcePosition("p.yaml", 2, 5), "a", "first", cause)

    with pytest.raises(PolicyError) as caught:
        problems.raise_any()

    assert str(caught.value) == "p.yaml:2:5: a: first\np.yaml:9:1: b: second"
    assert caught.value.__cause__ is cause
