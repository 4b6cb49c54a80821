"""Editors accept what the reader accepts, and refuse what it refuses."""

import json

import jsonschema
import pytest

from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.reader import read
from kvpolicy.spec.schema import json_schema
from kvpolicy.spec.tree import Problems
from kvpolicy.stages.registry.plugins import registry

GOOD = {"kvpolicy": 1, "budget": 64, "score": ["recency"]}
WRONG = [
    {"budget": 0},
    {"budget": "ten"},
    {"kvpolicy": 2},
    {"score": []},
    {"score": [{"weight": 1}]},
    {"score": ["recencyy"]},
    {"score": ["history"]},
    {"score": [{"use": "history"}]},
    {"score": [{"use": "attention", "queries": "many"}]},
    {"score": [{"use": "attention", "querys": 8}]},
    {"score": [{"use": "attention", "pool": {"kind": "max", "size": 6}}]},
    {"score": [{"use": "recency", "weight": "heavy"}]},
    {"score": [{"use": "history", "of": {"use": "recency", "weight": 2}}]},
    {"protct": {}},
    {"protect": {"sinks": -1}},
    {"allocate": {"layers": "adaptive"}},
    {"allocate": {"heads": {"use": "adaptive", "floor": 2}}},
    {"select": {"use": "topk", "k": 3}},
    {"name": "two\nlines"},
]
RIGHT = [
    {},
    {"budget": "10%"},
    {"budget": "2 GiB"},
    {"score": [{"use": "history", "of": "recency", "scale": "none", "weight": -1}]},
    {"score": [{"use": "kvpolicy:recency"}]},
    {"select": "topk"},
    {"select": {"use": "topk"}},
    {"allocate": {"layers": {"use": "pyramid", "beta": 3}}},
    {"allocate": {}},
    {"compress": {"every": "never"}},
    {"name": "é"},
]


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_wrong_policy_is_refused_by_both(validator, change):
    policy = {**GOOD, **change}

    assert not validator.is_valid(policy)
    with pytest.raises(Exception, match=r"must be|unknown"):
        parse_policy(json.dumps(policy))


@pytest.mark.parametrize("change", RIGHT, ids=str)
def test_right_policy_is_accepted_by_both(validator, change):
    policy = {**GOOD, **change}

    assert parse_policy(json.dumps(policy))
    assert list(validator.iter_errors(policy)) == []


@pytest.mark.parametrize("missing", GOOD)
def test_what_must_be_given_is_required(validator, missing):
    assert not validator.is_valid({key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize("name", sorted(registry().policies()))
def test_installed_policy_is_valid(validator, name):
    text = registry().policies()[name].read_bytes()
    plain = json.loads(json.dumps(read(text, name, Problems()).plain))

    assert list(validator.iter_errors(plain)) == []


def test_every_plugin_has_an_entry_with_its_help():
    definitions = json_schema()["$defs"]

    for record in registry().plugins():
        entry = definitions[f"{record.stage}/{record.qualified}"]
        assert entry["description"] == record.summary
        assert all(part.get("description") for key, part in entry["properties"].items() if key != "use")
    beside = definitions["weighted/kvpolicy:history"]["properties"].keys()
    assert beside - definitions["score/kvpolicy:history"]["properties"].keys() == {"weight", "normalise"}


def test_plugin_of_a_third_party_is_in_the_schema(install, scorer_source):
    install("my-kv", scorer_source("mine", "size: int = parameter(Integer(minimum=2), help='how many')"))
    validator = jsonschema.Draft202012Validator(json_schema())

    assert validator.is_valid({**GOOD, "score": [{"use": "mine", "size": 2}]})
    assert not validator.is_valid({**GOOD, "score": [{"use": "mine", "size": 1}]})
    assert not validator.is_valid({**GOOD, "score": ["mine"]})
