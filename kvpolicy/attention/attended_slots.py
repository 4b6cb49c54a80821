"""What one attention call reads of a layer: all that is held, or the slots that a reader chose."""

from collections.abc import Iterator
from functools import reduce
from operator import add

import attrs
import torch
from torch import Tensor

from kvpolicy.cache.storage.layer_storage import KVReader, LayerStorage
from kvpolicy.cache.storage.segment_index import SegmentIndex, SingleSegment
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.stages.slots import gather

_BLOCK = 512  # chosen slots that are decoded at one time


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
        alike = self.slots is None and (self.storage.is_even or isinstance(self.at, SingleSegment))
        return attrs.evolve(self, unseen=newest) if alike else self

    @property
    def length(self) -> int:
        """T."""
        return (self._everywhere if self.slots is None else self.slots).shape[2]

    @property
    def _everywhere(self) -> Tensor:
        return self.column(POSITIONS)

    @property
    def positions(self) -> Tensor:
        """[b, k, T]; -1 = nothing there."""
        if self.slots is None:
            return self._everywhere
        return gather(self._everywhere, self.slots).masked_fill(self.slots < 0, -1)

    @property
    def all_votes(self) -> Tensor | None:
        """Log-votes [b, k, all] float32 of all slots in use."""
        return self.column(LOG_VOTES) if LOG_VOTES in self.storage.columns else None

    @property
    def log_votes(self) -> Tensor | None:
        """Log-votes [b, k, T] float32."""
        votes = self.all_votes
        return votes if votes is None or self.slots is None else gather(votes, self.slots)

    def logits(self, queries: Tensor) -> Tensor:
        """q·k [b, k, n, T] of queries [b, k, n, D]; anything in empty slots."""
        if self.slots is None:
            return self.storage.keys.logits(self.at, queries, self._everywhere)
        return torch.cat(
            [queries @ keys.to(queries.dtype).transpose(-1, -2) for keys in self._picked(self.storage.keys)], -1
        )

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The values weighted by [b, k, n, T], those of empty slots by 0: [b, k, n, Dv]."""
        if self.slots is None:
            return self.storage.values.weighted_sum(self.at, weights, self._everywhere, clears=self.clears)
        values = self._picked(self.storage.values)
        blocks = zip(weights.split(_BLOCK, -1), values, strict=True)
        total: Tensor = reduce(add, (own @ block.to(weights.dtype) for own, block in blocks))
        return total

    def keys(self) -> Tensor:
        """[b, k, T, D]."""
        return self._read(self.storage.keys)

    def values(self) -> Tensor:
        """[b, k, T, Dv]."""
        return self._read(self.storage.values)

    def _read(self, states: KVReader) -> Tensor:
        if self.slots is not None:
            return torch.cat(list(self._picked(states)), 2)
        positions = self._everywhere
        entries = states.read(self.at, 0, positions.shape[2], positions)
        return entries.masked_fill((positions < 0)[..., None], 0) if self.clears else entries

    def _picked(self, states: KVReader) -> Iterator[Tensor]:
        """The chosen slots [b, k, n, D], of which some are decoded at one time."""
        for slots in (self.slots if self.slots is not None else self._everywhere).split(_BLOCK, -1):
            yield states.pick(self.at, slots.clamp(min=0), self._everywhere)

    def column(self, name: str) -> Tensor:
        """A column of all slots in use as [b, k, all, ...]."""
        column = self.storage.column(name, self.at)
        return column[:, :, : column.shape[2] - self.unseen] if self.unseen else column

    def write_column(self, name: str, values: Tensor) -> None:
        """Overwrite a column of all slots in use, [b, k, all, ...]."""
        self.storage.write_column(name, self.at, values)

    def spread(self, logits: Tensor) -> Tensor:
        """Logits [b, k, ..., T] over all slots in use, -inf in those that were not read."""
        if self.slots is None:
            return logits
        width = self._everywhere.shape[2]
        index = self.slots.where(self.slots >= 0, width)
        index = index.reshape(*index.shape[:2], *[1] * (logits.ndim - 3), -1).expand_as(logits)
        full = logits.new_full((*logits.shape[:-1], width + 1), -torch.inf)
        return full.scatter_(-1, index, logits)[..., :width]
