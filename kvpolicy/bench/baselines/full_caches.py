"""Full caches that policies are compared with, and how any cache gets its entries without a prompt."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvpolicy.evaluate.filling import feed
from kvpolicy.runtime.cache import PolicyCache
from kvpolicy.runtime.layer import PolicyLayer

_CHUNK = 4096  # tokens of one forward while a policy's cache is filled, and of all its rows together:
_CHUNK_OF_ALL = 2**18
_QUERIES = 64  # the newest of a forward, which scorers may observe


class PreallocatedLayer(DynamicLayer):
    """A full cache layer that is written in place: what `DynamicLayer` would be without its copy at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, q, D]; all entries so far, without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._capacity, key_states.shape[3])
            self._keys, self._values = key_states.new_empty(shape), value_states.new_empty(shape)
        end = self._length + key_states.shape[2]
        self._keys[:, :, self._length : end] = key_states
        self._values[:, :, self._length : end] = value_states
        self._length = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values


class PreallocatedCache(DynamicCache):
    """A full cache with room for `capacity` tokens from the first one on; for models with full attention only."""

    def __init__(self, config: PretrainedConfig, capacity: int) -> None:
        super().__init__(config=config)
        self.layers = [PreallocatedLayer(capacity) for _ in self.layers]


def fill(cache: Cache, config: Any, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
    """Random entries for `length` tokens; a policy gets them in chunks, and compresses as it would in prefill."""
    random = torch.Generator(device).manual_seed(0)
    for place, layer in enumerate(cache.layers):
        if not isinstance(layer, PolicyLayer):
            cache.update(*_entries(random, config, rows, length, dtype), place)
    chunk = max(1, min(_CHUNK, _CHUNK_OF_ALL // rows))
    for start in range(0, length, chunk):
        _feed(cache, random, config, rows, min(chunk, length - start), dtype)


def ripen(cache: Cache, config: Any, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """One token after another until the next one makes a policy compress; nothing for other caches."""
    random = torch.Generator(device).manual_seed(1)
    if isinstance(cache, PolicyCache):
        for _ in range(min(cache.plan.budgets.slack, _CHUNK) - 1):
            _feed(cache, random, config, rows, 1, dtype)


def _feed(cache: Cache, random: torch.Generator, config: Any, rows: int, count: int, dtype: torch.dtype) -> None:
    """One forward of `count` tokens: every layer of a policy takes them."""
    for layer in cache.layers:
        if isinstance(layer, PolicyLayer):
            queries = _normal(random, dtype, rows, config.num_attention_heads, min(count, _QUERIES), config.head_dim)
            feed(layer, *_entries(random, config, rows, count, dtype), queries)


def _entries(random: torch.Generator, config: Any, rows: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = rows, config.num_key_value_heads, count, config.head_dim
    return _normal(random, dtype, *shape), _normal(random, dtype, *shape)


def _normal(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device, dtype=dtype)
