"""What kernels that move entries share: entries of any dtype as integers, and the guard.

Bits are moved, whatever they mean, in the widest integers that an entry is made of.
"""

import math
from collections.abc import Sequence

import attrs
import triton
import triton.language as tl
from torch import Tensor, int32

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, obstacle, require

COUNTED = 1024  # kept slots that are looked at together when they are counted
MOVING_TYPES = {"STARTS": "*i64", "LENGTHS": "*i32", "KEPT": "*i32", "OUT": "*i32", "N": "i32"}
_ALIGNMENT = 16  # bytes
_WIDEST = 1 << 15  # bytes of an entry in one column


@triton.jit
def storage(ADDRESSES, layer, SIZE: tl.constexpr):
    """The storage of a layer as integers of `SIZE` bytes."""
    address = tl.load(ADDRESSES + layer)
    if SIZE == 4:
        base = address.to(tl.pointer_type(tl.int32))
    elif SIZE == 2:
        base = address.to(tl.pointer_type(tl.int16))
    else:
        base = address.to(tl.pointer_type(tl.int8))
    return tl.multiple_of(base, 16)


@triton.jit
def entries(base, slot, lane, WIDTH: tl.constexpr):
    """Pointers to some lanes of the entries in slots, [slots, lanes]."""
    return base + slot.to(tl.int64)[:, None] * WIDTH + lane[None, :]


@triton.jit
def count_below(ROW, N, bound, BLOCK: tl.constexpr):
    """How many of the ascending slots in ROW [N] are below `bound`; -1 is no slot."""
    found = 0
    first = 0
    while first < N:
        place = first + tl.arange(0, BLOCK)
        slot = tl.load(ROW + place, mask=place < N, other=-1)
        found += tl.sum(((slot >= 0) & (slot < bound)).to(tl.int32), 0)
        first += BLOCK
    return found


@triton.jit
def clear(base, count, length, BLOCK: tl.constexpr):
    """Mark the slots from `count` to `length` as empty, when all threads are done with them."""
    tl.debug_barrier()
    first = count
    while first < length:
        slot = first + tl.arange(0, BLOCK)
        tl.store(base + slot, tl.full((BLOCK,), -1, tl.int32), mask=slot < length)
        first += BLOCK


@attrs.frozen
class Bits:
    """The entries of columns as integers."""

    sizes: tuple[int, ...]  # of a column: bytes of an integer
    widths: tuple[int, ...]  # integers of an entry

    @classmethod
    def of(cls, columns: Sequence[Column]) -> "Bits":
        """Those of these columns."""
        entry_bytes = [column.width * column.dtype.itemsize for column in columns]
        sizes = tuple(math.gcd(4, count) for count in entry_bytes)
        return cls(sizes, tuple(count // size for count, size in zip(entry_bytes, sizes, strict=True)))

    def lanes(self, most: int = _WIDEST) -> tuple[int, ...]:
        """Integers in `most` bytes, or the power of two that holds an entry if that is less, by column."""
        pairs = zip(self.sizes, self.widths, strict=True)
        return tuple(min(triton.next_power_of_2(width), most // size) for size, width in pairs)

    @property
    def entry_bytes(self) -> tuple[int, ...]:
        """Bytes of an entry, by column."""
        return tuple(size * width for size, width in zip(self.sizes, self.widths, strict=True))


def constants(numbers: Sequence[int]) -> tuple[tl.constexpr, ...]:
    """A tuple of constants as every supported compiler takes it."""
    return tuple(map(tl.constexpr, numbers))


def check_moves(segments: Segments, kept: Tensor, columns: Sequence[Column]) -> None:
    """Raise UnsupportedInputError unless entries of these columns can be moved."""
    device = kept.device
    require(interpreting() or not obstacle(device), obstacle(device))
    require(kept.dtype == int32 and kept.is_contiguous(), "kept slots must be contiguous int32")
    require(kept.ndim == 2 and len(kept) == segments.count, f"kept slots must be [{segments.count}, N]")
    places = (segments.starts, segments.lengths, *(column.addresses for column in columns))
    require(all(place.device == device for place in places), "segments, columns and kept slots are on several devices")
    for column in columns:
        require(len(column.addresses) == segments.layers, "a column has not one storage a layer")
        require(column.width * column.dtype.itemsize <= _WIDEST, f"entries of more than {_WIDEST} bytes")
        aligned = all(one.data_ptr() % _ALIGNMENT == 0 for one in column.storages)
        require(aligned, f"storage is not aligned to {_ALIGNMENT} bytes")
