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
        layout = Layout.even(rows, heads, 0)
        self._settle(self._allocate(layout), layout, layout.capacity)

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
    def average(self) -> float:
        """Slots in use per (row, KV head)."""
        return self._average_base + self._added

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, as allocated."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

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
            longest = max(max(self._base[row]) for row in rows) + self._added
            dense = self._capacity_view(name)[:, :, :longest]
            return dense if list(rows) == list(range(self.layout.rows)) else dense[list(rows)]
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
        after = list(self.lengths)
        for row, counts in zip(rows, lengths, strict=True):
            after[row] = counts
        if any(n > c for ns, cs in zip(after, layout.capacity, strict=True) for n, c in zip(ns, cs, strict=True)):
            raise CacheError(f"{after} entries do not fit into {layout.capacity} slots")
        kept_rows = [row for row in range(self.layout.rows) if row not in set(rows)]
        in_place = layout == self.layout or (layout.slots == self.layout.slots and not kept_rows)
        target = self.tensors if in_place else self._allocate(layout)
        if layout != self.layout:
            self._copy_rows(kept_rows, target, layout)
        for name, tensor in entries.items():
            _write(target[name], layout, rows, tensor, lengths)
        if POSITIONS in self.columns:
            _clear_behind(target[POSITIONS], layout, rows, lengths)
        self._settle(target, layout, tuple(after))

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
        return _spread(self.tensors[name], self.layout, self.layout.uniform)

    def _row(self, tensor: Tensor, row: int) -> Tensor:
        start = self.layout.offsets[row][0]
        return tensor[start : start + sum(self.layout.capacity[row])]

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
            _write(target[name], layout, rows, self.padded(name, rows), lengths)

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
        self.tensors, self.layout = tensors, layout
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


def _spread(flat: Tensor, layout: Layout, capacity: int) -> Tensor:
    return flat.view(layout.rows, layout.heads, capacity, *flat.shape[1:])


def _write(target: Tensor, layout: Layout, rows: Sequence[int], entries: Tensor, lengths: Table) -> None:
    counts = {length for row in lengths for length in row}
    if layout.uniform is not None and len(counts) == 1 and len(rows) == layout.rows:
        length = counts.pop()
        _spread(target, layout, layout.uniform)[:, :, :length] = entries[:, :, :length]
        return
    for place, row in enumerate(rows):
        for head, length in enumerate(lengths[place]):
            start = layout.offsets[row][head]
            target[start : start + length] = entries[place, head, :length]


def _clear_behind(positions: Tensor, layout: Layout, rows: Sequence[int], lengths: Table) -> None:
    for place, row in enumerate(rows):
        for head, length in enumerate(lengths[place]):
            start, size = layout.offsets[row][head], layout.capacity[row][head]
            positions[start + length : start + size] = -1
