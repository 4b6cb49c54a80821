"""Views built by hand: what the tests of plugins compress."""

import torch
from torch import Tensor

from kvpolicy.stages import Geometry, Scorer, View
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.selectors.topk import TopK
from tests.support.allocating import counts_of
from tests.support.selecting import selected_by


def view_of(keys: Tensor, *, queries: Tensor | None = None, lengths: Tensor | None = None, **rest) -> View:
    """A layer that holds `keys` [B, K, T, D]; `lengths` [B, K] or [B, 1] says how many slots are filled."""
    batch, heads, slots, dim = keys.shape
    positions = torch.arange(slots).expand(batch, heads, slots)
    if lengths is not None:
        positions = positions.where(positions < lengths[..., None], -1)
    query_heads = heads if queries is None else queries.shape[1]
    defaults = {
        "values": keys,
        "positions": positions,
        "geometry": Geometry((0,), query_heads, heads, dim),
        "scaling": dim**-0.5,
    }
    return View(keys=keys, queries=queries, **{**defaults, **rest})


def fresh_state(scorer: Scorer, view: View) -> dict[str, Tensor]:
    """The slot state that a cache holds before the first compression."""
    return {one.name: torch.full(view.positions.shape, one.fill) for one in scorer.slot_state()}


def keep(view: View, scores: Tensor, budget: int | Tensor) -> Tensor:
    """Keep indices [B, K, N] of the best `budget` entries of each head, protected ones included."""
    heads = view.positions.shape[1]
    free = budget * heads - view.protected.sum((1, 2))
    counts = counts_of(UniformHeads(), scores, view.candidates, free.clamp(min=0))
    return indices_of(selected_by(TopK(), scores, view.candidates, counts) | view.protected)
