"""The same for every layer."""

from typing import ClassVar

import attrs

from kvpolicy.stages import LayerAllocator, LayerRequest


@attrs.frozen
class UniformLayers(LayerAllocator):
    """Every layer keeps as many entries as every other."""

    name: ClassVar[str] = "uniform"

    def allocate(self, request: LayerRequest) -> tuple[int, ...]:
        return (min(request.budget, request.length),) * request.layers
