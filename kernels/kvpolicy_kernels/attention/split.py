"""Attention of one query per row over what is held, split over the entries of a segment (Flash-Decoding).

A program reads `item` entries of one segment for all query heads of its KV head, so that keys and values are read
once. What several programs found of a segment is put together by `kvpolicy_kernels.attention.combine`.
"""

import triton
import triton.language as tl

from kvpolicy_kernels.quantise.unpack import rounded

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _column(ADDRESSES, layer, TYPE: tl.constexpr):
    """The storage of one layer."""
    return tl.multiple_of(tl.load(ADDRESSES + layer).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _half(
    ADDRESSES, STARTS, COLUMNS, UNITS, segment, layer, D: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr
):
    """Where the plain vectors and the packed columns of a segment are, and how many of its entries are packed."""
    plain = _column(ADDRESSES, layer, DTYPE) + tl.load(STARTS + segment) * D
    columns = ()
    sealed = 0
    if UNITS is not None:
        place = segment // FORMAT[4]
        first = tl.load(UNITS[0] + place)
        sealed = tl.load(UNITS[1] + place) * FORMAT[2]
        for i in tl.static_range(len(COLUMNS)):
            one = _column(COLUMNS[i], layer, FORMAT[0][i]) + first * FORMAT[1][i]
            columns = columns + (one,)  # type: ignore[assignment]
    return plain, columns, sealed


@triton.jit
def _vectors(
    HALF, slots, held, D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    DTYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK, DP] of some slots of a segment; zeros in those that are not held."""
    d = tl.arange(0, DP)
    plain = held & (slots >= HALF[2])
    mask = plain[:, None] & (d < D)[None, :]
    vectors = tl.load(HALF[0] + (slots - HALF[2])[:, None] * D + d[None, :], mask=mask, other=0.0)
    if UPCAST:
        vectors = vectors.to(tl.float32)
    if TILE is not None:
        packed = held & (slots < HALF[2])
        unpacked = TILE(HALF[1], slots, packed, HALF[3], D, DP, RUN, FORMAT[3])
        vectors = tl.where(packed[:, None], rounded(unpacked, DTYPE, UPCAST), vectors)
    return vectors


@triton.jit
def _span(
    query, first, end, length, positions, seen, votes, chosen, exported, scaling, pitch,
    peak, total, summed, KEYS, VALUES,
    DTYPE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr,
    KEY_FORMAT: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_FORMAT: tl.constexpr, VALUE_TILE: tl.constexpr,
    TRIPS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Go on with (peak, total, summed) over the places from `first` to `end`; those from `length` on are empty."""
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(end - first, BLOCK)):
        place = first + trip * BLOCK + tl.arange(0, BLOCK)
        held = (place < end) & (place < length)
        slots = place
        if chosen is not None:
            slots = tl.load(chosen + place, mask=held, other=-1).to(tl.int32)
            held = held & (slots >= 0)
        if positions is not None:
            position = tl.load(positions + slots, mask=held, other=-1)
            held = held & (position >= 0) & (position <= seen)
        KEY_RUN: tl.constexpr = chosen is None and BLOCK % KEY_FORMAT[2] == 0
        VALUE_RUN: tl.constexpr = chosen is None and BLOCK % VALUE_FORMAT[2] == 0
        keys = _vectors(KEYS, slots, held, D, DP, KEY_FORMAT, KEY_TILE, KEY_RUN, DTYPE, UPCAST)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scaling
        logits = tl.where(held[None, :], logits, float("-inf"))
        if exported is not None:
            g = tl.arange(0, GP)
            asked = (g < G)[:, None] & (place < end)[None, :]
            tl.store(exported + g[:, None] * pitch + place[None, :], logits, mask=asked)
        if votes is not None:
            logits += tl.load(votes + slots, mask=held, other=0.0)[None, :]
        logits *= _LOG2E
        higher = tl.maximum(peak, tl.max(logits, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(peak - safe)
        peak = higher
        total = total * fade + tl.sum(weights, 1)
        values = _vectors(VALUES, slots, held, DV, DVP, VALUE_FORMAT, VALUE_TILE, VALUE_RUN, DTYPE, UPCAST)
        if not UPCAST:
            weights = weights.to(DTYPE)
        summed = tl.dot(weights, values, summed * fade[:, None], input_precision="ieee")
    return peak, total, summed


@triton.jit(do_not_specialize=["listed", "pitch", "item"])
def attend(
    QUERIES,  # [P, G, D]
    STARTS,  # [P] of what a slot carries
    LENGTHS,  # [P]
    KEYS,  # addresses [L], as VALUES, POSITIONS and VOTES
    KEY_STARTS,  # [P]
    KEY_COLUMNS,  # addresses [L] of every packed column
    KEY_UNITS,  # None, or (first unit [P], units [P])
    VALUES,
    VALUE_STARTS,
    VALUE_COLUMNS,
    VALUE_UNITS,
    POSITIONS,
    SEEN,  # [rows], the query's own position
    VOTES,
    SLOTS,  # [P, listed]
    LOGITS,  # [P, G, pitch]
    PEAKS,  # [P, splits, G], as SUMS
    SUMS,
    PARTIAL,  # [P, splits, G, DV]
    OUT,  # [P, G, DV]
    scaling,
    listed,
    pitch,
    item,
    DTYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_FORMAT: tl.constexpr,  # (types, widths, unit, options) of the packed columns, and heads that share them
    KEY_TILE: tl.constexpr,
    VALUE_FORMAT: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TRIPS: tl.constexpr,  # item / BLOCK in the interpreter, where loops with run-time bounds may fail; else None
    UPCAST: tl.constexpr,
):
    """Grid (P, splits). Peaks are in log2 units; a split that is not needed writes logits only, if these are wanted."""
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    layer = segment // PER_LAYER
    length = tl.load(LENGTHS + segment) if SLOTS is None else listed
    first = split * item
    stop = tl.minimum(first + item, length)
    end = stop if LOGITS is None else tl.minimum(first + item, pitch)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    queried = tl.where(first < stop, G, 0)  # no rows of a program that sees nothing
    there = (g < queried)[:, None] & (d < D)[None, :]
    query = tl.load(QUERIES + segment * (G * D) + g[:, None] * D + d[None, :], mask=there, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    start = tl.load(STARTS + segment)
    positions = None if POSITIONS is None else _column(POSITIONS, layer, tl.int32) + start
    seen = None if SEEN is None else tl.load(SEEN + (segment % PER_LAYER) // HEADS)
    votes = None if VOTES is None else _column(VOTES, layer, tl.float32) + start
    slots = None if SLOTS is None else SLOTS + segment * listed
    logits = None if LOGITS is None else LOGITS + segment * G * pitch

    keys, key_columns, key_sealed = _half(
        KEYS, KEY_STARTS, KEY_COLUMNS, KEY_UNITS, segment, layer, D, DTYPE, KEY_FORMAT
    )
    values, value_columns, value_sealed = _half(
        VALUES, VALUE_STARTS, VALUE_COLUMNS, VALUE_UNITS, segment, layer, DV, DTYPE, VALUE_FORMAT
    )
    head = (segment % HEADS).to(tl.int32)
    peak = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    summed = tl.zeros((GP, DVP), tl.float32)
    plain = first
    if KEY_TILE is not None or VALUE_TILE is not None:
        sealed = tl.maximum(key_sealed, value_sealed)
        if SLOTS is not None:  # any of the list may be packed
            sealed = listed
        plain = tl.maximum(first, tl.minimum(end, tl.cdiv(sealed, BLOCK) * BLOCK))
        peak, total, summed = _span(
            query, first, plain, stop, positions, seen, votes, slots, logits, scaling, pitch, peak, total, summed,
            (keys, key_columns, key_sealed, head), (values, value_columns, value_sealed, head),
            DTYPE, G, GP, D, DP, DV, DVP, BLOCK, KEY_FORMAT, KEY_TILE, VALUE_FORMAT, VALUE_TILE, TRIPS, UPCAST,
        )  # fmt: skip
    if SLOTS is None or (KEY_TILE is None and VALUE_TILE is None):
        peak, total, summed = _span(
            query, plain, end, stop, positions, seen, votes, slots, logits, scaling, pitch, peak, total, summed,
            (keys, (), key_sealed, head), (values, (), value_sealed, head),
            DTYPE, G, GP, D, DP, DV, DVP, BLOCK, KEY_FORMAT, None, VALUE_FORMAT, None, TRIPS, UPCAST,
        )  # fmt: skip

    dv = tl.arange(0, DVP)
    place = segment * tl.num_programs(1) + split
    if PARTIAL is None:
        safe = tl.where(total == 0.0, 1.0, total)
        result = rounded(summed / safe[:, None], DTYPE, UPCAST)
        mine = (g < G)[:, None] & (dv < DV)[None, :]
        tl.store(OUT + segment * (G * DV) + g[:, None] * DV + dv[None, :], result, mask=mine)
    else:
        mine = (g < queried)[:, None] & (dv < DV)[None, :]
        tl.store(PARTIAL + place * (G * DV) + g[:, None] * DV + dv[None, :], summed, mask=mine)
    if PEAKS is not None:
        tl.store(PEAKS + place * G + g, peak, mask=g < queried)
        tl.store(SUMS + place * G + g, total, mask=g < queried)
