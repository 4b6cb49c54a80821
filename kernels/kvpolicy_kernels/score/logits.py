"""Device functions for the logits of the window's queries, used by the statistics and score kernels."""

import math

import triton
import triton.language as tl

from kvpolicy_kernels.score.tiles.grouping import nan_max

LOG2E = tl.constexpr(math.log2(math.e))
FLOOR = tl.constexpr(-1e30)  # an empty maximum: finite, so that no difference is -inf - -inf


@triton.jit
def load_queries(QUERIES, segment, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """All N = GP·WP queries of a segment, [DP, N]; transposed here, into shared memory before the loop."""
    row, dim = tl.arange(0, N), tl.arange(0, DP)
    rows = QUERIES + segment * (N * D) + row[:, None] * D
    mask = (row >= 0)[:, None] & (dim < D)[None, :]
    return tl.trans(tl.load(rows + dim[None, :], mask=mask, other=0.0))


@triton.jit
def window_logits(keys, queries, factor, UPCAST: tl.constexpr):
    """Logits to base 2, [BLOCK, N]. `factor` is scaling · log2(e); one product serves all query heads of the group."""
    if UPCAST:
        logits = tl.dot(keys.to(tl.float32), queries.to(tl.float32), input_precision="ieee")
    else:
        logits = tl.dot(keys, queries, input_precision="ieee")
    return logits * factor


@triton.jit
def reduce_heads(logits, GROUP: tl.constexpr, HOW: tl.constexpr):
    """Logits [BLOCK, GP, WP] reduced over the G query heads to [BLOCK, 1, WP]; unchanged if HOW is 0 ("none")."""
    reduced = logits
    if HOW != 0:
        head = (tl.arange(0, logits.shape[1]) < GROUP)[None, :, None]
        if HOW == 2:
            reduced = nan_max(tl.where(head, logits, -float("inf")), 1)[:, None, :]
        else:
            reduced = tl.sum(tl.where(head, logits, 0.0), 1)[:, None, :]
        if HOW == 1:
            reduced = reduced / GROUP
    return reduced


@triton.jit
def use_logits(logits, votes, GP: tl.constexpr, WP: tl.constexpr, GROUP: tl.constexpr, USE: tl.constexpr):
    """Logits of one use of the window with log-votes added, [BLOCK, GP or 1, WP]."""
    shaped = tl.reshape(logits, (logits.shape[0], GP, WP))
    if votes is not None:
        shaped = shaped + (votes * LOG2E)[:, None, None]
    return reduce_heads(shaped, GROUP, USE[3])


@triton.jit
def use_mask(positions, inside, candidate, query_positions, GROUP: tl.constexpr, GP: tl.constexpr, USE: tl.constexpr):
    """Which queries of this use see which entries, bool [BLOCK, GP or 1, WP]."""
    width: tl.constexpr = query_positions.shape[0]
    exists = (query_positions >= 0) & (tl.arange(0, width) >= width - USE[0])
    region = inside
    if USE[1]:
        region = candidate
    mask = region[:, None] & exists[None, :]
    if USE[2]:
        mask = mask & (positions[:, None] <= query_positions[None, :])
    mask = mask[:, None, :]
    if USE[3] == 0 and GROUP != GP:
        mask = mask & (tl.arange(0, GP) < GROUP)[None, :, None]
    return mask


@triton.jit
def is_candidate(positions, pinned, slots, length, sinks, recent):
    """Which slots may be evicted: those with an entry that is neither a sink nor recent, nor labelled.

    `pinned` is the label of a head, or None.
    """
    candidate = (slots < length - recent) & (slots < length) & (positions >= sinks)
    if pinned is not None:
        candidate = candidate & (tl.load(pinned + slots, mask=slots < length, other=0) == 0)
    return candidate
