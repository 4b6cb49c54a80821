"""Layers of a policy filled with random entries, up to the moment at which they are compressed."""

from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.bench.baselines.naive import Held
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.errors import InputError
from kvpolicy.evaluate.filling import appended, feed
from kvpolicy.plan.plan import Plan, compile_policy
from kvpolicy.runtime.cache import PolicyCache
from kvpolicy.runtime.support import geometry_of
from kvpolicy.spec.policy import PolicySpec

_LEAST_QUERIES = 1
KEYS = ("shared", "isotropic")


def random_layers(
    shape: ModelShape, rows: int, length: int, queries: int, dtype: torch.dtype, device: torch.device, keys: str
) -> list[Held]:
    """Normal keys, values and queries; `shared` keys of a head have a mean, as those of trained models do."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device, dtype=torch.float32).to(dtype)

    layers = []
    for _ in range(shape.layers):
        entries = normal(rows, shape.kv_heads, length, shape.head_dim)
        if keys == "shared":
            entries += normal(rows, shape.kv_heads, 1, shape.head_dim)
        values = normal(rows, shape.kv_heads, length, shape.head_dim)
        window = normal(rows, shape.query_heads, max(queries, _LEAST_QUERIES), shape.head_dim)
        layers.append(Held(entries, values, window, shape.head_dim**-0.5))
    return layers


def plan_at(spec: PolicySpec, shape: ModelShape, length: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The policy's plan such that entries are compressed by the decode step that makes them `length`, not before.

    Raises InputError when the policy would evict nothing then.
    """
    geometry = geometry_of(shape.config())
    plan = compile_policy(spec, geometry, device, dtype)
    most = max(plan.budgets.per_layer(length))
    if not plan.compresses_while_decoding or most >= length:
        raise InputError(f"policy {spec.name} evicts nothing at {length} entries")
    compress = attrs.evolve(spec.compress, prefill=False, every=length - most)
    return compile_policy(attrs.evolve(spec, compress=compress), geometry, device, dtype)


def due(plan: Plan, shape: ModelShape, layers: Sequence[Held]) -> tuple[PolicyCache, Callable[[], None]]:
    """A cache that holds the layers, and the call that observes the newest queries and compresses all of them."""
    cache = PolicyCache(plan, shape.config())
    asked = []
    for layer, held in zip(cache.managed, layers, strict=True):
        if held.queries.shape[2] > 1:
            feed(layer, held.keys[:, :, :-1], held.values[:, :, :-1], held.queries[:, :, :-1])
        else:
            feed(layer, held.keys[:, :, :-1], held.values[:, :, :-1], held.queries)
    for layer, held in zip(cache.managed, layers, strict=True):  # another forward
        asked.append(appended(layer, held.keys[:, :, -1:], held.values[:, :, -1:], held.queries[:, :, -1:]))

    def settle() -> None:
        for layer, one in zip(cache.managed, asked, strict=True):
            layer.settle(one)

    return cache, settle
