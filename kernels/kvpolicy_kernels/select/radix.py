"""Radix select over float32 scores: the last key that is taken of each group of segments, digit by digit.

Four passes over the scores. Where segments are few and long, a pass is shared out to several programs, with a small
kernel between passes.
"""

from collections.abc import Iterator

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from kvpolicy_kernels.common.addressing import check_device, check_segments, check_tensor
from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.select.sort_keys import begins_with, digit_of, narrow, sort_keys

_POSITIONS = {torch.int32: tl.int32, torch.int64: tl.int64}
_LARGEST_CHUNK = 4096  # entries in registers at a time
_CHUNKS_ALONE = 4  # what one program walks sooner than nine launches take
_PROGRAMS = 264  # twice the multiprocessors of an H200
_MOST_SPLITS = 64
_MOST_ENTRIES = 1 << 22  # of a segment: those of 256 heads can be counted in an int32
DIGITS = 4
_TILE = tl.constexpr(16)  # histograms that are summed at a time
TABLES = {"SCORES": "*fp32", "ADDRESSES": "*i64", "STARTS": "*i64", "LENGTHS": "*i32"}
NUMBERS = {"T": "i32", "PER_LAYER": "i32", "FIRST": "i32", "RECENT": "i32"}


def warps_of(chunk: int) -> int:
    """Warps of a program with a chunk in registers: eight entries per thread; with more, some builds spill."""
    return max(4, chunk // 256)


@attrs.frozen
class Splits:
    """How the entries of a segment are shared out: to `count` programs, each walking `length` entries by chunks."""

    chunk: int
    count: int
    length: int
    alone: bool  # whether one program should rather do all passes of a segment

    @classmethod
    def of(cls, segments: Segments) -> "Splits":
        chunk = min(_LARGEST_CHUNK, max(256, next_power_of_2(max(1, segments.longest))))
        chunks = max(1, cdiv(segments.longest, chunk))
        each = cdiv(chunks, min(chunks, cdiv(_PROGRAMS, max(1, segments.count)), _MOST_SPLITS))
        count = cdiv(chunks, each)
        return cls(chunk, count, each * chunk, alone=count == 1 or chunks <= _CHUNKS_ALONE)


@attrs.frozen(eq=False)
class Job:
    """What all kernels that read scores are given."""

    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...]
    options: dict[str, object]
    segments: Segments
    splits: Splits

    @classmethod
    def of(cls, scores: Tensor, segments: Segments, positions: Column | None, sinks: int, recent: int) -> "Job":
        """Raises UnsupportedInputError for what the kernels cannot do."""
        check_device(scores.device)
        check_segments(segments, scores.device)
        check_tensor("scores", scores, torch.float32, (segments.count, segments.longest), scores.device)
        require(segments.longest <= _MOST_ENTRIES, f"{segments.longest} entries in a segment")
        require(recent >= 0, f"recent {recent}")
        addresses, dtype = segments.starts, torch.int32
        if sinks > 0:
            require(positions is not None and positions.width == 1, "sinks need positions, one a slot")
        if sinks > 0 and positions is not None:
            addresses, dtype = positions.addresses, positions.dtype
            require(dtype in _POSITIONS, f"positions of {dtype}")
            check_tensor("addresses", addresses, torch.int64, (segments.layers,), scores.device)
        splits = Splits.of(segments)
        constants = {"DTYPE": _POSITIONS[dtype], "SINKS": sinks > 0, "CHUNK": splits.chunk}
        options = {**constants, "num_warps": warps_of(splits.chunk)}
        numbers = (segments.longest, segments.per_layer, sinks, recent)
        return cls((scores, addresses, segments.starts, segments.lengths), numbers, options, segments, splits)


@attrs.frozen(eq=False)
class State:
    """What is known between passes, of G groups of segments and of P segments in S splits; all int32."""

    histograms: Tensor  # [P, S, 256], of the digit in question, for keys that begin with the digits found
    prefixes: Tensor  # [G], bits of the digits found
    needs: Tensor  # [G], how many are taken of the keys that begin so
    better: Tensor  # [P, S], keys above those
    equal: Tensor  # [P, S], keys that begin so
    protected: Tensor  # [P, S]


def narrowed(job: Job, budgets: Tensor, heads: int) -> State:
    """The last key that each group of `heads` segments takes `budgets` [G] with, and how many of its equals."""
    splits, segments = job.splits, job.segments
    groups = segments.count // heads
    shapes = ((segments.count, splits.count, 256), (groups,), (groups,), *[(segments.count, splits.count)] * 3)
    state = State(*(torch.empty(shape, dtype=torch.int32, device=budgets.device) for shape in shapes))
    for digit in range(DIGITS):
        _histogram[(segments.count * splits.count,)](
            *(*job.tensors, state.prefixes, state.histograms, state.protected, *job.numbers),
            *(heads, splits.count, splits.length, digit),
            **job.options,
        )
        _narrow[(groups,)](
            *(state.histograms, budgets, state.prefixes, state.needs, state.better, state.equal),
            *(heads * splits.count, digit),
        )
    return state


def passes_traffic(splits: Splits, segments: Segments, candidates: int, positions: int) -> Traffic:
    """Bytes that `narrowed` addresses: `candidates` scores a pass, their `positions` of so many bytes (0: no sinks)."""
    rows = segments.count * splits.count
    read = {
        "scores": DIGITS * candidates * 4,
        "positions": DIGITS * candidates * positions,
        "histograms": DIGITS * rows * 256 * 4 * 2,
    }
    return Traffic(read, {"histograms": DIGITS * rows * 256 * 4}, launches=2 * DIGITS)


@triton.jit(do_not_specialize=["T", "PER_LAYER", "FIRST", "RECENT", "HEADS", "SPLITS", "LENGTH", "DIGIT"])
def _histogram(SCORES, ADDRESSES, STARTS, LENGTHS, PREFIXES, HISTOGRAMS, PROTECTED, T, PER_LAYER, FIRST, RECENT, HEADS,
               SPLITS, LENGTH, DIGIT, DTYPE: tl.constexpr, SINKS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """HISTOGRAMS [P, S, 256] of DIGIT, of one split; with the first digit PROTECTED [P, S], too."""
    program = tl.program_id(0).to(tl.int64)
    segment = program // SPLITS
    first = (program % SPLITS).to(tl.int32) * LENGTH
    length = tl.load(LENGTHS + segment)
    last = tl.minimum(length, first + LENGTH)
    scores, positions = entries_of(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE)
    prefix = tl.load(PREFIXES + segment // HEADS, mask=DIGIT > 0, other=0).to(tl.uint32, bitcast=True)
    counts = count(scores, positions, first, last, length, FIRST, RECENT, prefix, DIGIT, SINKS, CHUNK)
    tl.store(HISTOGRAMS + program * 256 + tl.arange(0, 256), counts)
    tl.store(PROTECTED + program, tl.maximum(last - first, 0) - tl.sum(counts), mask=DIGIT == 0)


@triton.jit(do_not_specialize=["ROWS", "DIGIT"])
def _narrow(HISTOGRAMS, BUDGETS, PREFIXES, NEEDS, BETTER, EQUAL, ROWS, DIGIT):
    """PREFIXES and NEEDS [G] after DIGIT, and BETTER and EQUAL [P, S], of one group with ROWS histograms."""
    group = tl.program_id(0).to(tl.int64)
    histograms = HISTOGRAMS + group * ROWS * 256
    counts = tl.zeros((256,), tl.int32)
    row = 0
    while row < ROWS:
        counts += tl.sum(_tile(histograms, row, ROWS), 0)
        row += _TILE
    budget = tl.maximum(tl.minimum(tl.load(BUDGETS + group), tl.sum(counts)), 0).to(tl.int32)
    need = tl.where(DIGIT == 0, budget, tl.load(NEEDS + group, mask=DIGIT > 0, other=0))
    prefix = tl.load(PREFIXES + group, mask=DIGIT > 0, other=0).to(tl.uint32, bitcast=True)
    prefix, value, need = narrow(counts, need, prefix, DIGIT)
    tl.store(PREFIXES + group, prefix.to(tl.int32, bitcast=True))
    tl.store(NEEDS + group, need)
    row = 0
    while row < ROWS:
        rows = row + tl.arange(0, _TILE)
        tile = _tile(histograms, row, ROWS)
        places = group * ROWS + rows
        better = tl.load(BETTER + places, mask=rows < tl.where(DIGIT > 0, ROWS, 0), other=0)
        better += tl.sum(tl.where(tl.arange(0, 256)[None, :] > value, tile, 0), 1)
        tl.store(BETTER + places, better, mask=rows < ROWS)
        equal = tl.sum(tl.where(tl.arange(0, 256)[None, :] == value, tile, 0), 1)
        tl.store(EQUAL + places, equal, mask=rows < ROWS)
        row += _TILE


@triton.jit
def entries_of(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE: tl.constexpr):
    """Pointers to the scores and to the positions of a segment; the latter only to be used where there are sinks."""
    storage = tl.load(ADDRESSES + segment // PER_LAYER).to(tl.pointer_type(DTYPE))
    return SCORES + segment * T, storage + tl.load(STARTS + segment)


@triton.jit
def keys_of(scores, positions, slots, length, FIRST, RECENT, SINKS: tl.constexpr):
    """Sort keys of `slots`, whether they are candidates, and whether they are protected."""
    candidates = slots < length - RECENT
    keys = sort_keys(tl.load(scores + slots, mask=candidates, other=0.0))
    if SINKS:
        candidates &= tl.load(positions + slots, mask=candidates, other=0) >= FIRST
    return keys, candidates, (slots < length) & ~candidates


@triton.jit
def count(scores, positions, first, last, length, FIRST, RECENT, prefix, digit, SINKS: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """[256] candidates from `first` to `last` whose keys begin with `prefix`, by `digit`."""
    counts = tl.zeros((256,), tl.int32)
    while first < last:
        slots = first + tl.arange(0, CHUNK)
        keys, candidates, _ = keys_of(scores, positions, slots, length, FIRST, RECENT, SINKS)
        counts += tl.histogram(digit_of(keys, digit), 256, mask=candidates & begins_with(keys, prefix, digit))
        first += CHUNK
    return counts


@triton.jit
def _tile(histograms, row, ROWS):
    """Up to 16 histograms from `row` on, zeros behind ROWS."""
    rows = row + tl.arange(0, _TILE)
    places = rows.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tl.load(histograms + places, mask=(rows < ROWS)[:, None], other=0)


def passes_builds() -> Iterator[Build]:
    """The launches of `narrowed`: one chunk of a short segment, many of a long one, with and without sinks."""
    for chunk, sinks in ((2048, False), (4096, False), (4096, True)):
        tables = {**TABLES, "PREFIXES": "*i32", "HISTOGRAMS": "*i32", "PROTECTED": "*i32"}
        shares = {"HEADS": "i32", "SPLITS": "i32", "LENGTH": "i32", "DIGIT": "i32"}
        constants = {"DTYPE": tl.int32, "SINKS": sinks, "CHUNK": chunk}
        name = f"radix._histogram chunk={chunk}" + " sinks" * sinks
        types = {**tables, **NUMBERS, **shares}
        yield Build(name, _histogram, types, constants, tuple(tables), warps_of(chunk), wide_loads=False)
    tables = dict.fromkeys(("HISTOGRAMS", "PREFIXES", "NEEDS", "BETTER", "EQUAL"), "*i32") | {"BUDGETS": "*i64"}
    yield Build("radix._narrow", _narrow, {**tables, "ROWS": "i32", "DIGIT": "i32"}, {}, tuple(tables))
