"""Entries of any dtype as raw integers, and the device functions and checks that compaction kernels share.

Compaction copies bits: an entry is read and written as the widest integers, of up to 4 bytes, that divide it.
"""

import math
from collections.abc import Sequence

import attrs
import triton
import triton.language as tl
from torch import Tensor, int32

from kvpolicy_kernels.common.addressing import column_pointer
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require, unavailable_reason

COUNT_BLOCK = 1024  # kept slots per iteration when they are counted
ARGUMENT_TYPES = {"STARTS": "*i64", "LENGTHS": "*i32", "KEPT": "*i32", "OUT": "*i32", "N": "i32"}
_ALIGNMENT = 16  # bytes
_MAX_ENTRY = 1 << 15  # bytes of an entry in one column


@triton.jit
def integer_pointer(ADDRESSES, layer, SIZE: tl.constexpr):
    """Pointer to the first element of a column of one layer, read as integers of `SIZE` bytes."""
    if SIZE == 4:
        pointer = column_pointer(ADDRESSES, layer, tl.int32)
    elif SIZE == 2:
        pointer = column_pointer(ADDRESSES, layer, tl.int16)
    else:
        pointer = column_pointer(ADDRESSES, layer, tl.int8)
    return pointer


@triton.jit
def count_below(ROW, N, bound, BLOCK: tl.constexpr):
    """How many slots in ROW [N] are below `bound`; -1 is padding."""
    total = 0
    first = 0
    while first < N:
        index = first + tl.arange(0, BLOCK)
        slot = tl.load(ROW + index, mask=index < N, other=-1)
        total += tl.sum(((slot >= 0) & (slot < bound)).to(tl.int32), 0)
        first += BLOCK
    return total


@triton.jit
def clear_slots(base, count, length, BLOCK: tl.constexpr):
    """Write -1 to the slots from `count` to `length`, after a barrier: all threads have read them."""
    tl.debug_barrier()
    first = count
    while first < length:
        slot = first + tl.arange(0, BLOCK)
        tl.store(base + slot, tl.full((BLOCK,), -1, tl.int32), mask=slot < length)
        first += BLOCK


@attrs.frozen
class RawEntries:
    """The integers that the entries of each column are copied as."""

    sizes: tuple[int, ...]  # per column: bytes of an integer
    widths: tuple[int, ...]  # per column: integers per entry

    @classmethod
    def of(cls, columns: Sequence[Column]) -> "RawEntries":
        """For these columns."""
        entry_bytes = [column.width * column.dtype.itemsize for column in columns]
        sizes = tuple(math.gcd(4, count) for count in entry_bytes)
        return cls(sizes, tuple(count // size for count, size in zip(entry_bytes, sizes, strict=True)))

    def lanes(self, limit: int = _MAX_ENTRY) -> tuple[int, ...]:
        """Per column, integers in `limit` bytes, or if less, the entry width rounded up to a power of two."""
        pairs = zip(self.sizes, self.widths, strict=True)
        return tuple(min(triton.next_power_of_2(width), limit // size) for size, width in pairs)

    @property
    def entry_bytes(self) -> tuple[int, ...]:
        """Bytes per entry, per column."""
        return tuple(size * width for size, width in zip(self.sizes, self.widths, strict=True))


def constants(numbers: Sequence[int]) -> tuple[tl.constexpr, ...]:
    """A tuple of constants in the form that all supported Triton versions accept."""
    return tuple(map(tl.constexpr, numbers))


def check_moves(segments: Segments, kept: Tensor, columns: Sequence[Column]) -> None:
    """Raise UnsupportedInputError for segments, kept slots [P, N] or columns that the kernels do not support."""
    device = kept.device
    require(interpreting() or not unavailable_reason(device), unavailable_reason(device))
    require(kept.dtype == int32 and kept.is_contiguous(), "kept slots must be contiguous int32")
    require(kept.ndim == 2 and len(kept) == segments.count, f"kept slots must be [{segments.count}, N]")
    tensors = (segments.starts, segments.lengths, *(column.addresses for column in columns))
    require(
        all(tensor.device == device for tensor in tensors), "segments, columns and kept slots are on several devices"
    )
    for column in columns:
        require(len(column.addresses) == segments.layers, "a column has not one storage a layer")
        require(column.width * column.dtype.itemsize <= _MAX_ENTRY, f"entries of more than {_MAX_ENTRY} bytes")
        aligned = all(storage.data_ptr() % _ALIGNMENT == 0 for storage in column.storages)
        require(aligned, f"storage is not aligned to {_ALIGNMENT} bytes")
