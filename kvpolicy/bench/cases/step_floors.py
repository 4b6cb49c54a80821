"""Lower bounds on the time of a decode step that attends to so many entries, however these are held."""

from collections.abc import Mapping
from functools import partial
from statistics import median

import attrs
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import DYNAMIC, FullCache, decoding_at
from kvpolicy.bench.caches.decoding import Decoding
from kvpolicy.bench.cases.floors import bandwidth_of, copy_of
from kvpolicy.bench.protocol.interleave import Samples, Variant
from kvpolicy.bench.protocol.model_shapes import ModelShape

EMPTY, PRODUCTS = "step over one token", "products alone"
_NUMBERS = 2**17  # of keys and of values that are multiplied at a time: they stay in the cache of a processor


@attrs.frozen
class StepFloors:
    """What a step takes over next to nothing, and beside it the larger of two times, for attention over all entries.

    They are the products of attention with numbers that lie in the cache of the processor, and reading what is held, at
    the rate of a large copy. Unpacking, which every packed store needs, is in neither.
    """

    shape: ModelShape
    length: int
    like: Tensor
    empty: Decoding

    @classmethod
    def of(cls, model: LlamaForCausalLM, shape: ModelShape, rows: int, length: int, steps: int) -> "StepFloors":
        """Of a model, for `rows` sequences of `length` entries a head, and some steps behind one token."""
        like = torch.empty((rows, 0), dtype=model.dtype, device=model.device)
        return cls(shape, length, like, decoding_at(FullCache(DYNAMIC, model), rows, 1, steps))

    def variants(self) -> list[Variant]:
        """To be timed in turns with the steps themselves."""
        return [Variant.repeated(EMPTY, self.empty.step), Variant(PRODUCTS, self._products), copy_of(self.like)]

    def seconds(self, samples: Samples, held: int) -> Mapping[str, float]:
        """The floors of a step over `held` bytes of keys and values."""
        rest = median(samples[EMPTY])
        read = held / bandwidth_of(samples, self.like)
        return {"bytes": rest + read, "products": rest + median(samples[PRODUCTS])}

    @torch.no_grad()
    def _products(self) -> partial[None]:
        shape, rows = self.shape, self.like.shape[0] * self.shape.kv_heads
        size = max(1, min(self.length, _NUMBERS // (rows * shape.head_dim)))
        random = torch.Generator(self.like.device).manual_seed(0)
        states = self.like.new_empty(rows, size, shape.head_dim).normal_(generator=random)
        queries = self.like.new_empty(rows, shape.query_heads // shape.kv_heads, shape.head_dim).normal_(
            generator=random
        )
        return partial(_multiply, queries, states, shape.layers * max(1, self.length // size))


def _multiply(queries: Tensor, states: Tensor, times: int) -> None:
    """Logits of the queries, and sums of the values that they weigh, block by block."""
    logits, sums = torch.empty_like(queries @ states.mT), torch.empty_like(queries)
    for _ in range(times):
        torch.bmm(queries, states.mT, out=logits)
        torch.bmm(logits, states, out=sums)
