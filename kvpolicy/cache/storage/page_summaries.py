"""Page summaries: what a reader stores per page of keys."""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from kvpolicy.cache.state_contents import Contents, Described
from kvpolicy.cache.storage.kv_tensor import KVTensor
from kvpolicy.cache.storage.layout import Layout, PerSegment, per_segment
from kvpolicy.cache.storage.segment_index import RowSegments
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages import Format


class PageSummaries:
    """A store with one summary per complete page of each segment; empty without a format."""

    def __init__(self, form: Format | None, rows: int, heads: int, device: torch.device) -> None:
        self.form = form
        self.store = SlotStore(form.columns if form else {}, rows, heads, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, as allocated."""
        return self.store.nbytes

    def complete(self, keys: KVTensor, slots: SlotStore, limit: int) -> bool:
        """Add summaries of newly complete pages; returns whether there are any. `limit` bounds the storage in slots."""
        if self.form is None:
            return False
        size, num_pages, lengths = self.form.group_size, self.store.lengths, slots.lengths
        new_pages = per_segment(
            slots.layout.rows, slots.layout.heads, lambda b, k: lengths[b][k] // size - num_pages[b][k]
        )
        most_pages = max((max(row) for row in new_pages), default=0)
        if not most_pages:
            return False
        all_rows = RowSegments(range(slots.layout.rows))
        first = torch.tensor(num_pages, device=slots.device)[..., None] * size
        slot_indices = (first + torch.arange(most_pages * size, device=slots.device)).clamp(max=slots.longest - 1)
        positions = slots.padded(POSITIONS, all_rows.rows)
        vectors = keys.pick(all_rows, slot_indices, positions)
        self.store.extend(self.form.encode(vectors, positions.gather(2, slot_indices)), new_pages, limit // size)
        return True

    def summary(self, keys: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Columns of the complete pages of keys [rows, K, N, D], for `replace`."""
        if self.form is None:
            return {}
        length = keys.shape[2] // self.form.group_size * self.form.group_size
        return self.form.encode(keys[:, :, :length], positions[:, :, :length])

    def replace(self, rows: Sequence[int], columns: Mapping[str, Tensor], lengths: PerSegment, layout: Layout) -> None:
        """Replace the summaries of some rows, which have `lengths` entries, by `columns`."""
        if self.form is None:
            return
        size = self.form.group_size
        pages = tuple(tuple(length // size for length in row) for row in lengths)
        room = per_segment(layout.rows, layout.heads, lambda b, k: layout.capacity[b][k] // size)
        self.store.replace(rows, columns, pages, Layout(room))

    def selected(self, rows: Sequence[int]) -> Self:
        """Summaries of the given rows, in that order, in a new storage."""
        other = copy.copy(self)
        other.store = self.store.selected(rows)
        return other

    def describe(self) -> Described:
        """The state of the store."""
        return self.store.describe()

    def restore(self, contents: Contents) -> None:
        """Restore the state; the store has the same rows, which are empty."""
        self.store.restore(contents)

    def check_integrity(self, lengths: PerSegment) -> None:
        """Raise CacheError if there are summaries of more entries than a segment has."""
        self.store.check_integrity()
        if self.form and any(
            page_count * self.form.group_size > entry_count
            for page_counts, entry_counts in zip(self.store.lengths, lengths, strict=True)
            for page_count, entry_count in zip(page_counts, entry_counts, strict=True)
        ):
            raise CacheError(
                f"{self.store.lengths} pages of {self.form.group_size} entries, but only {lengths} entries"
            )
