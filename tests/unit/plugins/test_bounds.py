"""No number of a policy file asks for more than time and memory in proportion to the text."""

from itertools import chain

import attrs
import pytest
import torch

from kvpolicy.errors import ParameterError, PolicyError
from kvpolicy.policy import Policy
from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.policy import Allocate, Compress, PolicySpec, Protect, Weighted
from kvpolicy.stages.parameters import LARGEST, Integer, Nested, Number, rule_of
from kvpolicy.stages.registry.plugins import registry
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.support.models import generate, model, prompt

ATTENTION = {"use": "attention", "queries": 4}
LATENT = {"use": "latent", "value_group": 8}
HEAD = {"budget": 16, "protect": {"sinks": 2, "recent": 4}, "compress": {"every": 4}, "score": [ATTENTION]}
BASE = {
    "by_region": {"of": ATTENTION, "region": "tools"},
    "history": {"of": ATTENTION},
    "kivi": {"group": 8},
    "latent": LATENT,
    "pages": {"page": 4},
}
FURTHER = {  # bounded by others too
    *(
        ("kivi", "group"),
        ("latent", "value_group"),
        ("tada", "group"),
        ("pages", "page"),
        ("mass_segments", "shortest"),
        ("nova_vq", "bits"),
        ("nova_vq", "group"),
    ),
}


def rules_of(kind, path=()):
    """Every parameter of an attrs class, nested ones too: path and rule."""
    for field in attrs.fields(kind):
        rule = rule_of(field)
        yield (*path, field.name), rule
        if isinstance(rule, Nested):
            yield from rules_of(rule.kind, (*path, field.name))


RECORDS = registry().plugins()
RULES = [(one.kind.__name__, *found) for one in RECORDS for found in rules_of(one.kind)]
OWN = [
    (kind.__name__, *found) for kind in (PolicySpec, Weighted, Compress, Protect, Allocate) for found in rules_of(kind)
]
INTEGERS = [
    (one, path, rule.maximum) for one in RECORDS for path, rule in rules_of(one.kind) if isinstance(rule, Integer)
]


def test_every_number_has_bounds():
    numbers = [(*one, rule) for *one, rule in chain(RULES, OWN) if isinstance(rule, (Integer, Number))]

    assert len(numbers) > 40
    for *where, rule in numbers:
        assert rule.maximum <= LARGEST or where[1] == ("seed",), where
        assert rule.minimum >= -LARGEST, where


def test_bound_that_is_left_out_is_a_bound_all_the_same():
    assert (Integer().minimum, Integer(minimum=1).maximum) == (-LARGEST, LARGEST)
    assert (Number(above=0).maximum, Number(maximum=1).minimum) == (LARGEST, -LARGEST)
    assert Integer(maximum=2 * LARGEST).accepts(2 * LARGEST)  # said by the author of a plugin
    with pytest.raises(ParameterError, match="a minimum <= its maximum"):
        Integer(minimum=2 * LARGEST)
    with pytest.raises(ParameterError, match="a minimum <= its maximum"):
        Integer(maximum=None)
    with pytest.raises(ParameterError, match="a minimum <= its maximum"):
        Number(above=5, maximum=float("nan"))


@pytest.mark.parametrize("key", ["budget", "every", "sinks", "recent"])
def test_counts_of_a_policy_end_at_the_largest(key):
    block = {"every": "compress", "sinks": "protect", "recent": "protect"}.get(key)

    def loaded(value):
        return policy_of(score=["recency"], **{"budget": LARGEST, **_override(block, key, value)})

    loaded(LARGEST if key == "every" or block is None else LARGEST // 2)
    with pytest.raises(PolicyError, match=f"{key}: must be .* from [01] to {LARGEST}"):
        loaded(LARGEST + 1)


def test_bytes_end_too():
    policy_of(budget="1073741824GiB", score=["recency"])
    with pytest.raises(PolicyError, match=r"budget: must be .* up to 2\^60 bytes"):
        policy_of(budget="1073741825GiB", score=["recency"])


@pytest.mark.parametrize(
    ("record", "path", "most"), INTEGERS, ids=[f"{one.name}.{'.'.join(p)}" for one, p, _ in INTEGERS]
)
def test_largest_number_of_a_plugin_runs_or_is_refused_in_words(record, path, most):
    """Sixty tokens are compressed as fast as with any other number, in no more memory than the text asks for."""
    tokens, mask = prompt(60, 45)
    try:
        policy = policy_of(**{**HEAD, **with_parameter(record, path, most)})
        calibration = policy.calibrate(model(), tokens[:1]) if policy.spec.calibrated else None
        attached = policy.attach(model(), calibration=calibration)
    except PolicyError:
        assert (record.name, *path) in FURTHER
        return
    assert (record.name, *path) not in FURTHER
    with attached:
        regions = dict.fromkeys(attached.plan.needs.regions, (3, 30))
        found = generate(model(), tokens, mask, count=6, past_key_values=attached.cache(regions=regions or None))
    assert all(step.isfinite().all() for step in found.logits)


@pytest.mark.parametrize("every", [1, LARGEST])
def test_slack_takes_room_as_tokens_come(every):
    policy = policy_of(budget=16, compress={"every": every}, score=["recency"])
    tokens, mask = prompt(60, 45)
    with policy.attach(model()) as attached:
        generate(model(), tokens, mask, count=12)
        held = attached.report().nbytes

    assert held < 2**21


@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_pool_wider_than_the_sequence_sees_all_of_it(kind, length):
    scores = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(length))
    size = 1023
    found = Pool(kind, size)(scores, torch.ones_like(scores, dtype=torch.bool))

    whole = scores.amax(-1, keepdim=True) if kind == "max" and length else scores.sum(-1, keepdim=True) / size
    torch.testing.assert_close(found, whole.expand_as(scores))


def _override(block, key, value):
    return {key: value} if block is None else {block: {key: value}}


def policy_of(**keys):
    return Policy(parse_policy("kvpolicy: 1\n", **keys))


def with_parameter(record, path, value):
    """The keys of a policy that uses a plugin with one parameter set."""
    for name in reversed(path):
        value = {name: value}
    plugin = {"use": record.name, **BASE.get(record.name, {}), **value}
    if record.stage == "score":
        return {"score": [plugin]}
    if record.stage == "read" and record.kind.stores:
        return {"read": plugin, "store": LATENT}
    *block, key = record.stage.split(".")
    return {block[0]: {key: plugin}} if block else {key: plugin}
