"""The one compression step, asked for about views that exist already."""

import torch

from kvpolicy.plan.compress.allocate import allocate
from kvpolicy.plan.compress.kernels import FusedLayers
from kvpolicy.plan.compress.scored import ScoredLayers
from kvpolicy.plan.compress.step import choose, compress, compress_one, tokens_of

__all__ = ["allocated", "chosen", "chosen_together", "compress_layers", "compress_one", "fused", "score"]


def score(spec, view):
    """The weighted sum [B, K, T], -inf outside the candidates and where it was NaN; and new slot state."""
    group = ScoredLayers(spec, [view])
    return group.scores[0], group.observed[0]


def chosen(spec, view, budget):
    """What stays of one view, by references; `budget` [B] are entries per KV head."""
    return chosen_together(spec, None, [view], [list(budget)])[0]


def chosen_together(spec, fusion, views, budgets):
    """What stays of several; `budgets` [L][B]."""
    return choose(spec, fusion, views, torch.as_tensor(budgets, dtype=torch.int64))


def fused(spec, fusion, views):
    """Views scored by kernels."""
    return FusedLayers(spec, fusion, views)


def allocated(spec, view, scores, budget):
    """Candidates to keep per head [B, K] under given scores."""
    group = ScoredLayers(spec, [view])
    group.scores = [scores]
    return allocate(spec, [group], [torch.as_tensor(budget, dtype=torch.int64)[None]], tokens_of(view))[0][0]


def compress_layers(plan, views, budgets):
    """What remains of views under a plan, in kernels where it has any."""
    shown = [[lambda view=view: view for view in views]]
    numbers = torch.as_tensor(budgets, dtype=torch.int64)
    (results,) = compress(plan.spec, plan.fusion, shown, numbers, tokens_of(views[0]))
    return results
