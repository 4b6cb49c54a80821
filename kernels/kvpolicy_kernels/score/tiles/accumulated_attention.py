"""What an entry has been attended to: the tile function of `accumulated_attention`."""

import triton
import triton.language as tl

from kvpolicy_kernels.score.tiles.grouping import over_group


@triton.jit
def accumulated_attention(
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
    """[BLOCK]; OPTIONS[0] says how query heads are reduced."""
    return over_group(attention, group, 1, OPTIONS[0])
