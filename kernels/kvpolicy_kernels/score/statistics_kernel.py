"""The kernels of `statistics`: a running log-sum-exp of every query and sums over entries, then parts joined."""

# Tuples grow while the compiler unrolls loops over them.
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

from kvpolicy_kernels.score.logits import (
    FLOOR,
    entries,
    is_candidate,
    packed_queries,
    products,
    storage,
    use_logits,
    use_sees,
)

_RISE = tl.constexpr(64.0)  # how far logits to base 2 may exceed the maximum that they are held against


@triton.jit
def _folded(terms):
    """[BLOCK, N] summed to [32, N], over those rows only that one thread holds: no thread waits for another."""
    size: tl.constexpr = terms.shape[1]
    parts = tl.reshape(terms, (terms.shape[0] // 64, 4, 2, 8, size))
    return tl.reshape(tl.sum(tl.sum(parts, 2), 0), (32, size))


@triton.jit
def _more(top, total, logits):
    """Adds [BLOCK, N] logits to a running log-sum-exp: `total` [32, N] times 2 to the power of `top` [N].

    The maximum follows only when a logit is far above it: what is summed stays below 2^64, and is rescaled rarely.
    """
    above = tl.reshape(logits - top[None, :], (logits.shape[0] * logits.shape[1],))
    if tl.max(above, 0) > _RISE:  # flat: Triton 3.6 cannot reduce the rows of a product on sm_100
        higher = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp2(top - higher)[None, :]
        top = higher
    return top, total + _folded(tl.exp2(logits - top[None, :]))


@triton.jit
def _log_sum(top, total):
    """[N], -inf where nothing was added."""
    summed = tl.sum(total, 0)
    nothing = summed == 0.0
    return tl.where(nothing, -float("inf"), top + tl.log2(tl.where(nothing, 1.0, summed)))


@triton.jit(do_not_specialize=["sinks", "recent", "span"])
def statistics_of_parts(
    KEYS,
    POSITIONS,
    VOTES,  # or None
    STARTS,
    LENGTHS,
    QUERIES,  # [P, GP, WP, D], or None
    ASKED,  # [L·B, WP], or None
    LSE,  # [P, splits, uses, GP·WP]
    SUMS,  # [P, splits, functions, D]
    factor,
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
    KEY: tl.constexpr,  # noqa: ARG001 makes the sources of FUNCTIONS part of what the compiled kernel is known by
    TRIPS: tl.constexpr,  # of a loop, for the interpreter, which cannot count to a tensor; else None
    UPCAST: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    layer = segment // PER_LAYER
    start = tl.load(STARTS + segment)
    length = tl.load(LENGTHS + segment)
    key_storage = storage(KEYS, layer, TYPE)
    tops, totals, sums = (), (), ()
    if len(USES) > 0:
        queries = packed_queries(QUERIES, segment, GP * WP, D, DP)
        asked = tl.load(ASKED + segment // HEADS * WP + tl.arange(0, WP))
        position_storage = storage(POSITIONS, layer, tl.int32)
    for i in tl.static_range(len(USES)):
        tops = tops + (tl.full((tl.constexpr(USES[i][4]),), FLOOR, tl.float32),)
        totals = totals + (tl.zeros((32, tl.constexpr(USES[i][4])), tl.float32),)
    for _ in tl.static_range(len(FUNCTIONS)):
        sums = sums + (tl.zeros((DP,), tl.float32),)
    begin = tl.program_id(1) * span
    held = tl.maximum(0, tl.minimum(span, length - begin))
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(held, BLOCK)):
        slots = begin + trip * BLOCK + tl.arange(0, BLOCK)
        inside = slots < length
        keys = entries(key_storage, start, slots, inside, D, DP)
        if len(USES) > 0:
            positions = tl.load(position_storage + start + slots, mask=inside, other=-1)
            candidate = is_candidate(positions, slots, length, sinks, recent)
            votes = None
            if VOTES is not None:
                votes = tl.load(storage(VOTES, layer, tl.float32) + start + slots, mask=inside, other=0.0)
            logits = products(keys, queries, factor, UPCAST)
            new_tops, new_totals = (), ()
            for i in tl.static_range(len(USES)):
                seen = use_sees(positions, inside, candidate, asked, GROUP, GP, tl.constexpr(USES[i]))
                own = use_logits(logits, votes, GP, WP, GROUP, tl.constexpr(USES[i]))
                own = tl.reshape(tl.where(seen, own, -float("inf")), (BLOCK, tl.constexpr(USES[i][4])))
                top, total = _more(tops[i], totals[i], own)
                new_tops = new_tops + (top,)
                new_totals = new_totals + (total,)
            tops, totals = new_tops, new_totals
        if len(FUNCTIONS) > 0:
            new_sums = ()
            for i in tl.static_range(len(FUNCTIONS)):
                terms = FUNCTIONS[i](keys.to(tl.float32))
                new_sums = new_sums + (sums[i] + tl.sum(tl.where(inside[:, None], terms, 0.0), 0),)
            sums = new_sums
    part = segment * tl.num_programs(1) + tl.program_id(1)
    place = tl.arange(0, DP)
    for i in tl.static_range(len(USES)):
        row = tl.arange(0, tl.constexpr(USES[i][4]))
        tl.store(LSE + (part * len(USES) + i) * (GP * WP) + row, _log_sum(tops[i], totals[i]))
    for i in tl.static_range(len(FUNCTIONS)):
        tl.store(SUMS + (part * len(FUNCTIONS) + i) * D + place, sums[i], mask=place < D)


@triton.jit(do_not_specialize=["splits"])
def join_parts(
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
    segment = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(USES)):
        row = tl.arange(0, tl.constexpr(USES[i][4]))
        top, total = tl.full((row.shape[0],), FLOOR, tl.float32), tl.zeros((row.shape[0],), tl.float32)
        for split in tl.range(0, TRIPS if TRIPS is not None else splits):
            part = tl.load(PART_LSE + ((segment * splits + split) * len(USES) + i) * (GP * WP) + row)
            higher = tl.maximum(top, part)
            total = total * tl.exp2(top - higher) + tl.exp2(part - higher)
            top = higher
        tl.store(LSE + (segment * len(USES) + i) * (GP * WP) + row, _log_sum(top, total[None, :]))
    place = tl.arange(0, DP)
    for i in tl.static_range(FUNCTIONS):
        summed = tl.zeros((DP,), tl.float32)
        for split in tl.range(0, TRIPS if TRIPS is not None else splits):
            part = ((segment * splits + split) * FUNCTIONS + i) * D
            summed += tl.load(PART_SUMS + part + place, mask=place < D, other=0.0)
        tl.store(SUMS + (segment * FUNCTIONS + i) * D + place, summed, mask=place < D)
