"""The fused score kernel: one pass over keys and values that calls the tile function of every scorer."""

# Tuples grow while the compiler unrolls loops.
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

from kvpolicy_kernels.common.addressing import column_pointer, load_rows
from kvpolicy_kernels.score.logits import is_candidate, load_queries, use_logits, use_mask, window_logits


@triton.jit
def _newest(POSITIONS, STARTS, LENGTHS, segment, HEADS: tl.constexpr, HP: tl.constexpr):
    """The largest position in the segment's row, -1 if it is empty; entries are in ascending order of position."""
    head = tl.arange(0, HP)
    first = segment // HEADS * HEADS
    lengths = tl.load(LENGTHS + first + head, mask=head < HEADS, other=0)
    starts = tl.load(STARTS + first + head, mask=head < HEADS, other=0)
    return tl.max(tl.load(POSITIONS + starts + lengths - 1, mask=lengths > 0, other=-1), 0)


@triton.jit
def _load_vector(ROW, D: tl.constexpr, DP: tl.constexpr):
    """One vector, padded with zeros to [DP]."""
    dim = tl.arange(0, DP)
    return tl.load(ROW + dim, mask=dim < D, other=0.0)


@triton.jit
def _load_lse(LSE, WP: tl.constexpr, ROWS: tl.constexpr):
    """Log-sum-exps [1, GP or 1, WP]; 0 for queries that see nothing, whose probabilities are masked out."""
    lse = tl.load(LSE + tl.arange(0, ROWS))
    return tl.reshape(tl.where(lse == -float("inf"), 0.0, lse), (1, ROWS // WP, WP))


@triton.jit
def _probabilities(
    logits,
    votes,
    positions,
    inside,
    candidate,
    query_positions,
    lse,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USE: tl.constexpr,
):
    """Probabilities [BLOCK, GP or 1, WP], 0 where masked; number of queries; G, or 1 if reduced."""
    mask = use_mask(positions, inside, candidate, query_positions, GROUP, GP, USE)
    probabilities = tl.exp2(use_logits(logits, votes, GP, WP, GROUP, USE) - lse)
    last = tl.arange(0, query_positions.shape[0]) >= query_positions.shape[0] - USE[0]
    voters = tl.sum(((query_positions >= 0) & last).to(tl.float32), 0)
    group = tl.full((), 1.0 if USE[3] else GROUP, tl.float32)
    return tl.where(mask, probabilities, 0.0), voters, group


@triton.jit(do_not_specialize=["T", "sinks", "recent", "span"])
def score(
    KEYS,  # None if no tile reads it; likewise the next ones
    VALUES,
    POSITIONS,
    VOTES,
    ATTENTION,
    STARTS,
    LENGTHS,
    PINNED,  # [P, T] uint8; None if no entry has a label, and if no use asks for candidates
    QUERIES,  # [P, GP, WP, D]
    QUERY_POSITIONS,  # [L·B, WP]
    LSE,  # [P, uses, GP·WP]
    SUMS,  # [P, statistics, D]
    EXTRA,  # columns [P, T] of tiles that read one
    OUT,  # [tiles, P, T]
    ARGUMENTS,  # of every tile, a tuple of scalars
    factor,
    T,
    sinks,
    recent,
    span,
    TYPE: tl.constexpr,
    VTYPE: tl.constexpr,
    MTYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    DM: tl.constexpr,  # width of ATTENTION: G
    DMP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USES: tl.constexpr,
    STATISTICS: tl.constexpr,  # how many
    FUNCTIONS: tl.constexpr,
    OPTIONS: tl.constexpr,
    READS: tl.constexpr,  # per tile: reads keys, values, newest, attention; index of use, statistic, column or -1
    KEY: tl.constexpr,  # noqa: ARG001 puts the sources of FUNCTIONS into the key of the compile cache
    TRIPS: tl.constexpr,  # loop bound for the interpreter, which cannot loop up to a tensor; else None
    UPCAST: tl.constexpr,
):
    """OUT of all tiles for one split of a segment. Grid (P, splits)."""
    segment = tl.program_id(0).to(tl.int64)
    row = segment // HEADS
    layer = segment // PER_LAYER
    start = tl.load(STARTS + segment)
    length = tl.load(LENGTHS + segment)
    position_storage = column_pointer(POSITIONS, layer, tl.int32)
    pinned = None
    if PINNED is not None:
        pinned = PINNED + segment * T
    newest, queries, query_positions = None, None, None
    for i in tl.static_range(len(FUNCTIONS)):
        if READS[i][2]:
            newest = _newest(position_storage, STARTS, LENGTHS, segment, HEADS, HP)
    if len(USES) > 0:
        queries = load_queries(QUERIES, segment, GP * WP, D, DP)
        query_positions = tl.load(QUERY_POSITIONS + row * WP + tl.arange(0, WP))
    lses, sums = (), ()
    for i in tl.static_range(len(USES)):
        lses = lses + (_load_lse(LSE + (segment * len(USES) + i) * (GP * WP), WP, tl.constexpr(USES[i][4])),)
    for i in tl.static_range(STATISTICS):
        sums = sums + (_load_vector(SUMS + (segment * STATISTICS + i) * D, D, DP),)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, T)
    filled = tl.maximum(begin, tl.minimum(end, tl.cdiv(length, BLOCK) * BLOCK))
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(filled - begin, BLOCK)):
        slots = begin + trip * BLOCK + tl.arange(0, BLOCK)
        inside = slots < length
        positions = tl.load(position_storage + start + slots, mask=inside, other=-1)
        keys, float_keys, values, mass, logits, votes = None, None, None, None, None, None
        if KEYS is not None:
            keys = load_rows(column_pointer(KEYS, layer, TYPE), start + slots, inside, D, DP)
            float_keys = keys.to(tl.float32)
        if VALUES is not None:
            values = load_rows(column_pointer(VALUES, layer, VTYPE), start + slots, inside, DV, DVP).to(tl.float32)
        if ATTENTION is not None:
            mass = load_rows(column_pointer(ATTENTION, layer, MTYPE), start + slots, inside, DM, DMP).to(tl.float32)
        if len(USES) > 0:
            logits = window_logits(keys, queries, factor, UPCAST)
            if VOTES is not None:
                votes = tl.load(column_pointer(VOTES, layer, tl.float32) + start + slots, mask=inside, other=0.0)
        candidate = is_candidate(positions, pinned, slots, length, sinks, recent)
        for i in tl.static_range(len(FUNCTIONS)):
            probabilities, voters, group = None, None, tl.full((), GROUP, tl.float32)
            statistic, column = None, None
            if READS[i][4] >= 0:
                probabilities, voters, group = _probabilities(
                    logits,
                    votes,
                    positions,
                    inside,
                    candidate,
                    query_positions,
                    lses[READS[i][4]],
                    GROUP,
                    GP,
                    WP,
                    tl.constexpr(USES[READS[i][4]]),
                )
            if READS[i][5] >= 0:
                statistic = sums[READS[i][5]]
            if READS[i][6] >= 0:
                column = tl.load(EXTRA[READS[i][6]] + segment * T + slots, mask=inside, other=0.0)
            scores = FUNCTIONS[i](
                float_keys if READS[i][0] else None,
                values if READS[i][1] else None,
                positions,
                newest if READS[i][2] else None,
                probabilities,
                voters,
                group,
                mass if READS[i][3] else None,
                statistic,
                column,
                length.to(tl.float32),
                ARGUMENTS[i],
                tl.constexpr(OPTIONS[i]),
            )
            out = OUT + (i * tl.num_programs(0).to(tl.int64) + segment) * T
            tl.store(out + slots, tl.where(inside, scores, 0.0), mask=slots < filled)
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(end - filled, BLOCK)):
        slots = filled + trip * BLOCK + tl.arange(0, BLOCK)
        for i in tl.static_range(len(FUNCTIONS)):
            out = OUT + (i * tl.num_programs(0).to(tl.int64) + segment) * T
            tl.store(out + slots, tl.zeros((BLOCK,), tl.float32), mask=slots < end)
