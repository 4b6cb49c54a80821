"""Kernels of `statistics`: an online log-sum-exp per query and sums over entries per split, then their combination."""

# Tuples grow while the compiler unrolls loops.
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

from kvpolicy_kernels.common.addressing import column_pointer, load_rows
from kvpolicy_kernels.score.logits import (
    FLOOR,
    is_candidate,
    load_queries,
    use_logits,
    use_mask,
    window_logits,
)

_RISE = tl.constexpr(64.0)  # logits to base 2 may exceed the running maximum by this before it is updated


@triton.jit
def _fold_rows(terms):
    """[BLOCK, N] summed to [32, N], only over rows of the same thread: no communication between threads.

    With a BLOCK of 32 it is [16, N].
    """
    size: tl.constexpr = terms.shape[1]
    rows: tl.constexpr = min(terms.shape[0] // 2, 32)
    parts = tl.reshape(terms, (terms.shape[0] // (2 * rows), rows // 8, 2, 8, size))
    return tl.reshape(tl.sum(tl.sum(parts, 2), 0), (rows, size))


@triton.jit
def _update(maximum, total, logits):
    """Online log-sum-exp: adds logits [BLOCK, N] to `total` · 2^`maximum` [N], as folded; the updated pair.

    The maximum is updated only when a logit exceeds it by `_RISE`: rescaling is rare, and no term exceeds 2^64.
    """
    above = tl.reshape(logits - maximum[None, :], (logits.shape[0] * logits.shape[1],))
    if tl.max(above, 0) > _RISE:  # flat: Triton 3.6 cannot reduce the rows of a product on sm_100
        new_maximum = tl.maximum(maximum, tl.max(logits, 0))
        total = total * tl.exp2(maximum - new_maximum)[None, :]
        maximum = new_maximum
    return maximum, total + _fold_rows(tl.exp2(logits - maximum[None, :]))


@triton.jit
def _log_sum_exp(maximum, total):
    """The log-sum-exp [N], base 2; -inf where nothing was added."""
    summed = tl.sum(total, 0)
    empty = summed == 0.0
    return tl.where(empty, -float("inf"), maximum + tl.log2(tl.where(empty, 1.0, summed)))


@triton.jit(do_not_specialize=["T", "sinks", "recent", "span"])
def split_statistics(
    KEYS,
    POSITIONS,
    VOTES,  # or None
    STARTS,
    LENGTHS,
    PINNED,  # [P, T] uint8; None if no entry has a label, and if no use asks for candidates
    QUERIES,  # [P, GP, WP, D], or None
    QUERY_POSITIONS,  # [L·B, WP], or None
    LSE,  # [P, splits, uses, GP·WP]
    SUMS,  # [P, splits, functions, D]
    factor,
    T,  # None without PINNED
    sinks,
    recent,
    span,
    TYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USES: tl.constexpr,
    FUNCTIONS: tl.constexpr,
    KEY: tl.constexpr,  # noqa: ARG001 puts the sources of FUNCTIONS into the key of the compile cache
    TRIPS: tl.constexpr,  # loop bound for the interpreter, which cannot loop up to a tensor; else None
    UPCAST: tl.constexpr,
):
    """Statistics of one split of a segment. Grid (P, splits)."""
    segment = tl.program_id(0).to(tl.int64)
    layer = segment // PER_LAYER
    start = tl.load(STARTS + segment)
    length = tl.load(LENGTHS + segment)
    key_storage = column_pointer(KEYS, layer, TYPE)
    pinned = None
    if PINNED is not None:
        pinned = PINNED + segment * T
    maxima, totals, sums = (), (), ()
    if len(USES) > 0:
        queries = load_queries(QUERIES, segment, GP * WP, D, DP)
        query_positions = tl.load(QUERY_POSITIONS + segment // HEADS * WP + tl.arange(0, WP))
        position_storage = column_pointer(POSITIONS, layer, tl.int32)
    for i in tl.static_range(len(USES)):
        maxima = maxima + (tl.full((tl.constexpr(USES[i][4]),), FLOOR, tl.float32),)
        totals = totals + (tl.zeros((min(BLOCK // 2, 32), tl.constexpr(USES[i][4])), tl.float32),)
    for _ in tl.static_range(len(FUNCTIONS)):
        sums = sums + (tl.zeros((DP,), tl.float32),)
    begin = tl.program_id(1) * span
    count = tl.maximum(0, tl.minimum(span, length - begin))
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(count, BLOCK)):
        slots = begin + trip * BLOCK + tl.arange(0, BLOCK)
        inside = slots < length
        keys = load_rows(key_storage, start + slots, inside, D, DP)
        if len(USES) > 0:
            positions = tl.load(position_storage + start + slots, mask=inside, other=-1)
            candidate = is_candidate(positions, pinned, slots, length, sinks, recent)
            votes = None
            if VOTES is not None:
                votes = tl.load(column_pointer(VOTES, layer, tl.float32) + start + slots, mask=inside, other=0.0)
            logits = window_logits(keys, queries, factor, UPCAST)
            new_maxima, new_totals = (), ()
            for i in tl.static_range(len(USES)):
                mask = use_mask(positions, inside, candidate, query_positions, GROUP, GP, tl.constexpr(USES[i]))
                use = use_logits(logits, votes, GP, WP, GROUP, tl.constexpr(USES[i]))
                use = tl.reshape(tl.where(mask, use, -float("inf")), (BLOCK, tl.constexpr(USES[i][4])))
                maximum, total = _update(maxima[i], totals[i], use)
                new_maxima = new_maxima + (maximum,)
                new_totals = new_totals + (total,)
            maxima, totals = new_maxima, new_totals
        if len(FUNCTIONS) > 0:
            new_sums = ()
            for i in tl.static_range(len(FUNCTIONS)):
                terms = FUNCTIONS[i](keys.to(tl.float32))
                new_sums = new_sums + (sums[i] + tl.sum(tl.where(inside[:, None], terms, 0.0), 0),)
            sums = new_sums
    part = segment * tl.num_programs(1) + tl.program_id(1)
    dim = tl.arange(0, DP)
    for i in tl.static_range(len(USES)):
        row = tl.arange(0, tl.constexpr(USES[i][4]))
        tl.store(LSE + (part * len(USES) + i) * (GP * WP) + row, _log_sum_exp(maxima[i], totals[i]))
    for i in tl.static_range(len(FUNCTIONS)):
        tl.store(SUMS + (part * len(FUNCTIONS) + i) * D + dim, sums[i], mask=dim < D)


@triton.jit(do_not_specialize=["splits"])
def combine_statistics(
    PART_LSE,  # [P, splits, uses, GP·WP]
    PART_SUMS,  # [P, splits, functions, D]
    LSE,  # [P, uses, GP·WP]
    SUMS,  # [P, functions, D]
    splits,
    D: tl.constexpr,
    DP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USES: tl.constexpr,
    FUNCTIONS: tl.constexpr,
    TRIPS: tl.constexpr,
):
    """Combine the splits of a segment. Grid (P,)."""
    segment = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(USES)):
        row = tl.arange(0, tl.constexpr(USES[i][4]))
        maximum, total = tl.full((row.shape[0],), FLOOR, tl.float32), tl.zeros((row.shape[0],), tl.float32)
        for split in tl.range(0, TRIPS if TRIPS is not None else splits):
            part = tl.load(PART_LSE + ((segment * splits + split) * len(USES) + i) * (GP * WP) + row)
            new_maximum = tl.maximum(maximum, part)
            total = total * tl.exp2(maximum - new_maximum) + tl.exp2(part - new_maximum)
            maximum = new_maximum
        tl.store(LSE + (segment * len(USES) + i) * (GP * WP) + row, _log_sum_exp(maximum, total[None, :]))
    dim = tl.arange(0, DP)
    for i in tl.static_range(FUNCTIONS):
        summed = tl.zeros((DP,), tl.float32)
        for split in tl.range(0, TRIPS if TRIPS is not None else splits):
            part = ((segment * splits + split) * FUNCTIONS + i) * D
            summed += tl.load(PART_SUMS + part + dim, mask=dim < D, other=0.0)
        tl.store(SUMS + (segment * FUNCTIONS + i) * D + dim, summed, mask=dim < D)
