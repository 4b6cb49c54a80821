"""Tile function of the scorer `recency`: newest first."""

import triton
import triton.language as tl


@triton.jit
def recency(
    keys,
    values,
    positions,
    newest,
    probabilities,
    voters,
    group,
    attention,
    statistic,
    column,
    length,
    arguments,
    OPTIONS: tl.constexpr,
):
    """[BLOCK]: positions relative to the newest of the row, since float32 holds integers exactly only up to 2^24."""
    return (positions - newest).to(tl.float32)
