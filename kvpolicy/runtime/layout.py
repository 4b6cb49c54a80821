"""Where the slots of one layer lie: a segment per (row, KV head) in a flat storage."""

from collections.abc import Callable
from functools import cached_property

import attrs
import torch
from torch import Tensor

Table = tuple[tuple[int, ...], ...]  # one number per (row, KV head): [B][K]


def table(rows: int, heads: int, value: Callable[[int, int], int]) -> Table:
    """A table filled by `value(row, head)`."""
    return tuple(tuple(value(row, head) for head in range(heads)) for row in range(rows))


@attrs.frozen
class Layout:
    """Capacities of all segments, in slots; they follow each other without gaps, row by row, head by head."""

    capacity: Table

    @classmethod
    def even(cls, rows: int, heads: int, capacity: int) -> "Layout":
        """Every segment with the same capacity: the storage can then be seen as [B, K, capacity]."""
        return cls(table(rows, heads, lambda _row, _head: capacity))

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
    def offsets(self) -> Table:
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

    def on(self, numbers: Table, device: torch.device) -> Tensor:
        """One number per segment as int64 [B, K] on a device."""
        return torch.tensor(numbers, dtype=torch.long, device=device).reshape(self.rows, self.heads)

    def with_each(self, number: int) -> Table:
        """A table with the same number for every segment."""
        return table(self.rows, self.heads, lambda _row, _head: number)
