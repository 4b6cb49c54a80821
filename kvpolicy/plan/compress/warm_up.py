"""Whether the kernels of a policy run at all: tried once, on a few entries, when the plan is made."""

import attrs
import torch

from kvpolicy.errors import described
from kvpolicy.plan.compress.fusion import Fusion, Term
from kvpolicy.plan.compress.step import choose
from kvpolicy.plan.small_view import small_view
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Geometry, View


def warm_up(spec: PolicySpec, fusion: Fusion, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> Fusion:
    """The fusion without what does not compile or run; this also is the warm-up of what does."""
    plugins = {f"{key}.": plugin for key, plugin in spec.shown_views.items() if plugin is not spec.merge}
    view = small_view(plugins, geometry, device, dtype)
    if spec.protect.by_place:  # then kernels are told by a label of every slot
        view = attrs.evolve(view, pinned=(view.positions % 4 == 1).contiguous())
    if not _problem(spec, fusion, view):
        return fusion
    terms = [_alone(spec, fusion, index, view) for index in range(len(fusion.terms))]
    left = attrs.evolve(fusion, terms=tuple(terms))
    return attrs.evolve(left, off=_problem(spec, left, view))


def _alone(spec: PolicySpec, fusion: Fusion, index: int, view: View) -> Term:
    """The term, without its tile function if that does not run even with references beside it."""
    term = fusion.terms[index]
    beside = [other if other is term else Term(other.weighted, None) for other in fusion.terms]
    problem = "" if term.tile is None else _problem(spec, attrs.evolve(fusion, terms=tuple(beside)), view)
    return Term(term.weighted, None, f"its tile function does not run: {problem}") if problem else term


def _problem(spec: PolicySpec, fusion: Fusion, view: View) -> str:
    rows, slots = view.positions.shape[0], view.positions.shape[2]
    budgets = torch.full((1, rows), slots // 2, dtype=torch.int64, device=view.positions.device)
    try:
        choose(spec, fusion, [view], budgets)
    except Exception as error:  # noqa: BLE001 - a third party's function, or Triton's compiler: the plan says what
        return described(error)
    return ""
