"""The hooks on the forward of an attached model: which cache it is given, and whether that is the one it uses."""

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_owner import CacheOwner
from kvpolicy.integrations.transformers.calls.uncompressed_forwards import UncompressedForwards
from kvpolicy.integrations.transformers.passes.forward_tokens import forward_tokens
from kvpolicy.integrations.transformers.passes.pass_cache import PassCache
from kvpolicy.integrations.transformers.passes.run_passes import expect_tokens, read_prompt

_CACHE = "past_key_values"


class ForwardHooks:
    """Stand before and after each forward of one model. Copied and pickled with it."""

    def __init__(self, owner: CacheOwner, uncompressed: UncompressedForwards) -> None:
        self.owner, self.uncompressed = owner, uncompressed
        self._lengths: weakref.WeakKeyDictionary[PolicyCache, int] = weakref.WeakKeyDictionary()

    def before(self, module: PreTrainedModel, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        """Raises CacheError when the cache that is given belongs elsewhere, or cannot go on.

        Raises UnsupportedCallError when a prompt has to be read again, and its tokens are not known.
        """
        if torch.compiler.is_compiling():
            return
        given = policy_cache_in(_argument(module, args, call))
        if given is not None:
            self.owner.require(given)
            given.begin_forward()
            if given.prompt is not None:
                expect_tokens(given, given.prompt, forward_tokens(_arguments(module, args, call)))
            self._lengths[given] = given.get_seq_length()

    def after(self, module: PreTrainedModel, args: tuple[Any, ...], call: dict[str, Any], output: Any) -> None:
        """Close the forward, and note when another cache was used, or none though one was given."""
        if torch.compiler.is_compiling():
            return
        given, used = policy_cache_in(_argument(module, args, call)), _cache_in(output)
        if given is None:
            if used is not None and not isinstance(used, PassCache):
                self.uncompressed.note("this forward uses a cache that the attached policy does not bound")
            return
        if used is not None and policy_cache_in(used) is not given:
            self.uncompressed.note("the model replaced the cache of the attached policy by one that is not bounded")
        elif self._lengths.pop(given, -1) == given.get_seq_length():
            self.uncompressed.note("the model did not use the cache of the attached policy")
        elif given.prompt is not None:
            read_prompt(given, given.prompt, module)
        given.end_forward()  # the last thing that is done: an interrupt before it leaves the forward open

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "uncompressed": self.uncompressed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lengths = weakref.WeakKeyDictionary()


def policy_cache_in(value: object) -> PolicyCache | None:
    """A cache of ours, or the one that a decoder with cross attention has wrapped."""
    if isinstance(value, EncoderDecoderCache):
        value = value.self_attention_cache
    return value if isinstance(value, PolicyCache) else None


def _argument(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> object:
    if _CACHE in call or not args:
        return call.get(_CACHE)
    return _arguments(module, args, call).get(_CACHE)


def _arguments(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by their names."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]  # without `self`
    return {**dict(zip(names, args, strict=False)), **call}


def _cache_in(output: Any) -> Cache | None:
    """The cache that a forward gives back."""
    if hasattr(output, _CACHE):
        cache = getattr(output, _CACHE)
        return cache if isinstance(cache, Cache) else None
    if isinstance(output, tuple):
        return next((value for value in output if isinstance(value, Cache)), None)
    return None
