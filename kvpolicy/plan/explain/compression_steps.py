"""The steps of one compression of one layer and sequence, in the order in which they run, and the bytes of each."""

from collections.abc import Iterator

import attrs

from kvpolicy.plan.explain.kernel_steps import KernelSteps
from kvpolicy.plan.explain.reference_steps import observe_steps, score_step, steps_by_stage
from kvpolicy.plan.explain.steps import Shapes, Step
from kvpolicy.plan.plan import Plan


def steps_of(plan: Plan, shapes: Shapes) -> tuple[Step, ...]:
    """Observe, each term of the score, allocate, select, then merge and store, or compact."""
    reference = steps_by_stage(plan, shapes)
    steps = _by_reference(plan, shapes, reference) if plan.fusion.off else _by_kernels(plan, shapes, reference)
    return (*observe_steps(plan, shapes), *steps)


def _by_reference(plan: Plan, shapes: Shapes, reference: dict[str, Step]) -> Iterator[Step]:
    yield from (score_step(plan, shapes, term) for term in plan.fusion.terms)
    stages = ("merge", "store") if _beyond_moving(plan) else ("compact",)
    yield from (reference[stage] for stage in ("allocate", "select", *stages))


def _by_kernels(plan: Plan, shapes: Shapes, reference: dict[str, Step]) -> Iterator[Step]:
    """What no kernel does is a reference between them, with the reason."""
    fusion, kernels, reason = plan.fusion, KernelSteps.of(plan, shapes), _beyond_moving(plan)
    yield from kernels.score([term for term in fusion.terms if term.tile is not None])
    yield from (score_step(plan, shapes, term, term.reason) for term in fusion.terms if term.tile is None)
    yield kernels.finish()
    yield attrs.evolve(reference["allocate"], reason=fusion.allocate) if fusion.allocate else kernels.allocate()
    yield attrs.evolve(reference["select"], reason=fusion.select) if fusion.select else kernels.select()
    if reason:
        yield from (attrs.evolve(reference[stage], reason=reason) for stage in ("merge", "store"))
    else:
        yield kernels.compact()


def _beyond_moving(plan: Plan) -> str:
    """Why there is more to do than to move what is kept; empty if there is not."""
    return plan.fusion.merge or ("packs what it keeps" if plan.packs else "")
