"""Compaction in place that moves as few entries as can be: kept ones from behind fill the holes in front."""

from collections.abc import Iterator, Sequence

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

_ROWS = 32  # entries that a program moves together
_POSITIONS = 256  # positions that it moves together
_MOST_PARTS = 8  # programs that share the holes of a segment


@triton.jit
def _hole(ROW, N, STEP, rank, inside):
    """The dropped slots of these ranks: `rank`, plus how many kept slots have at most `rank` dropped ones before them.

    The i-th kept slot has `slot - i` before it, which never decreases: a binary search.
    """
    kept = tl.zeros_like(rank)
    step = STEP
    while step > 0:
        place = kept + step - 1
        slot = tl.load(ROW + tl.minimum(place, N - 1), mask=inside, other=-1)
        before = (place < N) & (slot >= 0) & (slot - place <= rank)
        kept = tl.where(before, kept + step, kept)
        step = step >> 1
    return rank + kept


@triton.jit
def _fill(
    ADDRESSES,
    row,
    N,
    STEP,
    start,
    layer,
    stay,
    moved,
    turn,
    turns,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Move ROWS of the entries that fill holes at each of this program's turns, in the columns FROM to TO.

    Entries come from slots behind the new length and go to slots before it: no move is in the way of another.
    """
    first = turn * ROWS
    while first < moved:
        rank = first + tl.arange(0, ROWS)
        inside = rank < moved
        source = tl.load(row + stay + rank, mask=inside, other=0)
        target = _hole(row, N, STEP, rank, inside)
        for i in tl.static_range(FROM, TO):
            base = storage(ADDRESSES[i], layer, SIZES[i]) + start * WIDTHS[i]
            lane = tl.arange(0, LANES[i])
            mask = inside[:, None] & (lane < WIDTHS[i])[None, :]
            found = tl.load(entries(base, source, lane, WIDTHS[i]), mask=mask, other=0)
            tl.store(entries(base, target, lane, WIDTHS[i]), found, mask=mask)
        first += turns * ROWS


@triton.jit(do_not_specialize=["N", "STEP", "PARTS"])
def compact_holes(
    ADDRESSES,  # a tuple of [L] int64, one a column
    STARTS,  # [P] int64
    LENGTHS,  # [P] int32
    KEPT,  # [P, N] int32
    OUT,  # [P] int32
    N,
    STEP,  # the largest power of two that is at most N
    PARTS,  # programs that share the holes of a segment
    PER_LAYER: tl.constexpr,
    SIZES: tl.constexpr,  # of a column: bytes of an element
    WIDTHS: tl.constexpr,  # elements of an entry
    LANES: tl.constexpr,  # the power of two that holds them
    COLUMNS: tl.constexpr,  # how many there are without positions, which may follow
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Move kept entries from behind the new length into the holes before it; OUT = the new length."""
    segment = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    layer = segment // PER_LAYER
    start = tl.load(STARTS + segment)
    row = KEPT + segment * N
    count = count_below(row, N, 2147483647, BLOCK)
    stay = count_below(row, N, count, BLOCK)
    moved = count - stay
    if part == 0:
        tl.store(OUT + segment, count)
    if part < PARTS:
        _fill(ADDRESSES, row, N, STEP, start, layer, stay, moved, part, PARTS, 0, COLUMNS, SIZES, WIDTHS, LANES, ROWS)
    elif len(WIDTHS) > COLUMNS:
        # One program for all positions of a segment: where they were, they are cleared afterwards.
        _fill(
            ADDRESSES,
            row,
            N,
            STEP,
            start,
            layer,
            stay,
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
        base = storage(ADDRESSES[COLUMNS], layer, 4) + start
        clear(base, count, tl.load(LENGTHS + segment), BLOCK)


def launch(segments: Segments, kept: Tensor, columns: Sequence[Column], *, clears: bool, out: Tensor) -> None:
    """`compact` with checked arguments; the last column is positions if `clears`."""
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
        **_options(Bits.of(columns), clears=clears),
    )


def parts_of(longest: int, width: int) -> int:
    """Programs that share the holes of a segment; each of them loops if there are more holes than expected."""
    return min(_MOST_PARTS, max(1, -(-min(width, longest - width) // _ROWS)))


def _step(width: int) -> int:
    return 1 << width.bit_length() >> 1


def _options(bits: Bits, *, clears: bool) -> dict[str, object]:
    named = {"SIZES": bits.sizes, "WIDTHS": bits.widths, "LANES": bits.lanes()}
    columns = len(bits.sizes) - clears
    blocks = {"COLUMNS": columns, "ROWS": _ROWS, "BLOCK": COUNTED, "POSITIONS": _POSITIONS}
    return {**{name: constants(numbers) for name, numbers in named.items()}, **blocks}


def traffic(bits: Bits, segments: Segments, names: Sequence[str], width: int, moved: int, *, clears: bool) -> Traffic:
    """As `compact.traffic`; without what marks slots as empty."""
    programs, walks = parts_of(segments.longest, width) + clears, 1 + clears
    entry = {name: moved * size for name, size in zip(names, bits.entry_bytes, strict=True)}
    searched = walks * moved * (1 + width.bit_length())
    kept = 4 * (2 * programs * segments.count * width + searched)
    return Traffic({**entry, "kept": kept}, {**entry, "lengths": 4 * segments.count})


def builds() -> Iterator[Build]:
    """Launches as for bfloat16 keys and values with positions."""
    for dim in (64, 128):
        bits = Bits((4, 4, 4), (dim // 2, dim // 2, 1))
        yield Build(
            f"compact_holes D={dim}",
            compact_holes,
            types={"ADDRESSES": ("*i64",) * 3, **MOVING_TYPES, "STEP": "i32", "PARTS": "i32"},
            constants={"PER_LAYER": 8, **_options(bits, clears=True)},
            aligned=("STARTS", "LENGTHS", "KEPT", "OUT"),
        )
