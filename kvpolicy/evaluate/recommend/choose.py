"""Which policy: by predictions of the user's text, at the bytes that there are or within the error allowed."""

from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Final

import attrs

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.harness.record import Cell, EvaluationRecord
from kvpolicy.evaluate.harness.run import Evaluation, Unit
from kvpolicy.evaluate.recommend.risk import RiskBound, fewest_pieces, smallest_share
from kvpolicy.evaluate.report.summary import Line, Summary

TASK, METRIC = "text", "kl"
_FEW = 2  # pieces on which all policies are measured, at all shares, before some are left out
_HOPELESS, _CLEAR = 3, 0.25  # times the bound: what is worse there, and what makes larger caches needless
LADDER: Final = tuple(Fraction(1, 2**power) for power in (1, 2, 3, 4, 5))

Run = Callable[[Sequence[Unit]], Sequence[Cell]]  # measures units


@attrs.frozen
class Choice:
    """A policy and a share, and what speaks for them."""

    policy: str
    share: Fraction | None  # None for a policy that keeps everything
    lines: tuple[Line, ...]  # all that was compared, the best first
    same: tuple[str, ...] = ()  # policies whose difference from it has an interval that contains zero
    risk: RiskBound | None = None


def choose_by_bytes(evaluation: Evaluation, run: Run, share: Fraction) -> Choice:
    """The policy with the least KL divergence among those that hold at most `share` of the full cache's bytes.

    Raises EvaluationError when none does.
    """
    cells = run(evaluation.units())
    lines = _lines(cells)
    small = [line for line in lines if line.holds_at_most(float(share))]
    if not small:
        raise EvaluationError(f"no policy fits into {float(share):.3g} of a full cache{_refusals(cells)}")
    best, *others = sorted(small, key=lambda line: line.estimate(METRIC).mean)
    same = tuple(line.policy for line in others if not line.differs(best, METRIC))
    left_out = [line for line in lines if line not in small]
    return Choice(best.policy, _share(best), (best, *others, *left_out), same)


def choose_by_bound(evaluation: Evaluation, run: Run, bound: float) -> Choice:
    """The policy and the smallest share for which the KL divergence of a further piece of text is at most `bound`.

    The first half of the pieces chooses the policy: the one that holds the fewest bytes with a mean below the bound.
    What is far from it on the first pieces is not measured on the others. The second half chooses the share, that one
    or a larger one, see `smallest_share`: what the first half has left out has no effect on what is promised. Raises
    EvaluationError when nothing holds the bound, or when there are too few pieces.
    """
    units = evaluation.units()
    groups = sorted({unit.group for unit in units})
    first, second = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    if len(second) < fewest_pieces() + 1:
        raise EvaluationError(f"a bound needs at least {2 * (fewest_pieces() + 1)} pieces of text: {len(groups)}")
    choosing = [unit for unit in units if unit.group in first]
    cells = _of_first_half(run, choosing, bound)
    below = _below(cells, choosing, bound)
    if not below:
        raise EvaluationError(f"no policy has a mean KL divergence of at most {bound:g} on this text{_refusals(cells)}")
    best = min(below, key=_held)
    shares = {one.key for unit in units for one in unit.contenders if one.name == best.policy}
    no_smaller = {key for key in shares if best.share is None or (key[1] or 0) >= best.share}
    held_out = _lines(run([_only(unit, no_smaller) for unit in units if unit.group in second]))
    if best.share is None:
        held_shares = {held_out[0].held_share: held_out[0].values[METRIC]}
    else:
        held_shares = {line.share or 0.0: line.values[METRIC] for line in held_out}
    risk = smallest_share(held_shares, bound)
    if risk is None:
        raise EvaluationError(
            f"{best.policy} has a mean KL divergence of at most {bound:g} where it was chosen, but {len(second)} "
            "further pieces do not confirm it: give more text, or a larger bound"
        )
    share = None if best.share is None else Fraction(risk.share)
    return Choice(best.policy, share, tuple(sorted(_lines(cells), key=_held)), (), risk)


def _of_first_half(run: Run, units: Sequence[Unit], bound: float) -> list[Cell]:
    """All contenders on a few pieces; on the others those that may be below the bound, by bytes, until one is."""
    cells = list(run(units[:_FEW]))
    means = {(line.policy, line.share): line.estimate(METRIC).mean for line in sorted(_lines(cells), key=_held)}
    promising = [key for key, mean in means.items() if mean <= _HOPELESS * bound]
    enough = next((count for count, key in enumerate(promising, 1) if means[key] <= _CLEAR * bound), len(promising))
    for keys in (promising[:enough], promising[enough:]):
        if keys and not _below(cells, units, bound):
            cells += run([_only(unit, keys) for unit in units[_FEW:]])
    return cells


def _below(cells: Sequence[Cell], units: Sequence[Unit], bound: float) -> list[Line]:
    """What was measured on all pieces, and is below the bound on average."""
    lines = [line for line in _lines(cells) if len(line.groups) == len(units)]
    return [line for line in lines if line.estimate(METRIC).mean <= bound]


def _only(unit: Unit, keys: Collection[tuple[str, float | None]]) -> Unit:
    return attrs.evolve(unit, contenders=tuple(one for one in unit.contenders if one.key in keys))


def _held(line: Line) -> float:
    return line.held_share


def _lines(cells: Sequence[Cell]) -> list[Line]:
    """The measured lines of policies."""
    tasks = Summary(EvaluationRecord({}, tuple(cells))).tasks
    return [line for task in tasks for line in task.measured if not line.is_baseline]


def _refusals(cells: Sequence[Cell]) -> str:
    """`"; rkv: why"`: what could not be measured, each policy once."""
    reasons = {cell.policy: cell.refusal for cell in cells if cell.refusal}
    return "".join(f"; {policy}: {reason}" for policy, reason in reasons.items())


def _share(line: Line) -> Fraction | None:
    return None if line.share is None else Fraction(line.share).limit_denominator(10**6)
