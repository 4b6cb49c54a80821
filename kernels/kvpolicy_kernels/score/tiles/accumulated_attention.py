"""Tile function of the scorer `accumulated_attention`: attention mass, reduced over query heads."""

import triton
import triton.language as tl

from kvpolicy_kernels.score.tiles.grouping import reduce_group


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
    """[BLOCK]. OPTIONS: reduction over query heads (`grouping.HOW`)."""
    return reduce_group(attention, group, 1, OPTIONS[0])
