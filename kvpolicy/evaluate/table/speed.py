"""Time of a decode step under a policy against the full cache of transformers, both in turns."""

import copy
import time
from statistics import median

import attrs
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy.evaluate.decoding import Decoding, fill
from kvpolicy.evaluate.table.setup import DecodeSetup
from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.plan.plan import Plan

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
            fill(cache, self.model, 1, length)
            found = self._in_turns(_decoding(self.model, cache), _decoding(self._twin, full), cache, plan)
        full.crop(length - full.get_seq_length())
        return found

    def _in_turns(self, ours: Decoding, full: Decoding, cache: PolicyCache, plan: Plan) -> StepTime:
        full_seconds, step_seconds = [], []
        for _ in range(_WARM_UP + self.pairs):
            full_seconds.append(_seconds(full))
            before = _compressed(cache)
            step_seconds.append(_seconds(ours) - (_compressed(cache) - before))
        return StepTime(
            full=1e3 * median(full_seconds[_WARM_UP:]),
            step=1e3 * median(step_seconds[_WARM_UP:]),
            compression=1e3 * self._compression(ours, cache, plan),
            held=sum(stats.held for stats in cache.stats) / len(cache.stats),
        )

    def _compression(self, ours: Decoding, cache: PolicyCache, plan: Plan) -> float:
        """Seconds per token, over whole rounds from one compression to the next."""
        if not plan.compresses_while_decoding:
            return 0.0
        steps = plan.budgets.slack * max(1, self.pairs // plan.budgets.slack)
        before = _compressed(cache)
        for _ in range(steps):
            ours.step()
        return (_compressed(cache) - before) / steps

    def _full_cache(self, length: int) -> DynamicCache:
        if length not in self._full:
            cache = DynamicCache(config=self.model.config)
            fill(cache, self._twin, 1, length)
            self._full = {length: cache}  # the one before is not needed any more
        return self._full[length]


def _decoding(model: PreTrainedModel, cache: Cache) -> Decoding:
    """The same token again and again: what it is changes no time."""
    token = torch.ones((1, 1), dtype=torch.long)

    def forward(tokens: Tensor, cache: Cache) -> Tensor:
        model(tokens, past_key_values=cache, use_cache=True)
        return token

    return Decoding(forward, cache, token)


def _seconds(decoding: Decoding) -> float:
    started = time.perf_counter()
    decoding.step()
    return time.perf_counter() - started


def _compressed(cache: PolicyCache) -> float:
    return sum(stats.seconds for stats in cache.stats)
