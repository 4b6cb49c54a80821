"""Time that attaching adds when nothing is evicted, and step time after many generated tokens."""

from contextlib import ExitStack

import attrs
import torch
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import DYNAMIC, Contender, FullCache, PolicyContender, decoding_at
from kvpolicy.bench.caches.decoding import Decoding, fill_one_by_one
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.decode_steps import time_steps
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.policy import Policy


@attrs.frozen
class Overhead:
    """Steps of a model with a policy attached whose budget exceeds the length, against those of the plain model."""

    policy: Policy
    length: int
    protocol: Repetitions = Repetitions(rounds=41, warm_up=3)

    def measure(self, model: LlamaForCausalLM, clock: Clock) -> Case:
        """`ratio(DYNAMIC)` is the plain model's time as a multiple of ours: below 1 when attaching costs."""
        room = self.protocol.rounds + self.protocol.warm_up
        contenders: dict[str, Contender] = {name: PolicyContender.of(self.policy, model) for name in (OURS, AGAIN)}
        contenders[DYNAMIC] = FullCache(DYNAMIC, model)
        with ExitStack() as stack:
            decodings = {}
            for name, contender in contenders.items():
                stack.enter_context(contender.open())
                decodings[name] = decoding_at(contender, 1, self.length, room)
            samples = time_steps(decodings, clock, self.protocol)
        return Case(self.policy.name, self.length, samples, shape={"budget": str(self.policy.spec.budget)})


@attrs.frozen
class Age:
    """Steps after many generated tokens against steps after few; both hold as much and compress in the same round."""

    policy: Policy
    young: int = 2048
    old: int = 51_200
    protocol: Repetitions = Repetitions(rounds=256, warm_up=4)

    def measure(self, model: LlamaForCausalLM, clock: Clock) -> Case:
        """Ours is the old sequence; `young` and `young again` tell what is noise."""
        with ExitStack() as stack:
            decodings = {}
            for name, tokens in {OURS: self.old, "young": self.young, "young again": self.young}.items():
                contender = PolicyContender.of(self.policy, model)
                stack.enter_context(contender.open())
                decodings[name] = self._generated(contender, tokens)
            samples = time_steps(decodings, clock, self.protocol)
        return Case(self.policy.name, self.old, samples, shape={"young": self.young, "old": self.old})

    @torch.no_grad()
    def _generated(self, contender: PolicyContender, tokens: int) -> Decoding:
        """After so many tokens that came one by one, random entries standing in for the model's."""
        decoding = decoding_at(contender, 1, 0, tokens)
        fill_one_by_one(decoding.cache, contender.model, 1, tokens)
        return decoding
