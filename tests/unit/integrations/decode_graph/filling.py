"""Static layers that hold something."""

import torch

from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer
from tests.support.driving import DIM, GROUP, HEADS, output_projection

CAPACITY = 15


def filled(plan, lengths, seed=0):
    """A static layer whose rows hold `lengths` random entries, at random ascending positions."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    layer = StaticLayer(plan, 0, rows, CAPACITY, torch.full((rows,), 60, dtype=torch.int32))
    layer.scaling, layer.output_projection = DIM**-0.5, output_projection
    shape, columns = (rows, HEADS, CAPACITY), blocks(layer)
    for name in ("keys", "values"):
        columns[name].copy_(torch.randn(*shape, DIM, generator=generator))
    for name, column in columns.items():
        if name not in {"keys", "values", "positions"}:
            column.copy_(torch.rand(column.shape, generator=generator))
    order = torch.rand(rows, HEADS, 58, generator=generator).argsort(-1)[..., : CAPACITY - 2].sort(-1).values + 2
    sinks = torch.arange(2).expand(rows, HEADS, 2)
    order = torch.cat([sinks, order], -1)
    behind = torch.arange(CAPACITY) >= torch.tensor(lengths)[:, None, None]
    columns["positions"].copy_(order.masked_fill(behind, -1))
    layer.storage.lengths_in_step.copy_(torch.tensor(lengths).repeat_interleave(HEADS))
    for at in range(60 - layer.window.size, 60):
        queries = torch.randn(rows, HEADS * GROUP, 1, DIM, generator=generator)
        layer.window.add_in_step(queries, torch.full((rows,), at, dtype=torch.int32))
    return layer


def blocks(layer):
    """The tensors of a static layer, [B, K, C, ...], by name."""
    return {name: flat.unflatten(0, (-1, HEADS, CAPACITY)) for name, flat in layer.storage.tensors.items()}


def lengths_of(layer):
    """Entries of each (row, KV head), as the device counts them."""
    return layer.storage.lengths_in_step.view(-1, HEADS).tolist()


def view_of(layer):
    """What plugins see in a step."""
    return layer.view(layer.storage.in_step, layer.window.in_step)
