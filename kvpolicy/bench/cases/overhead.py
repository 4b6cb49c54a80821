"""What a policy costs that evicts nothing, and whether steps get slower the longer a sequence has become."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import DYNAMIC, Contender, FullCache, PolicyContender
from kvpolicy.bench.cases.decode import Running
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.interleave import Protocol, Variant, interleave
from kvpolicy.evaluate.filling import feed
from kvpolicy.policy import Policy
from kvpolicy.runtime.layer import PolicyLayer

_AT_ONCE = 1024  # tokens whose random entries exist at one time


@attrs.frozen
class Overhead:
    """Steps of a model with a policy attached whose budget exceeds the length, against those of the plain model."""

    policy: Policy
    length: int
    protocol: Protocol = Protocol(rounds=41, warm_up=3)

    def measure(self, model: LlamaForCausalLM, clock: Clock) -> Case:
        """`ratio(DYNAMIC)` is the plain model's time as a multiple of ours: below 1 when attaching costs."""
        room = self.protocol.rounds + self.protocol.warm_up
        with ExitStack() as stack:
            attached = [PolicyContender.of(self.policy, model) for _ in range(2)]
            contenders: list[Contender] = [*attached, FullCache(DYNAMIC, model)]
            running = []
            for contender in contenders:
                stack.enter_context(contender.open())
                running.append(Running.filled(contender, 1, self.length, room))
            names = (OURS, AGAIN, DYNAMIC)
            variants = [Variant(name, one.fresh) for name, one in zip(names, running, strict=True)]
            samples = interleave(variants, clock, self.protocol)
        return Case(self.policy.name, self.length, samples, shape={"budget": str(self.policy.spec.budget)})


@attrs.frozen
class Age:
    """Steps after many generated tokens against steps after few; both hold as much and compress in the same round."""

    policy: Policy
    young: int = 2048
    old: int = 51_200
    protocol: Protocol = Protocol(rounds=256, warm_up=4)

    def measure(self, model: LlamaForCausalLM, clock: Clock) -> Case:
        """Ours is the old sequence; `young` and `young again` tell what is noise."""
        ages = {OURS: self.old, "young": self.young, "young again": self.young}
        with ExitStack() as stack:
            variants = []
            for name, age in ages.items():
                contender = PolicyContender.of(self.policy, model)
                stack.enter_context(contender.open())
                variants.append(Variant(name, self._generated(contender, age).fresh))
            samples = interleave(variants, clock, self.protocol)
        return Case(self.policy.name, self.old, samples, shape={"young": self.young, "old": self.old})

    @torch.no_grad()
    def _generated(self, contender: PolicyContender, tokens: int) -> Running:
        """After so many tokens that came one by one, random entries standing in for the model's."""
        model = contender.model
        cache = contender.cache(tokens)
        random = torch.Generator(model.device).manual_seed(0)
        _one_by_one([layer for layer in cache.layers if isinstance(layer, PolicyLayer)], model, tokens, random)
        return Running(contender, cache, torch.ones((1, 1), dtype=torch.long, device=model.device))


def _one_by_one(layers: Sequence[PolicyLayer], model: LlamaForCausalLM, tokens: int, random: torch.Generator) -> None:
    config: Any = model.config
    heads = (config.num_key_value_heads, config.num_key_value_heads, config.num_attention_heads)
    for start in range(0, tokens, _AT_ONCE):
        count = min(_AT_ONCE, tokens - start)
        sizes = [(len(layers), 1, one, count, config.head_dim) for one in heads]
        keys, values, queries = (
            torch.randn(size, generator=random, device=model.device, dtype=model.dtype) for size in sizes
        )
        for place in range(count):
            newest = slice(place, place + 1)
            for layer, *states in zip(layers, keys, values, queries, strict=True):
                feed(layer, *(one[:, :, newest] for one in states))
