"""The cache of a whole model: managed layers where there is full attention, the model's own layers elsewhere."""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import Plan
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.runtime.origin import Origin
from kvpolicy.runtime.rounds import Round
from kvpolicy.runtime.stats import LayerStats


class PolicyCache(DynamicCache):
    """A cache for one batch of sequences, to be passed as `past_key_values` to a model with the policy attached.

    Layers with a sliding window, which are bounded already, stay as the model's library makes them.
    """

    origin: Origin | None = None  # of the attachment that it was made for
    _retired: str | None = None

    def __init__(self, plan: Plan, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.plan = plan
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

    def begin_forward(self) -> None:
        """A forward of the attached model is about to use this cache. Raises CacheError when it cannot go on."""
        if self._retired is not None:
            raise CacheError(self._retired)

    def end_forward(self) -> None:
        """That forward has returned."""

    def retire(self, reason: str) -> None:
        """From now on every change raises CacheError with this reason."""
        self._retired = reason

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.begin_forward()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy belongs to the attachment of the first; one that is unpickled, to the first that uses it."""
        self.__dict__.update(state)
        if self.origin is not None:
            self.origin.adopt(self)

    def __iter__(self) -> Any:
        raise TypeError("a compressed cache has no plain keys and values to iterate over; see PolicyCache.managed")
