"""A rule says the same in Python, in messages and in JSON Schema."""

import math

import attrs
import jsonschema
import pytest

from kvpolicy.errors import ParameterError
from kvpolicy.stages.parameters import (
    Choice,
    Flag,
    Integer,
    Nested,
    Number,
    Plugged,
    Text,
    is_required,
    object_schema,
    parameter,
    rule_of,
)

NAN, INF, HUGE = math.nan, math.inf, 10**400
TABLE = [
    (Integer(), [0, -5, 7, 10**9, -(10**9)], [True, 1.5, "1", None, [1], NAN, 10**9 + 1, -(10**9) - 1]),
    (Integer(minimum=1), [1, 2], [0, -1, False]),
    (Integer(minimum=1, maximum=3), [1, 3], [0, 4]),
    (Integer(minimum=1, odd=True), [1, 7], [2, -1, 0]),
    (Number(), [0, -1.5, 3, 1e9], [True, "1", None, 1.1e9, -1e300]),
    (Number(minimum=0, maximum=1), [0, 1, 0.5], [-0.1, 1.01]),
    (Number(above=0), [0.1, 1], [0, 0.0, -1]),
    (Choice(("a", "b")), ["a", "b"], ["c", "", 1, None, ["a"]]),
    (Flag(), [True, False], [1, 0, "true", None]),
    (Text(4, shortest=2), ["ab", "abcd"], ["", "a", "abcde", "a\n"]),
    (Text(), ["", "a b", "é", "x" * 1000], ["x" * 1001, "a\nb", "a\n", "\x00", "\t", "\x85", "\u2028", 1, None]),
]
CASES = [(rule, value, good) for rule, yes, no in TABLE for good, part in ((True, yes), (False, no)) for value in part]


@pytest.mark.parametrize(("rule", "value", "good"), CASES, ids=repr)
def test_rule_accepts_what_its_schema_accepts(rule, value, good):
    assert rule.accepts(value) is good
    assert jsonschema.Draft202012Validator(rule.schema()).is_valid(value) is good


@pytest.mark.parametrize("value", [NAN, INF, -INF, HUGE, -HUGE])
def test_number_is_finite_and_fits_a_float(value):
    assert not Number().accepts(value)


def test_integer_is_no_longer_than_a_file_can_say():
    widest = Integer(-(10**20), 10**20)
    assert widest.accepts(10**18 - 1)
    assert not widest.accepts(10**18)
    assert not widest.accepts(-(10**18))


def test_half_surrogate_is_no_text():
    assert not Text().accepts("\ud800")


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Integer(), "an integer from -1000000000 to 1000000000"),
        (Integer(minimum=1), "an integer from 1 to 1000000000"),
        (Integer(minimum=1, odd=True), "an odd integer from 1 to 1000000000"),
        (Integer(maximum=9), "an integer from -1000000000 to 9"),
        (Number(minimum=0, maximum=1), "a number from 0 to 1"),
        (Number(above=0), "a number above 0, up to 1e+09"),
        (Choice(("a", "b")), "one of a, b"),
        (Flag(), "true or false"),
        (Text(), "a line of text, 1000 characters at most"),
        (Text(4, shortest=2), "a line of text, 2 to 4 characters"),
        (Plugged("score"), "a plugin of the stage 'score'"),
    ],
    ids=str,
)
def test_rule_completes_must_be(rule, text):
    assert str(rule) == text


@attrs.frozen
class Inner:
    size: int = parameter(Integer(minimum=1), 7, help="how many")


@attrs.frozen
class Outer:
    must: int = parameter(Integer(), help="no default")
    inner: Inner = parameter(Nested(Inner), help="a mapping that may be left out")
    scorer: object = parameter(Plugged("score", default="recency"), help="a plugin with a default name")
    other: object = parameter(Plugged("score"), help="a plugin without")
    share: float = parameter(Number(), 1, help="a number")


def test_python_gets_the_message_that_a_file_gets():
    with pytest.raises(ParameterError) as caught:
        Inner(size="many")

    assert str(caught.value) == "size: must be an integer from 1 to 1000000000: 'many'"


@pytest.mark.parametrize("value", [HUGE, "x" * 10**6, object()])
def test_message_stays_short_whatever_the_value(value):
    with pytest.raises(ParameterError) as caught:
        Inner(size=-value if isinstance(value, int) else value)

    assert len(str(caught.value)) < 120


def test_equal_numbers_are_held_in_one_form():
    assert repr(Number().convert(1)) == "1.0"
    assert repr(Number().convert(-0.0)) == "0.0"
    assert Number().convert(True) is True
    assert Number().convert("1") == "1"


def test_nested_rule_takes_only_its_class():
    assert Nested(Inner).accepts(Inner())
    assert not Nested(Inner).accepts({"size": 7})
    assert str(Nested(Inner)) == "a mapping with size"


def test_required_is_what_has_neither_a_default_nor_a_default_name():
    required = {field.name: is_required(field) for field in attrs.fields(Outer)}

    assert required == {"must": True, "inner": False, "scorer": False, "other": True, "share": False}


def test_schema_of_an_object_has_help_defaults_and_no_other_keys():
    schema = object_schema(Outer)

    assert schema["required"] == ["must", "other"]
    assert schema["additionalProperties"] is False
    bounds = {"minimum": -1e9, "maximum": 1e9}
    assert schema["properties"]["share"] == {"type": "number", **bounds, "description": "a number", "default": 1}
    assert schema["properties"]["scorer"]["default"] == "recency"
    assert schema["properties"]["inner"]["properties"]["size"]["default"] == 7


def test_field_made_otherwise_has_no_rule():
    @attrs.frozen
    class Bare:
        x: int = attrs.field(default=1, metadata={"rule": "none"})

    with pytest.raises(ParameterError, match=r"x: must be declared with kvpolicy\.stages\.parameter"):
        rule_of(attrs.fields(Bare).x)
