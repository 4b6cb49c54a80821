"""Time of the attention of one decode step over what a layer holds, against the bytes that must be read."""

from collections.abc import Iterator, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.bench.baselines.naive import LayerTensors
from kvpolicy.bench.cases.filled_layers import due, plan_at, random_layers
from kvpolicy.bench.cases.floors import COPY, bandwidth_of, copy_of
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.clock import Call, Clock, captured
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions, Variant, interleave
from kvpolicy.bench.protocol.left_out import NO_TIME, LeftOut, leaving_out
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.errors import InputError
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.policy import Policy
from kvpolicy.spec.budget import Budget

LIBRARY = "library attention"
LAUNCHED = "ours, launched by the host"  # on a GPU the other variants are CUDA graphs


@attrs.frozen
class AttentionSetup:
    """Layers of some policies, each after an eviction that left its budget."""

    policies: tuple[Policy, ...]
    shape: ModelShape
    entries: tuple[int, ...]  # that remain
    rows: int
    device: torch.device
    dtype: torch.dtype
    protocol: Repetitions = Repetitions()

    def __attrs_post_init__(self) -> None:
        protected = [sum(policy.spec.protect.of(count)) / count for policy in self.policies for count in self.entries]
        if not protected or max(protected) >= 1 or self.rows < 1:
            raise InputError("attention needs a policy, more entries than are protected, and at least one row")


def measure(
    setup: AttentionSetup, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> Iterator[tuple[str, list[Case]]]:
    """Few entries first."""
    for entries in sorted(setup.entries):
        for policy in setup.policies:
            what, cases = f"attention over {entries} entries of {policy.name}", []
            if deadline.expired():
                left_out(what, NO_TIME)
            else:
                with leaving_out(what, left_out):
                    cases = [measure_one(setup, policy, entries, clock, deadline)]
            yield what, cases


@torch.inference_mode()
def measure_one(setup: AttentionSetup, policy: Policy, entries: int, clock: Clock, deadline: Deadline) -> Case:
    """Ours twice, the library's attention over as many entries as they were, and a large copy."""
    spec, shape = attrs.evolve(policy.spec, budget=Budget(tokens=entries)), setup.shape
    plan = plan_at(spec, shape, entries + 16, setup.dtype, setup.device)
    layers = random_layers(plan, shape, setup.rows, entries + 16)
    cache, finish_forward = due(plan, shape, layers)
    finish_forward()
    ours = _each([_step(layer, tensors) for layer, tensors in zip(cache.managed, layers, strict=True)])
    library = _each([partial(_library, tensors, entries + 1) for tensors in layers])
    alone, launched = captured(ours, setup.device), {LAUNCHED: ours} if setup.device.type == "cuda" else {}
    calls = {OURS: alone, AGAIN: alone, LIBRARY: captured(library, setup.device), **launched}
    variants = [Variant.repeated(name, call) for name, call in calls.items()]
    samples = interleave([*variants, copy_of(layers[0].keys)], clock, setup.protocol, expired=deadline.expired)
    read = setup.rows * attrs.evolve(plan.footprint, columns={}).nbytes(entries + 1)  # keys and values as they are held
    return Case(
        policy.name,
        entries,
        samples={name: seconds for name, seconds in samples.items() if name != COPY},
        floors={"bytes": read / bandwidth_of(samples, layers[0].keys)},
        parts=shape.layers,
        shape={**attrs.asdict(shape), "rows": setup.rows, "dtype": str(setup.dtype).removeprefix("torch.")},
        facts={"read_bytes": read, "kernels": plan.kernels},
    )


def _step(layer: PolicyLayer, tensors: LayerTensors) -> Call:
    """The attention of the newest token, which may be asked for again and again."""
    newest = slice(-1, None)
    layer.update(tensors.keys[:, :, newest], tensors.values[:, :, newest])
    positions = layer.place_tokens(None)
    return partial(
        layer.attend, QueryBatch(tensors.queries[:, :, newest], positions, padded=False, scaling=tensors.scaling)
    )


def _library(layer: LayerTensors, entries: int) -> Tensor:
    keys, values = layer.keys[:, :, :entries], layer.values[:, :, :entries]
    return scaled_dot_product_attention(layer.queries[:, :, -1:], keys, values, enable_gqa=True)


def _each(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run
