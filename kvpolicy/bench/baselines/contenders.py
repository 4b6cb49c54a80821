"""One interface for what is timed while decoding: transformers' full caches, a preallocated one, policies."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from kvpolicy.bench.baselines.preallocated_cache import PreallocatedCache
from kvpolicy.bench.caches.decoding import Decoding, fill
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.left_out import LeftOut
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.policy import Policy

DYNAMIC, PREALLOCATED, STATIC, COMPILED = "DynamicCache", "preallocated", "StaticCache", "StaticCache, compiled"
QUANTO = "QuantizedCache, quanto in 4 bits"  # needs optimum-quanto, and a compiler for its first step
COMPILING = 100.0  # seconds that have to be left before something is compiled
FULL = (DYNAMIC, PREALLOCATED, STATIC, COMPILED, QUANTO)


class Contender(Protocol):
    """One way to decode with a model."""

    name: str
    model: LlamaForCausalLM

    def open(self) -> AbstractContextManager[Any]:
        """To be entered before it is used."""

    def cache(self, capacity: int) -> Cache:
        """An empty cache that `capacity` tokens will go through."""

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The token [B, 1] that follows the newest of `tokens` [B, q]."""


@attrs.define(eq=False)
class FullCache:
    """The model as it is, with one of the caches that keep everything."""

    name: str
    model: LlamaForCausalLM
    _step: Callable[..., Any] | None = attrs.field(default=None, init=False)  # compiled at the first step

    def open(self) -> AbstractContextManager[Any]:
        """Nothing is changed."""
        return nullcontext()

    def cache(self, capacity: int) -> Cache:
        """A full cache; static ones have their size from the start."""
        config = self.model.config
        if self.name == DYNAMIC:
            return DynamicCache(config=config)
        if self.name == PREALLOCATED:
            return PreallocatedCache(config, capacity)
        if self.name == QUANTO:
            return QuantizedCache("quanto", config)
        return StaticCache(config=config, max_cache_len=capacity)

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Prompts are never compiled."""
        if self.name != COMPILED or tokens.shape[1] > 1:
            return next_token(self.model, tokens, cache)
        self._step = self._step or compiled(self.model)
        return next_token(self._step, tokens, cache)


@attrs.define(eq=False)
class PolicyContender:
    """A copy of the model, with the same weights, that has the policy attached."""

    name: str
    model: LlamaForCausalLM
    policy: Policy
    graph: bool = False
    _attachment: Attachment | None = None

    @classmethod
    def of(cls, policy: Policy, model: LlamaForCausalLM, *, graph: bool = False) -> "PolicyContender":
        """On a twin of `model`, so that both can take turns."""
        return cls(policy.name, twin(model), policy, graph)

    def open(self) -> AbstractContextManager[Any]:
        """Attached until the block ends."""
        options: dict[str, Any] = {"graph": True} if self.graph else {}
        self._attachment = self.policy.attach(self.model, **options)
        return self._attachment

    def cache(self, capacity: int) -> Cache:
        """A cache of the policy, which sizes itself."""
        if self._attachment is None:
            raise RuntimeError(f"{self.name}: used before it was opened, for {capacity} tokens")
        return self._attachment.cache()

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Through the model, as `generate` does."""
        return next_token(self.model, tokens, cache)


def decoding_at(contender: Contender, rows: int, length: int, room: int) -> Decoding:
    """A contender that has been opened, after `length` random entries, with room for more."""
    cache = contender.cache(length + room)
    with torch.no_grad():
        fill(cache, contender.model, rows, length)
    return Decoding(contender.forward, cache, torch.ones((rows, 1), dtype=torch.long, device=contender.model.device))


@torch.no_grad()
def next_token(call: Callable[..., Any], tokens: Tensor, cache: Cache) -> Tensor:
    """Greedy; nothing ends a sequence."""
    logits = call(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    best: Tensor = logits[:, -1:].argmax(-1)
    return best


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with a configuration of its own and the same weights in memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def compiled(model: LlamaForCausalLM) -> Callable[..., Any]:
    """The decode step as transformers' documentation compiles it: with CUDA graphs where there is a GPU."""
    cuda = model.device.type == "cuda"
    call: Callable[..., Any] = torch.compile(
        model.forward, mode="reduce-overhead" if cuda else "default", dynamic=False
    )
    return call


def full_caches(
    names: Sequence[str], model: LlamaForCausalLM, deadline: Deadline, left_out: LeftOut
) -> list[Contender]:
    """The full caches of these names for which there is time: compiling cannot be broken off."""
    if COMPILED in names and deadline.left < COMPILING:
        left_out(COMPILED, f"{deadline.left:.0f} s were left, and compiling may take {COMPILING:.0f}")
        names = [name for name in names if name != COMPILED]
    return [FullCache(name, model) for name in names]
