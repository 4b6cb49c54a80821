"""Compaction in place that keeps the order of entries: one program moves one slice of all entries of a segment."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.addressing import row_pointers
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.compact.raw_entries import (
    ARGUMENT_TYPES,
    COUNT_BLOCK,
    RawEntries,
    clear_slots,
    constants,
    count_below,
    integer_pointer,
)

_BYTES_IN_FLIGHT = 16384  # bytes that a program reads before it writes
_MAX_ROWS = 1024
_SLICES = (128, 64, 32)  # bytes per entry that a program moves; a memory sector is 32 bytes
_BUSY = 512  # programs that fill a GPU


@triton.jit
def _read(base, row, first, count, lane, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Load ROWS kept entries from number `first` on, and which of them change their slot; both [ROWS, lanes]."""
    target = first + tl.arange(0, ROWS)
    slot = tl.load(row + target, mask=target < count, other=-1)
    moved = (slot > target)[:, None] & (lane < WIDTH)[None, :]
    return tl.load(row_pointers(base, slot.to(tl.int64), lane, WIDTH), mask=moved, other=0), moved


@triton.jit
def _move_slice(base, row, count, lane, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Move a slice of the kept entries of a segment to its first slots, in order.

    The i-th kept entry comes from slot i or later. So the targets of one chunk of entries may be sources of the same
    chunk, which has been read completely at the barrier, but not of the next chunk, which may be read before it.
    """
    first = 0
    rows, moved = _read(base, row, 0, count, lane, WIDTH, ROWS)
    while first < count:
        tl.debug_barrier()
        next_rows, next_moved = _read(base, row, first + ROWS, count, lane, WIDTH, ROWS)
        tl.store(row_pointers(base, (first + tl.arange(0, ROWS)).to(tl.int64), lane, WIDTH), rows, mask=moved)
        rows = next_rows
        moved = next_moved
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
    SIZES: tl.constexpr,  # per column: bytes of an element
    WIDTHS: tl.constexpr,  # elements of an entry
    SLICES: tl.constexpr,  # elements of an entry that a program moves
    ROWS: tl.constexpr,  # entries per iteration
    PARTS: tl.constexpr,  # the first program of each column, then the number of programs
    CLEAR: tl.constexpr,  # whether the last column is positions
    BLOCK: tl.constexpr,
):
    """Move the kept entries of a segment to its first slots; OUT is their number. Grid (P, programs of all columns)."""
    segment = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = tl.load(STARTS + segment)
    row = KEPT + segment * N
    count = count_below(row, N, 2147483647, BLOCK)
    if part == 0:
        tl.store(OUT + segment, count)
    for i in tl.static_range(len(WIDTHS)):
        if (part >= PARTS[i]) & (part < PARTS[i + 1]):
            base = integer_pointer(ADDRESSES[i], segment // PER_LAYER, SIZES[i]) + start * WIDTHS[i]
            lane = (part - PARTS[i]) * SLICES[i] + tl.arange(0, SLICES[i])
            _move_slice(base, row, count, lane, WIDTHS[i], ROWS[i])
            if CLEAR and i == len(WIDTHS) - 1:
                clear_slots(base, count, tl.load(LENGTHS + segment), BLOCK)


def launch(segments: Segments, kept: Tensor, columns: Sequence[Column], *, clears: bool, out: Tensor) -> None:
    """Launch for `compact`, with checked arguments. If `clears`, the last column is positions."""
    raw = RawEntries.of(columns)
    options = _options(raw, segments.count)
    compact_ordered[segments.count, options["PARTS"][-1].value](
        tuple(column.addresses for column in columns),
        segments.starts,
        segments.lengths,
        kept,
        out,
        kept.shape[1],
        segments.per_layer,
        CLEAR=clears,
        BLOCK=COUNT_BLOCK,
        **options,
    )


def slices_of(raw: RawEntries, segments: int) -> tuple[int, ...]:
    """Elements of an entry that one program moves, per column: the most that still fill the GPU."""
    for wide in _SLICES:
        slices = raw.lanes(wide)
        if sum(map(_parts, raw.widths, slices)) * segments >= _BUSY:
            break
    return slices


def _parts(width: int, lanes: int) -> int:
    return -(-width // lanes)


def _options(raw: RawEntries, segments: int) -> dict[str, tuple[tl.constexpr, ...]]:
    slices = slices_of(raw, segments)
    rows = [min(_MAX_ROWS, _BYTES_IN_FLIGHT // (lanes * size)) for lanes, size in zip(slices, raw.sizes, strict=True)]
    parts = [0, *accumulate(map(_parts, raw.widths, slices))]
    named = {"SIZES": raw.sizes, "WIDTHS": raw.widths, "SLICES": slices, "ROWS": rows, "PARTS": parts}
    return {name: constants(numbers) for name, numbers in named.items()}


def traffic(raw: RawEntries, segments: int, names: Sequence[str], width: int, kept: int, moved: int) -> Traffic:
    """As `compact.traffic`, without the -1 written to emptied slots."""
    programs = sum(map(_parts, raw.widths, slices_of(raw, segments)))
    entry = {name: moved * size for name, size in zip(names, raw.entry_bytes, strict=True)}
    read = {**entry, "kept": 4 * programs * (segments * width + kept)}
    return Traffic(read, {**entry, "lengths": 4 * segments})


def compile_specs() -> Iterator[CompileSpec]:
    """Launches for bfloat16 keys, values and positions, of one layer and of 32 layers of one row."""
    for dim in (64, 128):
        for segments in (8, 256):
            raw = RawEntries((4, 4, 4), (dim // 2, dim // 2, 1))
            names = ("STARTS", "LENGTHS", "KEPT", "OUT")
            yield CompileSpec(
                f"compact_ordered D={dim} P={segments}",
                compact_ordered,
                types={**ARGUMENT_TYPES, "ADDRESSES": ("*i64",) * 3},
                constants={"PER_LAYER": 8, "CLEAR": True, "BLOCK": COUNT_BLOCK, **_options(raw, segments)},
                aligned=names,
            )
