"""The best codebook for normal numbers."""

import functools
import itertools
import math
from collections.abc import Sequence


@functools.cache
def codebook(bits: int) -> tuple[float, ...]:
    """The 2^bits numbers, ascending, that represent a standard normal one with the least squared error.

    Lloyd's and Max's iteration on the positive half: edges halfway between numbers, numbers the means between edges.
    """
    half = 2 ** (bits - 1)
    numbers, change = [3 * (place + 0.5) / half for place in range(half)], math.inf
    while change > 1e-14:
        edges = [0.0, *edges_between(numbers), math.inf]
        means = [_mean(low, high) for low, high in itertools.pairwise(edges)]
        change = max(abs(mean - number) for mean, number in zip(means, numbers, strict=True))
        numbers = means
    return (*(-number for number in reversed(numbers)), *numbers)


def edges_between(numbers: Sequence[float]) -> tuple[float, ...]:
    """Where one of the ascending `numbers` stops to be the nearest: one edge fewer than numbers."""
    return tuple((low + high) / 2 for low, high in itertools.pairwise(numbers))


def _mean(low: float, high: float) -> float:
    """Of a standard normal number between two bounds."""
    density = (math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi) for bound in (low, high))
    residual = (math.erfc(bound / math.sqrt(2)) / 2 for bound in (low, high))
    return (next(density) - next(density)) / (next(residual) - next(residual))
