"""Where entries are stored: the segments of several layers, as storage addresses, start slots and lengths.

One launch serves all layers of a step. Their storages are separate tensors, so a kernel gets a table of addresses; a
segment (layer, row, KV head) is a start slot in its layer's storage and a length.
"""

import functools
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.support import require

_ALIGNMENT = 16  # bytes per wide load


@attrs.frozen(eq=False)
class Segments:
    """P = L·B·K segments, ordered by layer, row and KV head."""

    starts: Tensor  # [P] int64, first slot in the storage of the segment's layer
    lengths: Tensor  # [P] int32, slots that hold an entry; they come first
    layers: int  # L
    rows: int  # B
    heads: int  # K
    longest: int  # T, an upper bound of `lengths` that the host knows

    @property
    def count(self) -> int:
        """P."""
        return self.layers * self.rows * self.heads

    @property
    def per_layer(self) -> int:
        """Segments per layer: segment // `per_layer` is its layer."""
        return self.rows * self.heads

    @classmethod
    def of(cls, layers: Sequence[Tensor], lengths: Tensor) -> "Segments":
        """Of padded tensors, one [B, K, T, ...] per layer, and their `lengths` [L, B, K].

        Raises UnsupportedInputError when the segments of a layer are not at equal distances in memory.
        """
        rows, heads = layers[0].shape[:2]
        require(all(layer.shape[:2] == (rows, heads) for layer in layers), "layers differ in rows or KV heads")
        index = torch.arange(rows * heads, device=lengths.device)
        starts = torch.cat([index * pitch(layer) for layer in layers])
        longest = max(layer.shape[2] for layer in layers)
        return cls(starts, lengths.flatten().to(torch.int32), len(layers), rows, heads, longest)


@attrs.frozen(eq=False)
class Column:
    """One tensor per layer, [slots, width] each, passed to kernels by address: keys, values or slot state."""

    addresses: Tensor  # [L] int64, on the device of the storages
    dtype: torch.dtype
    width: int  # elements per slot
    storages: tuple[Tensor, ...]  # keeps the memory alive

    @classmethod
    def of(cls, layers: Sequence[Tensor]) -> "Column":
        """Of padded tensors, one [B, K, T, ...] per layer, as in `Segments.of`; views of larger storages are allowed.

        Raises UnsupportedInputError for layouts that kernels cannot address: mixed dtypes, gaps, misalignment.
        """
        first = layers[0]
        width = first[0, 0, 0].numel() if first.numel() else max(1, first.shape[3:].numel())
        for layer in layers:
            require(layer.dtype == first.dtype and layer.device == first.device, "layers differ in dtype or device")
            pitch(layer)
        return cls(addresses_of(layers), first.dtype, width, tuple(layers))


def addresses_of(storages: Sequence[Tensor]) -> Tensor:
    """Addresses of the storages, [L] int64 on their device. Equal addresses give a cached tensor.

    Raises UnsupportedInputError when a storage is not aligned to 16 bytes.
    """
    pointers = tuple(storage.data_ptr() for storage in storages)
    require(not any(pointer % _ALIGNMENT for pointer in pointers), f"a storage is not aligned to {_ALIGNMENT} bytes")
    return _address_table(pointers, storages[0].device)


# Cached because a CUDA graph cannot be captured while the host copies a table to the device. The key is the addresses
# themselves, so freed and reallocated storages may share an entry.
@functools.lru_cache(maxsize=4096)
@torch.inference_mode(mode=False)
def _address_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def pitch(layer: Tensor) -> int:
    """Slots from one segment of [B, K, T, ...] to the next.

    Raises UnsupportedInputError when segments are not contiguous, or not at equal distances.
    """
    heads, width = layer.shape[1], max(1, layer.shape[3:].numel())
    contiguous = torch.empty(layer.shape[2:], dtype=layer.dtype, device="meta").stride()
    require(layer.stride()[2:] == contiguous or layer.numel() == 0, "the elements of a segment are not contiguous")
    distance, remainder = divmod(layer.stride(1) if heads > 1 else layer.stride(0), width)
    even = heads == 1 or layer.shape[0] == 1 or layer.stride(0) == heads * layer.stride(1)
    require(remainder == 0 and even, "segments do not lie at equal distances")
    return distance
