"""Time of moving the entries that stay: the product's layers against a gather with expanded indices."""

import attrs
import torch
from torch import Tensor

from kvpolicy.bench.baselines.naive.layer_tensors import LayerTensors, gathered
from kvpolicy.bench.cases.filled_layers import due, plan_of, random_layers
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.clock import Call, Clock
from kvpolicy.bench.protocol.interleave import Repetitions, Variant, interleave
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.plan.compress.step import compress_one
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import Policy

GATHER = "expanded gather"


@attrs.frozen
class Compaction:
    """A policy whose merger drops, at one length."""

    policy: Policy
    shape: ModelShape
    length: int
    device: torch.device
    dtype: torch.dtype
    protocol: Repetitions = Repetitions(rounds=15, warm_up=2)

    @torch.inference_mode()
    def measure(self, clock: Clock) -> Case:
        """Both move the entries that the policy chose."""
        spec = self.policy.spec  # nothing is to move before it is timed
        spec = attrs.evolve(spec, compress=attrs.evolve(spec.compress, prefill=False))
        plan = plan_of(spec, self.shape, self.dtype, self.device)
        layers = random_layers(plan, self.shape, 1, self.length)
        kept = self._kept(plan, layers)
        variants = [
            Variant(OURS, lambda: self._ours(plan, layers)),
            Variant(AGAIN, lambda: self._ours(plan, layers)),
            Variant(GATHER, lambda: self._gather(layers, kept)),
        ]
        samples = interleave(variants, clock, self.protocol)
        shape = {**attrs.asdict(self.shape), "kept": kept[0].shape[-1], "dtype": str(self.dtype)}
        return Case(self.policy.name, self.length, samples, parts=self.shape.layers, shape=shape)

    def _ours(self, plan: Plan, layers: list[LayerTensors]) -> Call:
        cache, _ = due(plan, self.shape, layers)
        chosen = []
        for layer in cache.managed:
            view = layer.view((0,))
            chosen.append((layer, compress_one(plan.spec, view, layer.budget((0,)))))

        def move() -> None:
            for layer, result in chosen:
                layer.apply((0,), result, fills=plan.fills_holes)

        return move

    def _gather(self, layers: list[LayerTensors], kept: list[Tensor]) -> Call:
        """As a cache does whose entries are replaced layer by layer, in which the newest token has just arrived."""
        entries = [attrs.evolve(layer, keys=layer.keys.clone(), values=layer.values.clone()) for layer in layers]

        def replace() -> None:
            for index, slots in enumerate(kept):
                keys, values = gathered(entries[index], slots, 0)
                entries[index] = attrs.evolve(entries[index], keys=keys, values=values)

        return replace

    def _kept(self, plan: Plan, layers: list[LayerTensors]) -> list[Tensor]:
        cache, _ = due(plan, self.shape, layers)
        return [compress_one(plan.spec, layer.view((0,)), layer.budget((0,))).kept for layer in cache.managed]
