"""Allocator `uniform` over layers: equal budgets."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import AllocationRequest, LayerAllocator


@attrs.frozen
class UniformLayers(LayerAllocator):
    """Every layer keeps equally many entries."""

    name: ClassVar[str] = "uniform"
    follows_length: ClassVar[bool] = False

    def allocate(self, request: AllocationRequest) -> Tensor:
        share = request.total // len(request.room)
        return share[:, None].expand(request.room.shape)
