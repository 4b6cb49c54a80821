"""Tile function of the scorer `key_norm`: keys with a small norm first."""

import triton
import triton.language as tl


@triton.jit
def key_norm(
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
    """[BLOCK]: the negative L2 norm of the keys."""
    return -tl.sqrt(tl.sum(keys * keys, 1))
