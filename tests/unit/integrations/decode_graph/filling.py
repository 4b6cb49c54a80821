"""Static layers that hold something."""

import torch

from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer
from tests.support.driving import DIM, GROUP, HEADS

CAPACITY = 15


def filled(plan, lengths, seed=0):
    """A static layer whose rows hold `lengths` random entries, at random ascending positions."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    layer = StaticLayer(plan, 0, rows, CAPACITY, torch.full((rows,), 60, dtype=torch.int32))
    layer.scaling = DIM**-0.5
    held = layer.slots
    for tensor in (held.keys, held.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    for name, column in held.columns.items():
        if name != "positions":
            column.copy_(torch.rand(column.shape, generator=generator))
    order = torch.rand(rows, HEADS, 58, generator=generator).argsort(-1)[..., : CAPACITY - 2].sort(-1).values + 2
    sinks = torch.arange(2).expand(rows, HEADS, 2)
    order = torch.cat([sinks, order], -1)
    behind = torch.arange(CAPACITY) >= torch.tensor(lengths)[:, None, None]
    held.columns["positions"].copy_(order.masked_fill(behind, -1))
    held.lengths.copy_(torch.tensor(lengths))
    if held.ring is not None:
        for at in range(60 - held.ring.positions.shape[1], 60):
            queries = torch.randn(rows, HEADS * GROUP, 1, DIM, generator=generator)
            held.ring.push(queries, torch.full((rows,), at, dtype=torch.int32))
    return layer
