"""From the scores of all terms to one: softmax, pooling, normalisation and weights (`tile.Finish`), summed.

Up to three launches, each parallel over entries: sums for the softmaxes, sums for the normalisations, and the result.
References: tests/kernels/references/finishing.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.builds import Build
from kvpolicy_kernels.imagined import imagined
from kvpolicy_kernels.launches import Launch
from kvpolicy_kernels.logits import LOG2E, storage
from kvpolicy_kernels.passes import check_column, check_output, check_segments
from kvpolicy_kernels.segments import Column, Segments
from kvpolicy_kernels.support import require
from kvpolicy_kernels.tile import Finish
from kvpolicy_kernels.traffic import Traffic
from kvpolicy_kernels.window import power_of_two

_BLOCK = 512  # entries of one program
_MOST_SINKS = 4096
_MOST_PARTS = 8192
_WIDEST_POOL = 1023
_POOLS = ("none", "max", "average")
_NORMALS = ("none", "max", "zscore")
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@attrs.frozen
class _Step:
    """A `Finish` as kernels are told, a tuple of integers."""

    softmax: int  # place among the terms with a softmax, -1 = none
    pool: int
    size: int
    shared: bool
    normalise: int
    normal: int  # place among the terms that are normalised, -1 = none


@triton.jit
def _candidates(POSITIONS, start, length, sinks, recent, SINKS: tl.constexpr):
    """The first candidate of a head and what is behind its last: positions ascend, so that sinks come first."""
    first = 0
    if SINKS > 0:
        slots = tl.arange(0, SINKS)
        looked = (slots < sinks) & (slots < length)
        positions = tl.load(POSITIONS + start + slots, mask=looked, other=0)
        first = tl.sum((looked & (positions < sinks)).to(tl.int32), 0)
    return first, length - recent


@triton.jit
def _softmax_sums(PARTS, SP: tl.constexpr, parts):
    """Maximum and sum of exponentials of a head, out of those of its parts [parts, 2]."""
    part = tl.arange(0, SP)
    tops = tl.load(PARTS + part * 2, mask=part < parts, other=-float("inf"))
    totals = tl.load(PARTS + part * 2 + 1, mask=part < parts, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(totals * tl.exp2((tops - top) * LOG2E), 0)
    return top, tl.where(total == 0.0, 1.0, total)  # nothing is held


@triton.jit
def _plain(ROW, slots, inside, top, total, SOFTMAX: tl.constexpr):
    """Scores of the slots before pooling, 0 where not `inside`."""
    scores = tl.load(ROW + slots, mask=inside, other=0.0)
    if SOFTMAX:
        scores = tl.where(inside, tl.exp2((scores - top) * LOG2E) / total, 0.0)
    return scores


@triton.jit
def _pooled(ROW, slots, length, first, last, top, total, STEP: tl.constexpr):
    """Scores of the slots after pooling over candidates; a maximum with NaN is NaN."""
    if STEP[1] == 0:
        pooled = _plain(ROW, slots, slots < length, top, total, STEP[0] >= 0)
    else:
        pooled = tl.full(slots.shape, -float("inf") if STEP[1] == 1 else 0.0, tl.float32)
        for place in tl.range(0, STEP[2]):
            near = slots + (place - STEP[2] // 2)
            inside = (near >= first) & (near < last)
            scores = _plain(ROW, near, inside, top, total, STEP[0] >= 0)
            if STEP[1] == 1:
                larger = inside & ((scores > pooled) | (scores != scores))  # noqa: PLR0124 only NaN differs from itself
                pooled = tl.where(larger, scores, pooled)
            else:
                pooled += scores
        if STEP[1] == 2:
            pooled = pooled / STEP[2]
    return pooled


@triton.jit
def _of_head(
    TERM,
    POSITIONS,
    STARTS,
    LENGTHS,
    SOFTMAX,
    head,
    slots,
    T,
    sinks,
    recent,
    parts,
    SP: tl.constexpr,
    SINKS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Pooled scores of one head at the slots."""
    length = tl.load(LENGTHS + head)
    top, total, first, last = 0.0, 1.0, 0, length
    if STEP[0] >= 0:
        sums = SOFTMAX + (STEP[0] * tl.num_programs(0).to(tl.int64) + head) * parts * 2
        top, total = _softmax_sums(sums, SP, parts)
    if STEP[1] > 0:
        first, last = _candidates(POSITIONS, tl.load(STARTS + head), length, sinks, recent, SINKS)
    return _pooled(TERM + head * T, slots, length, first, last, top, total, STEP)


@triton.jit
def _scores(
    TERM,
    POSITIONS,
    STARTS,
    LENGTHS,
    SOFTMAX,
    segment,
    slots,
    T,
    sinks,
    recent,
    parts,
    HEADS: tl.constexpr,
    SP: tl.constexpr,
    SINKS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Scores of one term at the slots, before normalisation."""
    if STEP[3]:
        summed = tl.zeros(slots.shape, tl.float32)
        for head in tl.range(0, HEADS):
            row = segment // HEADS * HEADS + head
            summed += _of_head(
                TERM, POSITIONS, STARTS, LENGTHS, SOFTMAX, row, slots, T, sinks, recent, parts, SP, SINKS, STEP
            )
        scores = summed / HEADS
    else:
        scores = _of_head(
            TERM, POSITIONS, STARTS, LENGTHS, SOFTMAX, segment, slots, T, sinks, recent, parts, SP, SINKS, STEP
        )
    return scores


@triton.jit(do_not_specialize=["T", "parts"])
def _softmax_parts(TERMS, LENGTHS, SOFTMAX, T, parts, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Of every term with a softmax: maximum and sum of exponentials of BLOCK entries, [softmaxes, P, parts, 2]."""
    segment, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < tl.load(LENGTHS + segment)
    for i in tl.static_range(len(STEPS)):
        if STEPS[i][0] >= 0:
            scores = tl.load(TERMS + (i * count + segment) * T + slots, mask=inside, other=-float("inf"))
            top = tl.max(scores, 0)
            held = tl.where(top == -float("inf"), 0.0, top)
            out = SOFTMAX + ((STEPS[i][0] * count + segment) * parts + tl.program_id(1)) * 2
            tl.store(out, top)
            tl.store(out + 1, tl.sum(tl.exp2((scores - held) * LOG2E), 0))


@triton.jit
def _normal_part(scores, inside, NORMALISE: tl.constexpr):
    """What one part says of its candidates: the largest finite magnitude, or their sum and their spread about it."""
    if NORMALISE == 1:
        sizes = tl.abs(scores)
        one = tl.max(tl.where(inside & (sizes < float("inf")), sizes, 0.0), 0)
        two = one
    else:
        one = tl.sum(tl.where(inside, scores, 0.0), 0)
        mean = one / tl.maximum(tl.sum(inside.to(tl.float32), 0), 1.0)
        off = tl.where(inside, scores - mean, 0.0)
        two = tl.sum(off * off, 0)
    return one, two


@triton.jit(do_not_specialize=["T", "sinks", "recent", "parts"])
def _normal_parts(
    TERMS,
    POSITIONS,
    STARTS,
    LENGTHS,
    SOFTMAX,
    NORMAL,  # [normalised terms, P, parts, 2]
    T,
    sinks,
    recent,
    parts,
    PER_LAYER: tl.constexpr,
    HEADS: tl.constexpr,
    SP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    segment, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    positions = storage(POSITIONS, segment // PER_LAYER, tl.int32)
    first, last = _candidates(positions, tl.load(STARTS + segment), tl.load(LENGTHS + segment), sinks, recent, SINKS)
    inside = (slots >= first) & (slots < last)
    for i in tl.static_range(len(STEPS)):
        if STEPS[i][5] >= 0:
            scores = _scores(
                TERMS + i * count * T,
                positions,
                STARTS,
                LENGTHS,
                SOFTMAX,
                segment,
                slots,
                T,
                sinks,
                recent,
                parts,
                HEADS,
                SP,
                SINKS,
                tl.constexpr(STEPS[i]),
            )
            one, two = _normal_part(scores, inside, tl.constexpr(STEPS[i][4]))
            out = NORMAL + ((STEPS[i][5] * count + segment) * parts + tl.program_id(1)) * 2
            tl.store(out, one)
            tl.store(out + 1, two)


@triton.jit
def _normalised(scores, PARTS, first, last, parts, SP: tl.constexpr, BLOCK: tl.constexpr, NORMALISE: tl.constexpr):
    """Scores over the largest magnitude, or as distances from the mean in standard deviations."""
    part = tl.arange(0, SP)
    ones = tl.load(PARTS + part * 2, mask=part < parts, other=0.0)
    twos = tl.load(PARTS + part * 2 + 1, mask=part < parts, other=0.0)
    if NORMALISE == 1:
        largest = tl.max(ones, 0)
        found = scores / tl.where(largest < _TINY, _TINY, largest)
    else:
        counts = tl.minimum(last, (part + 1) * BLOCK) - tl.maximum(first, part * BLOCK)
        counts = tl.maximum(counts, 0).to(tl.float32)
        count = tl.maximum((last - first).to(tl.float32), 1.0)
        mean = tl.sum(ones, 0) / count
        off = ones / tl.maximum(counts, 1.0) - mean
        spread = tl.sqrt(tl.sum(twos + counts * off * off, 0) / count)
        found = (scores - mean) / tl.where(spread < _TINY, _TINY, spread)
    return found


@triton.jit(do_not_specialize=["T", "sinks", "recent", "parts"])
def _finish(
    TERMS,  # [terms, P, T]
    POSITIONS,
    STARTS,
    LENGTHS,
    SOFTMAX,
    NORMAL,
    OUT,  # [P, T]
    NAN,  # [P, parts]
    WEIGHTS,  # of every term, a scalar
    T,
    sinks,
    recent,
    parts,
    PER_LAYER: tl.constexpr,
    HEADS: tl.constexpr,
    SP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    segment, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    positions = storage(POSITIONS, segment // PER_LAYER, tl.int32)
    first, last = _candidates(positions, tl.load(STARTS + segment), tl.load(LENGTHS + segment), sinks, recent, SINKS)
    inside = (slots >= first) & (slots < last)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(STEPS)):
        scores = _scores(
            TERMS + i * count * T,
            positions,
            STARTS,
            LENGTHS,
            SOFTMAX,
            segment,
            slots,
            T,
            sinks,
            recent,
            parts,
            HEADS,
            SP,
            SINKS,
            tl.constexpr(STEPS[i]),
        )
        if STEPS[i][5] >= 0:
            normal = NORMAL + (STEPS[i][5] * count + segment) * parts * 2
            scores = _normalised(
                tl.where(inside, scores, 0.0), normal, first, last, parts, SP, BLOCK, tl.constexpr(STEPS[i][4])
            )
        total += WEIGHTS[i] * scores
    wrong = inside & (total != total)  # noqa: PLR0124 only NaN differs from itself
    tl.store(OUT + segment * T + slots, tl.where(inside & (wrong == 0), total, -float("inf")), mask=slots < T)
    tl.store(NAN + segment * parts + tl.program_id(1), tl.sum(wrong.to(tl.int32), 0))


def finish(
    segments: Segments,
    positions: Column,
    terms: Tensor,
    finishes: Sequence[Finish],
    *,
    sinks: int,
    recent: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum [P, T] float32 of the finished terms, -inf outside the candidates, and how many were NaN, [P] int32.

    `terms` are [terms, P, T] float32, one for each of `finishes`; a candidate whose sum is NaN becomes -inf.

    Raises:
        UnsupportedInputError: before anything is written, for what the kernels cannot do.
    """
    count, longest, device = segments.count, segments.longest, segments.starts.device
    steps = _check(segments, positions, terms, finishes, sinks, recent)
    if out is None:
        out = torch.empty(count, longest, dtype=torch.float32, device=device)
    check_output(out, "scores", (count, longest), torch.float32, device)
    nan = torch.empty(count, _parts(segments), dtype=torch.int32, device=device)
    for launch in _launches(segments, positions, terms, finishes, steps, (sinks, recent), (out, nan)):
        launch.run()
    return out, nan[:, 0] if nan.shape[1] == 1 else nan.sum(1, dtype=torch.int32)


def _parts(segments: Segments) -> int:
    return -(-segments.longest // _BLOCK)


def _launches(
    segments: Segments,
    positions: Column,
    terms: Tensor,
    finishes: Sequence[Finish],
    steps: Sequence[_Step],
    protect: tuple[int, int],
    results: tuple[Tensor, Tensor],
) -> Iterator[Launch]:
    parts = _parts(segments)
    grid = (segments.count, parts)
    softmaxes = sum(step.softmax >= 0 for step in steps)
    normals = sum(step.normal >= 0 for step in steps)
    sums = torch.empty(softmaxes + normals, segments.count, parts, 2, dtype=torch.float32, device=terms.device)
    constants = _constants(segments, steps, protect[0])
    sizes = {"T": segments.longest, "parts": parts}
    shared = {"TERMS": terms, "LENGTHS": segments.lengths, "SOFTMAX": sums if softmaxes else None, **sizes}
    if softmaxes:
        yield Launch(_softmax_parts, grid, shared, {name: constants[name] for name in ("BLOCK", "STEPS")})
    shared |= {"POSITIONS": positions.addresses, "STARTS": segments.starts, "sinks": protect[0], "recent": protect[1]}
    shared |= {"NORMAL": sums[softmaxes:] if normals else None}
    if normals:
        yield Launch(_normal_parts, grid, shared, constants)
    weights = tuple(float(one.weight) for one in finishes)
    last = {"OUT": results[0], "NAN": results[1], "WEIGHTS": weights}
    yield Launch(_finish, grid, {**shared, **last}, constants)


def _check(
    segments: Segments, positions: Column, terms: Tensor, finishes: Sequence[Finish], sinks: int, recent: int
) -> tuple[_Step, ...]:
    """What the kernels are told of `finishes`. Raises UnsupportedInputError for what they cannot do."""
    check_segments(segments, sinks, recent)
    check_column({"positions": positions}, "positions", segments, (torch.int32,), 1)
    shape = (len(finishes), segments.count, segments.longest)
    require(len(finishes) > 0, "nothing to finish")
    check_output(terms, "terms", shape, torch.float32, segments.starts.device)
    require(sinks <= _MOST_SINKS, f"more than {_MOST_SINKS} sinks")
    require(segments.longest <= _MOST_PARTS * _BLOCK, f"more than {_MOST_PARTS * _BLOCK} entries")
    return _steps(finishes)


def _steps(finishes: Sequence[Finish]) -> tuple[_Step, ...]:
    softmaxes, normals, steps = 0, 0, []
    for one in finishes:
        require(one.pool in _POOLS and one.normalise in _NORMALS, f"an unknown finish: {one}")
        pools = one.pool != "none"
        require(not pools or (one.size % 2 == 1 and 0 < one.size <= _WIDEST_POOL), f"a pool of {one.size}")
        normal = _NORMALS.index(one.normalise)
        steps.append(
            _Step(
                softmaxes if one.softmax else -1,
                _POOLS.index(one.pool),
                one.size if pools else 1,
                one.shared,
                normal,
                normals if normal else -1,
            )
        )
        softmaxes, normals = softmaxes + one.softmax, normals + (normal > 0)
    return tuple(steps)


def _constants(segments: Segments, steps: Sequence[_Step], sinks: int) -> dict[str, Any]:
    return {
        "PER_LAYER": segments.per_layer,
        "HEADS": segments.heads,
        "SP": power_of_two(_parts(segments)),
        "SINKS": power_of_two(sinks) if sinks else 0,
        "BLOCK": _BLOCK,
        "STEPS": tuple(tuple(map(int, attrs.astuple(step))) for step in steps),
    }


def traffic(
    finishes: Sequence[Finish], lengths: Sequence[int], longest: int, *, heads: int, sinks: int, recent: int
) -> Traffic:
    """Bytes of one `finish` over heads that hold `lengths` entries each, all sinks among them."""
    steps = _steps(finishes)
    covered = -(-longest // _BLOCK) * _BLOCK
    softmaxes = sum(step.softmax >= 0 for step in steps) * sum(lengths)
    passes = [(step, 1 + (step.normal >= 0)) for step in steps]
    read = sum(
        times * (heads if step.shared else 1) * _loads(step, length, covered, sinks, recent)
        for step, times in passes
        for length in lengths
    )
    launches = 1 + (softmaxes > 0) + any(step.normal >= 0 for step in steps)
    return Traffic({"terms": 4 * (read + softmaxes)}, {"scores": 4 * len(lengths) * longest}, launches)


def _loads(step: _Step, length: int, covered: int, sinks: int, recent: int) -> int:
    """Scores of one head that one look at all slots of the programs loads."""
    if step.pool == 0:
        return length
    first, last = min(sinks, length), length - recent
    offsets = range(-(step.size // 2), step.size // 2 + 1)
    return sum(max(0, min(last - offset, covered) - max(first - offset, 0)) for offset in offsets)


def builds_for(name: str, finishes: Sequence[Finish], *, sinks: int = 4) -> Iterator[Build]:
    """The kernels that `finish` launches for these terms of one row of a model with 32 layers of 8 KV heads."""
    segments, columns = imagined(128, torch.bfloat16, 4)
    terms = torch.empty(len(finishes), segments.count, segments.longest, device="meta")
    results = terms[0], torch.empty(segments.count, _parts(segments), dtype=torch.int32, device="meta")
    launches = _launches(segments, columns["positions"], terms, finishes, _steps(finishes), (sinks, 32), results)
    for launch in launches:
        yield launch.build(f"{launch.kernel.__name__.strip('_').replace('_', ' ')} {name}", wide_loads=False)


def builds() -> Iterator[Build]:
    """Every step at once, and none."""
    rich = Finish(softmax=True, pool="max", size=7, shared=True, normalise="zscore")
    yield from builds_for("of everything", (rich, Finish(pool="average", size=5, normalise="max")))
    yield from builds_for("of one term", (Finish(),), sinks=0)
