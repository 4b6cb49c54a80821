"""Allocator `uniform` over heads: equal budgets."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import AllocationRequest, HeadAllocator
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill


@attrs.frozen
class UniformHeads(HeadAllocator):
    """Every head of a layer keeps equally many candidates; what a head cannot use is divided among the others."""

    name: ClassVar[str] = "uniform"
    ragged: ClassVar[bool] = False

    def allocate(self, request: AllocationRequest) -> Tensor:
        return apportion(water_fill(request.room, request.total), request.total)
