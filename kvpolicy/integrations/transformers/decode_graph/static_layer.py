"""One layer's cache as the model meets it in a decode step of fixed shapes."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.cache.compaction.write_back import build_view
from kvpolicy.cache.device_faults import DeviceFaults
from kvpolicy.cache.observation_window import ObservationWindow, last_in_step
from kvpolicy.cache.request.request_spans import RequestSpans
from kvpolicy.cache.storage.fixed_storage import FixedStorage
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.plan.plan import Plan
from kvpolicy.stages import View

_names = itertools.count()
layers: "weakref.WeakValueDictionary[int, StaticLayer]" = weakref.WeakValueDictionary()  # by `name`


class StaticLayer(CacheLayerMixin):
    """Takes one token a row. Nothing is rebound and the host decides nothing: tensor code alone."""

    is_compileable = True
    is_sliding = False

    def __init__(
        self, plan: Plan, ordinal: int, rows: int, capacity: int, clock: Tensor, faults: DeviceFaults | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.ordinal = plan, ordinal
        self.storage = FixedStorage(plan, ordinal, rows, clock.device, capacity, faults)
        self.window = ObservationWindow.fixed(plan, rows, clock.device)
        self.clock = clock  # [B] int32, real tokens before this step; shared by all layers
        self._spans = RequestSpans(plan.spec.protect)
        self.scaling = 1.0
        self.output_projection: Callable[[], Tensor] | None = None
        self.is_initialized = True
        self.name = next(_names)  # what stands for this layer in a compiled graph, where only numbers and tensors can
        layers[self.name] = self

    @property
    def in_step(self) -> list[Tensor]:
        """All that a compression changes: the columns of the slots, flat, and their lengths."""
        return [*self.storage.tensors.values(), self.storage.lengths_in_step]

    def view(self, storage: SegmentedStorage, window: Sequence[Tensor]) -> View:
        """What plugins see in a step, without a copy: all slots of `storage`, and the queries of the window."""
        return build_view(
            self.plan,
            storage,
            last_in_step(window),
            range(storage.rows),
            layer=self.ordinal,
            protected=self.plan.budgets.protected(1),  # no budget of static shapes depends on the tokens seen
            scaling=self.scaling,
            row_state={},
            in_order=True,
            spans=self._spans,
            output_projection=self.output_projection,
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to be done."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token [B, K, 1, D] behind each row; gives it back, the keys with this layer attached."""
        self.storage.append_in_step(key_states, value_states, self.clock)
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
