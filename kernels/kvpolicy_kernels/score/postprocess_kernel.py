"""Kernels of `postprocess`: softmax sums, normalisation sums, and the result; parallel over entries.

SETTING is one term's postprocessing as integers: the fields of `postprocess._Encoded`, in order.
"""

import torch
import triton
import triton.language as tl

from kvpolicy_kernels.common.addressing import column_pointer
from kvpolicy_kernels.score.logits import LOG2E

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _candidates(POSITIONS, start, length, sinks, recent, SINKS: tl.constexpr):
    """First and end slot of the range of a head's candidates, pinned ones among them: sinks come first."""
    first = 0
    if SINKS > 0:
        slots = tl.arange(0, SINKS)
        mask = (slots < sinks) & (slots < length)
        positions = tl.load(POSITIONS + start + slots, mask=mask, other=0)
        first = tl.sum((mask & (positions < sinks)).to(tl.int32), 0)
    return first, length - recent


@triton.jit
def _not_pinned(PINNED, slots, inside):
    """Which of the slots `inside` a range have no label; `PINNED` is that of a head, or None."""
    if PINNED is not None:
        inside = inside & (tl.load(PINNED + slots, mask=inside, other=0) == 0)
    return inside


@triton.jit
def _softmax_sums(PARTS, SP: tl.constexpr, parts):
    """Maximum and sum of exponentials of a head, combined from those of its parts [parts, 2]."""
    part = tl.arange(0, SP)
    maxima = tl.load(PARTS + part * 2, mask=part < parts, other=-float("inf"))
    totals = tl.load(PARTS + part * 2 + 1, mask=part < parts, other=0.0)
    maximum = tl.max(maxima, 0)
    maximum = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.sum(totals * tl.exp2((maxima - maximum) * LOG2E), 0)
    return maximum, tl.where(total == 0.0, 1.0, total)  # an empty head


@triton.jit
def _unpooled(ROW, slots, inside, maximum, total, SOFTMAX: tl.constexpr):
    """Scores before pooling, after the softmax if SOFTMAX; 0 where not `inside`."""
    scores = tl.load(ROW + slots, mask=inside, other=0.0)
    if SOFTMAX:
        scores = tl.where(inside, tl.exp2((scores - maximum) * LOG2E) / total, 0.0)
    return scores


@triton.jit
def _pooled(ROW, PINNED, slots, length, first, end, maximum, total, SETTING: tl.constexpr):
    """Scores after pooling over candidates; a maximum over NaN is NaN."""
    if SETTING[1] == 0:
        pooled = _unpooled(ROW, slots, slots < length, maximum, total, SETTING[0] >= 0)
    else:
        pooled = tl.full(slots.shape, -float("inf") if SETTING[1] == 1 else 0.0, tl.float32)
        for offset in tl.range(0, SETTING[2]):
            neighbour = slots + (offset - SETTING[2] // 2)
            inside = (neighbour >= first) & (neighbour < end)
            scores = _unpooled(ROW, neighbour, inside, maximum, total, SETTING[0] >= 0)
            if PINNED is not None:
                inside = _not_pinned(PINNED, neighbour, inside)
                scores = tl.where(inside, scores, 0.0)
            if SETTING[1] == 1:
                larger = inside & ((scores > pooled) | (scores != scores))  # noqa: PLR0124 only NaN differs from itself
                pooled = tl.where(larger, scores, pooled)
            else:
                pooled += scores
        if SETTING[1] == 2:
            pooled = pooled / SETTING[2]
    return pooled


@triton.jit
def _head_scores(
    TERM,
    POSITIONS,
    STARTS,
    LENGTHS,
    PINNED,
    SOFTMAX,
    head,
    slots,
    T,
    sinks,
    recent,
    parts,
    SP: tl.constexpr,
    SINKS: tl.constexpr,
    SETTING: tl.constexpr,
):
    """Pooled scores of one head."""
    length = tl.load(LENGTHS + head)
    maximum, total, first, end = 0.0, 1.0, 0, length
    if SETTING[0] >= 0:
        sums = SOFTMAX + (SETTING[0] * tl.num_programs(0).to(tl.int64) + head) * parts * 2
        maximum, total = _softmax_sums(sums, SP, parts)
    if SETTING[1] > 0:
        first, end = _candidates(POSITIONS, tl.load(STARTS + head), length, sinks, recent, SINKS)
    pinned = None
    if PINNED is not None:
        pinned = PINNED + head * T
    return _pooled(TERM + head * T, pinned, slots, length, first, end, maximum, total, SETTING)


@triton.jit
def _scores(
    TERM,
    POSITIONS,
    STARTS,
    LENGTHS,
    PINNED,
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
    SETTING: tl.constexpr,
):
    """Scores of one term before normalisation."""
    if SETTING[3]:
        summed = tl.zeros(slots.shape, tl.float32)
        for head in tl.range(0, HEADS):
            row = segment // HEADS * HEADS + head
            summed += _head_scores(
                TERM,
                POSITIONS,
                STARTS,
                LENGTHS,
                PINNED,
                SOFTMAX,
                row,
                slots,
                T,
                sinks,
                recent,
                parts,
                SP,
                SINKS,
                SETTING,
            )
        scores = summed / HEADS
    else:
        scores = _head_scores(
            TERM,
            POSITIONS,
            STARTS,
            LENGTHS,
            PINNED,
            SOFTMAX,
            segment,
            slots,
            T,
            sinks,
            recent,
            parts,
            SP,
            SINKS,
            SETTING,
        )
    return scores


@triton.jit(do_not_specialize=["T", "parts"])
def softmax_parts(TERMS, LENGTHS, SOFTMAX, T, parts, BLOCK: tl.constexpr, SETTINGS: tl.constexpr):
    """SOFTMAX [softmaxes, P, parts, 2]: maximum and sum of exponentials of BLOCK entries, per term with a softmax."""
    segment, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < tl.load(LENGTHS + segment)
    for i in tl.static_range(len(SETTINGS)):
        if SETTINGS[i][0] >= 0:
            scores = tl.load(TERMS + (i * count + segment) * T + slots, mask=inside, other=-float("inf"))
            maximum = tl.max(scores, 0)
            safe = tl.where(maximum == -float("inf"), 0.0, maximum)
            out = SOFTMAX + ((SETTINGS[i][0] * count + segment) * parts + tl.program_id(1)) * 2
            tl.store(out, maximum)
            tl.store(out + 1, tl.sum(tl.exp2((scores - safe) * LOG2E), 0))


@triton.jit
def _mean(total, count):
    """Total / count, exact where it can be: a GPU's division is not, and equal scores would differ from their mean."""
    mean = total / count
    better = mean + tl.fma(-mean, count, total) / count
    return tl.where(tl.abs(mean) < float("inf"), better, mean)


@triton.jit
def _normal_part(scores, inside, NORMALISE: tl.constexpr):
    """Statistics of one part's candidates: largest finite magnitude (twice), or sum and squared deviations."""
    if NORMALISE == 1:
        sizes = tl.abs(scores)
        first = tl.max(tl.where(inside & (sizes < float("inf")), sizes, 0.0), 0)
        second = first
    else:
        first = tl.sum(tl.where(inside, scores, 0.0), 0)
        mean = _mean(first, tl.maximum(tl.sum(inside.to(tl.float32), 0), 1.0))
        deviation = tl.where(inside, scores - mean, 0.0)
        second = tl.sum(deviation * deviation, 0)
    return first, second


@triton.jit(do_not_specialize=["T", "sinks", "recent", "parts"])
def normalisation_parts(
    TERMS,
    POSITIONS,
    STARTS,
    LENGTHS,
    PINNED,  # [P, T] uint8, or None
    SOFTMAX,
    NORMAL,  # [normalised terms, P, parts, 2]
    COUNTS,  # [P, parts] int32, candidates of each part; None without PINNED
    T,
    sinks,
    recent,
    parts,
    PER_LAYER: tl.constexpr,
    HEADS: tl.constexpr,
    SP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SETTINGS: tl.constexpr,
):
    """NORMAL: statistics of the candidates among BLOCK entries, per normalised term; COUNTS. Grid (P, parts)."""
    segment, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    positions = column_pointer(POSITIONS, segment // PER_LAYER, tl.int32)
    first, end = _candidates(positions, tl.load(STARTS + segment), tl.load(LENGTHS + segment), sinks, recent, SINKS)
    inside = (slots >= first) & (slots < end)
    if PINNED is not None:
        inside = _not_pinned(PINNED + segment * T, slots, inside)
    for i in tl.static_range(len(SETTINGS)):
        if SETTINGS[i][5] >= 0:
            scores = _scores(
                TERMS + i * count * T,
                positions,
                STARTS,
                LENGTHS,
                PINNED,
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
                tl.constexpr(SETTINGS[i]),
            )
            first_sum, second_sum = _normal_part(scores, inside, tl.constexpr(SETTINGS[i][4]))
            out = NORMAL + ((SETTINGS[i][5] * count + segment) * parts + tl.program_id(1)) * 2
            tl.store(out, first_sum)
            tl.store(out + 1, second_sum)
    if PINNED is not None:
        tl.store(COUNTS + segment * parts + tl.program_id(1), tl.sum(inside.to(tl.int32), 0))


@triton.jit
def _normalised(
    scores, PARTS, COUNTS, first, end, parts, SP: tl.constexpr, BLOCK: tl.constexpr, NORMALISE: tl.constexpr
):
    """Scores divided by the largest magnitude, or standardised: minus the mean, over the standard deviation."""
    part = tl.arange(0, SP)
    firsts = tl.load(PARTS + part * 2, mask=part < parts, other=0.0)
    seconds = tl.load(PARTS + part * 2 + 1, mask=part < parts, other=0.0)
    if NORMALISE == 1:
        largest = tl.max(firsts, 0)
        normalised = scores / tl.where(largest < _TINY, _TINY, largest)
    else:
        if COUNTS is not None:
            counts = tl.load(COUNTS + part, mask=part < parts, other=0)
            candidates = tl.sum(counts, 0)
        else:
            counts = tl.minimum(end, (part + 1) * BLOCK) - tl.maximum(first, part * BLOCK)
            candidates = end - first
        counts = tl.maximum(counts, 0).to(tl.float32)
        count = tl.maximum(candidates.to(tl.float32), 1.0)
        mean = _mean(tl.sum(firsts, 0), count)
        deviation = _mean(firsts, tl.maximum(counts, 1.0)) - mean
        standard_deviation = tl.sqrt(tl.sum(seconds + counts * deviation * deviation, 0) / count)
        normalised = (scores - mean) / tl.where(standard_deviation < _TINY, _TINY, standard_deviation)
    return normalised


@triton.jit(do_not_specialize=["T", "sinks", "recent", "parts"])
def postprocess_terms(
    TERMS,  # [terms, P, T]
    POSITIONS,
    STARTS,
    LENGTHS,
    PINNED,  # [P, T] uint8, or None
    SOFTMAX,
    NORMAL,
    COUNTS,  # as in `normalisation_parts`
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
    SETTINGS: tl.constexpr,
):
    """OUT and NAN of BLOCK entries. Grid (P, parts)."""
    segment, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    positions = column_pointer(POSITIONS, segment // PER_LAYER, tl.int32)
    first, end = _candidates(positions, tl.load(STARTS + segment), tl.load(LENGTHS + segment), sinks, recent, SINKS)
    inside = (slots >= first) & (slots < end)
    counts = None
    if PINNED is not None:
        inside = _not_pinned(PINNED + segment * T, slots, inside)
    if COUNTS is not None:
        counts = COUNTS + segment * parts
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(SETTINGS)):
        scores = _scores(
            TERMS + i * count * T,
            positions,
            STARTS,
            LENGTHS,
            PINNED,
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
            tl.constexpr(SETTINGS[i]),
        )
        if SETTINGS[i][5] >= 0:
            part_sums = NORMAL + (SETTINGS[i][5] * count + segment) * parts * 2
            scores = _normalised(
                tl.where(inside, scores, 0.0),
                part_sums,
                counts,
                first,
                end,
                parts,
                SP,
                BLOCK,
                tl.constexpr(SETTINGS[i][4]),
            )
        total += WEIGHTS[i] * scores
    is_nan = inside & (total != total)  # noqa: PLR0124 only NaN differs from itself
    tl.store(OUT + segment * T + slots, tl.where(inside & (is_nan == 0), total, -float("inf")), mask=slots < T)
    tl.store(NAN + segment * parts + tl.program_id(1), tl.sum(is_nan.to(tl.int32), 0))
