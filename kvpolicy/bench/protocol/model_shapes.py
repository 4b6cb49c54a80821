"""The shapes that are measured: attention alone, and small models with random weights around it."""

import attrs
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy.errors import InputError

_ROOM = 65_536  # positions beyond those that are asked for


@attrs.frozen
class ModelShape:
    """A Llama without trained weights."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int

    def config(self, positions: int = 0) -> LlamaConfig:
        """Its configuration; no token ends a sequence."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=positions + _ROOM,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


MODELS = {
    "tiny": ModelShape(2, 4, 2, 16, 64, 128, 128),
    "small": ModelShape(4, 8, 2, 64, 512, 1024, 2048),
    "135m": ModelShape(30, 9, 3, 64, 576, 1536, 49_152),
    "267m": ModelShape(16, 16, 8, 64, 1024, 4096, 8192),
    "8b": ModelShape(32, 32, 8, 128, 4096, 14336, 128_256),
}


def model_shape(name: str) -> ModelShape:
    """The shape of that name. Raises InputError."""
    if name not in MODELS:
        raise InputError(f"--model must be one of {', '.join(MODELS)}: {name!r}")
    return MODELS[name]


def attention_shape(layers: int, query_heads: int, kv_heads: int, head_dim: int) -> ModelShape:
    """Attention layers whose model is never built."""
    if min(layers, query_heads, kv_heads, head_dim) < 1 or query_heads % kv_heads:
        raise InputError(f"{query_heads} query heads cannot share {kv_heads} KV heads of {head_dim} evenly")
    return ModelShape(layers, query_heads, kv_heads, head_dim, query_heads * head_dim, head_dim, 16)


def random_model(shape: ModelShape, positions: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A new model in evaluation mode, made on its device; the same shape gives the same weights on a device."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    try:
        torch.set_default_dtype(dtype)
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(0)
            model: LlamaForCausalLM = LlamaForCausalLM(shape.config(positions)).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(requires_grad=False)
