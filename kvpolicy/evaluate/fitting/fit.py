"""Scales a policy, which is written for long contexts, to a share of the bytes of a full cache."""

from collections.abc import Callable
from fractions import Fraction

import attrs
from transformers import PreTrainedModel

from kvpolicy.errors import EvaluationError, ParameterError, shown
from kvpolicy.evaluate.fitting.sizes import (
    observing_less,
    packing_sooner,
    reading,
    reads,
    unpacked,
    unpacked_step,
    with_unpacked,
)
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.plan import READ_ALL
from kvpolicy.policy import CalibrationSource, Policy
from kvpolicy.spec.budget import Budget
from kvpolicy.spec.policy import NEVER, Compress, PolicySpec, Protect
from kvpolicy.stages import Codec, Reader

_OFTEN = 16  # tokens between two compressions that small budgets may have

Calibrate = Callable[[Policy], CalibrationSource | None]


def fit(
    policy: Policy,
    model: PreTrainedModel,
    *,
    share: Fraction | float | str,
    length: int,
    calibration: CalibrationSource | Calibrate | None = None,
) -> Policy:
    """`policy` with sizes such that its cache never takes more than `share` of a full cache of `length` tokens.

    Bytes are all that is held of one sequence in the managed layers: entries, slack, observed queries and state.
    `share` is a fraction such as `0.25`, or `"25%"`. Shipped policies observe tens of tokens, and leave hundreds
    unpacked, which a budget of a hundred cannot give. What is changed is this, and nothing else; the *nominal* tokens
    are those that a full cache of the share's bytes would hold:

    - `compress.every` is at most an eighth of the nominal tokens, and at most 16 or, if that is more, a 32nd of them;
      this slack counts as held;
    - observation windows of scorers and mergers have at most a twelfth of the nominal tokens in queries, though never
      fewer than 4;
    - a store leaves at most an eighth of the nominal tokens unpacked, in whole groups, and at least one group;
    - `budget` is what the bytes then leave: a policy with more columns per entry keeps fewer entries, one that packs
      them keeps more. Where they leave room for all tokens, the store leaves as many unpacked as the bytes allow;
    - `protect.recent` is at most a quarter of the budget, `protect.sinks` at most an eighth, where they are numbers;
    - a reader reads the same part of the budget as shipped; the layers that read everything are at most an eighth.

    A policy that keeps everything (`budget: "100%"`) evicts nothing here either: it holds what it holds, whatever the
    share, with a store sized as above for `length` tokens; its reader, if it has one, reads `share` of the `length`.

    `calibration` is that of the policy, where it needs one. Plugins of a policy that evicts are resized, and those that
    are calibrated need one of their own: give a function that calibrates the policy that it is given, such as
    `lambda policy: policy.calibrate(model, tokens)`.

    Raises ParameterError for a `share` or `length` that is none, EvaluationError when it leaves no room for an entry,
    or when the policy leaves prompts as they are (`compress: {prefill: false}`, or a budget of what is generated), and
    what `Policy.compile` raises when the policy cannot be used with the model.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ParameterError(f"length must be a whole number, at least 1: {shown(length)}")
    calibrate: Calibrate = calibration if callable(calibration) else lambda _: calibration
    return fit_calibrated(policy, model, share=share_of(share), length=length, calibrate=calibrate)


def fit_calibrated(
    policy: Policy, model: PreTrainedModel, *, share: Fraction, length: int, calibrate: Calibrate
) -> Policy:
    """The same; `calibrate` gives the calibration of a policy whose plugins have been resized."""
    layers = geometry_of(model.config).layers
    nominal = int(length * share)
    if keeps_everything(policy.spec):
        return Policy(_whole(policy.spec, length, nominal, layers), policy.origin)
    if not policy.spec.compress.prefill or policy.spec.budget.generated is not None:
        raise EvaluationError(f"{policy.name}: leaves prompts as they are, so it has no size for a share of the bytes")
    spec = _observing_and_packing(policy.spec, max(1, nominal))
    plan = Policy(spec).compile(model, calibration=calibrate(Policy(spec)))
    limit = int(plan.footprint.full_bytes(length) * share)
    tokens = plan.budgets.affordable(limit)
    if tokens < 1:
        raise EvaluationError(
            f"{policy.name}: {float(100 * share):.4g}% of {length} tokens leaves no room for an entry"
        )
    if tokens >= length:
        most = length + plan.budgets.slack
        spec = attrs.evolve(spec, store=_mostly_unpacked(spec, model, most, limit, calibrate))
        tokens = length
    return Policy(_sized(spec, policy.spec, tokens, layers), policy.origin)


def share_of(share: Fraction | float | str) -> Fraction:
    """A share as a fraction above 0 and below 1. Raises ParameterError."""
    try:
        given = Budget.parse(share) if isinstance(share, str) else None
        parsed = given.share if given is not None else None if isinstance(share, str) else Fraction(share)
    except (TypeError, ValueError, OverflowError):
        parsed = None
    if parsed is None or not 0 < parsed < 1:
        raise ParameterError(f"share must be a percentage above 0% and below 100%: {shown(share)}")
    return parsed.limit_denominator(10**6)


def keeps_everything(spec: PolicySpec) -> bool:
    """Whether a policy never evicts, at any length."""
    return spec.budget.share == 1


def _whole(spec: PolicySpec, length: int, nominal: int, layers: int) -> PolicySpec:
    spec = attrs.evolve(spec, store=packing_sooner(spec.store, length))
    if spec.read.name == READ_ALL:
        return spec
    return attrs.evolve(spec, read=reading(spec.read, nominal, layers))


def _observing_and_packing(spec: PolicySpec, nominal: int) -> PolicySpec:
    return attrs.evolve(
        spec,
        compress=attrs.evolve(spec.compress, every=_every(spec.compress, nominal)),
        score=tuple(attrs.evolve(term, scorer=observing_less(term.scorer, nominal)) for term in spec.score),
        select=observing_less(spec.select, nominal),
        merge=observing_less(spec.merge, nominal),
        store=packing_sooner(spec.store, nominal),
        # Whatever the policy protects has to fit the budget, which is not known yet.
        budget=Budget(tokens=max(nominal, 1)),
        protect=_protect(spec, max(nominal, 1)),
    )


def _every(compress: Compress, nominal: int) -> int | str:
    if compress.every == NEVER:
        return compress.every
    return min(int(compress.every), max(_OFTEN, nominal // 32), max(1, nominal // 8))


def _mostly_unpacked(spec: PolicySpec, model: PreTrainedModel, length: int, limit: int, calibrate: Calibrate) -> Codec:
    """The store with the largest number of unpacked entries with which `length` entries take at most `limit` bytes."""

    def fits(store: Codec) -> bool:
        candidate = Policy(attrs.evolve(spec, store=store))
        footprint = candidate.compile(model, calibration=calibrate(candidate)).footprint
        return footprint.nbytes(length) + footprint.window_bytes + footprint.state_bytes <= limit

    step, best = unpacked_step(spec.store), spec.store
    low, high = unpacked(best) // step if step else 0, length // step if step else 0
    while low < high:  # bytes grow with the unpacked entries
        middle = (low + high + 1) // 2
        store = with_unpacked(spec.store, middle * step)
        if fits(store):
            low, best = middle, store
        else:
            high = middle - 1
    return best


def _sized(spec: PolicySpec, shipped: PolicySpec, tokens: int, layers: int) -> PolicySpec:
    return attrs.evolve(
        spec,
        budget=Budget(tokens=tokens),
        protect=_protect(shipped, tokens),
        read=_reader(shipped, tokens, layers),
    )


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
