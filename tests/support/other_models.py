"""Tiny random models of other makes: fused projections, biases, arguments by place."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig

from tests.support.models import ARCHITECTURES, VOCABULARY, build

_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
OTHERS = {
    "gpt2": GPT2Config(**_SIZES, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": GPTNeoXConfig(**_SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "opt": OPTConfig(**_SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32),
}


def made(name):
    if name in ARCHITECTURES:
        return build(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(OTHERS[name]).eval()
