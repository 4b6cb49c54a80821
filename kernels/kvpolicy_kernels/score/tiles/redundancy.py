"""Entries that say what newer ones say again: statistic and tile function of `redundancy`."""

import triton
import triton.language as tl


@triton.jit
def directions(keys):
    """[BLOCK, D], keys of length 1; zeros for a key of zeros."""
    norms = tl.sqrt(tl.sum(keys * keys, 1))
    return keys / (norms + 1e-8)[:, None]


@triton.jit
def mean_similarity(
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
    """[BLOCK], over the other entries; `statistic` is the sum of all directions, `column` what is forgiven, or None."""
    own = directions(keys)
    similarity = tl.sum(own * (statistic[None, :] - own), 1)
    if column is not None:
        similarity -= column
    return similarity / tl.maximum(length, 1.0)
