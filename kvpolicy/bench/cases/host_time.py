"""Time that the layers of a cache take for one token of every row, without the model and without attention."""

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

import attrs
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import PolicyContender, decoding_at
from kvpolicy.bench.caches.filling import feed
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case, again
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.interleave import Repetitions, Variant, interleave
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.policy import Policy

_WRITES = "writes alone"


@attrs.frozen
class HostTime:
    """A token of each of B rows behind `length` others: stored, placed, observed, and nothing evicted.

    The floor is writing its keys and values to where they stay, two calls a layer.
    """

    policies: tuple[Policy, ...]
    shape: ModelShape
    rows: int
    length: int
    protocol: Repetitions

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM, clock: Clock) -> list[Case]:
        """One case per policy; seconds are of all layers, the parts of the case."""
        random, shape = torch.Generator().manual_seed(0), self.shape
        size = (self.rows, shape.kv_heads, 1, shape.head_dim)
        of_queries = (self.rows, shape.query_heads, 1, shape.head_dim)
        token = [torch.randn(each, generator=random, dtype=torch.float32) for each in (size, size, of_queries)]
        names = {name: policy for policy in self.policies for name in (policy.name, again(policy.name))}
        with ExitStack() as stack:
            variants = []
            for name, policy in names.items():
                contender = PolicyContender.of(policy, model)
                stack.enter_context(contender.open())
                cache = decoding_at(contender, self.rows, self.length, 0).cache
                layers = [layer for layer in cache.layers if isinstance(layer, PolicyLayer)]
                variants.append(Variant.repeated(name, partial(_one_token, layers, token)))
            room = [
                torch.empty((*size[:2], self.length + 1, size[3]), dtype=torch.float32) for _ in range(2 * shape.layers)
            ]
            variants.append(Variant.repeated(_WRITES, partial(_write, room, token[:2])))
            samples = interleave(variants, clock, self.protocol)
        return [
            Case(
                policy.name,
                self.length,
                {OURS: samples[policy.name], AGAIN: samples[again(policy.name)]},
                floors={"writes": median(samples[_WRITES])},
                parts=shape.layers,
                shape={**attrs.asdict(shape), "rows": self.rows},
                facts={"digest": policy.digest},
            )
            for policy in self.policies
        ]


def _one_token(layers: Sequence[PolicyLayer], token: Sequence[Tensor]) -> None:
    keys, values, queries = token
    for layer in layers:
        feed(layer, keys, values, queries)


def _write(room: Sequence[Tensor], token: Sequence[Tensor]) -> None:
    """Behind the last of the entries [B, K, T, D] of each layer."""
    for place, states in zip(room, itertools.cycle(token), strict=False):
        place[:, :, -1:].copy_(states)
