"""A few tokens that are safe to run a model on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

_ENDS = ("_id", "_ids", "_index")  # of names of special tokens, beside those that say "token"


def sample_tokens(model: PreTrainedModel, rows: int, length: int, device: torch.device) -> Tensor:
    """Ordinary tokens of the model's vocabulary, int64 [rows, length]: no pad, end or image among them.

    They come from the middle: special tokens that a configuration does not name stand at either end.
    """
    size, special = _vocabulary(model), set(_special(model.config))
    middle = (size // 2 + step for step in range(min(size, rows * length + len(special))))
    ordinary = [token % size for token in middle if token % size not in special] or [0]
    chosen = [ordinary[number % len(ordinary)] for number in range(rows * length)]
    return torch.tensor(chosen, device=device).view(rows, length)


def _vocabulary(model: PreTrainedModel) -> int:
    sizes = [getattr(model.config.get_text_config(decoder=True), "vocab_size", None)]
    with contextlib.suppress(NotImplementedError, AttributeError):  # not every model says which ones they are
        sizes.append(getattr(model.get_input_embeddings(), "num_embeddings", None))
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=1)


def _special(config: PretrainedConfig) -> Iterator[int]:
    """Every number that a configuration, or one inside it, gives to a special token."""
    waiting: list[Any] = [config.to_dict()]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif "token" in str(name) or str(name).endswith(_ENDS):
                numbers = value if isinstance(value, (list, tuple)) else [value]
                yield from (number for number in numbers if type(number) is int)
