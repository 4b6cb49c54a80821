"""Lloyd-Max codebook for normally distributed numbers."""

import functools
import itertools
import math
from collections.abc import Sequence


@functools.cache
def codebook(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, ascending, with the least mean squared error for a standard normal number.

    Lloyd-Max iteration on the positive half: edges are midpoints of levels, levels are means between edges.
    """
    count = 2 ** (bits - 1)
    levels, change = [3 * (index + 0.5) / count for index in range(count)], math.inf
    while change > 1e-14:
        edges = [0.0, *edges_between(levels), math.inf]
        means = [_mean(low, high) for low, high in itertools.pairwise(edges)]
        change = max(abs(mean - level) for mean, level in zip(means, levels, strict=True))
        levels = means
    return (*(-level for level in reversed(levels)), *levels)


def edges_between(levels: Sequence[float]) -> tuple[float, ...]:
    """Decision edges: midpoints of the ascending `levels`, one fewer than levels."""
    return tuple((low + high) / 2 for low, high in itertools.pairwise(levels))


def _mean(low: float, high: float) -> float:
    """Mean of a standard normal number given that it is between two bounds."""
    density = (math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi) for bound in (low, high))
    survival = (math.erfc(bound / math.sqrt(2)) / 2 for bound in (low, high))
    return (next(density) - next(density)) / (next(survival) - next(survival))
