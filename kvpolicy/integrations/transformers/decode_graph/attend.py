"""Attention of one query a row over all slots of a static layer."""

import torch
from torch import Tensor

from kvpolicy.attention.attend import attend
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer, layers


def attend_static(layer: StaticLayer, queries: Tensor, scaling: float) -> Tensor:
    """Attention [B, 1, H, Dv] of queries [B, H, 1, D]; observers see it, and the window takes the queries.

    A compiled graph has the attention as one operator: observers are anybody's Python, and need not be traceable.
    """
    if torch.compiler.is_compiling():
        keys, values, *columns, lengths = layer.in_step
        out = _attend_op(layer.name, queries, layer.clock, [keys, values, lengths], columns, scaling)
    else:
        out = _attend(layer, layer.storage.in_step, queries, layer.clock, scaling)
    layer.window.add_in_step(queries, layer.clock)
    attended: Tensor = out.transpose(1, 2)
    return attended


def _attend(layer: StaticLayer, storage: SegmentedStorage, queries: Tensor, clock: Tensor, scaling: float) -> Tensor:
    """Attention [B, H, 1, Dv] over what a step sees; heads hold different entries, but in the same slots."""
    batch = QueryBatch(queries, clock[:, None], padded=False, scaling=scaling)
    return attend(storage, batch, None, layer.plan.observers, pads=False, kernels=layer.plan.kernels)


@torch.library.custom_op("kvpolicy::attend", mutates_args={"columns"})
def _attend_op(
    name: int, queries: Tensor, clock: Tensor, entries: list[Tensor], columns: list[Tensor], scaling: float
) -> Tensor:
    layer, (keys, values, lengths) = layers[name], entries
    return _attend(layer, layer.storage.over([keys, values, *columns, lengths]), queries, clock, scaling).contiguous()


@_attend_op.register_fake
def _(_name: int, queries: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)
