"""Which segments are looked at: some rows as one padded block, or a single segment where heads differ."""

from collections.abc import Sequence

import attrs

from kvpolicy.cache.storage.layout import PerSegment
from kvpolicy.stages import Format


@attrs.frozen
class RowSegments:
    """All heads of some rows, as a block [rows, K, T, ...]; empty slots come behind the entries of a segment."""

    rows: Sequence[int]

    def counts(self, numbers: PerSegment) -> PerSegment:
        """The numbers of these segments."""
        return tuple(numbers[row] for row in self.rows)

    def format_of(self, form: Format) -> Format:
        """The format of these segments, where `form` is that of all heads."""
        return form


@attrs.frozen
class SingleSegment:
    """One head of one row, as a block [1, 1, T, ...]."""

    row: int
    head: int

    def counts(self, numbers: PerSegment) -> PerSegment:
        """The number of this segment."""
        return ((numbers[self.row][self.head],),)

    def format_of(self, form: Format) -> Format:
        """The format of this segment, where `form` is that of all heads."""
        return form.of_head(self.head)


SegmentIndex = RowSegments | SingleSegment
