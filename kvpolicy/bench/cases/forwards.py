"""Time of one forward of many tokens, a prompt or a chunk behind others: policies and the plain cache in turns."""

import copy
from contextlib import ExitStack
from functools import partial

import attrs
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from kvpolicy.bench.baselines.contenders import DYNAMIC, Contender, FullCache, PolicyContender
from kvpolicy.bench.caches.decoding import fill
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case, again
from kvpolicy.bench.protocol.clock import Call, Clock
from kvpolicy.bench.protocol.interleave import Repetitions, Variant, interleave
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.policy import Policy


@attrs.frozen
class Forwards:
    """`tokens` tokens of one sequence behind `length` random entries, which may be none."""

    policies: tuple[Policy, ...]
    shape: ModelShape
    length: int
    tokens: int
    protocol: Repetitions

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM, clock: Clock) -> list[Case]:
        """One case per policy; the plain cache is timed once, in the same rounds."""
        contenders: dict[str, Contender] = {DYNAMIC: FullCache(DYNAMIC, model)}
        for policy in self.policies:
            for name in (policy.name, again(policy.name)):
                contenders[name] = PolicyContender.of(policy, model)
        with ExitStack() as stack:
            variants = []
            for name, contender in contenders.items():
                stack.enter_context(contender.open())
                held = contender.cache(self.length + self.tokens)
                fill(held, contender.model, 1, self.length)
                variants.append(Variant(name, partial(self._forward, contender, held)))
            samples = interleave(variants, clock, self.protocol)
        shape = {**attrs.asdict(self.shape), "tokens": self.tokens, "dtype": str(model.dtype).removeprefix("torch.")}
        return [
            Case(
                policy.name,
                self.length,
                {OURS: samples[policy.name], AGAIN: samples[again(policy.name)], DYNAMIC: samples[DYNAMIC]},
                shape=shape,
                facts={"digest": policy.digest},
            )
            for policy in self.policies
        ]

    def _forward(self, contender: Contender, held: Cache) -> Call:
        """Behind a copy of what is held, so that each forward meets the same entries."""
        if not self.length:
            own = contender.cache(self.tokens)
        else:
            own = held.fork() if isinstance(held, PolicyCache) else copy.deepcopy(held)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.shape.vocabulary, (1, self.tokens), generator=random)
        return partial(torch.no_grad()(contender.forward), tokens, own)
