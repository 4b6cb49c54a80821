"""The same for every layer."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import AllocationRequest, LayerAllocator


@attrs.frozen
class UniformLayers(LayerAllocator):
    """Every layer keeps as many entries as every other."""

    name: ClassVar[str] = "uniform"
    follows_length: ClassVar[bool] = False

    def allocate(self, request: AllocationRequest) -> Tensor:
        share = request.total // len(request.room)
        return share[:, None].expand(request.room.shape)
