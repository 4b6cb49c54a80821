"""Selection of the entries with the highest scores, per head or in competition between the heads of a row.

Reference: tests/kernels/references/select.py.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from kvpolicy_kernels.common.addressing import check_tensor
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.select.radix import (
    COMPILED_CASES,
    DIGITS,
    NO_LABEL,
    NUMBER_TYPES,
    PINNED_TYPES,
    TABLE_TYPES,
    SelectInputs,
    Splits,
    find_thresholds,
    find_thresholds_compile_specs,
    find_thresholds_traffic,
    histogram,
    load_keys,
    score_pointers,
    warps_of,
)
from kvpolicy_kernels.select.sort_keys import next_digit

_MAX_HEADS = 256
# `_write` needs more registers per entry than the passes. Divides their chunks.
_WRITE_OPTIONS = {"CHUNK": 1024}


def select(
    scores: Tensor,
    segments: Segments,
    counts: Tensor,
    width: int,
    *,
    positions: Column | None = None,
    sinks: int = 0,
    recent: int = 0,
    pinned: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Keep indices: the protected entries of each head and its candidates with the highest scores.

    Order of scores: higher first, NaN last, -0.0 equal to 0.0, ties to the lower slot.

    Args:
        scores: [P, T] float32.
        segments: P segments.
        counts: [P] int32 or int64, how many candidates each head keeps.
        width: N, at least the largest number of entries that a head keeps; entries beyond it are dropped.
        positions: int32 or int64, one per slot; required with `sinks`.
        sinks: entries at positions below are protected.
        recent: the newest entries of a head that are protected.
        pinned: [P, T] bool or uint8 contiguous, slots that are protected beside those; None = no slot is.
        out: [P, N] int32 contiguous, written in place.

    Returns:
        [P, N] int32: slots in ascending order, padded with -1.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    inputs = SelectInputs.of(scores, segments, positions, sinks, recent, pinned)
    require(width >= 0, f"width {width}")
    _check_counts("counts", counts, segments.count, scores.device)
    out = torch.empty((segments.count, width), dtype=torch.int32, device=scores.device) if out is None else out
    check_tensor("out", out, torch.int32, (segments.count, width), scores.device)
    if out.numel() and inputs.splits.single_program:
        _select[(segments.count,)](*inputs.tensors, counts, out, *inputs.numbers, width, **inputs.options)
    elif out.numel():
        state, splits = find_thresholds(inputs, counts, heads=1), inputs.splits
        _write[(segments.count * splits.count,)](
            *(*inputs.tensors, state.prefixes, state.needs, state.better, state.equal, state.protected, out),
            *(*inputs.numbers, width, splits.count, splits.length),
            **{**inputs.options, **_WRITE_OPTIONS, "ALL": next_power_of_2(splits.count), "num_warps": 8},
        )
    return out


def counts_of_best(
    scores: Tensor,
    segments: Segments,
    totals: Tensor,
    *,
    positions: Column | None = None,
    sinks: int = 0,
    recent: int = 0,
    pinned: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """How many of a row's best candidates each of its heads holds (Ada-KV, arXiv:2407.11550, algorithm 1).

    The heads of a row of a layer compete. Protected entries are not candidates. Scores are ordered as in `select`; ties
    go to the lower head, then to the lower slot.

    Args:
        scores: [P, T] float32.
        segments: P segments.
        totals: [L·B] int32 or int64, how many candidates all heads of a row keep together.
        positions: as in `select`.
        sinks: as in `select`.
        recent: as in `select`.
        pinned: as in `select`.
        out: [P] int32 contiguous, written in place.

    Returns:
        [P] int32.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    inputs = SelectInputs.of(scores, segments, positions, sinks, recent, pinned)
    groups = segments.layers * segments.rows
    _check_counts("totals", totals, groups, scores.device)
    require(segments.heads <= _MAX_HEADS, f"{segments.heads} KV heads")
    out = torch.empty(segments.count, dtype=torch.int32, device=scores.device) if out is None else out
    check_tensor("out", out, torch.int32, (segments.count,), scores.device)
    if out.numel():
        state, splits = find_thresholds(inputs, totals, segments.heads), inputs.splits
        shape = {"HEADS": next_power_of_2(segments.heads), "ALL": next_power_of_2(splits.count)}
        _head_counts[(groups,)](state.needs, state.better, state.equal, out, segments.heads, splits.count, **shape)
    return out


def traffic(
    segments: Segments,
    lengths: Sequence[int],
    width: int,
    *,
    recent: int = 0,
    positions: Column | None = None,
    pinned: bool = False,
) -> Traffic:
    """Bytes that `select` moves in segments of these `lengths`, without small tables.

    `positions` is None without sinks, and `pinned` says whether slots have a label.
    """
    splits, candidates = Splits.of(segments), sum(max(0, length - recent) for length in lengths)
    position_bytes = positions.dtype.itemsize if positions else 0
    final_read, final_written = (
        {
            "scores": candidates * 4,
            "positions": candidates * position_bytes,
            **({"pinned": candidates} if pinned else {}),
        },
        {"kept": segments.count * width * 4},
    )
    if splits.single_program:
        return Traffic({name: (DIGITS + 1) * size for name, size in final_read.items()}, final_written)
    passes = find_thresholds_traffic(splits, segments, candidates, position_bytes, pinned=pinned)
    return Traffic.total((passes, Traffic(final_read, final_written)))


def counts_traffic(
    segments: Segments,
    lengths: Sequence[int],
    *,
    recent: int = 0,
    positions: Column | None = None,
    pinned: bool = False,
) -> Traffic:
    """Bytes that `counts_of_best` moves; arguments as for `traffic`."""
    splits, candidates = Splits.of(segments), sum(max(0, length - recent) for length in lengths)
    position_bytes = positions.dtype.itemsize if positions else 0
    passes = find_thresholds_traffic(splits, segments, candidates, position_bytes, pinned=pinned)
    return Traffic.total((passes, Traffic({}, {"counts": segments.count * 4})))


@triton.jit(do_not_specialize=["T", "PER_LAYER", "NUM_SINKS", "NUM_RECENT", "WIDTH"])
def _select(SCORES, ADDRESSES, STARTS, LENGTHS, PINNED, COUNTS, OUT, T, PER_LAYER, NUM_SINKS, NUM_RECENT, WIDTH,
            DTYPE: tl.constexpr, HAS_SINKS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """OUT [P, WIDTH]: one program runs all passes of a segment."""
    segment = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTHS + segment)
    scores, positions = score_pointers(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE)
    pinned = None
    if PINNED is not None:
        pinned = PINNED + segment * T
    need = tl.maximum(tl.minimum(tl.load(COUNTS + segment), T), 0).to(tl.int32)
    prefix = tl.full((), 0, tl.uint32)
    zero = tl.full((), 0, tl.int32)  # a tensor: loops may not start from a constant
    for digit in range(4):
        counts = histogram(
            scores, positions, pinned, zero, length, length, NUM_SINKS, NUM_RECENT, prefix, digit, HAS_SINKS, CHUNK
        )
        need = tl.minimum(need, tl.sum(counts))  # if there are fewer candidates
        prefix, _, need = next_digit(counts, need, prefix, digit)
    out = OUT + segment * WIDTH
    kept = _store_kept(scores, positions, pinned, out, zero, length, length, NUM_SINKS, NUM_RECENT, prefix, need, zero,
                       zero, WIDTH, HAS_SINKS, CHUNK)  # fmt: skip
    _store_padding(out, kept, WIDTH, CHUNK, CHUNK)


@triton.jit(do_not_specialize=["T", "PER_LAYER", "NUM_SINKS", "NUM_RECENT", "WIDTH", "SPLITS", "LENGTH"])
def _write(SCORES, ADDRESSES, STARTS, LENGTHS, PINNED, PREFIXES, NEEDS, BETTER, EQUAL, PROTECTED, OUT, T, PER_LAYER,
           NUM_SINKS, NUM_RECENT, WIDTH, SPLITS, LENGTH, DTYPE: tl.constexpr, HAS_SINKS: tl.constexpr,
           CHUNK: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """OUT [P, WIDTH]: one split writes its kept slots after those of the splits before it."""
    segment = tl.program_id(0).to(tl.int64) // SPLITS
    split = tl.program_id(0) % SPLITS
    length = tl.load(LENGTHS + segment)
    end = tl.minimum(length, (split + 1) * LENGTH)
    scores, positions = score_pointers(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE)
    pinned = None
    if PINNED is not None:
        pinned = PINNED + segment * T
    prefix = tl.load(PREFIXES + segment).to(tl.uint32, bitcast=True)
    need = tl.load(NEEDS + segment)
    splits = tl.arange(0, ALL)
    indices = segment * SPLITS + splits
    equal = tl.load(EQUAL + indices, mask=splits < SPLITS, other=0)
    left = need - (tl.cumsum(equal, 0) - equal)
    kept = tl.minimum(tl.maximum(left, 0), equal)
    kept += tl.load(BETTER + indices, mask=splits < SPLITS, other=0)
    kept += tl.load(PROTECTED + indices, mask=splits < SPLITS, other=0)
    before = tl.sum(tl.where(splits < split, kept, 0))
    equals = tl.sum(tl.where(splits < split, equal, 0))
    out = OUT + segment * WIDTH
    _store_padding(out, tl.sum(kept) + split * CHUNK, WIDTH, SPLITS * CHUNK, CHUNK)
    first = split * LENGTH
    _store_kept(scores, positions, pinned, out, first, end, length, NUM_SINKS, NUM_RECENT, prefix, need, before, equals,
                WIDTH, HAS_SINKS, CHUNK)  # fmt: skip


@triton.jit
def _store_kept(scores, positions, pinned, out, first, end, length, NUM_SINKS, NUM_RECENT, prefix, need, index, equals,
                WIDTH, HAS_SINKS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Store the kept slots among `first` to `end`, from `out` + `index` on; the index after the last one.

    `equals` counts the keys equal to `prefix` before `first`.
    """
    while first < end:
        slots = first + tl.arange(0, CHUNK)
        keys, candidates, protected = load_keys(
            scores, positions, pinned, slots, length, NUM_SINKS, NUM_RECENT, HAS_SINKS
        )
        equal = candidates & (keys == prefix)
        taken = equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= need)
        keep = protected | taken | (candidates & (keys > prefix))
        indices = index + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(out + indices, slots, mask=keep & (indices < WIDTH))
        equals += tl.sum(equal.to(tl.int32))
        index += tl.sum(keep.to(tl.int32))
        first += CHUNK
    return index


@triton.jit
def _store_padding(out, first, WIDTH, step, CHUNK: tl.constexpr):
    """Store -1 from index `first` up to WIDTH: every `step` a chunk."""
    while first < WIDTH:
        indices = first + tl.arange(0, CHUNK)
        tl.store(out + indices, -1, mask=indices < WIDTH)
        first += step


@triton.jit(do_not_specialize=["K", "SPLITS"])
def _head_counts(NEEDS, BETTER, EQUAL, OUT, K, SPLITS, HEADS: tl.constexpr, ALL: tl.constexpr):
    """OUT [P]: how many candidates each of the K heads of a group keeps; lower heads take equal keys first."""
    group = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    splits = tl.arange(0, ALL)
    indices = (group * K + heads)[:, None] * SPLITS + splits[None, :]
    mask = (heads < K)[:, None] & (splits < SPLITS)[None, :]
    better = tl.sum(tl.load(BETTER + indices, mask=mask, other=0), 1)
    equal = tl.sum(tl.load(EQUAL + indices, mask=mask, other=0), 1)
    left = tl.load(NEEDS + group) - (tl.cumsum(equal, 0) - equal)
    tl.store(OUT + group * K + heads, better + tl.minimum(tl.maximum(left, 0), equal), mask=heads < K)


def compile_specs() -> Iterator[CompileSpec]:
    """All launches of `select` and `counts_of_best`."""
    yield from find_thresholds_compile_specs()
    for chunk, sinks, pinned in COMPILED_CASES:
        constants = {"DTYPE": tl.int32, "HAS_SINKS": sinks, "CHUNK": chunk, **NO_LABEL[pinned]}
        tables = {**TABLE_TYPES, **PINNED_TYPES[pinned], "COUNTS": "*i64", "OUT": "*i32"}
        name = f"chunk={chunk}" + " sinks" * sinks + " pinned" * pinned
        types = {**tables, **NUMBER_TYPES, "WIDTH": "i32"}
        yield CompileSpec(
            f"select._select {name}", _select, types, constants, tuple(tables), warps_of(chunk), wide_loads=False
        )
    state = dict.fromkeys(("PREFIXES", "NEEDS", "BETTER", "EQUAL", "PROTECTED", "OUT"), "*i32")
    for sinks, pinned in ((False, False), (True, False), (True, True)):
        tables = {**TABLE_TYPES, **PINNED_TYPES[pinned], **state}
        types = {**tables, **NUMBER_TYPES, "WIDTH": "i32", "SPLITS": "i32", "LENGTH": "i32"}
        constants = {"DTYPE": tl.int32, "HAS_SINKS": sinks, **_WRITE_OPTIONS, "ALL": 64, **NO_LABEL[pinned]}
        name = "select._write" + " sinks" * sinks + " pinned" * pinned
        yield CompileSpec(name, _write, types, constants, tuple(tables), 8, wide_loads=False)
    tables = dict.fromkeys(("NEEDS", "BETTER", "EQUAL", "OUT"), "*i32")
    types = {**tables, "K": "i32", "SPLITS": "i32"}
    yield CompileSpec(
        "select._head_counts", _head_counts, types, {"HEADS": 8, "ALL": 64}, tuple(tables), wide_loads=False
    )


def _check_counts(name: str, counts: Tensor, count: int, device: torch.device) -> None:
    require(counts.dtype in (torch.int32, torch.int64), f"{name} of {counts.dtype}")
    check_tensor(name, counts, counts.dtype, (count,), device)
