"""The keys or the values of a layer: the oldest packed by a format, the newest as the model gave them."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import sub
from typing import Self

import attrs
import torch
from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.state_contents import Contents, Described, below, counts_of
from kvpolicy.cache.storage.layer_storage import DuePacking, KVReader
from kvpolicy.cache.storage.layout import Layout, PerSegment, per_segment
from kvpolicy.cache.storage.segment_index import RowSegments, SegmentIndex, SingleSegment
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.errors import CacheError, NonFiniteScoreWarning
from kvpolicy.plan.compress.finite import is_finite
from kvpolicy.stages import Column, Format, Geometry
from kvpolicy.stages.slots import take

_Decode = Callable[[Mapping[str, Tensor], Tensor], Tensor]
_As = Callable[[Tensor], Tensor]


@attrs.frozen(eq=False)
class PackedEntries:
    """The oldest entries of some rows, packed."""

    columns: Mapping[str, Tensor]  # [rows, K or 1, groups, ...]
    packed_lengths: PerSegment  # entries [rows][K] of which the columns count


class KVTensor(KVReader):
    """Two stores, one behind the other: `packed`, in groups of the format, and `residual`.

    Slots count through both. Once `pack` has been called, how many are packed follows from the length of a segment
    alone (`Format.packed_length`), unless something in it is NaN or infinite: from that group on its entries stay as
    the model gave them, until they are evicted. A format that packs nothing leaves the first store empty, and nothing
    is ever copied.
    """

    def __init__(
        self, name: str, form: Format, geometry: Geometry, dtype: torch.dtype, rows: int, device: torch.device
    ) -> None:
        self.name = name
        self.form = form
        self.packed = SlotStore(form.columns, rows, 1 if form.joint else geometry.kv_heads, device)
        self.residual = SlotStore({name: Column((geometry.head_dim,), dtype)}, rows, geometry.kv_heads, device)
        self._stuck: frozenset[tuple[int, int]] = frozenset()  # segments whose next group is not finite

    # -- what is held ------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of both storages, as allocated."""
        return self.packed.nbytes + self.residual.nbytes

    @property
    def is_plain(self) -> bool:
        """Whether nothing is packed."""
        return self.packed.longest == 0

    @property
    def packed_lengths(self) -> PerSegment:
        """Packed entries, [B][K]."""
        heads = self.residual.layout.heads
        return tuple(
            tuple(groups * self.form.group_size for groups in row) * (heads // len(row)) for row in self.packed.lengths
        )

    def packed_bounds(self, at: SegmentIndex) -> tuple[int, int]:
        if not self.packed.even:
            return super().packed_bounds(at)
        count = self.packed.longest * self.form.group_size
        return count, count

    def read(self, at: SegmentIndex, start: int, stop: int, positions: Tensor) -> Tensor:
        """Slots `start` (a multiple of the group size) to `stop` as [b, k, n, D]; `positions` [b, k, T] of all slots.

        What is not packed is a view.
        """
        return self._read(at, start, stop, positions, at.format_of(self.form).decode, _unchanged)

    def read_in_basis(self, at: SegmentIndex, start: int, stop: int, positions: Tensor, dtype: torch.dtype) -> Tensor:
        form = at.format_of(self.form)

        def decoded(columns: Mapping[str, Tensor], places: Tensor) -> Tensor:
            return form.decode_in_basis(columns, places, dtype)

        return self._read(at, start, stop, positions, decoded, lambda vectors: form.to_basis(vectors.to(dtype)))

    def segments_in_basis(
        self, segments: Sequence[SingleSegment], positions: Sequence[Tensor], dtype: torch.dtype
    ) -> Sequence[Tensor]:
        """What is packed is unpacked at once, where the format can."""
        packed_lengths = self.packed_lengths
        counts = [packed_lengths[at.row][at.head] for at in segments]
        form = None
        if any(counts) and not self.form.joint:
            form = self.form.of_entries([at.head for at in segments], counts)
        if form is None:
            return super().segments_in_basis(segments, positions, dtype)
        columns = {name: self._behind_each_other(self.packed, name, segments) for name in self.form.columns}
        places = torch.cat([own[:count] for own, count in zip(positions, counts, strict=True)])
        packed = form.decode_in_basis(columns, places[None, None], dtype)
        newest = self._behind_each_other(self.residual, self.name, segments)
        parts: Sequence[Tensor] = packed.split(counts, 2)
        if newest.shape[2]:
            left = [len(own) - count for own, count in zip(positions, counts, strict=True)]
            newest_parts = self.form.to_basis(newest.to(dtype)).split(left, 2)
            joined = torch.cat([part for pair in zip(parts, newest_parts, strict=True) for part in pair], 2)
            parts = joined.split([len(own) for own in positions], 2)
        return parts

    def _behind_each_other(self, store: SlotStore, name: str, segments: Sequence[SingleSegment]) -> Tensor:
        """A column of some segments as one, [1, 1, n, ...]."""
        return torch.cat([store.segment(name, at.row, at.head) for at in segments])[None, None]

    def _read(
        self, at: SegmentIndex, start: int, stop: int, positions: Tensor, decode: _Decode, as_decoded: _As
    ) -> Tensor:
        """As `read`, by a way to decode and one to bring to the same form what is not packed."""
        shortest, longest = self.packed_bounds(at)
        if shortest == longest:
            parts = [self._decoded(at, start, min(stop, longest), positions, decode)] if start < longest else []
            if stop > longest or not parts:
                newest = self.residual.part(self.name, at, max(0, start - longest), stop - longest)
                parts.append(as_decoded(newest))
            return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        residual = self.residual.block(self.name, at)
        first = torch.tensor(at.counts(self.packed_lengths), device=residual.device)[..., None]
        slots = torch.arange(start, stop, device=residual.device)
        newest = as_decoded(_taken(residual, slots - first))
        if start >= longest:
            return newest
        packed = self._decoded(at, start, min(stop, longest), positions, decode)
        packed = torch.nn.functional.pad(packed, (0, 0, 0, newest.shape[2] - packed.shape[2]))
        return torch.where((slots < first)[..., None], packed, newest)

    def _decoded(self, at: SegmentIndex, start: int, stop: int, positions: Tensor, decode: _Decode) -> Tensor:
        """Packed slots of the block; those that a shorter segment does not have hold anything finite."""
        first, last = start // self.form.group_size, -(-stop // self.form.group_size)
        columns = {name: self.packed.part(name, at, first, last) for name in self.form.columns}
        return decode(columns, positions[:, :, start:stop])

    def pick(self, at: SegmentIndex, slots: Tensor, positions: Tensor) -> Tensor:
        """The slots [b, k, n], all existing, as [b, k, n, D]; decodes their groups only. `positions` [b, k, T]."""
        residual = self.residual.block(self.name, at)
        if not self.packed_bounds(at)[1]:
            return take(residual, slots)
        first = torch.tensor(at.counts(self.packed_lengths), device=slots.device)[..., None]
        packed = self._picked(at, slots.minimum(first - 1).clamp(min=0), positions)
        return torch.where((slots < first)[..., None], packed, _taken(residual, slots - first))

    def _picked(self, at: SegmentIndex, slots: Tensor, positions: Tensor) -> Tensor:
        group_size, joint = self.form.group_size, self.form.joint
        wanted = slots.flatten(1)[:, None] if joint else slots
        # Only a host can look how many there are without making a device wait.
        most = None if wanted.device.type == "cpu" else min(wanted.shape[-1], self.packed.longest)
        groups, index = _distinct(wanted // group_size, most)
        columns = {name: take(self.packed.block(name, at), groups) for name in self.form.columns}
        inside = (groups[..., None] * group_size + torch.arange(group_size, device=slots.device)).flatten(2)
        inside = inside.clamp(max=positions.shape[2] - 1).expand(-1, positions.shape[1], -1)
        decoded = at.format_of(self.form).decode(columns, take(positions, inside))
        index = index * group_size + wanted % group_size
        return take(decoded, index.reshape(slots.shape))

    # -- how it changes ----------------------------------------------------------------------------------------

    def append(self, vectors: Tensor, limit: int) -> bool:
        """Add [B, K, q, D] behind all segments; their storage need not grow beyond `limit` slots.

        Says whether it has grown.
        """
        if self.form.columns and not self._stuck:
            limit = self.form.residual_capacity(limit)
        return self.residual.append({self.name: vectors}, limit)

    def due_packing(self, slots: SlotStore, positions: str) -> DuePacking | None:
        """What is to be packed, now that the segments are as long as those of `slots`; None when nothing is."""
        counts, most = self._due(slots) if self.form.columns else ((), 0)
        if not most:
            return None
        everything = range(slots.layout.rows)
        vectors = self.residual.padded(self.name, everything)[:, :, :most]
        places = self._places(slots.padded(positions, everything), most)
        return DuePacking(self.name, vectors, places, counts, self._sound(vectors))

    def pack(self, due: DuePacking, sound: Sequence[Sequence[int]], slots: SlotStore, limit: int) -> bool:
        """Pack what is due and `sound`, entries [B][K]; False when nothing is.

        Storage grows as if up to `limit` slots.
        """
        counts, everything = due.counts, range(slots.layout.rows)
        packing = self._packed(due.vectors, due.positions, counts, sound)
        stuck = _differing(everything, packing.packed_lengths, counts)
        if any(map(any, packing.packed_lengths)):
            self.packed.extend(
                packing.columns,
                self._groups(packing.packed_lengths),
                self.form.packed_length(limit) // self.form.group_size,
            )
            left = _less(self.residual.lengths, packing.packed_lengths)
            self.residual.drop_front(packing.packed_lengths, self._residual_layout(slots.layout, left))
        self._stuck |= stuck
        self._warn_of(stuck)
        return any(map(any, packing.packed_lengths))

    def _due(self, slots: SlotStore) -> tuple[PerSegment, int]:
        """Entries to be packed per segment, and the most of any."""
        if slots.even and self.packed.even and not self._stuck:
            count = self.form.packed_length(slots.longest) - self.packed.longest * self.form.group_size
            return (slots.layout.with_each(count), count) if count else ((), 0)
        lengths, packed_lengths = slots.lengths, self.packed_lengths

        def due(row: int, head: int) -> int:
            stuck = (row, head) in self._stuck
            return 0 if stuck else self.form.packed_length(lengths[row][head]) - packed_lengths[row][head]

        counts = per_segment(slots.layout.rows, slots.layout.heads, due)
        return counts, max((max(row) for row in counts), default=0)

    def _places(self, positions: Tensor, count: int) -> Tensor:
        """Positions [B, K, count] of the slots behind the packed ones."""
        if self.packed.even:
            start = self.packed.longest * self.form.group_size
            return positions[:, :, start : start + count]
        first = torch.tensor(self.packed_lengths, device=positions.device)[..., None]
        index = first + torch.arange(count, device=positions.device)
        return take(positions, index.clamp(max=positions.shape[2] - 1))

    def packing(
        self,
        rows: Sequence[int],
        kept: Tensor,
        vectors: Tensor,
        positions: Tensor,
        changed: Tensor | None,
        lengths: PerSegment,
        *,
        finite: bool,
    ) -> PackedEntries:
        """The entries [rows, K, N, D], `lengths` in each segment, that are in the slots `kept` [rows, K, N], packed.

        The host waits for where something is not finite, unless it is known that all is. Packed groups whose entries
        stay together, none of them `changed`, are moved bit for bit.
        """
        if not self.form.columns:
            return PackedEntries({}, ())
        due = self._due_lengths(lengths)
        most = max((count for row in due for count in row), default=0)
        vectors = vectors[:, :, :most]
        sound = due if finite or not most else self._sound(vectors).tolist()
        packing = self._packed(vectors, positions[:, :, :most], due, sound)
        if self.is_plain or not most:
            return packing
        stay, source = self._staying(rows, kept[:, :, :most], None if changed is None else changed[:, :, :most])
        columns = {name: self._moved(name, rows, stay, source, new) for name, new in packing.columns.items()}
        return attrs.evolve(packing, columns=columns)

    def replace(
        self, rows: Sequence[int], packing: PackedEntries, vectors: Tensor, lengths: PerSegment, layout: Layout
    ) -> None:
        """Give some rows the entries [rows, K, N, D], of which `lengths` count, the oldest of them packed.

        `layout` is that of all slots.
        """
        if not self.form.columns:
            self._replace_residual(rows, vectors, lengths, layout)
            return
        self.packed.replace(rows, packing.columns, self._groups(packing.packed_lengths), self._packed_layout(layout))
        left = _less(lengths, packing.packed_lengths)
        newest = take(vectors, _following(packing.packed_lengths, left, vectors))
        self._replace_residual(rows, newest, left, layout)
        stuck, before = _differing(rows, packing.packed_lengths, self._due_lengths(lengths)), self._stuck
        self._forget(rows)
        self._stuck |= stuck
        self._warn_of(stuck - before)

    def keep(self, move: CompactionPlan, layout: Layout) -> None:
        """Reduce some rows to the slots that a move keeps, among them all that are packed."""
        self._forget(move.rows)
        if self.is_plain:
            self.residual.keep(move, self._residual_layout(layout, self._residual_lengths(move.rows, move.lengths)))
            return
        packed_lengths = RowSegments(move.rows).counts(self.packed_lengths)
        left = _less(move.lengths, packed_lengths)
        first = torch.tensor(packed_lengths, device=move.kept.device)[..., None]
        places = take(move.kept, _following(packed_lengths, left, move.kept)) - first
        self._replace_residual(move.rows, _taken(self.residual.padded(self.name, move.rows), places), left, layout)

    def _replace_residual(self, rows: Sequence[int], newest: Tensor, left: PerSegment, layout: Layout) -> None:
        self.residual.replace(
            rows, {self.name: newest}, left, self._residual_layout(layout, self._residual_lengths(rows, left))
        )

    def _residual_lengths(self, rows: Sequence[int], left: PerSegment) -> PerSegment:
        """Lengths of the residual once some rows have `left`."""
        after = list(self.residual.lengths)
        for row, counts in zip(rows, left, strict=True):
            after[row] = counts
        return tuple(after)

    def _due_lengths(self, lengths: Iterable[Iterable[int]]) -> PerSegment:
        """How many of the oldest entries are packed where all are finite."""
        return tuple(tuple(map(self.form.packed_length, row)) for row in lengths)

    def _staying(self, rows: Sequence[int], kept: Tensor, changed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Per new group, whether it is an old one, bool [rows, K or 1, groups], and which."""
        group_size = self.form.group_size
        slots = kept.unflatten(2, (-1, group_size))
        packed_lengths = torch.tensor(RowSegments(rows).counts(self.packed_lengths), device=kept.device)[..., None]
        follow = slots == slots[..., :1] + torch.arange(group_size, device=kept.device)
        stay = (
            follow.all(-1)
            & (slots[..., 0] % group_size == 0)
            & (slots[..., 0] >= 0)
            & (slots[..., -1] < packed_lengths)
        )
        if changed is not None:
            stay = stay & ~changed.unflatten(2, (-1, group_size)).any(-1)
        if self.form.joint:
            stay = (stay & (slots[..., 0] == slots[:, :1, :, 0])).all(1, keepdim=True)
            slots = slots[:, :1]
        return stay, slots[..., 0].clamp(min=0) // group_size

    def _moved(self, name: str, rows: Sequence[int], stay: Tensor, source: Tensor, new: Tensor) -> Tensor:
        old = self.packed.padded(name, rows)
        if not old.shape[2]:
            return new
        old = take(old, source.clamp(max=old.shape[2] - 1))
        return torch.where(stay.reshape(*stay.shape, *[1] * (new.ndim - 3)), old, new)

    def truncate(self, count: int) -> None:
        """Drop the newest `count` slots of every segment, none of which is packed."""
        self.residual.truncate(count)
        self._stuck = frozenset()

    def selected(self, rows: Sequence[int]) -> Self:
        """The rows named, in that order, in storages of their own."""
        other = copy.copy(self)
        other.packed, other.residual = self.packed.selected(rows), self.residual.selected(rows)
        heads = range(self.residual.layout.heads)
        places = ((new, old, head) for new, old in enumerate(rows) for head in heads)
        other._stuck = frozenset((new, head) for new, old, head in places if (old, head) in self._stuck)  # noqa: SLF001
        return other

    def describe(self) -> Described:
        """Its state: both stores, and the segments [n, 2] (row, head) in which nothing more is packed for now."""
        yield "stuck", counts_of(tuple(sorted(self._stuck))).reshape(-1, 2)
        yield from below("packed", self.packed.describe())
        yield from below("residual", self.residual.describe())

    def restore(self, contents: Contents) -> None:
        """Take the state that is written there; there are as many rows, and nothing in them."""
        stuck = contents.counts("stuck", (None, 2))
        self._stuck = frozenset(zip(stuck[::2], stuck[1::2], strict=True))
        self.packed.restore(contents.below("packed"))
        self.residual.restore(contents.below("residual"))

    def check_integrity(self, lengths: PerSegment) -> None:
        """Raise CacheError unless both stores together hold `lengths` entries, no more of them packed than are due."""
        self.packed.check_integrity()
        self.residual.check_integrity()
        counted = tuple(
            tuple(map(sum, zip(*pair, strict=True)))
            for pair in zip(self.packed_lengths, self.residual.lengths, strict=True)
        )
        if counted != lengths:
            raise CacheError(f"{self.name}: {counted} entries are held, expected {lengths}")
        due = self._due_lengths(lengths)
        if any(n > m for ns, ms in zip(self.packed_lengths, due, strict=True) for n, m in zip(ns, ms, strict=True)):
            raise CacheError(f"{self.name}: {self.packed_lengths} entries are packed, {due} are due")
        rows, heads = self.residual.layout.rows, self.residual.layout.heads
        if any(row >= rows or head >= heads for row, head in self._stuck):
            raise CacheError(f"{self.name}: segments that are not packed further are not among those held")

    # -- storage -----------------------------------------------------------------------------------------------

    def _sound(self, vectors: Tensor) -> Tensor:
        """How many of the oldest vectors [rows, K, n, D] are in groups before any that is not finite: [rows, K]."""
        group_size = self.form.group_size
        whole = is_finite(vectors).unflatten(2, (-1, group_size)).all(-1)
        if self.form.joint:
            whole = whole.all(1, keepdim=True).expand_as(whole)
        sound: Tensor = whole.cumprod(-1).sum(-1) * group_size
        return sound

    def _packed(
        self, vectors: Tensor, positions: Tensor, due: PerSegment, sound: Sequence[Sequence[int]]
    ) -> PackedEntries:
        """Vectors [rows, K, n, D] packed; of the entries that are `due` only those that are `sound`."""
        packed_lengths = tuple(tuple(map(min, *pair)) for pair in zip(sound, due, strict=True))
        if packed_lengths != due:
            vectors = vectors.masked_fill(~is_finite(vectors)[..., None], 0)
        return PackedEntries(self.form.encode(vectors, positions), packed_lengths)

    def _forget(self, rows: Sequence[int]) -> None:
        """What stands in some rows is other than it was: look anew when they are packed next."""
        self._stuck = frozenset(segment for segment in self._stuck if segment[0] not in rows)

    def _warn_of(self, stuck: frozenset[tuple[int, int]]) -> None:
        if stuck:
            which = ", ".join(map(str, sorted({row for row, _ in stuck})))
            message = f"{self.name} of row {which} are NaN or infinite: they, and what follows, are held unpacked"
            warnings.warn(message, NonFiniteScoreWarning, stacklevel=2)

    def _groups(self, entries: PerSegment) -> PerSegment:
        """Counts of entries as counts of groups, one a row where all heads are in one."""
        heads = 1 if self.form.joint else None
        return tuple(tuple(count // self.form.group_size for count in row[:heads]) for row in entries)

    def _packed_layout(self, layout: Layout) -> Layout:
        return Layout(self._groups(self._due_lengths(layout.capacity)))

    def _residual_layout(self, layout: Layout, lengths: PerSegment) -> Layout:
        """Room for what is not packed; more while a row waits for what a prompt brought to be packed."""
        if not self.form.columns:
            return layout
        if layout.uniform is not None:
            longest = max((max(row) for row in lengths), default=0)
            return Layout.even(layout.rows, layout.heads, max(self.form.residual_capacity(layout.uniform), longest))
        room = layout.capacity
        return Layout(
            per_segment(
                layout.rows, layout.heads, lambda b, k: max(self.form.residual_capacity(room[b][k]), lengths[b][k])
            )
        )


def _unchanged(vectors: Tensor) -> Tensor:
    return vectors


def _taken(residual: Tensor, places: Tensor) -> Tensor:
    """[b, k, n, D] at the places that exist; anything finite elsewhere."""
    residual = residual if residual.shape[2] else residual.new_zeros((*residual.shape[:2], 1, residual.shape[3]))
    return take(residual, places.clamp(0, residual.shape[2] - 1))


def _less(minuend: PerSegment, subtrahend: PerSegment) -> PerSegment:
    return tuple(tuple(map(sub, *rows)) for rows in zip(minuend, subtrahend, strict=True))


def _following(first: PerSegment, counts: PerSegment, among: Tensor) -> Tensor:
    """Slots [rows, K, n] of `among`, n the largest of `counts`, from `first` on; the last slot when there are fewer."""
    most = max(max(row) for row in counts)
    slots = torch.tensor(first, device=among.device)[..., None] + torch.arange(most, device=among.device)
    return slots.clamp(max=max(0, among.shape[2] - 1))


def _distinct(groups: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """The distinct numbers [b, k, m] among [b, k, n], the last one repeated, and where each of the n is among them.

    m is `most`, a bound of how many there are, or, if that is not given, how many there are: then the host waits.
    """
    order = groups.sort(-1)
    new = torch.ones_like(order.values, dtype=torch.bool)
    new[..., 1:] = order.values[..., 1:] != order.values[..., :-1]
    rank = new.cumsum(-1) - 1
    if most is None:
        most = int(rank.max()) + 1 if rank.numel() else 0
    distinct = order.values[..., -1:].expand(*groups.shape[:2], most).clone()
    distinct.scatter_(-1, rank, order.values)
    return distinct, torch.empty_like(rank).scatter_(-1, order.indices, rank)


def _differing(rows: Sequence[int], counts: PerSegment, other: PerSegment) -> frozenset[tuple[int, int]]:
    """Segments (row, head) of which two tables [rows][K] do not say the same."""
    pairs = zip(rows, counts, other, strict=True)
    return frozenset((row, head) for row, ns, ms in pairs for head, n in enumerate(ns) if n != ms[head])
