"""A small untrained model with the testbed's words: it answers nothing right, but everything runs."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy.evaluate.testbed.vocabulary import BOS, EOS, IDS, PAD, VOCABULARY
from tests.testbed_training.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tiny():
    """Model and tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=IDS[PAD], bos_token_id=IDS[BOS], eos_token_id=IDS[EOS]
    )
    return model, build_tokenizer()


@pytest.fixture(scope="session")
def policies():
    """Two shipped policies: one with an observation window, one without."""
    return kvpolicy.load("snapkv"), kvpolicy.load("streaming_llm")
