"""What happened in each layer while a sequence ran: numbers that outlive the cache."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from torch import Tensor


@attrs.define
class LayerStats:
    """Counts of one managed layer. Entries are per KV head, averaged over rows and heads; bytes are for all rows."""

    layer: int  # index within the model
    rows: int = 0  # sequences of the batch
    seq_len: int = 0  # tokens, pads included
    held: float = 0.0
    decode_steps: int = 0
    entry_bytes: int = 0  # keys and values, packed or not, what their slots carry, and the reader's pages
    window_bytes: int = 0  # queries observed for scorers and mergers
    state_bytes: int = 0  # what is carried per row, queries that may be undone, and where segments begin
    peak_bytes: int = 0  # the most that `nbytes` has been
    peak_entry_bytes: int = 0  # the most that `entry_bytes` has been
    compressions: int = 0
    seconds: float = 0.0  # host time spent compressing
    attended: float = 0.0  # entries, summed over decode steps; without those that are counted on the device
    _chosen: Tensor | None = attrs.field(default=None, init=False, repr=False, eq=False)  # more of it, on the device

    @property
    def read(self) -> float:
        """Entries that the newest query of a row attended to, averaged over decode steps. May wait for the device."""
        chosen = 0.0 if self._chosen is None else float(self._chosen)
        return (self.attended + chosen) / max(1, self.decode_steps)

    def in_plain_numbers(self) -> "LayerStats":
        """A copy of which nothing is on the device. May wait for it."""
        return attrs.evolve(self, attended=self.read * self.decode_steps)

    def to_dict(self) -> dict[str, Any]:
        """For a report's JSON."""
        numbers = attrs.asdict(self, filter=lambda field, _: field.name not in {"attended", "_chosen"})
        return {**numbers, "read": self.read, "nbytes": self.nbytes}

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What of these numbers is on the device."""
        return () if self._chosen is None else (self._chosen,)

    @property
    def nbytes(self) -> int:
        """All bytes that the layer holds."""
        return self.entry_bytes + self.window_bytes + self.state_bytes

    def sample(self, seq_len: int, held: float, entry_bytes: int, window_bytes: int = 0, state_bytes: int = 0) -> None:
        """Note the present state."""
        self.seq_len, self.held = seq_len, held
        self.entry_bytes, self.window_bytes, self.state_bytes = entry_bytes, window_bytes, state_bytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        self.peak_entry_bytes = max(self.peak_entry_bytes, entry_bytes)

    def advance(self, seq_len: int, held: float) -> None:
        """Note that entries came or went in storage that stays as it is."""
        self.seq_len, self.held = seq_len, held

    def read_by_step(self, entries: float | Tensor) -> None:
        """Note how many entries a decode step attends to; a number on a device, float64 [], stays there."""
        self.decode_steps += 1
        if isinstance(entries, Tensor):
            self._chosen = entries if self._chosen is None else self._chosen + entries
        else:
            self.attended += entries


class Counted(Protocol):
    """A cache that counts what it holds."""

    @property
    def stats(self) -> Sequence[LayerStats]:
        """Of each managed layer."""

    @property
    def stock_bytes(self) -> Mapping[int, int]:
        """Bytes of each layer that is none of ours, by its index within the model."""

    def count(self) -> None:
        """Bring both up to date."""


class CacheStats:
    """What is known of a cache, and stays known when the cache is gone; does not keep it alive."""

    def __init__(self, cache: Counted) -> None:
        self.layers: Sequence[LayerStats] = cache.stats
        self.stock_bytes = cache.stock_bytes
        self._cache: weakref.ref[Counted] | None = weakref.ref(cache)

    def refresh(self) -> None:
        """Let the cache count again, if it is still there."""
        cache = None if self._cache is None else self._cache()
        if cache is not None:
            cache.count()

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows what was known, and no cache."""
        return {**self.__dict__, "_cache": None}
