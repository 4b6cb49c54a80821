"""What an attached model must compute, from the plain model and a record of what was held at each step."""

import contextlib

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.policies import held

_NAME = "masked_reference"


def step_by_step(model, cache, tokens, sizes):
    """Feed tokens [B, T] in chunks; returns logits [B, T, V] and per layer who sees what, bool [B, K, T, T]."""
    logits, start = [], 0
    layers = [layer.stats.layer for layer in cache.managed]
    batch, length = tokens.shape
    heads = cache.plan.geometry.kv_heads
    seen = {layer: torch.zeros(batch, heads, length, length, dtype=torch.bool) for layer in layers}
    for size in sizes:
        end = start + size
        before = held(cache) if start else [[[[]] * heads] * batch] * len(layers)
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        for layer, rows in zip(layers, before, strict=True):
            for row, segments in enumerate(rows):
                for head, positions in enumerate(segments):
                    seen[layer][row, head, start:end, positions] = True
                    seen[layer][row, head, start:end, start:end] = causal
        with torch.no_grad():
            logits.append(model(tokens[:, start:end], past_key_values=cache).logits)
        cache.check_integrity()
        start = end
    return torch.cat(logits, 1), seen


def masked_forward(model, tokens, seen):
    """Logits of one plain forward without a cache, in which each managed layer and head sees what `seen` says."""

    def attention(module, query, key, value, attention_mask, scaling=None, **call):
        if module.layer_idx not in seen:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **call)
        group = query.shape[1] // key.shape[1]
        logits = scaling * query @ key.repeat_interleave(group, 1).transpose(-1, -2)
        hidden = ~seen[module.layer_idx].repeat_interleave(group, 1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    with attending_by(model, attention), torch.no_grad():
        return model(tokens, use_cache=False).logits


@contextlib.contextmanager
def attending_by(model, attention):
    """While this lasts the model attends by this function, with the stock masks."""
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_NAME], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_NAME]
