"""The lines of the table: each policy as it is fitted to each share."""

from collections.abc import Iterator
from enum import StrEnum
from fractions import Fraction
from typing import Any

import attrs
from transformers import PreTrainedModel

from kvpolicy.errors import KVPolicyError
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.fit import fit, keeps_everything
from kvpolicy.evaluate.table.setup import TableSetup
from kvpolicy.plan.plan import READ_ALL
from kvpolicy.policy import Policy
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Merger
from kvpolicy.stages.registry.plugins import registry

_QUERIES = 32  # that a merger observes where no scorer does; fewer once it is fitted
_DROP = "drop"


class Kind(StrEnum):
    """What a share is a share of."""

    BUDGET = "budget"  # the bytes held
    READ = "read"  # the entries read by a decode step; everything is held
    WHOLE = "whole"  # nothing: everything is held and read


@attrs.frozen
class Line:
    """One policy at one share."""

    name: str
    kind: Kind
    share: Fraction  # asked for; 1 for those that keep and read everything
    policy: Policy | None  # fitted; None when that cannot be done
    refusal: str = ""  # why not
    merge: str = ""  # in the comparison of mergers: which one


def kind_of(spec: PolicySpec) -> Kind:
    """How a policy is scaled."""
    if not keeps_everything(spec):
        return Kind.BUDGET
    return Kind.WHOLE if spec.read.name == READ_ALL else Kind.READ


def main_lines(setup: TableSetup, model: PreTrainedModel, length: int, calibrations: Calibrations) -> tuple[Line, ...]:
    """Every policy at every share, those that keep and read everything once; those first."""
    found = [
        _line(policy, kind, share, model, length, calibrations)
        for policy in setup.policies
        for kind in (kind_of(policy.spec),)
        for share in ((Fraction(1),) if kind is Kind.WHOLE else setup.shares)
    ]
    return tuple(sorted(found, key=lambda one: one.kind is not Kind.WHOLE))


def merge_lines(setup: TableSetup, model: PreTrainedModel, length: int, calibrations: Calibrations) -> tuple[Line, ...]:
    """Every base at every share with every merger, `drop` first."""
    found = []
    for base in setup.bases:
        for share in setup.shares:
            for merger in sorted(setup.mergers, key=lambda name: (name != _DROP, name)):
                variant = attrs.evolve(base, spec=with_merger(base.spec, merger))
                line = _line(variant, Kind.BUDGET, share, model, length, calibrations)
                found.append(attrs.evolve(line, merge=merger))
    return tuple(found)


def with_merger(spec: PolicySpec, name: str) -> PolicySpec:
    """The recipe with another merger, at its defaults; one that needs observed queries observes 32 if nobody does."""
    kind: Any = registry().find("merge", name)
    merger: Merger = kind()
    observed = any(one.scorer.needs().queries for one in spec.score) or merger.needs().queries
    if merger.reads_window and not observed:
        merger = kind(queries=_QUERIES)
    return attrs.evolve(spec, merge=merger)


def distinct(lines: tuple[Line, ...]) -> Iterator[Policy]:
    """Each fitted policy once, whatever the number of lines that it stands for."""
    fitted = {one.policy.digest: one.policy for one in lines if one.policy is not None}
    yield from fitted.values()


def _line(
    policy: Policy, kind: Kind, share: Fraction, model: PreTrainedModel, length: int, calibrations: Calibrations
) -> Line:
    try:
        fitted = fit(policy, model, length=length, share=share, calibrations=calibrations)
        calibrations.plan(fitted)
    except KVPolicyError as error:  # one policy that does not go with the model must not cost all the others
        return Line(policy.name, kind, share, None, str(error))
    return Line(policy.name, kind, share, fitted)
