"""Radix select over float32 scores: finds the smallest selected key of each group of segments, digit by digit.

Four passes over the scores. If segments are few and long, several programs share a pass, with a small kernel between
passes.

Reference: tests/kernels/references/select.py.
"""

from collections.abc import Iterator

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from kvpolicy_kernels.common.addressing import check_device, check_segments, check_tensor, segment_pointer
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.protection import Protection
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.select.sort_keys import begins_with, digit_of, next_digit, sort_keys

_POSITIONS = {torch.int32: tl.int32, torch.int64: tl.int64}
_MAX_CHUNK = 4096  # entries in registers at a time
_MAX_CHUNKS_SINGLE = 4  # one program reads so many chunks faster than nine launches take
_PROGRAMS = 264  # twice the multiprocessors of an H200
_MAX_SPLITS = 64
_MAX_ENTRIES = 1 << 22  # per segment: the sum over 256 heads fits an int32
DIGITS = 4
_ROWS_AT_ONCE = tl.constexpr(16)  # histograms that are summed at once
TABLE_TYPES = {"SCORES": "*fp32", "ADDRESSES": "*i64", "STARTS": "*i64", "LENGTHS": "*i32"}
PINNED_TYPES: dict[bool, dict[str, str]] = {False: {}, True: {"PINNED": "*u8"}}
NO_LABEL: dict[bool, dict[str, None]] = {False: {"PINNED": None}, True: {}}
COMPILED_CASES = ((2048, False, False), (4096, False, False), (4096, True, False), (4096, True, True))
NUMBER_TYPES = {"T": "i32", "PER_LAYER": "i32", "NUM_SINKS": "i32", "NUM_RECENT": "i32"}


def warps_of(chunk: int) -> int:
    """Warps for a chunk in registers: eight entries per thread; with more, some variants spill."""
    return max(4, chunk // 256)


@attrs.frozen
class Splits:
    """How a segment is split: among `count` programs, each reading `length` entries in chunks."""

    chunk: int
    count: int
    length: int
    single_program: bool  # whether one program per segment should run all passes

    @classmethod
    def of(cls, segments: Segments) -> "Splits":
        chunk = min(_MAX_CHUNK, max(256, next_power_of_2(max(1, segments.longest))))
        chunks = max(1, cdiv(segments.longest, chunk))
        chunks_each = cdiv(chunks, min(chunks, cdiv(_PROGRAMS, max(1, segments.count)), _MAX_SPLITS))
        count = cdiv(chunks, chunks_each)
        return cls(chunk, count, chunks_each * chunk, single_program=count == 1 or chunks <= _MAX_CHUNKS_SINGLE)


@attrs.frozen(eq=False)
class SelectInputs:
    """Checked arguments that all kernels which read scores have in common."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int, ...]
    options: dict[str, object]
    segments: Segments
    splits: Splits

    @classmethod
    def of(
        cls,
        scores: Tensor,
        segments: Segments,
        positions: Column | None,
        sinks: int,
        recent: int,
        pinned: Tensor | None,
    ) -> "SelectInputs":
        """Raises UnsupportedInputError for inputs that the kernels do not support."""
        check_device(scores.device)
        check_segments(segments, scores.device)
        check_tensor("scores", scores, torch.float32, (segments.count, segments.longest), scores.device)
        require(segments.longest <= _MAX_ENTRIES, f"{segments.longest} entries in a segment")
        protection = Protection.of(segments, sinks, recent, pinned)
        addresses, dtype = segments.starts, torch.int32
        if sinks > 0:
            require(positions is not None and positions.width == 1, "sinks need positions, one a slot")
        if sinks > 0 and positions is not None:
            addresses, dtype = positions.addresses, positions.dtype
            require(dtype in _POSITIONS, f"positions of {dtype}")
            check_tensor("addresses", addresses, torch.int64, (segments.layers,), scores.device)
        splits = Splits.of(segments)
        constants = {"DTYPE": _POSITIONS[dtype], "HAS_SINKS": sinks > 0, "CHUNK": splits.chunk}
        options = {**constants, "num_warps": warps_of(splits.chunk)}
        numbers = (segments.longest, segments.per_layer, sinks, recent)
        tensors = (scores, addresses, segments.starts, segments.lengths, protection.pinned)
        return cls(tensors, numbers, options, segments, splits)


@attrs.frozen(eq=False)
class RadixState:
    """State between passes, for G groups of segments and for P segments in S splits; all int32.

    A group is the segments that compete: one segment, or all heads of a row. The prefix of a group is the digits of
    its smallest selected key that are known so far.
    """

    histograms: Tensor  # [P, S, 256], of the current digit, over keys with the group's prefix
    prefixes: Tensor  # [G], as the bits of a uint32
    needs: Tensor  # [G], how many keys with the prefix are selected
    better: Tensor  # [P, S], number of keys above the prefix
    equal: Tensor  # [P, S], number of keys with the prefix
    protected: Tensor  # [P, S], number of protected entries


def find_thresholds(inputs: SelectInputs, budgets: Tensor, heads: int) -> RadixState:
    """The smallest selected key of each group of `heads` segments selecting `budgets` [G], and how many equal ones."""
    splits, segments = inputs.splits, inputs.segments
    groups = segments.count // heads
    shapes = ((segments.count, splits.count, 256), (groups,), (groups,), *[(segments.count, splits.count)] * 3)
    state = RadixState(*(torch.empty(shape, dtype=torch.int32, device=budgets.device) for shape in shapes))
    for digit in range(DIGITS):
        _histogram[(segments.count * splits.count,)](
            *(*inputs.tensors, state.prefixes, state.histograms, state.protected, *inputs.numbers),
            *(heads, splits.count, splits.length, digit),
            **inputs.options,
        )
        _next_digit[(groups,)](
            *(state.histograms, budgets, state.prefixes, state.needs, state.better, state.equal),
            *(heads * splits.count, digit),
        )
    return state


def find_thresholds_traffic(
    splits: Splits, segments: Segments, candidates: int, positions: int, *, pinned: bool = False
) -> Traffic:
    """Bytes that `find_thresholds` moves.

    Args:
        splits: of each segment.
        segments: P segments.
        candidates: scores that each pass reads.
        positions: bytes per position, 0 without sinks.
        pinned: whether slots have a label.
    """
    rows = segments.count * splits.count
    read = {
        "scores": DIGITS * candidates * 4,
        "positions": DIGITS * candidates * positions,
        "histograms": DIGITS * rows * 256 * 4 * 2,
    }
    if pinned:
        read["pinned"] = DIGITS * candidates
    return Traffic(read, {"histograms": DIGITS * rows * 256 * 4}, launches=2 * DIGITS)


@triton.jit(do_not_specialize=["T", "PER_LAYER", "NUM_SINKS", "NUM_RECENT", "HEADS", "SPLITS", "LENGTH", "DIGIT"])
def _histogram(SCORES, ADDRESSES, STARTS, LENGTHS, PINNED, PREFIXES, HISTOGRAMS, PROTECTED, T, PER_LAYER, NUM_SINKS,
               NUM_RECENT, HEADS, SPLITS, LENGTH, DIGIT, DTYPE: tl.constexpr, HAS_SINKS: tl.constexpr,
               CHUNK: tl.constexpr):  # fmt: skip
    """HISTOGRAMS [P, S, 256] of DIGIT for one split; for digit 0 also PROTECTED [P, S]."""
    program = tl.program_id(0).to(tl.int64)
    segment = program // SPLITS
    first = (program % SPLITS).to(tl.int32) * LENGTH
    length = tl.load(LENGTHS + segment)
    end = tl.minimum(length, first + LENGTH)
    scores, positions = score_pointers(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE)
    pinned = None
    if PINNED is not None:
        pinned = PINNED + segment * T
    prefix = tl.load(PREFIXES + segment // HEADS, mask=DIGIT > 0, other=0).to(tl.uint32, bitcast=True)
    counts = histogram(scores, positions, pinned, first, end, length, NUM_SINKS, NUM_RECENT, prefix, DIGIT, HAS_SINKS,
                       CHUNK)  # fmt: skip
    tl.store(HISTOGRAMS + program * 256 + tl.arange(0, 256), counts)
    tl.store(PROTECTED + program, tl.maximum(end - first, 0) - tl.sum(counts), mask=DIGIT == 0)


@triton.jit(do_not_specialize=["ROWS", "DIGIT"])
def _next_digit(HISTOGRAMS, BUDGETS, PREFIXES, NEEDS, BETTER, EQUAL, ROWS, DIGIT):
    """Update PREFIXES, NEEDS [G], BETTER and EQUAL [P, S] of one group by DIGIT, from its ROWS histograms."""
    group = tl.program_id(0).to(tl.int64)
    histograms = HISTOGRAMS + group * ROWS * 256
    counts = tl.zeros((256,), tl.int32)
    row = 0
    while row < ROWS:
        counts += tl.sum(_load_histograms(histograms, row, ROWS), 0)
        row += _ROWS_AT_ONCE
    budget = tl.maximum(tl.minimum(tl.load(BUDGETS + group), tl.sum(counts)), 0).to(tl.int32)
    need = tl.where(DIGIT == 0, budget, tl.load(NEEDS + group, mask=DIGIT > 0, other=0))
    prefix = tl.load(PREFIXES + group, mask=DIGIT > 0, other=0).to(tl.uint32, bitcast=True)
    prefix, value, need = next_digit(counts, need, prefix, DIGIT)
    tl.store(PREFIXES + group, prefix.to(tl.int32, bitcast=True))
    tl.store(NEEDS + group, need)
    row = 0
    while row < ROWS:
        rows = row + tl.arange(0, _ROWS_AT_ONCE)
        block = _load_histograms(histograms, row, ROWS)
        indices = group * ROWS + rows
        better = tl.load(BETTER + indices, mask=rows < tl.where(DIGIT > 0, ROWS, 0), other=0)
        better += tl.sum(tl.where(tl.arange(0, 256)[None, :] > value, block, 0), 1)
        tl.store(BETTER + indices, better, mask=rows < ROWS)
        equal = tl.sum(tl.where(tl.arange(0, 256)[None, :] == value, block, 0), 1)
        tl.store(EQUAL + indices, equal, mask=rows < ROWS)
        row += _ROWS_AT_ONCE


@triton.jit
def score_pointers(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE: tl.constexpr):
    """Pointers to the scores and to the positions of a segment; positions are valid only with sinks."""
    return SCORES + segment * T, segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, 1)


@triton.jit
def load_keys(scores, positions, pinned, slots, length, NUM_SINKS, NUM_RECENT, HAS_SINKS: tl.constexpr):
    """Sort keys of `slots`, which of them are candidates, and which are protected; `pinned` is a label or None."""
    old = slots < length - NUM_RECENT
    keys = sort_keys(tl.load(scores + slots, mask=old, other=0.0))
    candidates = old
    if HAS_SINKS:
        candidates &= tl.load(positions + slots, mask=old, other=0) >= NUM_SINKS
    if pinned is not None:
        candidates &= tl.load(pinned + slots, mask=old, other=0) == 0
    return keys, candidates, (slots < length) & ~candidates


@triton.jit
def histogram(scores, positions, pinned, first, end, length, NUM_SINKS, NUM_RECENT, prefix, digit,
              HAS_SINKS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Histogram [256] of `digit` over the candidates from `first` to `end` whose keys start with `prefix`."""
    counts = tl.zeros((256,), tl.int32)
    while first < end:
        slots = first + tl.arange(0, CHUNK)
        keys, candidates, _ = load_keys(scores, positions, pinned, slots, length, NUM_SINKS, NUM_RECENT, HAS_SINKS)
        counts += tl.histogram(digit_of(keys, digit), 256, mask=candidates & begins_with(keys, prefix, digit))
        first += CHUNK
    return counts


@triton.jit
def _load_histograms(histograms, row, ROWS):
    """16 histograms from `row` on, zeros beyond ROWS."""
    rows = row + tl.arange(0, _ROWS_AT_ONCE)
    offsets = rows.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tl.load(histograms + offsets, mask=(rows < ROWS)[:, None], other=0)


def find_thresholds_compile_specs() -> Iterator[CompileSpec]:
    """The launches of `find_thresholds`, for short and long segments, with and without sinks and a label."""
    for chunk, sinks, pinned in COMPILED_CASES:
        tables = {**TABLE_TYPES, **PINNED_TYPES[pinned], "PREFIXES": "*i32", "HISTOGRAMS": "*i32", "PROTECTED": "*i32"}
        shares = {"HEADS": "i32", "SPLITS": "i32", "LENGTH": "i32", "DIGIT": "i32"}
        constants = {"DTYPE": tl.int32, "HAS_SINKS": sinks, "CHUNK": chunk, **NO_LABEL[pinned]}
        name = f"radix._histogram chunk={chunk}" + " sinks" * sinks + " pinned" * pinned
        types = {**tables, **NUMBER_TYPES, **shares}
        yield CompileSpec(name, _histogram, types, constants, tuple(tables), warps_of(chunk), wide_loads=False)
    tables = dict.fromkeys(("HISTOGRAMS", "PREFIXES", "NEEDS", "BETTER", "EQUAL"), "*i32") | {"BUDGETS": "*i64"}
    yield CompileSpec("radix._next_digit", _next_digit, {**tables, "ROWS": "i32", "DIGIT": "i32"}, {}, tuple(tables))
