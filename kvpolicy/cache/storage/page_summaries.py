"""What a reader keeps about pages of keys, beside the keys."""

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
    """A store of one item per complete page of each segment; without a format it stays empty."""

    def __init__(self, form: Format | None, rows: int, heads: int, device: torch.device) -> None:
        self.form = form
        self.store = SlotStore(form.columns if form else {}, rows, heads, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, as allocated."""
        return self.store.nbytes

    def complete(self, keys: KVTensor, slots: SlotStore, limit: int) -> bool:
        """Make the pages whose last entry has come, if any has; storage need not grow beyond `limit` slots."""
        if self.form is None:
            return False
        size, have, lengths = self.form.group_size, self.store.lengths, slots.lengths
        counts = per_segment(slots.layout.rows, slots.layout.heads, lambda b, k: lengths[b][k] // size - have[b][k])
        most = max((max(row) for row in counts), default=0)
        if not most:
            return False
        everything = RowSegments(range(slots.layout.rows))
        first = torch.tensor(have, device=slots.device)[..., None] * size
        places = (first + torch.arange(most * size, device=slots.device)).clamp(max=slots.longest - 1)
        positions = slots.padded(POSITIONS, everything.rows)
        vectors = keys.pick(everything, places, positions)
        self.store.extend(self.form.encode(vectors, positions.gather(2, places)), counts, limit // size)
        return True

    def summary(self, keys: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The columns of the complete pages of keys [rows, K, N, D]; for `replace`."""
        if self.form is None:
            return {}
        most = keys.shape[2] // self.form.group_size * self.form.group_size
        return self.form.encode(keys[:, :, :most], positions[:, :, :most])

    def replace(self, rows: Sequence[int], columns: Mapping[str, Tensor], lengths: PerSegment, layout: Layout) -> None:
        """Give some rows, with `lengths` entries, the pages in `columns`."""
        if self.form is None:
            return
        size = self.form.group_size
        pages = tuple(tuple(length // size for length in row) for row in lengths)
        room = per_segment(layout.rows, layout.heads, lambda b, k: layout.capacity[b][k] // size)
        self.store.replace(rows, columns, pages, Layout(room))

    def selected(self, rows: Sequence[int]) -> Self:
        """The pages of the rows named, in that order, in a storage of their own."""
        other = copy.copy(self)
        other.store = self.store.selected(rows)
        return other

    def describe(self) -> Described:
        """The state of their store."""
        return self.store.describe()

    def restore(self, contents: Contents) -> None:
        """Take the state that is written there; there are as many rows, and nothing in them."""
        self.store.restore(contents)

    def check_integrity(self, lengths: PerSegment) -> None:
        """Raise CacheError when there are pages of entries that are not held."""
        self.store.check_integrity()
        if self.form and any(
            n * self.form.group_size > t
            for ns, ts in zip(self.store.lengths, lengths, strict=True)
            for n, t in zip(ns, ts, strict=True)
        ):
            raise CacheError(
                f"{self.store.lengths} pages of {self.form.group_size} entries, but only {lengths} entries"
            )
