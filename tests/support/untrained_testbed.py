"""A small model with the words of the embedded one: it answers nothing right, but everything runs."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY


def untrained_testbed(**options):
    """Always the same; `options` are of its configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **options,
    )
    return LlamaForCausalLM(config).eval()
