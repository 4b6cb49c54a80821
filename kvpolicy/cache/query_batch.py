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
    hidden_norms: Tensor | None = None  # [B, q] float32, of what attention was given for the tokens; None = unknown

    def first(self, count: int) -> "QueryBatch":
        """The oldest `count` queries."""
        return self._columns(slice(None, count))

    def newest(self, count: int) -> "QueryBatch":
        """The newest `count` queries, or all if there are fewer."""
        return self._columns(slice(-count, None))

    def newest_real(self, count: int) -> "QueryBatch":
        """The newest `count` queries of each row that are no pads; where it has fewer, pads come before them."""
        if not self.padded:
            return self.newest(count)
        order = (self.positions >= 0).to(torch.uint8).sort(dim=1, stable=True).indices[:, -count:]
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        queries, norms = self.queries[rows, :, order].transpose(1, 2), self.hidden_norms
        norms = None if norms is None else norms[rows, order]
        return attrs.evolve(self, queries=queries, positions=self.positions[rows, order], hidden_norms=norms)

    def select_rows(self, rows: Sequence[int]) -> "QueryBatch":
        """The rows named, in that order."""
        return self._rows(list(rows), self.queries[list(rows)])

    def of_segment(self, row: int, head: int, group: int) -> "QueryBatch":
        """The queries of one row that attend to one KV head."""
        return self._rows(slice(row, row + 1), self.queries[row : row + 1, head * group : (head + 1) * group])

    def _columns(self, at: slice) -> "QueryBatch":
        norms = None if self.hidden_norms is None else self.hidden_norms[:, at]
        return attrs.evolve(self, queries=self.queries[:, :, at], positions=self.positions[:, at], hidden_norms=norms)

    def _rows(self, at: slice | list[int], queries: Tensor) -> "QueryBatch":
        norms = None if self.hidden_norms is None else self.hidden_norms[at]
        return attrs.evolve(self, queries=queries, positions=self.positions[at], hidden_norms=norms)
