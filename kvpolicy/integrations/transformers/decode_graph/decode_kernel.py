"""Attention of one query a row over static slots in one kernel, which looks at nothing behind a row's entries."""

import torch
from torch import Tensor

from kvpolicy.integrations.transformers.decode_graph.static_slots import StaticSlots, update_observers
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import Plan
from kvpolicy.stages import QueryLogits
from kvpolicy_kernels import Column, Segments
from kvpolicy_kernels.attention import kv_input


def attend_in_kernel(plan: Plan, slots: StaticSlots, packed: Tensor, scaling: float) -> Tensor:
    """Attention [B, K, G, Dv] of queries [B, K, G, D]; observers see the logits of the same pass.

    Raises:
        UnsupportedInputError: the kernel cannot do this; nothing has changed.
    """
    from kvpolicy_kernels.attention.decode import decode

    segments = _segments(slots)
    others = [one for one in plan.observers if ATTENTION not in one.columns.values()]
    shape = (*packed.shape[:3], segments.longest)
    logits = packed.new_empty(shape, dtype=torch.float32) if others else None
    mass = Column.of([slots.columns[ATTENTION]]) if len(others) < len(plan.observers) else None
    keys, values = (kv_input.KVTensorInput(Column.of([one]), segments.starts) for one in (slots.keys, slots.values))
    export = kv_input.ExtraOutputs(None if logits is None else logits.flatten(0, 1), mass)
    out = decode(packed.flatten(0, 1).contiguous(), kv_input.KVInput(segments, keys, values), scaling, extra=export)
    if logits is not None:
        update_observers(slots, QueryLogits(logits[..., None, :]), others)
    return out.view(*packed.shape[:3], -1)


def _segments(slots: StaticSlots) -> Segments:
    rows, heads, capacity = slots.keys.shape[:3]
    starts = torch.arange(rows * heads, device=slots.lengths.device) * capacity
    lengths = slots.lengths[:, None].expand(rows, heads).flatten().to(torch.int32)
    return Segments(starts, lengths, 1, rows, heads, capacity)
