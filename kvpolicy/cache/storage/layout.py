"""Layout of the slots of one layer: a segment per (row, KV head) in a flat storage."""

from collections.abc import Callable
from functools import cached_property, partial

import attrs
import torch
from torch import Tensor

PerSegment = tuple[tuple[int, ...], ...]  # one number per (row, KV head): [B][K]


def per_segment(rows: int, heads: int, value: Callable[[int, int], int]) -> PerSegment:
    """`value(row, head)` for every segment."""
    return tuple(tuple(value(row, head) for head in range(heads)) for row in range(rows))


@attrs.frozen(cache_hash=True)
class Layout:
    """Capacities of all segments, in slots. Segments are contiguous, ordered by row, then by head."""

    capacity: PerSegment

    @classmethod
    def even(cls, rows: int, heads: int, capacity: int) -> "Layout":
        """A layout with equal capacities: the storage can be viewed as [B, K, capacity]."""
        return cls(((capacity,) * heads,) * rows)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.capacity)

    @property
    def heads(self) -> int:
        """K."""
        return len(self.capacity[0]) if self.capacity else 0

    @cached_property
    def slots(self) -> int:
        """Slots in all segments together."""
        return sum(map(sum, self.capacity))

    @cached_property
    def uniform(self) -> int | None:
        """The capacity of all segments; None if they differ."""
        sizes = {size for row in self.capacity for size in row}
        return sizes.pop() if len(sizes) == 1 else None

    @cached_property
    def offsets(self) -> PerSegment:
        """First slot of each segment."""
        starts: list[tuple[int, ...]] = []
        start = 0
        for row in self.capacity:
            row_starts = []
            for size in row:
                row_starts.append(start)
                start += size
            starts.append(tuple(row_starts))
        return tuple(starts)

    def offsets_on(self, device: torch.device) -> Tensor:
        """`offsets` as int64 [B, K] on a device."""
        return self.on(self.offsets, device)

    def on(self, numbers: PerSegment, device: torch.device) -> Tensor:
        """One number per segment as int64 [B, K] on a device."""
        return torch.tensor(numbers, dtype=torch.long, device=device).reshape(self.rows, self.heads)

    def with_each(self, number: int) -> PerSegment:
        """The same number for every segment."""
        return ((number,) * self.heads,) * self.rows

    def with_room(self, needed: PerSegment, limit: int) -> "Layout":
        """A layout with room for `needed` entries; this one, if it has room.

        Segments that grow get an eighth more than needed, but at most `limit` slots (on average over the heads of a row
        if they differ). Empty segments get exactly what is needed.
        """
        if self.uniform is None:
            return Layout(tuple(map(partial(_row_capacities, limit=limit), needed, self.capacity)))
        longest = max((max(row) for row in needed), default=0)
        if longest <= self.uniform:
            return self
        return Layout.even(
            self.rows, self.heads, max(longest, min(_grown(longest), limit)) if self.uniform else longest
        )


def _row_capacities(needed: tuple[int, ...], capacity: tuple[int, ...], *, limit: int) -> tuple[int, ...]:
    """Capacities of one row whose heads differ; a head with enough room keeps its capacity."""
    average = -(-sum(needed) // len(needed))
    spare = max(0, min(_grown(average), limit) - average)
    return tuple(count + spare if count > size else size for count, size in zip(needed, capacity, strict=True))


def _grown(needed: int) -> int:
    """Slots for `needed` and some later entries: a compromise between copies and unused memory."""
    return needed + max(needed // 8, 16)
