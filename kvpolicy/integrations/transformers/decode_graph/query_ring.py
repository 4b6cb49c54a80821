"""The observation window in a storage that never moves."""

import torch
from torch import Tensor


class QueryRing:
    """The newest W queries of each row; a new one overwrites the oldest."""

    def __init__(self, queries: Tensor, positions: Tensor, oldest: Tensor) -> None:
        self.queries = queries  # [B, H, W, D]
        self.positions = positions  # [B, W] int32, -1 where a row has had fewer
        self.oldest = oldest  # [1] int64, the place of the oldest

    @classmethod
    def empty(cls, size: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> "QueryRing":
        """Room for `size` queries of each row; `shape` is (rows, query heads, head dim)."""
        rows, heads, dim = shape
        return cls(
            torch.zeros((rows, heads, size, dim), dtype=dtype, device=device),
            torch.full((rows, size), -1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def push(self, queries: Tensor, positions: Tensor) -> None:
        """Take one query a row, [B, H, 1, D], and its position [B]."""
        self.queries.index_copy_(2, self.oldest, queries)
        self.positions.index_copy_(1, self.oldest, positions[:, None])
        self.oldest.add_(1).remainder_(self.positions.shape[1])

    def ordered(self) -> tuple[Tensor, Tensor]:
        """Queries [B, H, W, D] and positions [B, W], oldest first."""
        size = self.positions.shape[1]
        order = (self.oldest + torch.arange(size, device=self.oldest.device)) % size
        return self.queries.index_select(2, order), self.positions.index_select(1, order)

    def fill(self, queries: Tensor, positions: Tensor) -> None:
        """Take over up to W queries a row, [B, H, w, D] and their positions [B, w], oldest first."""
        first = self.positions.shape[1] - positions.shape[1]
        self.queries[:, :, first:] = queries
        self.positions.fill_(-1)[:, first:] = positions
        self.oldest.zero_()
