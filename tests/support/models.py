"""Tiny random models, one per architecture whose demands on a cache differ, and prompts for them."""

import os
from functools import cache

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SEED = int(os.environ.get("KVPOLICY_TEST_SEED", "0"))  # the proofs hold for other weights and prompts, too
VOCABULARY = 97
PAD = 0

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # large enough for attention that is far from even
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,  # every generation has the length that was asked for
}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 16}

_KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral_sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**_LAYERS, "query_pre_attn_scalar": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": None}),
}
ARCHITECTURES = tuple(name for name in _KINDS if name != "mistral_sliding")  # those with layers to manage


def build(architecture="llama", seed=0, dtype=torch.float32, **shape):
    """A new model in evaluation mode; the same arguments give the same weights."""
    model_class, config_class, special = _KINDS[architecture]
    config = config_class(**{**_SHAPE, **special, **shape})
    with torch.random.fork_rng():
        torch.manual_seed(SEED + seed)
        return model_class(config).to(dtype).eval()


model = cache(build)  # the one of this process: leave it as it was


def prompt(*lengths, seed=0):
    """Random tokens and their mask, [B, longest]: a row per length, padded on the left."""
    generator = torch.Generator().manual_seed(SEED + seed)
    longest = max(lengths)
    tokens = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens.where(mask, PAD), mask.long()


def generate(model, tokens, mask=None, count=24, **options):
    """Greedy generation, with the logits of each step; without a mask all tokens are real, the pad's id included."""
    mask = torch.ones_like(tokens) if mask is None else mask
    given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    with torch.no_grad():
        return model.generate(tokens, attention_mask=mask, max_new_tokens=count, **given)


def difference(one, other):
    """The largest difference between the logits of two generations."""
    pairs = zip(one.logits, other.logits, strict=True)
    return max((left - right).abs().max().item() for left, right in pairs)
