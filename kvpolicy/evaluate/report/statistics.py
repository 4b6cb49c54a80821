"""Means of cases with bootstrap intervals, and whether two contenders can be told apart."""

from collections.abc import Sequence
from functools import lru_cache

import attrs
import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000
_LEVEL = 0.95
_FEWEST = 3  # cases by which two contenders can be told apart


@attrs.frozen
class Estimate:
    """A mean over cases, with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one number. Resampled are the cases, all alike, whatever document they are about."""
    numbers = np.asarray(values, dtype=np.float64)
    return Estimate(float(numbers.mean()), *_interval(numbers))


def differ(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the interval of the mean difference, case by case, leaves out zero; never with fewer than three cases.

    Two cases that differ in the same direction would do so by chance every other time.
    """
    if len(ours) < _FEWEST:
        return False
    low, high = _interval(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))
    return low > 0 or high < 0


def _interval(numbers: NDArray[np.float64]) -> tuple[float, float]:
    means = numbers[_draws(len(numbers))].mean(1)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


@lru_cache(maxsize=64)
def _draws(count: int) -> NDArray[np.int64]:
    """[draws, count] indices, the same for every contender, so that intervals do not depend on their order."""
    return np.random.default_rng(0).integers(0, count, (_DRAWS, count))
