"""Which attachment a cache belongs to, and what becomes of the caches of one that is detached."""

import weakref
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvpolicy.cache.stats import CacheStats
from kvpolicy.errors import CacheError, SavedCacheError
from kvpolicy.integrations.transformers.saving.model_digest import model_digest

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache import PolicyCache


class CacheOwner:
    """Common to all caches of one attachment and to their copies. It keeps neither them nor the model alive."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._caches: weakref.WeakSet[PolicyCache] = weakref.WeakSet()
        self._model = weakref.ref(model)
        self.counted: CacheStats | None = None  # of the cache that was made last

    def made(self, cache: "PolicyCache") -> None:
        """A cache has been made for a user, and is the one to report on."""
        self.adopt(cache)
        self.counted = CacheStats(cache)

    def model_digest(self) -> str:
        """The digest of the model's configuration and weights. Raises SavedCacheError when it cannot be had."""
        model = self._model()
        if model is None:
            raise SavedCacheError("the model that this cache was made for is gone: its digest cannot be saved")
        return model_digest(model, SavedCacheError)

    def adopt(self, cache: "PolicyCache") -> None:
        """From now on the cache belongs here."""
        cache.owner = self
        self._caches.add(cache)

    def require(self, cache: "PolicyCache") -> None:
        """Raise CacheError unless the cache belongs here. One that was made by hand, or unpickled, does from now on."""
        if cache.owner is None:
            self.adopt(cache)
        if cache.owner is not self:
            raise CacheError(
                "this cache was made for another attachment: a cache goes with the model and the attachment "
                "that it was made for; use attachment.cache() of the one that is in place"
            )

    def retire(self, reason: str) -> None:
        """Have every cache that is still alive refuse to go on."""
        for cache in list(self._caches):
            cache.retire(reason)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "CacheOwner":
        """A copied cache belongs where the first one does."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A cache that is unpickled belongs to nobody yet."""
        return _none, ()


def _none() -> None:
    return None
