"""The kernels of `finish`: sums for softmaxes, sums for normalisations, and the result; parallel over entries."""

import torch
import triton
import triton.language as tl

from kvpolicy_kernels.score.logits import LOG2E, storage

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


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
def softmax_parts(TERMS, LENGTHS, SOFTMAX, T, parts, BLOCK: tl.constexpr, STEPS: tl.constexpr):
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
def normal_parts(
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
def finish_terms(
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
