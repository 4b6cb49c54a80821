"""Compaction in place that keeps the order of slots: one program walks one slice of a segment's entries upwards."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.compact.raw_entries import (
    COUNTED,
    MOVING_TYPES,
    Bits,
    clear,
    constants,
    count_below,
    entries,
    storage,
)

_IN_FLIGHT = 16384  # bytes that a program reads before it writes
_MOST_ROWS = 1024
_SLICES = (128, 64, 32)  # bytes of an entry that a program moves; a sector of memory is 32
_BUSY = 512  # programs with which a GPU has enough to do


@triton.jit
def _read(base, row, first, count, lane, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The kept entries `first`, and so on that change their slot, and which those are, [ROWS, lanes]."""
    place = first + tl.arange(0, ROWS)
    slot = tl.load(row + place, mask=place < count, other=-1)
    moved = (slot > place)[:, None] & (lane < WIDTH)[None, :]
    return tl.load(entries(base, slot, lane, WIDTH), mask=moved, other=0), moved


@triton.jit
def _walk(base, row, count, lane, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Move some lanes of the kept entries of a segment to the front, in order.

    The i-th kept entry comes from slot i or a later one. So what is written for one chunk of them can still be needed
    by that chunk, which the barrier has read as a whole, but not by the next, which may be read ahead.
    """
    first = 0
    rows, moved = _read(base, row, 0, count, lane, WIDTH, ROWS)
    while first < count:
        tl.debug_barrier()
        ahead, ahead_moved = _read(base, row, first + ROWS, count, lane, WIDTH, ROWS)
        tl.store(entries(base, first + tl.arange(0, ROWS), lane, WIDTH), rows, mask=moved)
        rows = ahead
        moved = ahead_moved
        first += ROWS


@triton.jit(do_not_specialize=["N"])
def compact_ordered(
    ADDRESSES,  # a tuple of [L] int64, one a column
    STARTS,  # [P] int64
    LENGTHS,  # [P] int32
    KEPT,  # [P, N] int32
    OUT,  # [P] int32
    N,
    PER_LAYER: tl.constexpr,
    SIZES: tl.constexpr,  # of a column: bytes of an element
    WIDTHS: tl.constexpr,  # elements of an entry
    SLICES: tl.constexpr,  # elements that a program moves
    ROWS: tl.constexpr,  # entries that it moves together
    PARTS: tl.constexpr,  # the first program of each column, and how many there are
    CLEAR: tl.constexpr,  # whether the last column is positions
    BLOCK: tl.constexpr,
):
    """Move the kept entries of a segment to its front; OUT = how many they are."""
    segment = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = tl.load(STARTS + segment)
    row = KEPT + segment * N
    count = count_below(row, N, 2147483647, BLOCK)
    if part == 0:
        tl.store(OUT + segment, count)
    for i in tl.static_range(len(WIDTHS)):
        if (part >= PARTS[i]) & (part < PARTS[i + 1]):
            base = storage(ADDRESSES[i], segment // PER_LAYER, SIZES[i]) + start * WIDTHS[i]
            lane = (part - PARTS[i]) * SLICES[i] + tl.arange(0, SLICES[i])
            _walk(base, row, count, lane, WIDTHS[i], ROWS[i])
            if CLEAR and i == len(WIDTHS) - 1:
                clear(base, count, tl.load(LENGTHS + segment), BLOCK)


def launch(segments: Segments, kept: Tensor, columns: Sequence[Column], *, clears: bool, out: Tensor) -> None:
    """`compact` with checked arguments; the last column is positions if `clears`."""
    bits = Bits.of(columns)
    options = _options(bits, segments.count)
    compact_ordered[segments.count, options["PARTS"][-1].value](
        tuple(column.addresses for column in columns),
        segments.starts,
        segments.lengths,
        kept,
        out,
        kept.shape[1],
        segments.per_layer,
        CLEAR=clears,
        BLOCK=COUNTED,
        **options,
    )


def slices_of(bits: Bits, segments: int) -> tuple[int, ...]:
    """Elements of an entry that one program moves, by column: few if there were too few programs otherwise."""
    for wide in _SLICES:
        slices = bits.lanes(wide)
        if sum(map(_parts, bits.widths, slices)) * segments >= _BUSY:
            break
    return slices


def _parts(width: int, lanes: int) -> int:
    return -(-width // lanes)


def _options(bits: Bits, segments: int) -> dict[str, tuple[tl.constexpr, ...]]:
    slices = slices_of(bits, segments)
    rows = [min(_MOST_ROWS, _IN_FLIGHT // (lanes * size)) for lanes, size in zip(slices, bits.sizes, strict=True)]
    parts = [0, *accumulate(map(_parts, bits.widths, slices))]
    named = {"SIZES": bits.sizes, "WIDTHS": bits.widths, "SLICES": slices, "ROWS": rows, "PARTS": parts}
    return {name: constants(numbers) for name, numbers in named.items()}


def traffic(bits: Bits, segments: int, names: Sequence[str], width: int, kept: int, moved: int) -> Traffic:
    """As `compact.traffic`; without what marks slots as empty."""
    programs = sum(map(_parts, bits.widths, slices_of(bits, segments)))
    entry = {name: moved * size for name, size in zip(names, bits.entry_bytes, strict=True)}
    read = {**entry, "kept": 4 * programs * (segments * width + kept)}
    return Traffic(read, {**entry, "lengths": 4 * segments})


def builds() -> Iterator[Build]:
    """Launches as for bfloat16 keys and values with positions, one layer of one row and 32 layers."""
    for dim in (64, 128):
        for segments in (8, 256):
            bits = Bits((4, 4, 4), (dim // 2, dim // 2, 1))
            names = ("STARTS", "LENGTHS", "KEPT", "OUT")
            yield Build(
                f"compact_ordered D={dim} P={segments}",
                compact_ordered,
                types={**MOVING_TYPES, "ADDRESSES": ("*i64",) * 3},
                constants={"PER_LAYER": 8, "CLEAR": True, "BLOCK": COUNTED, **_options(bits, segments)},
                aligned=names,
            )
