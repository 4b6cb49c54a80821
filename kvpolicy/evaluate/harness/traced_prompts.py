"""Prompts that the model computes once, and from which the cache of any policy is filled."""

import copy
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.errors import EvaluationError
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.calls.padding_mask import NewTokens
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import load
from kvpolicy.stages import Needs


@attrs.frozen(eq=False)
class TracedLayer:
    """What the attention of one managed layer was given: queries [B, H, T, D], keys and values [B, K, T, D]."""

    queries: Tensor  # after RoPE, as are the keys
    keys: Tensor
    values: Tensor
    scaling: float

    def to(self, dtype: torch.dtype) -> "TracedLayer":
        """The same in another dtype."""
        return TracedLayer(self.queries.to(dtype), self.keys.to(dtype), self.values.to(dtype), self.scaling)


@attrs.frozen(eq=False)
class TracedPrompts:
    """B prompts of at most T tokens, padded on the left, after one forward of the model with its full cache.

    Attention over a prompt that comes in one forward is over all of it, whatever the policy: keys, values and queries
    are the same, and only what a layer keeps of them differs. So the model computes a prompt once, and each policy's
    cache is filled with the result. A policy whose scorers read the prompt again computes it by itself.
    """

    tokens: Tensor  # [B, T] ids
    valid: Tensor  # [B, T] bool, False = pad
    layers: tuple[TracedLayer, ...]  # the managed ones
    unmanaged: dict[int, Any]  # the model's own cache layers, by their index, from which others are copied

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, pads not counted."""
        lengths: list[int] = self.valid.sum(1).tolist()
        return lengths

    @torch.inference_mode()
    def compressed(self, plan: Plan, attachment: Attachment) -> PolicyCache:
        """A new cache of a plan, as it is after a forward over the prompts; whatever policy is attached may differ."""
        model = attachment.model
        cache = attachment.adopt(PolicyCache(plan, model.config))
        if plan.passes:
            model(self.tokens, **self._call, past_key_values=cache, use_cache=True)
            return cache
        cache.begin_forward()
        fill(cache.managed, self.layers, self.valid)
        cache.end_forward()
        with cache.integrity.unmoved:
            for index, layer in self.unmanaged.items():
                _copy_layer(layer, cache.layers[index])
        cache.resume()
        return cache

    @torch.inference_mode()
    def uncompressed(self, rows: Sequence[int], model: PreTrainedModel) -> DynamicCache:
        """Transformers' own full cache after the prompts of the rows named, in that order."""
        cache = DynamicCache(config=model.config)
        chosen = torch.tensor(list(rows), device=self.tokens.device)
        managed = (index for index in range(len(cache.layers)) if index not in self.unmanaged)
        for index, seen in zip(managed, self.layers, strict=True):
            cache.update(seen.keys[chosen], seen.values[chosen], index)
        for index, layer in self.unmanaged.items():
            other: Any = cache.layers[index]
            _copy_layer(layer, other)
            other.batch_select_indices(chosen)
        return cache

    def to(self, dtype: torch.dtype) -> "TracedPrompts":
        """The same with queries, keys and values rounded to another dtype."""
        unmanaged = {index: _rounded(layer, dtype) for index, layer in self.unmanaged.items()}
        return attrs.evolve(self, layers=tuple(layer.to(dtype) for layer in self.layers), unmanaged=unmanaged)

    @property
    def _call(self) -> dict[str, Any]:
        places = (self.valid.long().cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": self.valid.long(), "position_ids": places, "logits_to_keep": 1}


@torch.inference_mode()
def trace_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> TracedPrompts:
    """Compute prompts, lists of token ids, in one forward. Raises UnsupportedModelError."""
    tokens, valid = padded(prompts, model.device)
    # Every query is kept, as if a scorer let all of them vote.
    plan = load("kvpolicy:full").compile(model)
    plan = attrs.evolve(plan, needs=Needs(queries=tokens.shape[1]), observers=())
    with Attachment(plan, model) as attachment:
        cache = attachment.cache()
        traced = TracedPrompts(tokens, valid, (), {})
        model(tokens, **traced._call, past_key_values=cache, use_cache=True)  # noqa: SLF001 - of its own class
    unmanaged = {index: layer for index, layer in enumerate(cache.layers) if not isinstance(layer, PolicyLayer)}
    return attrs.evolve(traced, layers=tuple(map(_traced, cache.managed)), unmanaged=unmanaged)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor [B, T], padded on the left with id 0, and which of them are real."""
    width = max(map(len, rows))
    tokens = [[0] * (width - len(row)) + list(row) for row in rows]
    valid = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(valid, device=device)


@torch.inference_mode()
def fill(layers: Sequence[PolicyLayer], traced: Sequence[TracedLayer], valid: Tensor) -> None:
    """Fill empty cache layers with the first T tokens of a trace, as a prompt [B, T] of which `valid` are real would.

    The attention itself is not computed again.
    """
    count = valid.shape[1]
    new_tokens = None if bool(valid.all()) else NewTokens(valid, valid[:, :0])
    for layer, seen in zip(layers, traced, strict=True):
        layer.update(seen.keys[:, :, :count], seen.values[:, :, :count])
        positions = layer.place_tokens(new_tokens)
        layer.finish_forward(QueryBatch(seen.queries[:, :, :count], positions, new_tokens is not None, seen.scaling))


def _traced(layer: PolicyLayer) -> TracedLayer:
    queries, _ = layer.window.last(range(len(layer.num_tokens)))
    if queries is None:
        raise EvaluationError("the model's attention was not given any query")
    return TracedLayer(queries, *layer.storage.all_states(), layer.scaling)


def _copy_layer(source: Any, target: Any) -> None:
    """Make a new layer of the model's library hold what another of its kind holds."""
    for name, value in vars(source).items():
        setattr(target, name, value.clone() if isinstance(value, Tensor) else copy.copy(value))


def _rounded(layer: Any, dtype: torch.dtype) -> Any:
    """A layer of the model's library with what it holds rounded to another dtype."""
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(other, name, value.to(dtype))
        elif name == "dtype":
            other.dtype = dtype
    return other
