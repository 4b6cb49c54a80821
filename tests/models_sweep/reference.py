"""What a cache held before each forward, and the plain model that attends to just that.

The plain model runs with a cache of its own that holds everything. An attention function written out here hides, per
layer, row and head, what the policy no longer held, and puts the vectors that the policy says it holds in the place
of the model's own. Nothing of the product computes anything here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.integrations.transformers.cache import PolicyCache
from tests.support import storage

NAME = "sweep_reference"
_WITHOUT_EFFECT = {"position_ids", "use_cache", "cache_position", "is_causal", "sliding_window", "layer_idx"}


@attrs.frozen
class Batch:
    """Tokens [B, T] and their mask, padded on the left."""

    tokens: Tensor
    mask: Tensor

    @property
    def pads(self) -> Tensor:
        """Pads in front of each row, [B]."""
        return (self.mask == 0).sum(1)


@attrs.frozen
class Held:
    """What one layer held before a forward: who is there, and what its keys and values are."""

    positions: Tensor  # [B, K, T], among the row's own tokens; -1 where there is nothing
    keys: Tensor  # [B, K, T, D]
    values: Tensor


Record = list[dict[int, Held]]  # by forward and layer


def through(model: PreTrainedModel, cache: PolicyCache, batch: Batch, sizes: Sequence[int]) -> tuple[Tensor, Record]:
    """Logits [B, T, V] of a forward per chunk, and what was held before each."""
    record: Record = []
    logits = _in_chunks(model, cache, batch, sizes, lambda _start: record.append(_held_by(cache)))
    return logits, record


def plain_logits(model: PreTrainedModel, batch: Batch, sizes: Sequence[int]) -> Tensor:
    """Logits [B, T, V] of the model as it is, with the library's cache."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return _in_chunks(model, cache, batch, sizes, lambda _start: None)


def as_held(model: PreTrainedModel, batch: Batch, sizes: Sequence[int], record: Record | None) -> Tensor:
    """Logits [B, T, V] of a plain model that sees what the record says, or everything; it stays with our attention."""
    cache = _Everything(config=model.config.get_text_config(decoder=True))
    attention = _Attention(cache, batch.pads)
    steps = iter(record or [{}] * len(sizes))

    def before(start: int) -> None:
        attention.start, attention.held = start, next(steps)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
        return _in_chunks(model, cache, batch, sizes, before)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[NAME]


def forget_positions(model: PreTrainedModel) -> None:
    """Some models for images keep an offset of positions from their last prompt, and use it if they are not told."""
    for part in model.modules():
        if "rope_deltas" in vars(part):
            part.rope_deltas = None


class _Everything(DynamicCache):
    """The library's cache, which tells the attention that follows an update whose keys these are.

    The number of the module does not: some models go through their modules several times.
    """

    updated: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.updated = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _held_by(cache: PolicyCache) -> dict[int, Held]:
    found = {}
    for layer in cache.managed:
        if layer.is_initialized:
            columns = (storage.padded(layer.storage, name).clone() for name in ("positions", "keys", "values"))
            found[layer.stats.layer] = Held(*columns)
    return found


def _in_chunks(
    model: PreTrainedModel, cache: Cache, batch: Batch, sizes: Sequence[int], before: Callable[[int], None]
) -> Tensor:
    forget_positions(model)
    logits, start = [], 0
    for size in sizes:
        before(start)
        end = start + size
        given = {"attention_mask": batch.mask[:, :end], "past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            logits.append(model(batch.tokens[:, start:end], **given).logits)
        start = end
    return torch.cat(logits, 1)


@attrs.define
class _Attention:
    """Attention written out, with what is held in place of what there is."""

    cache: _Everything
    pads: Tensor
    start: int = 0  # tokens of earlier forwards
    held: dict[int, Held] = attrs.field(factory=dict)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **call):
        _require_known(call)
        group = query.shape[1] // key.shape[1]
        hidden, added = _hidden(module, query, key, attention_mask)
        held, self.cache.updated = self.held.get(self.cache.updated), None
        if held is not None:
            key, value, seen = self._with(held, key, value)
            hidden = hidden | ~seen.repeat_interleave(group, 1)[:, :, None]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = scaling * query @ key.repeat_interleave(group, 1).transpose(-1, -2) + added
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), weights

    def _with(self, held: Held, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = torch.zeros(*key.shape[:3], dtype=torch.bool)
        seen[:, :, self.start :] = True
        rows, heads, slots = (held.positions >= 0).nonzero(as_tuple=True)
        places = held.positions[rows, heads, slots].long() + self.pads[rows]
        seen[rows, heads, places] = True
        key, value = key.clone(), value.clone()
        key[rows, heads, places] = held.keys[rows, heads, slots]
        value[rows, heads, places] = held.values[rows, heads, slots]
        return key, value, seen


def _require_known(call) -> None:
    for name, given in call.items():
        nothing = not isinstance(given, Tensor) and given in (None, False)
        if not nothing and name not in _WITHOUT_EFFECT and not name.startswith("output_"):
            raise NotImplementedError(f"the reference knows nothing of {name}")


def _hidden(module, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """What a query does not see, bool [B, 1 or H, q, T], and what is added to its logits."""
    count, length = query.shape[2], key.shape[2]
    if mask is None:
        later = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
        causal = count > 1 and getattr(module, "is_causal", True)
        return (later if causal else torch.zeros_like(later)).expand(query.shape[0], 1, -1, -1), 0.0
    mask = mask[..., :length]
    if mask.dtype == torch.bool:
        return ~mask, 0.0
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return hidden, mask.masked_fill(hidden, 0)
