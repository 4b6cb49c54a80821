"""Load the testbed model and its tokenizer from the package: no network, no cache folder."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS: Final = "weights"


def load_testbed(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the trained testbed model (on the CPU, in evaluation mode) and its tokenizer.

    The stored weights are bfloat16; ``dtype`` is what they are computed in.
    """
    with as_file(files("kvpolicy.evaluate.testbed") / WEIGHTS) as folder:
        return read_folder(folder, dtype)


def read_folder(folder: Path, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return model and tokenizer from ``folder``, as `publish` wrote it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer
