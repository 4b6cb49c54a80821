"""Entries in flat tensors, with a segment for each (row, KV head): the storage of a model's own cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.state_contents import Contents, Described, below
from kvpolicy.cache.storage.kv_tensor import KVTensor
from kvpolicy.cache.storage.layer_storage import DuePacking, LayerStorage, PaddedRows
from kvpolicy.cache.storage.layout import Layout, PerSegment
from kvpolicy.cache.storage.page_summaries import PageSummaries
from kvpolicy.cache.storage.segment_index import RowSegments, SegmentIndex, SingleSegment
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, Plan
from kvpolicy.stages import Entries
from kvpolicy.stages.slots import by_position, gather, indices_of, take

_PARTS = ("slots", "keys", "values", "page_summaries")
_SHARED = ("device", "columns", "_slack", "_ragged", "_never_packs")  # what follows from the plan alone
_BUCKET = 64  # slots: the copies of rows have a multiple of as many, so that several are equally long
_ROOM = 1024  # slots that a compaction may leave room for, however few entries stay


class SegmentedStorage(LayerStorage):
    """The store of what every slot carries, the keys, the values, and the reader's pages; one slot numbering."""

    keys: KVTensor
    values: KVTensor

    def __init__(self, plan: Plan, ordinal: int, rows: int, device: torch.device) -> None:
        geometry, forms = plan.geometry, plan.formats[ordinal]
        self.device, self.columns = device, plan.columns
        self.slots = SlotStore(plan.columns, rows, geometry.kv_heads, device)
        self.keys = KVTensor("keys", forms.keys, geometry, plan.dtype, rows, device)
        self.values = KVTensor("values", forms.values, geometry, plan.dtype, rows, device)
        self.page_summaries = PageSummaries(plan.page_formats[ordinal], rows, geometry.kv_heads, device)
        self._slack, self._ragged = plan.budgets.slack, plan.ragged
        self._never_packs = not (forms.keys.columns or forms.values.columns)

    @property
    def rows(self) -> int:
        return self.slots.layout.rows

    @property
    def heads(self) -> int:
        return self.slots.layout.heads

    @property
    def lengths(self) -> PerSegment:
        return self.slots.lengths

    @property
    def capacities(self) -> PerSegment:
        return self.slots.layout.capacity

    @property
    def longest(self) -> int:
        return self.slots.longest

    @property
    def average(self) -> float:
        return self.slots.average

    @property
    def fullest(self) -> int:
        return self.slots.fullest

    @property
    def is_plain(self) -> bool:
        return self._never_packs or (self.keys.is_plain and self.values.is_plain)

    @property
    def is_even(self) -> bool:
        return self.slots.even

    @property
    def is_block(self) -> bool:
        return self.slots.layout.uniform is not None

    def column(self, name: str, at: SegmentIndex) -> Tensor:
        return self.slots.block(name, at)

    @property
    def packed_keys(self) -> Mapping[str, Tensor]:
        return {name: self.keys.packed.block(name, self.everything) for name in self.keys.form.columns}

    @property
    def pages(self) -> Mapping[str, Tensor]:
        store = self.page_summaries.store
        return {name: store.block(name, self.everything) for name in store.columns}

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.keys.nbytes + self.values.nbytes + self.page_summaries.nbytes

    @property
    def stores(self) -> tuple[SlotStore, ...]:
        """All stores, for whoever moves whole tensors."""
        keys, values = self.keys, self.values
        packed = (keys.packed, values.packed, self.page_summaries.store)
        return self.slots, keys.residual, values.residual, *packed

    @property
    def plain_stores(self) -> tuple[SlotStore, ...]:
        """Those in which an entry stands in its slot, as long as nothing is packed."""
        return self.keys.residual, self.values.residual, self.slots

    @property
    def index_tensors(self) -> Sequence[Tensor]:
        return [tensor for store in self.stores for tensor in store.index_tensors]

    def positions(self, row: int, head: int) -> Tensor:
        return self.slots.segment(POSITIONS, row, head)

    def all_states(self) -> tuple[Tensor, Tensor]:
        """Without a copy."""
        return self.keys.residual.dense(self.keys.name), self.values.residual.dense(self.values.name)

    def padded_rows(self, most: int) -> Sequence[PaddedRows]:
        keys = self.keys.residual
        longest = most // keys.columns[self.keys.name].shape[0]
        alike: dict[tuple[int, bool], list[int]] = {}
        for row, (most_held, least_held) in enumerate(keys.extremes):
            differ = most_held > least_held  # rows whose heads do not differ are computed as where those of no row do
            length = -(-most_held // _BUCKET) * _BUCKET if differ else most_held
            if length <= longest:
                alike.setdefault((length, differ), []).append(row)
        return [self._padded_rows(rows, length, differ=differ) for (length, differ), rows in alike.items()]

    def _padded_rows(self, rows: Sequence[int], length: int, *, differ: bool) -> PaddedRows:
        keys = self.keys.residual
        slots, in_use = keys.slots_of(rows, length, differ=differ)

        def copied(store: SlotStore, name: str) -> Tensor:
            alike = store.layout == keys.layout
            return store.copied(name, slots if alike else store.slots_of(rows, length, differ=differ)[0])

        votes = copied(self.slots, LOG_VOTES) if LOG_VOTES in self.columns else None
        values = copied(self.values.residual, self.values.name)
        return PaddedRows(rows, copied(keys, self.keys.name), values, in_use, votes)

    def check_integrity(self) -> None:
        self.slots.check_integrity()
        self.keys.check_integrity(self.slots.lengths)
        self.values.check_integrity(self.slots.lengths)
        self.page_summaries.check_integrity(self.slots.lengths)

    # -- effects on all rows -----------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, limit: int) -> bool:
        grown = self.keys.append(keys, limit), self.values.append(values, limit)
        return self.slots.append({POSITIONS: positions}, limit) or any(grown)

    def replace_newest_positions(self, positions: Tensor) -> None:
        self.slots.overwrite_newest(POSITIONS, positions)

    def truncate(self, count: int) -> None:
        self.keys.truncate(count)
        self.values.truncate(count)
        self.slots.truncate(count)

    def due_packing(self) -> Sequence[DuePacking]:
        due = (part.due_packing(self.slots, POSITIONS) for part in (self.keys, self.values))
        return [one for one in due if one is not None]

    def pack(self, due: Sequence[DuePacking], sound: Sequence[Sequence[Sequence[int]]], limit: int) -> bool:
        if not due and self.page_summaries.form is None:
            return False
        parts = {part.name: part for part in (self.keys, self.values)}
        done = [self.page_summaries.complete(self.keys, self.slots, limit)]  # before keys are packed
        done += [parts[one.name].pack(one, counts, self.slots, limit) for one, counts in zip(due, sound, strict=True)]
        return any(done)

    def sort_by_position(self) -> None:
        slots = by_position(self.slots.padded(POSITIONS, self.everything.rows))
        for store in self.plain_stores:
            columns = {name: take(store.padded(name, self.everything.rows), slots) for name in store.columns}
            store.write(self.everything.rows, columns)

    # -- effects on some rows ----------------------------------------------------------------------------------

    def write_column(self, name: str, at: SegmentIndex, values: Tensor) -> None:
        if isinstance(at, SingleSegment) or (self.is_block and at.rows == self.everything.rows):
            column = self.slots.block(name, at)
            (column if column.shape == values.shape else column[:, :, : values.shape[2]]).copy_(values)
        else:
            self.slots.write(at.rows, {name: values})

    def evict(self, compaction: CompactionPlan, limit: int) -> None:
        if not self.packs:
            self._keep(compaction, self.layout_after(compaction, limit))
            return
        positions = self.slots.padded(POSITIONS, compaction.rows)
        at, gone = RowSegments(compaction.rows), (compaction.kept < 0)[..., None]
        slots = compaction.kept.clamp(min=0)
        keys, values = (part.pick(at, slots, positions).masked_fill(gone, 0) for part in (self.keys, self.values))
        self.replace(compaction, Entries(keys, values), {}, limit)

    def replace(self, compaction: CompactionPlan, entries: Entries, fresh: Mapping[str, Tensor], limit: int) -> None:
        rows, kept, lengths = compaction.rows, compaction.kept, compaction.lengths
        layout = self.layout_after(compaction, limit)
        if entries.log_votes is not None:
            fresh = {**fresh, LOG_VOTES: entries.log_votes}
        moved = {name: gather(self.slots.padded(name, rows), kept) for name in self.columns if name not in fresh}
        columns = {**moved, **fresh}
        keys, values = (
            part.packing(rows, kept, vectors, columns[POSITIONS], entries.changed, lengths, finite=compaction.finite)
            for part, vectors in ((self.keys, entries.keys), (self.values, entries.values))
        )
        pages = self.page_summaries.summary(entries.keys, columns[POSITIONS])
        self.keys.replace(rows, keys, entries.keys, lengths, layout)
        self.values.replace(rows, values, entries.values, lengths, layout)
        self.page_summaries.replace(rows, pages, lengths, layout)
        self.slots.replace(rows, columns, lengths, layout)

    def drop_pads(self, limit: int) -> None:
        rows = self.everything.rows
        compaction = CompactionPlan(rows, indices_of(self.slots.padded(POSITIONS, rows) >= 0))
        self._keep(compaction, self.layout_after(compaction, limit))

    def layout_after(self, compaction: CompactionPlan, limit: int) -> Layout:
        """How all segments are laid out once some rows have been reduced: with room for the tokens that come next."""
        lengths = list(self.slots.lengths)
        for row, counts in zip(compaction.rows, compaction.lengths, strict=True):
            lengths[row] = counts
        longest = max(max(row) for row in lengths)
        slack = min(self._slack, max(longest, _ROOM))  # storage follows the tokens, whatever `every` says
        if self._ragged:
            return Layout(tuple(_with_room(row, slack, limit) for row in lengths))
        return Layout.even(len(lengths), len(lengths[0]), max(longest, min(longest + slack, limit)))

    @property
    def packs(self) -> bool:
        """Whether anything is ever held that is made of several entries."""
        return bool(self.keys.form.columns or self.values.form.columns or self.page_summaries.form)

    def _keep(self, compaction: CompactionPlan, layout: Layout) -> None:
        """Reduce some rows to the slots that are kept, among them all that are packed; nothing else changes."""
        self.keys.keep(compaction, layout)
        self.values.keep(compaction, layout)
        self.slots.keep(compaction, layout)

    # -- copies ------------------------------------------------------------------------------------------------

    def selected(self, rows: Sequence[int]) -> "SegmentedStorage":
        return self._made_of({name: getattr(self, name).selected(rows) for name in _PARTS})

    def _made_of(self, parts: Mapping[str, Any]) -> "SegmentedStorage":
        """A storage of the same plan with these parts."""
        other = object.__new__(SegmentedStorage)
        vars(other).update({name: vars(self)[name] for name in _SHARED}, **parts)
        return other

    def describe(self) -> Described:
        for name in _PARTS:
            yield from below(name, getattr(self, name).describe())

    def restore(self, contents: Contents) -> None:
        for name in _PARTS:
            getattr(self, name).restore(contents.below(name))


def _with_room(lengths: Sequence[int], slack: int, limit: int) -> tuple[int, ...]:
    """Capacities of a row whose heads differ; one that has not been compressed just now has used some of its slack."""
    room = min(slack, max(0, limit * len(lengths) - sum(lengths)) // len(lengths))
    return tuple(length + room for length in lengths)
