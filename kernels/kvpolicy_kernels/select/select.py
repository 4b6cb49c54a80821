"""The best entries of each head, and how many of a row's best each head owns."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from kvpolicy_kernels.common.addressing import check_tensor
from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.select.radix import (
    DIGITS,
    NUMBERS,
    TABLES,
    Job,
    Splits,
    count,
    entries_of,
    keys_of,
    narrowed,
    passes_builds,
    passes_traffic,
    warps_of,
)
from kvpolicy_kernels.select.sort_keys import narrow

_MOST_HEADS = 256
_WRITING = {"CHUNK": 1024}  # of `_write`, which keeps more for every entry than the passes do; divides their chunks


def select(
    scores: Tensor,
    segments: Segments,
    counts: Tensor,
    width: int,
    *,
    positions: Column | None = None,
    sinks: int = 0,
    recent: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The slots that stay, ascending, -1 behind: [P, `width`] int32.

    Kept are the protected entries of a head, those with a position below `sinks` and the last `recent`, and the best
    `counts` [P] (int32 or int64) of its others by float32 `scores` [P, T]: higher first, NaN last, -0.0 equal to 0.0,
    ties to the lower slot. `width` is at least the largest number that any head keeps; what is kept beyond it is lost.

    Raises UnsupportedInputError, before anything is written, for what the kernels cannot do.
    """
    job = Job.of(scores, segments, positions, sinks, recent)
    require(width >= 0, f"width {width}")
    _check_counts("counts", counts, segments.count, scores.device)
    out = torch.empty((segments.count, width), dtype=torch.int32, device=scores.device) if out is None else out
    check_tensor("out", out, torch.int32, (segments.count, width), scores.device)
    if out.numel() and job.splits.alone:
        _select[(segments.count,)](*job.tensors, counts, out, *job.numbers, width, **job.options)
    elif out.numel():
        state, splits = narrowed(job, counts, heads=1), job.splits
        _write[(segments.count * splits.count,)](
            *(*job.tensors, state.prefixes, state.needs, state.better, state.equal, state.protected, out),
            *(*job.numbers, width, splits.count, splits.length),
            **{**job.options, **_WRITING, "ALL": next_power_of_2(splits.count), "num_warps": 8},
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
    out: Tensor | None = None,
) -> Tensor:
    """How many of the best `totals` [L·B] (int32 or int64) candidates of a row each of its heads owns: [P] int32.

    The heads of a layer and row compete (Ada-KV, arXiv:2407.11550, algorithm 1); what `select` protects takes no part.
    The order is that of `select`; ties go to the lower head, then to the lower slot.

    Raises UnsupportedInputError, before anything is written, for what the kernels cannot do.
    """
    job, groups = Job.of(scores, segments, positions, sinks, recent), segments.layers * segments.rows
    _check_counts("totals", totals, groups, scores.device)
    require(segments.heads <= _MOST_HEADS, f"{segments.heads} KV heads")
    out = torch.empty(segments.count, dtype=torch.int32, device=scores.device) if out is None else out
    check_tensor("out", out, torch.int32, (segments.count,), scores.device)
    if out.numel():
        state, splits = narrowed(job, totals, segments.heads), job.splits
        shape = {"HEADS": next_power_of_2(segments.heads), "ALL": next_power_of_2(splits.count)}
        _share[(groups,)](state.needs, state.better, state.equal, out, segments.heads, splits.count, **shape)
    return out


def traffic(
    segments: Segments, lengths: Sequence[int], width: int, *, recent: int = 0, positions: Column | None = None
) -> Traffic:
    """Bytes that `select` addresses in segments of these `lengths`, small tables left out.

    `positions` is None where there are no sinks.
    """
    splits, candidates = Splits.of(segments), sum(max(0, length - recent) for length in lengths)
    each = positions.dtype.itemsize if positions else 0
    last, kept = {"scores": candidates * 4, "positions": candidates * each}, {"kept": segments.count * width * 4}
    if splits.alone:
        return Traffic({name: (DIGITS + 1) * size for name, size in last.items()}, kept)
    return Traffic.total((passes_traffic(splits, segments, candidates, each), Traffic(last, kept)))


def counts_traffic(
    segments: Segments, lengths: Sequence[int], *, recent: int = 0, positions: Column | None = None
) -> Traffic:
    """Bytes that `counts_of_best` addresses, as `traffic`."""
    splits, candidates = Splits.of(segments), sum(max(0, length - recent) for length in lengths)
    passes = passes_traffic(splits, segments, candidates, positions.dtype.itemsize if positions else 0)
    return Traffic.total((passes, Traffic({}, {"counts": segments.count * 4})))


@triton.jit(do_not_specialize=["T", "PER_LAYER", "FIRST", "RECENT", "WIDTH"])
def _select(SCORES, ADDRESSES, STARTS, LENGTHS, COUNTS, OUT, T, PER_LAYER, FIRST, RECENT, WIDTH, DTYPE: tl.constexpr,
            SINKS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """OUT [P, WIDTH] of one segment: all passes."""
    segment = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTHS + segment)
    scores, positions = entries_of(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE)
    need = tl.maximum(tl.minimum(tl.load(COUNTS + segment), T), 0).to(tl.int32)
    prefix = tl.full((), 0, tl.uint32)
    zero = tl.full((), 0, tl.int32)  # where loops start: a plain 0 would be a constant
    for digit in range(4):
        counts = count(scores, positions, zero, length, length, FIRST, RECENT, prefix, digit, SINKS, CHUNK)
        need = tl.minimum(need, tl.sum(counts))  # there may be fewer candidates
        prefix, _, need = narrow(counts, need, prefix, digit)
    out = OUT + segment * WIDTH
    kept = _store(scores, positions, out, zero, length, length, FIRST, RECENT, prefix, need, zero, zero, WIDTH, SINKS,
                  CHUNK)  # fmt: skip
    _fill(out, kept, WIDTH, CHUNK, CHUNK)


@triton.jit(do_not_specialize=["T", "PER_LAYER", "FIRST", "RECENT", "WIDTH", "SPLITS", "LENGTH"])
def _write(SCORES, ADDRESSES, STARTS, LENGTHS, PREFIXES, NEEDS, BETTER, EQUAL, PROTECTED, OUT, T, PER_LAYER, FIRST,
           RECENT, WIDTH, SPLITS, LENGTH, DTYPE: tl.constexpr, SINKS: tl.constexpr, CHUNK: tl.constexpr,
           ALL: tl.constexpr):  # fmt: skip
    """OUT [P, WIDTH], what one split keeps, behind what the splits before it keep."""
    segment = tl.program_id(0).to(tl.int64) // SPLITS
    split = tl.program_id(0) % SPLITS
    length = tl.load(LENGTHS + segment)
    last = tl.minimum(length, (split + 1) * LENGTH)
    scores, positions = entries_of(SCORES, ADDRESSES, STARTS, segment, T, PER_LAYER, DTYPE)
    prefix = tl.load(PREFIXES + segment).to(tl.uint32, bitcast=True)
    need = tl.load(NEEDS + segment)
    splits = tl.arange(0, ALL)
    places = segment * SPLITS + splits
    equal = tl.load(EQUAL + places, mask=splits < SPLITS, other=0)
    left = need - (tl.cumsum(equal, 0) - equal)
    kept = tl.minimum(tl.maximum(left, 0), equal)
    kept += tl.load(BETTER + places, mask=splits < SPLITS, other=0)
    kept += tl.load(PROTECTED + places, mask=splits < SPLITS, other=0)
    before = tl.sum(tl.where(splits < split, kept, 0))
    equals = tl.sum(tl.where(splits < split, equal, 0))
    out = OUT + segment * WIDTH
    _fill(out, tl.sum(kept) + split * CHUNK, WIDTH, SPLITS * CHUNK, CHUNK)
    first = split * LENGTH
    _store(scores, positions, out, first, last, length, FIRST, RECENT, prefix, need, before, equals, WIDTH, SINKS,
           CHUNK)  # fmt: skip


@triton.jit
def _store(scores, positions, out, first, last, length, FIRST, RECENT, prefix, need, place, equals, WIDTH,
           SINKS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Store the slots from `first` to `last` that stay at `out` + `place`; `equals` were met before. The next place."""
    while first < last:
        slots = first + tl.arange(0, CHUNK)
        keys, candidates, protected = keys_of(scores, positions, slots, length, FIRST, RECENT, SINKS)
        equal = candidates & (keys == prefix)
        taken = equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= need)
        keep = protected | taken | (candidates & (keys > prefix))
        places = place + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(out + places, slots, mask=keep & (places < WIDTH))
        equals += tl.sum(equal.to(tl.int32))
        place += tl.sum(keep.to(tl.int32))
        first += CHUNK
    return place


@triton.jit
def _fill(out, first, WIDTH, step, CHUNK: tl.constexpr):
    """Store -1 in chunks of places from `first` on, `step` apart, up to WIDTH."""
    while first < WIDTH:
        places = first + tl.arange(0, CHUNK)
        tl.store(out + places, -1, mask=places < WIDTH)
        first += step


@triton.jit(do_not_specialize=["K", "SPLITS"])
def _share(NEEDS, BETTER, EQUAL, OUT, K, SPLITS, HEADS: tl.constexpr, ALL: tl.constexpr):
    """OUT [P]: what each of the K heads of a group owns; lower heads are first to have their equals taken."""
    group = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    splits = tl.arange(0, ALL)
    places = (group * K + heads)[:, None] * SPLITS + splits[None, :]
    held = (heads < K)[:, None] & (splits < SPLITS)[None, :]
    better = tl.sum(tl.load(BETTER + places, mask=held, other=0), 1)
    equal = tl.sum(tl.load(EQUAL + places, mask=held, other=0), 1)
    left = tl.load(NEEDS + group) - (tl.cumsum(equal, 0) - equal)
    tl.store(OUT + group * K + heads, better + tl.minimum(tl.maximum(left, 0), equal), mask=heads < K)


def builds() -> Iterator[Build]:
    """All launches of `select` and `counts_of_best`."""
    yield from passes_builds()
    for chunk, sinks in ((2048, False), (4096, False), (4096, True)):
        constants = {"DTYPE": tl.int32, "SINKS": sinks, "CHUNK": chunk}
        tables = {**TABLES, "COUNTS": "*i64", "OUT": "*i32"}
        name = f"chunk={chunk}" + " sinks" * sinks
        types = {**tables, **NUMBERS, "WIDTH": "i32"}
        yield Build(
            f"select._select {name}", _select, types, constants, tuple(tables), warps_of(chunk), wide_loads=False
        )
    state = dict.fromkeys(("PREFIXES", "NEEDS", "BETTER", "EQUAL", "PROTECTED", "OUT"), "*i32")
    types = {**TABLES, **state, **NUMBERS, "WIDTH": "i32", "SPLITS": "i32", "LENGTH": "i32"}
    for sinks in (False, True):
        constants = {"DTYPE": tl.int32, "SINKS": sinks, **_WRITING, "ALL": 64}
        name = "select._write" + " sinks" * sinks
        yield Build(name, _write, types, constants, (*TABLES, *state), 8, wide_loads=False)
    tables = dict.fromkeys(("NEEDS", "BETTER", "EQUAL", "OUT"), "*i32")
    types = {**tables, "K": "i32", "SPLITS": "i32"}
    yield Build("select._share", _share, types, {"HEADS": 8, "ALL": 64}, tuple(tables), wide_loads=False)


def _check_counts(name: str, counts: Tensor, count: int, device: torch.device) -> None:
    require(counts.dtype in (torch.int32, torch.int64), f"{name} of {counts.dtype}")
    check_tensor(name, counts, counts.dtype, (count,), device)
