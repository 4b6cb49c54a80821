"""The score kernel: one pass over keys and values that calls the tile function of every scorer."""

# Tuples grow while the compiler unrolls loops over them.
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

from kvpolicy_kernels.score.logits import entries, is_candidate, packed_queries, products, storage, use_logits, use_sees


@triton.jit
def _newest(POSITIONS, STARTS, LENGTHS, segment, HEADS: tl.constexpr, HP: tl.constexpr):
    """The largest position that any head of the segment's row holds, -1 without any: the last one of each head."""
    head = tl.arange(0, HP)
    first = segment // HEADS * HEADS
    lengths = tl.load(LENGTHS + first + head, mask=head < HEADS, other=0)
    starts = tl.load(STARTS + first + head, mask=head < HEADS, other=0)
    return tl.max(tl.load(POSITIONS + starts + lengths - 1, mask=lengths > 0, other=-1), 0)


@triton.jit
def _row(ROW, D: tl.constexpr, DP: tl.constexpr):
    """[DP], zeros behind D."""
    place = tl.arange(0, DP)
    return tl.load(ROW + place, mask=place < D, other=0.0)


@triton.jit
def _log_sums(LSE, WP: tl.constexpr, ROWS: tl.constexpr):
    """[1, GP or 1, WP], 0 for a query that sees nothing: its probabilities are masked."""
    lse = tl.load(LSE + tl.arange(0, ROWS))
    return tl.reshape(tl.where(lse == -float("inf"), 0.0, lse), (1, ROWS // WP, WP))


@triton.jit
def _probabilities(
    logits,
    votes,
    positions,
    inside,
    candidate,
    asked,
    lse,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USE: tl.constexpr,
):
    """[BLOCK, GP or 1, WP], 0 where a query does not see an entry; how many queries exist; query heads per KV head."""
    seen = use_sees(positions, inside, candidate, asked, GROUP, GP, USE)
    found = tl.exp2(use_logits(logits, votes, GP, WP, GROUP, USE) - lse)
    last = tl.arange(0, asked.shape[0]) >= asked.shape[0] - USE[0]
    voters = tl.sum(((asked >= 0) & last).to(tl.float32), 0)
    group = tl.full((), 1.0 if USE[3] else GROUP, tl.float32)
    return tl.where(seen, found, 0.0), voters, group


@triton.jit(do_not_specialize=["T", "sinks", "recent", "span"])
def score(
    KEYS,  # or None, as all that no tile reads
    VALUES,
    POSITIONS,
    VOTES,
    ATTENTION,
    STARTS,
    LENGTHS,
    QUERIES,  # [P, GP, WP, D]
    ASKED,  # [L·B, WP]
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
    DM: tl.constexpr,  # query heads of ATTENTION
    DMP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USES: tl.constexpr,
    STATISTICS: tl.constexpr,  # how many
    FUNCTIONS: tl.constexpr,
    OPTIONS: tl.constexpr,
    READS: tl.constexpr,  # of every tile: keys, values, newest, attention; its use, statistic and column, or -1
    KEY: tl.constexpr,  # noqa: ARG001 makes the sources of FUNCTIONS part of what the compiled kernel is known by
    TRIPS: tl.constexpr,  # of a loop, for the interpreter, which cannot count to a tensor; else None
    UPCAST: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    row = segment // HEADS
    layer = segment // PER_LAYER
    start = tl.load(STARTS + segment)
    length = tl.load(LENGTHS + segment)
    position_storage = storage(POSITIONS, layer, tl.int32)
    newest, queries, asked = None, None, None
    for i in tl.static_range(len(FUNCTIONS)):
        if READS[i][2]:
            newest = _newest(position_storage, STARTS, LENGTHS, segment, HEADS, HP)
    if len(USES) > 0:
        queries = packed_queries(QUERIES, segment, GP * WP, D, DP)
        asked = tl.load(ASKED + row * WP + tl.arange(0, WP))
    lses, sums = (), ()
    for i in tl.static_range(len(USES)):
        lses = lses + (_log_sums(LSE + (segment * len(USES) + i) * (GP * WP), WP, tl.constexpr(USES[i][4])),)
    for i in tl.static_range(STATISTICS):
        sums = sums + (_row(SUMS + (segment * STATISTICS + i) * D, D, DP),)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, T)
    filled = tl.maximum(begin, tl.minimum(end, tl.cdiv(length, BLOCK) * BLOCK))
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(filled - begin, BLOCK)):
        slots = begin + trip * BLOCK + tl.arange(0, BLOCK)
        inside = slots < length
        positions = tl.load(position_storage + start + slots, mask=inside, other=-1)
        keys, whole_keys, values, mass, logits, votes = None, None, None, None, None, None
        if KEYS is not None:
            keys = entries(storage(KEYS, layer, TYPE), start, slots, inside, D, DP)
            whole_keys = keys.to(tl.float32)
        if VALUES is not None:
            values = entries(storage(VALUES, layer, VTYPE), start, slots, inside, DV, DVP).to(tl.float32)
        if ATTENTION is not None:
            mass = entries(storage(ATTENTION, layer, MTYPE), start, slots, inside, DM, DMP).to(tl.float32)
        if len(USES) > 0:
            logits = products(keys, queries, factor, UPCAST)
            if VOTES is not None:
                votes = tl.load(storage(VOTES, layer, tl.float32) + start + slots, mask=inside, other=0.0)
        candidate = is_candidate(positions, slots, length, sinks, recent)
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
                    asked,
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
                whole_keys if READS[i][0] else None,
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
