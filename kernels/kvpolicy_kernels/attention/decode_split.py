"""Decode attention of one query per row, split over the entries of a segment (Flash-Decoding).

A program reads `split_size` entries of one segment for all query heads of its KV head, so that keys and values are
read once. `combine_splits` merges the partial results of a segment's programs.
"""

import triton
import triton.language as tl

from kvpolicy_kernels.common.addressing import column_pointer, load_rows
from kvpolicy_kernels.quantise.unpack import round_to

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tensor_pointers(
    ADDRESSES, STARTS, COLUMNS, GROUPS, segment, layer, D: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr
):
    """Pointers to a segment's residual vectors and packed columns, and how many of its entries are packed."""
    residual = column_pointer(ADDRESSES, layer, DTYPE) + tl.load(STARTS + segment) * D
    columns = ()
    num_packed = 0
    if GROUPS is not None:
        owner = segment // FORMAT[4]
        first = tl.load(GROUPS[0] + owner)
        num_packed = tl.load(GROUPS[1] + owner) * FORMAT[2]
        for i in tl.static_range(len(COLUMNS)):
            pointer = column_pointer(COLUMNS[i], layer, FORMAT[0][i]) + first * FORMAT[1][i]
            columns = columns + (pointer,)  # type: ignore[assignment]
    return residual, columns, num_packed


@triton.jit
def _load_vectors(
    TENSOR, slots, visible, D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr, TILE: tl.constexpr,
    RUN: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK, DP] of slots of a segment, zeros where not `visible`.

    TENSOR is (residual pointer, packed column pointers, number of packed entries, KV head).
    """
    residual = visible & (slots >= TENSOR[2])
    vectors = load_rows(TENSOR[0], slots - TENSOR[2], residual, D, DP)
    if UPCAST:
        vectors = vectors.to(tl.float32)
    if TILE is not None:
        packed = visible & (slots < TENSOR[2])
        unpacked = TILE(TENSOR[1], slots, packed, TENSOR[3], D, DP, RUN, FORMAT[3])
        vectors = tl.where(packed[:, None], round_to(unpacked, DTYPE, UPCAST), vectors)
    return vectors


@triton.jit
def _attend_range(
    query, first, end, length, positions, query_position, votes, slot_list, logits_out, scaling, pitch,
    maximum, total, weighted, KEYS, VALUES,
    DTYPE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr,
    KEY_FORMAT: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_FORMAT: tl.constexpr, VALUE_TILE: tl.constexpr,
    TRIPS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the entries `first` to `end`: the updated (maximum, total, weighted); none from `length` on.

    Entries are slots, or indices into the list of slots.
    """
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(end - first, BLOCK)):
        index = first + trip * BLOCK + tl.arange(0, BLOCK)
        visible = (index < end) & (index < length)
        slots = index
        if slot_list is not None:
            slots = tl.load(slot_list + index, mask=visible, other=-1).to(tl.int32)
            visible = visible & (slots >= 0)
        if positions is not None:
            position = tl.load(positions + slots, mask=visible, other=-1)
            visible = visible & (position >= 0) & (position <= query_position)
        KEY_RUN: tl.constexpr = slot_list is None and BLOCK % KEY_FORMAT[2] == 0
        VALUE_RUN: tl.constexpr = slot_list is None and BLOCK % VALUE_FORMAT[2] == 0
        keys = _load_vectors(KEYS, slots, visible, D, DP, KEY_FORMAT, KEY_TILE, KEY_RUN, DTYPE, UPCAST)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scaling
        logits = tl.where(visible[None, :], logits, float("-inf"))
        if logits_out is not None:
            g = tl.arange(0, GP)
            logits_mask = (g < G)[:, None] & (index < end)[None, :]
            tl.store(logits_out + g[:, None] * pitch + index[None, :], logits, mask=logits_mask)
        if votes is not None:
            logits += tl.load(votes + slots, mask=visible, other=0.0)[None, :]
        logits *= _LOG2E
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        safe = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(logits - safe[:, None])
        rescale = tl.exp2(maximum - safe)
        maximum = new_maximum
        total = total * rescale + tl.sum(weights, 1)
        values = _load_vectors(VALUES, slots, visible, DV, DVP, VALUE_FORMAT, VALUE_TILE, VALUE_RUN, DTYPE, UPCAST)
        if not UPCAST:
            weights = weights.to(DTYPE)
        weighted = tl.dot(weights, values, weighted * rescale[:, None], input_precision="ieee")
    return maximum, total, weighted


@triton.jit(do_not_specialize=["listed", "pitch", "split_size"])
def decode_split(
    QUERIES,  # [P, G, D]
    STARTS,  # [P] of positions and votes
    LENGTHS,  # [P]
    KEYS,  # addresses [L], as VALUES, POSITIONS and VOTES
    KEY_STARTS,  # [P]
    KEY_COLUMNS,  # addresses [L] of every packed column
    KEY_GROUPS,  # None, or (first group [P], groups [P])
    VALUES,
    VALUE_STARTS,
    VALUE_COLUMNS,
    VALUE_GROUPS,
    POSITIONS,
    QUERY_POSITIONS,  # [rows]
    VOTES,
    SLOTS,  # [P, listed]
    LOGITS,  # [P, G, pitch]
    MAXIMA,  # [P, splits, G] in log2 units
    SUMS,  # [P, splits, G]
    PARTIAL,  # [P, splits, G, DV]
    OUT,  # [P, G, DV]
    scaling,
    listed,
    pitch,
    split_size,
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
    KEY_FORMAT: tl.constexpr,  # of the packed columns: types, widths, group size, options, heads that share a group
    KEY_TILE: tl.constexpr,
    VALUE_FORMAT: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TRIPS: tl.constexpr,  # split_size / BLOCK in the interpreter, where loops with run-time bounds may fail; else None
    UPCAST: tl.constexpr,
):
    """Partial attention of one split of a segment. Grid (P, splits).

    A split beyond the segment's length writes only logits (-inf), if logits are an output.
    """
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    layer = segment // PER_LAYER
    length = tl.load(LENGTHS + segment) if SLOTS is None else listed
    first = split * split_size
    stop = tl.minimum(first + split_size, length)
    end = stop if LOGITS is None else tl.minimum(first + split_size, pitch)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    active_heads = tl.where(first < stop, G, 0)  # a split beyond the length loads and stores nothing
    query_mask = (g < active_heads)[:, None] & (d < D)[None, :]
    query = tl.load(QUERIES + segment * (G * D) + g[:, None] * D + d[None, :], mask=query_mask, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    start = tl.load(STARTS + segment)
    positions = None if POSITIONS is None else column_pointer(POSITIONS, layer, tl.int32) + start
    query_position = None if QUERY_POSITIONS is None else tl.load(QUERY_POSITIONS + (segment % PER_LAYER) // HEADS)
    votes = None if VOTES is None else column_pointer(VOTES, layer, tl.float32) + start
    slots = None if SLOTS is None else SLOTS + segment * listed
    logits = None if LOGITS is None else LOGITS + segment * G * pitch

    keys, key_columns, keys_packed = _tensor_pointers(
        KEYS, KEY_STARTS, KEY_COLUMNS, KEY_GROUPS, segment, layer, D, DTYPE, KEY_FORMAT
    )
    values, value_columns, values_packed = _tensor_pointers(
        VALUES, VALUE_STARTS, VALUE_COLUMNS, VALUE_GROUPS, segment, layer, DV, DTYPE, VALUE_FORMAT
    )
    head = (segment % HEADS).to(tl.int32)
    maximum = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    weighted = tl.zeros((GP, DVP), tl.float32)
    residual_first = first  # from here on nothing is packed
    if KEY_TILE is not None or VALUE_TILE is not None:
        num_packed = tl.maximum(keys_packed, values_packed)
        if SLOTS is not None:  # any slot of the list may be packed
            num_packed = listed
        residual_first = tl.maximum(first, tl.minimum(end, tl.cdiv(num_packed, BLOCK) * BLOCK))
        maximum, total, weighted = _attend_range(
            query, first, residual_first, stop, positions, query_position, votes, slots, logits, scaling, pitch,
            maximum, total, weighted,
            (keys, key_columns, keys_packed, head), (values, value_columns, values_packed, head),
            DTYPE, G, GP, D, DP, DV, DVP, BLOCK, KEY_FORMAT, KEY_TILE, VALUE_FORMAT, VALUE_TILE, TRIPS, UPCAST,
        )  # fmt: skip
    if SLOTS is None or (KEY_TILE is None and VALUE_TILE is None):
        maximum, total, weighted = _attend_range(
            query, residual_first, end, stop, positions, query_position, votes, slots, logits, scaling, pitch,
            maximum, total, weighted,
            (keys, (), keys_packed, head), (values, (), values_packed, head),
            DTYPE, G, GP, D, DP, DV, DVP, BLOCK, KEY_FORMAT, None, VALUE_FORMAT, None, TRIPS, UPCAST,
        )  # fmt: skip

    dv = tl.arange(0, DVP)
    partial = segment * tl.num_programs(1) + split
    if PARTIAL is None:
        safe = tl.where(total == 0.0, 1.0, total)
        result = round_to(weighted / safe[:, None], DTYPE, UPCAST)
        out_mask = (g < G)[:, None] & (dv < DV)[None, :]
        tl.store(OUT + segment * (G * DV) + g[:, None] * DV + dv[None, :], result, mask=out_mask)
    else:
        out_mask = (g < active_heads)[:, None] & (dv < DV)[None, :]
        tl.store(PARTIAL + partial * (G * DV) + g[:, None] * DV + dv[None, :], weighted, mask=out_mask)
    if MAXIMA is not None:
        tl.store(MAXIMA + partial * G + g, maximum, mask=g < active_heads)
        tl.store(SUMS + partial * G + g, total, mask=g < active_heads)
