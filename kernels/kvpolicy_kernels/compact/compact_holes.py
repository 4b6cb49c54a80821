"""Compaction in place with the fewest moves: kept entries beyond the new length move to dropped slots before it."""

from collections.abc import Iterator, Sequence

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

_ROWS = 32  # entries per iteration
_POSITIONS = 256  # positions per iteration
_MAX_PARTS = 8  # programs per segment


@triton.jit
def _dropped_slot(ROW, N, STEP, rank, inside):
    """The `rank`-th dropped slot: `rank` plus the number of kept slots with at most `rank` dropped slots before them.

    The i-th kept slot has `slot - i` dropped slots before it, which does not decrease: a binary search.
    """
    kept = tl.zeros_like(rank)
    step = STEP
    while step > 0:
        index = kept + step - 1
        slot = tl.load(ROW + tl.minimum(index, N - 1), mask=inside, other=-1)
        before = (index < N) & (slot >= 0) & (slot - index <= rank)
        kept = tl.where(before, kept + step, kept)
        step = step >> 1
    return rank + kept


@triton.jit
def _fill_holes(
    ADDRESSES,
    row,
    N,
    STEP,
    start,
    layer,
    staying,
    moved,
    part,
    parts,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Move the entries that fill holes, in the columns FROM to TO: ROWS per iteration, every `parts`-th block.

    Sources are slots beyond the new length and targets slots before it, so moves do not conflict.
    """
    first = part * ROWS
    while first < moved:
        rank = first + tl.arange(0, ROWS)
        inside = rank < moved
        source = tl.load(row + staying + rank, mask=inside, other=0)
        target = _dropped_slot(row, N, STEP, rank, inside)
        for i in tl.static_range(FROM, TO):
            base = integer_pointer(ADDRESSES[i], layer, SIZES[i]) + start * WIDTHS[i]
            lane = tl.arange(0, LANES[i])
            mask = inside[:, None] & (lane < WIDTHS[i])[None, :]
            entry = tl.load(row_pointers(base, source.to(tl.int64), lane, WIDTHS[i]), mask=mask, other=0)
            tl.store(row_pointers(base, target.to(tl.int64), lane, WIDTHS[i]), entry, mask=mask)
        first += parts * ROWS


@triton.jit(do_not_specialize=["N", "STEP", "PARTS"])
def compact_holes(
    ADDRESSES,  # a tuple of [L] int64, one a column
    STARTS,  # [P] int64
    LENGTHS,  # [P] int32
    KEPT,  # [P, N] int32
    OUT,  # [P] int32
    N,
    STEP,  # the largest power of two that is at most N
    PARTS,  # programs per segment that move other columns than positions
    PER_LAYER: tl.constexpr,
    SIZES: tl.constexpr,  # per column: bytes of an element
    WIDTHS: tl.constexpr,  # elements of an entry
    LANES: tl.constexpr,  # WIDTHS rounded up to powers of two
    COLUMNS: tl.constexpr,  # number of columns without positions, which come last, if present
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Move kept entries beyond the new length to dropped slots before it; OUT is the new length. Grid (P, programs)."""
    segment = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    layer = segment // PER_LAYER
    start = tl.load(STARTS + segment)
    row = KEPT + segment * N
    count = count_below(row, N, 2147483647, BLOCK)
    staying = count_below(row, N, count, BLOCK)
    moved = count - staying
    if part == 0:
        tl.store(OUT + segment, count)
    if part < PARTS:
        _fill_holes(
            ADDRESSES, row, N, STEP, start, layer, staying, moved, part, PARTS, 0, COLUMNS, SIZES, WIDTHS, LANES, ROWS
        )
    elif len(WIDTHS) > COLUMNS:
        # One program moves all positions of a segment, and then clears the emptied slots.
        _fill_holes(
            ADDRESSES,
            row,
            N,
            STEP,
            start,
            layer,
            staying,
            moved,
            part - PARTS,
            1,
            COLUMNS,
            COLUMNS + 1,
            SIZES,
            WIDTHS,
            LANES,
            POSITIONS,
        )
        base = integer_pointer(ADDRESSES[COLUMNS], layer, 4) + start
        clear_slots(base, count, tl.load(LENGTHS + segment), BLOCK)


def launch(segments: Segments, kept: Tensor, columns: Sequence[Column], *, clears: bool, out: Tensor) -> None:
    """Launch for `compact`, with checked arguments. If `clears`, the last column is positions."""
    width = kept.shape[1]
    parts = parts_of(segments.longest, width)
    compact_holes[segments.count, parts + clears](
        tuple(column.addresses for column in columns),
        segments.starts,
        segments.lengths,
        kept,
        out,
        width,
        _step(width),
        parts,
        segments.per_layer,
        **_options(RawEntries.of(columns), clears=clears),
    )


def parts_of(longest: int, width: int) -> int:
    """Programs per segment, for as many holes as there can be; they loop if there are more than they cover at once."""
    return min(_MAX_PARTS, max(1, -(-min(width, longest - width) // _ROWS)))


def _step(width: int) -> int:
    return 1 << width.bit_length() >> 1


def _options(raw: RawEntries, *, clears: bool) -> dict[str, object]:
    named = {"SIZES": raw.sizes, "WIDTHS": raw.widths, "LANES": raw.lanes()}
    columns = len(raw.sizes) - clears
    blocks = {"COLUMNS": columns, "ROWS": _ROWS, "BLOCK": COUNT_BLOCK, "POSITIONS": _POSITIONS}
    return {**{name: constants(numbers) for name, numbers in named.items()}, **blocks}


def traffic(
    raw: RawEntries, segments: Segments, names: Sequence[str], width: int, moved: int, *, clears: bool
) -> Traffic:
    """As `compact.traffic`, without the -1 written to emptied slots."""
    programs, walks = parts_of(segments.longest, width) + clears, 1 + clears
    entry = {name: moved * size for name, size in zip(names, raw.entry_bytes, strict=True)}
    searched = walks * moved * (1 + width.bit_length())
    kept = 4 * (2 * programs * segments.count * width + searched)
    return Traffic({**entry, "kept": kept}, {**entry, "lengths": 4 * segments.count})


def compile_specs() -> Iterator[CompileSpec]:
    """Launches for bfloat16 keys, values and positions."""
    for dim in (64, 128):
        raw = RawEntries((4, 4, 4), (dim // 2, dim // 2, 1))
        yield CompileSpec(
            f"compact_holes D={dim}",
            compact_holes,
            types={"ADDRESSES": ("*i64",) * 3, **ARGUMENT_TYPES, "STEP": "i32", "PARTS": "i32"},
            constants={"PER_LAYER": 8, **_options(raw, clears=True)},
            aligned=("STARTS", "LENGTHS", "KEPT", "OUT"),
        )
