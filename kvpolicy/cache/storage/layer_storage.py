"""All that one layer holds: what a slot carries, and the keys and values that stand in it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.state_contents import Contents, Described, below
from kvpolicy.cache.storage.kv_tensor import KVTensor
from kvpolicy.cache.storage.layout import Layout
from kvpolicy.cache.storage.page_summaries import PageSummaries
from kvpolicy.cache.storage.segment_index import RowSegments
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, Plan
from kvpolicy.stages import Entries
from kvpolicy.stages.slots import gather

_PARTS = ("slots", "keys", "values", "pages")


class LayerStorage:
    """The store of what every slot carries, the halves of the entries, and the reader's pages; one slot numbering."""

    def __init__(self, plan: Plan, ordinal: int, rows: int, device: torch.device) -> None:
        geometry, forms = plan.geometry, plan.formats[ordinal]
        self.slots = SlotStore(plan.columns, rows, geometry.kv_heads, device)
        self.keys = KVTensor("keys", forms.keys, geometry, plan.dtype, rows, device)
        self.values = KVTensor("values", forms.values, geometry, plan.dtype, rows, device)
        self.pages = PageSummaries(plan.page_formats[ordinal], rows, geometry.kv_heads, device)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, as allocated."""
        return self.slots.nbytes + self.keys.nbytes + self.values.nbytes + self.pages.nbytes

    @property
    def index_tensors(self) -> list[Tensor]:
        """Where segments begin and how long they are, as far as a device has been told."""
        stores = (
            self.slots,
            self.keys.packed,
            self.keys.residual,
            self.values.packed,
            self.values.residual,
            self.pages.store,
        )
        return [tensor for store in stores for tensor in store.index_tensors]

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are all held as the model gave them."""
        return self.keys.is_plain and self.values.is_plain

    @property
    def everything(self) -> RowSegments:
        """All rows."""
        return RowSegments(range(self.slots.layout.rows))

    def stored(self) -> tuple[Tensor, Tensor]:
        """All keys and values [B, K, T, D], without a copy; nothing may be packed yet, and heads must be alike."""
        return self.keys.residual.dense(self.keys.name), self.values.residual.dense(self.values.name)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, limit: int) -> None:
        """Add [B, K, q, D] and positions [B, K, q] behind all segments; the other columns get their fill."""
        self.keys.append(keys, limit)
        self.values.append(values, limit)
        self.slots.append({POSITIONS: positions}, limit)

    def pack(self, limit: int) -> bool:
        """Pack what is due and complete pages; False when there was nothing to do."""
        paged = self.pages.complete(self.keys, self.slots, limit)
        keys = self.keys.pack(self.slots, POSITIONS, limit)
        return self.values.pack(self.slots, POSITIONS, limit) or keys or paged

    def replace(
        self,
        move: CompactionPlan,
        entries: Entries,
        fresh: Mapping[str, Tensor],
        layout: Layout,
    ) -> None:
        """Give the rows of a move `entries`, which stood in the slots that it keeps, and pack what is due.

        `fresh` are new values of columns; the others move with their entries.
        """
        rows, kept, lengths = move.rows, move.kept, move.lengths
        if entries.log_votes is not None:
            fresh = {**fresh, LOG_VOTES: entries.log_votes}
        moved = {name: gather(self.slots.padded(name, rows), kept) for name in self.slots.columns if name not in fresh}
        columns = {**moved, **fresh}
        halves = ((self.keys, entries.keys), (self.values, entries.values))
        keys, values = (
            half.packing(rows, kept, vectors, columns[POSITIONS], entries.changed, lengths) for half, vectors in halves
        )
        pages = self.pages.summary(entries.keys, columns[POSITIONS])
        self.keys.replace(rows, keys, entries.keys, lengths, layout)
        self.values.replace(rows, values, entries.values, lengths, layout)
        self.pages.replace(rows, pages, lengths, layout)
        self.slots.replace(rows, columns, lengths, layout)

    def evict(self, move: CompactionPlan, layout: Layout) -> None:
        """Reduce some rows to the slots that a move keeps, entries as they are."""
        if not self._packs:
            self.keep(move, layout)
            return
        positions = self.slots.padded(POSITIONS, move.rows)
        at, gone = RowSegments(move.rows), (move.kept < 0)[..., None]
        keys, values = (
            half.pick(at, move.kept.clamp(min=0), positions).masked_fill(gone, 0) for half in (self.keys, self.values)
        )
        self.replace(move, Entries(keys, values), {}, layout)

    @property
    def _packs(self) -> bool:
        """Whether anything is ever held that is made of several entries."""
        return bool(self.keys.form.columns or self.values.form.columns or self.pages.form)

    def keep(self, move: CompactionPlan, layout: Layout) -> None:
        """Reduce some rows to the slots that a move keeps, among them all that are packed; nothing else changes."""
        self.keys.keep(move, layout)
        self.values.keep(move, layout)
        self.slots.keep(move, layout)

    def truncate(self, count: int) -> None:
        """Drop the newest `count` slots of every segment, none of which may be packed."""
        self.keys.truncate(count)
        self.values.truncate(count)
        self.slots.truncate(count)

    def selected(self, rows: Sequence[int]) -> Self:
        """The entries of the rows named, in that order, in storages of their own."""
        other = copy.copy(self)
        for name in _PARTS:
            setattr(other, name, getattr(self, name).selected(rows))
        return other

    def describe(self) -> Described:
        """The state of all stores."""
        for name in _PARTS:
            yield from below(name, getattr(self, name).describe())

    def restore(self, contents: Contents) -> None:
        """Take the state that is written there; there are as many rows, and nothing in them."""
        for name in _PARTS:
            getattr(self, name).restore(contents.below(name))

    def check_integrity(self) -> None:
        """Raise CacheError unless all parts agree on what is held."""
        self.slots.check_integrity()
        self.keys.check_integrity(self.slots.lengths)
        self.values.check_integrity(self.slots.lengths)
        self.pages.check_integrity(self.slots.lengths)
