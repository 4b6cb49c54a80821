"""Where the entries of one layer are: flat tensors, cut into a segment of slots per (row, KV head).

Segments may differ in capacity and in length, so heads and rows with different budgets take different amounts of
memory. When they are all alike the storage is an ordinary [B, K, capacity, ...] tensor, and is seen as such without a
copy. Slots behind a segment's length have position -1, if positions are among the columns.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from operator import add
from typing import Self

import torch
from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan, clear_behind, write
from kvpolicy.cache.state_contents import Contents, Described, below, counts_of
from kvpolicy.cache.storage.layout import Layout, PerSegment, per_segment
from kvpolicy.cache.storage.segment_index import SegmentIndex, SingleSegment
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages import Column
from kvpolicy.stages.slots import take


class SlotStore:
    """Columns of slots, one flat tensor each: entries come, go and move in all columns alike."""

    def __init__(self, columns: Mapping[str, Column], rows: int, heads: int, device: torch.device) -> None:
        self.columns = dict(columns)
        self._fills = {name: self.columns[name].fill for name in _positions_last(self.columns)}
        self.device = device
        self.even = True  # all segments have the same length and capacity
        self._starts: Tensor | None = None
        self._firsts: Tensor | None = None
        self.forget_tables()
        self._lengths: tuple[int, PerSegment] | None = None
        self._extremes: tuple[tuple[int, int], ...] | None = None
        self.tensors: dict[str, Tensor] = {}
        self.layout = Layout.even(rows, heads, 0)
        self._adopt(self.allocate(self.layout), self.layout, self.layout.capacity)

    @property
    def lengths(self) -> PerSegment:
        """Slots in use, [B][K]."""
        if not self._added:
            return self._base
        if self._lengths is None or self._lengths[0] != self._added:
            self._lengths = self._added, tuple(tuple(base + self._added for base in row) for row in self._base)
        return self._lengths[1]

    @property
    def longest(self) -> int:
        """The largest of the lengths."""
        return self._longest_base + self._added

    @property
    def starts(self) -> Tensor:
        """First slots of the segments, int64 [B·K] on the device."""
        return self._on_device()[0]

    @property
    def lengths_on_device(self) -> Tensor:
        """Slots in use, int32 [B·K]."""
        lengths = self._on_device()[1]
        return lengths + self._added if self._added else lengths

    @property
    def index_tensors(self) -> list[Tensor]:
        """Where segments begin and how long they are, as far as the device has been told."""
        return [*self._tables, *(tensor for tensor in (self._firsts, self._starts) if tensor is not None)]

    @property
    def average(self) -> float:
        """Slots in use per (row, KV head)."""
        return self._average_base + self._added

    @property
    def fullest(self) -> int:
        """Slots in use of the row that has the most."""
        return self._fullest_base + self._added * self._block[1]

    @property
    def extremes(self) -> list[tuple[int, int]]:
        """Slots in use of the longest and of the shortest head of each row."""
        if self._extremes is None:  # once for all tokens until the next compression
            self._extremes = tuple((max(row), min(row)) for row in self._base)
        return [(longest + self._added, shortest + self._added) for longest, shortest in self._extremes]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, as allocated."""
        return self._nbytes

    def dense(self, name: str) -> Tensor:
        """[B, K, T, ...] without a copy, T the longest length; needs a common capacity."""
        return self._slice(name, 0, self._longest_base + self._added)

    def segment(self, name: str, row: int, head: int) -> Tensor:
        """[length, ...] without a copy."""
        start = self.layout.offsets[row][head]
        return self.tensors[name][start : start + self._base[row][head] + self._added]

    def block(self, name: str, at: SegmentIndex) -> Tensor:
        """A block of segments as [b, k, T, ...], without a copy where the layout allows; k = 1 for a joint column."""
        if isinstance(at, SingleSegment):
            return self.segment(name, at.row, at.head)[None, None]
        return self.padded(name, at.rows)

    def part(self, name: str, at: SegmentIndex, start: int, stop: int) -> Tensor:
        """Slots `start` to `stop` of a block, or to its end."""
        if isinstance(at, SingleSegment) or not self._is_whole(at.rows):
            return self.block(name, at)[:, :, start:stop]
        return self._slice(name, start, max(0, min(stop, self._longest_base + self._added) - start))

    def _is_whole(self, rows: Sequence[int]) -> bool:
        """Whether these are all rows, in order, and can be seen as one block without a copy."""
        everything = range(self._block[0])
        return self.layout.uniform is not None and (rows == everything or list(rows) == list(everything))

    def padded(self, name: str, rows: Sequence[int]) -> Tensor:
        """[rows, K, T, ...], T the longest length among them; a view when it can be.

        Unused slots hold any finite number, except for positions, which are -1 there.
        """
        if self._is_whole(rows):
            return self.dense(name)
        longest = max(max(self._base[row]) for row in rows) + self._added
        if self.layout.uniform is not None:
            return self._capacity_view(name)[list(rows), :, :longest]
        starts, lengths = self._numbers(self.layout.offsets, rows), self._numbers(self.lengths, rows)
        places = torch.arange(longest, device=self.device)
        slots = (starts + places).clamp(max=self.layout.slots - 1)
        padded: Tensor = self.tensors[name].index_select(0, slots.flatten()).unflatten(0, slots.shape)
        return padded.where(places < lengths, -1) if name == POSITIONS else padded

    def slots_of(self, rows: Sequence[int], length: int, *, differ: bool) -> tuple[Tensor, Tensor | None]:
        """Slots int64 [b, K, length] of the heads of some rows, and bool [b, K, length], which of them are in use.

        Where heads `differ` in length, the last entry of one stands for those that it has not; no head is empty. Else
        all are in use: None.
        """
        if self._firsts is None:
            self._firsts = self.layout.offsets_on(self.device).flatten()
        slots = self._of_rows(self._firsts, rows) + torch.arange(length, device=self.device)
        if not differ:
            return slots, None
        last = self._of_rows(self._ends(), rows) + (self._added - 1)
        return slots.minimum(last), slots <= last

    def _of_rows(self, numbers: Tensor, rows: Sequence[int]) -> Tensor:
        """Of one number per segment [B·K] those of some rows, [b, K, 1]."""
        table = numbers.view(-1, self._block[1], 1)
        return table if len(rows) == self._block[0] else table[list(rows)]

    def copied(self, name: str, slots: Tensor) -> Tensor:
        """Slots [b, K, T] as [b, K, T, ...]: a copy without slots of another row or head."""
        copies: Tensor = self.tensors[name].index_select(0, slots.flatten()).unflatten(0, slots.shape)
        return copies

    def allocate(self, layout: Layout) -> dict[str, Tensor]:
        """New storage for these columns, in which all slots are empty."""
        # Zeros, because a masked slot is still multiplied: what was in the memory before could be NaN.
        tensors = {
            name: torch.zeros((layout.slots, *column.shape), dtype=column.dtype, device=self.device)
            for name, column in self.columns.items()
        }
        if POSITIONS in tensors:
            tensors[POSITIONS].fill_(-1)
        return tensors

    def _numbers(self, table: PerSegment, rows: Sequence[int]) -> Tensor:
        """What a table says of some rows, [rows, K, 1]."""
        return torch.tensor([table[row] for row in rows], device=self.device)[..., None]

    def check_integrity(self) -> None:
        """Raise CacheError unless lengths fit and exactly the slots behind them are marked empty."""
        for row, lengths in enumerate(self.lengths):
            for head, length in enumerate(lengths):
                start, size = self.layout.offsets[row][head], self.layout.capacity[row][head]
                if not 0 <= length <= size:
                    raise CacheError(f"row {row} head {head}: {length} entries in {size} slots")
                if POSITIONS in self.columns and bool(
                    (self.tensors[POSITIONS][start + length : start + size] >= 0).any()
                ):
                    raise CacheError(f"row {row} head {head}: entries behind the length {length}")
        if POSITIONS in self.columns:  # what stands beside positions is masked, and never multiplied
            return
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                self._require_finite_behind(name)

    def _require_finite_behind(self, name: str) -> None:
        """Raise CacheError when a slot that is not in use is NaN or infinite: a masked slot is still multiplied."""
        for row, lengths in enumerate(self.lengths):
            for head, length in enumerate(lengths):
                start, size = self.layout.offsets[row][head], self.layout.capacity[row][head]
                if not bool(self.tensors[name][start + length : start + size].float().isfinite().all()):
                    raise CacheError(f"row {row} head {head}: {name} behind the length {length} are not finite")

    def forget_tables(self) -> None:
        """Tell kernels anew where segments begin and how long they are."""
        self._tables: tuple[Tensor, Tensor] = (
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=torch.int32),
        )  # what kernels are told of segments
        self._tabled: tuple[Layout, PerSegment] | None = None  # and of which layout and base lengths

    # -- how it changes ----------------------------------------------------------------------------------------

    def append(self, entries: Mapping[str, Tensor], limit: int) -> bool:
        """Add [B, K, q, ...] at the end of every segment; columns that are not given get their fill.

        Capacity grows by at least an eighth when it has to, but not beyond `limit` slots (on average, where segments
        differ) unless the entries need it; the first entries get what they need. Says whether it has grown.
        """
        count = next(iter(entries.values())).shape[2]
        grows = self._added + count > self._room
        if grows:
            self._reserve(count, limit)
        self._write_newest({**self._fills, **entries}, self._added, count)
        self._added += count
        return grows

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
        self._write_newest({name: entries}, self._added - count, count)

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
        if layout == self.layout and self._is_whole(rows) and _all_equal(lengths):
            for name, tensor in entries.items():
                self._set_all(name, tensor, lengths[0][0])
            self._adopt(self.tensors, layout, after)
            return
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
        whole = in_place and layout.uniform is not None and _all_equal(after)
        for name in target:
            if whole:
                self._clear_behind(name, after[0][0])
            else:
                clear_behind(target[name], layout, range(layout.rows), after, -1 if name == POSITIONS else 0)
        self._adopt(target, layout, after)

    def _set_all(self, name: str, entries: Tensor, length: int) -> None:
        """Let every segment hold the first `length` of [B, K, N, ...]; what was behind could be NaN."""
        self._slice(name, 0, length).copy_(entries if entries.shape[2] == length else entries[:, :, :length])
        self._clear_behind(name, length)

    def _clear_behind(self, name: str, length: int) -> None:
        if length < self._block[2]:
            self._slice(name, length, self._block[2] - length).fill_(-1 if name == POSITIONS else 0)

    def _after(self, rows: Sequence[int], lengths: PerSegment, layout: Layout) -> PerSegment:
        """Lengths of all rows once some have new ones."""
        after = list(self.lengths)
        for row, counts in zip(rows, lengths, strict=True):
            after[row] = counts
        if layout.uniform is not None:
            too_long = max(map(max, after), default=0) > layout.uniform
        else:
            pairs = zip(after, layout.capacity, strict=True)
            too_long = any(n > c for ns, cs in pairs for n, c in zip(ns, cs, strict=True))
        if too_long:
            raise CacheError(f"{after} entries do not fit into {layout.capacity} slots")
        return tuple(after)

    def _others(self, rows: Sequence[int]) -> list[int]:
        return [row for row in range(self.layout.rows) if row not in rows]

    def adopt(self, tensors: Mapping[str, Tensor], layout: Layout, lengths: PerSegment) -> None:
        """Take over flat storages, one a column, in which `lengths` entries stand already; drop the present ones."""
        self._adopt(dict(tensors), layout, lengths)

    def with_lengths_on_device(self, tensors: Mapping[str, Tensor], starts: Tensor, lengths: Tensor) -> Self:
        """A store with the same layout over these tensors; the host does not know its `lengths`, int32 [B·K].

        For the host all slots are in use and segments are not alike: what is read is masked by positions. `starts` are
        those of the segments.
        """
        other = copy.copy(self)
        other._adopt(dict(tensors), self.layout, self.layout.capacity)  # noqa: SLF001 - of its own class
        other.even = False
        other._tables = starts, lengths  # noqa: SLF001
        other._tabled = (other.layout, other._base)  # noqa: SLF001
        return other

    def truncate(self, count: int) -> None:
        """Drop the newest `count` slots of every segment."""
        if count:
            added = self._added - count
            self._write_newest({name: -1 if name == POSITIONS else 0 for name in self.columns}, added, count)
            self._added = added

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

    def _write_newest(self, columns: Mapping[str, Tensor | float], added: int, count: int) -> None:
        """Write `count` slots of every segment, from `added` behind its base length on, in some columns."""
        if self.even:
            for name, entries in columns.items():
                slots = self._slice(name, self._longest_base + added, count)
                slots.copy_(entries) if isinstance(entries, Tensor) else slots.fill_(entries)
            return
        newest = self._newest(added, count)
        for name, entries in columns.items():
            if isinstance(entries, Tensor):
                self.tensors[name].index_copy_(0, newest, entries.flatten(0, 2).to(self.columns[name].dtype))
            else:
                self.tensors[name].index_fill_(0, newest, entries)

    def _newest(self, added: int, count: int) -> Tensor:
        """`count` slots of every segment, from `added` behind its base length on: int64 [B·K·count]."""
        first = self._ends() + added if added else self._ends()
        if count == 1:
            return first
        return (first[:, None] + torch.arange(count, device=self.device)).flatten()

    def _ends(self) -> Tensor:
        """The slot behind the base length of every segment, int64 [B·K]."""
        if self._starts is None:
            self._starts = (self.layout.offsets_on(self.device) + self.layout.on(self._base, self.device)).flatten()
        return self._starts

    def _write_segments(self, name: str, entries: Tensor, starts: PerSegment, counts: PerSegment) -> None:
        for row, sizes in enumerate(counts):
            for head, count in enumerate(sizes):
                first = self.layout.offsets[row][head] + starts[row][head]
                self.tensors[name][first : first + count] = entries[row, head, :count]

    def _capacity_view(self, name: str) -> Tensor:
        if self.layout.uniform is None:
            raise CacheError("heads with different budgets have no common capacity")
        tensor = self.tensors[name]
        return tensor.view(*self._block, *tensor.shape[1:])

    def _slice(self, name: str, first: int, count: int) -> Tensor:
        """Slots of all segments, [B, K, count, ...] without a copy; needs a common capacity."""
        if self.layout.uniform is None:
            raise CacheError("heads with different budgets have no common capacity")
        tensor = self.tensors[name]
        shape = self._shapes.get(name)
        if shape is None:  # asked for many times a token
            shape = self._shapes[name] = _block_shape(self._block, tensor)
        sizes, strides = shape
        at = tensor.storage_offset() + first * strides[2]
        return tensor.as_strided((*sizes[:2], count, *sizes[2:]), strides, at)

    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Starts and base lengths, [B·K]; nothing is copied to the device while tokens only arrive."""
        if self._tabled != (self.layout, self._base):
            starts, base = self.layout.offsets_on(self.device), self.layout.on(self._base, self.device)
            self._tables = starts.flatten(), base.flatten().to(torch.int32)
            self._tabled = (self.layout, self._base)
        return self._tables

    def _adopt(self, tensors: dict[str, Tensor], layout: Layout, base: PerSegment, added: int = 0) -> None:
        """Take over new storage and lengths: `base` now, and as many more as later appends add to all segments."""
        if tensors is not self.tensors or layout != self.layout:
            known = self.layout is not layout and self.layout == layout
            self.tensors, self.layout = tensors, self.layout if known else layout  # what is known about it stays known
            self._block = (layout.rows, layout.heads, layout.uniform or 0)
            self._shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
            self._nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        elif base == self._base:  # as after every compression that takes as many as have come
            self._added = added
            return
        self._base, self._added = base, added
        self._measure()

    def _measure(self) -> None:
        lengths = {length for row in self._base for length in row}
        self.even = self.layout.uniform is not None and len(lengths) == 1
        self._longest_base = max(lengths, default=0)
        self._average_base = sum(map(sum, self._base)) / max(1, self.layout.rows * self.layout.heads)
        pairs = zip(self.layout.capacity, self._base, strict=True)
        spare = (size - length for row in pairs for size, length in zip(*row, strict=True))
        self._room = min(spare, default=0)  # how many entries may be added to every segment
        self._fullest_base = max(map(sum, self._base), default=0)
        self._lengths = self._extremes = None
        self._firsts = self._starts = None  # where segments begin and their next slots are, computed when needed


def _block_shape(block: tuple[int, int, int], tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes (B, K, ...) and strides (B, K, slot, ...) of a flat tensor [slots, ...] that is seen by segments."""
    rows, heads, capacity = block
    slot = tensor.stride(0)
    return (rows, heads, *tensor.shape[1:]), (heads * capacity * slot, capacity * slot, slot, *tensor.stride()[1:])


def _all_equal(numbers: PerSegment) -> bool:
    first = numbers[0][0] if numbers and numbers[0] else None
    return first is not None and all(row.count(first) == len(row) for row in numbers)


def _positions_last(names: Iterable[str]) -> list[str]:
    """An entry is there once its position is."""
    return sorted(names, key=lambda name: name == POSITIONS)


def _plus(left: PerSegment, right: PerSegment) -> PerSegment:
    return tuple(tuple(map(add, *rows)) for rows in zip(left, right, strict=True))


def _unfilled(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """New storage for the same columns."""
    return {name: tensor.new_empty((layout.slots, *tensor.shape[1:])) for name, tensor in tensors.items()}
