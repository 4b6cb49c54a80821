"""The entries of one layer: one flat tensor per column, cut into a segment of slots per (row, KV head).

Segments may differ in capacity and in length, so heads and rows with different budgets take different amounts of
memory. When they are all alike the storage is an ordinary [B, K, capacity, ...] tensor, and is seen as such without a
copy. Slots behind a segment's length have position -1, if positions are among the columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import add

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.runtime.copying import Move, clear_behind, spread, write
from kvpolicy.runtime.layout import Layout, Table, table
from kvpolicy.stages import Column
from kvpolicy.stages.slots import take


class Store:
    """Holds columns; knows nothing of scores, triggers or models."""

    def __init__(self, columns: Mapping[str, Column], rows: int, heads: int, device: torch.device) -> None:
        self.columns = dict(columns)
        self.device = device
        self.even = True  # all segments have the same length and capacity
        self._starts: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))  # what kernels are told of segments
        self._tabled: tuple[Layout, Table] | None = None  # and of which layout and base lengths
        self.layout = Layout.even(rows, heads, 0)
        self._settle(self._allocate(self.layout), self.layout, self.layout.capacity)

    # -- what is held ------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> Table:
        """Slots in use, [B][K]."""
        return tuple(tuple(base + self._added for base in row) for row in self._base)

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
        return self._on_device()[1] + self._added

    @property
    def average(self) -> float:
        """Slots in use per (row, KV head)."""
        return self._average_base + self._added

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, as allocated."""
        return self._nbytes

    def dense(self, name: str) -> Tensor:
        """[B, K, T, ...] without a copy, T the longest length; needs a common capacity."""
        return self._capacity_view(name)[:, :, : self.longest]

    def segment(self, name: str, row: int, head: int) -> Tensor:
        """[length, ...] without a copy."""
        start = self.layout.offsets[row][head]
        return self.tensors[name][start : start + self._base[row][head] + self._added]

    def padded(self, name: str, rows: Sequence[int]) -> Tensor:
        """[rows, K, T, ...], T the longest length among them; a view when it can be.

        Unused slots hold any finite number, except for positions, which are -1 there.
        """
        if self.layout.uniform is not None:
            if len(rows) == self.layout.rows and list(rows) == list(range(len(rows))):
                return self.dense(name)
            longest = max(max(self._base[row]) for row in rows) + self._added
            return self._capacity_view(name)[list(rows), :, :longest]
        segments = [self.segment(name, row, head) for row in rows for head in range(self.layout.heads)]
        fill = self.columns[name].fill
        padded = torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=fill)
        return padded.view(len(rows), self.layout.heads, *padded.shape[1:])

    # -- how it changes ----------------------------------------------------------------------------------------

    def append(self, entries: Mapping[str, Tensor], limit: int) -> None:
        """Add [B, K, q, ...] at the end of every segment; columns that are not given get their fill.

        Capacity grows by at least a quarter when it has to, but not beyond `limit` slots (on average, where segments
        differ) unless the entries need it; the first entries get what they need.
        """
        count = next(iter(entries.values())).shape[2]
        self._reserve(count, limit)
        for name in _positions_last(self.columns):
            self._write_tail(name, self._added, count, entries.get(name, self.columns[name].fill))
        self._added += count

    def extend(self, entries: Mapping[str, Tensor], counts: Table, limit: int) -> None:
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

    def drop_front(self, counts: Table, layout: Layout) -> None:
        """Drop the oldest `counts` slots of each segment, and lay all segments out anew."""
        lengths = self.lengths
        left = table(self.layout.rows, self.layout.heads, lambda b, k: lengths[b][k] - counts[b][k])
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

    def overwrite_tail(self, name: str, entries: Tensor) -> None:
        """Replace one column of the newest q slots, [B, K, q, ...]."""
        count = entries.shape[2]
        self._write_tail(name, self._added - count, count, entries)

    def replace(self, rows: Sequence[int], entries: Mapping[str, Tensor], lengths: Table, layout: Layout) -> None:
        """Give some rows new contents, [rows, K, N, ...] of which `lengths` count, and lay all segments out anew.

        Storage of the right size is reused in place; otherwise the new one is filled before the old one is dropped.
        """
        after = self._after(rows, lengths, layout)
        kept_rows = self._others(rows)
        in_place = layout == self.layout or (layout.slots == self.layout.slots and not kept_rows)
        target = self.tensors if in_place else self._allocate(layout)
        if layout != self.layout:
            self._copy_rows(kept_rows, target, layout)
        for name, tensor in entries.items():
            write(target[name], layout, rows, tensor, lengths)
        if POSITIONS in self.columns:
            clear_behind(target[POSITIONS], layout, rows, lengths, -1)
        self._settle(target, layout, after)

    def keep(self, move: Move, layout: Layout, fresh: Mapping[str, Tensor] | None = None) -> None:
        """Reduce some rows to the slots that a move keeps, and lay all segments out anew; in place if the layout stays.

        `fresh` [rows, K, N, ...] are new values of columns; the others move with their entries.
        """
        after = self._after(move.rows, move.lengths, layout)
        in_place = layout == self.layout
        target = self.tensors if in_place else _unfilled(self.tensors, layout)
        if not in_place:
            self._copy_rows(self._others(move.rows), target, layout)
        fresh = fresh or {}
        moved = [name for name in self.columns if name not in fresh]
        move.copy([self.tensors[name] for name in moved], self.layout, [target[name] for name in moved], layout)
        for name, tensor in fresh.items():
            write(target[name], layout, move.rows, tensor, move.lengths)
        for name in {POSITIONS} & target.keys() if in_place else target:
            clear_behind(target[name], layout, range(layout.rows), after, -1 if name == POSITIONS else 0)
        self._settle(target, layout, after)

    def _after(self, rows: Sequence[int], lengths: Table, layout: Layout) -> Table:
        """Lengths of all rows once some have new ones."""
        after = list(self.lengths)
        for row, counts in zip(rows, lengths, strict=True):
            after[row] = counts
        if any(n > c for ns, cs in zip(after, layout.capacity, strict=True) for n, c in zip(ns, cs, strict=True)):
            raise CacheError(f"{after} entries do not fit into {layout.capacity} slots")
        return tuple(after)

    def _others(self, rows: Sequence[int]) -> list[int]:
        return [row for row in range(self.layout.rows) if row not in rows]

    def adopt(self, tensors: Mapping[str, Tensor], layout: Layout, lengths: Table) -> None:
        """Take over flat storages, one a column, in which `lengths` entries stand already; drop the present ones."""
        self._settle(dict(tensors), layout, lengths)

    def truncate(self, count: int) -> None:
        """Drop the newest `count` slots of every segment."""
        if count:
            if POSITIONS in self.columns:
                self._write_tail(POSITIONS, self._added - count, count, -1)
            self._added -= count

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order; a row may be named more than once."""
        layout = Layout(tuple(self.layout.capacity[row] for row in rows))
        if self.layout.uniform is not None:
            index = torch.tensor(rows, device=self.device)
            selected = {name: self._capacity_view(name)[index].flatten(0, 2) for name in self.columns}
        else:
            selected = {
                name: torch.cat([self._row(tensor, row) for row in rows]) for name, tensor in self.tensors.items()
            }
        base = tuple(self._base[row] for row in rows)
        self._settle(selected, layout, base, self._added)

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

    # -- storage -----------------------------------------------------------------------------------------------

    def _allocate(self, layout: Layout) -> dict[str, Tensor]:
        # Zeros, because a masked slot is still multiplied: what was in the memory before could be NaN.
        tensors = {
            name: torch.zeros((layout.slots, *column.shape), dtype=column.dtype, device=self.device)
            for name, column in self.columns.items()
        }
        if POSITIONS in tensors:
            tensors[POSITIONS].fill_(-1)
        return tensors

    def _capacity_view(self, name: str) -> Tensor:
        if self.layout.uniform is None:
            raise CacheError("heads with different budgets have no common capacity")
        return spread(self.tensors[name], self.layout, self.layout.uniform)

    def _row(self, tensor: Tensor, row: int) -> Tensor:
        start = self.layout.offsets[row][0]
        return tensor[start : start + sum(self.layout.capacity[row])]

    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Starts and base lengths, [B·K]; nothing is copied to the device while tokens only arrive."""
        if self._tabled != (self.layout, self._base):
            starts, base = self.layout.offsets_on(self.device), self.layout.on(self._base, self.device)
            self._tables = starts.flatten(), base.flatten().to(torch.int32)
            self._tabled = (self.layout, self._base)
        return self._tables

    def _reserve(self, counts: int | Table, limit: int) -> None:
        if self.layout.uniform is not None and self._most(counts) <= self.layout.uniform:
            return
        needed = _plus(self.lengths, counts if isinstance(counts, tuple) else self.layout.with_each(counts))
        layout = self.layout.with_room(needed, limit)
        if layout == self.layout:
            return
        target = self._allocate(layout)
        self._copy_rows(list(range(self.layout.rows)), target, layout)
        self._settle(target, layout, self._base, self._added)

    def _most(self, counts: int | Table) -> int:
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

    def _write_tail(self, name: str, added: int, count: int, entries: Tensor | float) -> None:
        """Write `count` slots of every segment, from `added` behind its base length on."""
        if self.even:
            first = self._longest_base + added
            self._capacity_view(name)[:, :, first : first + count] = entries
            return
        if self._starts is None:
            self._starts = self.layout.offsets_on(self.device) + self.layout.on(self._base, self.device)
        newest = self._starts[..., None] + added + torch.arange(count, device=self.device)
        self.tensors[name][newest] = torch.as_tensor(entries, dtype=self.columns[name].dtype, device=self.device)

    def _write_segments(self, name: str, entries: Tensor, starts: Table, counts: Table) -> None:
        for row, sizes in enumerate(counts):
            for head, count in enumerate(sizes):
                first = self.layout.offsets[row][head] + starts[row][head]
                self.tensors[name][first : first + count] = entries[row, head, :count]

    def _settle(self, tensors: dict[str, Tensor], layout: Layout, base: Table, added: int = 0) -> None:
        """Take over new storage and lengths: `base` now, and as many more as later appends add to all segments."""
        known = self.layout is not layout and self.layout == layout
        self.tensors, self.layout = tensors, self.layout if known else layout  # what is known about it stays known
        self._nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        self._base, self._added = base, added
        self._measure()

    def _measure(self) -> None:
        lengths = {length for row in self._base for length in row}
        self.even = self.layout.uniform is not None and len(lengths) == 1
        self._longest_base = max(lengths, default=0)
        self._average_base = sum(map(sum, self._base)) / max(1, self.layout.rows * self.layout.heads)
        self._starts = None  # where the next slot of each segment is, computed when it is needed


def _positions_last(names: Iterable[str]) -> list[str]:
    """An entry is there once its position is."""
    return sorted(names, key=lambda name: name == POSITIONS)


def _plus(one: Table, other: Table) -> Table:
    return tuple(tuple(map(add, *rows)) for rows in zip(one, other, strict=True))


def _unfilled(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """New storage for the same columns."""
    return {name: tensor.new_empty((layout.slots, *tensor.shape[1:])) for name, tensor in tensors.items()}
