"""Bytes that a cache takes, measured and by formula."""

from collections.abc import Sequence

import attrs

from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.plan.plan import Plan


@attrs.frozen
class Storage:
    """Bytes of one sequence in all managed layers, and how many slots they give each KV head of a layer, on average."""

    measured: float  # bytes of the storages as they are allocated
    formula: float  # what the plan says of as many slots
    slots: float
    full: float  # bytes of a full cache with as many slots
    segments: int  # layers times KV heads

    @property
    def per_entry(self) -> float:
        """Measured bytes of one slot of one KV head in one layer."""
        return self.measured / self.slots / self.segments

    @property
    def formula_per_entry(self) -> float:
        """The same by formula."""
        return self.formula / self.slots / self.segments

    @property
    def full_per_entry(self) -> float:
        """The same in a full cache."""
        return self.full / self.slots / self.segments


def storage_of(layers: Sequence[PolicyLayer]) -> Storage:
    """What layers that have been filled take."""
    plan = layers[0].plan
    geometry = plan.geometry
    rows = len(layers[0].num_tokens)
    slots = sum(sum(map(sum, layer.storage.capacities)) for layer in layers) / rows / geometry.kv_heads
    number = 2 * geometry.head_dim * plan.dtype.itemsize
    return Storage(
        measured=sum(layer.storage.nbytes for layer in layers) / rows,
        formula=sum(_formula(plan, ordinal, layer) for ordinal, layer in enumerate(layers)) / rows,
        slots=slots / geometry.layers,
        full=slots * geometry.kv_heads * number,
        segments=geometry.layers * geometry.kv_heads,
    )


def _formula(plan: Plan, ordinal: int, layer: PolicyLayer) -> float:
    """Heads that hold different numbers of entries each count with their own."""
    heads = plan.geometry.kv_heads
    capacities = (size for row in layer.storage.capacities for size in row)
    return sum(plan.footprint.layer_bytes(ordinal, size) / heads for size in capacities)
