"""Tile function of the scorer `attention`: attention probabilities of the window's queries."""

import triton
import triton.language as tl

from kvpolicy_kernels.score.tiles.grouping import reduce_group

NOWHERE, PROBABILITIES, SCORES = 0, 1, 2  # OPTIONS[0]: what is reduced over the query heads


@triton.jit
def _over_queries(probabilities, voters, deviation, REDUCE: tl.constexpr, SPREAD: tl.constexpr):
    """[BLOCK, G, W] to [BLOCK, G]: mean (REDUCE 0) or sum over the queries, plus `deviation` times their spread."""
    count = tl.maximum(voters, 1.0)
    total = tl.sum(probabilities, 2)
    scores = total
    if REDUCE == 0:
        scores = total / count
    if SPREAD > 0:
        width: tl.constexpr = probabilities.shape[2]
        exists = (tl.arange(0, width) + voters >= width)[None, None, :]
        deviations = tl.where(exists, probabilities - (total / count)[:, :, None], 0.0)
        variance = tl.sum(deviations * deviations, 2) / tl.maximum(voters - 1.0, 1.0)
        scores += deviation * (variance if SPREAD == 2 else tl.sqrt(variance))
    return scores


@triton.jit
def attention_votes(
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
    """[BLOCK]. OPTIONS: what is reduced over heads, how; whether queries are summed; the spread that is added.

    That is 0 for none, 1 for the standard deviation, 2 for the variance.
    """
    if OPTIONS[0] == 1:
        probabilities = reduce_group(probabilities, group, 1, OPTIONS[1])[:, None, :]
    scores = _over_queries(probabilities, voters, arguments[0], OPTIONS[2], OPTIONS[3])
    return reduce_group(scores, group, 1, OPTIONS[1]) if OPTIONS[0] == 2 else tl.sum(scores, 1)
