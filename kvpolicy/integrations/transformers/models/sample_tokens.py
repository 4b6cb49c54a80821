"""Ordinary tokens to run a model on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

_SPECIAL_SUFFIXES = ("_id", "_ids", "_index")  # of names of special tokens that do not contain "token"


def sample_tokens(model: PreTrainedModel, rows: int, length: int, device: torch.device) -> Tensor:
    """Ordinary tokens of the model's vocabulary, int64 [rows, length]: without pad, end or image tokens.

    They are from the middle of the vocabulary: special tokens that the configuration does not name are at its ends.
    """
    size, special = _vocabulary(model), set(_special(model.config))
    middle = (size // 2 + step for step in range(min(size, rows * length + len(special))))
    ordinary = [token % size for token in middle if token % size not in special] or [0]
    chosen = [ordinary[number % len(ordinary)] for number in range(rows * length)]
    return torch.tensor(chosen, device=device).view(rows, length)


def _vocabulary(model: PreTrainedModel) -> int:
    sizes = [getattr(model.config.get_text_config(decoder=True), "vocab_size", None)]
    with contextlib.suppress(NotImplementedError, AttributeError):  # some models do not define them
        sizes.append(getattr(model.get_input_embeddings(), "num_embeddings", None))
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=1)


def _special(config: PretrainedConfig) -> Iterator[int]:
    """Ids of special tokens in a configuration, including nested ones."""
    unvisited: list[Any] = [config.to_dict()]
    while unvisited:
        for name, value in unvisited.pop().items():
            if isinstance(value, dict):
                unvisited.append(value)
            elif "token" in str(name) or str(name).endswith(_SPECIAL_SUFFIXES):
                numbers = value if isinstance(value, (list, tuple)) else [value]
                yield from (number for number in numbers if type(number) is int)
