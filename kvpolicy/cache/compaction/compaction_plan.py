"""Copies between padded blocks [rows, K, N, ...] and the segments of a flat storage, and within such a storage."""

from collections.abc import Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from kvpolicy.cache.storage.layout import Layout, PerSegment

_BLOCK = {"cpu": 2**20}  # bytes moved at once, so that what is set aside stays in the cache of the processor


@attrs.frozen(eq=False)
class CompactionPlan:
    """Which slots of some rows stay: they become the first of their segment.

    They close up in order; or, with `most_holes` and if storage stays, the last of them fill the holes among the first.
    How many holes a head has need not be known: so many are filled, some of them with what they hold.
    """

    rows: Sequence[int]
    kept: Tensor  # [rows, K, N] int64, ascending, -1 behind a head's last one
    most_holes: int | None = None  # no head has more of them; None = entries close up
    filling: Tensor | None = None  # what `filling_of` gives of `kept`, where it was computed for several layers
    known_lengths: PerSegment | None = None  # what `lengths` gives, where the host has been told
    finite: bool = False  # whether the vectors of all that stays are known to be finite
    _holes: dict[Layout, tuple[Tensor, Tensor]] = attrs.field(init=False, factory=dict, repr=False)
    _sources: dict[Layout, Tensor] = attrs.field(init=False, factory=dict, repr=False)  # what all columns share

    @cached_property
    def lengths(self) -> PerSegment:
        """How many slots stay, [rows][K]."""
        return self.known_lengths or tuple(map(tuple, self._counts.tolist()))

    @cached_property
    def _counts(self) -> Tensor:
        return (self.kept >= 0).sum(-1)

    def copy(self, source: Tensor, before: Layout, target: Tensor, after: Layout) -> None:
        """Copy a column of a storage laid out as `before` into that of one laid out as `after`, or within itself."""
        if self.most_holes is not None and target is source:
            holes, last = self._in_holes(before)
            target.index_copy_(0, holes, source.index_select(0, last))
            return
        slots, segments, lengths = self._slots(before), _segments(after, self.rows), _flat(self.lengths)
        block = _BLOCK.get(source.device.type, source.nbytes)
        count = max(1, block // max(1, slots.shape[1] * source.stride(0) * source.itemsize))
        for first in range(0, len(segments), count):
            some = slice(first, first + count)
            taken = source.index_select(0, slots[some].flatten()).unflatten(0, slots[some].shape)
            _write(target, after, segments[some], taken, lengths[some])

    def _slots(self, layout: Layout) -> Tensor:
        """The kept slots in a storage, [segments, N]; any slot behind a head's last one."""
        if layout not in self._sources:
            slots = self._starts(layout) + self.kept.clamp(min=0)
            self._sources[layout] = slots.clamp(max=layout.slots - 1).flatten(0, 1)  # a segment may have none
        return self._sources[layout]

    def _in_holes(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Slots of a storage that are to be filled, and those whose entries fill them: `most_holes` in each segment."""
        if layout not in self._holes:
            filling = filling_of(self.kept, self.most_holes or 0) if self.filling is None else self.filling
            slots = filling + self._starts(layout)
            if slots.numel() and not all(map(all, self.lengths)):  # a head without entries has no slot to fill itself
                kept = self.kept.amax(-1, keepdim=True)
                other = (kept + self._starts(layout)).where(kept >= 0, -1).amax().clamp(min=0)
                slots = slots.where(filling >= 0, other)
            holes, last = slots.flatten(1).unbind()
            self._holes[layout] = holes, last
        return self._holes[layout]

    def _starts(self, layout: Layout) -> Tensor:
        return torch.tensor([layout.offsets[row] for row in self.rows], device=self.kept.device)[..., None]


def filling_of(kept: Tensor, most: int) -> Tensor:
    """Which slots of each segment are filled, and with the entries of which: int64 [2, ..., most].

    `kept` [..., N] are slots that stay, as in `CompactionPlan`, and no segment has more than `most` holes. Where there
    are fewer, the last of the kept slots is filled with itself; where nothing stays, slots are -1.
    """
    count, most = kept.shape[-1], min(most, kept.shape[-1])
    counts = (kept >= 0).sum(-1, keepdim=True)
    places = torch.arange(count + 1, device=kept.device)
    front = (kept >= 0) & (kept < counts)
    stays = torch.zeros(*kept.shape[:-1], count + 1, dtype=torch.bool, device=kept.device)
    stays.scatter_(-1, kept.where(front, count), True)
    holes = _first(places, (places < counts) & ~stays, most)
    last = _first(kept, kept >= counts, most)
    own = kept.amax(-1, keepdim=True) if count else counts - 1
    filling = torch.stack([holes, last])
    return filling.where(filling >= 0, own)


def filling_together(kept: Sequence[Tensor], most: int) -> Sequence[Tensor | None]:
    """`filling_of` the slots [rows, K, N] that each of several layers keeps, in one; None where shapes differ."""
    if len(kept) == 1 or len({slots.shape for slots in kept}) > 1:
        return [None] * len(kept)
    return filling_of(torch.stack(list(kept)), most).unbind(1)


def _first(slots: Tensor, wanted: Tensor, most: int) -> Tensor:
    """The wanted ones of slots [..., n], at most `most` of each row, in order: [..., most], -1 behind them."""
    columns = (wanted.cumsum(-1) - 1).where(wanted, most)
    found = wanted.new_full((*wanted.shape[:-1], most + 1), -1, dtype=torch.int64)
    return found.scatter_(-1, columns, slots.expand_as(wanted))[..., :most]


def write(target: Tensor, layout: Layout, rows: Sequence[int], entries: Tensor, lengths: PerSegment) -> None:
    """The first `lengths` entries [rows, K, N, ...] to the start of their segments."""
    _write(target, layout, _segments(layout, rows), entries.flatten(0, 1), _flat(lengths))


def clear_behind(column: Tensor, layout: Layout, rows: Sequence[int], lengths: PerSegment, value: float) -> None:
    """Fill the slots behind the first `lengths` of their segments."""
    segments, counts = _segments(layout, rows), _flat(lengths)
    if _alike(layout, segments, counts):
        _block(column, layout, segments)[:, counts[0] :] = value
        return
    starts, sizes = _flat(layout.offsets), _flat(layout.capacity)
    for segment, count in zip(segments, counts, strict=True):
        column[starts[segment] + count : starts[segment] + sizes[segment]] = value


def _write(target: Tensor, layout: Layout, segments: Sequence[int], entries: Tensor, lengths: Sequence[int]) -> None:
    """The first `lengths` of [segments, N, ...]."""
    if _alike(layout, segments, lengths):
        _block(target, layout, segments)[:, : lengths[0]] = entries[:, : lengths[0]]
        return
    starts = _flat(layout.offsets)
    for segment, length, slots in zip(segments, lengths, entries, strict=True):
        target[starts[segment] : starts[segment] + length] = slots[:length]


def _alike(layout: Layout, segments: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether one call serves all: segments of one size and length that follow each other."""
    follow = len(segments) > 0 and segments == list(range(segments[0], segments[0] + len(segments)))
    return follow and layout.uniform is not None and len(set(lengths)) == 1


def _block(column: Tensor, layout: Layout, segments: Sequence[int]) -> Tensor:
    """Segments of one size that follow each other, [segments, capacity, ...], without a copy."""
    first, size = segments[0], layout.capacity[0][0]
    return column[first * size : (first + len(segments)) * size].view(len(segments), size, *column.shape[1:])


def _segments(layout: Layout, rows: Sequence[int]) -> list[int]:
    """The segments of some rows, counted through all."""
    return [row * layout.heads + head for row in rows for head in range(layout.heads)]


def _flat(numbers: PerSegment) -> list[int]:
    return [number for row in numbers for number in row]
