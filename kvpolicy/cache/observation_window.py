"""The last queries of a layer, kept for the scorers that let them vote."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from kvpolicy.cache.state_contents import Contents, Described
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import Plan
from kvpolicy.stages import Geometry

_ROOM = 64  # queries for which a buffer has room from the start


class ObservationWindow:
    """The newest W queries of each row, oldest first; where a row has had fewer, the first ones have position -1.

    The buffer holds W once there have been as many queries, less before: a new query overwrites the oldest one in
    place, and they are put in order when they are read.

    For decode steps of fixed shapes (`fixed`) the buffer holds W from the start and is never replaced, and the place
    of the oldest query exists twice. The host's is right whenever no step runs: whoever runs a step calls `note_step`
    behind it. The device's, `oldest_in_step`, is the only one that a step reads and advances. `fill` writes both. Steps
    alone change such a window; whoever wants another change takes a copy (`selected`).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._queries = torch.empty(0, dtype=torch.float32)
        self._positions = torch.empty(0, dtype=torch.int32)
        self._filled = 0
        self._oldest = 0  # where the oldest query is; 0 until the buffer is full
        self._nbytes = 0
        self.oldest_in_step: Tensor | None = None  # int64 [1], where the buffer is never replaced

    @classmethod
    def fixed(cls, plan: Plan, rows: int, device: torch.device) -> Self:
        """One for decode steps of fixed shapes of B rows, which have had no queries."""
        window, geometry = cls(plan.needs.queries), plan.geometry
        if window.size:
            shape = (rows, geometry.query_heads, window.size, geometry.head_dim)
            window._queries = torch.zeros(shape, dtype=plan.dtype, device=device)
            window._positions = torch.full((rows, window.size), -1, dtype=torch.int32, device=device)
            window.oldest_in_step = torch.zeros(1, dtype=torch.int64, device=device)
            window._filled = window.size
            window._measure()
        return window

    # -- for steps of fixed shapes -----------------------------------------------------------------------------

    @property
    def in_step(self) -> list[Tensor]:
        """What a step reads and writes: queries [B, H, W, D], positions [B, W] and the place of the oldest, [1]."""
        return [] if self.oldest_in_step is None else [self._queries, self._positions, self.oldest_in_step]

    def fill(self, source: "ObservationWindow", rows: int) -> None:
        """Hold the queries of another window of as many rows, and nothing else; on the host and on the device."""
        if self.oldest_in_step is None:
            return
        queries, positions = source.last(range(rows))
        self._queries.zero_()
        self._positions.fill_(-1)
        if queries is not None and positions is not None:
            count = positions.shape[1]
            self._queries[:, :, -count:], self._positions[:, -count:] = queries, positions
        self._oldest = 0
        self.oldest_in_step.zero_()

    def add_in_step(self, queries: Tensor, positions: Tensor) -> None:
        """Take one query a row, [B, H, 1, D], and its position [B]; on the device alone."""
        if self.oldest_in_step is not None:
            self._queries.index_copy_(2, self.oldest_in_step, queries)
            self._positions.index_copy_(1, self.oldest_in_step, positions[:, None])
            self.oldest_in_step.add_(1).remainder_(self.size)

    def note_step(self) -> None:
        """Note on the host that a step has added a query of each row."""
        if self.size:
            self._oldest = (self._oldest + 1) % self.size

    # -- for all other forwards --------------------------------------------------------------------------------

    def add(self, queries: Tensor, positions: Tensor, *, padded: bool) -> bool:
        """Take queries [B, H, q, D] and positions [B, q]; `padded` when there are pads (-1) among them.

        Says whether the buffer has grown.
        """
        before = self._nbytes
        if self.size:
            self._add(queries, positions, padded=padded)
        return self._nbytes != before

    def _add(self, queries: Tensor, positions: Tensor, *, padded: bool) -> None:
        if padded and self._filled:
            held, places = self._ordered()
            queries, positions = torch.cat([held, queries], 2), torch.cat([places, positions], 1)
        if padded:
            queries, positions = _pads_first(queries, positions)
        if padded or not self._filled or queries.shape[2] >= self.size:
            self._put(queries, positions)
            return
        count = queries.shape[2]
        if self._filled < self.size:
            self._reserve(min(self.size, self._filled + count))
        start = (self._oldest + self._filled) % self.size
        first = min(count, self.size - start)  # what fits behind the others; the rest goes to the front
        self._queries.narrow(2, start, first).copy_(queries if first == count else queries[:, :, :first])
        self._positions.narrow(1, start, first).copy_(positions if first == count else positions[:, :first])
        if first < count:
            self._queries[:, :, : count - first] = queries[:, :, first:]
            self._positions[:, : count - first] = positions[:, first:]
        self._oldest = (self._oldest + max(0, self._filled + count - self.size)) % self.size
        self._filled = min(self.size, self._filled + count)

    def forget(self, limit: Tensor) -> None:
        """Drop, in each row, the queries at positions >= `limit` [B]."""
        if self._filled:
            queries, positions = self._ordered()
            self._put(*_pads_first(queries, positions.masked_fill(positions >= limit[:, None], -1)))

    def drop(self, rows: Sequence[int]) -> None:
        """Drop all queries of some rows; the buffer, too, once no row has any."""
        if self._filled:
            self._positions[list(rows)] = -1
            if not bool((self._positions[:, : self._filled] >= 0).any()):
                self._queries, self._positions = self._queries.new_empty(0), self._positions.new_empty(0)
                self._filled = self._oldest = 0
                self._measure()

    def last(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The newest queries [rows, H, W, D] and positions [rows, W]; fewer at the start, None when there are none."""
        if not self._filled:
            return None, None
        queries, positions = self._ordered()
        if len(rows) == queries.shape[0]:
            return queries, positions
        return queries[list(rows)], positions[list(rows)]

    def selected(self, rows: Sequence[int]) -> Self:
        """The queries of the rows named, in that order, in a buffer of their own."""
        other = copy.copy(self)
        other.oldest_in_step = None
        if self._filled:
            other._queries, other._positions = self._queries[list(rows)], self._positions[list(rows)]  # noqa: SLF001
            other._measure()  # noqa: SLF001 - of its own class
        return other

    def describe(self) -> Described:
        """Its state: queries [B, H, n, D] and positions [B, n] as they stand, where the oldest is, and the room."""
        yield "oldest", self._oldest
        yield "room", self._room
        if self._filled:
            yield "queries", self._queries[:, :, : self._filled]
            yield "positions", self._positions[:, : self._filled]

    def restore(self, contents: Contents, rows: int, geometry: Geometry) -> None:
        """Take the state of `rows` rows that is written there; this window is empty."""
        heads, dim = geometry.query_heads, geometry.head_dim
        oldest, room = contents.integer("oldest", max(0, self.size - 1)), contents.integer("room", self.size)
        if not contents.has("queries"):
            if oldest or room:
                raise contents.wrong("room", "must be 0, where nothing is held")
            return
        queries = contents.tensor("queries", None, (rows, heads, None, dim))
        count = queries.shape[2]
        positions = contents.tensor("positions", torch.int32, (rows, count))
        if not 0 < count <= room or (oldest and count < self.size):
            raise contents.wrong("queries", f"must be 1 to {room}, and {self.size} once the oldest is not the first")
        self._queries = queries.new_empty((rows, heads, room, dim))
        self._positions = positions.new_empty((rows, room))
        self._queries[:, :, :count], self._positions[:, :count] = queries, positions
        self._filled, self._oldest = count, oldest
        self._measure()

    def check_integrity(self, real: Sequence[int]) -> None:
        """Raise CacheError when there are queries of tokens that did not come, `real` in each row."""
        _, positions = self.last(range(len(real)))
        if positions is None:
            return
        limit = torch.tensor(real, device=positions.device)[:, None]
        if positions.shape[0] != len(real) or bool(((positions < -1) | (positions >= limit)).any()):
            raise CacheError("queries are observed at positions of tokens that did not come")

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._nbytes

    @property
    def _room(self) -> int:
        return self._queries.shape[2] if self._queries.ndim == 4 else 0

    def _ordered(self) -> tuple[Tensor, Tensor]:
        """Queries and positions, oldest first; a view while the buffer has not gone round."""
        if not self._oldest:
            return self._queries[:, :, : self._filled], self._positions[:, : self._filled]
        queries = torch.cat([self._queries[:, :, self._oldest :], self._queries[:, :, : self._oldest]], 2)
        return queries, torch.cat([self._positions[:, self._oldest :], self._positions[:, : self._oldest]], 1)

    def _put(self, queries: Tensor, positions: Tensor) -> None:
        """Hold the newest of these, oldest first, and nothing else."""
        queries, positions = queries[:, :, -self.size :], positions[:, -self.size :]
        count = queries.shape[2]
        if not self._filled or self._queries.shape[2] < count:
            self._allocate(queries, positions, count)
        self._queries[:, :, :count] = queries
        self._positions[:, :count] = positions
        self._filled, self._oldest = count, 0

    def _reserve(self, count: int) -> None:
        """Have room for as many; while there is less than W, the oldest query comes first."""
        if self._queries.shape[2] < count:
            queries, positions = self._ordered()
            self._allocate(queries, positions, count)
            self._queries[:, :, : self._filled] = queries
            self._positions[:, : self._filled] = positions

    def _allocate(self, queries: Tensor, positions: Tensor, count: int) -> None:
        """A buffer for `count` queries or more of the shape of these; it grows with the tokens, whatever W is."""
        room = min(self.size, max(2 * count, _ROOM))
        self._queries = queries.new_empty((*queries.shape[:2], room, queries.shape[3]))
        self._positions = positions.new_empty((positions.shape[0], room))
        self._measure()

    def _measure(self) -> None:
        self._nbytes = sum(tensor.untyped_storage().nbytes() for tensor in (self._queries, self._positions))


def last_in_step(window: Sequence[Tensor]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What `last` gives of all rows, from what a step sees (`ObservationWindow.in_step`)."""
    if not window:
        return None, None
    queries, positions, oldest = window
    size = positions.shape[1]
    order = (oldest + torch.arange(size, device=oldest.device)) % size
    return queries.index_select(2, order), positions.index_select(1, order)


def _pads_first(queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    order = (positions >= 0).to(torch.uint8).sort(dim=1, stable=True).indices
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return queries[rows, :, order].transpose(1, 2), positions[rows, order]
