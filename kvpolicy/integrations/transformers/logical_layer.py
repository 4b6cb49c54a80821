"""What transformers asks of a cache layer that is no tensor: lengths, in tokens seen, and rows."""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.errors import CacheError


class LogicalLayer(CacheLayerMixin):
    """Answers for a layer that has seen `seq_len` tokens of each row, whatever it still holds of them."""

    is_sliding = False
    seq_len: int  # pads included
    num_tokens: list[int]  # tokens of each row, pads excluded

    @abc.abstractmethod
    def reset(self) -> None:
        """Empty the layer."""

    @abc.abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order; a row may be named more than once.

        Raises CacheError, before any change, when there is no such row.
        """

    def get_seq_length(self) -> int:
        """Tokens seen, pads included."""
        return self.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the model's own mask: logical, so right until the first eviction.

        Afterwards the mask only tells which new tokens are pads.
        """
        return self.seq_len + query_length, 0

    def get_max_length(self) -> int:
        """No bound on the tokens that may be seen."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, beside each other."""
        self.select_rows(repeated(len(self.num_tokens), repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named."""
        if self.num_tokens:
            self.select_rows(selected(len(self.num_tokens), indices))


def repeated(rows: int, repeats: int) -> list[int]:
    """Each of the rows `repeats` times, beside each other."""
    return [row for row in range(rows) for _ in range(repeats)]


def selected(rows: int, indices: Tensor) -> list[int]:
    """The rows that an index [n] of numbers, or [rows] of bool, names. Raises CacheError when there is no such row."""
    try:
        found: list[int] = torch.arange(rows)[indices.cpu()].tolist()
    except IndexError as error:
        raise CacheError(f"the cache holds {rows} rows, others were named: {error}") from error
    return found


def require_rows(held: int, rows: Sequence[int]) -> None:
    """Raise CacheError unless `rows` are among those held, and there is one."""
    if not rows or min(rows) < 0 or max(rows) >= held:
        raise CacheError(f"the cache holds {held} rows, others were named: {list(rows)}")
