"""More for the heads that need it."""

from collections.abc import Callable
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Choice, HeadAllocator, Number, parameter
from kvpolicy_plugins.apportion import apportion, fill_evenly
from kvpolicy_plugins.ranking import best_first


@attrs.frozen
class Adaptive(HeadAllocator):
    """Ada-KV (algorithm 1): the heads of a layer compete for its budget with their scores.

    1. f = how many of the layer's best candidates each head owns; ties: lower head, then earlier position;
    2. counts = (1 - floor) · f + floor · equal shares, in whole entries.

    `normalise: mass` first multiplies a head's scores by the share of their sum that its equal share of the
    budget would hold. `conserve` rounds by the largest remainder; `official` rounds each head on its own, as
    the published code does, so that a layer may keep a few entries more or less than its budget.
    """

    name: ClassVar[str] = "adaptive"
    reference: ClassVar[str] = "arXiv:2407.11550"

    floor: float = parameter(Number(minimum=0, maximum=1), 0.2, help="part of the budget shared out equally")
    normalise: str = parameter(Choice(("none", "mass")), "none", help="scale of a head's scores")
    rounding: str = parameter(Choice(("conserve", "official")), "conserve", help="exact sum, or the published code")

    def allocate(self, scores: Tensor, candidates: Tensor, budget: Tensor) -> Tensor:
        room = candidates.sum(-1)
        if self.normalise == "mass":
            scores = _weigh(scores, candidates, fill_evenly(room, budget.minimum(room.sum(-1))))
        return self._divide(room, lambda total: _wins(scores, candidates, total), budget)

    def divide(self, room: Tensor, won: Callable[[Tensor], Tensor], budget: Tensor) -> Tensor | str:
        if self.normalise == "mass":
            return "weighs single scores"
        return self._divide(room, won, budget)

    def _divide(self, room: Tensor, won: Callable[[Tensor], Tensor], budget: Tensor) -> Tensor:
        total = budget.minimum(room.sum(-1))
        equal, owned = fill_evenly(room, total), won(total).double()
        if self.rounding == "official":
            guaranteed = (equal.floor() * self.floor).floor()
            return (owned * (1 - self.floor) + guaranteed).round().long().minimum(room)
        return apportion((1 - self.floor) * owned + self.floor * equal, total)


def _wins(scores: Tensor, candidates: Tensor, total: Tensor) -> Tensor:
    """[B, K] int64: candidates of each head among the best `total` [B] of the layer."""
    slots = scores.shape[-1]
    order = best_first(scores.flatten(1), candidates.flatten(1))
    chosen = torch.arange(order.shape[-1], device=order.device) < total[:, None]
    won = torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device)
    return won.scatter_add_(1, order // slots, chosen.long())


def _weigh(scores: Tensor, candidates: Tensor, equal: Tensor) -> Tensor:
    """Scores times the part of a head's sum that its best `equal` [B, K] hold; negative ones are lifted."""
    lowest = scores.masked_fill(~candidates, 0.0).amin(dim=(1, 2), keepdim=True)
    mass = (scores - lowest.clamp(max=0.0)).masked_fill(~candidates, 0.0)
    order = best_first(mass, candidates)
    best = torch.arange(order.shape[-1], device=order.device) < equal.floor()[..., None]
    share = (mass.gather(-1, order) * best).sum(-1) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
    return mass * share[..., None]
