"""A layer whose entries are lent, for decode steps that are served elsewhere."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from kvpolicy.cache.integrity import Integrity
from kvpolicy.cache.observation_window import ObservationWindow
from kvpolicy.cache.recording import Recording
from kvpolicy.cache.stats import LayerStats
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.errors import CacheError
from kvpolicy.integrations.transformers.stateful import StatefulLayer


class TransferableLayer(StatefulLayer):
    """Gives its entries away and has them back before anything else is done with them."""

    stats: LayerStats
    integrity: Integrity  # of the cache that this is a layer of
    recording: Recording

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changes = 0  # forwards, rollbacks and moves of rows that this layer itself has done
        self._take_back: Callable[[], None] | None = None  # while the entries are lent: how they are had back

    @abc.abstractmethod
    def close_gaps(self) -> None:
        """Drop the pads."""

    @property
    def storage(self) -> LayerStorage:
        """All that the layer holds; had back first, if it is lent."""
        self.take_back_storage()
        return self._storage

    @property
    def can_hand_over(self) -> bool:
        """Whether a decode step may be served elsewhere: nothing is pending that would have to be known there."""
        pending = self.record_past or not self.recording.is_empty
        return (
            self.is_initialized
            and self.integrity.is_whole
            and not pending
            and isinstance(self._storage, SegmentedStorage)
        )

    def hand_over(self, take_back_storage: Callable[[], None]) -> SegmentedStorage:
        """The entries in order, without pads, for decode steps that run elsewhere until they are taken back."""
        storage = self.segmented
        self.close_gaps()
        if not self.in_order:
            storage.sort_by_position()
            self.in_order = True
        self._take_back = take_back_storage
        return storage

    @property
    def segmented(self) -> SegmentedStorage:
        """The entries, where steps of fixed shapes can be served from them. Raises CacheError where they cannot."""
        if not isinstance(self.storage, SegmentedStorage):
            raise CacheError(
                f"layer {self.stats.layer}: steps of fixed shapes need entries in segments of flat tensors"
            )
        return self.storage

    def take_back_storage(self) -> None:
        """Have the entries back."""
        take_back_storage, self._take_back = self._take_back, None
        if take_back_storage is not None:
            take_back_storage()

    def count_static_step(self, entries: float, left: float | None) -> None:
        """Note a decode step that was served elsewhere; `left` is what a compression left of the entries, if any."""
        self.seq_len += 1
        self.stats.read_by_step(entries)
        self.stats.advance(self.seq_len, entries if left is None else left)
        if left is not None:
            self.compressed, self.rollback_limit = True, self.seq_len
            self.note_compression()

    def note_compression(self, seconds: float = 0.0) -> None:
        """Count a compression, and the host time that it took."""
        self.state.compressions += 1
        self.stats.compressions = self.state.compressions
        self.stats.seconds += seconds

    def resume_after_static(self, num_tokens: Sequence[int], window: tuple[Tensor, Tensor] | None) -> None:
        """Go on with rows of `num_tokens` tokens; `window` has the last queries [B, H, w, D] and positions [B, w]."""
        self._take_back = None
        self.num_tokens = list(num_tokens)
        if window is not None:
            self.window = ObservationWindow(self.window.size)
            self.window.add(*window, padded=False)

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """The body is a change of this layer alone. Raises CacheError when an earlier one of the cache has failed."""
        with self.integrity.change(name):
            self.prepare()
            yield

    def prepare(self) -> None:
        """Have the entries back, and note that this layer changes them itself."""
        self.take_back_storage()
        self.changes += 1

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its entries to itself."""
        self.take_back_storage()
        return self.__dict__
