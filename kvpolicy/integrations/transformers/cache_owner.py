"""Ownership of caches by attachments; caches of a detached attachment are retired."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from kvpolicy.cache.stats import CacheStats
from kvpolicy.errors import CacheError, SavedCacheError
from kvpolicy.integrations.transformers.models.output_projection import OutputProjection
from kvpolicy.integrations.transformers.saving.model_digest import model_digest

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache import PolicyCache


class CacheOwner:
    """The owner of all caches of one attachment and of their copies, by weak references to caches and model.

    `attention` are the modules that call the attention of the managed layers, as far as they could be seen.
    """

    def __init__(self, model: PreTrainedModel, attention: Sequence[nn.Module]) -> None:
        self._caches: weakref.WeakSet[PolicyCache] = weakref.WeakSet()
        self._model, self._attention = weakref.ref(model), [weakref.ref(module) for module in attention]
        self.counted: CacheStats | None = None  # of the cache made last

    def made(self, cache: "PolicyCache") -> None:
        """Register a new cache, which reports are about."""
        self.adopt(cache)
        self.counted = CacheStats(cache)

    def model_digest(self) -> str:
        """The digest of the model's configuration and weights. Raises SavedCacheError if it cannot be computed."""
        model = self._model()
        if model is None:
            raise SavedCacheError("the model that this cache was made for is gone: its digest cannot be saved")
        return model_digest(model, SavedCacheError)

    def adopt(self, cache: "PolicyCache") -> None:
        """Make this the owner of a cache."""
        cache.owner = self
        for layer, module in zip(cache.managed, self._attention, strict=False):  # drafts have fewer layers
            attention = module()
            if cache.plan.needs.output_projection and attention is not None:
                layer.output_projection = OutputProjection(attention, cache.plan.geometry)
        self._caches.add(cache)

    def attention_modules(self) -> list[nn.Module]:
        """The modules that call the attention of the managed layers, in their order; none where they were not seen."""
        modules = [module() for module in self._attention]
        return [module for module in modules if module is not None]

    def require(self, cache: "PolicyCache") -> None:
        """Raise CacheError unless this is the owner of the cache. A cache without an owner is adopted."""
        if cache.owner is None:
            self.adopt(cache)
        if cache.owner is not self:
            raise CacheError(
                "this cache was made for another attachment: a cache belongs to the model and the attachment "
                "that it was made for; use attachment.cache() of the current one"
            )

    def retire(self, reason: str) -> None:
        """Retire all caches that are still alive, with this reason."""
        for cache in list(self._caches):
            cache.retire(reason)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "CacheOwner":
        """A copied cache has the same owner."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """An unpickled cache has no owner."""
        return _none, ()


def _none() -> None:
    return None
