"""Time of the attention of one decode step over what a layer holds, against the bytes that must be read."""

from collections.abc import Iterator, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.bench.baselines.naive import Held
from kvpolicy.bench.cases.filled_layers import due, plan_at, random_layers
from kvpolicy.bench.cases.floors import COPY, bandwidth_of, copy_of
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.clock import Call, Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Protocol, Variant, interleave
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.errors import InputError
from kvpolicy.policy import Policy
from kvpolicy.runtime.asked import Asked
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.spec.budget import Budget

LIBRARY = "library attention"


@attrs.frozen
class AttentionSetup:
    """A policy's layers, each after an eviction that left its budget."""

    policy: Policy
    shape: ModelShape
    held: tuple[int, ...]  # entries that remain
    rows: int
    device: torch.device
    dtype: torch.dtype
    protocol: Protocol = Protocol()

    def __attrs_post_init__(self) -> None:
        if not self.held or any(sum(self.policy.spec.protect.of(held)) >= held for held in self.held) or self.rows < 1:
            raise InputError("attention needs more entries than are protected, and at least one row")


def measure(setup: AttentionSetup, clock: Clock, deadline: Deadline) -> Iterator[tuple[str, Case]]:
    """Few entries first; stops when there is no time."""
    for held in sorted(setup.held):
        if not deadline.expired():
            yield f"attention over {held} entries", measure_one(setup, held, clock, deadline)


@torch.inference_mode()
def measure_one(setup: AttentionSetup, held: int, clock: Clock, deadline: Deadline) -> Case:
    """Ours twice, the library's attention over as many entries, and a large copy."""
    spec = attrs.evolve(setup.policy.spec, budget=Budget(tokens=held))
    plan = plan_at(spec, setup.shape, held + 16, setup.dtype, setup.device)
    queries = max(plan.needs.queries, 1)
    layers = random_layers(setup.shape, setup.rows, held + 16, queries, setup.dtype, setup.device, "shared")
    cache, settle = due(plan, setup.shape, layers)
    settle()
    ours = _each([_step(layer, one) for layer, one in zip(cache.managed, layers, strict=True)])
    library = _each([partial(_library, one, held + 1) for one in layers])
    calls = {OURS: ours, AGAIN: ours, LIBRARY: library}
    variants = [*(Variant(name, partial(_same, call)) for name, call in calls.items()), copy_of(layers[0].keys)]
    samples = interleave(variants, clock, setup.protocol, expired=deadline.expired)
    geometry = setup.shape
    entry = 2 * geometry.head_dim * setup.dtype.itemsize
    read = geometry.layers * setup.rows * geometry.kv_heads * (held + 1) * entry
    return Case(
        setup.policy.name,
        held,
        samples={name: one for name, one in samples.items() if name != COPY},
        floors={"bytes": read / bandwidth_of(samples, layers[0].keys)},
        parts=geometry.layers,
        shape={**attrs.asdict(geometry), "rows": setup.rows, "dtype": str(setup.dtype).removeprefix("torch.")},
        facts={"read_bytes": read, "kernels": plan.kernels},
    )


def _step(layer: PolicyLayer, held: Held) -> Call:
    """The attention of the newest token, which may be asked for again and again."""
    newest = slice(-1, None)
    layer.update(held.keys[:, :, newest], held.values[:, :, newest])
    positions = layer.arrive(None)
    return partial(layer.attend, Asked(held.queries[:, :, newest], positions, padded=False, scaling=held.scaling))


def _library(held: Held, entries: int) -> Tensor:
    keys, values = held.keys[:, :, :entries], held.values[:, :, :entries]
    return scaled_dot_product_attention(held.queries[:, :, -1:], keys, values, enable_gqa=True)


def _each(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _same(call: Call) -> Call:
    return call
