"""The part of transformers' cache layer interface about logical lengths and rows."""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.errors import CacheError


class LogicalLayer(CacheLayerMixin):
    """A layer that reports `seq_len` tokens, its logical length, independent of the entries it still has."""

    is_sliding = False
    seq_len: int  # pads included
    num_tokens: list[int]  # tokens of each row, pads excluded

    @abc.abstractmethod
    def reset(self) -> None:
        """Empty the layer."""

    @abc.abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in that order; rows may be repeated.

        Raises CacheError, before any change, if there is no such row.
        """

    def get_seq_length(self) -> int:
        """Tokens seen, pads included."""
        return self.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical length and offset of the model's own mask, which is valid until the first eviction.

        After it the mask only tells which new tokens are pads.
        """
        return self.seq_len + query_length, 0

    def get_max_length(self) -> int:
        """-1: the number of tokens is not bounded."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times (a, a, b, b)."""
        self.select_rows(repeated(len(self.num_tokens), repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        if self.num_tokens:
            self.select_rows(selected(len(self.num_tokens), indices))


def repeated(rows: int, repeats: int) -> list[int]:
    """Row indices with each row repeated `repeats` times (a, a, b, b)."""
    return [row for row in range(rows) for _ in range(repeats)]


def selected(rows: int, indices: Tensor) -> list[int]:
    """Row numbers of an index: int [n] or bool [rows]. Raises CacheError if there is no such row."""
    try:
        selection: list[int] = torch.arange(rows)[indices.cpu()].tolist()
    except IndexError as error:
        raise CacheError(f"the cache holds {rows} rows, other rows were selected: {error}") from error
    return selection


def require_rows(count: int, rows: Sequence[int]) -> None:
    """Raise CacheError if `rows` is empty or has a row that is not in the cache of `count` rows."""
    if not rows or min(rows) < 0 or max(rows) >= count:
        raise CacheError(f"the cache holds {count} rows, other rows were selected: {list(rows)}")
