"""The entries of one layer, and how they come, go and move."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from operator import add
from typing import Self

import torch
from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan, clear_behind, write
from kvpolicy.cache.state_contents import Contents, Described, below, counts_of
from kvpolicy.cache.storage.layout import Layout, PerSegment, per_segment
from kvpolicy.cache.storage.segmented import Segmented
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages.slots import take


class SlotStore(Segmented):
    """What changes them: entries come, go and move, all columns alike."""

    def append(self, entries: Mapping[str, Tensor], limit: int) -> None:
        """Add [B, K, q, ...] at the end of every segment; columns that are not given get their fill.

        Capacity grows by at least a quarter when it has to, but not beyond `limit` slots (on average, where segments
        differ) unless the entries need it; the first entries get what they need.
        """
        count = next(iter(entries.values())).shape[2]
        self._reserve(count, limit)
        for name in _positions_last(self.columns):
            self._write_newest(name, self._added, count, entries.get(name, self.columns[name].fill))
        self._added += count

    def extend(self, entries: Mapping[str, Tensor], counts: PerSegment, limit: int) -> None:
        """Add the first `counts` of [B, K, q, ...] to each segment, all columns given; capacity as in `append`."""
        if len({count for row in counts for count in row}) == 1:
            self.append({name: tensor[:, :, : counts[0][0]] for name, tensor in entries.items()}, limit)
            return
        self._reserve(counts, limit)
        lengths = self.lengths
        for name in _positions_last(entries):
            self._write_segments(name, entries[name], lengths, counts)
        self._base, self._added = _plus(lengths, counts), 0
        self._measure()

    def drop_front(self, counts: PerSegment, layout: Layout) -> None:
        """Drop the oldest `counts` slots of each segment, and lay all segments out anew."""
        lengths = self.lengths
        left = per_segment(self.layout.rows, self.layout.heads, lambda b, k: lengths[b][k] - counts[b][k])
        rows = range(self.layout.rows)
        if self.even and len({count for row in counts for count in row}) == 1:
            entries = {name: self.dense(name)[:, :, counts[0][0] :] for name in self.columns}
            entries = {name: tensor.clone() for name, tensor in entries.items()}  # source and target overlap
        else:
            first = self.layout.on(counts, self.device)[..., None]
            width = max(max(row) for row in left)
            index = (first + torch.arange(width, device=self.device)).clamp(max=max(0, self.longest - 1))
            entries = {name: take(self.padded(name, rows), index) for name in self.columns}
        self.replace(rows, entries, left, layout)

    def overwrite_newest(self, name: str, entries: Tensor) -> None:
        """Replace one column of the newest q slots, [B, K, q, ...]."""
        count = entries.shape[2]
        self._write_newest(name, self._added - count, count, entries)

    def write(self, rows: Sequence[int], columns: Mapping[str, Tensor]) -> None:
        """Overwrite columns of all entries of some rows, [rows, K, T, ...], T the longest length among them."""
        lengths = tuple(self.lengths[row] for row in rows)
        for name, tensor in columns.items():
            write(self.tensors[name], self.layout, rows, tensor, lengths)

    def replace(self, rows: Sequence[int], entries: Mapping[str, Tensor], lengths: PerSegment, layout: Layout) -> None:
        """Give some rows new contents, [rows, K, N, ...] of which `lengths` count, and lay all segments out anew.

        Storage of the right size is reused in place; otherwise the new one is filled before the old one is dropped.
        """
        after = self._after(rows, lengths, layout)
        kept_rows = self._others(rows)
        in_place = layout == self.layout or (layout.slots == self.layout.slots and not kept_rows)
        target = self.tensors if in_place else self.allocate(layout)
        if layout != self.layout:
            self._copy_rows(kept_rows, target, layout)
        for name, tensor in entries.items():
            write(target[name], layout, rows, tensor, lengths)
        for name in entries:  # what was there could be NaN, and a masked slot is still multiplied
            clear_behind(target[name], layout, rows, lengths, -1 if name == POSITIONS else 0)
        self._adopt(target, layout, after)

    def keep(self, move: CompactionPlan, layout: Layout) -> None:
        """Reduce some rows to what a move keeps, and lay all segments out anew; in place if the layout stays."""
        after = self._after(move.rows, move.lengths, layout)
        in_place = layout == self.layout
        target = self.tensors if in_place else _unfilled(self.tensors, layout)
        if not in_place:
            self._copy_rows(self._others(move.rows), target, layout)
        for name in self.columns:
            move.copy(self.tensors[name], self.layout, target[name], layout)
        for name in target:
            clear_behind(target[name], layout, range(layout.rows), after, -1 if name == POSITIONS else 0)
        self._adopt(target, layout, after)

    def _after(self, rows: Sequence[int], lengths: PerSegment, layout: Layout) -> PerSegment:
        """Lengths of all rows once some have new ones."""
        after = list(self.lengths)
        for row, counts in zip(rows, lengths, strict=True):
            after[row] = counts
        if any(n > c for ns, cs in zip(after, layout.capacity, strict=True) for n, c in zip(ns, cs, strict=True)):
            raise CacheError(f"{after} entries do not fit into {layout.capacity} slots")
        return tuple(after)

    def _others(self, rows: Sequence[int]) -> list[int]:
        return [row for row in range(self.layout.rows) if row not in rows]

    def adopt(self, tensors: Mapping[str, Tensor], layout: Layout, lengths: PerSegment) -> None:
        """Take over flat storages, one a column, in which `lengths` entries stand already; drop the present ones."""
        self._adopt(dict(tensors), layout, lengths)

    def truncate(self, count: int) -> None:
        """Drop the newest `count` slots of every segment."""
        if count:
            for name in self.columns:
                self._write_newest(name, self._added - count, count, -1 if name == POSITIONS else 0)
            self._added -= count

    def selected(self, rows: Sequence[int]) -> Self:
        """A store of the rows named, in that order, that shares no storage; a row may be named more than once."""
        other = copy.copy(self)
        other.forget_tables()
        if list(rows) == list(range(self.layout.rows)):
            other._adopt(  # noqa: SLF001 - of its own class
                {name: tensor.clone() for name, tensor in self.tensors.items()}, self.layout, self._base, self._added
            )
            return other
        layout = Layout(tuple(self.layout.capacity[row] for row in rows))
        if self.layout.uniform is not None:
            index = torch.tensor(rows, device=self.device)
            selected = {name: self._capacity_view(name)[index].flatten(0, 2) for name in self.columns}
        else:
            selected = {
                name: torch.cat([self._row(tensor, row) for row in rows]) for name, tensor in self.tensors.items()
            }
        other._adopt(selected, layout, tuple(self._base[row] for row in rows), self._added)  # noqa: SLF001
        return other

    def describe(self) -> Described:
        """Its state: storages as they are, capacities and lengths [B, K]."""
        yield "capacity", counts_of(self.layout.capacity)
        yield "lengths", counts_of(self.lengths)
        yield from below("columns", self.tensors.items())

    def restore(self, contents: Contents) -> None:
        """Take the state that is written there; this store has as many rows, and nothing in them."""
        rows, heads = self.layout.rows, self.layout.heads
        layout, lengths = Layout(contents.table("capacity", rows, heads)), contents.table("lengths", rows, heads)
        if not self.columns and layout.slots:
            raise contents.wrong("capacity", "must be 0, where nothing is held")
        columns = contents.below("columns")
        tensors = {
            name: columns.tensor(name, column.dtype, (layout.slots, *column.shape))
            for name, column in self.columns.items()
        }
        self._adopt(tensors, layout, lengths)

    def _row(self, tensor: Tensor, row: int) -> Tensor:
        start = self.layout.offsets[row][0]
        return tensor[start : start + sum(self.layout.capacity[row])]

    def _reserve(self, counts: int | PerSegment, limit: int) -> None:
        if self.layout.uniform is not None and self._most(counts) <= self.layout.uniform:
            return
        needed = _plus(self.lengths, counts if isinstance(counts, tuple) else self.layout.with_each(counts))
        layout = self.layout.with_room(needed, limit)
        if layout == self.layout:
            return
        target = self.allocate(layout)
        self._copy_rows(list(range(self.layout.rows)), target, layout)
        self._adopt(target, layout, self._base, self._added)

    def _most(self, counts: int | PerSegment) -> int:
        """The longest segment after `counts` more."""
        if isinstance(counts, int):
            return self.longest + counts
        return max((max(row) for row in _plus(self.lengths, counts)), default=0)

    def _copy_rows(self, rows: Sequence[int], target: Mapping[str, Tensor], layout: Layout) -> None:
        if not rows or not self.longest:
            return
        lengths = tuple(self.lengths[row] for row in rows)
        for name in self.columns:
            write(target[name], layout, rows, self.padded(name, rows), lengths)

    def _write_newest(self, name: str, added: int, count: int, entries: Tensor | float) -> None:
        """Write `count` slots of every segment, from `added` behind its base length on."""
        if self.even:
            first = self._longest_base + added
            self._capacity_view(name)[:, :, first : first + count] = entries
            return
        if self._starts is None:
            self._starts = self.layout.offsets_on(self.device) + self.layout.on(self._base, self.device)
        newest = self._starts[..., None] + added + torch.arange(count, device=self.device)
        self.tensors[name][newest] = torch.as_tensor(entries, dtype=self.columns[name].dtype, device=self.device)

    def _write_segments(self, name: str, entries: Tensor, starts: PerSegment, counts: PerSegment) -> None:
        for row, sizes in enumerate(counts):
            for head, count in enumerate(sizes):
                first = self.layout.offsets[row][head] + starts[row][head]
                self.tensors[name][first : first + count] = entries[row, head, :count]


def _positions_last(names: Iterable[str]) -> list[str]:
    """An entry is there once its position is."""
    return sorted(names, key=lambda name: name == POSITIONS)


def _plus(one: PerSegment, other: PerSegment) -> PerSegment:
    return tuple(tuple(map(add, *rows)) for rows in zip(one, other, strict=True))


def _unfilled(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """New storage for the same columns."""
    return {name: tensor.new_empty((layout.slots, *tensor.shape[1:])) for name, tensor in tensors.items()}
