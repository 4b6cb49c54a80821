"""The tensors of one layer that a decode step reads and writes; all are there from the start and never move."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.integrations.transformers.decode_graph.query_ring import QueryRing
from kvpolicy.plan.forward_observers import ATTENTION, ForwardObserver
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.stages import QueryLogits, View


class StaticSlots:
    """C slots per KV head. A row's entries stand in its first slots, ascending; all heads hold equally many."""

    def __init__(self, plan: Plan, rows: int, capacity: int, device: torch.device) -> None:
        geometry = plan.geometry
        slots = (rows, geometry.kv_heads, capacity)
        self.keys = torch.zeros((*slots, geometry.head_dim), dtype=plan.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.columns = {
            name: torch.full((*slots, *column.shape), column.fill, dtype=column.dtype, device=device)
            for name, column in plan.columns.items()
        }
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # [B]
        shape = (rows, geometry.query_heads, geometry.head_dim)
        self.ring = QueryRing.empty(plan.needs.queries, shape, plan.dtype, device) if plan.needs.queries else None

    @property
    def tensors(self) -> list[Tensor]:
        """All that an eviction changes."""
        return [self.keys, self.values, *self.columns.values(), self.lengths]

    @property
    def window(self) -> list[Tensor]:
        """All that an eviction reads besides."""
        return [] if self.ring is None else [self.ring.queries, self.ring.positions, self.ring.oldest]

    def standing_in(self, tensors: Sequence[Tensor], window: Sequence[Tensor]) -> "StaticSlots":
        """The same of other tensors, in the order of `tensors` and `window`."""
        other = StaticSlots.__new__(StaticSlots)
        other.keys, other.values, *columns, other.lengths = tensors
        other.columns = dict(zip(self.columns, columns, strict=True))
        other.ring = QueryRing(*window) if window else None
        return other

    def without_remains(self) -> "StaticSlots":
        """Zeros in empty slots, where kernels leave what was evicted: it could be NaN, and torch multiplies it."""
        empty = (self.columns[POSITIONS] < 0)[..., None]
        entries = (tensor.masked_fill(empty, 0) for tensor in (self.keys, self.values))
        return self.standing_in([*entries, *self.columns.values(), self.lengths], [])

    def view(self, plan: Plan, ordinal: int, scaling: float) -> View:
        """What plugins see: all slots, without a copy."""
        state = dict(self.columns)
        positions, attention = state.pop(POSITIONS), state.pop(ATTENTION, None)
        queries, query_positions = (None, None) if self.ring is None else self.ring.ordered()
        sinks, recent = plan.budgets.protected(1)  # no budget of static shapes depends on the tokens seen
        return View(
            keys=self.keys,
            values=self.values,
            positions=positions,
            geometry=plan.geometry,
            scaling=scaling,
            layer=ordinal,
            sinks=sinks,
            recent=recent,
            queries=queries,
            query_positions=query_positions,
            attention=None if attention is None else attention.transpose(-1, -2),
            slot_state=state,
            rotary=plan.rotary,
        )


def update_observers(slots: StaticSlots, query_logits: QueryLogits, observers: Sequence[ForwardObserver]) -> None:
    """Let observers see the logits of one query a row."""
    for one in observers:
        state = {name: slots.columns[column] for name, column in one.columns.items()}
        for name, new in one.update(query_logits, state).items():
            state[name].copy_(new)
