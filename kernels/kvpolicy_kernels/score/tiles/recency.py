"""Newest first: the tile function of `recency`."""

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
    """[BLOCK], positions counted back from the newest of the row: float32 holds no integer beyond 2^24 exactly."""
    return (positions - newest).to(tl.float32)
