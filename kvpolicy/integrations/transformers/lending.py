"""A layer whose entries are lent, for decode steps that are served elsewhere."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from kvpolicy.cache.compaction.write_back import put_in_order
from kvpolicy.cache.integrity import Integrity
from kvpolicy.cache.observation_window import Window
from kvpolicy.cache.recording import Recording
from kvpolicy.cache.stats import LayerStats
from kvpolicy.cache.storage.layer_storage import Holdings
from kvpolicy.integrations.transformers.stateful import StatefulLayer


class LendingLayer(StatefulLayer):
    """Gives its entries away and has them back before anything else is done with them."""

    stats: LayerStats
    integrity: Integrity  # of the cache that this is a layer of
    recording: Recording

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changes = 0  # forwards, rollbacks and moves of rows that this layer itself has done
        self._reclaim: Callable[[], None] | None = None  # while the entries are lent: how they are had back

    @abc.abstractmethod
    def close_gaps(self) -> None:
        """Drop the pads."""

    @property
    def held(self) -> Holdings:
        """All that the layer holds; had back first, if it is lent."""
        self.reclaim()
        return self._held

    @property
    def lendable(self) -> bool:
        """Whether a decode step may be served elsewhere: nothing is pending that would have to be known there."""
        return self.is_initialized and self.integrity.is_whole and not self.record_past and self.recording.is_empty

    def lend(self, reclaim: Callable[[], None]) -> Holdings:
        """The entries in order, without pads; until `reclaim` is called, decode steps are served elsewhere."""
        held = self.held
        self.close_gaps()
        if not self.in_order:
            put_in_order(held)
            self.in_order = True
        self._reclaim = reclaim
        return held

    def reclaim(self) -> None:
        """Have the entries back."""
        reclaim, self._reclaim = self._reclaim, None
        if reclaim is not None:
            reclaim()

    def served(self, entries: float, left: float | None) -> None:
        """Note a decode step that was served elsewhere; `left` is what a compression left of the entries, if any."""
        self.seen += 1
        self.stats.read_by_step(entries)
        self.stats.advance(self.seen, entries if left is None else left)
        if left is not None:
            self.altered, self.rollback_limit = True, self.seen
            self.note_compression()

    def note_compression(self, seconds: float = 0.0) -> None:
        """Count a compression, and the host time that it took."""
        self.state.compressions += 1
        self.stats.compressions = self.state.compressions
        self.stats.seconds += seconds

    def take_back(self, real: Sequence[int], window: tuple[Tensor, Tensor] | None) -> None:
        """Go on with rows of `real` tokens; `window` are the last queries [B, H, w, D] and their positions [B, w]."""
        self._reclaim = None
        self.real = list(real)
        if window is not None:
            self.window = Window(self.window.size)
            self.window.add(*window, padded=False)

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """The body is a change of this layer alone. Raises CacheError when an earlier one of the cache has failed."""
        with self.integrity.change(name):
            self.prepare()
            yield

    def prepare(self) -> None:
        """Have the entries back, and note that this layer changes them itself."""
        self.reclaim()
        self.changes += 1

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its entries to itself."""
        self.reclaim()
        return self.__dict__
