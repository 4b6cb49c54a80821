"""The last queries of a layer, kept for the scorers that let them vote."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Window:
    """The newest W queries of each row, oldest first; where a row has had fewer, the first ones have position -1.

    The buffer holds 2·W. It is written in place and moves its newer half to the front when it is full, so the order is
    kept and the cost per token is constant.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._queries = torch.empty(0)
        self._positions = torch.empty(0)
        self._filled = 0

    def add(self, queries: Tensor, positions: Tensor, *, padded: bool) -> None:
        """Take queries [B, H, q, D] and positions [B, q]; `padded` when there are pads (-1) among them."""
        if not self.size:
            return
        end = self._filled + queries.shape[2]
        if self._filled and end <= self._queries.shape[2] and not padded:
            self._queries[:, :, self._filled : end] = queries
            self._positions[:, self._filled : end] = positions
            self._filled = end
            return
        if self._filled:
            queries = torch.cat([self._queries[:, :, : self._filled], queries], 2)
            positions = torch.cat([self._positions[:, : self._filled], positions], 1)
        self._put(*(_pads_first(queries, positions) if padded else (queries, positions)))

    def forget(self, limit: Tensor) -> None:
        """Drop, in each row, the queries at positions >= `limit` [B]."""
        if self._filled:
            queries, positions = self._queries[:, :, : self._filled], self._positions[:, : self._filled]
            self._put(*_pads_first(queries, positions.masked_fill(positions >= limit[:, None], -1)))

    def last(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The newest queries [rows, H, W, D] and positions [rows, W]; fewer at the start, None when there are none."""
        if not self._filled:
            return None, None
        newest = slice(max(0, self._filled - self.size), self._filled)
        queries, positions = self._queries[:, :, newest], self._positions[:, newest]
        if len(rows) == queries.shape[0]:
            return queries, positions
        return queries[list(rows)], positions[list(rows)]

    def copied(self) -> "Window":
        """A copy that shares nothing."""
        other = Window(self.size)
        other._queries, other._positions = self._queries.clone(), self._positions.clone()
        other._filled = self._filled
        return other

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order."""
        if self._filled:
            self._queries, self._positions = self._queries[list(rows)], self._positions[list(rows)]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (self._queries, self._positions))

    def _put(self, queries: Tensor, positions: Tensor) -> None:
        queries, positions = queries[:, :, -self.size :], positions[:, -self.size :]
        count = queries.shape[2]
        if not self._filled:
            self._queries = queries.new_empty((*queries.shape[:2], 2 * self.size, queries.shape[3]))
            self._positions = positions.new_empty((positions.shape[0], 2 * self.size))
        self._queries[:, :, :count] = queries
        self._positions[:, :count] = positions
        self._filled = count


def _pads_first(queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    order = (positions >= 0).to(torch.uint8).sort(dim=1, stable=True).indices
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return queries[rows, :, order].transpose(1, 2), positions[rows, order]
