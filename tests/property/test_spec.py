"""Any text gives a policy or our error; any policy survives being written; equal digests mean equal policies."""

import math
from fractions import Fraction

import attrs
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.errors import ParameterError, PolicyError
from kvpolicy.spec.budget import Budget, Part
from kvpolicy.spec.dump import digest, to_yaml
from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.policy import TERM_KEYS, BudgetRule, CountRule, EveryRule, NamesRule, PolicySpec, ScoreRule, Weighted
from kvpolicy.spec.reader import read
from kvpolicy.spec.schema import json_schema
from kvpolicy.spec.tree import Problems
from kvpolicy.stages.parameters import (
    LARGEST,
    Choice,
    Flag,
    Integer,
    Nested,
    Number,
    Plugged,
    Text,
    is_required,
    rule_of,
)
from kvpolicy.stages.registry.plugins import registry
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.support.examples import examples

BUDGETS = st.one_of(
    st.integers(1, LARGEST),
    st.from_regex(r"([1-9][0-9]?(\.[0-9]{1,6})?|100|0\.[0-9]{0,5}[1-9]) ?%", fullmatch=True),
    st.from_regex(r"[1-9][0-9]?(\.[0-9]{1,6})? ?% of generated", fullmatch=True),
    st.from_regex(r"[0-9]{1,9}(\.[0-9]{1,6})? ?(B|[KMG]i?B)", fullmatch=True),
).filter(Budget.parse)


def values(rule, depth=0):  # noqa: C901, PLR0911 - a branch per kind of rule
    """Every value that keeps a rule: one strategy per kind of rule, none per plugin."""
    match rule:
        case Integer():
            low, high = rule.minimum, rule.maximum
            found = st.one_of(st.integers(low, min(high, low + 9)), st.integers(low, high))
            return found.map(lambda number: number | 1).filter(rule.accepts) if rule.odd else found
        case Number():
            low = rule.minimum if rule.above is None else rule.above
            floats = st.floats(low, rule.maximum, allow_nan=False, allow_infinity=False)
            whole = st.integers(math.ceil(low), math.floor(rule.maximum))
            return st.one_of(floats, whole).filter(rule.accepts)
        case Choice():
            return st.sampled_from(rule.words)
        case Flag():
            return st.booleans()
        case Text():
            allowed = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
            return st.text(allowed, max_size=20).filter(rule.accepts)
        case BudgetRule():
            return BUDGETS.map(Budget.parse)
        case CountRule():
            return st.integers(0, LARGEST) | st.integers(1, 10**8).map(lambda n: Part(Fraction(n, 10**8)))
        case EveryRule():
            return st.one_of(st.just("never"), st.integers(1, LARGEST))
        case Nested():
            return built(rule.kind, depth)
        case Plugged():
            return st.none() | plugins(rule.stage, depth) if rule.optional else plugins(rule.stage, depth)
        case NamesRule():
            return st.lists(values(Text(64)).filter(bool), max_size=3, unique=True).map(tuple)
        case ScoreRule():
            return st.lists(plugins("score", depth).flatmap(weighted), min_size=1, max_size=3).map(tuple)
    raise TypeError(rule)


@st.composite
def built(draw, kind, depth=0):
    """A part of a policy; without what is optional where that does not go with the rest."""
    found = {field.name: draw(values(rule_of(field), depth)) for field in attrs.fields(kind)}
    try:
        return kind(**found)
    except ParameterError:
        optional = {field.name for field in attrs.fields(kind) if getattr(rule_of(field), "optional", False)}
        return kind(**{name: None if name in optional else value for name, value in found.items()})


def plugins(stage, depth):
    kinds = [registry().find(stage, name) for name in registry().names(stage)]
    if depth:  # a scorer on a scorer on a scorer says nothing more
        kinds = [kind for kind in kinds if not any(isinstance(rule_of(f), Plugged) for f in attrs.fields(kind))]
    return st.sampled_from(kinds).flatmap(lambda kind: fitting(kind, depth + 1))


@st.composite
def fitting(draw, kind, depth):
    """A plugin; with its defaults where a rule between its parameters refuses what was drawn."""
    values = draw(st.fixed_dictionaries({field.name: values_of(field, depth) for field in attrs.fields(kind)}))
    try:
        return kind(**values)
    except ParameterError:
        return kind(**{name: values[name] for name in values if is_required(getattr(attrs.fields(kind), name))})


def values_of(field, depth):
    return values(rule_of(field), depth)


def weighted(scorer):
    beside = {field.name: values(rule_of(field)) for field in attrs.fields(Weighted) if field.name in TERM_KEYS}
    return st.builds(Weighted, st.just(scorer), **beside)


@st.composite
def specs(draw):
    spec = consistent(draw(built(PolicySpec)))
    tokens = spec.budget.tokens
    if tokens is None or tokens >= spec.protect.total:
        return spec
    sinks, recent = spec.protect.sinks, spec.protect.recent
    sinks = min(sinks, tokens // 2) if isinstance(sinks, int) else sinks
    left = tokens - sinks if isinstance(sinks, int) else tokens
    recent = min(recent, left) if isinstance(recent, int) else recent
    return attrs.evolve(spec, protect=attrs.evolve(spec.protect, sinks=sinks, recent=recent))


def consistent(spec):
    """The policy with defaults for what does not go together."""
    plain = {stage: registry().find(stage, name)() for stage, name in _PLAIN.items()}
    if not any(one.needs().queries for one in spec.shown_views.values()):
        if spec.merge.reads_window:
            spec = attrs.evolve(spec, merge=plain["merge"])
        if spec.allocate.divider.reads_window:
            spec = attrs.evolve(spec, allocate=attrs.evolve(spec.allocate, joint=None, heads=plain["allocate.heads"]))
    if spec.budget.generated is not None:
        counts = {
            key: count if isinstance(count := getattr(spec.protect, key), int) else 3 for key in ("sinks", "recent")
        }
        spec = attrs.evolve(spec, protect=attrs.evolve(spec.protect, prompt=True, **counts))
    if spec.store.joint and spec.allocate.divider.ragged:
        spec = attrs.evolve(spec, store=plain["store"])
    if spec.read.stores and spec.store.name not in spec.read.stores:
        spec = attrs.evolve(spec, read=plain["read"])
    return spec


_PLAIN = {"allocate.heads": "uniform", "merge": "drop", "store": "plain", "read": "all"}


@given(specs())
def test_policy_survives_being_written(spec):
    text = to_yaml(spec)

    assert parse_policy(text) == spec
    assert to_yaml(parse_policy(text)) == text
    assert digest(parse_policy(text)) == digest(spec)


@st.composite
def large_specs(draw):
    """Policies about as large as the reader takes: most are below its limits, some beyond them."""
    few = draw(st.lists(plugins("score", 0).flatmap(weighted), min_size=1, max_size=3))
    terms = draw(st.sampled_from((1, 30, 63, 64, 65, 900)))
    letters = st.sampled_from(("a", "é", "\U0001f600", '"', "\xad"))
    texts = {name: draw(letters) * draw(st.sampled_from((0, 999, 1000, 1001))) for name in ("summary", "reference")}
    return {"score": tuple(few * terms)[:terms], **texts}


REFUSED = r"^(score: must be a list of 1 to 64 scorers|\w+: must be a line of text, 1000|a policy must .* as in a file)"


@settings(max_examples=examples(40))
@given(specs(), large_specs())
def test_policy_that_can_be_had_can_be_written_and_read(spec, changes):
    try:
        large = consistent(attrs.evolve(spec, **changes))
    except ParameterError:
        with pytest.raises(ParameterError, match=REFUSED):
            attrs.evolve(spec, **changes)
    else:
        assert parse_policy(to_yaml(large)) == large


def test_policy_with_more_keys_than_a_file_may_have_is_refused_in_python_too():
    attention = registry().find("score", "attention")(
        queries=31, softmax="candidates", pool=Pool("max", 9), shared=True
    )
    long = Weighted(registry().find("score", "history")(attention, "mean", 0.5, "none", Pool("average", 9)), 0.5, "max")
    spec = parse_policy("kvpolicy: 1\nbudget: 64\nscore: [recency]\n")

    with pytest.raises(ParameterError, match="a policy must have at most 2048 keys and values, as in a file: 2"):
        attrs.evolve(spec, score=(long,) * 64)
    most = attrs.evolve(spec, score=(long,) * 50)
    assert parse_policy(to_yaml(most)) == most


@given(specs(), specs(), st.sampled_from(attrs.fields(PolicySpec)))
def test_digests_are_equal_exactly_if_policies_are(one, other, field):
    mixed = attrs.evolve(one, **{field.name: getattr(other, field.name)})

    for left, right in ((one, other), (one, mixed), (other, mixed)):
        assert (digest(left) == digest(right)) == (left == right)


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(json_schema())


def test_written_policy_is_valid_for_editors(validator):
    @given(specs())
    def holds(spec):
        plain = read(to_yaml(spec), "p", Problems()).plain
        assert validator.is_valid(as_json(plain)), to_yaml(spec)

    holds()


def as_json(plain):
    if isinstance(plain, dict):
        return {key: as_json(part) for key, part in plain.items()}
    return [as_json(part) for part in plain] if isinstance(plain, tuple) else plain


WORDS = st.sampled_from(
    [*"[]{}:,-?&*!|>%@`\"'#\n \t~\\", "use", "score", "budget", "kvpolicy: 1", "<<", "recency", "\n  "]
)
FILES = st.sampled_from([path.read_text() for path in registry().policies().values()])


@st.composite
def damaged_files(draw):
    """A shipped policy with a few pieces cut out, doubled or put in."""
    text = draw(FILES)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 30)))
        text = text[:start] + draw(st.one_of(WORDS, st.text(max_size=3), st.just(text[start:end] * 2))) + text[end:]
    return text


@given(st.one_of(st.text(), st.binary(), st.lists(WORDS).map("".join), damaged_files()))
def test_any_text_gives_a_policy_or_our_error(data):
    try:
        spec = parse_policy(data)
    except PolicyError as error:
        assert error.problems  # noqa: PT017 - either way is right
    else:
        assert parse_policy(to_yaml(spec)) == spec


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@given(st.sampled_from([field.name for field in attrs.fields(PolicySpec)]), PLAIN)
def test_any_override_gives_a_policy_or_our_error(key, value):
    try:
        spec = parse_policy("kvpolicy: 1\nbudget: 64\nscore: [recency]\n", **{key: value})
    except PolicyError as error:
        assert all(problem.where.startswith("override ") for problem in error.problems)  # noqa: PT017
    else:
        assert parse_policy(to_yaml(spec)) == spec
