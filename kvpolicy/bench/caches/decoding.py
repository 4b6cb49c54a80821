"""Decoding without a prompt: any cache filled with random entries, then one decode step after another."""

from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy.bench.caches.filling import feed
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer

_CHUNK = 4096  # tokens of one forward while a policy's cache is filled, and of all its rows together:
_CHUNK_OF_ALL = 2**18
_QUERIES = 64  # the newest of a forward, which scorers may observe


@attrs.define(eq=False)
class Decoding:
    """B sequences of one length in the middle of greedy decoding."""

    forward: Callable[[Tensor, Cache], Tensor]  # from the newest tokens [B, q] to the next ones [B, 1]
    cache: Cache
    tokens: Tensor  # the newest

    def step(self) -> None:
        """One more token for every row."""
        self.tokens = self.forward(self.tokens, self.cache).clone()

    @property
    def slack(self) -> int:
        """Steps from one compression to the next; 0 for a cache that never compresses."""
        return self.cache.plan.budgets.slack if isinstance(self.cache, PolicyCache) else 0

    @property
    def compressions(self) -> int:
        """Compressions of all layers so far."""
        return sum(stats.compressions for stats in self.cache.stats) if isinstance(self.cache, PolicyCache) else 0


def fill(cache: Cache, model: PreTrainedModel, rows: int, length: int) -> None:
    """Random entries for `length` tokens; a policy gets them in chunks, and compresses as it would in prefill."""
    random = torch.Generator(model.device).manual_seed(0)
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PolicyLayer):
            cache.update(*_entries(random, model, rows, length), index)
    chunk = max(1, min(_CHUNK, _CHUNK_OF_ALL // rows))
    _forwards(cache, model, rows, (min(chunk, length - start) for start in range(0, length, chunk)), random)


def fill_one_by_one(cache: Cache, model: PreTrainedModel, rows: int, count: int) -> None:
    """Random entries for `count` more tokens that come one after another, in a policy's layers."""
    _forwards(cache, model, rows, (1 for _ in range(count)), torch.Generator(model.device).manual_seed(1))


def fill_until_due(cache: Cache, model: PreTrainedModel, rows: int) -> None:
    """Fill a policy's cache until the next step makes it compress, as if it had decoded; nothing for other caches."""
    if isinstance(cache, PolicyCache):
        count = min(cache.plan.budgets.slack, _CHUNK) - 1
        _forwards(
            cache, model, rows, (count,) if count else (), torch.Generator(model.device).manual_seed(1), queries=1
        )


def _forwards(
    cache: Cache,
    model: PreTrainedModel,
    rows: int,
    counts: Iterable[int],
    random: torch.Generator,
    queries: int = _QUERIES,
) -> None:
    config: Any = model.config
    layers = [layer for layer in cache.layers if isinstance(layer, PolicyLayer)]
    if not layers:
        return
    for count in counts:
        for layer in layers:
            keys, values = _entries(random, model, rows, count)
            feed(layer, keys, values, _normal(random, model, rows, config.num_attention_heads, min(count, queries)))


def _entries(random: torch.Generator, model: PreTrainedModel, rows: int, count: int) -> tuple[Tensor, Tensor]:
    config: Any = model.config
    heads = config.num_key_value_heads
    return _normal(random, model, rows, heads, count), _normal(random, model, rows, heads, count)


def _normal(random: torch.Generator, model: PreTrainedModel, rows: int, heads: int, count: int) -> Tensor:
    config: Any = model.config
    size = (rows, heads, count, config.head_dim)
    return torch.randn(size, generator=random, device=model.device, dtype=model.dtype)
