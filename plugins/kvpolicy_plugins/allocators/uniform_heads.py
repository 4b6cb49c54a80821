"""The same for every head."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import HeadAllocator
from kvpolicy_plugins.apportion import apportion, fill_evenly


@attrs.frozen
class UniformHeads(HeadAllocator):
    """Every head of a layer keeps as many candidates as every other; what one cannot fill, the others get."""

    name: ClassVar[str] = "uniform"
    ragged: ClassVar[bool] = False

    def allocate(self, scores: Tensor, candidates: Tensor, budget: Tensor) -> Tensor:  # noqa: ARG002
        return self.divide(candidates.sum(-1), None, budget)

    def divide(self, room: Tensor, won: object, budget: Tensor) -> Tensor:  # noqa: ARG002
        total = budget.minimum(room.sum(-1))
        return apportion(fill_evenly(room, total), total)
