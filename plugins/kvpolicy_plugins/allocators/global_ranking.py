"""Allocator `global`: divides the whole budget over layers and heads by their scores."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import AllocationRequest, JointAllocator, Number, parameter
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill


@attrs.frozen
class GlobalRanking(JointAllocator):
    """All heads of all layers compete for the whole budget with their scores (KVzip, non-uniform budgets).

    1. f = how many of a row's best candidates each head owns; ties: lower layer, lower head, then earlier position;
    2. counts = (1 - floor) · f + floor · equal shares, in whole entries.

    Scores of different layers must be comparable: give scorers `normalise: max` or `standard` where they are not.
    """

    name: ClassVar[str] = "global"
    reference: ClassVar[str] = "arXiv:2505.23416"

    floor: float = parameter(Number(minimum=0, maximum=1), 0.0, help="share of the budget that is divided equally")

    def allocate(self, request: AllocationRequest) -> Tensor:
        room, total = request.room, request.total
        owned = request.won(total).double()
        if not self.floor:
            return owned.long()
        equal = water_fill(_flatten_layers(room), total)
        shares = (1 - self.floor) * _flatten_layers(owned) + self.floor * equal
        counts: Tensor = apportion(shares, total).unflatten(1, (room.shape[0], -1))
        return counts.transpose(0, 1)


def _flatten_layers(counts: Tensor) -> Tensor:
    """[L, B, K] as [B, L·K]."""
    return counts.transpose(0, 1).flatten(1)
