"""What the entries of one layer are held in: flat tensors, cut into a segment of slots per (row, KV head).

Segments may differ in capacity and in length, so heads and rows with different budgets take different amounts of
memory. When they are all alike the storage is an ordinary [B, K, capacity, ...] tensor, and is seen as such without a
copy. Slots behind a segment's length have position -1, if positions are among the columns.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy.cache.storage.layout import Layout, PerSegment
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages import Column


class Segmented:
    """Columns as they are held, one flat tensor each; knows nothing of scores, triggers or models."""

    def __init__(self, columns: Mapping[str, Column], rows: int, heads: int, device: torch.device) -> None:
        self.columns = dict(columns)
        self.device = device
        self.even = True  # all segments have the same length and capacity
        self._starts: Tensor | None = None
        self.forget_tables()
        self.layout = Layout.even(rows, heads, 0)
        self._adopt(self.allocate(self.layout), self.layout, self.layout.capacity)

    @property
    def lengths(self) -> PerSegment:
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
    def index_tensors(self) -> list[Tensor]:
        """Where segments begin and how long they are, as far as the device has been told."""
        return [*self._tables, *([] if self._starts is None else [self._starts])]

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
        if self.layout.uniform is not None and list(rows) == list(range(self.layout.rows)):
            return self.dense(name)
        longest = max(max(self._base[row]) for row in rows) + self._added
        if self.layout.uniform is not None:
            return self._capacity_view(name)[list(rows), :, :longest]
        starts, lengths = self._numbers(self.layout.offsets, rows), self._numbers(self.lengths, rows)
        places = torch.arange(longest, device=self.device)
        slots = (starts + places).clamp(max=self.layout.slots - 1)
        padded: Tensor = self.tensors[name].index_select(0, slots.flatten()).unflatten(0, slots.shape)
        return padded.where(places < lengths, -1) if name == POSITIONS else padded

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

    def _capacity_view(self, name: str) -> Tensor:
        if self.layout.uniform is None:
            raise CacheError("heads with different budgets have no common capacity")
        tensor = self.tensors[name]
        return tensor.view(*self._block, *tensor.shape[1:])

    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Starts and base lengths, [B·K]; nothing is copied to the device while tokens only arrive."""
        if self._tabled != (self.layout, self._base):
            starts, base = self.layout.offsets_on(self.device), self.layout.on(self._base, self.device)
            self._tables = starts.flatten(), base.flatten().to(torch.int32)
            self._tabled = (self.layout, self._base)
        return self._tables

    def _adopt(self, tensors: dict[str, Tensor], layout: Layout, base: PerSegment, added: int = 0) -> None:
        """Take over new storage and lengths: `base` now, and as many more as later appends add to all segments."""
        known = self.layout is not layout and self.layout == layout
        self.tensors, self.layout = tensors, self.layout if known else layout  # what is known about it stays known
        self._block = (layout.rows, layout.heads, layout.uniform or 0)  # asked for many times a token
        self._nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        self._base, self._added = base, added
        self._measure()

    def _measure(self) -> None:
        lengths = {length for row in self._base for length in row}
        self.even = self.layout.uniform is not None and len(lengths) == 1
        self._longest_base = max(lengths, default=0)
        self._average_base = sum(map(sum, self._base)) / max(1, self.layout.rows * self.layout.heads)
        self._starts = None  # where the next slot of each segment is, computed when it is needed
