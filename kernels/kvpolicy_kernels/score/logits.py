"""What the passes over the keys share: loading entries, and the logits of the window's queries against them."""

import math

import torch
import triton
import triton.language as tl

from kvpolicy_kernels.score.tiles.grouping import largest

LOG2E = tl.constexpr(math.log2(math.e))
FLOOR = tl.constexpr(-1e30)  # a maximum over nothing: finite, so that differences are never -inf - -inf
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def storage(ADDRESSES, layer, DTYPE: tl.constexpr):
    """The first element of a column of one layer; launchers have checked that it is aligned."""
    return tl.multiple_of(tl.load(ADDRESSES + layer).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def entries(base, start, slots, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[BLOCK, PADDED] elements of the slots, zeros behind `WIDTH` and where not `inside`."""
    place = tl.arange(0, PADDED)
    mask = inside[:, None]
    if PADDED != WIDTH:
        mask = mask & (place < WIDTH)[None, :]
    return tl.load(base + (start + slots)[:, None] * WIDTH + place[None, :], mask=mask, other=0.0)


@triton.jit
def packed_queries(QUERIES, segment, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[DP, N], N = GP·WP: all queries of a segment. Transposed here, they go to shared memory before any loop."""
    row, place = tl.arange(0, N), tl.arange(0, DP)
    rows = QUERIES + segment * (N * D) + row[:, None] * D
    mask = (row >= 0)[:, None] & (place < D)[None, :]
    return tl.trans(tl.load(rows + place[None, :], mask=mask, other=0.0))


@triton.jit
def products(keys, queries, factor, UPCAST: tl.constexpr):
    """[BLOCK, N] logits to base 2. The keys are the rows: every query head of the group reads them once."""
    if UPCAST:
        found = tl.dot(keys.to(tl.float32), queries.to(tl.float32), input_precision="ieee")
    else:
        found = tl.dot(keys, queries, input_precision="ieee")
    return found * factor


@triton.jit
def grouped(logits, GROUP: tl.constexpr, HOW: tl.constexpr):
    """[BLOCK, GP, WP] with the G query heads reduced to one, [BLOCK, 1, WP], or as they are."""
    reduced = logits
    if HOW != 0:
        real = (tl.arange(0, logits.shape[1]) < GROUP)[None, :, None]
        if HOW == 2:
            reduced = largest(tl.where(real, logits, -float("inf")), 1)[:, None, :]
        else:
            reduced = tl.sum(tl.where(real, logits, 0.0), 1)[:, None, :]
        if HOW == 1:
            reduced = reduced / GROUP
    return reduced


@triton.jit
def use_logits(logits, votes, GP: tl.constexpr, WP: tl.constexpr, GROUP: tl.constexpr, USE: tl.constexpr):
    """[BLOCK, GP or 1, WP] logits of one use of the window, votes included."""
    whole = tl.reshape(logits, (logits.shape[0], GP, WP))
    if votes is not None:
        whole = whole + (votes * LOG2E)[:, None, None]
    return grouped(whole, GROUP, USE[3])


@triton.jit
def use_sees(positions, inside, candidate, asked, GROUP: tl.constexpr, GP: tl.constexpr, USE: tl.constexpr):
    """[BLOCK, GP or 1, WP] bool: whether a query of this use sees an entry. `asked` [WP] are its positions."""
    voting = (asked >= 0) & (tl.arange(0, asked.shape[0]) >= asked.shape[0] - USE[0])
    region = inside
    if USE[1]:
        region = candidate
    sees = region[:, None] & voting[None, :]
    if USE[2]:
        sees = sees & (positions[:, None] <= asked[None, :])
    sees = sees[:, None, :]
    if USE[3] == 0 and GROUP != GP:
        sees = sees & (tl.arange(0, GP) < GROUP)[None, :, None]
    return sees


@triton.jit
def is_candidate(positions, slots, length, sinks, recent):
    """Which slots may be evicted: they are held, and neither sinks nor recent."""
    return (slots < length - recent) & (slots < length) & (positions >= sinks)
