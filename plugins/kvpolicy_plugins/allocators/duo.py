"""Allocator `duo`: retrieval heads share the budget, streaming heads keep what is protected."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import AllocationRequest, Geometry, Number, parameter
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill
from kvpolicy_plugins.allocators.shared.measured_heads import MeasuredHeads, counts_of, heads_of, require_all
from kvpolicy_plugins.allocators.shared.needle import retrieval_score


@attrs.frozen
class Duo(MeasuredHeads):
    """The least important KV heads keep sinks and recent entries alone; the others share the rest (DuoAttention).

    1. streaming heads = the `streaming` share of the KV heads of all layers with the lowest importance; ties: lower
       layer, then lower head;
    2. retrieval heads get equal shares of the budget; only what they have no room for goes to streaming heads.

    The paper trains a gate from 0 to 1 for each KV head by what streaming changes in outputs for passkeys in long text.
    A table of such gates, as its authors publish for some models, can be the importance; without one it is measured as
    in `headkv`. Retrieval heads of the paper keep everything: here they do where the budget allows it.
    """

    name: ClassVar[str] = "duo"
    reference: ClassVar[str] = "arXiv:2410.10819"

    streaming: float = parameter(Number(minimum=0, maximum=1), 0.5, help="share of KV heads that are streaming heads")

    def calibration_of(self, table: Tensor, geometry: Geometry) -> list[dict[str, Tensor]]:
        """The gate of a KV head is the importance of each query head of its group, [H] float32."""
        require_all((table >= 0) & (table <= 1), table, geometry, "gates must be from 0 to 1")
        return [{"importance": gates.float().repeat_interleave(geometry.group)} for gates in table]

    def importance(self, attention: Tensor, inside: Tensor, length: int) -> Tensor:
        return retrieval_score(attention, inside, length)

    def allocate(self, request: AllocationRequest) -> Tensor:
        room, importance = heads_of(request)
        heads = room.shape[1]
        ranks = importance.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        retrieval = ranks >= round(heads * self.streaming)
        open_room = room.where(retrieval, 0)
        first = request.total.minimum(open_room.sum(1))
        rest = water_fill(room - open_room, request.total - first)
        return counts_of(apportion(water_fill(open_room, first) + rest, request.total), request)
