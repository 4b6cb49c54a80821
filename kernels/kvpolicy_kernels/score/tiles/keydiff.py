"""Statistic and tile function of the scorer `keydiff`: keys that are unlike the mean direction first."""

import triton
import triton.language as tl


@triton.jit
def unit_keys(keys):
    """[BLOCK, D]: keys normalised to length 1; zeros for zero keys."""
    return keys / tl.maximum(tl.sqrt(tl.sum(keys * keys, 1)), 1e-12)[:, None]


@triton.jit
def away_from_anchor(
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
    """[BLOCK]: minus the cosine of each key and the anchor. `statistic` is the sum of `unit_keys`."""
    anchor = statistic / tl.maximum(tl.sqrt(tl.sum(statistic * statistic, 0)), 1e-12)
    return -tl.sum(unit_keys(keys) * anchor[None, :], 1)
