"""A policy is written in one readable form, and known by a digest of what it says."""

import re

import attrs
import pytest

from kvpolicy.spec.dump import digest, to_yaml
from kvpolicy.spec.load import parse_policy, read_policy
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages.registry.plugins import registry

TEXT = """\
# a comment
score:
  - weight: -1
    use: attention
    pool: {size: 7, kind: max}
    queries: 32
  - recency
kvpolicy: 1
merge: {use: drop}
summary: 'what: it is'
budget: 1024MiB
"""
WRITTEN = """\
kvpolicy: 1
name: mine
summary: "what: it is"
budget: 1GiB
compress: {prefill: true, every: 128}
protect: {sinks: 0, recent: 0}
score:
  - {use: attention, pool: {kind: max, size: 7}, weight: -1.0}
  - {use: recency, weight: 1.0}
allocate: {layers: uniform, heads: uniform}
select: topk
merge: drop
store: plain
read: all
"""


def test_form_is_complete_and_canonical():
    spec = parse_policy(TEXT, default_name="mine")

    assert to_yaml(spec) == WRITTEN.replace("budget: 1GiB", 'budget: "1GiB"')
    assert parse_policy(to_yaml(spec)) == spec


def test_every_key_of_a_policy_is_written():
    spec = attrs.evolve(read_policy("rkv")[0], summary="s")
    keys = re.findall(r"^(\w+):", to_yaml(spec), re.MULTILINE)

    assert sorted(keys) == sorted(["kvpolicy", *(field.name for field in attrs.fields(PolicySpec))])


@pytest.mark.parametrize("name", sorted(registry().policies()))
def test_installed_policy_survives_being_written(name):
    spec = read_policy(name)[0]

    assert parse_policy(to_yaml(spec)) == spec
    assert to_yaml(parse_policy(to_yaml(spec))) == to_yaml(spec)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "true",
        "12",
        "1e3",
        "~",
        "",
        " a ",
        "a: b",
        "a #b",
        "-",
        'q"\\',
        "[x]",
        "é",
        "😀",
        "\ufeff",
        "\ufffe",
        "no",
    ],
)
def test_text_is_quoted_where_it_would_be_read_otherwise(text):
    spec = attrs.evolve(read_policy("rkv")[0], name=text)

    assert parse_policy(to_yaml(spec)).name == text


def test_digest_goes_by_what_a_policy_says_and_not_by_its_form():
    spec = parse_policy(TEXT, default_name="mine")

    assert re.fullmatch("[0-9a-f]{16}", digest(spec))
    assert digest(parse_policy(WRITTEN)) == digest(spec)
    assert digest(attrs.evolve(spec, name="other")) != digest(spec)
    assert digest(parse_policy(WRITTEN.replace("-1.0", "-1.5"))) != digest(spec)


def test_digest_does_not_depend_on_what_else_is_installed(install, scorer_source):
    before = digest(parse_policy(WRITTEN))
    install("my-kv", scorer_source("recency"))
    theirs, ours = (WRITTEN.replace("use: recency", f'use: "{owner}:recency"') for owner in ("my-kv", "kvpolicy"))

    assert digest(parse_policy(ours)) == before
    assert digest(parse_policy(theirs)) != before
    assert '{use: "my-kv:recency", weight: 1.0}' in to_yaml(parse_policy(theirs))
    assert parse_policy(to_yaml(parse_policy(theirs))) == parse_policy(theirs)


def test_digest_of_an_installed_policy_is_stable():
    """If this fails, digests noted with earlier measurements no longer tell which policy was measured."""
    assert digest(parse_policy(WRITTEN)) == "07c2dfb41046ef18"


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("snapkv", {}, "b12a0238c737608b"),
        ("rkv", {}, "0851d017a45cd5f3"),
        ("h2o", {"protect": {"sinks": 3, "recent": 400}}, "b3b8d9f4b32d334b"),
    ],
)
def test_digests_of_policies_without_shares_stay(name, overrides, expected):
    """As they were before what is protected could be a share of the budget."""
    assert digest(read_policy(name, **overrides)[0]) == expected


def test_shares_are_written_and_told_apart():
    found = [read_policy("h2o", protect={"recent": share})[0] for share in ("50%", "50.0 %", "50.000001%", 50)]
    assert found[0] == found[1]
    assert len({digest(spec) for spec in found}) == 3
    assert 'protect: {sinks: 0, recent: "50.000001%"}' in to_yaml(found[2])
