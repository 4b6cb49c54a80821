"""Time of one compression: the product's layers against plain torch and against the floor."""

from collections.abc import Iterator, Sequence
from functools import partial

import attrs
import torch

from kvpolicy.bench.baselines.naive import LayerTensors, NaiveForm, naive_of
from kvpolicy.bench.cases.filled_layers import due, plan_at, random_layers
from kvpolicy.bench.cases.floors import COPY, GEMM, Floors
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.clock import Call, Clock
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions, Variant, interleave
from kvpolicy.bench.protocol.left_out import NO_TIME, LeftOut, leaving_out
from kvpolicy.bench.protocol.machine import free_bytes
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.bench.protocol.peak_memory import peak_bytes
from kvpolicy.errors import InputError
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import Policy

NAIVE = "naive torch"


@attrs.frozen
class CompressSetup:
    """Configuration: T entries of B rows in some layers, each policy with the budget that it has."""

    policies: tuple[Policy, ...]
    shape: ModelShape
    lengths: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    rows: int = 1
    keys: str = "shared"
    protocol: Repetitions = Repetitions()

    def __attrs_post_init__(self) -> None:
        if not self.policies or not self.lengths:
            raise InputError("compress needs at least one policy and one length")
        if self.rows < 1 or min(self.lengths) < 2:
            raise InputError(f"--rows must be at least 1 and lengths at least 2: {self.rows}, {self.lengths}")


def measure(
    setup: CompressSetup, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> Iterator[tuple[str, list[Case]]]:
    """Every policy at every length, the short ones first; what it was, and no case when it had to be left out."""
    for length in sorted(setup.lengths):
        for policy in setup.policies:
            what, cases = f"{policy.name} at {length}", []
            if deadline.expired():
                left_out(what, NO_TIME)
            else:
                with leaving_out(what, left_out):
                    cases = [measure_one(setup, policy, length, clock, deadline, left_out)]
            yield f"{what} entries", cases


@torch.inference_mode()
def measure_one(
    setup: CompressSetup, policy: Policy, length: int, clock: Clock, deadline: Deadline, left_out: LeftOut
) -> Case:
    """One policy at one length: ours twice, plain torch, a large copy and the library's products, in turns."""
    plan = plan_at(policy.spec, setup.shape, length, setup.dtype, setup.device)
    layers = random_layers(plan, setup.shape, setup.rows, length, setup.keys)
    budgets = plan.budgets.per_layer(length)
    floors = Floors.of(plan, layers, round(sum(budgets) / len(budgets)))
    ours = partial(_ours, plan, setup.shape, layers)
    naive = _naive(setup, policy, layers, budgets, left_out)
    variants = [Variant(OURS, ours), Variant(AGAIN, ours), *naive, *floors.variants()]
    peaks = {variant.name: peak_bytes(variant.fresh(), setup.device) for variant in (variants[0], *naive)}
    samples = interleave(variants, clock, setup.protocol, expired=deadline.expired)
    rates = {f"{name} seconds": list(samples[name]) for name in (COPY, GEMM) if name in samples}
    return Case(
        policy.name,
        length,
        samples={name: seconds for name, seconds in samples.items() if name not in (COPY, GEMM)},
        floors=floors.seconds(samples),
        parts=setup.shape.layers,
        shape=_shape(setup, plan),
        facts={"digest": policy.digest, "peak_bytes": peaks, "moved_bytes": floors.moved, **rates},
    )


def _ours(plan: Plan, shape: ModelShape, layers: Sequence[LayerTensors]) -> Call:
    cache, finish_forward = due(plan, shape, layers)
    if any(layer.stats.compressions for layer in cache.managed):
        raise InputError("the layers were compressed before they were timed")
    return finish_forward


def _naive(
    setup: CompressSetup, policy: Policy, layers: Sequence[LayerTensors], budgets: Sequence[int], left_out: LeftOut
) -> list[Variant]:
    form = naive_of(policy.spec)
    if form is None:
        return []
    rows, heads, length, _ = layers[0].keys.shape
    needed = form.pair_bytes * rows * heads * length**2
    if 2 * needed > free_bytes(setup.device):
        left_out(f"{NAIVE} of {policy.name} at {length}", f"takes {needed / 1e9:.0f} GB for all pairs")
        return []
    return [Variant.repeated(NAIVE, partial(_all_layers, form, layers, budgets))]


def _all_layers(form: NaiveForm, layers: Sequence[LayerTensors], budgets: Sequence[int]) -> None:
    for layer, budget in zip(layers, budgets, strict=True):
        form.run(layer, budget)


def _shape(setup: CompressSetup, plan: Plan) -> dict[str, int | str]:
    return {
        "layers": setup.shape.layers,
        "rows": setup.rows,
        "query_heads": setup.shape.query_heads,
        "kv_heads": setup.shape.kv_heads,
        "head_dim": setup.shape.head_dim,
        "window": max(plan.needs.queries, 1),
        "budget": str(plan.spec.budget) if plan.spec.budget.grows else plan.budgets.average(2**62),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "keys": setup.keys,
        "kernels": str(not plan.fusion.off),
    }
