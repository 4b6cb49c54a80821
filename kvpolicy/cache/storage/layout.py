"""Where the slots of one layer lie: a segment per (row, KV head) in a flat storage."""

from collections.abc import Callable
from functools import cached_property, partial

import attrs
import torch
from torch import Tensor

PerSegment = tuple[tuple[int, ...], ...]  # one number per (row, KV head): [B][K]


def per_segment(rows: int, heads: int, value: Callable[[int, int], int]) -> PerSegment:
    """A table filled by `value(row, head)`."""
    return tuple(tuple(value(row, head) for head in range(heads)) for row in range(rows))


@attrs.frozen
class Layout:
    """Capacities of all segments, in slots; they follow each other without gaps, row by row, head by head."""

    capacity: PerSegment

    @classmethod
    def even(cls, rows: int, heads: int, capacity: int) -> "Layout":
        """Every segment with the same capacity: the storage can then be seen as [B, K, capacity]."""
        return cls(per_segment(rows, heads, lambda _row, _head: capacity))

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
        """The capacity that all segments share, None when they differ."""
        sizes = {size for row in self.capacity for size in row}
        return sizes.pop() if len(sizes) == 1 else None

    @cached_property
    def offsets(self) -> PerSegment:
        """First slot of each segment."""
        starts: list[tuple[int, ...]] = []
        start = 0
        for row in self.capacity:
            line = []
            for size in row:
                line.append(start)
                start += size
            starts.append(tuple(line))
        return tuple(starts)

    def offsets_on(self, device: torch.device) -> Tensor:
        """`offsets` as int64 [B, K] on a device."""
        return self.on(self.offsets, device)

    def on(self, numbers: PerSegment, device: torch.device) -> Tensor:
        """One number per segment as int64 [B, K] on a device."""
        return torch.tensor(numbers, dtype=torch.long, device=device).reshape(self.rows, self.heads)

    def with_each(self, number: int) -> PerSegment:
        """A table with the same number for every segment."""
        return per_segment(self.rows, self.heads, lambda _row, _head: number)

    def with_room(self, needed: PerSegment, limit: int) -> "Layout":
        """A layout in which `needed` entries have room; this one, if they have.

        What grows gets a quarter more than it needs, but not beyond `limit` slots (on average over the heads of a row,
        where they differ); the first entries get what they need.
        """
        if self.uniform is None:
            return Layout(tuple(map(partial(_room, limit=limit), needed, self.capacity)))
        most = max((max(row) for row in needed), default=0)
        if most <= self.uniform:
            return self
        return Layout.even(self.rows, self.heads, max(most, min(_grown(most), limit)) if self.uniform else most)


def _room(needed: tuple[int, ...], capacity: tuple[int, ...], *, limit: int) -> tuple[int, ...]:
    """Capacities of one row, in which heads differ; a head that has room keeps what it has."""
    average = -(-sum(needed) // len(needed))
    spare = max(0, min(_grown(average), limit) - average)
    return tuple(count + spare if count > size else size for count, size in zip(needed, capacity, strict=True))


def _grown(needed: int) -> int:
    """Slots for `needed` entries and some to come: few appends copy, and little is held that is not used."""
    return needed + max(needed // 4, 16)
