"""What a layer's cache, attention and the compression step need of the place where entries are held.

Each method states its effect. Nothing here says how slots are laid out: `SegmentedStorage` has a segment of one flat
tensor for every (row, KV head); a serving engine has pages of a pool that all requests share.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.state_contents import Contents, Described
from kvpolicy.cache.storage.layout import PerSegment
from kvpolicy.cache.storage.segment_index import RowSegments, SegmentIndex, SingleSegment
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages import Column, Entries, Format


@attrs.frozen(eq=False)
class DuePacking:
    """The oldest keys or values that are not packed yet and are to be, of all segments."""

    name: str  # of what they are
    vectors: Tensor  # [B, K, n, D]
    positions: Tensor  # [B, K, n]
    counts: PerSegment  # how many are due, [B][K]
    sound: Tensor  # int64 [B, K], how many stand in groups in front of any that is not finite


@attrs.frozen(eq=False)
class PaddedRows:
    """What the heads of some rows hold: copies [b, K, T, ...], shorter heads padded by numbers of their own."""

    rows: Sequence[int]
    keys: Tensor  # [b, K, T, D]
    values: Tensor
    in_use: Tensor | None  # bool [b, K, T], None where all heads of each row are equally long
    log_votes: Tensor | None  # [b, K, T], where there are any


class KVReader(abc.ABC):
    """The keys or the values of a layer, read by slot. Reading has no effect."""

    form: Format

    @property
    @abc.abstractmethod
    def is_plain(self) -> bool:
        """Whether nothing is packed."""

    @property
    @abc.abstractmethod
    def packed_lengths(self) -> PerSegment:
        """How many of the oldest entries are packed, [B][K]."""

    def packed_bounds(self, at: SegmentIndex) -> tuple[int, int]:
        """How many of the oldest entries are packed at least, and at most, in the segments of a block."""
        counts = [count for row in at.counts(self.packed_lengths) for count in row]
        return min(counts, default=0), max(counts, default=0)

    @abc.abstractmethod
    def read(self, at: SegmentIndex, start: int, stop: int, positions: Tensor) -> Tensor:
        """Slots `start` (a multiple of the group size) to `stop` as [b, k, n, D]; `positions` [b, k, T] of all slots.

        Slots behind the entries of a segment hold finite numbers.
        """

    def read_in_basis(self, at: SegmentIndex, start: int, stop: int, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What `read` gives in the basis of the format (`Format.to_basis`), in `dtype`, at least float32."""
        return at.format_of(self.form).to_basis(self.read(at, start, stop, positions).to(dtype))

    def segments_in_basis(
        self, segments: Sequence[SingleSegment], positions: Sequence[Tensor], dtype: torch.dtype
    ) -> Sequence[Tensor]:
        """Of each of several segments all entries, [1, 1, T, D], as `read_in_basis` gives them.

        `positions` [T] are those of the entries of each.
        """
        pairs = zip(segments, positions, strict=True)
        return [self.read_in_basis(at, 0, len(own), own[None, None], dtype) for at, own in pairs]

    @abc.abstractmethod
    def pick(self, at: SegmentIndex, slots: Tensor, positions: Tensor) -> Tensor:
        """The slots [b, k, n], all existing, as [b, k, n, D]; `positions` [b, k, T] of all slots."""


class LayerStorage(abc.ABC):
    """The entries of one layer: B rows of K KV heads, each with as many slots as it has entries.

    A slot carries a key, a value, and one item of every column (`POSITIONS`, votes, state of plugins). Entries of a
    head stand in slots 0 to its length - 1, and in ascending order of position unless a compaction `fills`.
    """

    device: torch.device
    columns: Mapping[str, Column]
    is_fixed: ClassVar[bool] = False  # whether steps of fixed shapes write to it, whose device knows the lengths
    keys: KVReader
    values: KVReader

    # -- what is held, without effect --------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """B."""

    @property
    @abc.abstractmethod
    def heads(self) -> int:
        """K."""

    @property
    @abc.abstractmethod
    def lengths(self) -> PerSegment:
        """Entries [B][K], known to the host."""

    @property
    @abc.abstractmethod
    def capacities(self) -> PerSegment:
        """Entries for which there is room [B][K], without further storage."""

    @property
    @abc.abstractmethod
    def longest(self) -> int:
        """The largest of the lengths."""

    @property
    @abc.abstractmethod
    def average(self) -> float:
        """The mean of the lengths."""

    @property
    def fullest(self) -> int:
        """Entries of all heads of the row that has the most."""
        return max(map(sum, self.lengths), default=0)

    @property
    @abc.abstractmethod
    def is_even(self) -> bool:
        """Whether all lengths are the same."""

    @property
    @abc.abstractmethod
    def is_block(self) -> bool:
        """Whether all segments can be read as one block of columns [B, K, T, ...], the shorter ones padded."""

    @abc.abstractmethod
    def column(self, name: str, at: SegmentIndex) -> Tensor:
        """A column as [b, k, T, ...], T the longest length of the block; behind a segment's length positions are -1.

        May be a view or a copy: it is written to by `write_column` alone.
        """

    @property
    def packed_keys(self) -> Mapping[str, Tensor]:
        """Columns of the packed keys of all rows, [B, K or 1, groups, ...]; none where nothing is ever packed."""
        return {}

    @property
    def pages(self) -> Mapping[str, Tensor]:
        """What the reader keeps about each complete page of keys, [B, K, pages, ...]; none where it keeps nothing."""
        return {}

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes of all storages, as allocated."""

    @property
    def index_tensors(self) -> Sequence[Tensor]:
        """Tensors that say where slots are, as far as a device has been told."""
        return ()

    @abc.abstractmethod
    def check_integrity(self) -> None:
        """Raise CacheError unless all parts agree on what is held."""

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are all held as the model gave them."""
        return self.keys.is_plain and self.values.is_plain

    @property
    def everything(self) -> RowSegments:
        """All rows."""
        return RowSegments(range(self.rows))

    def positions(self, row: int, head: int) -> Tensor:
        """Positions [length] of a head's entries."""
        return self.column(POSITIONS, RowSegments([row]))[0, head, : self.lengths[row][head]]

    def all_states(self) -> tuple[Tensor, Tensor]:
        """All keys and values [B, K, T, D]; nothing may be packed yet, and lengths must be even."""
        positions = self.column(POSITIONS, self.everything)
        count = positions.shape[2]
        keys, values = (part.read(self.everything, 0, count, positions) for part in (self.keys, self.values))
        return keys, values

    def padded_rows(self, most: int) -> Sequence[PaddedRows]:
        """Copies of what rows hold that have at most `most` numbers of keys for each head.

        Nothing may be packed, and no pads be held. What the copy of a row is like depends on that row alone: rows with
        copies of the same length are together, but those whose heads differ apart from those whose heads do not.
        """
        del most  # of a storage whose segments can be read as one block
        return ()

    # -- effects on all rows -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def append(self, keys: Tensor, values: Tensor, positions: Tensor, limit: int) -> bool:
        """Add [B, K, q, D] and positions [B, K, q] behind all segments; the other columns get their fill.

        Storage need not grow beyond `limit` slots a head, unless the entries need it. Says whether it has grown.
        """

    @abc.abstractmethod
    def replace_newest_positions(self, positions: Tensor) -> None:
        """Give the newest q slots of every segment other positions, [B, K, q]; -1 marks a pad."""

    @abc.abstractmethod
    def truncate(self, count: int) -> None:
        """Drop the newest `count` slots of every segment, none of which may be packed."""

    def due_packing(self) -> Sequence[DuePacking]:
        """What is to be packed."""
        return ()

    def pack(self, due: Sequence[DuePacking], sound: Sequence[Sequence[Sequence[int]]], limit: int) -> bool:
        """Pack what is due, and complete pages; False when there was nothing to do.

        `sound` says what the device has counted of each that is due. Storage grows as if up to `limit` slots a head.
        """
        del due, sound, limit  # of a storage that packs nothing
        return False

    @abc.abstractmethod
    def sort_by_position(self) -> None:
        """Let the entries of every segment stand in ascending order of position; none may be packed."""

    # -- effects on some rows ----------------------------------------------------------------------------------

    @abc.abstractmethod
    def write_column(self, name: str, at: SegmentIndex, values: Tensor) -> None:
        """Overwrite a column of a block of segments by [b, k, n, ...]: its first n slots, which are all that are read.

        Items behind the entries of a segment are ignored.
        """

    @abc.abstractmethod
    def evict(self, compaction: CompactionPlan, limit: int) -> None:
        """Reduce some rows to the slots that are kept, entries as they are; then pack what is due."""

    @abc.abstractmethod
    def replace(self, compaction: CompactionPlan, entries: Entries, fresh: Mapping[str, Tensor], limit: int) -> None:
        """Give some rows `entries`, which stood in the slots that are kept, and pack what is due.

        `fresh` are new values of columns [rows, K, N]; the others move with their entries.
        """

    @abc.abstractmethod
    def drop_pads(self, limit: int) -> None:
        """Drop every slot whose position is -1, none of which may be packed."""

    # -- copies ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def selected(self, rows: Sequence[int]) -> "LayerStorage":
        """The entries of the rows named, in that order, in a storage of its own; a row may be named more than once."""

    @abc.abstractmethod
    def describe(self) -> Described:
        """Its state, as named tensors and numbers."""

    @abc.abstractmethod
    def restore(self, contents: Contents) -> None:
        """Take the state that is written there; there are as many rows, and nothing in them."""
