"""What one attention call reads of a layer: all that is held, or the slots that a reader chose."""

from collections.abc import Iterator
from functools import cached_property
from math import lcm

import attrs
import torch
from torch import Tensor

from kvpolicy.cache.storage.layer_storage import KVReader, LayerStorage
from kvpolicy.cache.storage.segment_index import SegmentIndex, SingleSegment
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.stages.slots import gather

# Where nothing is packed: only how an entry is unpacked may depend on its position.
NO_POSITIONS = torch.empty(0, dtype=torch.int32)


@attrs.frozen(eq=False)
class AttendedSlots:
    """A block of segments [b, k] and T of their slots."""

    storage: LayerStorage
    at: SegmentIndex
    slots: Tensor | None = None  # [b, k, T] chosen slots, ascending, -1 behind; None = all
    unseen: int = 0  # newest slots of every segment that are left out
    clears: bool = False  # whether empty slots are read as 0: a kernel leaves in them what it evicts, maybe NaN

    def seen_before(self, newest: int) -> "AttendedSlots":
        """What a query sees that has `newest` tokens of its own forward behind it; all, where that saves nothing."""
        if newest == self.unseen:
            return self
        alike = self.slots is None and (self.storage.is_even or isinstance(self.at, SingleSegment))
        return attrs.evolve(self, unseen=newest) if alike else self

    @cached_property
    def heads(self) -> int:
        """K, of the block."""
        return 1 if isinstance(self.at, SingleSegment) else self.storage.heads

    @cached_property
    def length(self) -> int:
        """T."""
        if self.slots is not None:
            return self.slots.shape[2]
        return self.storage.longest - self.unseen if self.storage.is_even else self._everywhere.shape[2]

    @cached_property
    def _everywhere(self) -> Tensor:
        return self.column(POSITIONS)

    @cached_property
    def positions(self) -> Tensor:
        """[b, k, T]; -1 = nothing there."""
        if self.slots is None:
            return self._everywhere
        return gather(self._everywhere, self.slots).masked_fill(self.slots < 0, -1)

    @property
    def all_votes(self) -> Tensor | None:
        """Log-votes [b, k, all] float32 of all slots in use."""
        return self.column(LOG_VOTES) if LOG_VOTES in self.storage.columns else None

    @cached_property
    def log_votes(self) -> Tensor | None:
        """Log-votes [b, k, T] float32."""
        votes = self.all_votes
        return votes if votes is None or self.slots is None else gather(votes, self.slots)

    def blocks(self, most: int, *states: KVReader) -> Iterator[slice]:
        """The T slots in blocks of about `most` that can be read by themselves, of all `states`; one when all is plain.

        Where packed entries end, so does a block, if that saves putting numbers of both kinds together.
        """
        if self.storage.is_plain:
            yield slice(0, self.length)
            return
        group = lcm(*(read.form.group_size for read in states))
        size = max(1, most // group) * group
        packed = min(read.packed_bounds(self.at)[0] for read in states)
        end = packed if self.slots is None and packed % group == 0 else 0
        for first, last in ((0, end), (end, self.length)):
            for start in range(first, last, size):
                yield slice(start, min(start + size, last))

    def keys(self, block: slice) -> Tensor:
        """[b, k, n, D]."""
        return self._read(self.storage.keys, block, None)

    def values(self, block: slice) -> Tensor:
        """[b, k, n, Dv]."""
        return self._read(self.storage.values, block, None)

    # In the bases in which codes are read. What a reader chose is read in that of the model.

    def queries_to_basis(self, queries: Tensor) -> Tensor:
        """Queries [b, k, n, D] in the basis of `keys_in_basis`."""
        if self.slots is not None:
            return queries
        return self.at.format_of(self.storage.keys.form).queries_to_basis(queries)

    def keys_in_basis(self, block: slice, dtype: torch.dtype) -> Tensor:
        """[b, k, n, D] in `dtype`, at least float32."""
        return self._read(self.storage.keys, block, dtype)

    def values_in_basis(self, block: slice, dtype: torch.dtype) -> Tensor:
        """[b, k, n, Dv] in `dtype`, at least float32."""
        return self._read(self.storage.values, block, dtype)

    def from_basis(self, outputs: Tensor) -> Tensor:
        """Sums [b, k, n, Dv] of `values_in_basis` in the basis of the model."""
        if self.slots is not None:
            return outputs
        return self.at.format_of(self.storage.values.form).from_basis(outputs)

    def _read(self, states: KVReader, block: slice, dtype: torch.dtype | None) -> Tensor:
        """In the basis of the model, or with a `dtype` in that of the format."""
        positions = NO_POSITIONS if states.is_plain and not self.clears else self._everywhere
        if self.slots is not None:
            entries = states.pick(self.at, self.slots[:, :, block].clamp(min=0), positions)
            return entries if dtype is None else entries.to(dtype)
        if dtype is None:
            entries = states.read(self.at, block.start, block.stop, positions)
        else:
            entries = states.read_in_basis(self.at, block.start, block.stop, positions, dtype)
        return entries.masked_fill((positions[:, :, block] < 0)[..., None], 0) if self.clears else entries

    def column(self, name: str) -> Tensor:
        """A column of all slots in use as [b, k, all, ...]."""
        column = self.storage.column(name, self.at)
        return column[:, :, : column.shape[2] - self.unseen] if self.unseen else column

    def write_column(self, name: str, values: Tensor) -> None:
        """Overwrite a column of all slots in use, [b, k, all, ...]."""
        self.storage.write_column(name, self.at, values)

    def shown_column(self, name: str) -> Tensor:
        """Of a column [b, k, all] what stands in the T slots, [b, k, T]; 0 where there is nothing."""
        column = self.column(name)
        return column if self.slots is None else gather(column, self.slots)

    def write_shown_column(self, name: str, shown: Tensor) -> None:
        """Overwrite the T slots of a column with [b, k, T], and no other slot."""
        if self.slots is None:
            self.write_column(name, shown)
            return
        column = self.column(name)
        behind = column.shape[2]
        longer = torch.cat([column, column[:, :, :1]], 2)
        written = longer.scatter(2, self.slots.where(self.slots >= 0, behind), shown)
        self.write_column(name, written[:, :, :behind])

    def spread(self, logits: Tensor) -> Tensor:
        """Logits [b, k, ..., T] over all slots in use, -inf in those that were not read."""
        if self.slots is None:
            return logits
        width = self._everywhere.shape[2]
        index = self.slots.where(self.slots >= 0, width)
        index = index.reshape(*index.shape[:2], *[1] * (logits.ndim - 3), -1).expand_as(logits)
        full = logits.new_full((*logits.shape[:-1], width + 1), -torch.inf)
        return full.scatter_(-1, index, logits)[..., :width]
