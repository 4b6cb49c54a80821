"""Where entries are: the segments of several layers at once, as addresses, starts and lengths.

A kernel serves all layers of a step in one launch. Their storages are separate tensors, so a kernel is given a table of
addresses; a segment (layer, row, KV head) is a start slot in its layer's storage and a length.
"""

import functools
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.support import require

_ALIGNMENT = 16  # bytes: what wide loads need


@attrs.frozen(eq=False)
class Segments:
    """P segments: rows and KV heads of a layer, one layer behind another."""

    starts: Tensor  # [P] int64, the first slot in the storage of the segment's layer
    lengths: Tensor  # [P] int32, slots that hold an entry; they come first
    layers: int
    rows: int
    heads: int
    longest: int  # T, known to the host: no length is larger

    @property
    def count(self) -> int:
        """P."""
        return self.layers * self.rows * self.heads

    @property
    def per_layer(self) -> int:
        """Segments of one layer: P // `per_layer` is the layer of a segment."""
        return self.rows * self.heads

    @classmethod
    def of(cls, layers: Sequence[Tensor], lengths: Tensor) -> "Segments":
        """Of padded tensors, one [B, K, T, ...] a layer, and their `lengths` [L, B, K].

        Raises UnsupportedInputError when a layer's segments do not lie one behind another at equal distances.
        """
        rows, heads = layers[0].shape[:2]
        require(all(layer.shape[:2] == (rows, heads) for layer in layers), "layers differ in rows or KV heads")
        place = torch.arange(rows * heads, device=lengths.device)
        starts = torch.cat([place * pitch(layer) for layer in layers])
        longest = max(layer.shape[2] for layer in layers)
        return cls(starts, lengths.flatten().to(torch.int32), len(layers), rows, heads, longest)


@attrs.frozen(eq=False)
class Column:
    """One column of the entries of all layers: flat storages [slots, width], told by their addresses."""

    addresses: Tensor  # [L] int64, on the device of the storages
    dtype: torch.dtype
    width: int  # elements per slot
    storages: tuple[Tensor, ...]  # keeps them alive

    @classmethod
    def of(cls, layers: Sequence[Tensor]) -> "Column":
        """Of padded tensors, one [B, K, T, ...] a layer, as in `Segments.of`; views of larger storages may be given.

        Raises UnsupportedInputError for what kernels cannot address: mixed dtypes, gaps within a slot, misalignment.
        """
        first = layers[0]
        width = first[0, 0, 0].numel() if first.numel() else max(1, first.shape[3:].numel())
        for layer in layers:
            require(layer.dtype == first.dtype and layer.device == first.device, "layers differ in dtype or device")
            pitch(layer)
        return cls(addresses_of(layers), first.dtype, width, tuple(layers))


def addresses_of(storages: Sequence[Tensor]) -> Tensor:
    """Where they are, [L] int64 on their device; storages that stay where they are are not looked up twice.

    Raises UnsupportedInputError for one that is not aligned.
    """
    pointers = tuple(storage.data_ptr() for storage in storages)
    require(not any(pointer % _ALIGNMENT for pointer in pointers), f"a storage is not aligned to {_ALIGNMENT} bytes")
    return _numbers(pointers, storages[0].device)


# Numbers, wherever they came from: storages that come and go at the same addresses share an entry. A device that would
# have to be sent them again could not do so while a graph is captured.
@functools.lru_cache(maxsize=4096)
@torch.inference_mode(mode=False)
def _numbers(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def pitch(layer: Tensor) -> int:
    """Slots from one segment of [B, K, T, ...] to the next; UnsupportedInputError when it is not made of segments."""
    heads, width = layer.shape[1], max(1, layer.shape[3:].numel())
    inner = torch.empty(layer.shape[2:], dtype=layer.dtype, device="meta").stride()
    require(layer.stride()[2:] == inner or layer.numel() == 0, "the elements of a segment are not contiguous")
    distance, rest = divmod(layer.stride(1) if heads > 1 else layer.stride(0), width)
    even = heads == 1 or layer.shape[0] == 1 or layer.stride(0) == heads * layer.stride(1)
    require(rest == 0 and even, "segments do not lie at equal distances")
    return distance
