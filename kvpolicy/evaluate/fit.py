"""Scales a policy written for long contexts down to a share of a short one."""

from fractions import Fraction

import attrs
from transformers import PreTrainedModel

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.shrink import observing_less, packing_sooner, reading, reads
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.plan import READ_ALL
from kvpolicy.policy import Policy
from kvpolicy.spec.budget import Budget
from kvpolicy.spec.policy import NEVER, Compress, PolicySpec, Protect
from kvpolicy.stages import Reader

MOST_EVERY = 16


def fit(
    policy: Policy,
    model: PreTrainedModel,
    *,
    length: int,
    share: Fraction,
    calibrations: Calibrations | None = None,
) -> Policy:
    """`policy` so small that its store never takes more than `share` of a full cache of `length` tokens.

    Shipped policies observe tens of tokens, and leave hundreds unpacked, which a budget of a hundred cannot give. What
    is changed, so that all policies get the same *bytes*, is this, and nothing else:

    - `compress.every` is at most 16 tokens and at most an eighth of the share; this slack counts as held;
    - `budget` is what the bytes then leave: a policy with more columns per entry keeps fewer entries, one that packs
      them keeps more;
    - `protect.recent` is at most a quarter of the budget, `protect.sinks` at most an eighth, where they are numbers;
      shares of the budget, as in `streaming_llm` and `h2o`, follow it by themselves;
    - observation windows of scorers and mergers have at most a twelfth of the budget in queries, though never fewer
      than 4;
    - a store leaves at most an eighth of the share's tokens unpacked, in whole groups, and at least one group;
    - a reader reads the same part of the budget as shipped; the layers that read everything are at most an eighth.

    A policy that keeps everything (`budget: "100%"`) evicts nothing here either: it holds what it holds, whatever the
    share, with a store sized as above for `length` tokens; its reader, if it has one, reads `share` of the `length`.

    The queries of the observation window come on top of these bytes; results state them beside. Stores that need a
    calibration are calibrated as `calibrations` says. Raises EvaluationError when the share leaves no room.
    """
    layers = geometry_of(model.config).layers
    if keeps_everything(policy.spec):
        return _whole(policy, length, share, layers)
    spec = _packed_and_slack(policy.spec, int(length * share), MOST_EVERY)
    tokens = _affordable(Policy(spec), model, length, share, calibrations)
    if tokens < 1:
        raise EvaluationError(f"{policy.name}: {float(share):.0%} of {length} tokens leaves no room for an entry")
    return Policy(_sized(spec, policy.spec, tokens, layers), policy.origin)


def fit_tokens(policy: Policy, model: PreTrainedModel, *, length: int, share: Fraction, most_every: int) -> Policy:
    """The same with a budget of `share` of `length` in tokens, whatever bytes they take; the slack comes on top."""
    layers, tokens = geometry_of(model.config).layers, max(1, int(length * share))
    if keeps_everything(policy.spec):
        return _whole(policy, length, share, layers)
    spec = _packed_and_slack(policy.spec, tokens, most_every)
    return Policy(_sized(spec, policy.spec, tokens, layers), policy.origin)


def keeps_everything(spec: PolicySpec) -> bool:
    """Whether a policy never evicts, at any length."""
    return spec.budget.share == 1


def _whole(policy: Policy, length: int, share: Fraction, layers: int) -> Policy:
    spec = attrs.evolve(policy.spec, store=packing_sooner(policy.spec.store, length))
    if spec.read.name != READ_ALL:
        spec = attrs.evolve(spec, read=reading(spec.read, int(length * share), layers))
    return Policy(spec, policy.origin)


def _packed_and_slack(spec: PolicySpec, nominal: int, most_every: int) -> PolicySpec:
    compress = attrs.evolve(spec.compress, every=_every(spec.compress, nominal, most_every))
    return attrs.evolve(spec, compress=compress, store=packing_sooner(spec.store, nominal))


def _sized(spec: PolicySpec, shipped: PolicySpec, tokens: int, layers: int) -> PolicySpec:
    return attrs.evolve(
        spec,
        budget=Budget(tokens=tokens),
        protect=_protect(shipped, tokens),
        score=tuple(attrs.evolve(term, scorer=observing_less(term.scorer, tokens)) for term in spec.score),
        merge=observing_less(spec.merge, tokens),
        read=_reader(shipped, tokens, layers),
    )


def _every(compress: Compress, nominal: int, most: int) -> int | str:
    return compress.every if compress.every == NEVER else min(int(compress.every), most, max(1, nominal // 8))


def _affordable(
    policy: Policy, model: PreTrainedModel, length: int, share: Fraction, calibrations: Calibrations | None
) -> int:
    """Entries per KV head and layer, on average, that the bytes of the share can hold beside the slack."""
    plan = policy.compile(model, calibration=None if calibrations is None else calibrations.of(policy))
    return plan.footprint.entries(int(plan.footprint.full_bytes(length) * share)) - plan.budgets.slack


def _protect(spec: PolicySpec, tokens: int) -> Protect:
    sinks, recent = spec.protect.sinks, spec.protect.recent
    return attrs.evolve(
        spec.protect,
        sinks=min(sinks, tokens // 8) if isinstance(sinks, int) else sinks,
        recent=min(recent, tokens // 4) if isinstance(recent, int) else recent,
    )


def _reader(spec: PolicySpec, tokens: int, layers: int) -> Reader:
    if spec.read.name == READ_ALL or not spec.budget.tokens:
        return spec.read
    return reading(spec.read, reads(spec.read) * tokens // spec.budget.tokens, layers)
