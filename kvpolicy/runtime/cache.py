"""The cache of a whole model: managed layers where there is full attention, the model's own layers elsewhere."""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from kvpolicy.plan.plan import Plan
from kvpolicy.runtime.held_bytes import bytes_of
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.runtime.rounds import Round
from kvpolicy.runtime.stats import LayerStats


class PolicyCache(DynamicCache):
    """A cache for one batch of sequences, to be passed as `past_key_values` to a model with the policy attached.

    Layers with a sliding window, which are bounded already, stay as the model's library makes them.
    """

    def __init__(self, plan: Plan, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.plan = plan
        self.stock_bytes: dict[int, int] = {}  # of each layer that is none of ours, as it was when it last changed
        together = Round(plan, waits=plan.compresses_together)
        for ordinal, layer in enumerate(plan.geometry.managed):
            self.layers[layer] = PolicyLayer(plan, ordinal, together)

    @property
    def managed(self) -> list[PolicyLayer]:
        """The layers that the policy bounds."""
        return [layer for layer in self.layers if isinstance(layer, PolicyLayer)]

    @property
    def stats(self) -> list[LayerStats]:
        """What happened in each managed layer so far."""
        return [layer.stats for layer in self.managed]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hand new entries [B, K, q, D] to a layer; gives back what attention is over."""
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not isinstance(self.layers[layer_idx], PolicyLayer):
            self.stock_bytes[layer_idx] = _bytes_of_stock(self.layers[layer_idx])
        return updated

    def count(self) -> None:
        """Bring `stats` and `stock_bytes` up to date."""
        counted: set[int] = set()
        for layer in self.managed:
            layer.count(counted)
        stock = {index: one for index, one in enumerate(self.layers) if not isinstance(one, PolicyLayer)}
        self.stock_bytes.update({index: _bytes_of_stock(one) for index, one in stock.items()})

    def stop_recording(self) -> None:
        """Leave the mode that assisted decoding switched on: make up for what it put off, then evict when it is due."""
        if any(layer.record_past for layer in self.managed):
            self.crop(0)
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the newest `-tokens_to_remove` tokens; CacheError, before any layer has changed, when one cannot."""
        for layer in self.managed:
            layer.undone_by(tokens_to_remove)
        super().crop(tokens_to_remove)

    def check_integrity(self) -> None:
        """Raise CacheError when a layer contradicts itself; for tests and debugging."""
        for layer in self.managed:
            layer.held.check_integrity()

    def __iter__(self) -> Any:
        raise TypeError("a compressed cache has no plain keys and values to iterate over; see PolicyCache.managed")


def _bytes_of_stock(layer: object) -> int:
    """Bytes of all tensors of a layer that the model's library has made."""
    return bytes_of(vars(layer).values())
