"""One compression of layers, as the plan says: in kernels, or by the references."""

from collections.abc import Sequence

from kvpolicy.plan.fallback import note_once
from kvpolicy.plan.fused import choose_together
from kvpolicy.plan.pipeline import Chosen, Compressed, choose, reduce_to
from kvpolicy.plan.plan import Plan
from kvpolicy.plan.refusals import refusals
from kvpolicy.stages import View


def compress_layers(plan: Plan, views: Sequence[View], budgets: Sequence[Sequence[int]]) -> list[Compressed]:
    """`pipeline.compress` of each view: layers with the same rows. Rows and layers never influence each other."""
    chosen = _chosen(plan, views, budgets)
    return [reduce_to(plan.spec, view, one) for view, one in zip(views, chosen, strict=True)]


def _chosen(plan: Plan, views: Sequence[View], budgets: Sequence[Sequence[int]]) -> list[Chosen]:
    if not plan.fusion.off:
        try:
            return choose_together(plan.spec, plan.fusion, views, budgets)
        except refusals() as error:
            note_once(f"policy {plan.spec.name}: a compression runs without kernels: {error}")
    return [choose(plan.spec, view, budget) for view, budget in zip(views, budgets, strict=True)]
