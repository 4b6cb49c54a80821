"""Allocator `adaptive`: divides the budget of a layer over its heads by their scores."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import AllocationRequest, Choice, HeadAllocator, Number, parameter
from kvpolicy.stages.ordering import best_first, highest
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill


@attrs.frozen
class Adaptive(HeadAllocator):
    """Ada-KV (algorithm 1): the heads of a layer compete for its budget with their scores.

    1. f = how many of the layer's best candidates each head owns; ties: lower head, then earlier position;
    2. counts = (1 - floor) · f + floor · equal shares, in whole entries.

    `normalise: mass` first multiplies the scores of a head by the share of their sum that is in its best entries, as
    many as its equal share of the budget. `conserve` rounds by the largest remainder; `official` rounds each head
    separately, as the published code does, so a layer may keep a few entries more or less than its budget.
    """

    name: ClassVar[str] = "adaptive"
    reference: ClassVar[str] = "arXiv:2407.11550"

    floor: float = parameter(Number(minimum=0, maximum=1), 0.2, help="share of the budget that is divided equally")
    normalise: str = parameter(Choice(("none", "mass")), "none", help="scale of a head's scores")
    rounding: str = parameter(Choice(("conserve", "official")), "conserve", help="exact sum, or the published code")

    @property
    def reads_scores(self) -> bool:
        return self.normalise == "mass"

    def allocate(self, request: AllocationRequest) -> Tensor:
        room, total = request.room, request.total
        equal = water_fill(room, total)
        owned = (self._owned_by_mass(request, equal) if self.reads_scores else request.won(total)).double()
        if self.rounding == "official":
            guaranteed = (equal.floor() * self.floor).floor()
            return (owned * (1 - self.floor) + guaranteed).round().long().minimum(room)
        return apportion((1 - self.floor) * owned + self.floor * equal, total)

    def _owned_by_mass(self, request: AllocationRequest, equal: Tensor) -> Tensor:
        layers = zip(request.scores, request.candidates, equal, request.total, strict=True)
        return torch.stack(
            [
                _owned_candidates(_scaled_by_mass(scores, candidates, equal_share), candidates, total)
                for scores, candidates, equal_share, total in layers
            ]
        )


def _owned_candidates(scores: Tensor, candidates: Tensor, total: Tensor) -> Tensor:
    """[B, K] int64: candidates of each head among the best `total` [B] of the layer."""
    return highest(scores.flatten(1), candidates.flatten(1), total).view(scores.shape).sum(-1)


def _scaled_by_mass(scores: Tensor, candidates: Tensor, equal: Tensor) -> Tensor:
    """Scores times the share of a head's sum in its best `equal` [B, K] candidates; shifted to be >= 0 first."""
    lowest = scores.masked_fill(~candidates, 0.0).amin(dim=(1, 2), keepdim=True)
    mass = (scores - lowest.clamp(max=0.0)).masked_fill(~candidates, 0.0)
    order = best_first(mass, candidates)
    best = torch.arange(order.shape[-1], device=order.device) < equal.floor()[..., None]
    share = (mass.gather(-1, order) * best).sum(-1) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
    return mass * share[..., None]
