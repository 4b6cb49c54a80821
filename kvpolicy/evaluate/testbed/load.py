"""The testbed model and its tokenizer, from the package: no network, no cache folder."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvpolicy.evaluate.testbed.vocabulary import BOS, EOS, IDS, MAXIMUM_LENGTH, PAD, VOCABULARY

WEIGHTS: Final = "weights"


def model_config() -> LlamaConfig:
    """Return the testbed model's geometry: 4 layers, 8 query heads, 2 KV heads of 32 dimensions."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAXIMUM_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
    )


def load_testbed(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the trained testbed model (on the CPU, in evaluation mode) and its tokenizer.

    The stored weights are bfloat16; ``dtype`` is what they are computed in.
    """
    with as_file(files("kvpolicy.evaluate.testbed") / WEIGHTS) as folder:
        return read_folder(folder, dtype)


def read_folder(folder: Path, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return model and tokenizer from a folder with weights, configuration and tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer
