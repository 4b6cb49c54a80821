"""Fills cache layers with random entries until the next call compresses them."""

from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor

from kvpolicy.bench.baselines.naive import LayerTensors
from kvpolicy.bench.caches.filling import appended, feed
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.errors import InputError
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.models.rotary import rotary_of_config
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.plan import Plan, compile_policy, needs_rotary
from kvpolicy.spec.policy import PolicySpec

KEYS = ("shared", "isotropic")


def random_layers(plan: Plan, shape: ModelShape, rows: int, length: int, keys: str = "shared") -> list[LayerTensors]:
    """Normal keys, values and queries; `shared` keys of a head have a mean, as those of trained models do."""
    random = torch.Generator(plan.device).manual_seed(0)

    def normal(heads: int, count: int) -> Tensor:
        size = (rows, heads, count, shape.head_dim)
        return torch.randn(size, generator=random, device=plan.device, dtype=torch.float32).to(plan.dtype)

    layers = []
    for _ in range(shape.layers):
        entries, values = normal(shape.kv_heads, length), normal(shape.kv_heads, length)
        if keys == "shared":
            entries += normal(shape.kv_heads, 1)
        queries = normal(shape.query_heads, max(plan.needs.queries, 1))
        layers.append(LayerTensors(entries, values, queries, shape.head_dim**-0.5))
    return layers


def plan_of(spec: PolicySpec, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Plan:
    """The policy's plan for a model of that shape."""
    config = shape.config()
    rotary = rotary_of_config(config) if needs_rotary(spec) else None
    return compile_policy(spec, geometry_of(config), device, dtype, rotary)


def plan_at(spec: PolicySpec, shape: ModelShape, length: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The policy's plan such that entries are compressed by the decode step that makes them `length`, not before.

    Raises InputError when the policy would evict nothing then.
    """
    plan = plan_of(spec, shape, dtype, device)
    most = max(plan.budgets.per_layer(length))
    if not plan.compresses_while_decoding or most >= length:
        raise InputError(f"policy {spec.name} evicts nothing at {length} entries")
    compress = attrs.evolve(spec.compress, prefill=False, every=length - most)
    return plan_of(attrs.evolve(spec, compress=compress), shape, dtype, device)


def _output_projection(plan: Plan) -> Tensor:
    """A weight [H, D, H·D], the same whenever it is asked for."""
    heads, dim = plan.geometry.query_heads, plan.geometry.head_dim
    random = torch.Generator(plan.device).manual_seed(1)
    weight = torch.randn(heads, dim, heads * dim, generator=random, device=plan.device, dtype=torch.float32)
    return weight.to(plan.dtype)


def due(plan: Plan, shape: ModelShape, layers: Sequence[LayerTensors]) -> tuple[PolicyCache, Callable[[], None]]:
    """A cache that holds the layers, and the call that observes the newest queries and compresses all of them."""
    cache = PolicyCache(plan, shape.config())
    pairs = list(zip(cache.managed, layers, strict=True))
    for layer, tensors in pairs:
        if plan.needs.output_projection:
            layer.output_projection = partial(_output_projection, plan)
        queries = tensors.queries[:, :, :-1] if tensors.queries.shape[2] > 1 else tensors.queries
        feed(layer, tensors.keys[:, :, :-1], tensors.values[:, :, :-1], queries)
    newest = [  # another forward
        appended(layer, tensors.keys[:, :, -1:], tensors.values[:, :, -1:], tensors.queries[:, :, -1:])
        for layer, tensors in pairs
    ]

    def finish_forward() -> None:
        for layer, queries in zip(cache.managed, newest, strict=True):
            layer.finish_forward(queries)

    return cache, finish_forward
