"""The cache that the forward of a pass is given: entries of another cache, behind which its own stand for a moment."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvpolicy.attention.attend import attend
from kvpolicy.attention.observe_pass import observe_pass
from kvpolicy.cache.compaction.write_back import projection_of
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.request.pass_batch import PassBatch
from kvpolicy.errors import CacheError
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.logical_layer import LogicalLayer
from kvpolicy.integrations.transformers.torch_modes import exactly, taking_states
from kvpolicy.plan.passes import PassObserver

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache import PolicyCache


class PassLayer(LogicalLayer):
    """Stands for a managed layer during one pass: lends its storage to the entries of the pass, and drops them again.

    Lengths, counts, observed queries and what else tokens change in the layer stay as they are.
    """

    def __init__(self, layer: PolicyLayer, passes: PassBatch, observer: PassObserver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.passes, self.observer, self.plan = layer, passes, observer, layer.plan
        self.seq_len, self.num_tokens = layer.seq_len, layer.num_tokens
        self.is_initialized = True
        self.is_finished = False  # whether the pass has gone through it
        self.hidden_norms: Tensor | None = None  # [B, m] float32, of what its attention is given; see `hidden_norms`
        self._own: Tensor | None = None  # keys of the pass, [B, K, m, D], while they are held

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        raise CacheError("a pass can only follow a prompt")

    def reset(self) -> None:
        raise CacheError("the cache of a pass cannot be emptied")

    def select_rows(self, rows: Sequence[int]) -> None:
        raise CacheError(f"the rows of a pass cannot be moved: {list(rows)}")

    @taking_states
    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, m, D]; returns all entries while the layer holds all of its tokens, else the new ones."""
        layer = self.layer
        if self.is_finished or self._own is not None:
            raise self._fault()
        self._own = key_states
        positions = self.passes.positions[:, None].expand(-1, key_states.shape[1], -1)
        layer.storage.append(key_states, value_states, positions, 0)
        layer.count(set())  # this is what it holds at most
        keys, values = (key_states, value_states) if layer.compressed else layer.storage.all_states()
        keys = keys.view(keys.shape)
        keys.kvpolicy_layer = self  # type: ignore[attr-defined]
        return keys, values

    @exactly
    def attend(self, batch: QueryBatch) -> Tensor | None:
        """Attention over all that is held, [B, H, m, D]; None when that is all there ever was: a stock call."""
        if not self.layer.compressed:
            return None
        return attend(self.layer.storage, batch, pads=batch.padded or self.layer.padded)

    @exactly
    def finish(self, batch: QueryBatch) -> None:
        """After attention: drop the entries of the pass, and let the scorer see its queries."""
        own, self._own = self._own, None
        if own is None:
            raise self._fault()
        self.layer.storage.truncate(own.shape[2])
        needs, projection = self.observer.needs, None
        if needs.hidden_norms:
            batch = attrs.evolve(batch, hidden_norms=self._hidden_norms())
        if needs.output_projection:
            projection = projection_of(self.layer.output_projection)
        observe_pass(self.layer.storage, batch, own, self.passes, self.observer, projection)
        self.is_finished = True

    def _hidden_norms(self) -> Tensor:
        norms, self.hidden_norms = self.hidden_norms, None
        if norms is None or norms.shape != self.passes.positions.shape:
            raise CacheError(f"layer {self.layer.stats.layer}: the hidden states of a pass could not be seen")
        return norms

    def _fault(self) -> CacheError:
        return CacheError(f"layer {self.layer.stats.layer}: attention must be called once for each update of the cache")


class PassCache(DynamicCache):
    """Layers of the model's library are copied: those that are given here end as they were."""

    def __init__(self, cache: "PolicyCache", passes: PassBatch, observer: PassObserver) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [
            PassLayer(layer, passes, observer) if isinstance(layer, PolicyLayer) else copy.copy(layer)
            for layer in cache.layers
        ]

    @property
    def managed(self) -> list[PassLayer]:
        """The layers that stand for managed ones."""
        return [layer for layer in self.layers if isinstance(layer, PassLayer)]

    def require_finished(self) -> None:
        """Raise CacheError when a managed layer took no part in the forward, or is still in it."""
        for layer in self.managed:
            if not layer.is_finished:
                raise CacheError(f"layer {layer.layer.stats.layer}: a pass did not reach kvpolicy's attention in it")
