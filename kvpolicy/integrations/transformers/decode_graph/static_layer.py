"""One layer's cache as the model meets it in a decode step of fixed shapes."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.integrations.transformers.decode_graph.static_slots import StaticSlots
from kvpolicy.plan.plan import POSITIONS, Plan

_names = itertools.count()
layers: "weakref.WeakValueDictionary[int, StaticLayer]" = weakref.WeakValueDictionary()  # by `name`


class StaticLayer(CacheLayerMixin):
    """Takes one token a row. Nothing is rebound and the host decides nothing: tensor code alone."""

    is_compileable = True
    is_sliding = False

    def __init__(self, plan: Plan, ordinal: int, rows: int, capacity: int, clock: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.ordinal, self.capacity = plan, ordinal, capacity
        self.slots = StaticSlots(plan, rows, capacity, clock.device)
        self.clock = clock  # [B] int32, real tokens before this step; shared by all layers
        self._segments = (  # rows and heads, to be broadcast against each other
            torch.arange(rows, device=clock.device)[:, None],
            torch.arange(plan.geometry.kv_heads, device=clock.device)[None],
        )
        self._new_entry = {
            name: torch.full((), column.fill, dtype=column.dtype, device=clock.device)
            for name, column in plan.columns.items()
        }
        self.scaling = 1.0
        self.is_initialized = True
        self.name = next(_names)  # what stands for this layer in a compiled graph, where only numbers and tensors can
        layers[self.name] = self

    @property
    def beside(self) -> list[Tensor]:
        """All tensors beside those in which entries stand."""
        return [self.slots.lengths, *self.slots.window, *self._segments, *self._new_entry.values()]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to be done."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token [B, K, 1, D] behind each row; gives it back, the keys with this layer attached."""
        held = self.slots
        behind = (*self._segments, held.lengths[:, None])
        held.keys.index_put_(behind, key_states[:, :, 0])
        held.values.index_put_(behind, value_states[:, :, 0])
        for name, column in held.columns.items():
            column.index_put_(behind, self._new_entry[name])
        held.columns[POSITIONS].index_put_(behind, self.clock[:, None])
        held.lengths.add_(1)
        keys = key_states.view(key_states.shape)  # a fresh alias, which can carry an attribute
        keys.kvpolicy_layer = self  # type: ignore[attr-defined]
        return keys, value_states

    def get_seq_length(self) -> int:
        """No mask and no position is derived from it: a step brings both."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is made: a step brings one."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No bound on the tokens that may be seen."""
        return -1
