"""Copies between padded blocks [rows, K, N, ...] and the segments of a flat storage, and within such a storage."""

from collections.abc import Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from kvpolicy.runtime.layout import Layout, Table

_WIDE = 64  # bytes of a slot, from which on a CPU is faster at a copy per segment than at one for all


@attrs.frozen(eq=False)
class Move:
    """Which slots of some rows stay; they close up towards the start of their segment, in order."""

    rows: Sequence[int]
    kept: Tensor  # [rows, K, N] int64, ascending, -1 behind a head's last one

    @cached_property
    def lengths(self) -> Table:
        """How many slots stay, [rows][K]."""
        return _table((self.kept >= 0).sum(-1))

    @cached_property
    def _resting(self) -> Table:
        """How many of them stay where they are: the first ones."""
        return _table((self.kept == torch.arange(self.kept.shape[-1], device=self.kept.device)).sum(-1))

    def copy(self, sources: Sequence[Tensor], before: Layout, targets: Sequence[Tensor], after: Layout) -> None:
        """Copy columns of a storage laid out as `before` into those of one laid out as `after`, or within themselves.

        Within themselves (each target is its source, and the layouts are equal) what does not move is not touched.
        """
        slots = (self._starts(before) + self.kept.clamp(min=0)).clamp(max=before.slots - 1)  # a segment may have none
        for source, target in zip(sources, targets, strict=True):
            if slots.device.type == "cpu" and source.stride(0) * source.itemsize >= _WIDE:
                self._copy_segments(source, slots, target, after)
            else:
                taken = source.index_select(0, slots.flatten()).view(*slots.shape, *source.shape[1:])
                write(target, after, self.rows, taken, self.lengths)

    def _copy_segments(self, source: Tensor, slots: Tensor, target: Tensor, after: Layout) -> None:
        """A call for each segment, and none for what stays where it is."""
        aside = source.new_empty((self.kept.shape[-1], *source.shape[1:])) if target is source else None
        for place, row in enumerate(self.rows):
            for head, length in enumerate(self.lengths[place]):
                resting = 0 if aside is None else self._resting[place][head]
                start = after.offsets[row][head]
                room = target[start + resting : start + length]
                taken = room if aside is None else aside[: length - resting]
                _take(source, slots[place, head, resting:length], taken)
                if aside is not None:
                    room.copy_(taken)

    def _starts(self, layout: Layout) -> Tensor:
        starts = torch.tensor([layout.offsets[row] for row in self.rows], device=self.kept.device)
        return starts[..., None]


def _take(source: Tensor, slots: Tensor, out: Tensor) -> None:
    if source.requires_grad:  # autograd has no `out`
        out.copy_(source.index_select(0, slots))
    else:
        torch.index_select(source, 0, slots, out=out)


def _table(numbers: Tensor) -> Table:
    return tuple(map(tuple, numbers.tolist()))


def spread(flat: Tensor, layout: Layout, capacity: int) -> Tensor:
    """A column as [B, K, capacity, ...], where all segments have that capacity."""
    return flat.view(layout.rows, layout.heads, capacity, *flat.shape[1:])


def write(target: Tensor, layout: Layout, rows: Sequence[int], entries: Tensor, lengths: Table) -> None:
    """The first `lengths` entries [rows, K, N, ...] to the start of their segments."""
    count = _alike(layout, rows, lengths)
    if count is not None and layout.uniform is not None:
        spread(target, layout, layout.uniform)[:, :, :count] = entries[:, :, :count]
        return
    for place, row in enumerate(rows):
        for head, length in enumerate(lengths[place]):
            start = layout.offsets[row][head]
            target[start : start + length] = entries[place, head, :length]


def clear_behind(column: Tensor, layout: Layout, rows: Sequence[int], lengths: Table, value: float) -> None:
    """Fill the slots behind the first `lengths` of their segments."""
    count = _alike(layout, rows, lengths)
    if count is not None and layout.uniform is not None:
        spread(column, layout, layout.uniform)[:, :, count:] = value
        return
    for place, row in enumerate(rows):
        for head, length in enumerate(lengths[place]):
            start, size = layout.offsets[row][head], layout.capacity[row][head]
            column[start + length : start + size] = value


def _alike(layout: Layout, rows: Sequence[int], lengths: Table) -> int | None:
    """The length of all segments, None when rows are left out or lengths differ."""
    counts = {length for row in lengths for length in row}
    return counts.pop() if len(counts) == 1 and len(rows) == layout.rows else None
