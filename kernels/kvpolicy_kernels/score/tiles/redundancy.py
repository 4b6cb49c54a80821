"""Statistic and tile function of the scorer `redundancy`: mean cosine similarity to the other entries of the head."""

import triton
import triton.language as tl


@triton.jit
def directions(keys):
    """[BLOCK, D]: keys normalised to length 1; zeros for zero keys."""
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
    """[BLOCK]: mean similarity. `statistic` is the sum of `directions`, `column` the forgiven similarity, or None."""
    own = directions(keys)
    similarity = tl.sum(own * (statistic[None, :] - own), 1)
    if column is not None:
        similarity -= column
    return similarity / tl.maximum(length, 1.0)
