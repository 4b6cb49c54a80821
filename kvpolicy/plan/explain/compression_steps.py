"""The steps of one compression of one layer and sequence, in the order in which they run, and the bytes of each."""

from collections.abc import Iterator

import attrs

from kvpolicy.plan.explain.kernel_steps import KernelSteps
from kvpolicy.plan.explain.reference_steps import ReferenceSteps
from kvpolicy.plan.explain.steps import Shapes, Step
from kvpolicy.plan.plan import Plan


def steps_of(plan: Plan, shapes: Shapes) -> tuple[Step, ...]:
    """Observe, each term of the score, allocate, select, then merge and store, or compact."""
    reference = ReferenceSteps(plan, shapes)
    chosen = _chosen_by_reference(plan, reference) if plan.fusion.off else _chosen_by_kernels(plan, shapes, reference)
    return (*reference.observe(), *chosen, *_kept(plan, shapes, reference))


def _chosen_by_reference(plan: Plan, reference: ReferenceSteps) -> Iterator[Step]:
    yield from (reference.score(term) for term in plan.fusion.terms)
    yield reference.allocate()
    yield reference.select()


def _chosen_by_kernels(plan: Plan, shapes: Shapes, reference: ReferenceSteps) -> Iterator[Step]:
    """What no kernel does is a reference between them, with the reason."""
    fusion, kernels = plan.fusion, KernelSteps.of(plan, shapes)
    yield from kernels.score([term for term in fusion.terms if term.tile is not None])
    yield from (reference.score(term, term.reason) for term in fusion.terms if term.tile is None)
    yield kernels.finish()
    yield attrs.evolve(reference.allocate(), reason=fusion.allocate) if fusion.allocate else kernels.allocate()
    yield attrs.evolve(reference.select(), reason=fusion.select) if fusion.select else kernels.select()


def _kept(plan: Plan, shapes: Shapes, reference: ReferenceSteps) -> Iterator[Step]:
    """Entries that stay as they are only move; changed or packed ones are merged and stored."""
    fused = not plan.fusion.off
    reason = plan.fusion.merge or ("packs what it keeps" if plan.packs else "")
    if reason:
        yield attrs.evolve(reference.merge(), reason=reason if fused else "")
        yield attrs.evolve(reference.store(), reason=reason if fused else "")
    else:
        yield KernelSteps.of(plan, shapes).compact() if fused else reference.compact()
