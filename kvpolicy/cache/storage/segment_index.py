"""Which segments are looked at: some rows as one padded block, or a single segment where heads differ."""

import abc
from collections.abc import Sequence

import attrs
from torch import Tensor

from kvpolicy.cache.storage.layout import PerSegment
from kvpolicy.cache.storage.slot_store import SlotStore


class SegmentIndex(abc.ABC):
    """A block [b, k, ...] of segments, the same in every store of a layer."""

    @abc.abstractmethod
    def of(self, store: SlotStore, name: str) -> Tensor:
        """A column as [b, k, T, ...], without a copy where the layout allows; k = 1 for a joint column."""

    @abc.abstractmethod
    def table(self, numbers: PerSegment) -> PerSegment:
        """The numbers of the segments in the block."""


@attrs.frozen
class RowSegments(SegmentIndex):
    """All heads of some rows; empty slots come behind the entries of a segment."""

    rows: Sequence[int]

    def of(self, store: SlotStore, name: str) -> Tensor:
        return store.padded(name, self.rows)

    def table(self, numbers: PerSegment) -> PerSegment:
        return tuple(numbers[row] for row in self.rows)


@attrs.frozen
class SingleSegment(SegmentIndex):
    """One head of one row."""

    row: int
    head: int

    def of(self, store: SlotStore, name: str) -> Tensor:
        return store.segment(name, self.row, self.head)[None, None]

    def table(self, numbers: PerSegment) -> PerSegment:
        return ((numbers[self.row][self.head],),)
