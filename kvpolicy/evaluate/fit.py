"""A policy written for long contexts, scaled down to a few bytes."""

from fractions import Fraction
from typing import Any

import attrs
from transformers import PreTrainedModel

from kvpolicy.errors import EvaluationError
from kvpolicy.plan.explain import full_bytes
from kvpolicy.policy import Policy
from kvpolicy.spec.budget import Budget
from kvpolicy.spec.policy import NEVER, Compress, PolicySpec, Protect
from kvpolicy.stages import Scorer

MOST_EVERY = 16
FEWEST_QUERIES = 4


def fit(policy: Policy, model: PreTrainedModel, *, length: int, share: Fraction) -> Policy:
    """`policy` so small that its store never takes more than `share` of a full cache of `length` tokens.

    Shipped policies protect and observe up to 512 tokens, which a budget of a hundred cannot give. What is changed, so
    that all policies get the same *bytes*, is this, and nothing else:

    - `compress.every` is at most 16 tokens and at most an eighth of the share; this slack counts as held;
    - `budget` is what the bytes then leave: a policy with more columns per entry keeps fewer entries;
    - `protect.recent` is at most a quarter of the budget, or its own part of the shipped budget where that is more
      (a recent window is all there is to `streaming_llm`, and half of `h2o`); `protect.sinks` at most an eighth;
    - observation windows have at most a twelfth of the budget in queries, though never fewer than 4.

    The queries of the observation window come on top of these bytes; results state them beside. Raises EvaluationError
    when the share leaves no room.
    """
    every = _every(policy.spec.compress, int(length * share))
    spec = attrs.evolve(policy.spec, compress=attrs.evolve(policy.spec.compress, every=every))
    tokens = _affordable(Policy(spec), model, length, share)
    if tokens < 1:
        raise EvaluationError(f"{policy.name}: {float(share):.0%} of {length} tokens leaves no room for an entry")
    fitted = attrs.evolve(
        spec,
        budget=Budget(tokens=tokens),
        protect=_protect(policy.spec, tokens),
        score=tuple(attrs.evolve(one, scorer=_observing_less(one.scorer, tokens)) for one in spec.score),
    )
    return Policy(fitted, policy.origin)


def _every(compress: Compress, nominal: int) -> int | str:
    return compress.every if compress.every == NEVER else min(int(compress.every), MOST_EVERY, max(1, nominal // 8))


def _affordable(policy: Policy, model: PreTrainedModel, length: int, share: Fraction) -> int:
    """Entries per KV head and layer, on average, that the bytes of the share can hold beside the slack."""
    plan = policy.compile(model)
    return plan.budgets.affordable(int(full_bytes(plan, length) * share))


def _protect(spec: PolicySpec, tokens: int) -> Protect:
    sinks = min(spec.protect.sinks, tokens // 8)
    own = spec.protect.recent * tokens // spec.budget.tokens if spec.budget.tokens else 0
    recent = min(spec.protect.recent, max(tokens // 4, own), tokens - sinks)
    return Protect(sinks=sinks, recent=recent)


def _observing_less(scorer: Scorer, tokens: int) -> Scorer:
    """The scorer, and those that it is built on, with an observation window in proportion to the budget."""
    plugin: Any = scorer  # attrs does not know that every plugin is one of its classes
    changes: dict[str, Any] = {}
    for field in attrs.fields(type(plugin)):
        value = getattr(plugin, field.name)
        if isinstance(value, Scorer):
            changes[field.name] = _observing_less(value, tokens)
        elif field.name == "queries" and isinstance(value, int):
            changes[field.name] = min(value, max(FEWEST_QUERIES, tokens // 12))
    fewer: Scorer = attrs.evolve(plugin, **changes)
    return fewer
