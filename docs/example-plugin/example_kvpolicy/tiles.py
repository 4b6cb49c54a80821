"""The tile function of `key_diversity`. Imports Triton, so it is imported where the scorer is asked for its tile."""

import triton
import triton.language as tl


@triton.jit
def directions(keys):
    """Keys [BLOCK, D] at length 1, summed over all held entries of a head before any score is computed."""
    return keys / tl.maximum(tl.sqrt(tl.sum(keys * keys, 1)), 1e-12)[:, None]


@triton.jit
def distance(
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
    """[BLOCK], larger = less like the others; `arguments[0]` is the exponent."""
    mean = statistic / tl.maximum(tl.sqrt(tl.sum(statistic * statistic, 0)), 1e-12)
    apart = tl.maximum(1 - tl.sum(directions(keys) * mean[None, :], 1), 0.0)
    return tl.where(apart > 0, tl.exp2(arguments[0] * tl.log2(tl.maximum(apart, 1e-30))), 0.0)
