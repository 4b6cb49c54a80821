"""What the last queries attend to: the tile function of `attention`."""

import triton
import triton.language as tl

from kvpolicy_kernels.score.tiles.grouping import over_group

NOWHERE, PROBABILITIES, SCORES = 0, 1, 2  # what OPTIONS[0] reduces over the query heads


@triton.jit
def _over_queries(probabilities, voters, deviation, REDUCE: tl.constexpr, DEVIATION: tl.constexpr):
    """[BLOCK, G, W] to [BLOCK, G]: mean or sum over the queries, plus `deviation` standard deviations."""
    counted = tl.maximum(voters, 1.0)
    total = tl.sum(probabilities, 2)
    scores = total
    if REDUCE == 0:
        scores = total / counted
    if DEVIATION:
        width: tl.constexpr = probabilities.shape[2]
        voting = (tl.arange(0, width) + voters >= width)[None, None, :]
        spread = tl.where(voting, probabilities - (total / counted)[:, :, None], 0.0)
        variance = tl.sum(spread * spread, 2) / tl.maximum(voters - 1.0, 1.0)
        scores += deviation * tl.sqrt(variance)
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
    """[BLOCK], before pooling. OPTIONS: what is grouped, how; whether queries are summed; whether they deviate."""
    if OPTIONS[0] == 1:
        probabilities = over_group(probabilities, group, 1, OPTIONS[1])[:, None, :]
    scores = _over_queries(probabilities, voters, arguments[0], OPTIONS[2], OPTIONS[3])
    return over_group(scores, group, 1, OPTIONS[1]) if OPTIONS[0] == 2 else tl.sum(scores, 1)
