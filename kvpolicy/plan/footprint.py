"""Bytes of the cache of one sequence, computed from its formats."""

from collections.abc import Mapping

import attrs
import torch

from kvpolicy.stages import Column, Format, Formats, Geometry

_INT, _FLOAT = 4, 4  # bytes


@attrs.frozen(eq=False)
class Footprint:
    """Bytes of storage as a function of entries per KV head."""

    geometry: Geometry
    dtype: torch.dtype
    columns: Mapping[str, Column]  # besides keys and values
    formats: tuple[Formats, ...]  # per layer
    pages: tuple[Format | None, ...]  # per layer
    queries: int = 0  # W, in the observation window of each layer
    row_states: int = 0  # float32 numbers of state per layer and sequence
    uneven: bool = False  # whether heads or layers may differ in what they hold: bytes are then at most as many

    def nbytes(self, capacity: int) -> int:
        """Bytes of storage for `capacity` entries per KV head in every layer of one sequence."""
        return round(sum(self.layer_bytes(layer, capacity) for layer in range(self.geometry.layers)))

    def layer_bytes(self, layer: int, capacity: int) -> float:
        """Bytes of storage for `capacity` entries per KV head in one managed layer."""
        formats, page = self.formats[layer], self.pages[layer]
        vectors = sum(
            kv_format.nbytes(capacity, self.geometry, self.dtype, uneven=self.uneven)
            for kv_format in (formats.keys, formats.values)
        )
        slot = sum(column.bytes_per_slot for column in self.columns.values())
        pages = 0 if page is None else capacity / page.group_size if self.uneven else capacity // page.group_size
        summary = 0 if page is None else pages * _group_bytes(page)
        return self.geometry.kv_heads * (vectors + slot * capacity + summary)

    def full_bytes(self, length: int) -> int:
        """Bytes of `length` tokens in a full cache, in all managed layers of one sequence."""
        return length * self.geometry.layers * self._full_entry_bytes

    @property
    def _full_entry_bytes(self) -> int:
        """Bytes of one token in a layer of a full cache."""
        return self.geometry.kv_heads * 2 * self.geometry.head_dim * self.dtype.itemsize

    @property
    def window_bytes(self) -> int:
        """Bytes of the observation windows of all layers: queries and their positions."""
        geometry = self.geometry
        return geometry.layers * self.queries * (geometry.query_heads * geometry.head_dim * self.dtype.itemsize + _INT)

    @property
    def state_bytes(self) -> int:
        """Bytes of state of all layers per sequence, independent of its length."""
        return self.geometry.layers * self.row_states * _FLOAT

    def stock_bytes(self, length: int) -> int:
        """Bytes of the layers with a sliding window after `length` tokens, the last of them decoded one by one."""
        return self._full_entry_bytes * sum(min(length, window) for window in self.geometry.windows)

    def entries(self, size: int) -> int:
        """The largest capacity per KV head whose storage takes at most `size` bytes; 0 if no entry fits."""
        low, high = 0, 1
        while self.nbytes(high) <= size:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.nbytes(middle) <= size else (low, middle)
        return low

    def per_entry(self) -> dict[str, float]:
        """Bytes of each further entry of one KV head of a long sequence, averaged over layers; by column."""
        layers = len(self.formats)
        sizes = {
            "keys": sum(self._entry_bytes_of(formats.keys) for formats in self.formats) / layers,
            "values": sum(self._entry_bytes_of(formats.values) for formats in self.formats) / layers,
        }
        sizes.update({name: column.bytes_per_slot for name, column in self.columns.items()})
        pages = [_group_bytes(page) / page.group_size for page in self.pages if page is not None]
        return sizes | ({"pages": sum(pages) / len(self.pages)} if pages else {})

    @property
    def entry_bytes(self) -> float:
        """The sum of `per_entry`."""
        return sum(self.per_entry().values())

    def _entry_bytes_of(self, kv_format: Format) -> float:
        if not kv_format.columns:
            return self.geometry.head_dim * self.dtype.itemsize
        return _group_bytes(kv_format) / kv_format.group_size / (self.geometry.kv_heads if kv_format.joint else 1)


def _group_bytes(kv_format: Format) -> int:
    return sum(column.bytes_per_slot for column in kv_format.columns.values())
