"""The queries of one attention call."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class QueryBatch:
    """The queries of one attention call."""

    queries: Tensor  # [B, H, q, D] post-RoPE
    positions: Tensor  # [B, q] int, place among the row's real tokens; -1 = pad
    padded: bool  # whether there is a pad among them
    scaling: float

    def first(self, count: int) -> "QueryBatch":
        """The oldest `count` queries."""
        return attrs.evolve(self, queries=self.queries[:, :, :count], positions=self.positions[:, :count])

    def newest(self, count: int) -> "QueryBatch":
        """The newest `count` queries, or all if there are fewer."""
        return attrs.evolve(self, queries=self.queries[:, :, -count:], positions=self.positions[:, -count:])

    def newest_real(self, count: int) -> "QueryBatch":
        """The newest `count` queries of each row that are no pads; where it has fewer, pads come before them."""
        if not self.padded:
            return self.newest(count)
        order = (self.positions >= 0).to(torch.uint8).sort(dim=1, stable=True).indices[:, -count:]
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        queries = self.queries[rows, :, order].transpose(1, 2)
        return attrs.evolve(self, queries=queries, positions=self.positions[rows, order])

    def select_rows(self, rows: Sequence[int]) -> "QueryBatch":
        """The rows named, in that order."""
        return attrs.evolve(self, queries=self.queries[list(rows)], positions=self.positions[list(rows)])

    def of_segment(self, row: int, head: int, group: int) -> "QueryBatch":
        """The queries of one row that attend to one KV head."""
        own = self.queries[row : row + 1, head * group : (head + 1) * group]
        return attrs.evolve(self, queries=own, positions=self.positions[row : row + 1])
