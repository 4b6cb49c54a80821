"""Time of a decode step under a policy against the full cache of transformers, both in turns."""

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy.evaluate.filling import feed
from kvpolicy.evaluate.table.setup import DecodeSetup
from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.plan.plan import Plan

_CHUNK = 512  # tokens by which caches are filled
_WARM_UP = 2


@attrs.frozen
class StepTime:
    """Milliseconds of one decode step of one sequence."""

    full: float  # median, with the full cache
    step: float  # median, under the policy, compressions left out
    compression: float  # of a compression, divided by the tokens that come until the next one
    held: float  # entries of a KV head, on average

    @property
    def ratio(self) -> float:
        """Time under the policy, compressions included, as a multiple of the full cache's."""
        return (self.step + self.compression) / self.full


def decode_model(setup: DecodeSetup) -> LlamaForCausalLM:
    """A model with random weights, float32, for positions up to the longest length."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=setup.hidden,
        intermediate_size=2 * setup.hidden,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.kv_heads,
        max_position_embeddings=max(setup.lengths) + 4096,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


class DecodeBench:
    """Times policies on one model; the full cache of a length is filled once and returned to that length."""

    def __init__(self, model: PreTrainedModel, pairs: int) -> None:
        self.model = model
        self.pairs = pairs
        self._twin = copy.deepcopy(model)  # stays without a policy, so that nothing is attached between steps
        self._full: dict[int, DynamicCache] = {}

    @torch.inference_mode()
    def time(self, plan: Plan, length: int) -> StepTime:
        """Fill a cache of the policy with `length` tokens and decode, full cache and policy in turns."""
        full = self._full_cache(length)
        with Attachment(plan, self.model) as attachment:
            cache = attachment.cache()
            for chunk in _chunks(self.model, length):
                _fill(cache.managed, *chunk)
            found = self._in_turns(cache, full, plan)
        full.crop(length - full.get_seq_length())
        return found

    def _in_turns(self, cache: PolicyCache, full: DynamicCache, plan: Plan) -> StepTime:
        plain, ours = [], []
        for turn in range(_WARM_UP + self.pairs):
            times = _step(self._twin, full), _net_step(self.model, cache)
            if turn >= _WARM_UP:
                plain.append(times[0])
                ours.append(times[1])
        return StepTime(
            full=1e3 * median(plain),
            step=1e3 * median(ours),
            compression=1e3 * self._compression(cache, plan),
            held=sum(one.held for one in cache.stats) / len(cache.stats),
        )

    def _compression(self, cache: PolicyCache, plan: Plan) -> float:
        """Seconds per token, over whole rounds from one compression to the next."""
        if not plan.compresses_while_decoding:
            return 0.0
        slack = plan.budgets.slack
        steps = slack * max(1, self.pairs // slack)
        before = _compressed(cache)
        for _ in range(steps):
            _step(self.model, cache)
        return (_compressed(cache) - before) / steps

    def _full_cache(self, length: int) -> DynamicCache:
        if length not in self._full:
            cache = DynamicCache(config=self.model.config)
            for keys, values, _ in _chunks(self.model, length):
                for layer in range(len(keys)):
                    cache.update(keys[layer], values[layer], layer)
            self._full = {length: cache}  # the one before is not needed any more
        return self._full[length]


def _chunks(model: PreTrainedModel, length: int) -> Any:
    """Random keys, values [L, 1, K, q, D] and queries [L, 1, H, q, D], the same for every policy."""
    config: Any = model.config
    random = torch.Generator().manual_seed(0)
    for start in range(0, length, _CHUNK):
        count = min(_CHUNK, length - start)
        heads = (config.num_key_value_heads, config.num_key_value_heads, config.num_attention_heads)
        yield tuple(
            torch.randn(config.num_hidden_layers, 1, n, count, config.head_dim, generator=random, dtype=torch.float32)
            for n in heads
        )


def _fill(layers: Sequence[PolicyLayer], keys: Tensor, values: Tensor, queries: Tensor) -> None:
    for layer, *entries in zip(layers, keys, values, queries, strict=True):
        feed(layer, *entries)


def _step(model: PreTrainedModel, cache: Cache) -> float:
    token = torch.ones((1, 1), dtype=torch.long)
    started = time.perf_counter()
    model(token, past_key_values=cache, use_cache=True)
    return time.perf_counter() - started


def _net_step(model: PreTrainedModel, cache: PolicyCache) -> float:
    """Without what compressing took."""
    before = _compressed(cache)
    took = _step(model, cache)
    return took - (_compressed(cache) - before)


def _compressed(cache: PolicyCache) -> float:
    return sum(stats.seconds for stats in cache.stats)
